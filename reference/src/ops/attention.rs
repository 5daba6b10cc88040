//! Causal attention over segments, block by block with an online softmax, and its gradient.
//!
//! `q` \[t, heads * qk\], `k` \[t, kv_heads * qk\], `v` \[t, kv_heads * v\]; the rows of a segment
//! see themselves and earlier rows of it. With `keys` a segment has more key rows than queries,
//! which are then the last (a part of a sequence whose earlier rows are keys only). Query head `h`
//! reads key head `h kv_heads / heads`.
//!
//! Plain arithmetic (F32, F64), for each query row, over KV blocks of `block_kv` rows counted from
//! the segment's start, ascending:
//!
//! 1. `s_j = scale * dot(q, k_j)`, the dot a chain of fma over ascending columns; masked: -inf.
//! 2. `m' = max(m, max_j s_j)`, `p_j = exp(s_j - m')`, `a = exp(m - m')` (0 in the first block).
//! 3. `l = l a + sum_j p_j` (fixed tree over the block), `o = o a`, then `o_c` continues as a chain
//!    of fma `p_j v_jc` over ascending j.
//!
//! At the end `o = o / l` and `lse = m + ln(l)`.
//!
//! BF16 operands: the same steps and the same order, with every product on the tensor core (Hopper
//! wgmma, BF16, K = 16 a group): queries times keys from zero; P rounded to BF16 (its sum `l` takes
//! the unrounded F32), then chained onto the rescaled `o`, groups of 16 rows from the KV block's
//! start, rows behind a query's own being zeros. Everything else is F32; `o` is rounded to BF16 at
//! the end. In the gradient P and ds are rounded to BF16 as operands; dq, dk and dv are chained in
//! F32 (blocks of 64 query rows, ascending) and rounded to BF16 at the end.
//!
//! Gradient: `p_ij = exp(s_ij - lse_i)`, `delta_i = sum_c do_ic o_ic` (fixed tree),
//! `dp = do v^T`, `ds = p (dp - delta) scale`, `dv = p^T do`, `dq = ds k`, `dk = ds^T q`; every
//! sum a chain over ascending rows (heads of one KV head one after the other).
//! Sources: arXiv 1706.03762; 2205.14135, algorithms 1 and 4; 2307.08691.

use std::borrow::Cow;

use fathom_trace::{DType, OpClass, TensorMeta};
use ndarray::{Array2, ArrayView2, ArrayViewMut2, CowArray, Ix2, s};
use rayon::prelude::*;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::Tensor;
use crate::op::compute_type::{
    FLOATS, Real, compute_dtype, in_real, maximum, tree_sum, tree_sum_rows,
};
use crate::op::example::{Example, shape};
use crate::op::{Op, OpError, Role, input, rules};

/// Sizes of an attention.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Heads {
    /// Heads of the queries.
    pub heads: usize,
    /// Key and value heads; divides `heads`.
    pub kv_heads: usize,
    /// Columns of a query or key head.
    pub qk: usize,
    /// Columns of a value head.
    pub v: usize,
}

/// Causal attention: a row sees its segment up to itself.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Attention {
    /// Heads and their widths.
    pub shape: Heads,
    /// Multiplied onto the dots of queries and keys.
    pub scale: f64,
    /// Lengths of the segments; their sum is t.
    pub segments: Vec<usize>,
    /// Key rows of each segment, whose last ones its queries are; empty: as many as queries.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub keys: Vec<usize>,
    /// Rows of a KV block.
    pub block_kv: usize,
}

/// Gradient of [`Attention`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct AttentionBackward {
    /// Heads and their widths.
    pub shape: Heads,
    /// Multiplied onto the dots of queries and keys.
    pub scale: f64,
    /// Lengths of the segments; their sum is t.
    pub segments: Vec<usize>,
    /// Key rows of each segment, whose last ones its queries are; empty: as many as queries.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub keys: Vec<usize>,
    /// Rows of a KV block.
    pub block_kv: usize,
}

