//! The attention part of a layer: norm, projections, attention, output projection, residual.
//!
//! Multi-head latent attention (training form: keys and values up-projected) or grouped-query
//! attention. The first projection is one product: query latent (or queries), key-value latent and
//! shared key side by side.

use crate::backend::{Backend, Result};
use crate::layers::linear::NormKept;
use crate::layers::operand::Operand;
use crate::layers::residual::{Residual, ResidualGradient};
use crate::layers::{Cx, Linear, Norm};
use crate::ops::add::Add;
use crate::ops::attention::{Attention, AttentionBackward, Heads};
use crate::ops::concat_columns::ConcatColumns;
use crate::ops::mla_kv::{MlaKv, MlaKvBackward};
use crate::ops::rope::Rope;
use crate::ops::slice_columns::SliceColumns;

/// The attention part of a layer.
#[derive(Clone, Debug)]
pub struct AttentionLayer {
    /// Norm before everything.
    pub norm: Norm,
    /// Down-projection: query latent (or queries), key-value latent, shared key.
    pub qkv_a: Linear,
    /// Norm and up-projection of the query latent, where there is one.
    pub q: Option<(Norm, Linear)>,
    /// What makes keys and values.
    pub kv: KeyValue,
    /// Output projection: every head's result back to the residual's width.
    pub o: Linear,
    /// Heads of this rank.
    pub heads: Heads,
    /// Columns of a head that carry no position; the rest of its `qk` columns are rotated.
    pub nope: usize,
    /// Whether rotated pairs are neighbours.
    pub interleaved: bool,
    /// What queries times keys are multiplied by before the softmax.
    pub scale: f64,
}

/// What makes keys and values: multi-head latent attention or grouped queries.
#[derive(Clone, Debug)]
pub enum KeyValue {
    /// From a normalised latent and a shared key behind it.
    Latent {
        /// Norm of the latent.
        norm: Norm,
        /// Up-projection to every head's key without position and value.
        b: Linear,
    },
    /// Columns of the first projection, behind the queries.
    Direct,
}

/// What the attention's backward needs.
#[derive(Clone, Debug)]
pub struct AttentionKept<B: Backend> {
    norm: NormKept<B>,
    /// The normalised input as the first projection reads it; none where norms are recomputed.
    normed: Option<Operand<B>>,
    /// The first projection's result: query latent (or queries), key-value latent, shared key.
    latent: B::Buffer,
    q_norm: Option<NormKept<B>>,
    /// The normalised query latent; none without one, and where norms are recomputed.
    normed_q: Option<Operand<B>>,
    kv_norm: Option<NormKept<B>>,
    /// The normalised key-value latent, of all rows that this rank sees; none as for `normed_q`.
    normed_kv: Option<Operand<B>>,
    /// Rotated queries, rotated keys, values; none where the up-projections are recomputed.
    qkv: Option<[B::Buffer; 3]>,
    /// The attention's result \[t, heads * v\], before the output projection.
    output: Operand<B>,
    /// Logarithm of the softmax's denominator \[t, heads\].
    lse: B::Buffer,
    /// What the input-backward leaves for the weight-backward.
    grads: Option<AttentionGrads<B>>,
}

/// Gradients that the weight-backward needs.
#[derive(Clone, Debug)]
struct AttentionGrads<B: Backend> {
    /// Of the layer's output, and so of the output projection's result.
    dh: B::Buffer,
    /// Of the query up-projection's result, where there is one.
    dq: Option<B::Buffer>,
    /// Of the key-value up-projection's result, where there is one.
    dkv: Option<B::Buffer>,
    /// Of the first projection's result.
    dlatent: B::Buffer,
}

