//! RMSNorm and its gradients, on columns `offset .. offset + width` of every row of `x`.
//!
//! Forward: `r = 1 / sqrt(sum(x_i^2) / width + eps)` (fixed tree; IEEE sqrt and division),
//! `y_i = (x_i r) w_i`, rounded to `out` once. The root's reciprocal is kept for the backward.
//!
//! Backward, with `h_i = x_i r`, `g_i = dy_i w_i`, `m = sum(g_i h_i) / width`:
//! `dx_i = r (g_i - h_i m)`, added to `residual` where that is given.
//!
//! Weight gradient: `dw_i = dw_i + dy_i h_i`, token after token, so that it does not depend on how
//! sequences are grouped into micro-batches. Source: Zhang and Sennrich, arXiv 1910.07467.

use fathom_trace::{DType, OpClass, TensorMeta};
use rayon::prelude::*;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::Tensor;
use crate::op::compute_type::{
    FLOATS, Real, compute_dtype, in_real, loaded, stored, tree_sum_rows,
};
use crate::op::example::{Example, shape};
use crate::op::{Op, OpError, Role, input, optional, rules};

/// RMSNorm of a range of columns.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct RmsNorm {
    /// Added to the mean square.
    pub eps: f64,
    /// First column of `x` that takes part.
    pub offset: usize,
    /// How many columns take part.
    pub width: usize,
    /// Element type of `y`.
    pub out: DType,
}

/// Gradient of [`RmsNorm`] for its input.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct RmsNormBackward {
    /// First column of `x` that takes part.
    pub offset: usize,
    /// How many columns take part.
    pub width: usize,
    /// Element type of `dx`.
    pub out: DType,
}

/// Gradient of [`RmsNorm`] for its weight, added to what was there.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct RmsNormWgrad {
    /// First column of `x` that takes part.
    pub offset: usize,
    /// How many columns take part.
    pub width: usize,
}

fn columns(
    op: &'static str,
    x: &TensorMeta,
    offset: usize,
    width: usize,
) -> Result<usize, OpError> {
    rules::at_least_one(op, "width", width)?;
    rules::dtype(x, FLOATS)?;
    rules::rank(x, 2, "[t, columns]")?;
    if x.shape[1] < offset + width {
        return Err(OpError::Shape {
            role: x.role.clone(),
            expected: format!("[t, columns] with columns >= {offset} + {width}"),
            found: x.shape.clone(),
        });
    }
    Ok(x.shape[0])
}

impl Op for RmsNorm {
    const NAME: &'static str = "rms_norm";
    const INPUTS: &'static [Role] = &[input("x"), input("weight")];
    const OUTPUTS: &'static [&'static str] = &["y", "rstd"];
    const CLASS: OpClass = OpClass::Row;

    fn example() -> Example {
        let (t, columns, width) = (3, 6, 4);
        Example::new(RmsNorm { eps: 1e-6, offset: 1, width, out: DType::BF16 })
            .input("x", DType::BF16, shape![t, columns])
            .input("weight", DType::F32, shape![width])
            .output("y", shape![t, width])
            .output("rstd", shape![t])
    }

    fn infer(&self, inputs: &[Option<TensorMeta>]) -> Result<Vec<TensorMeta>, OpError> {
        let [Some(x), Some(weight)] = inputs else { unreachable!("mandatory") };
        let t = columns(Self::NAME, x, self.offset, self.width)?;
        let compute = compute_dtype(x.dtype);
        rules::dtype(weight, &[compute])?;
        rules::shape(weight, &[self.width])?;
        stored(Self::NAME, self.out, compute)?;
        Ok(vec![rules::meta("y", self.out, &[t, self.width]), rules::meta("rstd", compute, &[t])])
    }

    fn flops(&self, inputs: &[Option<TensorMeta>]) -> u64 {
        let x = inputs[0].as_ref().expect("mandatory");
        4 * (x.shape[0] * self.width) as u64
    }

    fn run(&self, inputs: Vec<Option<Tensor>>) -> Result<Vec<Tensor>, OpError> {
        let [Some(x), Some(weight)] = &inputs[..] else { unreachable!("mandatory") };
        let (t, w) = (x.shape()[0], self.width);
        Ok(in_real!(x.dtype(), R => {
            let (xs, weight) = (R::load(x), R::load(weight));
            let mut y = vec![R::ZERO; t * w];
            let mut rstd = vec![R::ZERO; t];
            let rows = xs.par_chunks(x.shape()[1]).with_min_len(64);
            rows.zip(y.par_chunks_mut(w)).zip(&mut rstd).for_each(|((x, y), rstd)| {
                let x = &x[self.offset..self.offset + w];
                let mean = tree_sum_rows([x], |[x]| x * x) / R::from_f64(w as f64);
                *rstd = R::ONE / (mean + R::from_f64(self.eps)).sqrt();
                for ((y, &x), &weight) in y.iter_mut().zip(x).zip(&*weight) {
                    *y = (x * *rstd) * weight;
                }
            });
            let compute = compute_dtype(x.dtype());
            vec![R::store(y, &[t, w], self.out), R::store(rstd, &[t], compute)]
        }))
    }
}

