//! `quantize_tile` and `quantize_block`: casts to FP8 with a scale for every block of elements.
//!
//! `scale = max(amax, amax_floor) / max_of_format` by IEEE division, with `pow2` the smallest power
//! of two not below it; `q = saturating RNE of x / scale` by IEEE division (DeepSeek-V3 report,
//! section 3.3.2; non-finite inputs: `docs/numerics.md`). The arithmetic is
//! `fathom_numerics::quant`. x\[m, k\] is F32, BF16 or F16; q has x's shape (E5M6: U32
//! \[m, ceil(k / 8) * 3\], packed); scale is F32.

use fathom_numerics::formats::{Format, bf16, f16};
use fathom_numerics::quant::{self, QuantConfig, QuantError, Quantized, ScaleKind, Source};
use fathom_trace::{DType, OpClass, TensorMeta};
use ndarray::ArrayView2;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::example::{Example, ceil, shape};
use super::{Op, OpError, Role, input, rules};
use crate::{Element, Tensor};

/// Casts to FP8 (or E5M6) with a scale for every 1 x `tile`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct QuantizeTile {
    /// `e4m3`, `e5m2` or `e5m6`.
    pub format: TileFormat,
    /// Elements along k that share a scale.
    pub tile: usize,
    /// Any FP32, or powers of two.
    pub scale: ScaleType,
    /// Lower bound of amax.
    pub amax_floor: f32,
}

/// Casts to FP8 with a scale for every `block[0]` x `block[1]`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct QuantizeBlock {
    /// `e4m3` or `e5m2`.
    pub format: BlockFormat,
    /// Rows and columns that share a scale; `null`: the whole dimension (per-tensor scaling).
    pub block: [Option<usize>; 2],
    /// Any FP32, or powers of two.
    pub scale: ScaleType,
    /// Lower bound of amax.
    pub amax_floor: f32,
}

/// Formats that a tile can be cast to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum TileFormat {
    /// OCP FP8 E4M3.
    E4m3,
    /// OCP FP8 E5M2.
    E5m2,
    /// The 12-bit format kept for backward.
    E5m6,
}

/// Formats that a block can be cast to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum BlockFormat {
    /// OCP FP8 E4M3.
    E4m3,
    /// OCP FP8 E5M2.
    E5m2,
}

/// Which values a scale may take.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum ScaleType {
    /// Any FP32.
    F32,
    /// The smallest power of two not below the quotient.
    Pow2,
}

fn config(format: Format, scale: ScaleType, amax_floor: f32) -> QuantConfig {
    let scale = match scale {
        ScaleType::F32 => ScaleKind::F32,
        ScaleType::Pow2 => ScaleKind::Pow2,
    };
    QuantConfig { format, scale, amax_floor }
}

/// What both casts ask of their input and parameters.
fn check(
    op: &'static str,
    x: &TensorMeta,
    (path, block): (&str, [usize; 2]),
    floor: f32,
) -> Result<(), OpError> {
    rules::dtype(x, &[DType::F32, DType::BF16, DType::F16])?;
    rules::rank(x, 2, "[m, k]")?;
    let wrong = |path: &str, message: String| OpError::Params { op, path: path.into(), message };
    if block.contains(&0) {
        return Err(wrong(path, "expected at least 1, found 0".to_owned()));
    }
    if !(floor > 0.0 && floor.is_finite()) {
        let message = format!("expected a positive finite number, found {floor:e}");
        return Err(wrong("amax_floor", message));
    }
    Ok(())
}

/// Calls `cast` with x's elements in their own type.
fn cast_any<R>(x: &Tensor, cast: impl Cast<R>) -> R {
    match x.dtype() {
        DType::BF16 => cast.call::<bf16>(x.matrix()),
        DType::F16 => cast.call::<f16>(x.matrix()),
        _ => cast.call::<f32>(x.matrix()),
    }
}

/// A cast that is generic over the source's element type.
trait Cast<R> {
    fn call<T: Element + Source>(self, x: ArrayView2<'_, T>) -> R;
}

fn fp8_outputs(q: Quantized) -> Vec<Tensor> {
    let dtype = if q.format == Format::E5M2 { DType::F8E5M2 } else { DType::F8E4M3 };
    vec![Tensor::from_array(q.codes).reinterpret(dtype), Tensor::from_array(q.scales)]
}

impl Cast<Result<Vec<Tensor>, QuantError>> for &QuantizeTile {
    fn call<T: Element + Source>(self, x: ArrayView2<'_, T>) -> Result<Vec<Tensor>, QuantError> {
        let config = |format| config(format, self.scale, self.amax_floor);
        match self.format {
            TileFormat::E4m3 => {
                quant::quantize_tile(x, self.tile, &config(Format::E4M3)).map(fp8_outputs)
            }
            TileFormat::E5m2 => {
                quant::quantize_tile(x, self.tile, &config(Format::E5M2)).map(fp8_outputs)
            }
            TileFormat::E5m6 => {
                quant::e5m6::quantize_tile_e5m6(x, self.tile, &config(Format::E5M6))
                    .map(|q| vec![Tensor::from_array(q.words), Tensor::from_array(q.scales)])
            }
        }
    }
}

impl Op for QuantizeTile {
    const NAME: &'static str = "quantize_tile";
    const INPUTS: &'static [Role] = &[input("x")];
    const OUTPUTS: &'static [&'static str] = &["q", "scale"];
    const CLASS: OpClass = OpClass::Convert;

