//! From op records to kernels: which kernels a GPU library launches for an op, and where they run.
//!
//! An op is lowered by its class ([`OpClass`]), which its record states; a new op of a known class
//! is timed without a change here, a new class does not compile before `Layer::lower` says what
//! it becomes. The sizes are the record's; nothing is added that the op does not ask for. Three
//! things differ between an op and its kernels:
//!
//! - An exchange (`dispatch`, `combine`) leaves the network's part to [`crate::network`]; the rows
//!   it moves inside the GPU (permutation, mapping) are kernels of the experts' half.
//! - Some ops are several kernels: the router's selection, attention's preparation in the backward,
//!   the head's three products.
//! - Operands of weight gradients are cast where their values are at hand: with the input-backward.
//!   Only the experts' rows, which are re-tiled from what the dispatch brought, wait for the
//!   weight-backward. This is where the published profile's kernels stand.

use std::borrow::Cow;

use fathom_trace::{Component, DType, Group, GroupKind, OpClass, OpRecord, Phase, TensorMeta};
use serde_json::Value;

use crate::config::{LoraTarget, Precision, Recompute, Scenario};
use crate::error::SimError;
use crate::kernel_time::{AttentionShape, GemmKind, GemmShape, GroupedBy, MemoryClass, Work};
use crate::times::LayerKind;
use crate::workload::{LayerContext, distinct_tokens};
use fathom_config::{AttentionConfig, ModelConfig};

/// One kernel, or several alike.
#[derive(Debug, Clone, PartialEq)]
pub struct Kernel {
    /// The op's name, with what part of it this is where it has several.
    pub op: String,
    /// Sizes, as tables of measured times name them.
    pub shape: String,
    /// Part of the layer.
    pub component: Component,
    /// F, B or W.
    pub phase: Phase,
    /// What it asks of the GPU.
    pub work: Work,
    /// Bytes through the memory bus.
    pub bytes: f64,
    /// Whether its time grows with the rows that the experts get.
    pub routed: bool,
    /// Whether it serves a weight's gradient alone: nobody launches it where weights are frozen.
    pub of_weights: bool,
}

impl Kernel {
    /// Whether it casts operands of products, and nothing else.
    pub fn is_cast(&self) -> bool {
        self.op == CAST || self.op == RETILING
    }

    /// The kernel as the scenario's software launches it; `None` for one whose work another does,
    /// or nobody.
    pub fn under(&self, s: &Scenario) -> Option<Cow<'_, Kernel>> {
        let (stack, frozen) = (&s.stack, s.lora.is_some());
        if self.of_weights && frozen {
            return None;
        }
        let Work::Memory { bytes, class, launches, max_sms } = self.work else {
            return Some(Cow::Borrowed(self));
        };
        let with = |bytes: f64, launches: u64| {
            let work = Work::Memory { bytes, class, launches, max_sms };
            Some(Cow::Owned(Kernel { work, bytes, ..self.clone() }))
        };
        if self.routed && stack.fused_experts {
            // The products read and write what these would.
            if self.op.starts_with("swiglu") {
                return None;
            }
            if self.is_cast() {
                return with(bytes / 3.0, launches);
            }
        }
        if self.is_cast() && stack.casts_both_ways && !frozen {
            // Of two bytes read and one written, twice, two reads and two writes are left.
            return with(bytes * 2.0 / 3.0, launches);
        }
        if !stack.fused_router {
            return Some(Cow::Borrowed(self));
        }
        if self.op.ends_with(ROUTER_CHOICE) {
            return with(2.0 * bytes / CHOICE_PASSES, 1);
        }
        if self.op.ends_with(ROUTER_STEPS) {
            let scores = bytes / steps_passes(launches);
            return if self.phase == Phase::F { None } else { with(3.0 * scores, 1) };
        }
        Some(Cow::Borrowed(self))
    }
}

