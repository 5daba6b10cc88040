//! A decoder layer in the parts that a pipeline schedule moves: attention, dispatch, mlp, combine,
//! each with its forward (F), input-backward (B) and weight-backward (W); and the whole layer in
//! one call.

use fathom_trace::{Component, Phase};

use crate::backend::{Backend, Result};
use crate::layers::Cx;
use crate::layers::attention::{AttentionKept, AttentionLayer};
use crate::layers::mlp::{Dispatched, MlpGradient, MlpKept, MlpLayer, MlpOutput};
use crate::layers::operand::Operand;
use crate::layers::residual::{Residual, ResidualGradient};

/// What micro-batches side by side give: a buffer of each, and what each keeps.
type SideBySide<B, Kept> = (Vec<<B as Backend>::Buffer>, Vec<Kept>);

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

    /// F of attention: `h = x + attention(norm(x))`, the sum or its terms, with what its backward
    /// needs, of each of the rank's parts of a micro-batch.
    ///
    /// # Errors
    /// Those of the backend, here and below.
    #[allow(clippy::type_complexity)]
    pub fn attention_f<B: Backend>(
        &self,
        cxs: &[Cx<'_, B>],
        xs: Vec<B::Buffer>,
    ) -> Result<Vec<(Residual<B>, AttentionKept<B>)>> {
        self.at(&cxs[0], Component::Attention, Phase::F);
        self.attention.forward(cxs, xs)
    }

    /// F of dispatch: normalises each `h`, chooses experts and brings each token's row to them, for
    /// the rank's parts of a micro-batch.
    ///
    /// # Errors
    /// As [`Layer::attention_f`].
    #[allow(clippy::type_complexity)]
    pub fn dispatch_f<B: Backend>(
        &self,
        cxs: &[Cx<'_, B>],
        hs: Vec<Residual<B>>,
    ) -> Result<Vec<(Dispatched<B>, MlpKept<B>)>> {
        self.at(&cxs[0], Component::Dispatch, Phase::F);
        self.mlp.dispatch(cxs, hs)
    }

    /// F of mlp: routed experts on the rows of all micro-batches, and the shared expert or dense
    /// part on the tokens of each.
    ///
    /// # Errors
    /// As [`Layer::attention_f`].
    pub fn mlp_f<B: Backend>(
        &self,
        cxs: &[Cx<'_, B>],
        inputs: &[Dispatched<B>],
        kept: &mut [MlpKept<B>],
    ) -> Result<Vec<MlpOutput<B>>> {
        self.at(&cxs[0], Component::Mlp, Phase::F);
        self.mlp.mlp(cxs, inputs, kept)
    }

    /// F of combine: brings the experts' rows back and gives the layer's output, the sum of the `h`
    /// that dispatch kept, the routed and the dense part.
    ///
    /// # Errors
    /// As [`Layer::attention_f`].
    pub fn combine_f<B: Backend>(
        &self,
        cx: &Cx<'_, B>,
        output: MlpOutput<B>,
        kept: &MlpKept<B>,
    ) -> Result<B::Buffer> {
        self.at(cx, Component::Combine, Phase::F);
        self.mlp.combine(cx, output, kept)
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
    /// `dy`), for all micro-batches.
    ///
    /// # Errors
    /// As [`Layer::attention_f`].
    pub fn mlp_b<B: Backend>(
        &self,
        cxs: &[Cx<'_, B>],
        kept: &mut [MlpKept<B>],
        dy: &[B::Buffer],
        rows: Vec<Option<Operand<B>>>,
    ) -> Result<Vec<MlpGradient<B>>> {
        self.at(&cxs[0], Component::Mlp, Phase::B);
        self.mlp.mlp_backward_input(cxs, kept, dy, rows)
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
    ) -> Result<ResidualGradient<B>> {
        self.at(cx, Component::Dispatch, Phase::B);
        self.mlp.dispatch_backward_input(cx, kept, dy, gradient)
    }

    /// B of attention: the gradient of `x`, given that of `h`, of each of the rank's parts of a
    /// micro-batch.
    ///
    /// # Errors
    /// As [`Layer::attention_f`].
    pub fn attention_b<B: Backend>(
        &self,
        cxs: &[Cx<'_, B>],
        kept: &mut [AttentionKept<B>],
        dhs: Vec<ResidualGradient<B>>,
    ) -> Result<Vec<B::Buffer>> {
        self.at(&cxs[0], Component::Attention, Phase::B);
        self.attention.backward_input(cxs, kept, dhs)
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

    /// F of attention on micro-batches side by side.
    #[allow(clippy::type_complexity)]
    pub(super) fn attentions_f<B: Backend>(
        &self,
        cxs: &[Cx<'_, B>],
        xs: Vec<B::Buffer>,
    ) -> Result<(Vec<Residual<B>>, Vec<AttentionKept<B>>)> {
        let (mut xs, mut parts) = (xs.into_iter(), Vec::with_capacity(cxs.len()));
        for cxs in cxs.chunks(cxs[0].parts()) {
            parts.extend(self.attention_f(cxs, xs.by_ref().take(cxs.len()).collect())?);
        }
        Ok(parts.into_iter().unzip())
    }

    /// F of dispatch on micro-batches side by side.
    #[allow(clippy::type_complexity)]
    pub(super) fn dispatches_f<B: Backend>(
        &self,
        cxs: &[Cx<'_, B>],
        hs: Vec<Residual<B>>,
    ) -> Result<(Vec<Dispatched<B>>, Vec<MlpKept<B>>)> {
        let (mut hs, mut parts) = (hs.into_iter(), Vec::with_capacity(cxs.len()));
        for cxs in cxs.chunks(cxs[0].parts()) {
            parts.extend(self.dispatch_f(cxs, hs.by_ref().take(cxs.len()).collect())?);
        }
        Ok(parts.into_iter().unzip())
    }

    /// F of combine on micro-batches side by side.
    pub(super) fn combines_f<B: Backend>(
        &self,
        cxs: &[Cx<'_, B>],
        outputs: Vec<MlpOutput<B>>,
        kept: &[MlpKept<B>],
    ) -> Result<Vec<B::Buffer>> {
        let parts = cxs.iter().zip(outputs).zip(kept);
        parts.map(|((cx, output), kept)| self.combine_f(cx, output, kept)).collect()
    }

    /// B of combine on micro-batches side by side.
    pub(super) fn combines_b<B: Backend>(
        &self,
        cxs: &[Cx<'_, B>],
        kept: &[MlpKept<B>],
        dys: &[B::Buffer],
    ) -> Result<Vec<Option<Operand<B>>>> {
        let parts = cxs.iter().zip(kept).zip(dys);
        parts.map(|((cx, kept), dy)| self.combine_b(cx, kept, dy)).collect()
    }

    /// B of dispatch on micro-batches side by side.
    pub(super) fn dispatches_b<B: Backend>(
        &self,
        cxs: &[Cx<'_, B>],
        kept: &mut [MlpKept<B>],
        dys: Vec<B::Buffer>,
        gradients: Vec<MlpGradient<B>>,
    ) -> Result<Vec<ResidualGradient<B>>> {
        let parts = cxs.iter().zip(kept).zip(dys).zip(gradients);
        let part = |(((cx, kept), dy), gradient): (((&Cx<'_, B>, _), B::Buffer), _)| {
            self.dispatch_b(cx, kept, &dy, gradient)
        };
        parts.map(part).collect()
    }

    /// B of attention on micro-batches side by side.
    pub(super) fn attentions_b<B: Backend>(
        &self,
        cxs: &[Cx<'_, B>],
        kept: &mut [AttentionKept<B>],
        dhs: Vec<ResidualGradient<B>>,
    ) -> Result<Vec<B::Buffer>> {
        let (mut dhs, mut dxs) = (dhs.into_iter(), Vec::with_capacity(cxs.len()));
        let parts = cxs[0].parts();
        for (cxs, kept) in cxs.chunks(parts).zip(kept.chunks_mut(parts)) {
            dxs.extend(self.attention_b(cxs, kept, dhs.by_ref().take(cxs.len()).collect())?);
        }
        Ok(dxs)
    }

    /// W of mlp and dispatch on micro-batches side by side.
    pub(super) fn mlps_w<B: Backend>(
        &self,
        cxs: &[Cx<'_, B>],
        kept: Vec<MlpKept<B>>,
    ) -> Result<()> {
        cxs.iter().zip(kept).try_for_each(|(cx, kept)| self.mlp_w(cx, kept))
    }

    /// W of attention on micro-batches side by side.
    pub(super) fn attentions_w<B: Backend>(
        &self,
        cxs: &[Cx<'_, B>],
        kept: Vec<AttentionKept<B>>,
    ) -> Result<()> {
        cxs.iter().zip(kept).try_for_each(|(cx, kept)| self.attention_w(cx, kept))
    }

    /// F of the whole layer for micro-batches that run side by side: the output \[t, hidden\] of
    /// each, and what its backward needs.
    ///
    /// # Errors
    /// As [`Layer::attention_f`].
    pub fn forward<B: Backend>(
        &self,
        cxs: &[Cx<'_, B>],
        xs: Vec<B::Buffer>,
    ) -> Result<SideBySide<B, LayerKept<B>>> {
        let (hs, attention) = self.attentions_f(cxs, xs)?;
        let (dispatched, mut mlp) = self.dispatches_f(cxs, hs)?;
        let outputs = self.mlp_f(cxs, &dispatched, &mut mlp)?;
        drop(dispatched);
        let ys = self.combines_f(cxs, outputs, &mlp)?;
        Ok((ys, LayerKept::join(attention, mlp)))
    }

    /// B of the whole layer: the gradient of each `x`, given that of its output.
    ///
    /// # Errors
    /// As [`Layer::attention_f`].
    pub fn backward_input<B: Backend>(
        &self,
        cxs: &[Cx<'_, B>],
        kept: &mut Vec<LayerKept<B>>,
        dys: Vec<B::Buffer>,
    ) -> Result<Vec<B::Buffer>> {
        let (mut attention, mut mlp) = LayerKept::split(std::mem::take(kept));
        let rows = self.combines_b(cxs, &mlp, &dys)?;
        let gradients = self.mlp_b(cxs, &mut mlp, &dys, rows)?;
        let dhs = self.dispatches_b(cxs, &mut mlp, dys, gradients)?;
        let dxs = self.attentions_b(cxs, &mut attention, dhs)?;
        *kept = LayerKept::join(attention, mlp);
        Ok(dxs)
    }

    /// W of the whole layer; input-backward comes first.
    ///
    /// # Errors
    /// As [`Layer::attention_f`].
    pub fn backward_weight<B: Backend>(
        &self,
        cxs: &[Cx<'_, B>],
        kept: Vec<LayerKept<B>>,
    ) -> Result<()> {
        let (attention, mlp) = LayerKept::split(kept);
        self.mlps_w(cxs, mlp)?;
        self.attentions_w(cxs, attention)
    }
}

impl<B: Backend> LayerKept<B> {
    /// What micro-batches side by side keep, of the two halves.
    pub(super) fn join(
        attention: Vec<AttentionKept<B>>,
        mlp: Vec<MlpKept<B>>,
    ) -> Vec<LayerKept<B>> {
        let both = attention.into_iter().zip(mlp);
        both.map(|(attention, mlp)| LayerKept { attention, mlp }).collect()
    }

    /// The transpose of [`LayerKept::join`].
    pub(super) fn split(kept: Vec<LayerKept<B>>) -> (Vec<AttentionKept<B>>, Vec<MlpKept<B>>) {
        kept.into_iter().map(|LayerKept { attention, mlp }| (attention, mlp)).unzip()
    }
}
