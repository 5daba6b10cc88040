//! The workload: the op records of one layer on one rank, by component and phase.
//!
//! The list is that of the training step of the DeepSeek-V3 report (arXiv 2412.19437, sections 3.2
//! and 3.3): FP8
//! Linears with their casts and transposes, what the selective recomputation runs again, experts
//! with permutation. For BF16 the casts
//! fall away, for GQA the latents. The routed rows are host values, so that a list can carry the
//! load of a real
//! routing. Records of the real model (`meta`) have the same type and can be timed in their place.

use std::collections::BTreeMap;

use fathom_trace::{Component, DType, Group, GroupKind, OpRecord, Phase, TensorMeta};
use serde_json::{Value, json};

use crate::config::{Precision, Recompute};
use crate::hardware::model::{Attention, Model, Moe};

/// How a layer is cut and fed on one rank.
#[derive(Debug, Clone, PartialEq)]
pub struct LayerContext {
    /// Sequences a micro-batch.
    pub micro_batch: u64,
    /// Tokens a sequence.
    pub seq_len: u64,
    /// Tensor parallelism.
    pub tp: u64,
    /// Context parallelism.
    pub cp: u64,
    /// Expert parallelism.
    pub ep: u64,
    /// GEMM arithmetic.
    pub precision: Precision,
    /// Recomputation.
    pub recompute: Recompute,
    /// Routed load of this rank relative to the mean: forward and backward chunk.
    pub load: (f64, f64),
}

impl LayerContext {
    /// Tokens that this rank's attention sees (before tensor parallelism cuts the norms' share).
    pub fn tokens(&self) -> u64 {
        (self.micro_batch * self.seq_len).div_ceil(self.cp)
    }
}

/// Probability that of `drawn` distinct items out of `all`, none is among `marked`.
pub fn miss_probability(all: u64, marked: u64, drawn: u64) -> f64 {
    if marked + drawn > all {
        return 0.0;
    }
    (0..drawn).map(|i| (all - marked - i) as f64 / (all - i) as f64).product()
}

/// Probability that a token of `moe` visits a place that holds `experts` consecutive experts, whole
/// groups or a part of one,
/// when groups and experts are drawn evenly.
pub fn visit_probability(moe: &Moe, experts: u64) -> f64 {
    let (groups, limited) = (moe.n_expert_groups.max(1), moe.n_limited_groups.max(1));
    let per_group = moe.n_routed_experts / groups;
    let candidates = per_group * limited;
    let k = moe.n_activated_experts;
    if experts < per_group {
        let chosen = limited as f64 / groups as f64;
        return chosen * (1.0 - miss_probability(candidates, experts, k));
    }
    // `held` groups of the place; `j` of them among the chosen ones with hypergeometric
    // probability.
    let held = (experts / per_group).min(groups);
    let choose = |n: u64, r: u64| -> f64 {
        if r > n { 0.0 } else { (0..r).map(|i| (n - i) as f64 / (r - i) as f64).product() }
    };
    (0..=held.min(limited))
        .map(|j| {
            let chance =
                choose(held, j) * choose(groups - held, limited - j) / choose(groups, limited);
            chance * (1.0 - miss_probability(candidates, j * per_group, k))
        })
        .sum()
}

/// Routed rows of one rank: assignments a local expert, and distinct tokens that arrive.
#[derive(Debug, Clone, PartialEq)]
pub struct RoutedRows {
    /// Rows of every local expert.
    pub rows: Vec<u64>,
    /// Distinct tokens.
    pub tokens: u64,
}

/// Balanced routing times `load`.
pub fn routed_rows(moe: &Moe, ctx: &LayerContext, load: f64) -> RoutedRows {
    let local = moe.n_routed_experts.div_ceil(ctx.ep).max(1);
    // With tensor parallelism the ranks of a tp group hold the same tokens once, cut by sequence.
    let tokens = (ctx.tokens() as f64 / ctx.tp as f64) * ctx.ep as f64;
    let expert = tokens * moe.n_activated_experts as f64 / moe.n_routed_experts as f64;
    let distinct = tokens * visit_probability(moe, local);
    RoutedRows {
        rows: vec![(expert * load).round() as u64; local as usize],
        tokens: (distinct * load).round() as u64,
    }
}

/// Collects records of one layer.
struct Builder<'a> {
    ctx: &'a LayerContext,
    records: Vec<OpRecord>,
    component: Component,
    phase: Phase,
}

