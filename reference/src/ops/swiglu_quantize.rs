//! `swiglu_quantize` and `swiglu_backward_quantize`: SwiGLU and its gradient with the casts around
//! them in one pass.
//!
//! To the bit: [`Dequantize`] of the input where it was kept as codes (`kept`), then [`Swiglu`] or
//! [`SwigluBackward`], then [`QuantizeTile`] of what that rounded to `out`. Neither the input's
//! values nor SwiGLU's own are written for another op to read; `dx` is, since the weight's gradient
//! casts it transposed.

use fathom_trace::{DType, OpClass, TensorMeta};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::Tensor;
use crate::op::example::{Example, ceil, shape};
use crate::op::{Op, OpError, Role, input, optional};
use crate::ops::dequantize::Dequantize;
use crate::ops::quantize_tile::QuantizeTile;
use crate::ops::swiglu::{Swiglu, SwigluBackward};

/// SwiGLU and the cast of its result with a scale for every 1 x `tile`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct SwigluQuantize {
    /// How `x` was kept as codes, with `x_scale`; absent: it holds the values.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kept: Option<Dequantize>,
    /// SwiGLU, whose `out` is the element type of what is cast.
    pub swiglu: Swiglu,
    /// The cast of its result.
    pub cast: QuantizeTile,
}

/// Gradient of SwiGLU and the cast of `dx` with a scale for every 1 x `tile`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct SwigluBackwardQuantize {
    /// How `x` was kept as codes, with `x_scale`; absent: it holds the values.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kept: Option<Dequantize>,
    /// The gradient, whose `out` is the element type of `dx`.
    pub swiglu: SwigluBackward,
    /// The cast of `dx`.
    pub cast: QuantizeTile,
}

/// What one op gives for the next.
fn outputs<T, const N: usize>(outputs: Vec<T>) -> [T; N] {
    outputs.try_into().unwrap_or_else(|_| panic!("an op gives what its table says"))
}

/// The input's values.
fn values(
    op: &'static str,
    kept: Option<&Dequantize>,
    x: &TensorMeta,
    x_scale: Option<&TensorMeta>,
) -> Result<TensorMeta, OpError> {
    match (kept, x_scale) {
        (None, None) => Ok(x.clone()),
        (None, Some(_)) => Err(OpError::unknown_roles(op, &["x_scale"], &["x", "weight"])),
        (Some(_), None) => Err(OpError::missing(op, "x_scale")),
        (Some(kept), Some(scale)) => {
            let values = kept.infer(&[Some(x.clone()), Some(scale.clone())]);
            let [values] = outputs(values.map_err(|e| e.within(op, "kept"))?);
            Ok(TensorMeta { role: "x".to_owned(), ..values })
        }
    }
}

/// The same of tensors.
fn run_values(
    kept: Option<&Dequantize>,
    x: Option<Tensor>,
    x_scale: Option<Tensor>,
) -> Result<Option<Tensor>, OpError> {
    let Some(kept) = kept else { return Ok(x) };
    let [values] = outputs(Op::run(kept, vec![x, x_scale])?);
    Ok(Some(values))
}

/// Codes and scales of what was computed.
fn cast(op: &'static str, cast: &QuantizeTile, y: &TensorMeta) -> Result<[TensorMeta; 2], OpError> {
    Ok(outputs(cast.infer(&[Some(y.clone())]).map_err(|e| e.within(op, "cast"))?))
}

/// FLOPs of the values of codes.
fn flops_of_values(kept: Option<&Dequantize>, x: &Option<TensorMeta>) -> u64 {
    kept.map_or(0, |kept| kept.flops(&[x.clone(), None]))
}

impl SwigluQuantize {
    /// The input's values, and SwiGLU's.
    fn parts(&self, inputs: &[Option<TensorMeta>]) -> Result<[TensorMeta; 2], OpError> {
        let [Some(x), x_scale, weight] = inputs else { unreachable!("mandatory") };
        let x = values(Self::NAME, self.kept.as_ref(), x, x_scale.as_ref())?;
        let y = self.swiglu.infer(&[Some(x.clone()), weight.clone()]);
        let [y] = outputs(y.map_err(|e| e.within(Self::NAME, "swiglu"))?);
        Ok([x, y])
    }
}