    fn example() -> Example {
        let (m, k, tile) = (3, 160, 128);
        let (format, scale) = (TileFormat::E4m3, ScaleType::Pow2);
        Example::new(QuantizeTile { format, tile, scale, amax_floor: 1e-4 })
            .input("x", DType::BF16, shape![m, k])
            .output("q", shape![m, k])
            .output("scale", shape![m, ceil(k, tile)])
    }

    fn infer(&self, inputs: &[Option<TensorMeta>]) -> Result<Vec<TensorMeta>, OpError> {
        let [Some(x)] = inputs else { unreachable!("checked by the table") };
        check(Self::NAME, x, ("tile", [1, self.tile]), self.amax_floor)?;
        let (m, k) = (x.shape[0], x.shape[1]);
        let q = match self.format {
            TileFormat::E4m3 => rules::meta("q", DType::F8E4M3, &[m, k]),
            TileFormat::E5m2 => rules::meta("q", DType::F8E5M2, &[m, k]),
            TileFormat::E5m6 => rules::meta("q", DType::U32, &[m, k.div_ceil(8) * 3]),
        };
        Ok(vec![q, rules::meta("scale", DType::F32, &[m, k.div_ceil(self.tile)])])
    }

    fn flops(&self, inputs: &[Option<TensorMeta>]) -> u64 {
        2 * elements(&inputs[0])
    }

    fn run(&self, inputs: Vec<Option<Tensor>>) -> Result<Vec<Tensor>, OpError> {
        let [Some(x)] = &inputs[..] else { unreachable!("checked by infer") };
        cast_any(x, self).map_err(|e| undefined(Self::NAME, &e))
    }
}

impl Cast<Result<Vec<Tensor>, QuantError>> for &QuantizeBlock {
    fn call<T: Element + Source>(self, x: ArrayView2<'_, T>) -> Result<Vec<Tensor>, QuantError> {
        let format = match self.format {
            BlockFormat::E4m3 => Format::E4M3,
            BlockFormat::E5m2 => Format::E5M2,
        };
        let extent = |i: usize| self.block[i].unwrap_or(usize::MAX);
        let block = fathom_numerics::gemm::ScaleBlock { rows: extent(0), k: extent(1) };
        let config = config(format, self.scale, self.amax_floor);
        quant::quantize(x, block, &config).map(fp8_outputs)
    }
}

impl Op for QuantizeBlock {
    const NAME: &'static str = "quantize_block";
    const INPUTS: &'static [Role] = &[input("x")];
    const OUTPUTS: &'static [&'static str] = &["q", "scale"];
    const CLASS: OpClass = OpClass::Convert;

    fn example() -> Example {
        let (m, k, block) = (3, 160, [2, 128]);
        let (format, scale) = (BlockFormat::E4m3, ScaleType::F32);
        Example::new(QuantizeBlock { format, block: block.map(Some), scale, amax_floor: 1e-4 })
            .input("x", DType::BF16, shape![m, k])
            .output("q", shape![m, k])
            .output("scale", shape![ceil(m, block[0]), ceil(k, block[1])])
    }

    fn infer(&self, inputs: &[Option<TensorMeta>]) -> Result<Vec<TensorMeta>, OpError> {
        let [Some(x)] = inputs else { unreachable!("checked by the table") };
        let [rows, columns] = self.block.map(|extent| extent.unwrap_or(usize::MAX));
        check(Self::NAME, x, ("block", [rows, columns]), self.amax_floor)?;
        let dtype = match self.format {
            BlockFormat::E4m3 => DType::F8E4M3,
            BlockFormat::E5m2 => DType::F8E5M2,
        };
        let scales = [x.shape[0].div_ceil(rows), x.shape[1].div_ceil(columns)];
        Ok(vec![rules::meta("q", dtype, &x.shape), rules::meta("scale", DType::F32, &scales)])
    }

    fn flops(&self, inputs: &[Option<TensorMeta>]) -> u64 {
        2 * elements(&inputs[0])
    }

    fn run(&self, inputs: Vec<Option<Tensor>>) -> Result<Vec<Tensor>, OpError> {
        let [Some(x)] = &inputs[..] else { unreachable!("checked by infer") };
        cast_any(x, self).map_err(|e| undefined(Self::NAME, &e))
    }
}

fn elements(x: &Option<TensorMeta>) -> u64 {
    x.as_ref().map_or(0, |x| x.shape.iter().product::<usize>() as u64)
}

fn undefined(op: &'static str, error: &QuantError) -> OpError {
    OpError::Undefined { op, message: error.to_string() }
}
