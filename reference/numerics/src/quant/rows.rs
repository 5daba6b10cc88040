//! The cast itself, over rows of any source and target: the loops that everything here shares.

use super::QuantConfig;
use crate::formats::{E4M3, E5M2, E5M6, bf16, f16};
use crate::gemm::ScaleBlock;
use ndarray::{Array2, ArrayView2};
use rayon::prelude::*;

/// What can be quantised: FP32, BF16, FP16.
pub trait Source: Copy + Sync + Send {
    /// The value, exact.
    fn to_f32(self) -> f32;
}

impl Source for f32 {
    #[inline(always)]
    fn to_f32(self) -> f32 {
        self
    }
}

impl Source for bf16 {
    #[inline(always)]
    fn to_f32(self) -> f32 {
        // Not half's conversion, which quiets NaNs and so does not vectorise.
        f32::from_bits(u32::from(self.to_bits()) << 16)
    }
}

impl Source for f16 {
    #[inline(always)]
    fn to_f32(self) -> f32 {
        f16::to_f32(self)
    }
}

/// What a cast makes: E4M3, E5M2, E5M6.
pub trait Target: bytemuck::Pod + Sync + Send {
    /// The largest finite value, which the block's amax is scaled to.
    const MAX_VALUE: f32;

    /// Saturating, to nearest even, NaN canonical.
    fn cast(x: f32) -> Self;
}

macro_rules! target {
    ($type:ty, $max:literal) => {
        impl Target for $type {
            const MAX_VALUE: f32 = $max;

            #[inline(always)]
            fn cast(x: f32) -> Self {
                <$type>::saturating(x)
            }
        }
    };
}

target!(E4M3, 448.0);
target!(E5M2, 57344.0);
target!(E5M6, 65024.0);

/// Quantises a matrix in standard layout; rows of blocks in parallel.
pub(super) fn quantize<T: Source, Q: Target>(
    x: ArrayView2<'_, T>,
    block: ScaleBlock,
    config: &QuantConfig,
) -> (Array2<Q>, Array2<f32>) {
    let (rows, k) = x.dim();
    let (scale_rows, scale_columns) = block.scales(rows, k);
    let mut codes = vec![Q::zeroed(); rows * k];
    let mut scales = vec![0.0f32; scale_rows * scale_columns];
    let x = x.as_slice().expect("standard layout");
    if !x.is_empty() {
        // Tiles of one row are small: several rows a task, so that a task is worth its dispatch.
        let rows_per_task = if block.rows == 1 { 16 } else { block.rows.min(rows) };
        let tasks = codes
            .par_chunks_mut(rows_per_task * k)
            .zip(scales.par_chunks_mut(rows_per_task.div_ceil(block.rows) * scale_columns))
            .zip(x.par_chunks(rows_per_task * k));
        tasks.for_each(|((codes, scales), x)| {
            let band = block.rows.min(rows).saturating_mul(k);
            let bands = codes.chunks_mut(band).zip(x.chunks(band));
            for ((codes, x), scales) in bands.zip(scales.chunks_mut(scale_columns)) {
                quantize_band(x, codes, scales, k, block.k.min(k), config);
            }
        });
    }
    let codes = Array2::from_shape_vec((rows, k), codes).expect("one code an element");
    let scales = Array2::from_shape_vec((scale_rows, scale_columns), scales).expect("as allocated");
    (codes, scales)
}

/// One row of blocks: `x` is that many rows of `k`; a scale for every `width` columns.
fn quantize_band<T: Source, Q: Target>(
    x: &[T],
    codes: &mut [Q],
    scales: &mut [f32],
    k: usize,
    width: usize,
    config: &QuantConfig,
) {
    scales.fill(0.0);
    for row in x.chunks(k) {
        for (amax, tile) in scales.iter_mut().zip(row.chunks(width)) {
            *amax = amax.max(amax_of(tile));
        }
    }
    for scale in scales.iter_mut() {
        *scale = config.scale_for(*scale, Q::MAX_VALUE);
    }
    for (row, codes) in x.chunks(k).zip(codes.chunks_mut(k)) {
        let tiles = row.chunks(width).zip(codes.chunks_mut(width));
        for ((tile, codes), &scale) in tiles.zip(scales.iter()) {
            for (code, x) in codes.iter_mut().zip(tile) {
                *code = Q::cast(x.to_f32() / scale);
            }
        }
    }
}

/// The largest magnitude, NaNs left out; 0 where there is none.
#[inline]
pub(super) fn amax_of<T: Source>(x: &[T]) -> f32 {
    // Magnitudes order as their bits do, and integer maxima vectorise in any order.
    let bits = x.iter().fold(0u32, |amax, x| {
        let bits = x.to_f32().to_bits() & 0x7FFF_FFFF;
        amax.max(if bits > 0x7F80_0000 { 0 } else { bits })
    });
    f32::from_bits(bits)
}
