//! Quantisation: casts to FP8 and E5M6 with a scale for every tile or block, and back.
//!
//! The rule, for any block shape ([`quantize`]; 1x128 is [`quantize_tile`], 128x128 is
//! [`quantize_block`]):
//!
//! - `amax` is the largest magnitude of the block, NaNs left out;
//! - `scale = max(amax, amax_floor) / max_of_format`, one IEEE division; for power-of-two scales
//!   the smallest power of two not below that; for the scales of MX formats see [`ScaleKind::Mx`];
//! - `q = x / scale`, one IEEE division, then cast to nearest even, saturating; a NaN becomes the
//!   format's NaN. An infinite amax gives scale infinity, with which the finite elements become
//!   zero of their sign and the infinite ones NaN;
//! - a value is `q * scale` ([`dequantize`]), one multiplication.
//!
//! Beside it: [`e5m6`] packs 12-bit codes, [`transpose_quantize`] re-tiles for wgrad, [`delayed`]
//! is a baseline that the DeepSeek-V3 report compares with. All results are independent of the
//! number of threads.

pub mod delayed;
pub mod e5m6;
mod rows;
mod transpose;

use crate::formats::{E4M3, E5M2, F32_NAN, Format, canonical_f32};
use crate::gemm::{Fp8Operand, ScaleBlock};
use ndarray::{Array2, ArrayView2, Axis};
use rayon::prelude::*;
pub use rows::{Source, Target};
pub use transpose::transpose_quantize;

/// Which numbers a scale may be.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize, schemars::JsonSchema))]
#[cfg_attr(feature = "serde", serde(rename_all = "lowercase"))]
pub enum ScaleKind {
    /// Any FP32 number: the largest magnitude fills the format.
    F32,
    /// Powers of two, rounded up, so that dequantising and re-tiling lose nothing but what the
    /// format does. Held as FP32; UE8M0 holds the same values.
    Pow2,
    /// The rule of the MX formats (OCP Microscaling v1.0, section 6.3), for blocks of 1 x 32:
    /// `2^(floor(log2 amax) - exponent of the format's largest value)`, at least 2^-127; an element
    /// above the format's largest value times that saturates. There is no floor of amax, and an
    /// infinite amax gives the scale NaN, with which every element becomes NaN. Held as FP32.
    Mx,
}

/// The knobs of a cast.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct QuantConfig {
    /// E4M3 or E5M2.
    pub format: Format,
    /// Which numbers a scale may be.
    pub scale: ScaleKind,
    /// Lower bound of amax, positive, so that a block of zeros has a finite quotient.
    pub amax_floor: f32,
}

impl Default for QuantConfig {
    /// E4M3, FP32 scales, DeepSeek's floor of 1e-4.
    fn default() -> QuantConfig {
        QuantConfig { format: Format::E4M3, scale: ScaleKind::F32, amax_floor: 1e-4 }
    }
}

impl QuantConfig {
    /// The scale of a block whose largest magnitude is `amax`, for a format whose largest finite
    /// value is `max_of_format`.
    #[inline]
    pub fn scale_for(&self, amax: f32, max_of_format: f32) -> f32 {
        let scale = amax.max(self.amax_floor) / max_of_format;
        match self.scale {
            ScaleKind::F32 => scale,
            ScaleKind::Pow2 => next_power_of_two(scale),
            ScaleKind::Mx => mx_scale(amax, max_of_format),
        }
    }

    fn check(&self, block: ScaleBlock) -> Result<(), QuantError> {
        if !matches!(self.format, Format::E4M3 | Format::E5M2) {
            return Err(QuantError::Format { found: self.format });
        }
        self.check_block(block)
    }

    fn check_block(&self, block: ScaleBlock) -> Result<(), QuantError> {
        if !(self.amax_floor > 0.0 && self.amax_floor.is_finite()) {
            return Err(QuantError::AmaxFloor { found: self.amax_floor });
        }
        if block.rows == 0 || block.k == 0 {
            return Err(QuantError::Block { rows: block.rows, k: block.k });
        }
        Ok(())
    }
}

/// The smallest power of two not below a positive FP32; zero, infinity and NaN stay as they are.
#[inline]
pub fn next_power_of_two(x: f32) -> f32 {
    let bits = x.to_bits();
    if bits < 0x0080_0000 {
        // A subnormal's code is its value in units of 2^-149.
        return if bits == 0 { x } else { f32::from_bits(bits.next_power_of_two()) };
    }
    if bits >= 0x7F80_0000 {
        return x;
    }
    f32::from_bits((bits + 0x007F_FFFF) & 0x7F80_0000)
}

/// The scale of an MX block; see [`ScaleKind::Mx`].
#[inline]
fn mx_scale(amax: f32, max_of_format: f32) -> f32 {
    if amax.is_infinite() {
        return F32_NAN;
    }
    // FP64 has the exponents of FP32's subnormals as exponents of normal numbers.
    let exponent = |x: f32| (f64::from(x).to_bits() >> 52) as i32;
    let power = (exponent(amax) - exponent(max_of_format)).max(-127);
    // 2^-127 is FP32's largest power below its normal numbers.
    f32::from_bits(if power == -127 { 0x0040_0000 } else { ((power + 127) as u32) << 23 })
}

