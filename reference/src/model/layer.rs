//! A decoder layer in the parts that a pipeline schedule moves: attention, dispatch, mlp, combine,
//! each with its forward (F), input-backward (B) and weight-backward (W); and the whole layer in
//! one call.

use fathom_trace::{Component, Phase};

use crate::backend::{Backend, Result};
use crate::layers::Cx;
use crate::layers::attention::{AttentionKept, AttentionLayer};
use crate::layers::moe::{Dispatched, MlpGradient, MlpKept, MlpLayer, MlpOutput};
use crate::layers::operand::Operand;

/// A decoder layer: attention with its residual, then a dense or MoE feed-forward part with its
/// residual. Activations are \[t, hidden\], t the rows of all sequences of a micro-batch.
#[derive(Clone, Debug)]
pub struct Layer {
    /// Its number from 0 over all stages; MTP modules follow the last layer.
    pub index: usize,
    /// First half: norm, attention, projection, residual.
    pub attention: AttentionLayer,
    /// Second half: norm, router with routed and shared experts or a dense feed-forward part,
    /// residual.
    pub mlp: MlpLayer,
}

/// What a layer's backward needs of its forward; B adds what W needs.
#[derive(Clone, Debug)]
pub struct LayerKept<B: Backend> {
    /// Of the attention.
    pub attention: AttentionKept<B>,
    /// Of dispatch, mlp and combine.
    pub mlp: MlpKept<B>,
}

impl Layer {
    fn at<B: Backend>(&self, cx: &Cx<'_, B>, component: Component, phase: Phase) {
        cx.at(Some(self.index), component, phase);
    }

    /// F of attention: `h = x + attention(norm(x))`, with what its backward needs.
    ///
    /// # Errors
    /// Those of the backend, here and below.
    pub fn attention_f<B: Backend>(
        &self,
        cx: &Cx<'_, B>,
        x: &B::Buffer,
    ) -> Result<(B::Buffer, AttentionKept<B>)> {
        self.at(cx, Component::Attention, Phase::F);
        self.attention.forward(cx, x)
    }

    /// F of dispatch: normalises `h`, chooses experts and brings each token's row to them.
    ///
    /// # Errors
    /// As [`Layer::attention_f`].
    pub fn dispatch_f<B: Backend>(
        &self,
        cx: &Cx<'_, B>,
        h: &B::Buffer,
    ) -> Result<(Dispatched<B>, MlpKept<B>)> {
        self.at(cx, Component::Dispatch, Phase::F);
        self.mlp.dispatch(cx, h)
    }

    /// F of mlp: routed experts on their rows, and the shared expert or dense part on the tokens.
    ///
    /// # Errors
    /// As [`Layer::attention_f`].
    pub fn mlp_f<B: Backend>(
        &self,
        cx: &Cx<'_, B>,
        input: &Dispatched<B>,
        kept: &mut MlpKept<B>,
    ) -> Result<MlpOutput<B>> {
        self.at(cx, Component::Mlp, Phase::F);
        self.mlp.mlp(cx, input, kept)
    }

    /// F of combine: brings the experts' rows back and gives the layer's output, the sum of `h`,
    /// the routed and the dense part.
    ///
    /// # Errors
    /// As [`Layer::attention_f`].
    pub fn combine_f<B: Backend>(
        &self,
        cx: &Cx<'_, B>,
        h: &B::Buffer,
        output: MlpOutput<B>,
        kept: &MlpKept<B>,
    ) -> Result<B::Buffer> {
        self.at(cx, Component::Combine, Phase::F);
        self.mlp.combine(cx, h, output, kept)
    }

    /// B of combine: brings the gradient `dy` of the layer's output to the experts' rows, in the
    /// form in which their GEMMs read it; none in a dense layer.
    ///
    /// # Errors
    /// As [`Layer::attention_f`].
    pub fn combine_b<B: Backend>(
        &self,
        cx: &Cx<'_, B>,
        kept: &MlpKept<B>,
        dy: &B::Buffer,
    ) -> Result<Option<Operand<B>>> {
        self.at(cx, Component::Combine, Phase::B);
        self.mlp.combine_backward(cx, kept, dy)
    }

