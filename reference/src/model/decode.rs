//! Decoding: new tokens through the absorbed form, with a cache of latents; for grouped-query
//! attention, with a cache of keys and values.
//!
//! [`Model::decode`] takes any number of new tokens (a prompt, one token, drafts to verify) and
//! appends them to a [`LatentCache`]; the rows' bits depend only on the cache's content, not on how
//! many tokens come together. [`LatentCache::truncate`] takes rejected drafts back.
//! [`Model::draft`] runs an MTP module the same way, with a cache of its own.

use std::slice::{from_mut, from_ref};

use fathom_trace::{Component, Phase};

use super::step::StepSettings;
use super::{Join, Model, MtpModule};
use crate::backend::{Backend, Result};
use crate::layers::attention::{AttentionLayer, KeyValue};
use crate::layers::context::Rows;
use crate::layers::residual::Residual;
use crate::layers::{Cx, Weights, rope};
use crate::model::layer::Layer;
use crate::ops::attention_cached::AttentionCached;
use crate::ops::attention_latent::AttentionLatent;
use crate::ops::concat_columns::ConcatColumns;
use crate::ops::concat_rows::ConcatRows;
use crate::ops::mla_absorb::MlaAbsorbQuery;
use crate::ops::mla_absorb::MlaAbsorbValue;
use crate::ops::rope::Rope;
use crate::ops::slice_columns::SliceColumns;
use crate::ops::slice_rows::SliceRows;
use crate::{EngineError, Tensor};

/// Normalised latents and rotated shared keys (grouped-query attention: rotated keys and values) of
/// the tokens so far, one buffer per layer.
#[derive(Debug)]
pub struct LatentCache<B: Backend> {
    layers: Vec<Option<B::Buffer>>,
    length: usize,
    /// RoPE position of the first token: 0, or an MTP module's depth.
    first: usize,
}

impl<B: Backend> Clone for LatentCache<B> {
    fn clone(&self) -> Self {
        LatentCache { layers: self.layers.clone(), ..*self }
    }
}

impl<B: Backend> LatentCache<B> {
    /// Tokens in the cache.
    pub fn len(&self) -> usize {
        self.length
    }

    /// Whether no token is in the cache.
    pub fn is_empty(&self) -> bool {
        self.length == 0
    }

    /// Bytes that the cache holds.
    pub fn bytes(&self, backend: &B) -> usize {
        let of =
            |b: &B::Buffer| backend.shape(b).iter().product::<usize>() * backend.dtype(b).size();
        self.layers.iter().flatten().map(of).sum()
    }

    /// Forgets all but the first `length` tokens.
    ///
    /// # Errors
    /// Those of the backend.
    pub fn truncate(&mut self, backend: &B, length: usize) -> Result<()> {
        if length >= self.length {
            return Ok(());
        }
        for layer in &mut self.layers {
            *layer = match layer.take() {
                Some(rows) if length > 0 => {
                    Some(backend.slice_rows(&SliceRows { offset: 0, rows: length }, &rows)?)
                }
                _ => None,
            };
        }
        self.length = length;
        Ok(())
    }
}

impl Model {
    /// An empty cache of the main model.
    pub fn cache<B: Backend>(&self) -> LatentCache<B> {
        LatentCache { layers: vec![None; self.layers.len()], length: 0, first: 0 }
    }

    /// An empty cache of an MTP module, counted from 0.
    pub fn draft_cache<B: Backend>(&self, module: usize) -> LatentCache<B> {
        LatentCache { layers: vec![None], length: 0, first: self.mtp[module].depth }
    }

    /// Hidden states \[t, hidden\] after the final norm of new tokens, which join the cache; their
    /// logits: [`Model::logits`].
    ///
    /// # Errors
    /// Those of the backend.
    pub fn decode<B: Backend>(
        &self,
        backend: &B,
        weights: &Weights<B>,
        cache: &mut LatentCache<B>,
        tokens: &[u32],
    ) -> Result<B::Buffer> {
        let rows = self.decode_rows(backend, cache, tokens.len())?;
        let settings = StepSettings::default();
        let cx = self.cx(backend, weights, &rows, &settings, None);
        let ids: Vec<i32> = tokens.iter().map(|&t| t as i32).collect();
        let mut x = self.embed(&cx, &backend.upload(Tensor::from_vec(&[ids.len()], ids))?)?;
        for (layer, cache) in self.layers.iter().zip(&mut cache.layers) {
            x = decode_layer(&cx, layer, cache, &x)?;
        }
        cache.length += tokens.len();
        cx.at(None, Component::Head, Phase::F);
        Ok(self.norm.expect("this stage has the final norm").fprop(&cx, &x)?.0)
    }