impl AttentionLayer {
    /// `x` plus the attention's output, added up or left to the norm behind; with what the backward
    /// needs.
    ///
    /// # Errors
    /// Those of the backend.
    pub fn forward<B: Backend>(
        &self,
        cx: &Cx<'_, B>,
        x: &B::Buffer,
    ) -> Result<(Residual<B>, AttentionKept<B>)> {
        let (n, norm) = self.norm.operand(cx, x, self.qkv_a.weight)?;
        let latent = self.qkv_a.fprop(cx, &n)?;
        let mut kept_q = (None, None);
        let mut kept_kv = (None, None);
        let q = self.queries(cx, &latent, &mut kept_q)?;
        let [k, v] = self.keys_values(cx, &latent, &mut kept_kv)?;
        let [o, lse] = cx.backend.attention(&self.attention(cx), &q, &k, &v)?;
        let y = cx.reduce_tp(self.o.fprop(cx, &cx.operand(&o, self.o.weight)?)?)?;
        let o = cx.keep_attention_output(&o)?;
        let h = Residual::new(cx, x, y)?;
        let recipe = cx.recipe;
        let keep = |x: Option<Operand<B>>| if recipe.recompute_norms { None } else { x };
        let kept = AttentionKept {
            norm,
            normed: keep(Some(n)),
            latent,
            q_norm: kept_q.0,
            normed_q: keep(kept_q.1),
            kv_norm: kept_kv.0,
            normed_kv: keep(kept_kv.1),
            qkv: (!recipe.recompute_up_projections).then_some([q, k, v]),
            output: o,
            lse,
            grads: None,
        };
        Ok((h, kept))
    }

    fn attention<B: Backend>(&self, cx: &Cx<'_, B>) -> Attention {
        Attention {
            shape: self.heads,
            scale: self.scale,
            segments: cx.rows.segments.clone(),
            keys: cx.rows.context.iter().map(|context| context.keys).collect(),
            block_kv: cx.recipe.attention_block_kv,
        }
    }

    fn rope(&self, inverse: bool) -> Rope {
        let Heads { qk, .. } = self.heads;
        Rope { head_dim: qk, start: self.nope, interleaved: self.interleaved, inverse }
    }

    /// Rotated queries from the first projection's result.
    pub(crate) fn queries<B: Backend>(
        &self,
        cx: &Cx<'_, B>,
        latent: &B::Buffer,
        kept: &mut (Option<NormKept<B>>, Option<Operand<B>>),
    ) -> Result<B::Buffer> {
        let q = match &self.q {
            Some((norm, b)) => {
                let (normed, norm) = norm.operand(cx, latent, b.weight)?;
                let q = b.fprop(cx, &normed)?;
                *kept = (Some(norm), Some(normed));
                q
            }
            None => {
                let width = self.heads.heads * self.heads.qk;
                cx.backend.slice_columns(&SliceColumns { offset: 0, width }, latent)?
            }
        };
        cx.backend.rope(&self.rope(false), q, &cx.rows.cos, &cx.rows.sin, &cx.rows.positions)
    }

    /// Keys (rotated) and values from the first projection's result.
    pub(crate) fn keys_values<B: Backend>(
        &self,
        cx: &Cx<'_, B>,
        latent: &B::Buffer,
        kept: &mut (Option<NormKept<B>>, Option<Operand<B>>),
    ) -> Result<[B::Buffer; 2]> {
        let (rows, backend) = (cx.rows, cx.backend);
        let Heads { heads, kv_heads, qk, v } = self.heads;
        match &self.kv {
            KeyValue::Latent { norm, b } => {
                let offset = norm.offset + norm.width;
                let (normed, norm) = norm.operand(cx, latent, b.weight)?;
                let normed = cx.gather_operand(normed)?;
                let kv = b.fprop(cx, &normed)?;
                *kept = (Some(norm), Some(normed));
                let (nope, rope, interleaved) = (self.nope, qk - self.nope, self.interleaved);
                let Some(context) = &rows.context else {
                    let op = MlaKv { heads, nope, rope, v, offset, interleaved };
                    return backend.mla_kv(&op, &kv, latent, &rows.cos, &rows.sin, &rows.positions);
                };
                let shared = SliceColumns { offset, width: rope };
                let shared = cx.gather_context(backend.slice_columns(&shared, latent)?)?;
                let op = MlaKv { heads, nope, rope, v, offset: 0, interleaved };
                backend.mla_kv(&op, &kv, &shared, &rows.cos, &rows.sin, &context.positions)
            }
            KeyValue::Direct => {
                let offset = heads * qk;
                let k = SliceColumns { offset, width: kv_heads * qk };
                let k = backend.slice_columns(&k, latent)?;
                let k =
                    backend.rope(&self.rope(false), k, &rows.cos, &rows.sin, &rows.positions)?;
                let v = SliceColumns { offset: offset + kv_heads * qk, width: kv_heads * v };
                let v = backend.slice_columns(&v, latent)?;
                Ok([cx.gather_context(k)?, cx.gather_context(v)?])
            }
        }
    }

