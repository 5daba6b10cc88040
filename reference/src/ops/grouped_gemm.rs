//! Products of the routed experts: rows in order of expert, `counts[e]` rows for expert e.
//!
//! `nt`: a\[r,k\], b\[e,n,k\] to d\[r,n\]; `nn`: a\[r,k\], b\[e,k,n\] to d\[r,n\]; `tn`: a\[r,m\],
//! b\[r,n\] to d\[e,m,n\], added to `c`, each expert over its own rows. The arithmetic of each
//! group is that of op `gemm`. Rows behind the last expert's (dropped slots) give zeros.

use fathom_trace::{DType, OpClass, TensorMeta};
use half::bf16;
use ndarray::{ArrayView3, ArrayViewMut2, Axis, s};
use rayon::prelude::*;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::attention::spans;
use super::gemm::{Layout, operand_dtypes, store_product};
use crate::Tensor;
use crate::op::compute_type::bf16_into;
use crate::op::compute_type::{Real, compute_dtype, in_real};
use crate::op::example::{Example, shape};
use crate::op::{Op, OpError, Role, input, optional, rules};

/// One product an expert.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct GroupedGemm {
    /// How the operands lie.
    pub layout: Layout,
    /// Element type of `d`.
    pub out: DType,
    /// Rows of each expert.
    pub counts: Vec<usize>,
}

impl GroupedGemm {
    /// Shape of the result.
    fn out_shape(&self, a: &TensorMeta, b: &TensorMeta) -> Result<Vec<usize>, OpError> {
        let experts = self.counts.len();
        rules::rank(a, 2, "[rows, columns]")?;
        let shape = match self.layout {
            Layout::Tn => {
                rules::rank(b, 2, "[rows, n]")?;
                rules::shape(b, &[a.shape[0], b.shape[1]])?;
                vec![experts, a.shape[1], b.shape[1]]
            }
            Layout::Nt | Layout::Nn => {
                rules::rank(b, 3, "[experts, n, k] (nt) or [experts, k, n] (nn)")?;
                let (n, k) = if self.layout == Layout::Nt { (1, 2) } else { (2, 1) };
                let mut expected = [experts, 0, 0];
                (expected[n], expected[k]) = (b.shape[n], a.shape[1]);
                rules::shape(b, &expected)?;
                vec![a.shape[0], b.shape[n]]
            }
        };
        if self.counts.iter().sum::<usize>() > a.shape[0] {
            let expected =
                format!("at least the {} rows of counts", self.counts.iter().sum::<usize>());
            return Err(OpError::Shape { role: "a".into(), expected, found: a.shape.clone() });
        }
        Ok(shape)
    }
}

impl Op for GroupedGemm {
    const NAME: &'static str = "grouped_gemm";
    const INPUTS: &'static [Role] = &[input("a"), input("b"), optional("c")];
    const OUTPUTS: &'static [&'static str] = &["d"];
    const CLASS: OpClass = OpClass::GroupedGemm;

    fn example() -> Example {
        let (rows, experts, n, k) = (6, 3, 4, 20);
        Example::new(GroupedGemm { layout: Layout::Nt, out: DType::BF16, counts: vec![2, 0, 3] })
            .input("a", DType::BF16, shape![rows, k])
            .input("b", DType::BF16, shape![experts, n, k])
            .input("c", DType::F32, shape![rows, n])
            .output("d", shape![rows, n])
    }

    fn infer(&self, inputs: &[Option<TensorMeta>]) -> Result<Vec<TensorMeta>, OpError> {
        let [Some(a), Some(b), c] = inputs else { unreachable!("mandatory") };
        operand_dtypes(a, b, self.out)?;
        let shape = self.out_shape(a, b)?;
        if let Some(c) = c {
            rules::dtype(c, &[compute_dtype(a.dtype)])?;
            rules::shape(c, &shape)?;
        }
        Ok(vec![rules::meta("d", self.out, &shape)])
    }

    fn flops(&self, inputs: &[Option<TensorMeta>]) -> u64 {
        let [Some(a), Some(b), ..] = inputs else { unreachable!("mandatory") };
        let rows: usize = self.counts.iter().sum();
        let n = if self.layout == Layout::Nt { b.shape[1] } else { *b.shape.last().expect("rank") };
        2 * rows as u64 * a.shape[1] as u64 * n as u64
    }

    fn run(&self, inputs: Vec<Option<Tensor>>) -> Result<Vec<Tensor>, OpError> {
        let [a, b, c] = inputs.try_into().expect("three roles");
        let (a, b) = (a.expect("mandatory"), b.expect("mandatory"));
        let shape = self.out_shape(&a.meta("a"), &b.meta("b"))?;
        if a.dtype() == DType::BF16 {
            return Ok(vec![self.run_bf16(&a, &b, c, &shape)?]);
        }
        Ok(in_real!(a.dtype(), R => {
            let accumulate = c.is_some();
            let len = shape.iter().product();
            let mut d = c.map_or_else(|| vec![R::ZERO; len], Tensor::into_vec::<R>);
            self.run_plain::<R>(&a, &b, &mut d, accumulate);
            // Rows and experts that no product touched still have the NaNs of `c`.
            let store = if accumulate { R::store } else { store_product };
            vec![store(d, &shape, self.out)]
        }))
    }
}