/// The kernels of a layer's adapters, of a rank that shares out products with `tp` others: two
/// products forward, two for the input's gradient, two for its own, and the sums with what the
/// frozen product gave.
pub fn adapters(s: &Scenario, tokens: u64) -> Vec<Kernel> {
    let Some(lora) = &s.lora else { return Vec::new() };
    let (tp, rank) = (s.parallel.tp, lora.rank);
    let mut kernels = Vec::new();
    for &target in &lora.targets {
        let (k, n) = target.widths(&s.model);
        let (component, k, n) = match target {
            LoraTarget::Qkv => (Component::Attention, k, n.div_ceil(tp)),
            LoraTarget::Output => (Component::Attention, k.div_ceil(tp), n),
            LoraTarget::GateUp => (Component::Mlp, k, n.div_ceil(tp)),
            LoraTarget::Down => (Component::Mlp, k.div_ceil(tp), n),
        };
        let mut push = |phase, shape: String, work, bytes| {
            let (op, of_weights) = ("adapter".to_owned(), false);
            let routed = false;
            let kernel = Kernel { op, shape, component, phase, work, bytes, routed, of_weights };
            kernels.push(kernel);
        };
        for (phase, products, sum) in [
            (Phase::F, [(tokens, rank, k), (tokens, n, rank)], n),
            (Phase::B, [(tokens, rank, n), (tokens, k, rank)], k),
            (Phase::W, [(n, rank, tokens), (rank, k, tokens)], 0),
        ] {
            for (m, n, k) in products {
                let shape = GemmShape::new(m, n, k);
                let bytes = shape.bytes(GemmKind::Bf16);
                push(phase, shape.name(), Work::Gemm(shape, GemmKind::Bf16), bytes);
            }
            if sum > 0 {
                let bytes = 6.0 * (tokens * sum) as f64;
                let class = MemoryClass::Stream;
                let work = Work::Memory { bytes, class, launches: 1, max_sms: None };
                push(phase, format!("BF16 {tokens}x{sum}"), work, bytes);
            }
        }
    }
    kernels
}

/// Lowers the records of one layer.
pub struct Lowering<'a> {
    /// The model of which they are ops.
    pub model: &'a ModelConfig,
    /// How the layer is cut and fed.
    pub ctx: &'a LayerContext,
}

/// What is collected for one layer.
struct Layer<'a> {
    kind: LayerKind,
    model: &'a ModelConfig,
    ctx: &'a LayerContext,
    kernels: Vec<Kernel>,
}

/// Ops that every rank of a tensor-parallel group would do alike on the same rows.
pub const ALIKE: [&str; 8] = [
    "add",
    "add_rms_norm",
    "add_rms_norm_quantize",
    "rms_norm",
    "rms_norm_backward",
    "rms_norm_backward_quantize",
    "rms_norm_quantize",
    "rms_norm_wgrad",
];
/// The op that casts a weight gradient's operand, from kept codes too.
pub const RETILING: &str = "transpose_quantize";
/// The op that casts a product's operand where the row is at hand.
pub const CAST: &str = "quantize_tile";
/// Parts of the router's op: the choice of groups and experts, and what stands around it.
const ROUTER_CHOICE: &str = ".select";
const ROUTER_STEPS: &str = ".steps";
/// Times that the choice's kernels touch a score: radix selection of groups and of experts, 16
/// passes of two bits.
const CHOICE_PASSES: f64 = 32.0;
/// Times that so many small kernels touch a score: two of three read or write all.
fn steps_passes(launches: u64) -> f64 {
    2.0 * launches as f64 / 3.0
}
/// The op that opens a layer, by itself and with the cast of its result.
pub const FIRST: [&str; 2] = ["rms_norm", "rms_norm_quantize"];

/// The first two dimensions from the end.
fn matrix(t: &TensorMeta) -> (u64, u64) {
    match t.shape.as_slice() {
        [.., rows, columns] => (*rows as u64, *columns as u64),
        _ => (1, t.shape.first().map_or(0, |&n| n as u64)),
    }
}

fn named<'r>(tensors: &'r [TensorMeta], role: &str) -> Option<&'r TensorMeta> {
    tensors.iter().find(|t| t.role == role)
}

fn size(record: &OpRecord, key: &str) -> Option<u64> {
    record.params.get(key).and_then(Value::as_u64)
}

fn list(record: &OpRecord, key: &str) -> Vec<u64> {
    match record.params.get(key) {
        Some(Value::Array(items)) => items.iter().filter_map(Value::as_u64).collect(),
        _ => Vec::new(),
    }
}

/// The first input's type and shape, which tells kernels of one op apart.
fn shape_of(record: &OpRecord) -> String {
    record.inputs.first().map_or_else(String::new, |t| {
        let sizes: Vec<String> = t.shape.iter().map(usize::to_string).collect();
        format!("{} {}", t.dtype.name(), sizes.join("x"))
    })
}

