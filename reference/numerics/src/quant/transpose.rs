//! Casts whose output is transposed, for wgrad: its GEMM sums over tokens, so both operands need
//! their
//! scales along tokens, 128x1 of the forward's layout.

use super::e5m6::QuantizedE5M6;
use super::{QuantConfig, QuantError, Quantized, Source, dequantize, quantize_tile};
use crate::gemm::ScaleBlock;
use ndarray::{Array2, ArrayView2, s};
use rayon::prelude::*;

/// Transpose and cast: x`[m, k]` becomes codes `[k, m]` with a scale for every 1 x `tile` of the
/// output, that is `tile` x 1 of the input. The same bits as casting the transposed matrix.
pub fn transpose_quantize<T: Source>(
    x: ArrayView2<'_, T>,
    tile: usize,
    config: &QuantConfig,
) -> Result<Quantized, QuantError> {
    quantize_tile(transpose(x).view(), tile, config)
}

/// The re-quantisation of wgrad: a matrix kept as 1x128 becomes its transpose with 128x1 of the
/// kept layout. Every value is dequantised (`q * scale`, rounded to FP32), then cast anew; with
/// power-of-two scales in and out the first step is exact.
pub fn requantize_transposed(
    q: &Quantized,
    tile: usize,
    config: &QuantConfig,
) -> Result<Quantized, QuantError> {
    quantize_tile(transpose(dequantize(q).view()).view(), tile, config)
}

/// [`requantize_transposed`] of a matrix kept in E5M6: the input of the projection after attention.
pub fn requantize_transposed_e5m6(
    q: &QuantizedE5M6,
    tile: usize,
    config: &QuantConfig,
) -> Result<Quantized, QuantError> {
    quantize_tile(transpose(q.dequantize().view()).view(), tile, config)
}

/// [`transpose_quantize`] for experts: the rows of x are tokens sorted by expert, `m_sizes[g]` of
/// them
/// belonging to expert g, and tiles start anew at every expert. The scales are `[k,
/// sum of ceil(m_sizes[g] / tile)]`: the operand of [`crate::gemm::grouped::gemm_fp8_grouped_k`].
pub fn transpose_quantize_groups<T: Source>(
    x: ArrayView2<'_, T>,
    m_sizes: &[usize],
    tile: usize,
    config: &QuantConfig,
) -> Result<Quantized, QuantError> {
    quantize_groups(transpose(x), m_sizes, tile, config)
}

/// [`requantize_transposed`] for experts, as [`transpose_quantize_groups`] lays them out.
pub fn requantize_transposed_groups(
    q: &Quantized,
    m_sizes: &[usize],
    tile: usize,
    config: &QuantConfig,
) -> Result<Quantized, QuantError> {
    quantize_groups(transpose(dequantize(q).view()), m_sizes, tile, config)
}

/// Casts each group of columns by itself.
fn quantize_groups(
    x: Array2<f32>,
    sizes: &[usize],
    tile: usize,
    config: &QuantConfig,
) -> Result<Quantized, QuantError> {
    let (k, m) = x.dim();
    if sizes.iter().sum::<usize>() != m {
        return Err(QuantError::Groups { expected: m, found: sizes.to_vec() });
    }
    let block = ScaleBlock { rows: 1, k: tile };
    config.check(block)?;
    let columns = sizes.iter().map(|size| size.div_ceil(tile)).sum();
    let mut codes = Array2::zeros((k, m));
    let mut scales = Array2::zeros((k, columns));
    let (mut begin, mut column) = (0, 0);
    for &size in sizes {
        let part = quantize_tile(x.slice(s![.., begin..begin + size]), tile, config)?;
        codes.slice_mut(s![.., begin..begin + size]).assign(&part.codes);
        scales.slice_mut(s![.., column..column + part.scales.ncols()]).assign(&part.scales);
        begin += size;
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
