//! A dense feed-forward part (also the shared expert): gate and up in one product, SwiGLU, down.

use crate::backend::{Backend, Result};
use crate::layers::operand::Operand;
use crate::layers::{Cx, Linear};

/// A feed-forward part: `down(silu(gate x) * up x)`.
#[derive(Clone, Copy, Debug)]
pub struct FeedForward {
    /// Gate and up projection as one weight, gate first.
    pub gate_up: Linear,
    /// Projection back to the residual's width.
    pub down: Linear,
}

/// What its backward needs; the input's operand is kept by the caller.
#[derive(Clone, Debug)]
pub struct FeedForwardKept<B: Backend> {
    /// Gate beside up of every row, SwiGLU's input.
    hidden: Operand<B>,
    /// SwiGLU's output as `down` reads it; none where it is recomputed.
    act: Option<Operand<B>>,
    /// The gradient of the output, from input-backward to weight-backward.
    dy: Option<B::Buffer>,
    /// The gradient of `hidden`, likewise.
    dhidden: Option<B::Buffer>,
}

impl FeedForward {
    /// `down(silu(gate x) * up x)`.
    ///
    /// # Errors
    /// Those of the backend.
    pub fn forward<B: Backend>(
        &self,
        cx: &Cx<'_, B>,
        x: &Operand<B>,
    ) -> Result<(B::Buffer, FeedForwardKept<B>)> {
        let hidden = self.gate_up.fprop(cx, x)?;
        let act = cx.swiglu(&Operand::Plain(hidden.clone()), None, self.down.weight)?;
        let y = cx.reduce_tp(self.down.fprop(cx, &act)?)?;
        let hidden = cx.keep_swiglu_input(&hidden)?;
        let act = (!cx.recipe.recompute_swiglu).then_some(act);
        Ok((y, FeedForwardKept { hidden, act, dy: None, dhidden: None }))
    }

    /// The gradient of the input.
    ///
    /// # Errors
    /// Those of the backend.
    pub fn backward_input<B: Backend>(
        &self,
        cx: &Cx<'_, B>,
        kept: &mut FeedForwardKept<B>,
        dy: B::Buffer,
    ) -> Result<B::Buffer> {
        let dact = self.down.dgrad(cx, &dy)?;
        let gradient = cx.swiglu_backward(&dact, &kept.hidden, None, self.gate_up.weight)?;
        let dx = cx.reduce_tp(self.gate_up.dgrad_of(cx, &gradient.operand)?)?;
        (kept.dy, kept.dhidden) = (Some(dy), Some(gradient.dx));
        Ok(dx)
    }

    /// Adds to the gradients of both projections; `x` is the forward's input.
    ///
    /// # Errors
    /// Those of the backend.
    ///
    /// # Panics
    /// Before the input-backward.
    pub fn backward_weight<B: Backend>(
        &self,
        cx: &Cx<'_, B>,
        kept: FeedForwardKept<B>,
        x: &Operand<B>,
    ) -> Result<()> {
        let dy = kept.dy.expect("input-backward comes first");
        let dhidden = kept.dhidden.expect("input-backward comes first");
        let act = match kept.act {
            Some(act) => act,
            None => cx.swiglu(&kept.hidden, None, self.down.weight)?,
        };
        self.down.wgrad(cx, &act, &dy)?;
        self.gate_up.wgrad(cx, x, &dhidden)
    }
}
