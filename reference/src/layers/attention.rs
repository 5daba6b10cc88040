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
    /// The normalised key-value latent; none as for `normed_q`.
    normed_kv: Option<Operand<B>>,
    /// Of the attention itself, with the first part of a micro-batch.
    whole: Option<WholeKept<B>>,
    /// The attention's result \[t, heads * v\], before the output projection.
    output: Operand<B>,
    /// What the input-backward leaves for the weight-backward.
    grads: Option<AttentionGrads<B>>,
}

/// What is kept of whole sequences, of the heads that this rank attends with.
#[derive(Clone, Debug)]
struct WholeKept<B: Backend> {
    /// Rotated queries, rotated keys, values; none where the up-projections are recomputed.
    qkv: Option<[B::Buffer; 3]>,
    /// Logarithm of the softmax's denominator \[rows in all, heads\].
    lse: B::Buffer,
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
    /// Of each of the rank's parts of a micro-batch `x` plus the attention's output, added up or
    /// left to the norm behind; with what the backward needs. Where sequences are whole there is
    /// one part.
    ///
    /// # Errors
    /// Those of the backend.
    #[allow(clippy::type_complexity)]
    pub fn forward<B: Backend>(
        &self,
        cxs: &[Cx<'_, B>],
        xs: Vec<B::Buffer>,
    ) -> Result<Vec<(Residual<B>, AttentionKept<B>)>> {
        let (mut kepts, mut qkvs) = (Vec::new(), Vec::new());
        for (cx, x) in cxs.iter().zip(&xs) {
            let (n, norm) = self.norm.operand(cx, x, self.qkv_a.weight)?;
            let latent = self.qkv_a.fprop(cx, &n)?;
            let (mut kept_q, mut kept_kv) = ((None, None), (None, None));
            let q = self.queries(cx, &latent, &mut kept_q)?;
            let [k, v] = self.keys_values(cx, &latent, &mut kept_kv)?;
            qkvs.push([q, k, v]);
            kepts.push((norm, n, latent, kept_q, kept_kv));
        }
        let (cx, recipe) = (&cxs[0], cxs[0].recipe);
        let [q, k, v] = whole(cx, qkvs)?;
        let [o, lse] = cx.backend.attention(&self.attention(cx), &q, &k, &v)?;
        let qkv = (!recipe.recompute_up_projections).then_some([q, k, v]);
        let mut whole = Some(WholeKept { qkv, lse });
        let mut parts = Vec::with_capacity(cxs.len());
        let outputs = cx.to_parts(o)?;
        for (((cx, x), o), kept) in cxs.iter().zip(&xs).zip(outputs).zip(kepts) {
            let y = cx.reduce_tp(self.o.fprop(cx, &cx.operand(&o, self.o.weight)?)?)?;
            let output = cx.keep_attention_output(&o)?;
            let h = Residual::new(cx, x, y)?;
            let keep = |x: Option<Operand<B>>| if recipe.recompute_norms { None } else { x };
            let (norm, n, latent, (q_norm, normed_q), (kv_norm, normed_kv)) = kept;
            let kept = AttentionKept {
                norm,
                normed: keep(Some(n)),
                latent,
                q_norm,
                normed_q: keep(normed_q),
                kv_norm,
                normed_kv: keep(normed_kv),
                whole: whole.take(),
                output,
                grads: None,
            };
            parts.push((h, kept));
        }
        Ok(parts)
    }

    /// The attention over whole sequences, with this rank's share of the heads.
    fn attention<B: Backend>(&self, cx: &Cx<'_, B>) -> Attention {
        let ranks = cx.rows.context.as_ref().map_or(1, |context| context.group.size);
        let Heads { heads, kv_heads, qk, v } = self.heads;
        Attention {
            shape: Heads { heads: heads / ranks, kv_heads: kv_heads / ranks, qk, v },
            scale: self.scale,
            segments: cx.rows.whole_segments().to_vec(),
            keys: Vec::new(),
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
                let kv = b.fprop(cx, &normed)?;
                *kept = (Some(norm), Some(normed));
                let (nope, rope, interleaved) = (self.nope, qk - self.nope, self.interleaved);
                let op = MlaKv { heads, nope, rope, v, offset, interleaved };
                backend.mla_kv(&op, &kv, latent, &rows.cos, &rows.sin, &rows.positions)
            }
            KeyValue::Direct => {
                let offset = heads * qk;
                let k = SliceColumns { offset, width: kv_heads * qk };
                let k = backend.slice_columns(&k, latent)?;
                let k =
                    backend.rope(&self.rope(false), k, &rows.cos, &rows.sin, &rows.positions)?;
                let v = SliceColumns { offset: offset + kv_heads * qk, width: kv_heads * v };
                let v = backend.slice_columns(&v, latent)?;
                Ok([k, v])
            }
        }
    }