impl Op for SwigluQuantize {
    const NAME: &'static str = "swiglu_quantize";
    const INPUTS: &'static [Role] = &[input("x"), optional("x_scale"), optional("weight")];
    const OUTPUTS: &'static [&'static str] = &["q", "scale"];
    const CLASS: OpClass = OpClass::Convert;

    fn example() -> Example {
        let (r, i, tile) = (3, 160, 128);
        let (kept, cast) = parts_of_example(2 * i, tile);
        Example::new(SwigluQuantize { kept, swiglu: Swiglu { out: DType::BF16 }, cast })
            .input("x", DType::F8E4M3, shape![r, 2 * i])
            .positive("x_scale", DType::F32, shape![r, ceil(2 * i, tile)])
            .positive("weight", DType::F32, shape![r])
            .output("q", shape![r, i])
            .output("scale", shape![r, ceil(i, tile)])
    }

    fn infer(&self, inputs: &[Option<TensorMeta>]) -> Result<Vec<TensorMeta>, OpError> {
        let [_, y] = self.parts(inputs)?;
        Ok(cast(Self::NAME, &self.cast, &y)?.into())
    }

    fn flops(&self, inputs: &[Option<TensorMeta>]) -> u64 {
        let [x, y] = self.parts(inputs).expect("infer accepted the inputs");
        flops_of_values(self.kept.as_ref(), &inputs[0])
            + self.swiglu.flops(&[Some(x), None])
            + self.cast.flops(&[Some(y)])
    }

    fn run(&self, inputs: Vec<Option<Tensor>>) -> Result<Vec<Tensor>, OpError> {
        let [x, x_scale, weight] = outputs(inputs);
        let x = run_values(self.kept.as_ref(), x, x_scale)?;
        let [y] = outputs(Op::run(&self.swiglu, vec![x, weight])?);
        Op::run(&self.cast, vec![Some(y)]).map_err(|e| e.within(Self::NAME, "cast"))
    }
}

impl SwigluBackwardQuantize {
    /// The input's values, and the gradient's outputs.
    fn parts(&self, inputs: &[Option<TensorMeta>]) -> Result<[TensorMeta; 3], OpError> {
        let [dy, Some(x), x_scale, weight] = inputs else { unreachable!("mandatory") };
        let x = values(Self::NAME, self.kept.as_ref(), x, x_scale.as_ref())?;
        let d = self.swiglu.infer(&[dy.clone(), Some(x.clone()), weight.clone()]);
        let [dx, dweight] = outputs(d.map_err(|e| e.within(Self::NAME, "swiglu"))?);
        Ok([x, dx, dweight])
    }
}

impl Op for SwigluBackwardQuantize {
    const NAME: &'static str = "swiglu_backward_quantize";
    const INPUTS: &'static [Role] =
        &[input("dy"), input("x"), optional("x_scale"), optional("weight")];
    const OUTPUTS: &'static [&'static str] = &["dx", "q", "scale", "dweight"];
    const CLASS: OpClass = OpClass::Convert;

    fn example() -> Example {
        let (r, i, tile) = (3, 160, 128);
        let (kept, cast) = parts_of_example(2 * i, tile);
        let swiglu = SwigluBackward { out: DType::BF16 };
        Example::new(SwigluBackwardQuantize { kept, swiglu, cast })
            .input("dy", DType::BF16, shape![r, i])
            .input("x", DType::F8E4M3, shape![r, 2 * i])
            .positive("x_scale", DType::F32, shape![r, ceil(2 * i, tile)])
            .positive("weight", DType::F32, shape![r])
            .output("dx", shape![r, 2 * i])
            .output("q", shape![r, 2 * i])
            .output("scale", shape![r, ceil(2 * i, tile)])
            .output("dweight", shape![r])
    }

    fn infer(&self, inputs: &[Option<TensorMeta>]) -> Result<Vec<TensorMeta>, OpError> {
        let [_, dx, dweight] = self.parts(inputs)?;
        let [q, scale] = cast(Self::NAME, &self.cast, &dx)?;
        Ok(vec![dx, q, scale, dweight])
    }

    fn flops(&self, inputs: &[Option<TensorMeta>]) -> u64 {
        let [x, dx, _] = self.parts(inputs).expect("infer accepted the inputs");
        flops_of_values(self.kept.as_ref(), &inputs[1])
            + self.swiglu.flops(&[None, Some(x), None])
            + self.cast.flops(&[Some(dx)])
    }

    fn run(&self, inputs: Vec<Option<Tensor>>) -> Result<Vec<Tensor>, OpError> {
        let [dy, x, x_scale, weight] = outputs(inputs);
        let x = run_values(self.kept.as_ref(), x, x_scale)?;
        let [dx, dweight] = outputs(Op::run(&self.swiglu, vec![dy, x, weight])?);
        let cast = Op::run(&self.cast, vec![Some(dx.clone())]);
        let [q, scale] = outputs(cast.map_err(|e| e.within(Self::NAME, "cast"))?);
        Ok(vec![dx, q, scale, dweight])
    }
}

