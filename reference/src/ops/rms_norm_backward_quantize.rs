//! `rms_norm_backward_quantize`: a norm's gradient and the cast of it in one pass over the rows.
//!
//! It is [`RmsNormBackward`], then [`QuantizeTile`] of the `dx` that it rounded to `out`, to the
//! bit. `dx` is given too: the residual and the weight's gradient read it.

use fathom_trace::{OpClass, TensorMeta};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::Tensor;
use crate::op::example::{Example, ceil, shape};
use crate::op::{Op, OpError, Role};
use crate::ops::quantize_tile::QuantizeTile;
use crate::ops::rms_norm::RmsNormBackward;

/// Gradient of RMSNorm for its input, and the cast of it with a scale for every 1 x `tile`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct RmsNormBackwardQuantize {
    /// The gradient, whose `out` is the element type of `dx`.
    pub norm: RmsNormBackward,
    /// The cast of `dx`.
    pub cast: QuantizeTile,
}

impl RmsNormBackwardQuantize {
    fn dx(&self, inputs: &[Option<TensorMeta>]) -> Result<TensorMeta, OpError> {
        let dx = self.norm.infer(inputs).map_err(|e| e.within(Self::NAME, "norm"))?;
        Ok(dx.into_iter().next().expect("the gradient's output"))
    }
}

impl Op for RmsNormBackwardQuantize {
    const NAME: &'static str = "rms_norm_backward_quantize";
    const INPUTS: &'static [Role] = RmsNormBackward::INPUTS;
    const OUTPUTS: &'static [&'static str] = &["dx", "q", "scale"];
    const CLASS: OpClass = OpClass::Row;

    fn example() -> Example {
        use fathom_numerics::formats::Format;
        use fathom_numerics::quant::ScaleKind;
        use fathom_trace::DType;

        let (t, columns, width, tile) = (3, 200, 160, 128);
        let norm = RmsNormBackward { offset: 8, width, out: DType::BF16 };
        let (format, scale) = (Format::E4M3, ScaleKind::F32);
        let cast = QuantizeTile { format, tile, scale, amax_floor: 1e-4 };
        Example::new(RmsNormBackwardQuantize { norm, cast })
            .input("dy", DType::BF16, shape![t, width])
            .input("x", DType::BF16, shape![t, columns])
            .input("weight", DType::F32, shape![width])
            .positive("rstd", DType::F32, shape![t])
            .input("residual", DType::BF16, shape![t, width])
            .output("dx", shape![t, width])
            .output("q", shape![t, width])
            .output("scale", shape![t, ceil(width, tile)])
    }

    fn infer(&self, inputs: &[Option<TensorMeta>]) -> Result<Vec<TensorMeta>, OpError> {
        let dx = self.dx(inputs)?;
        let cast = self.cast.infer(&[Some(dx.clone())]);
        let mut outputs = vec![dx];
        outputs.extend(cast.map_err(|e| e.within(Self::NAME, "cast"))?);
        Ok(outputs)
    }

    fn flops(&self, inputs: &[Option<TensorMeta>]) -> u64 {
        let dx = self.dx(inputs).expect("infer accepted the inputs");
        self.norm.flops(inputs) + self.cast.flops(&[Some(dx)])
    }

    fn run(&self, inputs: Vec<Option<Tensor>>) -> Result<Vec<Tensor>, OpError> {
        let mut outputs = Op::run(&self.norm, inputs)?;
        let cast = Op::run(&self.cast, vec![Some(outputs[0].clone())]);
        outputs.extend(cast.map_err(|e| e.within(Self::NAME, "cast"))?);
        Ok(outputs)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::{Backend, Reference};

    /// Gradient, then cast, as two ops: every bit of the one op, with and without a residual; its
    /// FLOPs are theirs.
    #[test]
    fn it_is_the_gradient_then_the_cast() {
        let case = RmsNormBackwardQuantize::example().case();
        let op: &RmsNormBackwardQuantize = case.op.as_any().downcast_ref().unwrap();
        let inputs = case.ordered_inputs().unwrap();
        let [Some(dy), Some(x), Some(weight), Some(rstd), residual] = &inputs[..] else {
            panic!("all are given")
        };
        for residual in [residual.as_ref(), None] {
            let dx = Reference.rms_norm_backward(&op.norm, dy, x, weight, rstd, residual).unwrap();
            let [q, scale] = Reference.quantize_tile(&op.cast, &dx).unwrap();
            let found =
                Reference.rms_norm_backward_quantize(op, dy, x, weight, rstd, residual).unwrap();
            let same = |a: &Tensor, b: &Tensor| a.shape() == b.shape() && a.bytes() == b.bytes();
            assert!(found.iter().zip(&[dx, q, scale]).all(|(a, b)| same(a, b)));
        }
        let metas: Vec<_> = inputs.iter().map(|x| x.as_ref().map(|x| x.meta("x"))).collect();
        assert_eq!(Op::flops(op, &metas), (8 + 2) * 3 * 160);
        let cast = QuantizeTile { tile: 0, ..op.cast.clone() };
        let error = Op::infer(&RmsNormBackwardQuantize { cast, ..op.clone() }, &metas).unwrap_err();
        let expected =
            "params of rms_norm_backward_quantize, at 'cast.tile': expected at least 1, found 0";
        assert_eq!(error.to_string(), expected);
    }
}
