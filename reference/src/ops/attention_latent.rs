//! `attention_latent`: absorbed queries on `cache` \[s, r + rope\]; the t rows are the cache's last
//! t tokens, row i sees `s - t + i + 1` of it. Arithmetic and block order of op `attention` (KV
//! blocks counted from the cache's start), with one key head and the first r columns as values.
//! Source: arXiv 2405.04434, section 2.1.2 and appendix C.

use fathom_trace::{DType, OpClass, TensorMeta};
use ndarray::{Array2, s};
use rayon::prelude::*;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::attention::{cached_head, values};
use crate::Tensor;
use crate::op::compute_type::{FLOATS, Real, in_real};
use crate::op::example::{Example, shape};
use crate::op::{Op, OpError, Role, input, rules};

/// Attention over the latent cache.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct AttentionLatent {
    /// Heads of the queries.
    pub heads: usize,
    /// Columns of the latent.
    pub rank: usize,
    /// Multiplied onto the dots of queries and cache rows.
    pub scale: f64,
    /// Rows of a KV block.
    pub block_kv: usize,
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
