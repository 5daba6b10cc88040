//! Matrix products of the model outside FP8: plain F32 or F64, or BF16 on tensor cores.
//!
//! - F32, F64: every element is one chain of fma over ascending k, from zero or from `c`.
//! - BF16 (out F32 or BF16): the tensor-core model of `fathom-numerics` (Hopper wgmma, K = 16 a
//!   group), chained over ascending k from zero or from `c`; the result is rounded to `out` once.
//!
//! `layout` names how A and B lie: `nt` a\[m,k\] b\[n,k\] (fprop), `nn` a\[m,k\] b\[k,n\] (dgrad),
//! `tn` a\[k,m\] b\[k,n\] (wgrad). With `tn`, `segments` splits k: each segment starts a new group
//! of the tensor core, so that the bits do not depend on which sequences share a micro-batch.

use fathom_trace::{DType, OpClass, TensorMeta};
use half::bf16;
use ndarray::{ArrayView2, ArrayViewMut2, s};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::Tensor;
use crate::op::compute_type::{FLOATS, Real, bf16_into, compute_dtype, in_real};
use crate::op::example::{Example, shape};
use crate::op::{Op, OpError, Role, input, optional, rules};

/// How the operands lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Layout {
    /// a\[m, k\], b\[n, k\]: the forward of a Linear.
    Nt,
    /// a\[m, k\], b\[k, n\]: its gradient for the input.
    Nn,
    /// a\[k, m\], b\[k, n\]: its gradient for the weight.
    Tn,
}

/// Sizes of a matrix product.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GemmShape {
    /// Rows of the result.
    pub m: usize,
    /// Columns of the result.
    pub n: usize,
    /// Length of the sums.
    pub k: usize,
}

impl Layout {
    /// The sizes for operands of these two-dimensional shapes; `None` where their k differ.
    pub fn shape(self, a: &[usize], b: &[usize]) -> Option<GemmShape> {
        let (m, k) = if self == Layout::Tn { (a[1], a[0]) } else { (a[0], a[1]) };
        let (n, kb) = if self == Layout::Nt { (b[0], b[1]) } else { (b[1], b[0]) };
        (k == kb).then_some(GemmShape { m, n, k })
    }

    /// The operands as \[m, k\] and \[k, n\].
    pub fn orient<'a, T>(
        self,
        a: ArrayView2<'a, T>,
        b: ArrayView2<'a, T>,
    ) -> (ArrayView2<'a, T>, ArrayView2<'a, T>) {
        match self {
            Layout::Nt => (a, b.reversed_axes()),
            Layout::Nn => (a, b),
            Layout::Tn => (a.reversed_axes(), b),
        }
    }
}

/// `d = a b (+ c)`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Gemm {
    /// How the operands lie.
    pub layout: Layout,
    /// Element type of `d`.
    pub out: DType,
    /// Lengths that split k, their sum; empty where k is one segment. Only with `tn`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub segments: Vec<usize>,
}

/// The rule for `a`, `b` and `out` that plain and grouped products share.
pub(super) fn operand_dtypes(a: &TensorMeta, b: &TensorMeta, out: DType) -> Result<(), OpError> {
    rules::dtype(a, FLOATS)?;
    rules::dtype(b, &[a.dtype])?;
    let allowed: &[DType] = match a.dtype {
        DType::BF16 => &[DType::F32, DType::BF16],
        DType::F64 => &[DType::F64],
        _ => &[DType::F32],
    };
    rules::dtype(&rules::meta("out", out, &[]), allowed)
}

