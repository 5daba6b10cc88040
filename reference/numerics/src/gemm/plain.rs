//! FP8 GEMMs whose accumulator is plain IEEE arithmetic, on the in-order kernels: one FP32 `fma` a
//! product, and groups summed exactly.
//!
//! The bits are those of `portable`. An `fma` chain is what [`gemm_f32`] computes. Products of E4M3
//! are multiples of 2^-18 below 2^18, and so are FP32 sums of them: those of an interval of up to
//! 2^16 stay below 2^34, so that FP64 adds them without rounding, in any order, and one rounding to
//! FP32 a group remains.

use super::config::{Accumulate, Fp8Operand, GemmConfig};
use super::inorder::{gemm_f32, gemm_f64};
use super::portable::promote;
use crate::formats::{Format, canonical_f32};
use crate::mma::Accumulator;
use ndarray::{Array2, ArrayViewMut2, s};
use rayon::prelude::*;
use std::ops::Range;

/// The sums that these kernels know.
#[derive(Clone, Copy)]
pub(super) enum Sum {
    /// One `fma` a product.
    Fma,
    /// Groups of that many products, each exact.
    ExactGroups(usize),
}

/// Which of them the GEMM's accumulator is, if any.
pub(super) fn sum_of(a: &Fp8Operand<'_>, b: &Fp8Operand<'_>, config: &GemmConfig) -> Option<Sum> {
    let group = config.accumulator.group;
    if config.accumulator != (Accumulator { group, ..Accumulator::EXACT }) {
        return None;
    }
    let k = a.codes.ncols();
    let interval = config.promotion_interval.unwrap_or(k).min(k);
    let e4m3 = (a.format, b.format) == (Format::E4M3, Format::E4M3);
    match group {
        1 => Some(Sum::Fma),
        _ if e4m3 && interval <= 1 << 16 => Some(Sum::ExactGroups(group)),
        _ => None,
    }
}

/// `D = A B^T` with promotion, checked operands.
pub(super) fn gemm_fp8(
    sum: Sum,
    a: &Fp8Operand<'_>,
    b: &Fp8Operand<'_>,
    mut d: ArrayViewMut2<'_, f32>,
    accumulate: Accumulate,
    config: &GemmConfig,
) {
    let k = a.codes.ncols();
    let interval = config.promotion_interval.unwrap_or(k).min(k).max(1);
    let mut acc = match accumulate {
        Accumulate::Chain => d.to_owned(),
        Accumulate::Overwrite | Accumulate::AddAtEnd => Array2::zeros(d.dim()),
    };
    for begin in (0..k).step_by(interval) {
        let range = begin..(begin + interval).min(k);
        let partial = match sum {
            Sum::Fma => fma_partial(a, b, range),
            Sum::ExactGroups(group) => exact_partial(a, b, range, group),
        };
        let rows: Vec<_> = acc.outer_iter_mut().zip(partial.outer_iter()).enumerate().collect();
        rows.into_par_iter().for_each(|(i, (acc, partial))| {
            let scale_a = a.scale(i, begin);
            for (j, (acc, &partial)) in acc.into_iter().zip(partial).enumerate() {
                *acc = promote(config.promote, scale_a, b.scale(j, begin), partial, *acc);
            }
        });
    }
    let add = accumulate == Accumulate::AddAtEnd;
    d.zip_mut_with(&acc, |d, &acc| *d = canonical_f32(if add { *d + acc } else { acc }));
}

fn fma_partial(a: &Fp8Operand<'_>, b: &Fp8Operand<'_>, range: Range<usize>) -> Array2<f32> {
    let values = |x: &Fp8Operand<'_>| {
        let layout = x.format.layout();
        let table: Vec<f32> = (0..=255).map(|code| layout.to_f32(code)).collect();
        x.codes.slice(s![.., range.clone()]).map(|&code| table[usize::from(code)])
    };
    let (a, b) = (values(a), values(b));
    let mut partial = Array2::zeros((a.nrows(), b.nrows()));
    gemm_f32(a.view(), b.t(), partial.view_mut(), false);
    partial
}

fn exact_partial(
    a: &Fp8Operand<'_>,
    b: &Fp8Operand<'_>,
    range: Range<usize>,
    group: usize,
) -> Array2<f32> {
    let values = |x: &Fp8Operand<'_>| {
        let layout = x.format.layout();
        let table: Vec<f64> = (0..=255).map(|code| layout.to_f64(code)).collect();
        x.codes.slice(s![.., range.clone()]).map(|&code| table[usize::from(code)])
    };
    let (a, b) = (values(a), values(b));
    let mut partial = Array2::<f32>::zeros((a.nrows(), b.nrows()));
    for begin in (0..range.len()).step_by(group) {
        let step = s![.., begin..(begin + group).min(range.len())];
        let mut sum = partial.mapv(f64::from);
        gemm_f64(a.slice(step), b.slice(step).t(), sum.view_mut(), true);
        partial.zip_mut_with(&sum, |partial, &sum| *partial = sum as f32);
    }
    partial
}