impl Builder<'_> {
    fn fp8(&self) -> bool {
        self.ctx.precision == Precision::Fp8
    }

    fn at(&mut self, component: Component, phase: Phase) {
        (self.component, self.phase) = (component, phase);
    }

    fn push(
        &mut self,
        op: &str,
        params: BTreeMap<String, Value>,
        flops: f64,
        read: f64,
        written: f64,
    ) {
        self.records.push(OpRecord {
            seq: self.records.len() as u64,
            step: 0,
            rank: 0,
            op: op.to_string(),
            params,
            inputs: Vec::new(),
            outputs: Vec::new(),
            flops: flops as u64,
            bytes_read: read as u64,
            bytes_written: written as u64,
            bytes_sent: 0,
            group: None,
            layer: None,
            component: self.component,
            phase: self.phase,
            micro_batch: None,
        });
    }

    /// A kernel that reads and writes so many bytes for each of `rows x cols` elements.
    fn memory(&mut self, op: &str, rows: u64, cols: u64, read: f64, written: f64) {
        let n = rows as f64 * cols as f64;
        self.push(op, BTreeMap::new(), 0.0, n * read, n * written);
    }

    /// Many small kernels with `bytes` in all.
    fn small(&mut self, op: &str, launches: u64, bytes: f64) {
        let params = BTreeMap::from([("launches".to_string(), json!(launches))]);
        self.push(op, params, 0.0, bytes / 2.0, bytes / 2.0);
    }

    /// Cast to FP8 in tiles of 1x128; nothing in BF16.
    fn quantize(&mut self, rows: u64, cols: u64) {
        if self.fp8() {
            self.memory("quantize_tile", rows, cols, 2.0, 1.0);
            // The scales, transposed for the copy engine.
            self.memory("transpose_scales", rows, cols.div_ceil(128), 4.0, 4.0);
        }
    }

    /// Cast to FP8 in tiles of 128x1 and transpose, for a weight gradient.
    fn quantize_channel(&mut self, rows: u64, cols: u64, bytes_in: f64) {
        if self.fp8() {
            self.memory("quantize_channel", rows, cols, bytes_in, 1.0);
        }
    }

    /// Transpose of an FP8 weight for the input gradient.
    fn transpose_weight(&mut self, rows: u64, cols: u64) {
        if self.fp8() {
            self.memory("transpose", rows, cols, 1.0, 1.0);
        }
    }

    fn gemm(&mut self, m: u64, n: u64, k: u64) {
        let op = if self.fp8() { "gemm_fp8" } else { "gemm_bf16" };
        self.gemm_op(op, m, n, k, &[]);
    }

    fn gemm_op(&mut self, op: &str, m: u64, n: u64, k: u64, groups: &[u64]) {
        let mut params = BTreeMap::from([
            ("m".to_string(), json!(m)),
            ("n".to_string(), json!(n)),
            ("k".to_string(), json!(k)),
        ]);
        let rows: u64 = groups.iter().sum();
        let (mf, nf, kf) = match (groups.is_empty(), self.phase) {
            (true, _) => (m as f64, n as f64, k as f64),
            (false, Phase::W) => (m as f64, n as f64, rows as f64),
            (false, _) => (rows as f64, n as f64, k as f64),
        };
        if !groups.is_empty() {
            params.insert("groups".to_string(), json!(groups));
        }
        let bytes = if op.contains("fp8") { 1.0 } else { 2.0 };
        let out = if self.phase == Phase::W { 8.0 } else { 2.0 };
        self.push(op, params, 2.0 * mf * nf * kf, bytes * (mf * kf + kf * nf), out * mf * nf);
    }

    fn grouped_gemm(&mut self, rows: &[u64], n: u64, k: u64) {
        let op = if self.fp8() { "grouped_gemm_fp8" } else { "grouped_gemm_bf16" };
        self.gemm_op(op, 0, n, k, rows);
    }

    fn grouped_wgrad(&mut self, m: u64, n: u64, rows: &[u64]) {
        let op = if self.fp8() { "grouped_gemm_fp8" } else { "grouped_gemm_bf16" };
        self.gemm_op(op, m, n, 0, rows);
    }

    fn attention(&mut self, model: &Model, backward: bool) {
        let (qk, v) = model.head_dims();
        let heads = self.ctx.micro_batch * model.n_heads / self.ctx.tp;
        // Context parallelism deals the causal square out evenly (zigzag): cp queries' share
        // against all keys.
        let queries = self.ctx.seq_len;
        let heads = heads.div_ceil(self.ctx.cp).max(1);
        let params = BTreeMap::from([
            ("heads".to_string(), json!(heads)),
            ("queries".to_string(), json!(queries)),
            ("keys".to_string(), json!(queries)),
            ("qk_dim".to_string(), json!(qk)),
            ("v_dim".to_string(), json!(v)),
            ("causal".to_string(), json!(true)),
        ]);
        let scores = (heads * queries) as f64 * queries as f64 / 2.0;
        let dims = if backward { 3 * qk + 2 * v } else { qk + v } as f64;
        let io = (heads * queries * (qk + v)) as f64 * 2.0;
        let op = if backward { "attention_backward" } else { "attention" };
        self.push(op, params, 2.0 * scores * dims, io, io);
    }

    /// A collective or send among `size` ranks; `bytes` leave this one.
    fn collective(&mut self, op: &str, kind: GroupKind, size: u64, bytes: f64) {
        if size > 1 {
            self.push(op, BTreeMap::new(), 0.0, bytes, bytes);
            let last = self.records.last_mut().expect("just pushed");
            last.bytes_sent = bytes as u64;
            last.group = Some(Group { kind, size: size as usize });
        }
    }
}

