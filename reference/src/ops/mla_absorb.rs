//! `mla_absorb_query`, `mla_absorb_value`: multi-head latent attention for decoding, its
//! projections absorbed, so that the cache holds the normalised latent and the rotated shared key
//! of a token.
//!
//! - `mla_absorb_query`: `q` \[t, heads * (nope + rope)\] (rotated) and `w`
//!   \[heads * (nope + v), r\] (the up-projection) to \[t, heads * (r + rope)\]: `q_nope W_key`
//!   beside the rotated part.
//! - `mla_absorb_value`: \[t, heads * r\] to \[t, heads * v\] by `W_value`.
//!
//! The products are chains of fma over ascending k in F32 (F64), rounded once.
//! Source: arXiv 2405.04434, section 2.1.2 and appendix C.

use fathom_trace::{DType, OpClass, TensorMeta};
use ndarray::{Array2, ArrayView2, s};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::attention::values;
use crate::Tensor;
use crate::op::compute_type::{FLOATS, Real, compute_dtype, in_real};
use crate::op::example::{Example, shape};
use crate::op::{Op, OpError, Role, input, rules};

/// Absorbs the keys' up-projection into queries.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct MlaAbsorbQuery {
    /// Heads of the queries.
    pub heads: usize,
    /// Columns of a head without position.
    pub nope: usize,
    /// Columns of a head with position.
    pub rope: usize,
    /// Columns of a head's value.
    pub v: usize,
}

/// Applies the values' up-projection to the attention over latents.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct MlaAbsorbValue {
    /// Heads of the queries.
    pub heads: usize,
    /// Columns of a head without position.
    pub nope: usize,
    /// Columns of a head's value.
    pub v: usize,
}

/// The rule for `x` and the up-projection; gives t and the latent's width.
fn check(
    x: &TensorMeta,
    w: &TensorMeta,
    heads: usize,
    columns: impl Fn(usize) -> usize,
    rows: usize,
) -> Result<[usize; 2], OpError> {
    rules::dtype(x, FLOATS)?;
    rules::rank(x, 2, "[t, columns]")?;
    rules::dtype(w, &[compute_dtype(x.dtype)])?;
    rules::rank(w, 2, "[heads * (nope + v), r]")?;
    rules::shape(w, &[heads * rows, w.shape[1]])?;
    rules::shape(x, &[x.shape[0], columns(w.shape[1])])?;
    Ok([x.shape[0], w.shape[1]])
}

impl Op for MlaAbsorbQuery {
    const NAME: &'static str = "mla_absorb_query";
    const INPUTS: &'static [Role] = &[input("q"), input("w")];
    const OUTPUTS: &'static [&'static str] = &["y"];
    const CLASS: OpClass = OpClass::Decode;

    fn example() -> Example {
        let (t, r, heads, nope, rope, v) = (3, 5, 2, 4, 2, 3);
        Example::new(MlaAbsorbQuery { heads, nope, rope, v })
            .input("q", DType::BF16, shape![t, heads * (nope + rope)])
            .input("w", DType::F32, shape![heads * (nope + v), r])
            .output("y", shape![t, heads * (r + rope)])
    }

    fn infer(&self, inputs: &[Option<TensorMeta>]) -> Result<Vec<TensorMeta>, OpError> {
        let [Some(q), Some(w)] = inputs else { unreachable!("mandatory") };
        let (heads, nope, rope) = (self.heads, self.nope, self.rope);
        let [t, r] = check(q, w, heads, |_| heads * (nope + rope), nope + self.v)?;
        Ok(vec![rules::meta("y", q.dtype, &[t, heads * (r + rope)])])
    }

    fn flops(&self, inputs: &[Option<TensorMeta>]) -> u64 {
        let [Some(q), Some(w)] = inputs else { unreachable!("mandatory") };
        2 * (q.shape[0] * self.heads * self.nope) as u64 * w.shape[1] as u64
    }

    fn run(&self, inputs: Vec<Option<Tensor>>) -> Result<Vec<Tensor>, OpError> {
        let [Some(q), Some(w)] = &inputs[..] else { unreachable!("mandatory") };
        let MlaAbsorbQuery { heads, nope, rope, v } = *self;
        let (dtype, t, r) = (q.dtype(), q.shape()[0], w.shape()[1]);
        Ok(in_real!(dtype, R => {
            let (q, w) = (values::<R>(q), w.matrix::<R>());
            let mut y = Array2::from_elem((t, heads * (r + rope)), R::ZERO);
            for h in 0..heads {
                let own = q.slice(s![.., h * (nope + rope)..(h + 1) * (nope + rope)]);
                let w = w.slice(s![h * (nope + v)..h * (nope + v) + nope, ..]);
                let first = h * (r + rope);
                let out = y.slice_mut(s![.., first..first + r]);
                R::gemm(own.slice(s![.., ..nope]), w, out, false);
                y.slice_mut(s![.., first + r..first + r + rope]).assign(&own.slice(s![.., nope..]));
            }
            let shape = [t, heads * (r + rope)];
            vec![R::store(y.into_raw_vec_and_offset().0, &shape, dtype)]
        }))
    }
}

impl Op for MlaAbsorbValue {
    const NAME: &'static str = "mla_absorb_value";
    const INPUTS: &'static [Role] = &[input("o"), input("w")];
    const OUTPUTS: &'static [&'static str] = &["y"];
    const CLASS: OpClass = OpClass::Decode;

    fn example() -> Example {
        let (t, r, heads, nope, v) = (3, 5, 2, 4, 3);
        Example::new(MlaAbsorbValue { heads, nope, v })
            .input("o", DType::BF16, shape![t, heads * r])
            .input("w", DType::F32, shape![heads * (nope + v), r])
            .output("y", shape![t, heads * v])
    }

    fn infer(&self, inputs: &[Option<TensorMeta>]) -> Result<Vec<TensorMeta>, OpError> {
        let [Some(o), Some(w)] = inputs else { unreachable!("mandatory") };
        let [t, _] = check(o, w, self.heads, |r| self.heads * r, self.nope + self.v)?;
        Ok(vec![rules::meta("y", o.dtype, &[t, self.heads * self.v])])
    }

    fn flops(&self, inputs: &[Option<TensorMeta>]) -> u64 {
        let o = inputs[0].as_ref().expect("mandatory");
        2 * (o.shape[0] * o.shape[1]) as u64 * self.v as u64
    }

    fn run(&self, inputs: Vec<Option<Tensor>>) -> Result<Vec<Tensor>, OpError> {
        let [Some(o), Some(w)] = &inputs[..] else { unreachable!("mandatory") };
        let MlaAbsorbValue { heads, nope, v } = *self;
        let (dtype, t, r) = (o.dtype(), o.shape()[0], w.shape()[1]);
        Ok(in_real!(dtype, R => {
            let (o, w) = (values::<R>(o), w.matrix::<R>());
            let mut y = Array2::from_elem((t, heads * v), R::ZERO);
            for h in 0..heads {
                let first = h * (nope + v) + nope;
                let w: ArrayView2<'_, R> = w.slice(s![first..first + v, ..]);
                let out = y.slice_mut(s![.., h * v..(h + 1) * v]);
                R::gemm(o.slice(s![.., h * r..(h + 1) * r]), w.reversed_axes(), out, false);
            }
            vec![R::store(y.into_raw_vec_and_offset().0, &[t, heads * v], dtype)]
        }))
    }
}