    /// An MTP module on new rows: the hidden state of each (after its norm) and the token that
    /// follows; gives the module's hidden states after its norm.
    ///
    /// # Errors
    /// Those of the backend; [`EngineError::Unsupported`] for parallel heads, which do not chain.
    pub fn draft<B: Backend>(
        &self,
        backend: &B,
        weights: &Weights<B>,
        module: usize,
        cache: &mut LatentCache<B>,
        (hidden, tokens): (&B::Buffer, &[u32]),
    ) -> Result<B::Buffer> {
        let rows = self.decode_rows(backend, cache, tokens.len())?;
        let settings = StepSettings::default();
        let cx = self.cx(backend, weights, &rows, &settings, None);
        let ids: Vec<i32> = tokens.iter().map(|&t| t as i32).collect();
        let e = self.embed(&cx, &backend.upload(Tensor::from_vec(&[ids.len()], ids))?)?;
        let MtpModule { join, layer, norm, .. } = &self.mtp[module];
        let Some(Join { enorm, hnorm, eh_proj }) = join else {
            return Err(EngineError::Unsupported {
                engine: backend.name(),
                op: "draft".into(),
                reason: "parallel MTP heads are a training baseline; decode without drafts".into(),
            });
        };
        cx.at(Some(layer.index), Component::Mtp, Phase::F);
        let (e, h) = (enorm.fprop(&cx, &e)?.0, hnorm.fprop(&cx, hidden)?.0);
        let joined = backend.concat_columns(&ConcatColumns {}, &e, &h, None)?;
        let x = eh_proj.fprop(&cx, &cx.operand(&joined, eh_proj.weight)?)?;
        let y = decode_layer(&cx, layer, &mut cache.layers[0], &x)?;
        cache.length += tokens.len();
        Ok(norm.fprop(&cx, &y)?.0)
    }

    fn decode_rows<B: Backend>(
        &self,
        backend: &B,
        cache: &LatentCache<B>,
        new: usize,
    ) -> Result<Rows<B>> {
        let first = cache.first + cache.length;
        let master = self.recipe.master();
        let [cos, sin] = rope::tables(&self.config.rope, self.rotated(), first + new, master);
        let positions: Vec<i32> = (first..first + new).map(|p| p as i32).collect();
        Ok(Rows {
            segments: vec![new],
            positions: backend.upload(Tensor::from_vec(&[new], positions))?,
            cos: backend.upload(cos)?,
            sin: backend.upload(sin)?,
            context: None,
        })
    }
}

/// A layer on new rows.
fn decode_layer<B: Backend>(
    cx: &Cx<'_, B>,
    layer: &Layer,
    cache: &mut Option<B::Buffer>,
    x: &B::Buffer,
) -> Result<B::Buffer> {
    cx.at(Some(layer.index), Component::Attention, Phase::F);
    let h = decode_attention(cx, layer, cache, x)?;
    let cxs = from_ref(cx);
    let (dispatched, mut kept) = layer.dispatch_f(cxs, vec![h])?.remove(0);
    let inputs = from_ref(&dispatched);
    let output = layer.mlp_f(cxs, inputs, from_mut(&mut kept))?.remove(0);
    layer.combine_f(cx, output, &kept)
}

fn decode_attention<B: Backend>(
    cx: &Cx<'_, B>,
    layer: &Layer,
    cache: &mut Option<B::Buffer>,
    x: &B::Buffer,
) -> Result<Residual<B>> {
    let (attention, backend) = (&layer.attention, cx.backend);
    let n = attention.norm.operand(cx, x, attention.qkv_a.weight)?.0;
    let latent = attention.qkv_a.fprop(cx, &n)?;
    let q = attention.queries(cx, &latent, &mut (None, None))?;
    let new = cache_rows(cx, attention, &latent)?;
    let all = match cache.take() {
        Some(old) => backend.concat_rows(&ConcatRows {}, &old, &new)?,
        None => new,
    };
    let (shape, scale, block_kv) = (attention.heads, attention.scale, cx.recipe.attention_block_kv);
    let o = match &attention.kv {
        KeyValue::Direct => {
            backend.attention_cached(&AttentionCached { shape, scale, block_kv }, &q, &all)?
        }
        KeyValue::Latent { norm, b } => {
            let (heads, v, nope) = (shape.heads, shape.v, attention.nope);
            let up = cx.master(b.weight);
            let op = MlaAbsorbQuery { heads, nope, rope: shape.qk - nope, v };
            let q = backend.mla_absorb_query(&op, &q, up)?;
            let op = AttentionLatent { heads, rank: norm.width, scale, block_kv };
            let o = backend.attention_latent(&op, &q, &all)?;
            backend.mla_absorb_value(&MlaAbsorbValue { heads, nope, v }, &o, up)?
        }
    };
    *cache = Some(all);
    let y = attention.o.fprop(cx, &cx.operand(&o, attention.o.weight)?)?;
    Residual::new(cx, x, y)
}

/// What new tokens leave in the cache.
fn cache_rows<B: Backend>(
    cx: &Cx<'_, B>,
    attention: &AttentionLayer,
    latent: &B::Buffer,
) -> Result<B::Buffer> {
    let (backend, rows) = (cx.backend, cx.rows);
    let join = ConcatColumns {};
    match &attention.kv {
        KeyValue::Direct => {
            let [k, v] = attention.keys_values(cx, latent, &mut (None, None))?;
            backend.concat_columns(&join, &k, &v, None)
        }
        KeyValue::Latent { norm, .. } => {
            let rope = attention.heads.qk - attention.nope;
            let c = norm.fprop(cx, latent)?.0;
            let shared = SliceColumns { offset: norm.offset + norm.width, width: rope };
            let shared = backend.slice_columns(&shared, latent)?;
            let interleaved = attention.interleaved;
            let op = Rope { head_dim: rope, start: 0, interleaved, inverse: false };
            let shared = backend.rope(&op, shared, &rows.cos, &rows.sin, &rows.positions)?;
            backend.concat_columns(&join, &c, &shared, None)
        }
    }
}