/// The op records of transformer layer `index`: F, B (input gradient with recomputation) and W.
pub fn layer_records(model: &Model, ctx: &LayerContext, index: u64) -> Vec<OpRecord> {
    let mut b = Builder {
        ctx,
        records: Vec::with_capacity(160),
        component: Component::Attention,
        phase: Phase::F,
    };
    attention_forward(&mut b, model);
    match model.moe.filter(|_| model.is_moe_layer(index)) {
        Some(moe) => {
            experts_forward(&mut b, model, &moe);
            experts_backward(&mut b, model, &moe);
            experts_weight(&mut b, model, &moe);
        }
        None => dense_ffn(&mut b, model),
    }
    attention_backward(&mut b, model);
    attention_weight(&mut b, model);
    b.records
}

/// Bytes of the hidden states that a tensor-parallel group gathers or scatters once.
fn sequence_parallel(b: &mut Builder, model: &Model, op: &str) {
    let (tp, t) = (b.ctx.tp, b.ctx.tokens());
    let bytes = 2.0 * (t * model.hidden) as f64 * (tp - 1) as f64 / tp as f64;
    b.collective(op, GroupKind::Tp, tp, bytes);
}

fn attention_forward(b: &mut Builder, model: &Model) {
    b.at(Component::Attention, Phase::F);
    let (t, tp, h) = (b.ctx.tokens(), b.ctx.tp, model.hidden);
    let (_, v) = model.head_dims();
    b.memory("rms_norm", t / tp, h, 2.0, 2.0);
    sequence_parallel(b, model, "all_gather");
    project_inputs(b, model, true);
    context_parallel(b, model);
    b.attention(model, false);
    let out = model.n_heads / tp * v;
    if b.fp8() {
        b.memory("quantize_e5m6", t, out, 2.0, 1.5);
    }
    b.quantize(t, out);
    b.gemm(t, h, out);
    sequence_parallel(b, model, "reduce_scatter");
    b.memory("residual", t / tp, h, 2.0, 2.0);
    b.memory("rms_norm", t / tp, h, 2.0, 2.0);
}