impl Heads {
    fn check(
        self,
        op: &'static str,
        [q, k, v]: [&TensorMeta; 3],
        (segments, keys): (&[usize], &[usize]),
        block_kv: usize,
    ) -> Result<usize, OpError> {
        rules::at_least_one(op, "block_kv", block_kv)?;
        rules::at_least_one(op, "shape.kv_heads", self.kv_heads)?;
        rules::dtype(q, FLOATS)?;
        rules::rank(q, 2, "[t, heads * qk]")?;
        let t = q.shape[0];
        rules::shape(q, &[t, self.heads * self.qk])?;
        let rows = key_rows(segments, keys);
        let total = rows.iter().sum();
        rules::dtype(k, &[q.dtype])?;
        rules::shape(k, &[total, self.kv_heads * self.qk])?;
        rules::dtype(v, &[q.dtype])?;
        rules::shape(v, &[total, self.kv_heads * self.v])?;
        if rows.len() != segments.len() || rows.iter().zip(segments).any(|(k, q)| k < q) {
            let message = format!("keys {keys:?} must be at least the segments {segments:?}");
            return Err(OpError::Undefined { op, message });
        }
        if segments.iter().sum::<usize>() != t || !self.heads.is_multiple_of(self.kv_heads) {
            let message = format!(
                "segments {segments:?} must add up to t = {t}, kv_heads {} divide heads {}",
                self.kv_heads, self.heads
            );
            return Err(OpError::Undefined { op, message });
        }
        Ok(t)
    }
}

/// Key rows of each segment.
fn key_rows<'a>(segments: &'a [usize], keys: &'a [usize]) -> &'a [usize] {
    if keys.is_empty() { segments } else { keys }
}

/// Pairs of query and key that the causal mask lets through.
fn pairs(segments: &[usize], keys: &[usize]) -> u64 {
    let of = |(&q, &k): (&usize, &usize)| q as u64 * (2 * (k - q) as u64 + q as u64 + 1) / 2;
    segments.iter().zip(key_rows(segments, keys)).map(of).sum()
}

/// First row and length of each segment's queries, and of its keys.
fn both_spans(segments: &[usize], keys: &[usize]) -> Vec<[(usize, usize); 2]> {
    let keys = spans(key_rows(segments, keys));
    spans(segments).into_iter().zip(keys).map(|(q, k)| [q, k]).collect()
}

/// First row of each segment with its length.
pub(super) fn spans(segments: &[usize]) -> Vec<(usize, usize)> {
    let starts = segments.iter().scan(0, |start, &length| {
        *start += length;
        Some((*start - length, length))
    });
    starts.collect()
}

impl Op for Attention {
    const NAME: &'static str = "attention";
    const INPUTS: &'static [Role] = &[input("q"), input("k"), input("v")];
    const OUTPUTS: &'static [&'static str] = &["o", "lse"];
    const CLASS: OpClass = OpClass::Attention;

    fn example() -> Example {
        let (t, s, heads, kv_heads, qk, v) = (4, 5, 4, 2, 4, 3);
        let shape = Heads { heads, kv_heads, qk, v };
        let (segments, keys) = (vec![2, 2], vec![3, 2]);
        Example::new(Attention { shape, scale: 0.5, segments, keys, block_kv: 2 })
            .input("q", DType::BF16, shape![t, heads * qk])
            .input("k", DType::BF16, shape![s, kv_heads * qk])
            .input("v", DType::BF16, shape![s, kv_heads * v])
            .output("o", shape![t, heads * v])
            .output("lse", shape![t, heads])
    }

    fn infer(&self, inputs: &[Option<TensorMeta>]) -> Result<Vec<TensorMeta>, OpError> {
        let [Some(q), Some(k), Some(v)] = inputs else { unreachable!("mandatory") };
        let t =
            self.shape.check(Self::NAME, [q, k, v], (&self.segments, &self.keys), self.block_kv)?;
        Ok(vec![
            rules::meta("o", q.dtype, &[t, self.shape.heads * self.shape.v]),
            rules::meta("lse", compute_dtype(q.dtype), &[t, self.shape.heads]),
        ])
    }

    fn flops(&self, _inputs: &[Option<TensorMeta>]) -> u64 {
        let Heads { heads, qk, v, .. } = self.shape;
        2 * pairs(&self.segments, &self.keys) * (heads * (qk + v)) as u64
    }

    fn run(&self, inputs: Vec<Option<Tensor>>) -> Result<Vec<Tensor>, OpError> {
        let [Some(q), Some(k), Some(v)] = &inputs[..] else { unreachable!("mandatory") };
        let Heads { heads, kv_heads, qk, v: v_dim } = self.shape;
        let (t, dtype) = (q.shape()[0], q.dtype());
        let low = dtype == DType::BF16;
        Ok(in_real!(dtype, R => {
            let [q, k, v] = [q, k, v].map(|x| values::<R>(x));
            let (q, k, v) = (q.view(), k.view(), v.view());
            let tasks: Vec<_> = both_spans(&self.segments, &self.keys)
                .into_iter()
                .flat_map(|span| (0..heads).map(move |h| (span, h)))
                .collect();
            let parts: Vec<(Array2<R>, Vec<R>)> = tasks
                .par_iter()
                .map(|&([(start, length), (first, keys)], h)| {
                    let kv = h * kv_heads / heads;
                    let q = q.slice(s![start..start + length, h * qk..(h + 1) * qk]);
                    let k = k.slice(s![first..first + keys, kv * qk..(kv + 1) * qk]);
                    let v = v.slice(s![first..first + keys, kv * v_dim..(kv + 1) * v_dim]);
                    self.head(low, q, k, v)
                })
                .collect();
            let mut o = Array2::from_elem((t, heads * v_dim), R::ZERO);
            let mut lse = vec![R::ZERO; t * heads];
            for (&([(start, length), _], h), (part, sums)) in tasks.iter().zip(parts) {
                o.slice_mut(s![start..start + length, h * v_dim..(h + 1) * v_dim]).assign(&part);
                for (row, sum) in sums.into_iter().enumerate() {
                    lse[(start + row) * heads + h] = sum;
                }
            }
            let o = o.into_raw_vec_and_offset().0;
            vec![R::store(o, &[t, heads * v_dim], dtype), R::store(lse, &[t, heads], compute_dtype(dtype))]
        }))
    }
}