    /// B of mlp: gradients of the inputs of routed experts (from `rows`) and dense part (from
    /// `dy`).
    ///
    /// # Errors
    /// As [`Layer::attention_f`].
    pub fn mlp_b<B: Backend>(
        &self,
        cx: &Cx<'_, B>,
        kept: &mut MlpKept<B>,
        dy: &B::Buffer,
        rows: Option<Operand<B>>,
    ) -> Result<MlpGradient<B>> {
        self.at(cx, Component::Mlp, Phase::B);
        self.mlp.mlp_backward_input(cx, kept, dy, rows)
    }

    /// B of dispatch: the gradient of `h`, from experts, gate, norm and residual.
    ///
    /// # Errors
    /// As [`Layer::attention_f`].
    pub fn dispatch_b<B: Backend>(
        &self,
        cx: &Cx<'_, B>,
        kept: &mut MlpKept<B>,
        dy: &B::Buffer,
        gradient: MlpGradient<B>,
    ) -> Result<B::Buffer> {
        self.at(cx, Component::Dispatch, Phase::B);
        self.mlp.dispatch_backward_input(cx, kept, dy, gradient)
    }

    /// B of attention: the gradient of `x`, given that of `h`.
    ///
    /// # Errors
    /// As [`Layer::attention_f`].
    pub fn attention_b<B: Backend>(
        &self,
        cx: &Cx<'_, B>,
        kept: &mut AttentionKept<B>,
        dh: B::Buffer,
    ) -> Result<B::Buffer> {
        self.at(cx, Component::Attention, Phase::B);
        self.attention.backward_input(cx, kept, dh)
    }

    /// W of mlp and dispatch: adds the gradients of experts, gate and norm to the accumulators.
    ///
    /// # Errors
    /// As [`Layer::attention_f`].
    pub fn mlp_w<B: Backend>(&self, cx: &Cx<'_, B>, kept: MlpKept<B>) -> Result<()> {
        self.at(cx, Component::Mlp, Phase::W);
        self.mlp.backward_weight(cx, kept)
    }

    /// W of attention: adds the gradients of its projections and norms to the accumulators.
    ///
    /// # Errors
    /// As [`Layer::attention_f`].
    pub fn attention_w<B: Backend>(&self, cx: &Cx<'_, B>, kept: AttentionKept<B>) -> Result<()> {
        self.at(cx, Component::Attention, Phase::W);
        self.attention.backward_weight(cx, kept)
    }

    /// F of the whole layer: its output \[t, hidden\], and what the backward needs.
    ///
    /// # Errors
    /// As [`Layer::attention_f`].
    pub fn forward<B: Backend>(
        &self,
        cx: &Cx<'_, B>,
        x: &B::Buffer,
    ) -> Result<(B::Buffer, LayerKept<B>)> {
        let (h, attention) = self.attention_f(cx, x)?;
        let (dispatched, mut mlp) = self.dispatch_f(cx, &h)?;
        let output = self.mlp_f(cx, &dispatched, &mut mlp)?;
        let y = self.combine_f(cx, &h, output, &mlp)?;
        Ok((y, LayerKept { attention, mlp }))
    }

    /// B of the whole layer: the gradient of `x`, given that of its output.
    ///
    /// # Errors
    /// As [`Layer::attention_f`].
    pub fn backward_input<B: Backend>(
        &self,
        cx: &Cx<'_, B>,
        kept: &mut LayerKept<B>,
        dy: B::Buffer,
    ) -> Result<B::Buffer> {
        let rows = self.combine_b(cx, &kept.mlp, &dy)?;
        let gradient = self.mlp_b(cx, &mut kept.mlp, &dy, rows)?;
        let dh = self.dispatch_b(cx, &mut kept.mlp, &dy, gradient)?;
        self.attention_b(cx, &mut kept.attention, dh)
    }

    /// W of the whole layer; input-backward comes first.
    ///
    /// # Errors
    /// As [`Layer::attention_f`].
    pub fn backward_weight<B: Backend>(&self, cx: &Cx<'_, B>, kept: LayerKept<B>) -> Result<()> {
        self.mlp_w(cx, kept.mlp)?;
        self.attention_w(cx, kept.attention)
    }
}