    /// The gradient of `x`, given that of the output.
    ///
    /// # Errors
    /// Those of the backend.
    pub fn backward_input<B: Backend>(
        &self,
        cx: &Cx<'_, B>,
        kept: &mut AttentionKept<B>,
        ResidualGradient { dh, operand }: ResidualGradient<B>,
    ) -> Result<B::Buffer> {
        let (rows, backend) = (cx.rows, cx.backend);
        let d_o = match operand {
            Some(dh) => self.o.dgrad_of(cx, &dh)?,
            None => self.o.dgrad(cx, &dh)?,
        };
        let [q, k, v] = match kept.qkv.take() {
            Some(qkv) => qkv,
            None => {
                let mut again = (None, None);
                let q = self.queries(cx, &kept.latent, &mut again)?;
                let [k, v] = self.keys_values(cx, &kept.latent, &mut again)?;
                [q, k, v]
            }
        };
        let Attention { shape, scale, segments, keys, block_kv } = self.attention(cx);
        let op = AttentionBackward { shape, scale, segments, keys, block_kv };
        let [dq, dk, dv] = backend.attention_backward(
            &op,
            &q,
            &k,
            &v,
            &cx.values(&kept.output)?,
            &kept.lse,
            &d_o,
        )?;
        let unrotate = |d| backend.rope(&self.rope(true), d, &rows.cos, &rows.sin, &rows.positions);
        let dq = unrotate(dq)?;
        let (dlatent_q, dq) = match (&self.q, &mut kept.q_norm) {
            (Some((norm, b)), Some(kept)) => {
                let dqn = cx.reduce_tp(b.dgrad(cx, &dq)?)?;
                (norm.dgrad(cx, kept, dqn, None)?, Some(dq))
            }
            _ => (dq, None),
        };
        let (dlatent, dkv) = match (&self.kv, &mut kept.kv_norm) {
            (KeyValue::Latent { norm, b }, Some(kept)) => {
                let Heads { heads, qk, v, .. } = self.heads;
                let (nope, rope) = (self.nope, qk - self.nope);
                let op = MlaKvBackward { heads, nope, rope, v, interleaved: self.interleaved };
                let positions = rows.context.as_ref().map_or(&rows.positions, |c| &c.positions);
                let [dkv, dshared] =
                    backend.mla_kv_backward(&op, &dk, &dv, &rows.cos, &rows.sin, positions)?;
                let dcn = cx.scatter_context(cx.reduce_tp(b.dgrad(cx, &dkv)?)?)?;
                let dc = norm.dgrad(cx, kept, dcn, None)?;
                let dshared = cx.scatter_context(cx.reduce_tp(dshared)?)?;
                let parts = (&dlatent_q, &dc, Some(&dshared));
                let joined =
                    backend.concat_columns(&ConcatColumns {}, parts.0, parts.1, parts.2)?;
                (joined, Some(dkv))
            }
            _ => {
                let dk = unrotate(cx.scatter_context(dk)?)?;
                let dv = cx.scatter_context(dv)?;
                let op = ConcatColumns {};
                (backend.concat_columns(&op, &dlatent_q, &dk, Some(&dv))?, None)
            }
        };
        let dn = match (&self.kv, &self.q) {
            // Without a latent every projection is split by heads, and each rank has a part of the
            // sum.
            (KeyValue::Direct, _) => cx.reduce_tp(self.qkv_a.dgrad(cx, &dlatent)?)?,
            (KeyValue::Latent { .. }, None) if cx.tp.size > 1 => self.dgrad_apart(cx, &dlatent)?,
            (KeyValue::Latent { .. }, _) => self.qkv_a.dgrad(cx, &dlatent)?,
        };
        let dx = self.norm.dgrad(cx, &mut kept.norm, dn, Some(&dh))?;
        kept.grads = Some(AttentionGrads { dh, dq, dkv, dlatent });
        Ok(dx)
    }

