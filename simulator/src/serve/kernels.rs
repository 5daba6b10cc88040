//! From the op records of an iteration to seconds of the parts of a layer, by number of tokens.
//!
//! Products become the GEMMs of DeepGEMM (FP8) or of a library (BF16). Whatever lies between two
//! products and only moves bytes is one fused kernel, as inference engines write it: it reads what
//! its first op reads and writes what each op writes. Casts that only a backward would read are
//! left out. The attention itself is no part: it depends on caches, see [`Cores`].

use fathom_config::{AttentionConfig, ModelConfig};
use fathom_trace::{Component, DType, GroupKind, OpClass, OpRecord, TensorMeta};
use serde_json::Value;

use super::ops::{InferenceOps, Iteration, cut};
use crate::config::Precision;
use crate::error::SimError;
use crate::hardware::cluster::Cluster;
use crate::kernel_time::{AttentionShape, GemmKind, GemmShape, KernelModel, MemoryClass};
use crate::network::collectives::{Algorithm, Collective, GroupShape, time_s};

/// How a pool's ranks cut the model.
#[derive(Debug, Clone, PartialEq)]
pub struct Cut {
    /// Tensor-parallel ranks of the attention.
    pub tp: u64,
    /// Ranks over which the experts lie; 1 cuts every expert by `tp` instead.
    pub ep: u64,
    /// Experts that a GPU holds, copies counted.
    pub expert_slots: u64,
    /// Routed choices of a token, the shared expert among them where it is routed.
    pub choices: u64,
    /// Whether the shared expert is one of the routed ones, and no part by itself.
    pub shared_is_routed: bool,
    /// Arithmetic of the GEMMs.
    pub precision: Precision,
    /// Whether prompts are read (whole heads) or tokens decoded (absorbed form).
    pub prefill: bool,
}

/// Seconds of the parts of the layers on one micro-batch; a part is compute only, but for
/// tensor-parallel collectives that it waits for.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Parts {
    /// Of a layer with experts: norm, projections, rotation, up to the attention.
    pub before_s: f64,
    /// From the attention's output to the router's choice.
    pub after_s: f64,
    /// The shared expert.
    pub shared_s: f64,
    /// The routed experts of this GPU, what arrives and leaves handled.
    pub experts_s: f64,
    /// Of a dense layer: all but the attention itself.
    pub dense_s: f64,
    /// Embedding, final norm, head.
    pub head_s: f64,
    /// A prediction module: its layer but for attention and exchanges, its pass of the head.
    pub draft_s: f64,
}

impl Parts {
    fn array(&self) -> [f64; 7] {
        let Parts { before_s, after_s, shared_s, experts_s, dense_s, head_s, draft_s } = *self;
        [before_s, after_s, shared_s, experts_s, dense_s, head_s, draft_s]
    }

    fn of([before_s, after_s, shared_s, experts_s, dense_s, head_s, draft_s]: [f64; 7]) -> Parts {
        Parts { before_s, after_s, shared_s, experts_s, dense_s, head_s, draft_s }
    }
}

/// [`Parts`] by tokens of a micro-batch, linear between the counts that were recorded.
#[derive(Debug, Clone, PartialEq)]
pub struct PartTable {
    points: Vec<(f64, Parts)>,
}

/// Tokens at which a table is recorded.
const DECODE_TOKENS: [u64; 15] =
    [1, 8, 16, 32, 48, 64, 96, 128, 160, 192, 256, 384, 512, 1024, 4096];
const PREFILL_TOKENS: [u64; 11] = [1, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768];

impl PartTable {
    /// Records and times the iteration at every point of the table.
    ///
    /// # Errors
    /// Those of the source of records.
    pub fn new(
        source: &dyn InferenceOps,
        model: &ModelConfig,
        cluster: &Cluster,
        gpu: &KernelModel,
        cut: &Cut,
    ) -> Result<PartTable, SimError> {
        let counts = if cut.prefill { &PREFILL_TOKENS[..] } else { &DECODE_TOKENS[..] };
        let timer = Timer { model, cluster, gpu, cut };
        let point = |&tokens: &u64| Ok((tokens as f64, timer.parts(source, tokens)?));
        Ok(PartTable { points: counts.iter().map(point).collect::<Result<_, SimError>>()? })
    }

