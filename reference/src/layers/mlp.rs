//! The second half of a layer in its three parts: dispatch (norm, router, tokens to experts), mlp
//! (routed and shared experts, or a dense feed-forward part) and combine (back, sum, residual).
//!
//! What the parts do for the routed experts stands in [`moe`](super::moe).

use crate::backend::{Backend, Result};
use crate::layers::delayed::Side;
use crate::layers::feed_forward::{FeedForward, FeedForwardKept};
use crate::layers::linear::{NormKept, Normed};
use crate::layers::moe::{MoeKept, MoeLayer};
use crate::layers::operand::Operand;
use crate::layers::residual::{Residual, ResidualGradient};
use crate::layers::{Cx, Norm};
use crate::ops::add::Add;

/// The second half of a layer: norm, dense feed-forward part or experts, residual. It runs as
/// dispatch, mlp and combine, the parts that DualPipe overlaps (DeepSeek-V3 report, section 3.2.1).
#[derive(Clone, Debug)]
pub struct MlpLayer {
    /// Norm before everything.
    pub norm: Norm,
    /// The dense part, or the shared expert of an MoE layer.
    pub dense: Option<FeedForward>,
    /// The routed experts.
    pub moe: Option<MoeLayer>,
}

/// What dispatch hands to mlp.
#[derive(Clone, Debug)]
pub struct Dispatched<B: Backend> {
    /// The normalised rows, for the dense part or shared expert.
    pub n: Operand<B>,
    /// The experts' rows, and the gate value of each.
    pub routed: Option<(Operand<B>, B::Buffer)>,
}

/// What mlp hands to combine.
#[derive(Clone, Debug)]
pub struct MlpOutput<B: Backend> {
    /// The dense part's or shared expert's output, a row for each token.
    dense: Option<B::Buffer>,
    /// The routed experts' outputs in order of expert, their gate values multiplied in.
    routed: Option<B::Buffer>,
}

/// What the backward of the three parts needs.
#[derive(Clone, Debug)]
pub struct MlpKept<B: Backend> {
    norm: NormKept<B>,
    /// The normalised rows, which the gate reads; none without experts or where norms are
    /// recomputed.
    n: Option<B::Buffer>,
    /// The same as the products read them; none where norms are recomputed.
    n_operand: Option<Operand<B>>,
    dense: Option<FeedForwardKept<B>>,
    /// The routed experts' share.
    pub moe: Option<MoeKept<B>>,
}

/// Gradients between the backward of mlp and that of dispatch.
#[derive(Clone, Debug)]
pub struct MlpGradient<B: Backend> {
    /// Of the normalised rows, through the dense part or shared expert.
    dense: Option<B::Buffer>,
    /// Of the experts' rows.
    routed: Option<B::Buffer>,
}

const GATE_READS: &str = "the gate reads the normalised rows as they are";

impl MlpLayer {
    /// The normalised rows, where an op reads them as they are; the same as the products read them,
    /// cast once for routed and shared experts; what the norm's backward needs.
    fn normed<B: Backend>(&self, cx: &Cx<'_, B>, h: &Residual<B>) -> Result<Normed<B>> {
        let routed = self.moe.is_some();
        let scale = if routed { cx.recipe.dispatch_scale } else { cx.recipe.fp8.scale };
        if let Some(cast) = cx.fused_cast(Side::Activation, scale) {
            return self.norm.fused(cx, h, &cast, routed);
        }
        let (n, kept) = self.norm.of_residual(cx, h)?;
        let operand = match (&self.moe, &self.dense) {
            (Some(moe), _) => cx.dispatch_operand(&n, moe.gate_up.weight)?,
            (None, Some(dense)) => cx.operand(&n, dense.gate_up.weight)?,
            (None, None) => panic!("a layer has a dense part or experts"),
        };
        Ok(Normed { y: Some(n), operand, kept })
    }