    /// Of each of the rank's parts of a micro-batch the gradient of `x`, given that of the output.
    ///
    /// # Errors
    /// Those of the backend.
    ///
    /// # Panics
    /// Before the forward.
    pub fn backward_input<B: Backend>(
        &self,
        cxs: &[Cx<'_, B>],
        kept: &mut [AttentionKept<B>],
        gradients: Vec<ResidualGradient<B>>,
    ) -> Result<Vec<B::Buffer>> {
        let mut d_os = Vec::with_capacity(cxs.len());
        for (cx, ResidualGradient { dh, operand }) in cxs.iter().zip(&gradients) {
            d_os.push(match operand {
                Some(dh) => self.o.dgrad_of(cx, dh)?,
                None => self.o.dgrad(cx, dh)?,
            });
        }
        let cx = &cxs[0];
        let WholeKept { qkv, lse } = kept[0].whole.take().expect("forward comes first");
        let [q, k, v] = match qkv {
            Some(qkv) => qkv,
            None => {
                let again = |(cx, kept): (&Cx<'_, B>, &AttentionKept<B>)| {
                    let mut again = (None, None);
                    let q = self.queries(cx, &kept.latent, &mut again)?;
                    let [k, v] = self.keys_values(cx, &kept.latent, &mut again)?;
                    Ok([q, k, v])
                };
                whole(cx, cxs.iter().zip(&*kept).map(again).collect::<Result<_>>()?)?
            }
        };
        let outputs = cxs.iter().zip(&*kept).map(|(cx, kept)| cx.values(&kept.output));
        let o = cx.to_heads(outputs.collect::<Result<_>>()?)?;
        let d_o = cx.to_heads(d_os)?;
        let Attention { shape, scale, segments, keys, block_kv } = self.attention(cx);
        let op = AttentionBackward { shape, scale, segments, keys, block_kv };
        let [dq, dk, dv] = cx.backend.attention_backward(&op, &q, &k, &v, &o, &lse, &d_o)?;
        drop([q, k, v, o, d_o]);
        let [dqs, dks, dvs] = [cx.to_parts(dq)?, cx.to_parts(dk)?, cx.to_parts(dv)?];
        let parts = cxs.iter().zip(kept).zip(gradients).zip(dqs).zip(dks).zip(dvs);
        let part = |(((((cx, kept), ResidualGradient { dh, .. }), dq), dk), dv)| {
            self.backward_projections(cx, kept, dh, [dq, dk, dv])
        };
        parts.map(part).collect()
    }

    /// A part's share of the input-backward in front of the attention, from the gradients of its
    /// rotated queries, rotated keys and values.
    fn backward_projections<B: Backend>(
        &self,
        cx: &Cx<'_, B>,
        kept: &mut AttentionKept<B>,
        dh: B::Buffer,
        [dq, dk, dv]: [B::Buffer; 3],
    ) -> Result<B::Buffer> {
        let (rows, backend) = (cx.rows, cx.backend);
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
                let positions = &rows.positions;
                let [dkv, dshared] =
                    backend.mla_kv_backward(&op, &dk, &dv, &rows.cos, &rows.sin, positions)?;
                let dcn = cx.reduce_tp(b.dgrad(cx, &dkv)?)?;
                let dc = norm.dgrad(cx, kept, dcn, None)?;
                let dshared = cx.reduce_tp(dshared)?;
                let parts = (&dlatent_q, &dc, Some(&dshared));
                let joined =
                    backend.concat_columns(&ConcatColumns {}, parts.0, parts.1, parts.2)?;
                (joined, Some(dkv))
            }
            _ => {
                let dk = unrotate(dk)?;
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
            b.wgrad(cx, &again(norm, kept.normed_kv, &kept.latent, b)?, dkv)?;
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

/// Queries, keys and values of whole sequences, of those of a micro-batch's parts.
fn whole<B: Backend>(cx: &Cx<'_, B>, parts: Vec<[B::Buffer; 3]>) -> Result<[B::Buffer; 3]> {
    let (mut qs, mut ks, mut vs) = (Vec::new(), Vec::new(), Vec::new());
    for [q, k, v] in parts {
        qs.push(q);
        ks.push(k);
        vs.push(v);
    }
    Ok([cx.to_heads(qs)?, cx.to_heads(ks)?, cx.to_heads(vs)?])
}
