//! Casts whose output is transposed, for wgrad: its GEMM sums over tokens, so both operands need their
//! scales along tokens, 128x1 of the forward's layout.

use super::e5m6::QuantizedE5M6;
use super::{QuantConfig, QuantError, Quantized, Source, dequantize, quantize_tile};
use ndarray::{Array2, ArrayView2};
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