    /// The parts of a micro-batch of `tokens`; beyond the last point in proportion.
    pub fn at(&self, tokens: f64) -> Parts {
        if tokens <= 0.0 {
            return Parts::default();
        }
        let (first, last) = (&self.points[0], &self.points[self.points.len() - 1]);
        if tokens <= first.0 {
            return first.1;
        }
        let next = self.points.iter().position(|p| p.0 >= tokens);
        let Some(next) = next else {
            return Parts::of(last.1.array().map(|s| s * tokens / last.0));
        };
        let ((x0, a), (x1, b)) = (&self.points[next - 1], &self.points[next]);
        let share = (tokens - x0) / (x1 - x0);
        let (a, b) = (a.array(), b.array());
        Parts::of(std::array::from_fn(|i| a[i] + share * (b[i] - a[i])))
    }
}

/// Times records on one GPU.
struct Timer<'a> {
    model: &'a ModelConfig,
    cluster: &'a Cluster,
    gpu: &'a KernelModel,
    cut: &'a Cut,
}

/// Bytes that wait to be moved by one fused kernel, and how.
#[derive(Default)]
struct Run {
    bytes: f64,
    class: Option<MemoryClass>,
}

impl Timer<'_> {
    fn parts(&self, source: &dyn InferenceOps, tokens: u64) -> Result<Parts, SimError> {
        let (model, [dense, moe, mtp]) = cut(self.model);
        let tp = self.cut.tp;
        let record = |tp: u64, tokens: u64| {
            let ep = if model.moe.is_some() && self.cut.ep > 1 { 2 } else { 1 };
            let (model, precision) = (model.clone(), self.cut.precision);
            let it = Iteration { model, tokens, tp, ep, precision };
            if self.cut.prefill { source.prefill(&it) } else { source.decode(&it) }
        };
        let whole = record(tp, tokens)?;
        // With experts on several ranks the routed half runs on each rank's own part of the tokens.
        let own = if self.cut.ep > 1 { tokens.div_ceil(tp) } else { tokens };
        let part = if tp > 1 && self.cut.ep > 1 { record(1, own)? } else { whole.clone() };
        let half = |r: &OpRecord| {
            matches!(r.component, Component::Dispatch | Component::Mlp | Component::Combine)
        };
        let of = |layer: Option<usize>| -> Vec<&OpRecord> {
            let Some(_) = layer else { return Vec::new() };
            let routed = layer != dense && self.cut.ep > 1;
            let first = whole.iter().filter(|r| r.layer == layer && !(routed && half(r)));
            first.chain(part.iter().filter(|r| r.layer == layer && routed && half(r))).collect()
        };
        let sum = |parts: [f64; 4]| parts.iter().sum::<f64>();
        let [before_s, after_s, shared_s, experts_s] = self.layer(&of(moe), own, tokens);
        let outside = |r: &&OpRecord| {
            r.layer.is_none() && matches!(r.component, Component::Head | Component::Embedding)
        };
        let head: Vec<&OpRecord> = whole.iter().filter(outside).collect();
        // A module looks its tokens up in the same table; its head is among its layer's records.
        let head_s = self.run(&head, tokens);
        Ok(Parts {
            before_s,
            after_s,
            shared_s,
            experts_s,
            dense_s: sum(self.layer(&of(dense), own, tokens)),
            head_s,
            draft_s: if self.cut.prefill { 0.0 } else { sum(self.layer(&of(mtp), own, tokens)) },
        })
    }

    /// Seconds before the attention, after it, of the shared expert, of the routed ones.
    fn layer(&self, records: &[&OpRecord], own: u64, tokens: u64) -> [f64; 4] {
        let is_core =
            |r: &OpRecord| matches!(r.class, OpClass::Attention) || CORES.contains(&r.op.as_str());
        let core = records.iter().position(|r| is_core(r)).unwrap_or(records.len());
        let mut groups: [Vec<&OpRecord>; 4] = Default::default();
        for (i, &r) in records.iter().enumerate() {
            let part = match r.component {
                _ if is_core(r) => continue,
                Component::Mlp if self.is_routed(r, own) => 3,
                Component::Mlp => 2,
                Component::Combine if r.class == OpClass::Combine => 3,
                _ if r.class == OpClass::Dispatch => 3,
                _ if i < core => 0,
                _ => 1,
            };
            if part == 2 && self.cut.shared_is_routed {
                continue;
            }
            groups[part].push(r);
        }
        let summed = |g: &[&OpRecord]| g.iter().any(|r| is_collective(r));
        let (after, mlp) = (summed(&groups[1]), summed(&groups[2]) || summed(&groups[3]));
        let cut_experts = self.cut.ep == 1 && !groups[3].is_empty();
        let mut seconds = groups.map(|g| self.run(&g, own));
        // What the record of one rank leaves out: the sums over a tensor-parallel group behind the
        // attention, and behind experts that are cut.
        if self.cut.tp > 1 && !records.is_empty() {
            let all = self
                .all_reduce_s(self.cut.tp, 2.0 * (tokens as usize * self.model.hidden_size) as f64);
            seconds[1] += if after { 0.0 } else { all };
            seconds[3] += if cut_experts && !mlp { all } else { 0.0 };
        }
        seconds
    }

    /// With sequence parallelism its two halves stand before and behind the norms.
    fn all_reduce_s(&self, ranks: u64, bytes: f64) -> f64 {
        let shape = GroupShape::strided(ranks, 1, self.cluster.gpus_per_node);
        time_s(self.cluster, Collective::AllReduce, Algorithm::Hierarchical, shape, bytes)
    }

    fn is_routed(&self, r: &OpRecord, own: u64) -> bool {
        r.class == OpClass::GroupedGemm
            || r.inputs.first().is_some_and(|t| rows(t) != own)
            || r.inputs.iter().any(|t| t.role == "weights" || t.role == "gates")
    }

    /// Seconds of records that follow each other on one stream.
    fn run(&self, records: &[&OpRecord], own: u64) -> f64 {
        let (mut seconds, mut run) = (0.0, Run::default());
        for (i, r) in records.iter().enumerate() {
            let product = self.product(r, own);
            if let Some(product) = product {
                seconds += self.flush(&mut run) + self.gpu.constants.gap_s + product;
            } else if !self.only_for_backward(r, &records[i + 1..]) {
                self.add(&mut run, r, own);
            }
        }
        seconds + self.flush(&mut run)
    }

    /// Seconds of a product or a collective; none for what only moves bytes.
    fn product(&self, r: &OpRecord, own: u64) -> Option<f64> {
        if is_collective(r) {
            let bytes = r.inputs.first().map_or(0.0, |t| t.bytes() as f64);
            return Some(self.all_reduce_s(self.cut.tp, bytes));
        }
        let a = r.inputs.first()?;
        match r.class {
            OpClass::Gemm => {
                let b = r.inputs.iter().find(|t| t.role == "b")?;
                let head = r.layer.is_none() || rows(b) == self.model.vocab_size as u64;
                let n = if head { rows(b).div_ceil(self.cut.tp) } else { rows(b) };
                Some(self.gemm(&GemmShape::new(rows(a), n, columns(a)), a.dtype))
            }
            // The head with its loss stands for the logits of each prompt's last token.
            OpClass::Loss => {
                let w = r.inputs.iter().find(|t| t.role == "weight")?;
                let n = rows(w).div_ceil(self.cut.tp);
                Some(self.gemm(&GemmShape::new(1, n, columns(a)), DType::BF16))
            }
            OpClass::GroupedGemm => {
                let b = r.inputs.iter().find(|t| t.role == "b")?;
                let slots = self.cut.expert_slots.max(1);
                let rows = (own * self.cut.choices).div_ceil(slots);
                let n = b.shape[b.shape.len() - 2] as u64;
                let held = slots.min(own * self.cut.choices).max(1) as usize;
                // Experts that are not spread are cut: by columns going up, by rows coming down.
                let up = columns(a) == self.model.hidden_size as u64;
                let parts = if self.cut.ep == 1 { self.cut.tp } else { 1 };
                let (n, k) = if up {
                    (n.div_ceil(parts), columns(a))
                } else {
                    (n, columns(a).div_ceil(parts))
                };
                Some(self.gemm(&GemmShape::grouped_m(vec![rows; held], n, k), a.dtype))
            }
            // The absorbed products, a GEMM a head.
            OpClass::Decode if !CORES.contains(&r.op.as_str()) => {
                let size = |key: &str| r.params.get(key).and_then(Value::as_u64).unwrap_or(1);
                let rank = columns(r.inputs.iter().find(|t| t.role == "w")?);
                let inner = size(if r.op == "mla_absorb_query" { "nope" } else { "v" });
                let heads = vec![rows(a); size("heads") as usize];
                Some(self.gemm(&GemmShape::grouped_m(heads, rank, inner), DType::BF16))
            }
            _ => None,
        }
    }

    fn gemm(&self, shape: &GemmShape, operand: DType) -> f64 {
        if operand.size() == 1 {
            self.gpu.deep_gemm(shape).seconds
        } else {
            self.gpu.gemm_best_block(shape, GemmKind::Bf16).seconds
        }
    }

    /// A cast whose codes no product or exchange of the layer reads.
    fn only_for_backward(&self, r: &OpRecord, later: &[&OpRecord]) -> bool {
        let Some(out) = r.outputs.first().filter(|_| r.op == crate::lowering::CAST) else {
            return false;
        };
        let reads = |l: &&OpRecord| {
            let same = |t: &TensorMeta| t.dtype == out.dtype && columns(t) == columns(out);
            l.inputs.iter().any(same)
        };
        // The experts' input is dispatched, which another part does.
        columns(out) != self.model.hidden_size as u64 && !later.iter().any(reads)
    }

    fn add(&self, run: &mut Run, r: &OpRecord, own: u64) {
        let written = r.bytes_written as f64;
        let (bytes, class) = match r.class {
            // Rows of tables, not the tables.
            OpClass::Gather => (2.0 * written, MemoryClass::Stream),
            OpClass::Routing | OpClass::Row => (written, MemoryClass::Row),
            OpClass::DispatchPlan => (written, MemoryClass::Stream),
            OpClass::Rotation => (written / 3.0, MemoryClass::Row),
            OpClass::Convert => (written, MemoryClass::Convert),
            // What arrives is copied to its expert's rows, what leaves is summed to a row a token.
            OpClass::Dispatch | OpClass::Combine => {
                (r.bytes_read as f64 + written, MemoryClass::Stream)
            }
            _ => (written, MemoryClass::Stream),
        };
        let first = if run.class.is_none() && r.class != OpClass::Gather {
            r.inputs
                .iter()
                .filter(|t| rows(t) >= own.min(rows(&r.inputs[0])))
                .map(TensorMeta::bytes)
                .sum()
        } else {
            0
        };
        run.bytes += bytes + first as f64;
        let slower = |a: MemoryClass, b: MemoryClass| {
            let share = |c: MemoryClass| self.gpu.memory(1e9, c, None);
            if share(a) >= share(b) { a } else { b }
        };
        run.class = Some(run.class.map_or(class, |c| slower(c, class)));
        // Sending and receiving are kernels of their own.
        if matches!(r.class, OpClass::Dispatch | OpClass::Combine) && r.outputs[0].dtype.size() < 4
        {
            run.bytes += 2.0 * self.gpu.constants.gap_s * self.gpu.gpu.memory_bytes_per_s;
        }
    }

    fn flush(&self, run: &mut Run) -> f64 {
        let Run { bytes, class } = std::mem::take(run);
        class.map_or(0.0, |c| self.gpu.constants.gap_s + self.gpu.memory(bytes, c, None))
    }
}