/// Projections to queries, keys and values up to the attention kernel's inputs; `down` is false
/// where the backward
/// recomputes from the latents.
fn project_inputs(b: &mut Builder, model: &Model, down: bool) {
    let (t, tp, h) = (b.ctx.tokens(), b.ctx.tp, model.hidden);
    let heads = model.n_heads / tp;
    match model.attention {
        Attention::Mla {
            q_lora_rank: q,
            kv_lora_rank: kv,
            qk_nope_head_dim: nope,
            qk_rope_head_dim: rope,
            v_head_dim: v,
        } => {
            if down {
                if q > 0 {
                    b.quantize(t, h);
                    b.gemm(t, q, h);
                }
                b.quantize(t, h);
                b.gemm(t, kv + rope, h);
            }
            let (q_in, q_norm) = if q > 0 { (q, q) } else { (h, 0) };
            if q_norm > 0 {
                b.memory("rms_norm", t, q, 2.0, 2.0);
                b.memory("copy", t, q, 2.0, 2.0);
            }
            b.memory("rms_norm", t, kv, 2.0, 2.0);
            b.memory("copy", t, kv, 2.0, 2.0);
            b.quantize(t, q_in);
            b.gemm(t, heads * (nope + rope), q_in);
            b.quantize(t, kv);
            b.gemm(t, heads * (nope + v), kv);
            b.memory("rope", t, rope, 2.0, 2.0);
            b.memory("copy", t, heads * nope, 2.0, 2.0);
            b.memory("broadcast", t, heads * rope, 2.0, 2.0);
            b.memory("rope", t, heads * rope, 2.0, 2.0);
        }
        Attention::Gqa { n_kv_heads, head_dim } => {
            let kv_heads = n_kv_heads.div_ceil(tp);
            if down {
                b.quantize(t, h);
                b.gemm(t, (heads + 2 * kv_heads) * head_dim, h);
                b.memory("rope", t, (heads + kv_heads) * head_dim, 2.0, 2.0);
            }
        }
    }
}

/// Context parallelism passes keys and values (MLA: all heads' after the up-projection) around the
/// ring.
fn context_parallel(b: &mut Builder, model: &Model) {
    let (cp, t) = (b.ctx.cp, b.ctx.tokens());
    let width = match model.attention {
        Attention::Mla { kv_lora_rank, qk_rope_head_dim, .. } => kv_lora_rank + qk_rope_head_dim,
        Attention::Gqa { n_kv_heads, head_dim } => 2 * n_kv_heads.div_ceil(b.ctx.tp) * head_dim,
    };
    let factor = if b.phase == Phase::B { 2.0 } else { 1.0 };
    b.collective("ring_exchange", GroupKind::Cp, cp, factor * 2.0 * (t * width * (cp - 1)) as f64);
}

fn attention_backward(b: &mut Builder, model: &Model) {
    let (t, tp, h) = (b.ctx.tokens(), b.ctx.tp, model.hidden);
    let (qk, v) = model.head_dims();
    let (heads, out) = (model.n_heads / tp, model.n_heads / tp * v);
    b.at(Component::Attention, Phase::B);
    b.memory("residual", t / tp, h, 4.0, 2.0);
    b.memory("rms_norm_backward", t / tp, h, 4.0, 2.0);
    b.memory("residual", t / tp, h, 2.0, 2.0);
    sequence_parallel(b, model, "all_gather");
    if b.ctx.recompute == Recompute::Full {
        b.memory("rms_norm", t / tp, h, 2.0, 2.0);
        sequence_parallel(b, model, "all_gather");
        project_inputs(b, model, true);
        b.attention(model, false);
    }
    if b.fp8() {
        b.memory("dequantize_e5m6", t, out, 1.5, 2.0);
    }
    b.quantize(t, h);
    b.transpose_weight(h, out);
    b.gemm(t, out, h);
    b.quantize_channel(t, out, 2.0);
    b.quantize_channel(t, h, 2.0);
    if b.ctx.recompute == Recompute::Selective {
        project_inputs(b, model, false);
    }
    context_parallel(b, model);
    b.memory("attention_prepare", t, heads * v, 4.0, 0.0);
    b.memory("zero", t, heads * qk, 0.0, 4.0);
    b.attention(model, true);
    b.memory("attention_finish", t, heads * qk, 4.0, 2.0);
    backward_of_projections(b, model);
    b.memory("residual", t / tp, h, 4.0, 2.0);
    b.memory("rms_norm_backward", t / tp, h, 4.0, 2.0);
    sequence_parallel(b, model, "reduce_scatter");
}