/// How the examples' input is kept, and what they cast to.
fn parts_of_example(columns: usize, tile: usize) -> (Option<Dequantize>, QuantizeTile) {
    use fathom_numerics::formats::Format;
    use fathom_numerics::quant::ScaleKind;

    let kept = Dequantize { columns, block: [Some(1), Some(tile)], out: DType::BF16 };
    let (format, scale) = (Format::E4M3, ScaleKind::F32);
    (Some(kept), QuantizeTile { format, tile, scale, amax_floor: 1e-4 })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::{Backend, Reference};

    fn same(a: &Tensor, b: &Tensor) -> bool {
        a.shape() == b.shape() && a.dtype() == b.dtype() && a.bytes() == b.bytes()
    }

    fn metas(inputs: &[Option<Tensor>]) -> Vec<Option<TensorMeta>> {
        inputs.iter().map(|x| x.as_ref().map(|x| x.meta("x"))).collect()
    }

    /// From codes and from the values that they stand for: every bit of the ops one after the
    /// other, and their FLOPs.
    #[test]
    fn forward_is_values_then_swiglu_then_cast() {
        let case = SwigluQuantize::example().case();
        let op: &SwigluQuantize = case.op.as_any().downcast_ref().unwrap();
        let inputs = case.ordered_inputs().unwrap();
        let [Some(x), Some(x_scale), weight] = &inputs[..] else { panic!("all are given") };
        let weight = weight.as_ref();
        let values = Reference.dequantize(op.kept.as_ref().unwrap(), x, x_scale).unwrap();
        let y = Reference.swiglu(&op.swiglu, &values, weight).unwrap();
        let expected = Reference.quantize_tile(&op.cast, &y).unwrap();
        let found = Reference.swiglu_quantize(op, x, Some(x_scale), weight).unwrap();
        assert!(found.iter().zip(&expected).all(|(a, b)| same(a, b)));
        let plain = SwigluQuantize { kept: None, ..op.clone() };
        let found = Reference.swiglu_quantize(&plain, &values, None, weight).unwrap();
        assert!(found.iter().zip(&expected).all(|(a, b)| same(a, b)));

        let codes = 3 * 320;
        assert_eq!(Op::flops(op, &metas(&inputs)), codes + 3 * codes + 2 * codes / 2);
        let error = Reference.swiglu_quantize(&plain, &values, Some(x_scale), weight).unwrap_err();
        assert!(error.to_string().contains("unknown 'x_scale'"), "{error}");
        let error = Reference.swiglu_quantize(op, x, None, weight).unwrap_err();
        assert!(error.to_string().contains("missing 'x_scale'"), "{error}");
    }

    #[test]
    fn backward_is_values_then_gradient_then_cast() {
        let case = SwigluBackwardQuantize::example().case();
        let op: &SwigluBackwardQuantize = case.op.as_any().downcast_ref().unwrap();
        let inputs = case.ordered_inputs().unwrap();
        let [Some(dy), Some(x), Some(x_scale), weight] = &inputs[..] else { panic!("all given") };
        let values = Reference.dequantize(op.kept.as_ref().unwrap(), x, x_scale).unwrap();
        for weight in [weight.as_ref(), None] {
            let [dx, dweight] = Reference.swiglu_backward(&op.swiglu, dy, &values, weight).unwrap();
            let [q, scale] = Reference.quantize_tile(&op.cast, &dx).unwrap();
            let expected = [dx, q, scale, dweight];
            let of = |op: &SwigluBackwardQuantize, x, x_scale| {
                Reference.swiglu_backward_quantize(op, dy, x, x_scale, weight).unwrap()
            };
            let plain = SwigluBackwardQuantize { kept: None, ..op.clone() };
            for found in [of(op, x, Some(x_scale)), of(&plain, &values, None)] {
                assert!(found.iter().zip(&expected).all(|(a, b)| same(a, b)));
            }
        }
        let codes = 3 * 320;
        assert_eq!(Op::flops(op, &metas(&inputs)), codes + 6 * codes + 2 * codes);
    }
}
