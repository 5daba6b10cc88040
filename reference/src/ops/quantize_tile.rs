//! `quantize_tile`: casts to FP8 or E5M6 with a scale for every 1 x `tile`.
//!
//! `scale = max(amax, amax_floor) / max_of_format` by IEEE division, with `pow2` the smallest power
//! of two not below it; with `mx` the power of two of the MX formats, which knows no floor;
//! `q = saturating RNE of x / scale` by IEEE division (DeepSeek-V3 report, section 3.3.2;
//! non-finite inputs: `docs/numerics.md`). The arithmetic is `fathom_numerics::quant`. x\[m, k\]
//! is F32, BF16 or F16; q has x's shape (E5M6: U32 \[m, ceil(k / 8) * 3\], packed); scale is F32.

use fathom_numerics::formats::Format;
use fathom_numerics::quant::{self, QuantConfig, QuantError, ScaleKind, Source};
use fathom_trace::{DType, OpClass, TensorMeta};
use ndarray::ArrayView2;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::op::codes::{
    Cast, cast_any, castable, one_of, outputs, stored_as, stored_columns, undefined,
};
use crate::op::example::{Example, ceil, shape};
use crate::op::{Op, OpError, Role, input, rules};
use crate::{Element, Tensor};

/// Casts to FP8 (or E5M6) with a scale for every 1 x `tile`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct QuantizeTile {
    /// `e4m3`, `e5m2` or `e5m6`.
    #[schemars(extend("enum" = ["e4m3", "e5m2", "e5m6"]))]
    pub format: Format,
    /// Elements along k that share a scale.
    pub tile: usize,
    /// Any FP32, powers of two, or the rule of MX formats.
    pub scale: ScaleKind,
    /// Lower bound of amax.
    pub amax_floor: f32,
}

impl QuantizeTile {
    fn config(&self) -> QuantConfig {
        let QuantizeTile { format, scale, amax_floor, .. } = *self;
        QuantConfig { format, scale, amax_floor }
    }
}

impl Cast<Result<Vec<Tensor>, QuantError>> for &QuantizeTile {
    fn call<T: Element + Source>(self, x: ArrayView2<'_, T>) -> Result<Vec<Tensor>, QuantError> {
        if self.format == Format::E5M6 {
            let cast = quant::e5m6::quantize_tile_e5m6(x, self.tile, &self.config())?;
            return Ok(vec![Tensor::from_array(cast.words), Tensor::from_array(cast.scales)]);
        }
        quant::quantize_tile(x, self.tile, &self.config()).map(outputs)
    }
}

impl Op for QuantizeTile {
    const NAME: &'static str = "quantize_tile";
    const INPUTS: &'static [Role] = &[input("x")];
    const OUTPUTS: &'static [&'static str] = &["q", "scale"];
    const CLASS: OpClass = OpClass::Convert;

    fn example() -> Example {
        let (m, k, tile) = (3, 160, 128);
        let (format, scale) = (Format::E4M3, ScaleKind::Pow2);
        Example::new(QuantizeTile { format, tile, scale, amax_floor: 1e-4 })
            .input("x", DType::BF16, shape![m, k])
            .output("q", shape![m, k])
            .output("scale", shape![m, ceil(k, tile)])
    }

    fn infer(&self, inputs: &[Option<TensorMeta>]) -> Result<Vec<TensorMeta>, OpError> {
        let [Some(x)] = inputs else { unreachable!("checked by the table") };
        castable(Self::NAME, x, &self.config())?;
        one_of(Self::NAME, "format", self.format, &[Format::E4M3, Format::E5M2, Format::E5M6])?;
        rules::at_least_one(Self::NAME, "tile", self.tile)?;
        let (m, k, dtype) = (x.shape[0], x.shape[1], stored_as(self.format));
        Ok(vec![
            rules::meta("q", dtype, &[m, stored_columns(dtype, k)]),
            rules::meta("scale", DType::F32, &[m, k.div_ceil(self.tile)]),
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
