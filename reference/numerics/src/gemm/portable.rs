//! The specification of the exact GEMMs, in plain Rust: what the kernels of this room must
//! reproduce bit for bit.

use super::config::{Accumulate, Fp8Operand, GemmConfig, Promote};
use crate::formats::{Format, canonical_f32};
use crate::mma::{Accumulator, Operand, Output, Terms};
use ndarray::{ArrayView2, ArrayViewMut2};
use rayon::prelude::*;

/// `D = A B^T` with promotion, checked operands.
///
/// For each element: for each interval of K, ascending, the tensor core sums the interval's
/// products from zero in steps of its group; the partial sum enters the FP32 accumulator with its
/// scales.
pub(super) fn gemm_fp8(
    a: &Fp8Operand<'_>,
    b: &Fp8Operand<'_>,
    d: ArrayViewMut2<'_, f32>,
    accumulate: Accumulate,
    config: &GemmConfig,
) {
    let k = a.codes.ncols();
    let interval = config.promotion_interval.unwrap_or(k).min(k).max(1);
    let (a_rows, b_rows) = (decode(a.format, a.codes), decode(b.format, b.codes));
    for_each_element(d, |i, j, old| {
        let start = if accumulate == Accumulate::Chain { old } else { 0.0 };
        let mut acc = start;
        for begin in (0..k).step_by(interval) {
            let end = (begin + interval).min(k);
            let terms = Terms {
                a: &a_rows[i * k + begin..i * k + end],
                b: &b_rows[j * k + begin..j * k + end],
                scale_a: &[],
                scale_b: &[],
                fraction_a: a.format.layout().fraction_bits,
                fraction_b: b.format.layout().fraction_bits,
            };
            let partial = accumulator_value(&config.accumulator, &terms, 0);
            acc = promote(config.promote, a.scale(i, begin), b.scale(j, begin), partial, acc);
        }
        if accumulate == Accumulate::AddAtEnd { old + acc } else { acc }
    });
}

/// The partial sum of an interval enters the FP32 accumulator.
#[inline]
pub(super) fn promote(how: Promote, scale_a: f32, scale_b: f32, partial: f32, acc: f32) -> f32 {
    match how {
        Promote::Fma => (scale_a * scale_b).mul_add(partial, acc),
        Promote::MulAdd => acc + (scale_a * scale_b) * partial,
        Promote::ScalesInTurn => acc + (partial * scale_a) * scale_b,
    }
}

/// `D = A B^T` on a tensor core alone: one chain over all of K, in the accumulator's own format
/// (BF16, FP16 and TF32 GEMMs have no scales and no promotion).
///
/// An FP32 accumulator takes a chained old value as it is; an FP16 one takes it rounded to FP16.
pub(super) fn gemm_unscaled(
    format: Format,
    a: ArrayView2<'_, u32>,
    b: ArrayView2<'_, u32>,
    d: ArrayViewMut2<'_, f32>,
    accumulate: Accumulate,
    accumulator: &Accumulator,
) {
    let k = a.ncols();
    let (a_rows, b_rows) = (decode(format, a), decode(format, b));
    let fraction = format.layout().fraction_bits;
    for_each_element(d, |i, j, old| {
        let terms = Terms {
            a: &a_rows[i * k..][..k],
            b: &b_rows[j * k..][..k],
            scale_a: &[],
            scale_b: &[],
            fraction_a: fraction,
            fraction_b: fraction,
        };
        let start = match (accumulate, accumulator.output) {
            (Accumulate::Chain, Output::F32 { .. }) => old.to_bits(),
            (Accumulate::Chain, Output::F16) => crate::formats::to_f16(old).to_bits().into(),
            _ => 0,
        };
        let product = accumulator_value(accumulator, &terms, start);
        if accumulate == Accumulate::AddAtEnd { old + product } else { product }
    });
}

fn accumulator_value(accumulator: &Accumulator, terms: &Terms<'_>, start: u32) -> f32 {
    let code = accumulator.chain(terms, start);
    match accumulator.output {
        Output::F32 { .. } => f32::from_bits(code),
        Output::F16 => Format::F16.layout().to_f32(code),
    }
}

/// Decodes a matrix, row by row.
fn decode<T: Copy + Into<u32>>(format: Format, codes: ArrayView2<'_, T>) -> Vec<Operand> {
    codes.iter().map(|&code| Operand::decode(format, code.into())).collect()
}

/// Replaces every element by `f(row, column, old value)`, NaN canonical, rows in parallel.
fn for_each_element(
    mut d: ArrayViewMut2<'_, f32>,
    f: impl Fn(usize, usize, f32) -> f32 + Sync + Send,
) {
    let rows: Vec<_> = d.outer_iter_mut().collect();
    rows.into_par_iter().enumerate().for_each(|(i, mut row)| {
        for (j, x) in row.iter_mut().enumerate() {
            *x = canonical_f32(f(i, j, *x));
        }
    });
}