fn backward_of_projections(b: &mut Builder, model: &Model) {
    let (t, tp, h) = (b.ctx.tokens(), b.ctx.tp, model.hidden);
    let heads = model.n_heads / tp;
    match model.attention {
        Attention::Mla {
            q_lora_rank: q,
            kv_lora_rank: kv,
            qk_nope_head_dim: nope,
            qk_rope_head_dim: rope,
            v_head_dim: v,
        } => {
            let (q_in, q_out, kv_out) =
                (if q > 0 { q } else { h }, heads * (nope + rope), heads * (nope + v));
            b.memory("rope", t, heads * rope, 2.0, 2.0);
            b.transpose_weight(q_out, q_in);
            b.quantize(t, q_out);
            b.gemm(t, q_in, q_out);
            b.memory("reduce", t, heads * rope, 2.0, 0.0);
            b.memory("copy", t, heads * nope, 2.0, 2.0);
            b.memory("copy", t, heads * v, 2.0, 2.0);
            b.transpose_weight(kv_out, kv);
            b.quantize(t, kv_out);
            b.gemm(t, kv, kv_out);
            b.quantize_channel(t, kv_out, 2.0);
            b.quantize_channel(t, kv, 2.0);
            b.quantize_channel(t, q_out, 2.0);
            b.quantize_channel(t, q_in, 2.0);
            b.small("rms_norm_backward", 6, 3.0 * 2.0 * (t * (q + kv)) as f64);
            b.small("copy", 5, 5.0 * 4.0 * (t * (kv + rope)) as f64);
            b.memory("rms_norm", t / tp, h, 2.0, 2.0);
            b.quantize(t, kv + rope);
            b.transpose_weight(kv + rope, h);
            b.gemm(t, h, kv + rope);
            b.quantize_channel(t, h, 2.0);
            b.quantize_channel(t, kv + rope, 2.0);
            if q > 0 {
                b.quantize(t, q);
                b.transpose_weight(q, h);
                b.gemm(t, h, q);
                b.quantize_channel(t, h, 2.0);
                b.quantize_channel(t, q, 2.0);
            }
        }
        Attention::Gqa { n_kv_heads, head_dim } => {
            let width = (heads + 2 * n_kv_heads.div_ceil(tp)) * head_dim;
            b.memory("rope", t, width, 2.0, 2.0);
            b.transpose_weight(width, h);
            b.quantize(t, width);
            b.gemm(t, h, width);
            b.quantize_channel(t, width, 2.0);
            b.quantize_channel(t, h, 2.0);
        }
    }
}

fn attention_weight(b: &mut Builder, model: &Model) {
    b.at(Component::Attention, Phase::W);
    let (t, tp, h) = (b.ctx.tokens(), b.ctx.tp, model.hidden);
    let (_, v) = model.head_dims();
    let heads = model.n_heads / tp;
    b.gemm(h, heads * v, t);
    match model.attention {
        Attention::Mla {
            q_lora_rank: q,
            kv_lora_rank: kv,
            qk_nope_head_dim: nope,
            qk_rope_head_dim: rope,
            v_head_dim: v,
        } => {
            b.gemm(heads * (nope + v), kv, t);
            b.gemm(heads * (nope + rope), if q > 0 { q } else { h }, t);
            b.gemm(kv + rope, h, t);
            if q > 0 {
                b.gemm(q, h, t);
            }
        }
        Attention::Gqa { n_kv_heads, head_dim } => {
            b.gemm((heads + 2 * n_kv_heads.div_ceil(tp)) * head_dim, h, t);
        }
    }
}

fn dense_ffn(b: &mut Builder, model: &Model) {
    let (t, tp, h) = (b.ctx.tokens(), b.ctx.tp, model.hidden);
    let f = model.intermediate / tp;
    b.at(Component::Mlp, Phase::F);
    sequence_parallel(b, model, "all_gather");
    b.quantize(t, h);
    ffn_forward(b, t, h, f);
    sequence_parallel(b, model, "reduce_scatter");
    b.at(Component::Mlp, Phase::B);
    sequence_parallel(b, model, "all_gather");
    if b.ctx.recompute == Recompute::Full {
        sequence_parallel(b, model, "all_gather");
        b.quantize(t, h);
        b.gemm(t, 2 * f, h);
    }
    b.quantize(t, h);
    ffn_backward(b, t, h, f);
    sequence_parallel(b, model, "reduce_scatter");
    b.at(Component::Mlp, Phase::W);
    b.gemm(h, f, t);
    b.gemm(2 * f, h, t);
}

/// A SwiGLU FFN of width `f` whose input is quantised already; the FP8 copy of its inner input is
/// kept.
fn ffn_forward(b: &mut Builder, t: u64, h: u64, f: u64) {
    b.gemm(t, 2 * f, h);
    let out = if b.fp8() { 1.0 } else { 2.0 };
    b.memory("swiglu", t, f, 4.0, out);
    b.gemm(t, h, f);
    if b.fp8() {
        b.memory("quantize_keep", t, 2 * f, 2.0, 1.0);
    }
}