impl Op for RmsNormBackward {
    const NAME: &'static str = "rms_norm_backward";
    const INPUTS: &'static [Role] =
        &[input("dy"), input("x"), input("weight"), input("rstd"), optional("residual")];
    const OUTPUTS: &'static [&'static str] = &["dx"];
    const CLASS: OpClass = OpClass::Row;

    fn example() -> Example {
        let (t, columns, width) = (3, 6, 4);
        Example::new(RmsNormBackward { offset: 1, width, out: DType::BF16 })
            .input("dy", DType::BF16, shape![t, width])
            .input("x", DType::BF16, shape![t, columns])
            .input("weight", DType::F32, shape![width])
            .positive("rstd", DType::F32, shape![t])
            .input("residual", DType::BF16, shape![t, width])
            .output("dx", shape![t, width])
    }

    fn infer(&self, inputs: &[Option<TensorMeta>]) -> Result<Vec<TensorMeta>, OpError> {
        let [Some(dy), Some(x), Some(weight), Some(rstd), residual] = inputs else {
            unreachable!("mandatory")
        };
        let t = columns(Self::NAME, x, self.offset, self.width)?;
        let compute = compute_dtype(x.dtype);
        loaded(dy, compute)?;
        rules::shape(dy, &[t, self.width])?;
        rules::dtype(weight, &[compute])?;
        rules::shape(weight, &[self.width])?;
        rules::dtype(rstd, &[compute])?;
        rules::shape(rstd, &[t])?;
        if let Some(residual) = residual {
            loaded(residual, compute)?;
            rules::shape(residual, &[t, self.width])?;
        }
        stored(Self::NAME, self.out, compute)?;
        Ok(vec![rules::meta("dx", self.out, &[t, self.width])])
    }

    fn flops(&self, inputs: &[Option<TensorMeta>]) -> u64 {
        let x = inputs[1].as_ref().expect("mandatory");
        8 * (x.shape[0] * self.width) as u64
    }

    fn run(&self, inputs: Vec<Option<Tensor>>) -> Result<Vec<Tensor>, OpError> {
        let [Some(dy), Some(x), Some(weight), Some(rstd), residual] = &inputs[..] else {
            unreachable!("mandatory")
        };
        let (t, w, wide) = (x.shape()[0], self.width, x.shape()[1]);
        Ok(in_real!(x.dtype(), R => {
            let (dy, x, weight, rstd) = (R::load(dy), R::load(x), R::load(weight), R::load(rstd));
            let residual = residual.as_ref().map(|r| R::load(r));
            let mut dx = vec![R::ZERO; t * w];
            dx.par_chunks_mut(w).enumerate().with_min_len(64).for_each(|(row, dx)| {
                let dy = &dy[row * w..][..w];
                let x = &x[row * wide + self.offset..][..w];
                let r = rstd[row];
                let (dx, weight) = (&mut dx[..w], &weight[..w]);
                let dot =
                    tree_sum_rows([dy, weight, x], |[dy, weight, x]| (dy * weight) * (x * r));
                let mean = dot / R::from_f64(w as f64);
                for i in 0..w {
                    dx[i] = r * (dy[i] * weight[i] - (x[i] * r) * mean);
                }
                if let Some(residual) = &residual {
                    let residual = &residual[row * w..][..w];
                    dx.iter_mut().zip(residual).for_each(|(d, &r)| *d += r);
                }
            });
            vec![R::store(dx, &[t, w], self.out)]
        }))
    }
}

impl Op for RmsNormWgrad {
    const NAME: &'static str = "rms_norm_wgrad";
    const INPUTS: &'static [Role] = &[input("dy"), input("x"), input("rstd"), input("acc")];
    const OUTPUTS: &'static [&'static str] = &["dw"];
    const CLASS: OpClass = OpClass::Row;

    fn example() -> Example {
        let (t, columns, width) = (3, 6, 4);
        Example::new(RmsNormWgrad { offset: 1, width })
            .input("dy", DType::BF16, shape![t, width])
            .input("x", DType::BF16, shape![t, columns])
            .positive("rstd", DType::F32, shape![t])
            .input("acc", DType::F32, shape![width])
            .output("dw", shape![width])
    }

    fn infer(&self, inputs: &[Option<TensorMeta>]) -> Result<Vec<TensorMeta>, OpError> {
        let [Some(dy), Some(x), Some(rstd), Some(acc)] = inputs else { unreachable!("mandatory") };
        let t = columns(Self::NAME, x, self.offset, self.width)?;
        let compute = compute_dtype(x.dtype);
        loaded(dy, compute)?;
        rules::shape(dy, &[t, self.width])?;
        rules::dtype(rstd, &[compute])?;
        rules::shape(rstd, &[t])?;
        rules::dtype(acc, &[compute])?;
        rules::shape(acc, &[self.width])?;
        Ok(vec![rules::meta("dw", compute, &[self.width])])
    }

    fn flops(&self, inputs: &[Option<TensorMeta>]) -> u64 {
        let x = inputs[1].as_ref().expect("mandatory");
        3 * (x.shape[0] * self.width) as u64
    }

    fn run(&self, inputs: Vec<Option<Tensor>>) -> Result<Vec<Tensor>, OpError> {
        let [Some(dy), Some(x), Some(rstd), Some(acc)] = &inputs[..] else {
            unreachable!("mandatory")
        };
        let (w, wide) = (self.width, x.shape()[1]);
        let compute = compute_dtype(x.dtype());
        Ok(in_real!(x.dtype(), R => {
            let (dy, x, rstd) = (R::load(dy), R::load(x), R::load(rstd));
            let mut dw = R::load(acc).into_owned();
            for (row, &r) in rstd.iter().enumerate() {
                let x = &x[row * wide + self.offset..][..w];
                for ((dw, &dy), &x) in dw.iter_mut().zip(&dy[row * w..]).zip(x) {
                    *dw += dy * (x * r);
                }
            }
            vec![R::store(dw, &[w], compute)]
        }))
    }
}