/// Why a cast is refused.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum QuantError {
    /// A format that this cast does not make.
    #[error("cannot quantise to {found}: expected e4m3 or e5m2 (e5m6 has a function of its own)")]
    Format {
        /// The format asked for.
        found: Format,
    },
    /// A floor that is not a positive number.
    #[error("amax_floor is {found:e}: expected a positive finite number")]
    AmaxFloor {
        /// The floor given.
        found: f32,
    },
    /// An empty block.
    #[error("scale block is {rows} x {k}: expected at least 1 x 1")]
    Block {
        /// Rows of the block.
        rows: usize,
        /// Its extent along the second dimension.
        k: usize,
    },
    /// Segments that are longer than what they cut.
    #[error("segments are {found:?}: expected a sum of at most {expected}, the number of rows")]
    Segments {
        /// Rows to share out.
        expected: usize,
        /// The lengths given.
        found: Vec<usize>,
    },
}

/// An FP8 matrix and its scales.
#[derive(Clone, PartialEq, Debug)]
pub struct Quantized {
    /// Codes, one a byte, `[rows, k]`.
    pub codes: Array2<u8>,
    /// FP32 scales, `[ceil(rows / block.rows), ceil(k / block.k)]`.
    pub scales: Array2<f32>,
    /// E4M3 or E5M2.
    pub format: Format,
    /// Which elements share a scale.
    pub block: ScaleBlock,
}

impl Quantized {
    /// The matrix as a GEMM operand: rows are M (or N), the second dimension is K.
    pub fn operand(&self) -> Fp8Operand<'_> {
        Fp8Operand {
            codes: self.codes.view(),
            scales: self.scales.view(),
            format: self.format,
            block: self.block,
        }
    }

    /// The matrix transposed, codes, scales and block: the same values, nothing rounded.
    pub fn transposed(&self) -> Quantized {
        Quantized {
            codes: self.codes.t().as_standard_layout().into_owned(),
            scales: self.scales.t().as_standard_layout().into_owned(),
            format: self.format,
            block: ScaleBlock { rows: self.block.k, k: self.block.rows },
        }
    }
}

/// Quantises x`[rows, k]` with a scale for every `block`. Tails are smaller blocks.
///
/// # Errors
/// [`QuantError`] for a format other than E4M3 and E5M2, a floor that is not a positive finite
/// number, and an empty block.
pub fn quantize<T: Source>(
    x: ArrayView2<'_, T>,
    block: ScaleBlock,
    config: &QuantConfig,
) -> Result<Quantized, QuantError> {
    config.check(block)?;
    let (codes, scales) = match config.format {
        Format::E5M2 => rows::quantize::<T, E5M2>(x, block, config).into_bytes(),
        _ => rows::quantize::<T, E4M3>(x, block, config).into_bytes(),
    };
    Ok(Quantized { codes, scales, format: config.format, block })
}

/// Activations and gradients: a scale for every 1 x `tile` (the report: 128).
///
/// # Errors
/// As [`quantize`].
pub fn quantize_tile<T: Source>(
    x: ArrayView2<'_, T>,
    tile: usize,
    config: &QuantConfig,
) -> Result<Quantized, QuantError> {
    quantize(x, ScaleBlock { rows: 1, k: tile }, config)
}

/// Weights: a scale for every 128 x 128.
///
/// # Errors
/// As [`quantize`].
pub fn quantize_block<T: Source>(
    x: ArrayView2<'_, T>,
    config: &QuantConfig,
) -> Result<Quantized, QuantError> {
    quantize(x, ScaleBlock::BLOCK_128X128, config)
}

/// The values `q * scale` in FP32, NaN canonical.
pub fn dequantize(q: &Quantized) -> Array2<f32> {
    let layout = q.format.layout();
    let values: Vec<f32> = (0..=255).map(|code| layout.to_f32(code)).collect();
    scaled(q.codes.view(), q.scales.view(), q.block, |code| values[usize::from(code)])
}

/// `value(code) * scale` of every element, rows in parallel.
fn scaled<Q: Copy + Sync>(
    codes: ArrayView2<'_, Q>,
    scales: ArrayView2<'_, f32>,
    block: ScaleBlock,
    value: impl Fn(Q) -> f32 + Sync,
) -> Array2<f32> {
    let mut x = Array2::zeros(codes.dim());
    let rows: Vec<_> = x.outer_iter_mut().zip(codes.outer_iter()).enumerate().collect();
    rows.into_par_iter().for_each(|(i, (mut x, codes))| {
        let width = block.k.min(codes.len().max(1));
        let tiles = x.axis_chunks_iter_mut(Axis(0), width);
        let tiles = tiles.zip(codes.axis_chunks_iter(Axis(0), width));
        for ((mut x, codes), &scale) in tiles.zip(scales.row(i / block.rows)) {
            x.zip_mut_with(&codes, |x, &code| *x = canonical_f32(value(code) * scale));
        }
    });
    x
}