/// Its input gradient; the output's gradient is quantised already.
fn ffn_backward(b: &mut Builder, t: u64, h: u64, f: u64) {
    if b.fp8() {
        b.memory("dequantize", t, 2 * f, 1.0, 2.0);
    }
    b.transpose_weight(f, h);
    b.gemm(t, f, h);
    b.quantize_channel(t, h, 2.0);
    if b.fp8() {
        b.memory("quantize_channel", t, f, 4.0, 1.0);
    }
    b.memory("swiglu_backward", t, f, 6.0, 4.0);
    if b.fp8() {
        b.memory("dequantize", t, h, 1.0, 2.0);
    }
    b.transpose_weight(2 * f, h);
    b.quantize(t, 2 * f);
    b.gemm(t, h, 2 * f);
    b.quantize_channel(t, 2 * f, 2.0);
    b.quantize_channel(t, h, 2.0);
}

/// Bytes of a token on its way to the experts: FP8 with a scale per 128, or BF16; with its routing.
pub fn dispatch_token_bytes(model: &Model, precision: Precision) -> f64 {
    let h = model.hidden as f64;
    match precision {
        Precision::Fp8 => h + 4.0 * (model.hidden.div_ceil(128)) as f64,
        Precision::Bf16 => 2.0 * h,
    }
}

fn all_to_all(b: &mut Builder, model: &Model, moe: &Moe, op: &str, token_bytes: f64) {
    let tokens = b.ctx.tokens() as f64 / b.ctx.tp as f64;
    let local = moe.n_routed_experts.div_ceil(b.ctx.ep);
    let copies = b.ctx.ep as f64 * visit_probability(moe, local);
    b.collective(op, GroupKind::Ep, b.ctx.ep, tokens * copies * token_bytes);
    if b.ctx.ep > 1 {
        let last = b.records.last_mut().expect("the all-to-all");
        let shape = vec![tokens as usize, model.hidden as usize];
        let dtype =
            if token_bytes < 2.0 * model.hidden as f64 { DType::F8E4M3 } else { DType::BF16 };
        last.inputs.push(TensorMeta { role: "x".to_string(), dtype, shape });
    }
}

fn experts_forward(b: &mut Builder, model: &Model, moe: &Moe) {
    let (t, tp, h, e) = (b.ctx.tokens(), b.ctx.tp, model.hidden, moe.n_routed_experts);
    let ts = t / tp;
    b.at(Component::Dispatch, Phase::F);
    b.gemm_op("gemm_bf16", ts, e, h, &[]);
    // Radix selection of groups and experts: 16 passes of two bits over the scores, twice.
    b.memory("top_k", ts, e, 2.0 * 16.0 * 4.0, 0.0);
    b.small("router", 36, 12.0 * 8.0 * (ts * e) as f64);
    b.quantize(ts, h);
    let bytes = dispatch_token_bytes(model, b.ctx.precision);
    all_to_all(b, model, moe, "dispatch", bytes);
    b.at(Component::Mlp, Phase::F);
    let routed = routed_rows(moe, b.ctx, b.ctx.load.0);
    let f = moe.moe_intermediate;
    let fp8 = b.fp8();
    let rows: u64 = padded(&routed.rows);
    if moe.n_shared_experts > 0 {
        b.gemm(ts, 2 * f * moe.n_shared_experts, h);
    }
    // Counting and mapping of the rows run on one CTA an expert, over the routing indices of what
    // arrived.
    expert_index(b, routed.tokens * moe.n_activated_experts, routed.rows.len() as u64);
    permute(b, "permute", routed.tokens, rows, h, if fp8 { 1.03 } else { 2.0 });
    b.transpose_weight(routed.rows.len() as u64 * 2 * f, h);
    b.grouped_gemm(&routed.rows, 2 * f, h);
    b.memory("swiglu", rows, f, 4.0, if fp8 { 1.0 } else { 2.0 });
    b.transpose_weight(routed.rows.len() as u64 * f, h);
    b.grouped_gemm(&routed.rows, h, f);
    permute(b, "unpermute", routed.tokens, rows, h, 2.0);
    if moe.n_shared_experts > 0 {
        let fs = f * moe.n_shared_experts;
        b.memory("swiglu", ts, fs, 4.0, if fp8 { 1.0 } else { 2.0 });
        b.gemm(ts, h, fs);
        if fp8 {
            b.memory("quantize_keep", ts, 2 * fs, 2.0, 1.0);
        }
    }
    if fp8 {
        b.memory("quantize_keep", rows, 2 * f, 2.0, 1.0);
    }
    b.at(Component::Combine, Phase::F);
    all_to_all(b, model, moe, "combine", 2.0 * h as f64);
}

