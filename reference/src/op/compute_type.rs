//! What the ops of the model compute in: f32 (for F32 and BF16 tensors) or f64 (for F64 tensors).
//!
//! A BF16 tensor is widened on load and rounded to nearest even on store. A NaN is stored as
//! 0x7FFFFFFF (F32) or 0x7FFF (BF16), so that backends agree on its bits.

use std::borrow::Cow;

use fathom_numerics::elementary;
use fathom_numerics::gemm::{Accumulate, gemm_bf16_into, inorder};
use fathom_numerics::mma::Accumulator;
use fathom_numerics::reduce;
use fathom_trace::{DType, TensorMeta};
use half::bf16;
use ndarray::{ArrayView2, ArrayViewMut2};
use rayon::prelude::*;

use super::{OpError, rules};
use crate::Tensor;
use crate::tensor::Element;

/// Elements that one thread loads or stores at a time: enough to be worth the hand-over.
const CHUNK: usize = 1 << 15;

/// f32 or f64, with the functions that the ops use.
pub trait Real:
    Element
    + PartialOrd
    + Default
    + std::fmt::Debug
    + std::ops::Add<Output = Self>
    + std::ops::Sub<Output = Self>
    + std::ops::Mul<Output = Self>
    + std::ops::Div<Output = Self>
    + std::ops::Neg<Output = Self>
    + std::ops::AddAssign
    + std::ops::MulAssign
    + std::ops::SubAssign
{
    /// The number 0, positive.
    const ZERO: Self;
    /// The number 1, exact in every type.
    const ONE: Self;
    /// Below every number: where a maximum begins.
    const NEG_INFINITY: Self;

    /// `x`, rounded to nearest even.
    fn from_f64(x: f64) -> Self;
    /// The value in f64, exact.
    fn to_f64(self) -> f64;
    /// Whether it is a NaN.
    fn is_nan(self) -> bool;
    /// IEEE square root.
    fn sqrt(self) -> Self;
    /// Natural logarithm. Not `ln`: where the type is known to be f32, that name is the system
    /// library's function, whose bits differ.
    fn natural_log(self) -> Self;
    /// The halving tree of `fathom_numerics::reduce` over lanes, which it overwrites.
    fn add_lanes(lanes: &mut [Self]) -> Self;
    /// Exponential of every element.
    fn exp_slice(xs: &mut [Self]);
    /// Logistic function of every element.
    fn sigmoid_slice(xs: &mut [Self]);
    /// `c = a b`, or `c += a b`: every element a chain of fma over ascending k.
    fn gemm(
        a: ArrayView2<'_, Self>,
        b: ArrayView2<'_, Self>,
        c: ArrayViewMut2<'_, Self>,
        accumulate: bool,
    );
    /// `a b` as [`Real::gemm`] gives it, row-major, in memory that nobody had to clear.
    fn gemm_new(a: ArrayView2<'_, Self>, b: ArrayView2<'_, Self>) -> Vec<Self>;
    /// As [`Real::gemm`] on the BF16 tensor core: operands rounded to BF16, chained from `c`.
    fn gemm_bf16(
        a: ArrayView2<'_, Self>,
        b: ArrayView2<'_, Self>,
        c: ArrayViewMut2<'_, Self>,
        accumulate: bool,
    );
    /// The tensor's elements, widened to `Self` where they are narrower.
    fn load(tensor: &Tensor) -> Cow<'_, [Self]>;
    /// As [`Real::load`], by value: without a copy where the tensor is of `Self` and not shared.
    fn load_owned(tensor: Tensor) -> Vec<Self> {
        if tensor.dtype() == Self::DTYPE {
            return tensor.into_vec();
        }
        Self::load(&tensor).into_owned()
    }
    /// A tensor of `dtype` from computed elements, rounded where `dtype` is narrower.
    fn store(elements: Vec<Self>, shape: &[usize], dtype: DType) -> Tensor;
}

/// The larger of two numbers; a NaN loses against a number.
pub fn maximum<R: Real>(a: R, b: R) -> R {
    if a >= b || b.is_nan() { a } else { b }
}

impl Real for f32 {
    const ZERO: f32 = 0.0;
    const ONE: f32 = 1.0;
    const NEG_INFINITY: f32 = f32::NEG_INFINITY;

    fn from_f64(x: f64) -> f32 {
        x as f32
    }

    fn to_f64(self) -> f64 {
        self.into()
    }

    fn is_nan(self) -> bool {
        f32::is_nan(self)
    }

    fn sqrt(self) -> f32 {
        f32::sqrt(self)
    }

    fn natural_log(self) -> f32 {
        elementary::log(self)
    }

    fn add_lanes(lanes: &mut [f32]) -> f32 {
        reduce::tree_sum(lanes)
    }

    fn exp_slice(xs: &mut [f32]) {
        elementary::exp_slice(xs);
    }

    fn sigmoid_slice(xs: &mut [f32]) {
        elementary::sigmoid_slice(xs);
    }

