//! SwiGLU fused with the cast that follows it (report, section 3.3.3): the FP32 value goes into the
//! cast without a rounding between.

use super::{QuantConfig, QuantError, Quantized, Source, rows, transpose};
use crate::elementary::silu_slice;
use crate::formats::{E4M3, E5M2, Format, canonical_f32};
use crate::gemm::ScaleBlock;
use ndarray::{Array2, ArrayView1, ArrayView2};
use rayon::prelude::*;

/// `silu(gate) * up` in FP32: silu rounded once ([`crate::elementary::silu`]), the product once,
/// NaN
/// canonical.
///
/// # Panics
/// If the shapes differ.
pub fn swiglu<T: Source>(gate: ArrayView2<'_, T>, up: ArrayView2<'_, T>) -> Array2<f32> {
    assert_eq!(gate.dim(), up.dim(), "gate is {:?}, up is {:?}", gate.dim(), up.dim());
    let mut y = Array2::zeros(gate.dim());
    let rows: Vec<_> = y.outer_iter_mut().enumerate().collect();
    rows.into_par_iter().for_each(|(i, mut y)| {
        swiglu_row(gate.row(i), up.row(i), y.as_slice_mut().expect("a row"));
    });
    y
}

/// SwiGLU + cast: the codes of `silu(gate) * up` with a scale for every 1 x `tile`. The same bits
/// as
/// [`super::quantize_tile`] of [`swiglu`].
pub fn swiglu_quantize<T: Source>(
    gate: ArrayView2<'_, T>,
    up: ArrayView2<'_, T>,
    tile: usize,
    config: &QuantConfig,
) -> Result<Quantized, QuantError> {
    let block = ScaleBlock { rows: 1, k: tile };
    config.check(block)?;
    check_shapes(gate, up)?;
    let fill = |i: usize, y: &mut [f32]| swiglu_row(gate.row(i), up.row(i), y);
    let dim = gate.dim();
    let (codes, scales) = match config.format {
        Format::E5M2 => rows::quantize_computed::<E5M2>(dim, block, config, fill).into_bytes(),
        _ => rows::quantize_computed::<E4M3>(dim, block, config, fill).into_bytes(),
    };
    Ok(Quantized { codes, scales, format: config.format, block })
}

/// SwiGLU + transpose + cast, for the wgrad of the down-projection: codes of the transpose of
/// `silu(gate) * up` with a scale for every 1 x `tile` of it, `tile` x 1 of the input's layout.
pub fn swiglu_transpose_quantize<T: Source>(
    gate: ArrayView2<'_, T>,
    up: ArrayView2<'_, T>,
    tile: usize,
    config: &QuantConfig,
) -> Result<Quantized, QuantError> {
    check_shapes(gate, up)?;
    transpose::transpose_quantize(swiglu(gate, up).view(), tile, config)
}

fn swiglu_row<T: Source>(gate: ArrayView1<'_, T>, up: ArrayView1<'_, T>, y: &mut [f32]) {
    y.iter_mut().zip(gate).for_each(|(y, gate)| *y = gate.to_f32());
    silu_slice(y);
    y.iter_mut().zip(up).for_each(|(y, up)| *y = canonical_f32(*y * up.to_f32()));
}

fn check_shapes<T>(gate: ArrayView2<'_, T>, up: ArrayView2<'_, T>) -> Result<(), QuantError> {
    if gate.dim() == up.dim() {
        return Ok(());
    }
    Err(QuantError::Shape { what: "up", expected: gate.dim(), found: up.dim() })
}
