//! `rms_norm_quantize`: a norm and the cast of its result in one pass over the rows.
//!
//! It is [`RmsNorm`], then [`QuantizeTile`] of the `y` that it rounded to `out`, to the bit: the
//! one op reads a row once and need not write `y` for the other to read. `y` is given too where
//! `keep` says so (a router's gate reads it), else it has no rows.

use fathom_trace::{OpClass, TensorMeta};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::Tensor;
use crate::op::example::{Example, ceil, shape};
use crate::op::{Op, OpError, Role, input};
use crate::ops::quantize_tile::QuantizeTile;
use crate::ops::rms_norm::RmsNorm;

/// RMSNorm of a range of columns, and the cast of its result with a scale for every 1 x `tile`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct RmsNormQuantize {
    /// The norm, whose `out` is the element type of what is cast.
    pub norm: RmsNorm,
    /// The cast of the norm's result.
    pub cast: QuantizeTile,
    /// Whether `y` is given.
    pub keep: bool,
}

impl RmsNormQuantize {
    /// What norm and cast give of these inputs, `y` with all its rows.
    fn parts(&self, inputs: &[Option<TensorMeta>]) -> Result<[TensorMeta; 4], OpError> {
        let normed = self.norm.infer(inputs).map_err(|e| e.within(Self::NAME, "norm"))?;
        let [y, rstd] = <[_; 2]>::try_from(normed).expect("the norm's outputs");
        let cast = self.cast.infer(&[Some(y.clone())]);
        let cast = cast.map_err(|e| e.within(Self::NAME, "cast"))?;
        let [q, scale] = <[_; 2]>::try_from(cast).expect("the cast's outputs");
        Ok([y, q, scale, rstd])
    }
}

impl Op for RmsNormQuantize {
    const NAME: &'static str = "rms_norm_quantize";
    const INPUTS: &'static [Role] = &[input("x"), input("weight")];
    const OUTPUTS: &'static [&'static str] = &["y", "q", "scale", "rstd"];
    const CLASS: OpClass = OpClass::Row;

    fn example() -> Example {
        use fathom_numerics::formats::Format;
        use fathom_numerics::quant::ScaleKind;
        use fathom_trace::DType;

        let (t, columns, width, tile) = (3, 200, 160, 128);
        let norm = RmsNorm { eps: 1e-6, offset: 8, width, out: DType::BF16 };
        let (format, scale) = (Format::E4M3, ScaleKind::Pow2);
        let cast = QuantizeTile { format, tile, scale, amax_floor: 1e-4 };
        Example::new(RmsNormQuantize { norm, cast, keep: true })
            .input("x", DType::BF16, shape![t, columns])
            .input("weight", DType::F32, shape![width])
            .output("y", shape![t, width])
            .output("q", shape![t, width])
            .output("scale", shape![t, ceil(width, tile)])
            .output("rstd", shape![t])
    }

    fn infer(&self, inputs: &[Option<TensorMeta>]) -> Result<Vec<TensorMeta>, OpError> {
        let mut parts = self.parts(inputs)?;
        if !self.keep {
            parts[0].shape[0] = 0;
        }
        Ok(parts.into())
    }

    fn flops(&self, inputs: &[Option<TensorMeta>]) -> u64 {
        let [y, ..] = self.parts(inputs).expect("infer accepted the inputs");
        self.norm.flops(inputs) + self.cast.flops(&[Some(y)])
    }

    fn run(&self, inputs: Vec<Option<Tensor>>) -> Result<Vec<Tensor>, OpError> {
        let normed = Op::run(&self.norm, inputs)?;
        let [y, rstd] = <[_; 2]>::try_from(normed).expect("the norm's outputs");
        let cast = Op::run(&self.cast, vec![Some(y.clone())]);
        let cast = cast.map_err(|e| e.within(Self::NAME, "cast"))?;
        let [q, scale] = <[_; 2]>::try_from(cast).expect("the cast's outputs");
        let y = if self.keep { y } else { Tensor::zeros(y.dtype(), &[0, self.norm.width]) };
        Ok(vec![y, q, scale, rstd])
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::{Backend, Reference};

    /// Norm, then cast, as two ops: every bit of the one op, with and without `y`; its FLOPs are
    /// theirs, and what it need not write is no part of its bytes.
    #[test]
    fn it_is_the_norm_then_the_cast() {
        let case = RmsNormQuantize::example().case();
        let inputs = case.ordered_inputs().unwrap();
        let [Some(x), Some(weight)] = &inputs[..] else { panic!("both are given") };
        let of = |keep| {
            let op: &RmsNormQuantize = case.op.as_any().downcast_ref().unwrap();
            RmsNormQuantize { keep, ..op.clone() }
        };
        let op = of(true);
        let [y, rstd] = Reference.rms_norm(&op.norm, x, weight).unwrap();
        let [q, scale] = Reference.quantize_tile(&op.cast, &y).unwrap();
        let expected = [y.clone(), q.clone(), scale.clone(), rstd.clone()];
        let same = |a: &Tensor, b: &Tensor| a.shape() == b.shape() && a.bytes() == b.bytes();
        let found = Reference.rms_norm_quantize(&op, x, weight).unwrap();
        assert!(found.iter().zip(&expected).all(|(a, b)| same(a, b)));
        let [none, rest @ ..] = Reference.rms_norm_quantize(&of(false), x, weight).unwrap();
        assert_eq!(none.shape(), [0, 160]);
        assert!(rest.iter().zip(&expected[1..]).all(|(a, b)| same(a, b)));

        let metas = [Some(x.meta("x")), Some(weight.meta("weight"))];
        assert_eq!(Op::flops(&op, &metas), (4 + 2) * 3 * 160);
        let written = |op: &RmsNormQuantize| {
            Op::infer(op, &metas).unwrap().iter().map(TensorMeta::bytes).sum::<u64>()
        };
        assert_eq!(written(&op) - written(&of(false)), 3 * 160 * 2);
    }

    #[test]
    fn a_wrong_part_is_named_by_its_place() {
        let metas = RmsNormQuantize::example().case();
        let inputs = metas.ordered_inputs().unwrap();
        let metas: Vec<_> = inputs.iter().map(|x| x.as_ref().map(|x| x.meta("x"))).collect();
        let case = RmsNormQuantize::example();
        let op: &RmsNormQuantize = case.op.as_any().downcast_ref().unwrap();
        let tile = QuantizeTile { tile: 0, ..op.cast.clone() };
        let error = Op::infer(&RmsNormQuantize { cast: tile, ..op.clone() }, &metas).unwrap_err();
        let expected = "params of rms_norm_quantize, at 'cast.tile': expected at least 1, found 0";
        assert_eq!(error.to_string(), expected);
    }
}