    fn gemm(
        a: ArrayView2<'_, f32>,
        b: ArrayView2<'_, f32>,
        c: ArrayViewMut2<'_, f32>,
        accumulate: bool,
    ) {
        inorder::gemm_f32(a, b, c, accumulate);
    }

    fn gemm_new(a: ArrayView2<'_, f32>, b: ArrayView2<'_, f32>) -> Vec<f32> {
        inorder::gemm_new(a, b)
    }

    fn gemm_bf16(
        a: ArrayView2<'_, f32>,
        b: ArrayView2<'_, f32>,
        c: ArrayViewMut2<'_, f32>,
        accumulate: bool,
    ) {
        let (a, b) = (a.map(|&x| to_bf16(x)), b.t().map(|&x| to_bf16(x)));
        bf16_into(a.view(), b.view(), c, accumulate);
    }

    fn load(tensor: &Tensor) -> Cow<'_, [f32]> {
        match tensor.dtype() {
            DType::BF16 => {
                let elements = tensor.as_slice::<bf16>().par_iter().with_min_len(CHUNK);
                Cow::Owned(elements.map(|x| x.to_f32()).collect())
            }
            _ => Cow::Borrowed(tensor.as_slice::<f32>()),
        }
    }

    fn store(mut elements: Vec<f32>, shape: &[usize], dtype: DType) -> Tensor {
        match dtype {
            DType::BF16 => {
                let rounded = elements.par_iter().with_min_len(CHUNK).map(|&x| to_bf16(x));
                Tensor::from_vec(shape, rounded.collect::<Vec<bf16>>())
            }
            _ => {
                elements.par_chunks_mut(CHUNK).for_each(|chunk| {
                    for x in chunk {
                        *x = if x.is_nan() { f32::from_bits(0x7FFF_FFFF) } else { *x };
                    }
                });
                Tensor::from_vec(shape, elements)
            }
        }
    }
}

/// `x` rounded to BF16, to nearest even; NaN gives 0x7FFF.
pub fn to_bf16(x: f32) -> bf16 {
    if x.is_nan() {
        return bf16::from_bits(0x7FFF);
    }
    let bits = x.to_bits();
    bf16::from_bits(((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16) as u16)
}

/// `a b^T` on the tensor core, from zero or chained from what `d` holds.
pub fn bf16_into(
    a: ArrayView2<'_, bf16>,
    b: ArrayView2<'_, bf16>,
    d: ArrayViewMut2<'_, f32>,
    chain: bool,
) {
    let accumulate = if chain { Accumulate::Chain } else { Accumulate::Overwrite };
    gemm_bf16_into(a, b, d, accumulate, &Accumulator::HOPPER_16BIT).expect("shapes are checked");
}

impl Real for f64 {
    const ZERO: f64 = 0.0;
    const ONE: f64 = 1.0;
    const NEG_INFINITY: f64 = f64::NEG_INFINITY;

    fn from_f64(x: f64) -> f64 {
        x
    }

    fn to_f64(self) -> f64 {
        self
    }

    fn is_nan(self) -> bool {
        f64::is_nan(self)
    }

    fn sqrt(self) -> f64 {
        f64::sqrt(self)
    }

    fn natural_log(self) -> f64 {
        f64::ln(self)
    }

    fn add_lanes(lanes: &mut [f64]) -> f64 {
        reduce::tree_sum(lanes)
    }

    fn exp_slice(xs: &mut [f64]) {
        xs.iter_mut().for_each(|x| *x = x.exp());
    }

    fn sigmoid_slice(xs: &mut [f64]) {
        xs.iter_mut().for_each(|x| *x = 1.0 / (1.0 + (-*x).exp()));
    }

    fn gemm(
        a: ArrayView2<'_, f64>,
        b: ArrayView2<'_, f64>,
        c: ArrayViewMut2<'_, f64>,
        accumulate: bool,
    ) {
        inorder::gemm_f64(a, b, c, accumulate);
    }

    fn gemm_new(a: ArrayView2<'_, f64>, b: ArrayView2<'_, f64>) -> Vec<f64> {
        inorder::gemm_new(a, b)
    }

    fn gemm_bf16(
        a: ArrayView2<'_, f64>,
        b: ArrayView2<'_, f64>,
        c: ArrayViewMut2<'_, f64>,
        accumulate: bool,
    ) {
        // No BF16 tensor is loaded as F64; the plain product keeps the trait total.
        f64::gemm(a, b, c, accumulate);
    }

    fn load(tensor: &Tensor) -> Cow<'_, [f64]> {
        match tensor.dtype() {
            DType::F32 => Cow::Owned(tensor.as_slice::<f32>().iter().map(|&x| x.into()).collect()),
            _ => Cow::Borrowed(tensor.as_slice::<f64>()),
        }
    }

    fn store(elements: Vec<f64>, shape: &[usize], dtype: DType) -> Tensor {
        match dtype {
            DType::F32 => f32::store(elements.iter().map(|&x| x as f32).collect(), shape, dtype),
            _ => Tensor::from_vec(shape, elements),
        }
    }
}

