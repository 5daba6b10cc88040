//! MX formats (OCP Microscaling v1.0): 32 elements of a row share a UE8M0 scale. A baseline.
//!
//! Elements are E4M3, E5M2 or E2M1. The scale is a power of two chosen from the block's amax by one
//! of two rules; `q = x / scale`, exact but for the cast, to nearest even and saturating. As in
//! the parent module a NaN leaves amax alone and becomes NaN (E2M1, which has none: +6). An
//! infinite amax gives the scale NaN, 0xFF.

use super::{QuantError, Source, Target, rows};
use crate::formats::{E2M1, E4M3, E5M2, Format, Layout, Overflow, Rounding, UE8M0, canonical_f32};
use crate::isa::Isa;
use ndarray::{Array2, ArrayView2};
use rayon::prelude::*;

/// Elements of a row that share a scale.
pub const BLOCK: usize = 32;

/// How a block's scale follows from its amax.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum MxRule {
    /// OCP: `2^(floor(log2 amax) - exponent of the format's largest value)`. An amax above the
    /// format's largest value times the scale saturates.
    Floor,
    /// `2^ceil(log2(amax / max_of_format))`: nothing saturates.
    Ceil,
}

/// An MX matrix.
#[derive(Clone, PartialEq, Debug)]
pub struct MxQuantized {
    /// Element codes, one a byte, `[rows, k]` ([`crate::formats::packed::pack_e2m1`] packs E2M1).
    pub codes: Array2<u8>,
    /// UE8M0 codes, `[rows, ceil(k / 32)]`.
    pub scales: Array2<u8>,
    /// E4M3, E5M2 or E2M1.
    pub format: Format,
}

/// Quantises x`[rows, k]` with a UE8M0 scale for every 1 x 32.
pub fn quantize_mx<T: Source>(
    x: ArrayView2<'_, T>,
    format: Format,
    rule: MxRule,
) -> Result<MxQuantized, QuantError> {
    let (codes, scales) = match format {
        Format::E4M3 => {
            let (codes, scales) = cast::<T, E4M3>(x, format, rule);
            (bytemuck::cast_vec(codes), scales)
        }
        Format::E5M2 => {
            let (codes, scales) = cast::<T, E5M2>(x, format, rule);
            (bytemuck::cast_vec(codes), scales)
        }
        Format::E2M1 => {
            let (codes, scales) = cast::<T, E2M1>(x, format, rule);
            (bytemuck::cast_vec(codes), scales)
        }
        found => return Err(QuantError::Format { found }),
    };
    let codes = Array2::from_shape_vec(x.dim(), codes).expect("one code an element");
    Ok(MxQuantized { codes, scales, format })
}

/// Codes, row-major, and scales.
fn cast<T: Source, Q: Target>(
    x: ArrayView2<'_, T>,
    format: Format,
    rule: MxRule,
) -> (Vec<Q>, Array2<u8>) {
    let (m, k) = x.dim();
    let x = x.as_standard_layout();
    let mut codes = vec![Q::zeroed(); m * k];
    let mut scales = Array2::zeros((m, k.div_ceil(BLOCK)));
    if k > 0 {
        let rows: Vec<_> =
            x.outer_iter().zip(codes.chunks_mut(k)).zip(scales.outer_iter_mut()).collect();
        rows.into_par_iter().for_each(|((x, codes), mut scales)| {
            let isa = Isa::best();
            let blocks = x.as_slice().expect("a row").chunks(BLOCK).zip(codes.chunks_mut(BLOCK));
            for ((x, codes), scale) in blocks.zip(scales.iter_mut()) {
                *scale = block_scale(rows::amax_of(isa, x), format, rule);
                rows::cast_row(isa, x, BLOCK, &[UE8M0(*scale).to_f32()], codes);
            }
        });
    }
    (codes, scales)
}

/// The UE8M0 code of a block's scale; a block of zeros has the smallest, 2^-127.
fn block_scale(amax: f32, format: Format, rule: MxRule) -> u8 {
    if amax.is_infinite() {
        return UE8M0::NAN.0;
    }
    let max = f64::from(format.max());
    let (target, rounding) = match rule {
        MxRule::Floor => {
            let exponent = format.layout().unpack(format.layout().max_code()).exponent;
            (f64::from(amax) / crate::formats::layout::exp2i(exponent), Rounding::TowardZero)
        }
        // The FP64 quotient cannot round onto or across a power of two: amax has 24 bits, and
        // max is an odd number below 16 times a power of two.
        MxRule::Ceil => (f64::from(amax) / max, Rounding::Up),
    };
    Layout::UE8M0.from_f64(target, rounding, Overflow::Saturate) as u8
}

impl MxQuantized {
    /// The values `q * scale` in FP32, NaN canonical.
    pub fn dequantize(&self) -> Array2<f32> {
        let layout = self.format.layout();
        Array2::from_shape_fn(self.codes.dim(), |(i, k)| {
            let value = layout.to_f32(u32::from(self.codes[[i, k]]));
            canonical_f32(value * UE8M0(self.scales[[i, k / BLOCK]]).to_f32())
        })
    }
}
