//! The decoding forms of attention. Multi-head latent attention: projections absorbed, the cache
//! holds the normalised latent and the rotated shared key of each token only. Grouped-query
//! attention (multi-head, multi-query): the cache holds rotated keys and values.
//!
//! - `mla_absorb_query`: `q` \[t, heads * (nope + rope)\] (rotated) and `w` \[heads * (nope + v),
//!   r\] (the
//!   up-projection) to \[t, heads * (r + rope)\]: `q_nope W_key` beside the rotated part.
//! - `attention_latent`: those queries on `cache` \[s, r + rope\]; the t rows are the cache's last
//!   t
//!   tokens, row i sees `s - t + i + 1` of it. Arithmetic and block order of op `attention` (KV
//!   blocks
//!   counted from the cache's start), with one key head and the first r columns as values.
//! - `attention_cached`: queries \[t, heads * qk\] on `cache` \[s, kv_heads * (qk + v)\], every
//!   head's key, then every head's value; else as `attention_latent`.
//! - `mla_absorb_value`: \[t, heads * r\] to \[t, heads * v\] by `W_value`.
//! - `concat_rows`, `slice_rows`: the cache grows and is cut back.
//!
//! The absorbing products are chains of fma over ascending k in F32 (F64), rounded once.
//! Source: arXiv 2405.04434, section 2.1.2 and appendix C.

use fathom_trace::{DType, OpClass, TensorMeta};
use ndarray::{Array2, ArrayView2, s};
use rayon::prelude::*;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::attention::{Heads, cached_head, values};
use super::example::{Example, shape};
use super::real::{FLOATS, Real, compute_dtype, in_real};
use super::{Op, OpError, Role, input, rules};
use crate::Tensor;

/// Absorbs the keys' up-projection into queries.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct MlaAbsorbQuery {
    /// Query heads.
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
    /// Query heads.
    pub heads: usize,
    /// Columns of a head without position.
    pub nope: usize,
    /// Columns of a head's value.
    pub v: usize,
}

/// Attention over the latent cache.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct AttentionLatent {
    /// Query heads.
    pub heads: usize,
    /// Columns of the latent.
    pub rank: usize,
    /// Multiplied onto the dots of queries and cache rows.
    pub scale: f64,
    /// Rows of a KV block.
    pub block_kv: usize,
}

/// Attention over a cache of keys and values.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct AttentionCached {
    /// Heads and their widths.
    pub shape: Heads,
    /// Multiplied onto the dots of queries and keys.
    pub scale: f64,
    /// Rows of a KV block.
    pub block_kv: usize,
}

/// Rows of `a`, then rows of `b`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ConcatRows {}

/// Rows `offset .. offset + rows` of `x`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct SliceRows {
    /// First row.
    pub offset: usize,
    /// How many.
    pub rows: usize,
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

