//! SwiGLU of a fused gate and up projection, with an optional weight a row, and its gradient.
//!
//! `x` \[r, 2 i\] is gate beside up: `y = (silu(g) u) w`, rounded to `out` once; a routed expert's
//! rows carry their gate value as `w` (the down projection is linear, so the weighted sum over a
//! token's experts becomes a plain sum, and the backward needs no expert output).
//! Backward with `z = sigmoid(g)`, `d = dy w`: `du = d (g z)`,
//! `dg = (d u) (z (1 + g (1 - z)))`, `dw = sum_i dy_i (silu(g_i) u_i)` (fixed tree).
//! Source: arXiv 2002.05202.

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

/// SwiGLU: `silu(gate) * up` of each row, times its weight.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Swiglu {
    /// Element type of `y`.
    pub out: DType,
}

/// Gradient of [`Swiglu`]; `dweight` is empty where there is no weight.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct SwigluBackward {
    /// Element type of `dx`.
    pub out: DType,
}

fn check(x: &TensorMeta, weight: Option<&TensorMeta>) -> Result<[usize; 2], OpError> {
    rules::dtype(x, FLOATS)?;
    rules::rank(x, 2, "[r, 2 i]")?;
    let (r, i) = (x.shape[0], x.shape[1] / 2);
    rules::shape(x, &[r, 2 * i])?;
    if let Some(weight) = weight {
        rules::dtype(weight, &[compute_dtype(x.dtype)])?;
        rules::shape(weight, &[r])?;
    }
    Ok([r, i])
}

impl Op for Swiglu {
    const NAME: &'static str = "swiglu";
    const INPUTS: &'static [Role] = &[input("x"), optional("weight")];
    const OUTPUTS: &'static [&'static str] = &["y"];
    const CLASS: OpClass = OpClass::Convert;

    fn example() -> Example {
        let (r, i) = (3, 4);
        Example::new(Swiglu { out: DType::BF16 })
            .input("x", DType::BF16, shape![r, 2 * i])
            .positive("weight", DType::F32, shape![r])
            .output("y", shape![r, i])
    }

    fn infer(&self, inputs: &[Option<TensorMeta>]) -> Result<Vec<TensorMeta>, OpError> {
        let [Some(x), weight] = inputs else { unreachable!("mandatory") };
        let shape = check(x, weight.as_ref())?;
        stored(Self::NAME, self.out, compute_dtype(x.dtype))?;
        Ok(vec![rules::meta("y", self.out, &shape)])
    }

    fn flops(&self, inputs: &[Option<TensorMeta>]) -> u64 {
        let x = inputs[0].as_ref().expect("mandatory");
        3 * (x.shape[0] * x.shape[1]) as u64
    }

    fn run(&self, inputs: Vec<Option<Tensor>>) -> Result<Vec<Tensor>, OpError> {
        let [Some(x), weight] = &inputs[..] else { unreachable!("mandatory") };
        let (rows, columns) = (x.shape()[0], x.shape()[1] / 2);
        Ok(in_real!(x.dtype(), R => {
            let weight = weight.as_ref().map(|w| R::load(w));
            let xs = R::load(x);
            let mut y = vec![R::ZERO; rows * columns];
            let work = y.par_chunks_mut(columns.max(1)).zip(xs.par_chunks(2 * columns.max(1)));
            work.enumerate().with_min_len(32).for_each(|(row, (y, x))| {
                let (g, u) = x.split_at(columns);
                y.copy_from_slice(g);
                R::sigmoid_slice(y);
                let w = weight.as_ref().map_or(R::ONE, |w| w[row]);
                for ((y, &g), &u) in y.iter_mut().zip(g).zip(u) {
                    *y = ((g * *y) * u) * w;
                }
            });
            vec![R::store(y, &[rows, columns], self.out)]
        }))
    }
}

impl Op for SwigluBackward {
    const NAME: &'static str = "swiglu_backward";
    const INPUTS: &'static [Role] = &[input("dy"), input("x"), optional("weight")];
    const OUTPUTS: &'static [&'static str] = &["dx", "dweight"];
    const CLASS: OpClass = OpClass::Convert;

    fn example() -> Example {
        let (r, i) = (3, 4);
        Example::new(SwigluBackward { out: DType::BF16 })
            .input("dy", DType::BF16, shape![r, i])
            .input("x", DType::BF16, shape![r, 2 * i])
            .positive("weight", DType::F32, shape![r])
            .output("dx", shape![r, 2 * i])
            .output("dweight", shape![r])
    }

    fn infer(&self, inputs: &[Option<TensorMeta>]) -> Result<Vec<TensorMeta>, OpError> {
        let [Some(dy), Some(x), weight] = inputs else { unreachable!("mandatory") };
        let [r, i] = check(x, weight.as_ref())?;
        loaded(dy, compute_dtype(x.dtype))?;
        stored(Self::NAME, self.out, compute_dtype(x.dtype))?;
        rules::shape(dy, &[r, i])?;
        let weights = if weight.is_some() { r } else { 0 };
        Ok(vec![
            rules::meta("dx", self.out, &[r, 2 * i]),
            rules::meta("dweight", compute_dtype(x.dtype), &[weights]),
        ])
    }

    fn flops(&self, inputs: &[Option<TensorMeta>]) -> u64 {
        let x = inputs[1].as_ref().expect("mandatory");
        6 * (x.shape[0] * x.shape[1]) as u64
    }

    fn run(&self, inputs: Vec<Option<Tensor>>) -> Result<Vec<Tensor>, OpError> {
        let [Some(dy), Some(x), weight] = &inputs[..] else { unreachable!("mandatory") };
        let (rows, i) = (x.shape()[0], x.shape()[1] / 2);
        Ok(in_real!(x.dtype(), R => {
            let (dy, xs) = (R::load(dy), R::load(x));
            let weight = weight.as_ref().map(|w| R::load(w));
            let mut dx = vec![R::ZERO; rows * 2 * i];
            let mut dweight = vec![R::ZERO; rows];
            let work = dx.par_chunks_mut(2 * i.max(1)).zip(&mut dweight).enumerate();
            work.with_min_len(32).for_each(|(row, (dx, dweight))| {
                let (g, u) = xs[row * 2 * i..][..2 * i].split_at(i);
                let dy = &dy[row * i..][..i];
                let w = weight.as_ref().map_or(R::ONE, |w| w[row]);
                let (dg, du) = dx.split_at_mut(i);
                dg.copy_from_slice(g);
                R::sigmoid_slice(dg);
                if weight.is_some() {
                    *dweight = tree_sum_rows([dy, g, dg, u], |[dy, g, z, u]| dy * ((g * z) * u));
                }
                for c in 0..i {
                    let (z, d) = (dg[c], dy[c] * w);
                    du[c] = d * (g[c] * z);
                    dg[c] = (d * u[c]) * (z * (R::ONE + g[c] * (R::ONE - z)));
                }
            });
            dweight.truncate(if weight.is_some() { rows } else { 0 });
            let compute = compute_dtype(x.dtype());
            let n = dweight.len();
            vec![R::store(dx, &[rows, 2 * i], self.out), R::store(dweight, &[n], compute)]
        }))
    }
}