/// Rows with every expert's share padded to whole tiles.
fn padded(rows: &[u64]) -> u64 {
    rows.iter().map(|r| r.next_multiple_of(128)).sum()
}

fn expert_index(b: &mut Builder, entries: u64, experts: u64) {
    let params = BTreeMap::from([
        ("max_sms".to_string(), json!(experts)),
        ("launches".to_string(), json!(2)),
    ]);
    // One pass to count, three to place; indices of 8 bytes.
    b.push("expert_index", params, 0.0, 4.0 * 8.0 * entries as f64, 0.0);
}

fn permute(b: &mut Builder, op: &str, tokens: u64, rows: u64, h: u64, bytes: f64) {
    let n = (tokens + rows) as f64 * h as f64 * bytes;
    b.push(op, BTreeMap::new(), 0.0, n / 2.0, n / 2.0);
}

fn experts_backward(b: &mut Builder, model: &Model, moe: &Moe) {
    let (t, tp, h, e) = (b.ctx.tokens(), b.ctx.tp, model.hidden, moe.n_routed_experts);
    let ts = t / tp;
    let (fp8, f) = (b.fp8(), moe.moe_intermediate);
    b.at(Component::Combine, Phase::B);
    b.quantize(ts, h);
    let bytes = dispatch_token_bytes(model, b.ctx.precision);
    all_to_all(b, model, moe, "dispatch", bytes);
    b.at(Component::Mlp, Phase::B);
    if moe.n_shared_experts > 0 {
        ffn_backward(b, ts, h, f * moe.n_shared_experts);
    }
    let routed = routed_rows(moe, b.ctx, b.ctx.load.1);
    let rows = padded(&routed.rows);
    if b.ctx.recompute == Recompute::Full {
        b.grouped_gemm(&routed.rows, 2 * f, h);
    }
    if fp8 {
        b.memory("dequantize", rows, 2 * f, 1.0, 2.0);
    }
    permute(b, "permute", routed.tokens, rows, h, if fp8 { 1.03 } else { 2.0 });
    b.grouped_gemm(&routed.rows, f, h);
    // SwiGLU forward again and backward, then the gradient of the routing weights.
    b.memory("swiglu_backward", rows, f, 6.0, 6.0);
    b.memory("swiglu_weight_backward", rows, f, 4.0, 0.0);
    b.quantize_channel(rows, f, 2.0);
    if b.ctx.recompute == Recompute::Selective {
        b.memory("rms_norm", ts, h, 2.0, 2.0);
        b.quantize(ts, h);
    }
    b.quantize(rows, 2 * f);
    b.grouped_gemm(&routed.rows, h, 2 * f);
    permute(b, "unpermute", routed.tokens, rows, h, 2.0);
    b.quantize_channel(rows, 2 * f, 2.0);
    b.at(Component::Dispatch, Phase::B);
    all_to_all(b, model, moe, "combine", 2.0 * h as f64);
    b.small("router", 26, 12.0 * 8.0 * (ts * e) as f64);
    b.gemm_op("gemm_bf16", ts, h, e, &[]);
    b.gemm_op("gemm_bf16", e, h, ts, &[]);
}

fn experts_weight(b: &mut Builder, model: &Model, moe: &Moe) {
    b.at(Component::Mlp, Phase::W);
    let (h, f) = (model.hidden, moe.moe_intermediate);
    let ts = b.ctx.tokens() / b.ctx.tp;
    let routed = routed_rows(moe, b.ctx, b.ctx.load.1);
    let rows = padded(&routed.rows);
    if moe.n_shared_experts > 0 {
        let fs = f * moe.n_shared_experts;
        b.gemm(h, fs, ts);
        b.gemm(2 * fs, h, ts);
    }
    // The gradients of the outputs and the inputs of the experts, from tiles of 1x128 to 128x1.
    b.quantize_channel(rows, h, 1.0);
    b.grouped_wgrad(h, f, &routed.rows);
    b.quantize_channel(rows, h, 1.0);
    b.grouped_wgrad(2 * f, h, &routed.rows);
}