impl Op for Gemm {
    const NAME: &'static str = "gemm";
    const INPUTS: &'static [Role] = &[input("a"), input("b"), optional("c")];
    const OUTPUTS: &'static [&'static str] = &["d"];
    const CLASS: OpClass = OpClass::Gemm;

    fn example() -> Example {
        let (m, n, k) = (3, 4, 20);
        Example::new(Gemm { layout: Layout::Nt, out: DType::BF16, segments: Vec::new() })
            .input("a", DType::BF16, shape![m, k])
            .input("b", DType::BF16, shape![n, k])
            .input("c", DType::F32, shape![m, n])
            .output("d", shape![m, n])
    }

    fn infer(&self, inputs: &[Option<TensorMeta>]) -> Result<Vec<TensorMeta>, OpError> {
        let [Some(a), Some(b), c] = inputs else { unreachable!("mandatory") };
        operand_dtypes(a, b, self.out)?;
        rules::rank(a, 2, "[m, k] (nt, nn) or [k, m] (tn)")?;
        rules::rank(b, 2, "[n, k] (nt) or [k, n] (nn, tn)")?;
        let Some(shape) = self.layout.shape(&a.shape, &b.shape) else {
            let expected = format!("k as in a{:?}, layout {:?}", a.shape, self.layout);
            return Err(OpError::Shape { role: "b".into(), expected, found: b.shape.clone() });
        };
        if let Some(c) = c {
            rules::dtype(c, &[compute_dtype(a.dtype)])?;
            rules::shape(c, &[shape.m, shape.n])?;
        }
        let split: usize = self.segments.iter().sum();
        if !self.segments.is_empty() && (split != shape.k || self.layout != Layout::Tn) {
            let message = format!(
                "segments {:?} must add up to k = {} and need layout tn",
                self.segments, shape.k
            );
            return Err(OpError::Undefined { op: Self::NAME, message });
        }
        Ok(vec![rules::meta("d", self.out, &[shape.m, shape.n])])
    }

    fn flops(&self, inputs: &[Option<TensorMeta>]) -> u64 {
        let [Some(a), Some(b), ..] = inputs else { unreachable!("mandatory") };
        let GemmShape { m, n, k } = self.layout.shape(&a.shape, &b.shape).expect("inferred");
        2 * (m * n) as u64 * k as u64
    }

    fn run(&self, inputs: Vec<Option<Tensor>>) -> Result<Vec<Tensor>, OpError> {
        let [a, b, c] = inputs.try_into().expect("three roles");
        let (a, b) = (a.expect("mandatory"), b.expect("mandatory"));
        let shape = self.layout.shape(a.shape(), b.shape()).expect("inferred");
        if a.dtype() == DType::BF16 {
            return Ok(vec![self.run_bf16(&a, &b, c, shape)?]);
        }
        Ok(vec![in_real!(a.dtype(), R => {
            let (a, b) = self.layout.orient(a.matrix::<R>(), b.matrix::<R>());
            let d = match c {
                None => R::gemm_new(a, b),
                Some(c) => {
                    let mut d = c.into_vec::<R>();
                    let out = ArrayViewMut2::from_shape((shape.m, shape.n), &mut d).expect("dense");
                    R::gemm(a, b, out, true);
                    d
                }
            };
            store_product(d, &[shape.m, shape.n], self.out)
        })])
    }
}

impl Gemm {
    /// The tensor core's product, chained from `c`, segment after segment of k.
    fn run_bf16(
        &self,
        a: &Tensor,
        b: &Tensor,
        c: Option<Tensor>,
        shape: GemmShape,
    ) -> Result<Tensor, OpError> {
        let (a, b) = self.layout.orient(a.matrix::<bf16>(), b.matrix::<bf16>());
        let accumulate = c.is_some();
        let mut d = c.map_or_else(|| vec![0.0; shape.m * shape.n], Tensor::into_vec::<f32>);
        let mut out = ArrayViewMut2::from_shape((shape.m, shape.n), &mut d).expect("dense");
        let whole = [shape.k];
        let segments = if self.segments.is_empty() { &whole[..] } else { &self.segments };
        let mut start = 0;
        for &length in segments {
            let (a, b) =
                (a.slice(s![.., start..start + length]), b.slice(s![start..start + length, ..]));
            let chain = accumulate || start > 0;
            bf16_into(a, b.reversed_axes(), out.view_mut(), chain);
            start += length;
        }
        Ok(f32::store(d, &[shape.m, shape.n], self.out))
    }
}

/// A plain product as a tensor: its NaNs are canonical already, so that only a rounding is left.
pub(super) fn store_product<R: Real>(d: Vec<R>, shape: &[usize], out: DType) -> Tensor {
    if out == R::DTYPE { Tensor::from_vec(shape, d) } else { R::store(d, shape, out) }
}