/// A tensor as a matrix of the op's compute type.
pub(super) fn values<R: Real>(x: &Tensor) -> CowArray<'_, R, Ix2> {
    let shape = x.rows_columns();
    match R::load(x) {
        Cow::Borrowed(x) => ArrayView2::from_shape(shape, x).expect("dense").into(),
        Cow::Owned(x) => Array2::from_shape_vec(shape, x).expect("dense").into(),
    }
}

/// A product in the op's arithmetic: plain, or (`low`) on the BF16 tensor core.
fn multiply<R: Real>(
    low: bool,
    a: ArrayView2<'_, R>,
    b: ArrayView2<'_, R>,
    c: ArrayViewMut2<'_, R>,
    accumulate: bool,
) {
    if low { R::gemm_bf16(a, b, c, accumulate) } else { R::gemm(a, b, c, accumulate) }
}

/// Query rows that are worked on together; changes no bit.
const BLOCK_Q: usize = 64;

impl Attention {
    /// One head of one segment: the output and the logarithm of each row's sum.
    fn head<R: Real>(
        &self,
        low: bool,
        q: ArrayView2<'_, R>,
        k: ArrayView2<'_, R>,
        v: ArrayView2<'_, R>,
    ) -> (Array2<R>, Vec<R>) {
        let (t, scale) = (q.nrows(), R::from_f64(self.scale));
        // Queries are the last rows; in the training form, all of them.
        let base = k.nrows() - t;
        let mut o = Array2::from_elem((t, v.ncols()), R::ZERO);
        let mut lse = vec![R::ZERO; t];
        for first in (0..t).step_by(BLOCK_Q) {
            let last = (first + BLOCK_Q).min(t);
            let mut m = vec![R::NEG_INFINITY; last - first];
            let mut l = vec![R::ZERO; last - first];
            for kv in (0..base + last).step_by(self.block_kv) {
                let kv_end = (kv + self.block_kv).min(base + last);
                let mut p = Array2::from_elem((last - first, kv_end - kv), R::ZERO);
                let keys = k.slice(s![kv..kv_end, ..]);
                multiply(low, q.slice(s![first..last, ..]), keys.t(), p.view_mut(), false);
                for (i, mut p) in p.rows_mut().into_iter().enumerate() {
                    let p = p.as_slice_mut().expect("standard layout");
                    let seen = (base + first + i + 1).saturating_sub(kv).min(p.len());
                    let (p, masked) = p.split_at_mut(seen);
                    masked.fill(R::ZERO);
                    if seen == 0 {
                        continue;
                    }
                    p.iter_mut().for_each(|s| *s *= scale);
                    let top = p.iter().fold(m[i], |m, &s| maximum(m, s));
                    p.iter_mut().for_each(|s| *s -= top);
                    R::exp_slice(p);
                    let mut alpha = [m[i] - top];
                    R::exp_slice(&mut alpha);
                    l[i] = l[i] * alpha[0] + tree_sum_rows([&*p], |[p]| p);
                    m[i] = top;
                    o.row_mut(first + i).iter_mut().for_each(|o| *o *= alpha[0]);
                }
                let values = v.slice(s![kv..kv_end, ..]);
                multiply(low, p.view(), values, o.slice_mut(s![first..last, ..]), true);
            }
            for i in 0..last - first {
                o.row_mut(first + i).iter_mut().for_each(|o| *o = *o / l[i]);
                lse[first + i] = m[i] + l[i].natural_log();
            }
        }
        (o, lse)
    }
}