    /// Dispatch: norm, router, rows to their experts, for each of the rank's parts of a
    /// micro-batch; before them the sum of the residual `h` where attention left it to the norm.
    ///
    /// # Errors
    /// Those of the backend.
    #[allow(clippy::type_complexity)]
    pub fn dispatch<B: Backend>(
        &self,
        cxs: &[Cx<'_, B>],
        hs: Vec<Residual<B>>,
    ) -> Result<Vec<(Dispatched<B>, MlpKept<B>)>> {
        let normed = cxs.iter().zip(hs).map(|(cx, h)| self.normed(cx, &h));
        let normed = normed.collect::<Result<Vec<_>>>()?;
        let of = |of: &Normed<B>| (of.y.clone().expect(GATE_READS), of.operand.clone());
        let routed: Vec<_> = match &self.moe {
            Some(moe) => {
                let routed = moe.dispatch(cxs, normed.iter().map(of).collect())?;
                routed.into_iter().map(Some).collect()
            }
            None => cxs.iter().map(|_| None).collect(),
        };
        let keep = !cxs[0].recipe.recompute_norms;
        let part = |(Normed { y: n, operand, kept: norm }, routed): (_, Option<(_, _)>)| {
            let (moe, routed) = routed.unzip();
            let n = n.filter(|_| keep && moe.is_some());
            let n_operand = keep.then(|| operand.clone());
            let kept = MlpKept { norm, n, n_operand, dense: None, moe };
            (Dispatched { n: operand, routed }, kept)
        };
        Ok(normed.into_iter().zip(routed).map(part).collect())
    }

    /// Mlp: the routed experts on the rows of all micro-batches, and the dense part or shared
    /// expert on each, whichever the layer has. The slices have an entry a micro-batch.
    ///
    /// # Errors
    /// Those of the backend.
    pub fn mlp<B: Backend>(
        &self,
        cxs: &[Cx<'_, B>],
        inputs: &[Dispatched<B>],
        kept: &mut [MlpKept<B>],
    ) -> Result<Vec<MlpOutput<B>>> {
        let mut routed: Vec<Option<B::Buffer>> = vec![None; cxs.len()];
        if let Some(moe) = &self.moe {
            let inputs: Vec<_> = inputs.iter().filter_map(|x| x.routed.as_ref()).collect();
            let mut kept: Vec<_> = kept.iter_mut().filter_map(|kept| kept.moe.as_mut()).collect();
            routed = moe.mlp(&cxs[0], &inputs, &mut kept)?.into_iter().map(Some).collect();
        }
        let mut outputs = Vec::with_capacity(cxs.len());
        for (((cx, input), kept), routed) in cxs.iter().zip(inputs).zip(kept).zip(routed) {
            let mut output = MlpOutput { dense: None, routed };
            if let Some(dense) = &self.dense {
                let (y, dense) = dense.forward(cx, &input.n)?;
                output.dense = Some(y);
                kept.dense = Some(dense);
            }
            outputs.push(output);
        }
        Ok(outputs)
    }

    /// Combine: rows back to their tokens, summed, plus the dense part or shared expert and the
    /// residual, which the norm's backward keeps.
    ///
    /// # Errors
    /// Those of the backend.
    pub fn combine<B: Backend>(
        &self,
        cx: &Cx<'_, B>,
        output: MlpOutput<B>,
        kept: &MlpKept<B>,
    ) -> Result<B::Buffer> {
        let (add, h) = (Add { out: cx.activation() }, &kept.norm.x);
        let routed = match (&self.moe, &kept.moe, output.routed) {
            (Some(moe), Some(kept), Some(y)) => Some(moe.combine(cx, &kept.plan, &y)?),
            _ => None,
        };
        match (routed, output.dense) {
            (Some(routed), dense) => cx.backend.add(&add, h, &routed, dense.as_ref()),
            (None, Some(dense)) => cx.backend.add(&add, h, &dense, None),
            (None, None) => Ok(h.clone()),
        }
    }

    /// Backward of combine: brings the output's gradient `dy` to the experts' rows; `None` without
    /// experts.
    ///
    /// # Errors
    /// Those of the backend.
    pub fn combine_backward<B: Backend>(
        &self,
        cx: &Cx<'_, B>,
        kept: &MlpKept<B>,
        dy: &B::Buffer,
    ) -> Result<Option<Operand<B>>> {
        let (Some(moe), Some(kept)) = (&self.moe, &kept.moe) else {
            return Ok(None);
        };
        let dy = cx.dispatch_gradient(dy, moe.down.weight)?;
        moe.to_rows(cx, &dy, &kept.plan).map(Some)
    }

    /// Input-backward of mlp, given the outputs' gradients `dy` and the `rows` that
    /// [`MlpLayer::combine_backward`] made of each. The slices have an entry a micro-batch.
    ///
    /// # Errors
    /// Those of the backend.
    ///
    /// # Panics
    /// Before the forward.
    pub fn mlp_backward_input<B: Backend>(
        &self,
        cxs: &[Cx<'_, B>],
        kept: &mut [MlpKept<B>],
        dy: &[B::Buffer],
        rows: Vec<Option<Operand<B>>>,
    ) -> Result<Vec<MlpGradient<B>>> {
        let mut routed: Vec<Option<B::Buffer>> = vec![None; cxs.len()];
        if let Some(moe) = &self.moe {
            let rows: Vec<_> = rows.into_iter().flatten().collect();
            let mut kept: Vec<_> = kept.iter_mut().filter_map(|kept| kept.moe.as_mut()).collect();
            routed = moe.mlp_backward(&cxs[0], &mut kept, &rows)?.into_iter().map(Some).collect();
        }
        let mut gradients = Vec::with_capacity(cxs.len());
        for (((cx, kept), dy), routed) in cxs.iter().zip(kept).zip(dy).zip(routed) {
            let mut gradient = MlpGradient { dense: None, routed };
            if let Some(dense) = &self.dense {
                let kept = kept.dense.as_mut().expect("forward comes first");
                gradient.dense = Some(dense.backward_input(cx, kept, dy.clone())?);
            }
            gradients.push(gradient);
        }
        Ok(gradients)
    }

    /// Input-backward of dispatch: the gradient of the residual, with that of the output, `dy`.
    ///
    /// # Errors
    /// Those of the backend.
    pub fn dispatch_backward_input<B: Backend>(
        &self,
        cx: &Cx<'_, B>,
        kept: &mut MlpKept<B>,
        dy: &B::Buffer,
        gradient: MlpGradient<B>,
    ) -> Result<ResidualGradient<B>> {
        let add = Add { out: cx.activation() };
        let dn = match (&self.moe, &mut kept.moe, gradient.routed) {
            (Some(moe), Some(kept), Some(dx)) => {
                let [routed, gate] = moe.dispatch_backward(cx, kept, &dx)?;
                cx.backend.add(&add, &gate, &routed, gradient.dense.as_ref())?
            }
            _ => gradient.dense.expect("a layer has a dense part or experts"),
        };
        self.norm.dgrad_of_residual(cx, &mut kept.norm, dn, dy)
    }

    /// Weight-backward of mlp and dispatch.
    ///
    /// # Errors
    /// Those of the backend.
    ///
    /// # Panics
    /// Before the input-backward.
    pub fn backward_weight<B: Backend>(&self, cx: &Cx<'_, B>, kept: MlpKept<B>) -> Result<()> {
        let x = Residual::Sum(kept.norm.x.clone());
        let (n, operand) = match (kept.n_operand, &self.dense) {
            (Some(operand), _) => (kept.n, Some(operand)),
            (None, Some(_)) => {
                let normed = self.normed(cx, &x)?;
                (normed.y, Some(normed.operand))
            }
            (None, None) => (Some(self.norm.fprop(cx, &kept.norm.x)?.0), None),
        };
        if let (Some(dense), Some(kept), Some(operand)) = (&self.dense, kept.dense, &operand) {
            dense.backward_weight(cx, kept, operand)?;
        }
        if let (Some(moe), Some(kept)) = (&self.moe, kept.moe) {
            moe.backward_weight(cx, kept, n.as_ref().expect(GATE_READS))?;
        }
        self.norm.wgrad(cx, &kept.norm)
    }
}
