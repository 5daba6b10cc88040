//! SwiGLU between two products: where ops are fused, what the one kept as codes is read as it lies
//! and what the next reads is cast on the way.

use crate::backend::{Backend, Result};
use crate::layers::Cx;
use crate::layers::delayed::Side;
use crate::layers::operand::{Codes, Operand};
use crate::model::params::ParamId;
use crate::ops::dequantize::Dequantize;
use crate::ops::swiglu::{Swiglu, SwigluBackward};
use crate::ops::swiglu_quantize::{SwigluBackwardQuantize, SwigluQuantize};

/// Gradients of SwiGLU.
pub(super) struct ActivationGradient<B: Backend> {
    /// Of its input.
    pub dx: B::Buffer,
    /// The same as the product before it reads it.
    pub operand: Operand<B>,
    /// Of the rows' weights; empty without.
    pub dweight: B::Buffer,
}

/// An operand as fused ops take it: how it is kept, where it has codes; these or the values; their
/// scales.
fn kept<'a, B: Backend>(
    cx: &Cx<'_, B>,
    x: &'a Operand<B>,
) -> (Option<Dequantize>, &'a B::Buffer, Option<&'a B::Buffer>) {
    match x {
        Operand::Plain(x) => (None, x, None),
        Operand::Codes(Codes { q, scale, columns, block, .. }) => {
            let kept = Dequantize { columns: *columns, block: *block, out: cx.activation() };
            (Some(kept), q, Some(scale))
        }
    }
}

impl<B: Backend> Cx<'_, B> {
    /// SwiGLU of `x` \[rows, 2 i\], each row times its `weight`, as the Linear with the weight
    /// `reader` reads it.
    pub(super) fn swiglu(
        &self,
        x: &Operand<B>,
        weight: Option<&B::Buffer>,
        reader: ParamId,
    ) -> Result<Operand<B>> {
        let swiglu = Swiglu { out: self.activation() };
        let Some(cast) = self.fused_cast(Side::Activation, self.recipe.fp8.scale) else {
            let act = self.backend.swiglu(&swiglu, &self.values(x)?, weight)?;
            return self.operand(&act, reader);
        };
        let (kept, x, x_scale) = kept(self, x);
        let columns = kept.as_ref().map_or_else(|| self.backend.shape(x)[1], |x| x.columns) / 2;
        let op = SwigluQuantize { kept, swiglu, cast };
        let codes = self.backend.swiglu_quantize(&op, x, x_scale, weight)?;
        Ok(Operand::of_cast(&op.cast, columns, codes))
    }

    /// The gradients of `x` and `weight`, given that of what [`Cx::swiglu`] gave; the Linear with
    /// the weight `reader` gave `x`.
    pub(super) fn swiglu_backward(
        &self,
        dy: &B::Buffer,
        x: &Operand<B>,
        weight: Option<&B::Buffer>,
        reader: ParamId,
    ) -> Result<ActivationGradient<B>> {
        let swiglu = SwigluBackward { out: self.activation() };
        let Some(cast) = self.fused_cast(Side::Gradient, self.recipe.fp8.scale) else {
            let [dx, dweight] =
                self.backend.swiglu_backward(&swiglu, dy, &self.values(x)?, weight)?;
            let operand = self.gradient(&dx, reader)?;
            return Ok(ActivationGradient { dx, operand, dweight });
        };
        let (kept, x, x_scale) = kept(self, x);
        let op = SwigluBackwardQuantize { kept, swiglu, cast };
        let [dx, q, scale, dweight] =
            self.backend.swiglu_backward_quantize(&op, dy, x, x_scale, weight)?;
        let operand = Operand::of_cast(&op.cast, self.backend.shape(&dx)[1], [q, scale]);
        Ok(ActivationGradient { dx, operand, dweight })
    }
}
