//! Casts whose output is transposed, for wgrad: its GEMM sums over tokens, so both operands need
//! their scales along tokens, 128x1 of the forward's layout.

use super::{QuantConfig, QuantError, Quantized, Source, quantize};
use crate::gemm::ScaleBlock;
use ndarray::{Array2, ArrayView2, s};
use rayon::prelude::*;

/// Transpose and cast: x`[m, k]` becomes codes `[k, taken]` with a scale for every `block` of the
/// output. `segments` are lengths that cut the rows of x (sequences, experts), `taken` is their
/// sum; rows behind them are left out, and blocks begin anew in each, so that there are
/// `sum of ceil(segment / block.k)` columns of scales. Within a segment the bits are those of
/// casting the transposed matrix: the operand of [`crate::gemm::grouped::gemm_fp8_grouped_k`].
///
/// A matrix that was kept as codes is re-tiled by way of its values ([`super::dequantize`]); with
/// power-of-two scales in and out that first step is exact.
///
/// # Errors
/// [`QuantError`] where the segments exceed the rows or the configuration is no cast.
pub fn transpose_quantize<T: Source>(
    x: ArrayView2<'_, T>,
    segments: &[usize],
    block: ScaleBlock,
    config: &QuantConfig,
) -> Result<Quantized, QuantError> {
    let (m, k) = x.dim();
    let taken = segments.iter().sum();
    if taken > m {
        return Err(QuantError::Segments { expected: m, found: segments.to_vec() });
    }
    config.check(block)?;
    let x = transpose(x.slice(s![..taken, ..]));
    let columns = segments.iter().map(|length| length.div_ceil(block.k)).sum();
    let mut codes = Array2::zeros((k, taken));
    let mut scales = Array2::zeros((k.div_ceil(block.rows), columns));
    let (mut begin, mut column) = (0, 0);
    for &length in segments {
        let part = quantize(x.slice(s![.., begin..begin + length]), block, config)?;
        codes.slice_mut(s![.., begin..begin + length]).assign(&part.codes);
        scales.slice_mut(s![.., column..column + part.scales.ncols()]).assign(&part.scales);
        begin += length;
        column += part.scales.ncols();
    }
    Ok(Quantized { codes, scales, format: config.format, block })
}

/// The transpose in standard layout, in FP32. Squares go through a buffer of their own, as rows a
/// large power of two apart would share a few cache sets.
fn transpose<T: Source>(x: ArrayView2<'_, T>) -> Array2<f32> {
    const SIDE: usize = 32;
    let (m, k) = x.dim();
    let x = x.as_standard_layout();
    let x = x.as_slice().expect("standard layout");
    let mut out = vec![0.0f32; m * k];
    if !out.is_empty() {
        out.par_chunks_mut(SIDE * m).enumerate().for_each(|(band, out)| {
            let columns = band * SIDE..(band * SIDE + SIDE).min(k);
            let mut square = [[0.0f32; SIDE]; SIDE];
            for i0 in (0..m).step_by(SIDE) {
                let height = SIDE.min(m - i0);
                for i in 0..height {
                    let row = &x[(i0 + i) * k..][columns.clone()];
                    row.iter().zip(&mut square).for_each(|(x, column)| column[i] = x.to_f32());
                }
                for (row, column) in out.chunks_mut(m).zip(&square) {
                    row[i0..i0 + height].copy_from_slice(&column[..height]);
                }
            }
        });
    }
    Array2::from_shape_vec((k, m), out).expect("as many elements")
}