impl GroupedGemm {
    fn run_plain<R: Real>(&self, a: &Tensor, b: &Tensor, d: &mut [R], accumulate: bool) {
        let a = a.matrix::<R>();
        if self.layout == Layout::Tn {
            let b = b.matrix::<R>();
            let (m, n) = (a.ncols(), b.ncols());
            let work = d.par_chunks_mut((m * n).max(1)).zip(spans(&self.counts));
            work.for_each(|(d, (start, rows))| {
                let d = ArrayViewMut2::from_shape((m, n), d).expect("dense");
                let (a, b) =
                    (a.slice(s![start..start + rows, ..]), b.slice(s![start..start + rows, ..]));
                if rows > 0 {
                    R::gemm(a.reversed_axes(), b, d, accumulate);
                }
            });
            return;
        }
        let b: ArrayView3<'_, R> = b.view::<R>().into_dimensionality().expect("rank 3");
        let n = if self.layout == Layout::Nt { b.dim().1 } else { b.dim().2 };
        let mut rest = d;
        let mut parts = Vec::with_capacity(self.counts.len());
        for (e, (start, rows)) in spans(&self.counts).into_iter().enumerate() {
            let (own, after) = rest.split_at_mut(rows * n);
            rest = after;
            parts.push((e, start, rows, own));
        }
        parts.into_par_iter().for_each(|(e, start, rows, d)| {
            let d = ArrayViewMut2::from_shape((rows, n), d).expect("dense");
            let (a, b) = (a.slice(s![start..start + rows, ..]), b.index_axis(Axis(0), e));
            let (a, b) = self.layout.orient(a, b);
            if rows > 0 {
                R::gemm(a, b, d, accumulate);
            }
        });
    }

    fn run_bf16(
        &self,
        a: &Tensor,
        b: &Tensor,
        c: Option<Tensor>,
        shape: &[usize],
    ) -> Result<Tensor, OpError> {
        let accumulate = c.is_some();
        let len = shape.iter().product();
        let mut d = c.map_or_else(|| vec![0.0; len], Tensor::into_vec::<f32>);
        let a = a.matrix::<bf16>();
        let spans = spans(&self.counts);
        if self.layout == Layout::Tn {
            let b = b.matrix::<bf16>();
            let (m, n) = (a.ncols(), b.ncols());
            for (d, (start, rows)) in d.chunks_mut((m * n).max(1)).zip(spans) {
                let d = ArrayViewMut2::from_shape((m, n), d).expect("dense");
                let own = s![start..start + rows, ..];
                if rows > 0 {
                    let (a, b) = (a.slice(own), b.slice(own));
                    bf16_into(a.reversed_axes(), b.reversed_axes(), d, accumulate);
                }
            }
            return Ok(f32::store(d, shape, self.out));
        }
        let b: ArrayView3<'_, bf16> = b.view::<bf16>().into_dimensionality().expect("rank 3");
        let mut d2 = ArrayViewMut2::from_shape((shape[0], shape[1]), &mut d).expect("dense");
        for (e, (start, rows)) in spans.into_iter().enumerate() {
            let own = s![start..start + rows, ..];
            let (a, b) = self.layout.orient(a.slice(own), b.index_axis(Axis(0), e));
            if rows > 0 {
                bf16_into(a, b.reversed_axes(), d2.slice_mut(own), accumulate);
            }
        }
        Ok(f32::store(d, shape, self.out))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_that_no_expert_has_gets_the_canonical_nan() {
        let op = GroupedGemm { layout: Layout::Nt, out: DType::F32, counts: vec![1] };
        let a = Tensor::from_vec(&[2, 1], vec![2.0f32, 2.0]);
        let b = Tensor::from_vec(&[1, 1, 1], vec![3.0f32]);
        let c = Tensor::from_vec(&[2, 1], vec![1.0, f32::from_bits(0x7F80_0001)]);
        let d = Op::run(&op, vec![Some(a), Some(b), Some(c)]).unwrap();
        let bits: Vec<u32> = d[0].as_slice::<f32>().iter().map(|x| x.to_bits()).collect();
        assert_eq!(bits, [7.0f32.to_bits(), 0x7FFF_FFFF]);
    }
}