impl Lowering<'_> {
    /// The kernels of a layer of `kind`, given its records.
    ///
    /// # Errors
    /// [`SimError::Input`] for an op that no training step has.
    pub fn kernels(&self, kind: LayerKind, records: &[&OpRecord]) -> Result<Vec<Kernel>, SimError> {
        let mut layer =
            Layer { kind, model: self.model, ctx: self.ctx, kernels: Vec::with_capacity(128) };
        for record in records {
            layer.lower(record)?;
        }
        match self.ctx.recompute {
            Recompute::Full => layer.run_again(|_| true),
            Recompute::Alternate => layer.run_again(|product| product.is_some_and(|n| n % 2 == 1)),
            Recompute::None | Recompute::Selective => {}
        }
        Ok(layer.kernels)
    }
}

impl Layer<'_> {
    fn lower(&mut self, r: &OpRecord) -> Result<(), SimError> {
        if let Some(group) = r.group.filter(|g| g.size > 1 && g.kind != GroupKind::Ep) {
            self.collective(r, group);
            return Ok(());
        }
        match r.class {
            OpClass::Gemm | OpClass::GroupedGemm | OpClass::WeightGradient => self.gemm(r),
            OpClass::Attention => self.attention(r, false),
            OpClass::AttentionBackward => self.attention(r, true),
            OpClass::Loss => self.head_forward(r),
            OpClass::LossBackward => self.head_backward(r),
            OpClass::Dispatch => self.dispatch(r),
            OpClass::Combine => self.combine(r),
            OpClass::DispatchPlan => self.expert_index(r),
            OpClass::Routing => {
                let scores = r.inputs.first().map_or(0.0, |t| t.bytes() as f64);
                self.memory_kernel(r, "select", CHOICE_PASSES * scores, MemoryClass::Row, 2);
                self.small(r, 36);
            }
            OpClass::RoutingBackward => self.small(r, 26),
            // Rows are read and written (or added to), not the whole table.
            OpClass::Gather => {
                let moved = 2 * r.outputs.iter().map(TensorMeta::bytes).sum::<u64>();
                self.memory_kernel(r, "", moved as f64, MemoryClass::Stream, 1);
            }
            OpClass::Scatter => {
                let moved = r.inputs.first().map_or(0, |x| x.bytes() + 8 * x.elements());
                self.memory_kernel(r, "", moved as f64, MemoryClass::Stream, 1);
            }
            OpClass::Rotation => {
                // In place: only the rotated columns of a head move.
                let (head, start) = (size(r, "head_dim"), size(r, "start"));
                let share = match (head, start) {
                    (Some(head), Some(start)) if head > start => {
                        (head - start) as f64 / head as f64
                    }
                    _ => 1.0,
                };
                let bytes = (r.bytes_read + r.bytes_written) as f64 * share;
                self.memory_kernel(r, "", bytes, MemoryClass::Row, 1);
            }
            OpClass::Collective | OpClass::Stream => self.moves(r, MemoryClass::Stream),
            OpClass::Convert => self.moves(r, MemoryClass::Convert),
            OpClass::Row => self.moves(r, MemoryClass::Row),
            OpClass::Decode => {
                let message = format!(
                    "record {} is {}, an op of decoding: a training step has none",
                    r.seq, r.op
                );
                return Err(SimError::input("op records", message));
            }
        }
        Ok(())
    }

    /// One kernel that reads and writes the op's tensors once.
    fn moves(&mut self, r: &OpRecord, class: MemoryClass) {
        // Twelve bits an element, packed: short pieces.
        let packed = r.inputs.iter().chain(&r.outputs).any(|t| t.dtype == DType::U32);
        let class = if packed { MemoryClass::Row } else { class };
        let (read, written) = (r.bytes_read as f64, r.bytes_written as f64);
        let quantises = r.op == CAST || r.op == RETILING;
        // Recorded as FP8: an FP4 element is half as wide.
        let (passes, width) = match quantises {
            true => (self.ctx.precision.cast_reads(), self.ctx.precision.element_bytes()),
            false => (1, 1.0),
        };
        let bytes = (passes as f64 * read + width * written) * self.own_rows(r);
        self.memory_kernel(r, "", bytes, class, passes);
    }

    /// Sequence parallelism beside tensor parallelism: what every rank of the group would do alike
    /// (norms, residual sums) each does for its part of the rows.
    fn own_rows(&self, r: &OpRecord) -> f64 {
        let alike = ALIKE.contains(&r.op.as_str());
        let recorded_whole = match self.kind {
            LayerKind::Moe | LayerKind::Mtp => r.component == Component::Attention,
            _ => true,
        };
        let wide = r.inputs.first().is_some_and(|t| matrix(t).1 == self.model.hidden_size as u64);
        if alike && recorded_whole && wide { 1.0 / self.ctx.tp as f64 } else { 1.0 }
    }

    /// Component and phase in which a kernel of `r` runs.
    fn place(&self, r: &OpRecord, is_product: bool) -> (Component, Phase) {
        let attention = self.kind != LayerKind::Embedding && self.kind != LayerKind::Head;
        match (r.component, r.phase) {
            // The sum with the residual opens the next layer.
            (Component::Combine, Phase::F) if attention => (Component::Attention, Phase::F),
            (component, Phase::W) if attention && !is_product && !self.is_retiling(r) => {
                (component, Phase::B)
            }
            place => place,
        }
    }

    /// The experts' rows as they were dispatched, re-tiled for the weight gradient.
    fn is_retiling(&self, r: &OpRecord) -> bool {
        let scaled = named(&r.inputs, "x_scale").is_some();
        r.op == RETILING && scaled && self.is_routed(r)
    }

    /// Whether the rows of `r` are the experts'.
    fn is_routed(&self, r: &OpRecord) -> bool {
        let moe = matches!(self.kind, LayerKind::Moe | LayerKind::Mtp) && self.model.moe.is_some();
        let tokens = self.ctx.tokens() / self.ctx.tp;
        let rows = r.inputs.first().map_or(0, |t| matrix(t).0);
        let of_experts = match r.class {
            OpClass::GroupedGemm => true,
            OpClass::WeightGradient => r.params.get("grouped") == Some(&Value::Bool(true)),
            // A prediction module has a row less a sequence.
            _ => rows != tokens && rows + self.ctx.micro_batch != tokens,
        };
        moe && r.component == Component::Mlp && of_experts
    }

    fn push(&mut self, r: &OpRecord, part: &str, shape: String, work: Work, bytes: f64) {
        let is_product = matches!(work, Work::Gemm(..));
        let (component, phase) = self.place(r, is_product);
        let op = if part.is_empty() { r.op.clone() } else { format!("{}.{part}", r.op) };
        let routed = self.is_routed(r) || matches!(r.class, OpClass::Dispatch | OpClass::Combine);
        let of_weights = r.phase == Phase::W;
        self.kernels.push(Kernel { op, shape, component, phase, work, bytes, routed, of_weights });
    }

    fn memory_kernel(
        &mut self,
        r: &OpRecord,
        part: &str,
        bytes: f64,
        class: MemoryClass,
        launches: u64,
    ) {
        let work = Work::Memory { bytes, class, launches, max_sms: None };
        self.push(r, part, shape_of(r), work, bytes);
    }

    /// Many small kernels over the scores of all experts.
    fn small(&mut self, r: &OpRecord, launches: u64) {
        let scores = r.inputs.first().map_or(0, |t| matrix(t).0) * self.experts() * 4;
        let bytes = steps_passes(launches) * scores as f64;
        self.memory_kernel(r, "steps", bytes, MemoryClass::Stream, launches);
    }

    fn experts(&self) -> u64 {
        self.model.moe.map_or(0, |m| m.n_routed_experts as u64)
    }

    fn gemm(&mut self, r: &OpRecord) {
        let (Some(a), Some(b)) = (r.inputs.first(), r.inputs.get(1)) else { return };
        let wgrad = r.class == OpClass::WeightGradient;
        let b = named(&r.inputs, if wgrad { "x" } else { "b" }).unwrap_or(b);
        let layout = r.params.get("layout").and_then(Value::as_str).unwrap_or("nt");
        let transposed = layout == "tn";
        let ((m, k), n) = match layout {
            "tn" => ((matrix(a).1, matrix(a).0), matrix(b).1),
            "nn" => (matrix(a), matrix(b).1),
            _ => (matrix(a), matrix(b).0),
        };
        let groups = match (r.class == OpClass::GroupedGemm, self.is_routed(r)) {
            (true, _) => list(r, "counts"),
            (_, true) => list(r, "segments"),
            _ => Vec::new(),
        };
        let accumulates = r.phase == Phase::W;
        let fp8 = a.dtype.size() == 1;
        let kind = match (fp8, self.ctx.precision, accumulates) {
            (false, _, true) => GemmKind::Bf16Accumulate,
            (false, _, false) => GemmKind::Bf16,
            (_, Precision::Nvfp4 | Precision::Mxfp4, true) => GemmKind::Fp4Accumulate,
            (_, Precision::Nvfp4 | Precision::Mxfp4, false) => GemmKind::Fp4,
            (_, Precision::Fp8Tensor, true) => GemmKind::Fp8Accumulate,
            (_, Precision::Fp8Tensor, false) => GemmKind::Fp8,
            (_, _, true) => GemmKind::Fp8OneOne,
            (_, _, false) => GemmKind::Fp8OneTwo,
        };
        let shape = if groups.is_empty() {
            GemmShape::new(m, n, k)
        } else if wgrad || transposed {
            GemmShape { m, n, k: 0, groups, grouped_by: GroupedBy::K }
        } else {
            GemmShape { m: 0, n, k, groups, grouped_by: GroupedBy::M }
        };
        let bytes = shape.bytes(kind);
        self.push(r, "", shape.name(), Work::Gemm(shape, kind), bytes);
    }

    fn attention(&mut self, r: &OpRecord, backward: bool) {
        let shape = r.params.get("shape");
        let dim = |key: &str| shape.and_then(|s| s.get(key)).and_then(Value::as_u64).unwrap_or(1);
        let segments = list(r, "segments");
        let (heads, qk, v) = (dim("heads"), dim("qk"), dim("v"));
        let cp = self.ctx.cp;
        // Context parallelism deals the causal square out evenly.
        let queries = segments.iter().max().copied().unwrap_or(0) * cp;
        let whole = AttentionShape {
            heads: heads * segments.len().max(1) as u64,
            queries,
            keys: queries,
            qk_dim: qk,
            v_dim: v,
            causal: true,
        };
        let attention = whole.share_of(cp);
        let tokens: u64 = segments.iter().sum();
        if cp > 1 {
            self.ring(r, tokens, if backward { 2.0 } else { 1.0 });
        }
        let bytes = (r.bytes_read + r.bytes_written) as f64;
        let rows = tokens as f64 * heads as f64;
        let (q, o) = (rows * qk as f64, rows * v as f64);
        if backward {
            // Row sums of do * o; the FP32 accumulator of dq, cleared and converted.
            self.memory_kernel(r, "prepare", 4.0 * o, MemoryClass::Stream, 1);
            self.memory_kernel(r, "clear", 4.0 * q, MemoryClass::Stream, 1);
        }
        self.push(r, "", attention.name(), Work::Attention(attention, backward), bytes);
        if backward {
            self.memory_kernel(r, "convert", 6.0 * q, MemoryClass::Stream, 1);
        }
    }

    /// Keys and values of the other ranks' parts (MLA: the latent) pass around the ring.
    fn ring(&mut self, r: &OpRecord, tokens: u64, passes: f64) {
        let cp = self.ctx.cp;
        let width = match self.model.attention {
            AttentionConfig::Mla { kv_lora_rank, qk_rope_head_dim, .. } => {
                (kv_lora_rank + qk_rope_head_dim) as u64
            }
            AttentionConfig::Gqa { kv_heads, head_dim } => {
                2 * (kv_heads as u64).div_ceil(self.ctx.tp) * head_dim as u64
            }
        };
        let bytes = passes * 2.0 * (tokens * width * (cp - 1)) as f64;
        let group = Group { kind: GroupKind::Cp, size: cp as usize };
        let work = Work::Collective { op: "ring_exchange".to_owned(), group, bytes };
        self.push(r, "ring", format!("{cp} ranks"), work, 0.0);
    }

    fn collective(&mut self, r: &OpRecord, group: Group) {
        let bytes = r.inputs.first().map_or(0.0, |t| t.bytes() as f64);
        let work = Work::Collective { op: r.op.clone(), group, bytes };
        self.push(r, "", shape_of(r), work, 0.0);
    }

    /// Product with the head, and the passes of softmax and loss over its result.
    fn head_forward(&mut self, r: &OpRecord) {
        let Some((t, v, h)) = head_sizes(r, self.ctx.tp) else { return };
        self.product(r, "logits", GemmShape::new(t, v, h), GemmKind::Bf16);
        self.memory_kernel(r, "loss", 2.0 * (t * v) as f64, MemoryClass::Convert, 1);
    }

    /// The logits' gradient and the products with it. The op can do without kept logits and makes
    /// them again; of the policies only full recomputation does (the report's list of what is
    /// recomputed does not have them), the others keep them from one forward to its backward.
    fn head_backward(&mut self, r: &OpRecord) {
        let Some((t, v, h)) = head_sizes(r, self.ctx.tp) else { return };
        if self.ctx.recompute == Recompute::Full {
            self.product(r, "logits", GemmShape::new(t, v, h), GemmKind::Bf16);
        }
        self.memory_kernel(r, "gradient", 4.0 * (t * v) as f64, MemoryClass::Convert, 1);
        self.product(r, "dx", GemmShape::new(t, h, v), GemmKind::Bf16);
        self.product(r, "dw", GemmShape::new(v, h, t), GemmKind::Bf16Accumulate);
        let last = self.kernels.last_mut().expect("just pushed");
        (last.phase, last.of_weights) = (Phase::W, true);
    }

    fn product(&mut self, r: &OpRecord, part: &str, shape: GemmShape, kind: GemmKind) {
        let bytes = shape.bytes(kind);
        self.push(r, part, shape.name(), Work::Gemm(shape, kind), bytes);
    }

    /// Tokens as they arrive to rows by expert; in the backward of combine to the gradient's rows.
    /// Codes and their scales may travel together: each of the tensors with what becomes of it.
    fn dispatch(&mut self, r: &OpRecord) {
        self.permute(r, r.inputs.iter().zip(&r.outputs));
    }

    /// The experts' rows to one row a token before they leave.
    fn combine(&mut self, r: &OpRecord) {
        self.permute(r, r.inputs.iter().zip(&r.inputs).take(1));
    }

    /// Moves between distinct tokens of type and width of the first of each pair and its second,
    /// the rows by expert.
    fn permute<'r>(
        &mut self,
        r: &OpRecord,
        moved: impl Iterator<Item = (&'r TensorMeta, &'r TensorMeta)>,
    ) {
        let Some(moe) = self.model.moe else { return };
        let phase = r.phase;
        let load = if phase == Phase::F { self.ctx.load.0 } else { self.ctx.load.1 };
        let distinct = distinct_tokens(&moe, self.ctx, load);
        let bytes = |(token, rows): (&TensorMeta, &TensorMeta)| {
            let width = if rows.shape.len() < 2 { 1 } else { matrix(token).1 };
            distinct * (width * token.dtype.size() as u64) as f64 + rows.bytes() as f64
        };
        self.memory_kernel(r, "permute", moved.map(bytes).sum(), MemoryClass::Stream, 1);
        let last = self.kernels.last_mut().expect("just pushed");
        (last.component, last.phase) = (Component::Mlp, phase);
    }

    /// Counting and mapping of what arrived, one CTA an expert: one pass to count, three to place,
    /// over indices of 8 bytes.
    fn expert_index(&mut self, r: &OpRecord) {
        let Some(moe) = self.model.moe else { return };
        let distinct = distinct_tokens(&moe, self.ctx, self.ctx.load.0);
        let bytes = 4.0 * 8.0 * distinct * moe.top_k as f64;
        let local = (moe.n_routed_experts as u64).div_ceil(self.ctx.ep).max(1);
        let class = MemoryClass::Row;
        let work = Work::Memory { bytes, class, launches: 2, max_sms: Some(local) };
        self.push(r, "index", shape_of(r), work, bytes);
        let last = self.kernels.last_mut().expect("just pushed");
        (last.component, last.phase) = (Component::Mlp, Phase::F);
        last.routed = true;
    }

    /// Recomputation: those of the forward's kernels that `again` picks also open the backward of
    /// their half. It is told which of the forward's products a kernel is, counted from 0.
    fn run_again(&mut self, again: impl Fn(Option<usize>) -> bool) {
        if self.kind == LayerKind::Head {
            return;
        }
        let mut products = 0..;
        let mut picked = Vec::new();
        for kernel in self.kernels.iter().filter(|k| k.phase == Phase::F) {
            let is_product = matches!(kernel.work, Work::Gemm(..));
            let product = if is_product { products.next() } else { None };
            if again(product) {
                picked.push(Kernel { phase: Phase::B, ..kernel.clone() });
            }
        }
        self.kernels.extend(picked);
    }
}

/// Tokens, a rank's share of the vocabulary, hidden size.
fn head_sizes(r: &OpRecord, tp: u64) -> Option<(u64, u64, u64)> {
    let (t, h) = matrix(r.inputs.first()?);
    Some((t, matrix(named(&r.inputs, "weight")?).0.div_ceil(tp), h))
}