/// A sum over a tensor-parallel group.
fn is_collective(r: &OpRecord) -> bool {
    r.group.is_some_and(|g| g.kind == GroupKind::Tp && g.size > 1)
}

/// The attention of decoding, whose time depends on the caches.
const CORES: [&str; 2] = ["attention_latent", "attention_cached"];

fn rows(t: &TensorMeta) -> u64 {
    match t.shape.as_slice() {
        [.., rows, _] => *rows as u64,
        _ => t.shape.first().map_or(0, |&n| n as u64),
    }
}

fn columns(t: &TensorMeta) -> u64 {
    t.shape.last().map_or(0, |&n| n as u64)
}

/// Seconds of the attention itself a layer, by what the caches hold.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Cores {
    /// Of decoding: a new token against one key, on the tensor cores.
    pub token_key_s: f64,
    /// Of decoding: reading one key and value.
    pub key_s: f64,
    /// Of a prompt: a query against one key.
    pub query_key_s: f64,
    /// Of a prompt: making keys and values of a cached token's latent again.
    pub context_s: f64,
    /// Of either: a kernel that does nothing.
    pub launch_s: f64,
}

/// Rows of queries that attention multiplies at once when decoding, filled or not (FlashMLA).
const DECODE_ROWS: u64 = 64;

