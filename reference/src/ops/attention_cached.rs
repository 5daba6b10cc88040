//! `attention_cached`: grouped-query (multi-head, multi-query) attention for decoding: queries
//! \[t, heads * qk\] on `cache` \[s, kv_heads * (qk + v)\], every head's rotated key, then every
//! head's value; else as [`super::attention_latent`].

use fathom_trace::{DType, OpClass, TensorMeta};
use ndarray::{Array2, s};
use rayon::prelude::*;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::attention::{Heads, cached_head, values};
use crate::Tensor;
use crate::op::compute_type::{FLOATS, Real, in_real};
use crate::op::example::{Example, shape};
use crate::op::{Op, OpError, Role, input, rules};

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
