//! The cast itself, over rows of any source and target: the loops that everything here shares.

use super::QuantConfig;
use crate::formats::{E4M3, E5M2, E5M6, bf16, f16};
use crate::gemm::ScaleBlock;
use crate::isa::{Isa, multiversion};
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

    /// The code of `x`: saturating, to nearest even, NaN canonical.
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

/// Codes and scales of a whole matrix, row-major.
pub(super) struct Cast<Q> {
    pub(super) codes: Array2<Q>,
    pub(super) scales: Array2<f32>,
}

impl<Q: Target> Cast<Q> {
    /// The codes as plain bytes, for targets of one byte.
    pub(super) fn into_bytes(self) -> (Array2<u8>, Array2<f32>) {
        let (dim, (codes, _)) = (self.codes.dim(), self.codes.into_raw_vec_and_offset());
        let codes = Array2::from_shape_vec(dim, bytemuck::cast_vec(codes));
        (codes.expect("one code a byte"), self.scales)
    }
}

/// Quantises a matrix.
pub(super) fn quantize<T: Source, Q: Target>(
    x: ArrayView2<'_, T>,
    block: ScaleBlock,
    config: &QuantConfig,
) -> Cast<Q> {
    let x = x.as_standard_layout();
    let (rows, k) = x.dim();
    let x = x.as_slice().expect("standard layout");
    in_tasks(rows, k, block, |task, codes, scales| {
        let x = &x[task * k..][..codes.len()];
        quantize_bands(x, codes, scales, k, block, config);
    })
}

/// Runs `task(first row, codes, scales)` over bands of whole blocks of rows, in parallel.
fn in_tasks<Q: Target>(
    rows: usize,
    k: usize,
    block: ScaleBlock,
    task: impl Fn(usize, &mut [Q], &mut [f32]) + Sync,
) -> Cast<Q> {
    let (scale_rows, scale_columns) = block.scales(rows, k);
    let mut codes = vec![Q::zeroed(); rows * k];
    let mut scales = vec![0.0f32; scale_rows * scale_columns];
    if !codes.is_empty() {
        // Tiles of one row are small: several rows a task, so that a task is worth its dispatch.
        let task_rows = if block.rows == 1 { 16 } else { block.rows.min(rows) };
        let task_scales = task_rows.div_ceil(block.rows) * scale_columns;
        let parts = codes.par_chunks_mut(task_rows * k).zip(scales.par_chunks_mut(task_scales));
        parts.enumerate().for_each(|(i, (codes, scales))| task(i * task_rows, codes, scales));
    }
    Cast {
        codes: Array2::from_shape_vec((rows, k), codes).expect("one code an element"),
        scales: Array2::from_shape_vec((scale_rows, scale_columns), scales).expect("as allocated"),
    }
}

/// Several rows of blocks, one after the other.
fn quantize_bands<T: Source, Q: Target>(
    x: &[T],
    codes: &mut [Q],
    scales: &mut [f32],
    k: usize,
    block: ScaleBlock,
    config: &QuantConfig,
) {
    let isa = Isa::best();
    let width = block.k.min(k);
    let scale_columns = k.div_ceil(width);
    let band = block.rows.saturating_mul(k).min(x.len());
    let bands = x.chunks(band).zip(codes.chunks_mut(band));
    for ((x, codes), scales) in bands.zip(scales.chunks_mut(scale_columns)) {
        scales.fill(0.0);
        x.chunks(k).for_each(|row| raise_amax(isa, row, width, scales));
        for scale in scales.iter_mut() {
            *scale = config.scale_for(*scale, Q::MAX_VALUE);
        }
        for (row, codes) in x.chunks(k).zip(codes.chunks_mut(k)) {
            cast_row(isa, row, width, scales, codes);
        }
    }
}

multiversion! {
    /// Raises each tile's amax by the magnitudes of a row, NaNs left out.
    fn raise_amax(row: &[impl Source], width: usize, amax: &mut [f32]) {
        for (amax, tile) in amax.iter_mut().zip(row.chunks(width)) {
            *amax = amax.max(magnitude(tile));
        }
    }
}

multiversion! {
    /// `q = cast(x / scale)` of a row.
    pub(super) fn cast_row(row: &[impl Source], width: usize, scales: &[f32], codes: &mut [impl Target]) {
        let tiles = row.chunks(width).zip(codes.chunks_mut(width));
        for ((tile, codes), &scale) in tiles.zip(scales) {
            for (code, x) in codes.iter_mut().zip(tile) {
                *code = Target::cast(x.to_f32() / scale);
            }
        }
    }
}

multiversion! {
    /// `q = cast(x * factor)` of a row.
    pub(super) fn cast_times(row: &[impl Source], factor: f32, codes: &mut [impl Target]) {
        for (code, x) in codes.iter_mut().zip(row) {
            *code = Target::cast(x.to_f32() * factor);
        }
    }
}

multiversion! {
    /// The largest magnitude, NaNs left out; 0 where there is none.
    pub(super) fn amax_of(x: &[impl Source]) -> f32 {
        magnitude(x)
    }
}

/// Magnitudes order as their bits do, and integer maxima vectorise in any order.
#[inline(always)]
fn magnitude<T: Source>(x: &[T]) -> f32 {
    let bits = x.iter().fold(0u32, |amax, x| {
        let bits = x.to_f32().to_bits() & 0x7FFF_FFFF;
        amax.max(if bits > 0x7F80_0000 { 0 } else { bits })
    });
    f32::from_bits(bits)
}