    /// The gradient of the normalised input where tensor parallel ranks have queries of their own,
    /// each a part of the sum, beside a latent that all have alike, which counts once.
    fn dgrad_apart<B: Backend>(&self, cx: &Cx<'_, B>, dlatent: &B::Buffer) -> Result<B::Buffer> {
        let backend = cx.backend;
        let (dtype, shape) = (backend.dtype(dlatent), backend.shape(dlatent));
        let queries = self.heads.heads * self.heads.qk;
        let latent = shape[1] - queries;
        let slice = |offset, width| backend.slice_columns(&SliceColumns { offset, width }, dlatent);
        let zeros = |width| backend.zeros(dtype, &[shape[0], width]);
        let beside = |left: &B::Buffer, right: &B::Buffer| {
            backend.concat_columns(&ConcatColumns {}, left, right, None)
        };
        let of_queries = beside(&slice(0, queries)?, &zeros(latent)?)?;
        let of_latent = beside(&zeros(queries)?, &slice(queries, latent)?)?;
        let of_queries = cx.reduce_tp(self.qkv_a.dgrad(cx, &of_queries)?)?;
        let of_latent = self.qkv_a.dgrad(cx, &of_latent)?;
        backend.add(&Add { out: cx.activation() }, &of_queries, &of_latent, None)
    }

    /// Adds to the gradients of the projections and norms.
    ///
    /// # Errors
    /// Those of the backend.
    ///
    /// # Panics
    /// Before the input-backward.
    pub fn backward_weight<B: Backend>(
        &self,
        cx: &Cx<'_, B>,
        kept: AttentionKept<B>,
    ) -> Result<()> {
        let grads = kept.grads.expect("input-backward comes first");
        self.o.wgrad(cx, &kept.output, &grads.dh)?;
        let again =
            |norm: &Norm, operand: Option<Operand<B>>, x: &B::Buffer, by: &Linear| match operand {
                Some(operand) => Ok(operand),
                None => norm.operand(cx, x, by.weight).map(|(operand, _)| operand),
            };
        if let (Some((norm, b)), Some(q_norm), Some(dq)) = (&self.q, &kept.q_norm, &grads.dq) {
            b.wgrad(cx, &again(norm, kept.normed_q, &kept.latent, b)?, dq)?;
            norm.wgrad(cx, q_norm)?;
        }
        if let (KeyValue::Latent { norm, b }, Some(kv_norm), Some(dkv)) =
            (&self.kv, &kept.kv_norm, &grads.dkv)
        {
            let normed = match kept.normed_kv {
                Some(normed) => normed,
                None => cx.gather_operand(again(norm, None, &kept.latent, b)?)?,
            };
            let rows = cx.rows.of_keys();
            b.wgrad(&cx.with_rows(&rows), &normed, dkv)?;
            norm.wgrad(cx, kv_norm)?;
        }
        self.qkv_a.wgrad(
            cx,
            &again(&self.norm, kept.normed, &kept.norm.x, &self.qkv_a)?,
            &grads.dlatent,
        )?;
        self.norm.wgrad(cx, &kept.norm)
    }
}