/// One head of the decoding forms: queries are the last rows of the keys and values.
pub(super) fn cached_head<R: Real>(
    (scale, block_kv): (f64, usize),
    dtype: DType,
    q: ArrayView2<'_, R>,
    k: ArrayView2<'_, R>,
    v: ArrayView2<'_, R>,
) -> Array2<R> {
    let shape = Heads { heads: 1, kv_heads: 1, qk: k.ncols(), v: v.ncols() };
    let op = Attention { shape, scale, segments: Vec::new(), keys: Vec::new(), block_kv };
    op.head(dtype == DType::BF16, q, k, v).0
}

impl Op for AttentionBackward {
    const NAME: &'static str = "attention_backward";
    const INPUTS: &'static [Role] =
        &[input("q"), input("k"), input("v"), input("o"), input("lse"), input("do")];
    const OUTPUTS: &'static [&'static str] = &["dq", "dk", "dv"];
    const CLASS: OpClass = OpClass::AttentionBackward;

    fn example() -> Example {
        let (t, s, heads, kv_heads, qk, v) = (4, 5, 4, 2, 4, 3);
        let shape = Heads { heads, kv_heads, qk, v };
        let (segments, keys) = (vec![2, 2], vec![3, 2]);
        Example::new(AttentionBackward { shape, scale: 0.5, segments, keys, block_kv: 2 })
            .input("q", DType::BF16, shape![t, heads * qk])
            .input("k", DType::BF16, shape![s, kv_heads * qk])
            .input("v", DType::BF16, shape![s, kv_heads * v])
            .input("o", DType::BF16, shape![t, heads * v])
            .input("lse", DType::F32, shape![t, heads])
            .input("do", DType::BF16, shape![t, heads * v])
            .output("dq", shape![t, heads * qk])
            .output("dk", shape![s, kv_heads * qk])
            .output("dv", shape![s, kv_heads * v])
    }

    fn infer(&self, inputs: &[Option<TensorMeta>]) -> Result<Vec<TensorMeta>, OpError> {
        let [Some(q), Some(k), Some(v), Some(o), Some(lse), Some(d_o)] = inputs else {
            unreachable!("mandatory")
        };
        let t =
            self.shape.check(Self::NAME, [q, k, v], (&self.segments, &self.keys), self.block_kv)?;
        for tensor in [o, d_o] {
            rules::dtype(tensor, &[q.dtype])?;
            rules::shape(tensor, &[t, self.shape.heads * self.shape.v])?;
        }
        rules::dtype(lse, &[compute_dtype(q.dtype)])?;
        rules::shape(lse, &[t, self.shape.heads])?;
        Ok([("dq", q), ("dk", k), ("dv", v)]
            .map(|(role, like)| rules::meta(role, q.dtype, &like.shape))
            .to_vec())
    }

    fn flops(&self, _inputs: &[Option<TensorMeta>]) -> u64 {
        let Heads { heads, qk, v, .. } = self.shape;
        2 * pairs(&self.segments, &self.keys) * (heads * (3 * qk + 2 * v)) as u64
    }

    fn run(&self, inputs: Vec<Option<Tensor>>) -> Result<Vec<Tensor>, OpError> {
        let [Some(q), Some(k), Some(v), Some(o), Some(lse), Some(d_o)] = &inputs[..] else {
            unreachable!("mandatory")
        };
        let Heads { heads, kv_heads, qk, v: v_dim } = self.shape;
        let (t, dtype) = (q.shape()[0], q.dtype());
        let low = dtype == DType::BF16;
        Ok(in_real!(dtype, R => {
            let [q, k, v] = [q, k, v].map(|x| values::<R>(x));
            let (q, k, v) = (q.view(), k.view(), v.view());
            let [o, d_o, lse] = [o, d_o, lse].map(|x| values::<R>(x));
            let (o, d_o, lse) = (o.view(), d_o.view(), lse.view());
            let tasks: Vec<_> = both_spans(&self.segments, &self.keys)
                .into_iter()
                .flat_map(|span| (0..kv_heads).map(move |h| (span, h)))
                .collect();
            let group = heads / kv_heads;
            let parts: Vec<[Array2<R>; 3]> = tasks
                .par_iter()
                .map(|&([(start, length), (first, keys)], kv)| {
                    let rows = start..start + length;
                    let k = k.slice(s![first..first + keys, kv * qk..(kv + 1) * qk]);
                    let v = v.slice(s![first..first + keys, kv * v_dim..(kv + 1) * v_dim]);
                    let mut dq = Array2::from_elem((length, group * qk), R::ZERO);
                    let mut dk = Array2::from_elem((keys, qk), R::ZERO);
                    let mut dv = Array2::from_elem((keys, v_dim), R::ZERO);
                    for (g, h) in (kv * group..(kv + 1) * group).enumerate() {
                        let q = q.slice(s![rows.clone(), h * qk..(h + 1) * qk]);
                        let out = s![rows.clone(), h * v_dim..(h + 1) * v_dim];
                        let row = Rows {
                            low,
                            o: o.slice(out),
                            d_o: d_o.slice(out),
                            lse: lse.slice(s![rows.clone(), h..h + 1]),
                        };
                        let mut dq = dq.slice_mut(s![.., g * qk..(g + 1) * qk]);
                        dq.assign(&self.head(q, k, v, &row, &mut dk, &mut dv));
                    }
                    [dq, dk, dv]
                })
                .collect();
            let zeros = |rows, columns| Array2::from_elem((rows, columns), R::ZERO);
            let total = k.nrows();
            let mut out = [
                zeros(t, heads * qk),
                zeros(total, kv_heads * qk),
                zeros(total, kv_heads * v_dim),
            ];
            for (&([(start, _), (first, _)], kv), part) in tasks.iter().zip(parts) {
                for ((out, part), start) in out.iter_mut().zip(part).zip([start, first, first]) {
                    let (length, width) = part.dim();
                    let place = s![start..start + length, kv * width..(kv + 1) * width];
                    out.slice_mut(place).assign(&part);
                }
            }
            let store = |a: Array2<R>| {
                let shape = [a.nrows(), a.ncols()];
                R::store(a.into_raw_vec_and_offset().0, &shape, dtype)
            };
            out.map(store).to_vec()
        }))
    }
}