impl Op for AttentionLatent {
    const NAME: &'static str = "attention_latent";
    const INPUTS: &'static [Role] = &[input("q"), input("cache")];
    const OUTPUTS: &'static [&'static str] = &["o"];
    const CLASS: OpClass = OpClass::Decode;

    fn example() -> Example {
        let (t, s, heads, rank, rope) = (2, 5, 2, 4, 2);
        Example::new(AttentionLatent { heads, rank, scale: 0.5, block_kv: 2 })
            .input("q", DType::BF16, shape![t, heads * (rank + rope)])
            .input("cache", DType::BF16, shape![s, rank + rope])
            .output("o", shape![t, heads * rank])
    }

    fn infer(&self, inputs: &[Option<TensorMeta>]) -> Result<Vec<TensorMeta>, OpError> {
        let [Some(q), Some(cache)] = inputs else { unreachable!("mandatory") };
        rules::at_least_one(Self::NAME, "block_kv", self.block_kv)?;
        rules::dtype(q, FLOATS)?;
        rules::rank(q, 2, "[t, heads * (r + rope)]")?;
        rules::dtype(cache, &[q.dtype])?;
        rules::rank(cache, 2, "[s, r + rope]")?;
        rules::shape(q, &[q.shape[0], self.heads * cache.shape[1]])?;
        if cache.shape[0] < q.shape[0] || cache.shape[1] < self.rank {
            let expected = format!("[{} or more, {} or more]", q.shape[0], self.rank);
            let found = cache.shape.clone();
            return Err(OpError::Shape { role: "cache".into(), expected, found });
        }
        Ok(vec![rules::meta("o", q.dtype, &[q.shape[0], self.heads * self.rank])])
    }

    fn flops(&self, inputs: &[Option<TensorMeta>]) -> u64 {
        let [Some(q), Some(cache)] = inputs else { unreachable!("mandatory") };
        let width = (cache.shape[1] + self.rank) as u64;
        2 * (q.shape[0] * self.heads) as u64 * cache.shape[0] as u64 * width
    }

    fn run(&self, inputs: Vec<Option<Tensor>>) -> Result<Vec<Tensor>, OpError> {
        let [Some(q), Some(cache)] = &inputs[..] else { unreachable!("mandatory") };
        let AttentionLatent { heads, rank, scale, block_kv } = *self;
        let (dtype, t, width) = (q.dtype(), q.shape()[0], cache.shape()[1]);
        Ok(in_real!(dtype, R => {
            let (q, cache) = (values::<R>(q), values::<R>(cache));
            let parts: Vec<Array2<R>> = (0..heads)
                .into_par_iter()
                .map(|h| {
                    let q = q.slice(s![.., h * width..(h + 1) * width]);
                    let v = cache.slice(s![.., ..rank]);
                    cached_head((scale, block_kv), dtype, q, cache.view(), v)
                })
                .collect();
            let mut o = Array2::from_elem((t, heads * rank), R::ZERO);
            for (h, part) in parts.into_iter().enumerate() {
                o.slice_mut(s![.., h * rank..(h + 1) * rank]).assign(&part);
            }
            vec![R::store(o.into_raw_vec_and_offset().0, &[t, heads * rank], dtype)]
        }))
    }
}

impl Op for AttentionCached {
    const NAME: &'static str = "attention_cached";
    const INPUTS: &'static [Role] = &[input("q"), input("cache")];
    const OUTPUTS: &'static [&'static str] = &["o"];
    const CLASS: OpClass = OpClass::Decode;

    fn example() -> Example {
        let (t, s, heads, kv_heads, qk, v) = (2, 5, 4, 2, 4, 3);
        let shape = Heads { heads, kv_heads, qk, v };
        Example::new(AttentionCached { shape, scale: 0.5, block_kv: 2 })
            .input("q", DType::BF16, shape![t, heads * qk])
            .input("cache", DType::BF16, shape![s, kv_heads * (qk + v)])
            .output("o", shape![t, heads * v])
    }

    fn infer(&self, inputs: &[Option<TensorMeta>]) -> Result<Vec<TensorMeta>, OpError> {
        let [Some(q), Some(cache)] = inputs else { unreachable!("mandatory") };
        let Heads { heads, kv_heads, qk, v } = self.shape;
        rules::at_least_one(Self::NAME, "block_kv", self.block_kv)?;
        rules::dtype(q, FLOATS)?;
        rules::rank(q, 2, "[t, heads * qk]")?;
        rules::shape(q, &[q.shape[0], heads * qk])?;
        rules::dtype(cache, &[q.dtype])?;
        rules::rank(cache, 2, "[s, kv_heads * (qk + v)]")?;
        rules::shape(cache, &[cache.shape[0], kv_heads * (qk + v)])?;
        if cache.shape[0] < q.shape[0] {
            let expected = format!("[{} or more, columns]", q.shape[0]);
            let found = cache.shape.clone();
            return Err(OpError::Shape { role: "cache".into(), expected, found });
        }
        if kv_heads == 0 || !heads.is_multiple_of(kv_heads) {
            let message = format!("kv_heads {kv_heads} must divide heads {heads}");
            return Err(OpError::Undefined { op: Self::NAME, message });
        }
        Ok(vec![rules::meta("o", q.dtype, &[q.shape[0], heads * v])])
    }

    fn flops(&self, inputs: &[Option<TensorMeta>]) -> u64 {
        let [Some(q), Some(cache)] = inputs else { unreachable!("mandatory") };
        let Heads { heads, qk, v, .. } = self.shape;
        2 * (q.shape[0] * cache.shape[0]) as u64 * (heads * (qk + v)) as u64
    }

    fn run(&self, inputs: Vec<Option<Tensor>>) -> Result<Vec<Tensor>, OpError> {
        let [Some(q), Some(cache)] = &inputs[..] else { unreachable!("mandatory") };
        let Heads { heads, kv_heads, qk, v } = self.shape;
        let (dtype, t, order) = (q.dtype(), q.shape()[0], (self.scale, self.block_kv));
        Ok(in_real!(dtype, R => {
            let (q, cache) = (values::<R>(q), values::<R>(cache));
            let parts: Vec<Array2<R>> = (0..heads)
                .into_par_iter()
                .map(|h| {
                    let kv = h * kv_heads / heads;
                    let first = kv_heads * qk + kv * v;
                    let q = q.slice(s![.., h * qk..(h + 1) * qk]);
                    let k = cache.slice(s![.., kv * qk..(kv + 1) * qk]);
                    cached_head(order, dtype, q, k, cache.slice(s![.., first..first + v]))
                })
                .collect();
            let mut o = Array2::from_elem((t, heads * v), R::ZERO);
            for (h, part) in parts.into_iter().enumerate() {
                o.slice_mut(s![.., h * v..(h + 1) * v]).assign(&part);
            }
            vec![R::store(o.into_raw_vec_and_offset().0, &[t, heads * v], dtype)]
        }))
    }
}

