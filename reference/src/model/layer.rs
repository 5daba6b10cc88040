//! A decoder layer as a schedule sees it: attention, dispatch, mlp, combine, each forward,
//! input-backward and weight-backward; and the whole layer in one call.

use fathom_trace::{Component, Phase};

use crate::backend::{Backend, Result};
use crate::layers::Cx;
use crate::layers::attention::{AttentionKept, AttentionLayer};
use crate::layers::moe::{Dispatched, MlpGradient, MlpKept, MlpLayer, MlpOutput};
use crate::layers::operand::Operand;

/// A decoder layer.
#[derive(Clone, Debug)]
pub struct Layer {
    /// Its number; MTP modules follow the last layer.
    pub index: usize,
    /// First half.
    pub attention: AttentionLayer,
    /// Second half.
    pub mlp: MlpLayer,
}

/// What a layer's backward needs, between its parts.
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

    /// F of attention: `h = x + attention(x)`.
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

    /// F of dispatch.
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

    /// F of mlp.
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

    /// F of combine: the layer's output.
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

    /// B of combine: the output's gradient to the experts' rows.
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

    /// B of mlp.
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

    /// B of dispatch: the gradient of `h`.
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

    /// B of attention: the gradient of `x`.
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

    /// W of mlp and dispatch.
    ///
    /// # Errors
    /// As [`Layer::attention_f`].
    pub fn mlp_w<B: Backend>(&self, cx: &Cx<'_, B>, kept: MlpKept<B>) -> Result<()> {
        self.at(cx, Component::Mlp, Phase::W);
        self.mlp.backward_weight(cx, kept)
    }

    /// W of attention.
    ///
    /// # Errors
    /// As [`Layer::attention_f`].
    pub fn attention_w<B: Backend>(&self, cx: &Cx<'_, B>, kept: AttentionKept<B>) -> Result<()> {
        self.at(cx, Component::Attention, Phase::W);
        self.attention.backward_weight(cx, kept)
    }

    /// The whole forward.
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

    /// The whole input-backward.
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

    /// The whole weight-backward.
    ///
    /// # Errors
    /// As [`Layer::attention_f`].
    pub fn backward_weight<B: Backend>(&self, cx: &Cx<'_, B>, kept: LayerKept<B>) -> Result<()> {
        self.mlp_w(cx, kept.mlp)?;
        self.attention_w(cx, kept.attention)
    }
}