/// What the gradient of one head reads beside queries, keys and values.
struct Rows<'a, R> {
    /// Whether products run on the tensor core.
    low: bool,
    o: ArrayView2<'a, R>,
    d_o: ArrayView2<'a, R>,
    lse: ArrayView2<'a, R>,
}

impl AttentionBackward {
    /// One head of one segment: gives dq, adds to dk and dv.
    fn head<R: Real>(
        &self,
        q: ArrayView2<'_, R>,
        k: ArrayView2<'_, R>,
        v: ArrayView2<'_, R>,
        row: &Rows<'_, R>,
        dk: &mut Array2<R>,
        dv: &mut Array2<R>,
    ) -> Array2<R> {
        let low = row.low;
        let (t, scale) = (q.nrows(), R::from_f64(self.scale));
        // Queries are the last rows.
        let base = k.nrows() - t;
        let mut dq = Array2::from_elem((t, q.ncols()), R::ZERO);
        for first in (0..t).step_by(BLOCK_Q) {
            let last = (first + BLOCK_Q).min(t);
            let (queries, d_o) = (q.slice(s![first..last, ..]), row.d_o.slice(s![first..last, ..]));
            let delta: Vec<R> = (first..last)
                .map(|i| tree_sum(v.ncols(), |c| row.d_o[[i, c]] * row.o[[i, c]]))
                .collect();
            let seen_by_last = base + last;
            let (keys, values) = (k.slice(s![..seen_by_last, ..]), v.slice(s![..seen_by_last, ..]));
            let mut p = Array2::from_elem((last - first, seen_by_last), R::ZERO);
            multiply(low, queries, keys.t(), p.view_mut(), false);
            let mut ds = Array2::from_elem((last - first, seen_by_last), R::ZERO);
            multiply(low, d_o, values.t(), ds.view_mut(), false);
            for (i, (mut p, mut ds)) in p.rows_mut().into_iter().zip(ds.rows_mut()).enumerate() {
                let p = p.as_slice_mut().expect("standard layout");
                let ds = ds.as_slice_mut().expect("standard layout");
                let seen = base + first + i + 1;
                p[seen..].fill(R::ZERO);
                ds[seen..].fill(R::ZERO);
                let lse = row.lse[[first + i, 0]];
                p[..seen].iter_mut().for_each(|s| *s = *s * scale - lse);
                R::exp_slice(&mut p[..seen]);
                for (ds, &p) in ds[..seen].iter_mut().zip(&p[..seen]) {
                    *ds = p * (*ds - delta[i]) * scale;
                }
            }
            multiply(low, p.t(), d_o, dv.slice_mut(s![..seen_by_last, ..]), true);
            multiply(low, ds.view(), keys, dq.slice_mut(s![first..last, ..]), false);
            multiply(low, ds.t(), queries, dk.slice_mut(s![..seen_by_last, ..]), true);
        }
        dq
    }
}

