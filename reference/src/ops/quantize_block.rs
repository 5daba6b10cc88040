//! `quantize_block`: casts to FP8 with a scale for every `block[0]` x `block[1]`.
//!
//! `scale = max(amax, amax_floor) / max_of_format` by IEEE division, with `pow2` the smallest power
//! of two not below it; with `mx` the power of two of the MX formats, which knows no floor;
//! `q = saturating RNE of x / scale` by IEEE division (DeepSeek-V3 report, section 3.3.2;
//! non-finite inputs: `docs/numerics.md`). The arithmetic is `fathom_numerics::quant`. x\[m, k\]
//! is F32, BF16 or F16; q has x's shape; scale is F32.

use fathom_numerics::formats::Format;
use fathom_numerics::quant::{self, QuantConfig, QuantError, ScaleKind, Source};
use fathom_trace::{DType, OpClass, TensorMeta};
use ndarray::ArrayView2;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::op::codes::{
    Block, Cast, cast_any, castable, extent, extents, one_of, outputs, scales, stored_as, undefined,
};
use crate::op::example::{Example, ceil, shape};
use crate::op::{Op, OpError, Role, input, rules};
use crate::{Element, Tensor};

/// Casts to FP8 with a scale for every `block[0]` x `block[1]`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct QuantizeBlock {
    /// `e4m3` or `e5m2`.
    #[schemars(extend("enum" = ["e4m3", "e5m2"]))]
    pub format: Format,
    /// Rows and columns that share a scale; `null`: the whole dimension (per-tensor scaling).
    pub block: Block,
    /// Any FP32, powers of two, or the rule of MX formats.
    pub scale: ScaleKind,
    /// Lower bound of amax.
    pub amax_floor: f32,
}

impl QuantizeBlock {
    fn config(&self) -> QuantConfig {
        let QuantizeBlock { format, scale, amax_floor, .. } = *self;
        QuantConfig { format, scale, amax_floor }
    }
}

impl Cast<Result<Vec<Tensor>, QuantError>> for &QuantizeBlock {
    fn call<T: Element + Source>(self, x: ArrayView2<'_, T>) -> Result<Vec<Tensor>, QuantError> {
        quant::quantize(x, extent(self.block), &self.config()).map(outputs)
    }
}

impl Op for QuantizeBlock {
    const NAME: &'static str = "quantize_block";
    const INPUTS: &'static [Role] = &[input("x")];
    const OUTPUTS: &'static [&'static str] = &["q", "scale"];
    const CLASS: OpClass = OpClass::Convert;

    fn example() -> Example {
        let (m, k, block) = (3, 160, [2, 128]);
        let (format, scale) = (Format::E4M3, ScaleKind::F32);
        Example::new(QuantizeBlock { format, block: block.map(Some), scale, amax_floor: 1e-4 })
            .input("x", DType::BF16, shape![m, k])
            .output("q", shape![m, k])
            .output("scale", shape![ceil(m, block[0]), ceil(k, block[1])])
    }

    fn infer(&self, inputs: &[Option<TensorMeta>]) -> Result<Vec<TensorMeta>, OpError> {
        let [Some(x)] = inputs else { unreachable!("checked by the table") };
        castable(Self::NAME, x, &self.config())?;
        one_of(Self::NAME, "format", self.format, &[Format::E4M3, Format::E5M2])?;
        extents(Self::NAME, &[("block", self.block)])?;
        let shape = scales(self.block, x.shape[0], x.shape[1]);
        Ok(vec![
            rules::meta("q", stored_as(self.format), &x.shape),
            rules::meta("scale", DType::F32, &shape),
        ])
    }

    fn flops(&self, inputs: &[Option<TensorMeta>]) -> u64 {
        2 * inputs[0].as_ref().map_or(0, |x| x.shape.iter().product::<usize>() as u64)
    }

    fn run(&self, inputs: Vec<Option<Tensor>>) -> Result<Vec<Tensor>, OpError> {
        let [Some(x)] = &inputs[..] else { unreachable!("checked by infer") };
        cast_any(x, self).map_err(|e| undefined(Self::NAME, &e))
    }
}