impl Op for ConcatRows {
    const NAME: &'static str = "concat_rows";
    const INPUTS: &'static [Role] = &[input("a"), input("b")];
    const OUTPUTS: &'static [&'static str] = &["y"];
    const CLASS: OpClass = OpClass::Stream;

    fn example() -> Example {
        let (a, b, columns) = (3, 1, 4);
        Example::new(ConcatRows {})
            .input("a", DType::BF16, shape![a, columns])
            .input("b", DType::BF16, shape![b, columns])
            .output("y", shape![a + b, columns])
    }

    fn infer(&self, inputs: &[Option<TensorMeta>]) -> Result<Vec<TensorMeta>, OpError> {
        let [Some(a), Some(b)] = inputs else { unreachable!("mandatory") };
        rules::rank(a, 2, "[rows, columns]")?;
        rules::dtype(b, &[a.dtype])?;
        rules::rank(b, 2, "[rows, columns]")?;
        rules::shape(b, &[b.shape[0], a.shape[1]])?;
        Ok(vec![rules::meta("y", a.dtype, &[a.shape[0] + b.shape[0], a.shape[1]])])
    }

    fn flops(&self, _inputs: &[Option<TensorMeta>]) -> u64 {
        0
    }

    fn run(&self, inputs: Vec<Option<Tensor>>) -> Result<Vec<Tensor>, OpError> {
        let [Some(a), Some(b)] = &inputs[..] else { unreachable!("mandatory") };
        let bytes = [a.bytes(), b.bytes()].concat();
        let shape = [a.shape()[0] + b.shape()[0], a.shape()[1]];
        Ok(vec![Tensor::from_bytes(a.dtype(), &shape, &bytes)])
    }
}

impl Op for SliceRows {
    const NAME: &'static str = "slice_rows";
    const INPUTS: &'static [Role] = &[input("x")];
    const OUTPUTS: &'static [&'static str] = &["y"];
    const CLASS: OpClass = OpClass::Stream;

    fn example() -> Example {
        let (height, rows, columns) = (5, 2, 4);
        Example::new(SliceRows { offset: 1, rows })
            .input("x", DType::BF16, shape![height, columns])
            .output("y", shape![rows, columns])
    }

    fn infer(&self, inputs: &[Option<TensorMeta>]) -> Result<Vec<TensorMeta>, OpError> {
        let [Some(x)] = inputs else { unreachable!("mandatory") };
        rules::rank(x, 2, "[rows, columns]")?;
        if x.shape[0] < self.offset + self.rows {
            let expected = format!("[{} + {} or more, columns]", self.offset, self.rows);
            return Err(OpError::Shape { role: "x".into(), expected, found: x.shape.clone() });
        }
        Ok(vec![rules::meta("y", x.dtype, &[self.rows, x.shape[1]])])
    }

    fn flops(&self, _inputs: &[Option<TensorMeta>]) -> u64 {
        0
    }

    fn run(&self, inputs: Vec<Option<Tensor>>) -> Result<Vec<Tensor>, OpError> {
        let [Some(x)] = &inputs[..] else { unreachable!("mandatory") };
        let row = x.shape()[1] * x.dtype().size();
        let bytes = &x.bytes()[self.offset * row..][..self.rows * row];
        Ok(vec![Tensor::from_bytes(x.dtype(), &[self.rows, x.shape()[1]], bytes)])
    }
}