#[cfg(test)]
mod tests {
    use fathom_numerics::philox::Philox;

    use super::*;

    fn rows(x: &Tensor, rows: std::ops::Range<usize>) -> Tensor {
        let width = x.bytes().len() / x.shape()[0];
        let shape = [rows.len(), x.shape()[1]];
        Tensor::from_bytes(x.dtype(), &shape, &x.bytes()[rows.start * width..rows.end * width])
    }

    /// A sequence in two parts: outputs and query gradients are those of the whole, bit for bit,
    /// and the key gradients of the parts add up to the whole's.
    #[test]
    fn parts_of_a_sequence_give_what_the_whole_gives() {
        let shape = Heads { heads: 2, kv_heads: 1, qk: 8, v: 4 };
        let (t, scale, block_kv) = (150, 0.3, 64);
        let random = |stream: u64, columns: usize| {
            let mut x = vec![0.0f32; t * columns];
            Philox::new(4, stream).normals(0, &mut x);
            Tensor::from_vec(&[t, columns], x.into_iter().map(f64::from).collect())
        };
        let (q, k, v, d_o) = (random(0, 16), random(1, 8), random(2, 4), random(3, 8));
        let both = |queries: std::ops::Range<usize>| {
            let keys = if queries.len() == t { Vec::new() } else { vec![queries.end] };
            let segments = vec![queries.len()];
            let part = |x: &Tensor| Some(rows(x, queries.clone()));
            let seen = |x: &Tensor| Some(rows(x, 0..queries.end));
            let op = Attention { shape, scale, segments, keys, block_kv };
            let forward = Op::run(&op, vec![part(&q), seen(&k), seen(&v)]).unwrap();
            let Attention { segments, keys, .. } = op;
            let op = AttentionBackward { shape, scale, segments, keys, block_kv };
            let (o, lse) = (forward[0].clone(), forward[1].clone());
            let inputs = vec![part(&q), seen(&k), seen(&v), Some(o), Some(lse), part(&d_o)];
            (forward, Op::run(&op, inputs).unwrap())
        };
        let (whole, gradients) = both(0..t);
        let mut sums = [vec![0.0; t * 8], vec![0.0; t * 4]];
        for part in [0..64, 64..t] {
            let (forward, backward) = both(part.clone());
            for (whole, found) in whole.iter().zip(&forward) {
                assert!(rows(whole, part.clone()) == *found);
            }
            assert!(rows(&gradients[0], part.clone()) == backward[0]);
            for (sum, found) in sums.iter_mut().zip(&backward[1..]) {
                sum.iter_mut().zip(found.as_slice::<f64>()).for_each(|(s, x)| *s += x);
            }
        }
        for (whole, sum) in gradients[1..].iter().zip(&sums) {
            let pairs = whole.as_slice::<f64>().iter().zip(sum);
            assert!(pairs.into_iter().all(|(w, s)| (w - s).abs() < 1e-12));
        }
    }
}