impl Cores {
    /// The attention of `model` with heads cut by `tp`; a request decodes `drafts` + 1 tokens at
    /// once, and a cached element takes `kv_bytes`.
    pub fn new(
        gpu: &KernelModel,
        model: &ModelConfig,
        tp: u64,
        drafts: u64,
        kv_bytes: f64,
    ) -> Cores {
        let heads = (model.heads as u64).div_ceil(tp);
        let (qk, v) = model.head_dims();
        let launch_s = gpu.constants.gap_s + gpu.constants.ramp_s;
        let per = |queries: u64, keys: u64, qk_dim: u64, v_dim: u64| {
            let shape =
                AttentionShape { heads: 1 << 10, queries, keys, qk_dim, v_dim, causal: false };
            let busy = gpu.attention(&shape, false) - gpu.constants.ramp_s;
            busy / (1u64 << 10) as f64 / queries as f64 / keys as f64
        };
        let query_key_s = heads as f64 * per(1024, 1024, qk as u64, v as u64);
        // Heads that share keys fill the rows together.
        let (stored, shared_by, kv_heads, qk_dim, v_dim) = match model.attention {
            AttentionConfig::Mla { kv_lora_rank, qk_rope_head_dim, .. } => {
                let width = (kv_lora_rank + qk_rope_head_dim) as u64;
                (width, heads, 1, width, kv_lora_rank as u64)
            }
            AttentionConfig::Gqa { kv_heads, head_dim } => {
                let held = (kv_heads as u64).div_ceil(tp);
                let d = head_dim as u64;
                (2 * held * d, heads.div_ceil(held), held, d, d)
            }
        };
        let rows = (shared_by * (drafts + 1)).next_multiple_of(DECODE_ROWS) * kv_heads;
        let token_key_s = rows as f64 * per(128, 8192, qk_dim, v_dim) / (drafts + 1) as f64;
        let bytes = stored as f64 * kv_bytes;
        let key_s = gpu.memory(1e9 * bytes, MemoryClass::Stream, None) / 1e9;
        let context_s = match model.attention {
            AttentionConfig::Mla { kv_lora_rank, qk_nope_head_dim, v_head_dim, .. } => {
                let n = heads * (qk_nope_head_dim + v_head_dim) as u64;
                let shape = GemmShape::new(1 << 14, n, kv_lora_rank as u64);
                let moved = (4 * n) as f64 * (1u64 << 14) as f64;
                let copy = gpu.memory(moved, MemoryClass::Convert, None);
                (gpu.deep_gemm(&shape).seconds + copy) / (1u64 << 14) as f64
            }
            AttentionConfig::Gqa { .. } => 0.0,
        };
        Cores { token_key_s, key_s, query_key_s, context_s, launch_s }
    }

    /// Seconds of decoding `tokens_a_request` new tokens against `keys` cached keys in all.
    pub fn decode_s(&self, keys: f64, tokens_a_request: f64) -> f64 {
        if keys <= 0.0 {
            return 0.0;
        }
        self.launch_s + (keys * tokens_a_request * self.token_key_s).max(keys * self.key_s)
    }

    /// Seconds of prompts whose queries meet `pairs` keys in all, `context` of them cached tokens.
    pub fn prefill_s(&self, pairs: f64, context: f64) -> f64 {
        if pairs <= 0.0 {
            return 0.0;
        }
        self.launch_s + pairs * self.query_key_s + context * self.context_s
    }
}