/// The dtype in which an op with this input computes: F64 for F64, else F32.
pub fn compute_dtype(dtype: DType) -> DType {
    if dtype == DType::F64 { DType::F64 } else { DType::F32 }
}

/// Dtypes that activations may have.
pub const FLOATS: &[DType] = &[DType::F32, DType::BF16, DType::F64];

/// Dtypes that an op computes in.
pub const REALS: &[DType] = &[DType::F32, DType::F64];

/// Dtypes that are widened to `compute` on load, and that its results can be rounded to.
fn beside(compute: DType) -> [DType; 2] {
    if compute == DType::F64 { [DType::F64, DType::F32] } else { [DType::F32, DType::BF16] }
}

/// The rule for an input of whatever dtype [`Real::load`] takes where the op computes in `compute`.
///
/// # Errors
/// [`OpError::DType`].
pub fn loaded(tensor: &TensorMeta, compute: DType) -> Result<(), OpError> {
    rules::dtype(tensor, &beside(compute))
}

/// The rule for a parameter `out`: what [`Real::store`] can round results in `compute` to.
///
/// # Errors
/// [`OpError::Params`].
pub fn stored(op: &'static str, out: DType, compute: DType) -> Result<(), OpError> {
    let allowed = beside(compute);
    if allowed.contains(&out) {
        return Ok(());
    }
    let [a, b] = allowed;
    let message = format!("expected {a} or {b}, since the op computes in {compute}, found {out}");
    Err(OpError::Params { op, path: "out".to_owned(), message })
}

/// The rule for a conversion: F32 to any, BF16 to F32, F64 to F32, and back to itself.
///
/// # Errors
/// [`OpError::Params`].
pub fn castable(op: &'static str, from: DType, to: DType) -> Result<(), OpError> {
    let widens = from == DType::F32 && to == DType::F64;
    stored(op, to, if widens { DType::F64 } else { compute_dtype(from) })
}

/// Runs `$body` with `$real` as the type in which an op computes on inputs of `$dtype`.
macro_rules! in_real {
    ($dtype:expr, $real:ident => $body:expr) => {
        match $dtype {
            fathom_trace::DType::F64 => {
                type $real = f64;
                $body
            }
            _ => {
                type $real = f32;
                $body
            }
        }
    };
}
pub(crate) use in_real;

/// Sum by a fixed tree: 16 interleaved chains over the elements, then the halving tree over them.
/// It is `RowTree::new(16, 16)` of `fathom_numerics::reduce`, for terms computed on the way.
pub fn tree_sum<R: Real>(n: usize, term: impl Fn(usize) -> R) -> R {
    let mut lanes = [R::ZERO; 16];
    let whole = n - n % 16;
    for base in (0..whole).step_by(16) {
        for (lane, sum) in lanes.iter_mut().enumerate() {
            *sum += term(base + lane);
        }
    }
    for i in whole..n {
        lanes[i - whole] += term(i);
    }
    R::add_lanes(&mut lanes)
}

/// [`tree_sum`] of a term of the elements of N rows of one length: in blocks whose bounds the
/// compiler sees, so that it vectorises them.
///
/// # Panics
/// Where a row is shorter than the first.
pub fn tree_sum_rows<R: Real, const N: usize>(rows: [&[R]; N], term: impl Fn([R; N]) -> R) -> R {
    let n = rows.first().map_or(0, |row| row.len());
    let mut lanes = [R::ZERO; 16];
    let whole = n - n % 16;
    for base in (0..whole).step_by(16) {
        let blocks = rows.map(|row| <&[R; 16]>::try_from(&row[base..base + 16]).expect("16"));
        for (lane, sum) in lanes.iter_mut().enumerate() {
            *sum += term(blocks.map(|block| block[lane]));
        }
    }
    for i in whole..n {
        lanes[i - whole] += term(rows.map(|row| row[i]));
    }
    R::add_lanes(&mut lanes)
}

#[cfg(test)]
mod tests {
    use fathom_numerics::philox::Philox;
    use fathom_numerics::reduce::RowTree;

    use super::*;

    #[test]
    fn the_tree_is_that_of_sixteen_lanes() {
        let mut row = vec![0.0f32; 100];
        Philox::new(1, 2).normals(0, &mut row);
        for n in [0, 1, 15, 16, 17, 64, 100] {
            let sum = tree_sum(n, |i| row[i]);
            let tree = RowTree::new(16, 16);
            assert_eq!(sum.to_bits(), tree.sum(&row[..n]).to_bits());
            assert_eq!(sum.to_bits(), tree.fold(n, |acc: f32, i| acc + row[i]).to_bits());
            assert_eq!(sum.to_bits(), tree_sum_rows([&row[..n]], |[x]| x).to_bits());
        }
        assert_eq!(tree_sum(20, |_| f32::from_bits(0xFFC0_0001)).to_bits(), 0x7FFF_FFFF);
    }
}
