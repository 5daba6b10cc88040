//! The cost side: from a scenario and its placement to the seconds of every part, from first
//! principles.
//!
//! What a layer does comes from [`workload`](crate::workload) as kernels, these are timed by
//! [`KernelModel`], all-to-alls and collectives by [`network`](crate::network). A layer is timed
//! twice: alone on the whole GPU, and beside the communication of an overlapped pair.

use std::borrow::Cow;
use std::sync::{Arc, Mutex};

use fathom_trace::{Component, Group, OpRecord, Phase};

use crate::calibrate::{MeasuredGemm, fit_gemms};
use crate::config::{ContextForm, Graphs, Recompute, Scenario, WhatIf};
use crate::error::SimError;
use crate::kernel_time::{
    AttentionShape, Constants, GemmTable, KernelModel, KernelTimes, MemoryClass, Work,
};
use crate::lowering::{Kernel, adapters};
use crate::memory::{StageParameters, stage_parameters, trained_parameters};
use crate::network::alltoall::{AllToAll, AllToAllModel, Beside, Exchange};
use crate::network::collectives::{Algorithm, Collective, GroupShape, p2p_s, time_s};
use crate::parallel::{self, CostModel, PlacedLayer, Placement};
use crate::times::{LayerKind, LayerTimes, PhaseTimes, StepTimes, TailTimes};
use crate::workload::{
    LayerContext, LayerKernels, OpSource, Recorded, dispatch_token_bytes, visit_probability,
};
use fathom_config::{AttentionConfig, Gpu, ModelConfig, MoeConfig};

/// Times everything from op records, data-sheet figures and [`Constants`].
#[derive(Clone)]
pub struct FirstPrinciples {
    /// Constants of the kernel times, fitted on measurements.
    pub constants: Constants,
    measured: Arc<KernelTimes>,
    gemms: Arc<GemmTable>,
    source: Arc<dyn OpSource>,
    known: Arc<Mutex<Vec<Known>>>,
}

/// Kernels of a model's layers in one context; a layout asks for the same ones many times.
struct Known {
    model: ModelConfig,
    context: LayerContext,
    kernels: Arc<LayerKernels>,
}

/// Seconds and bytes of a component's kernels in one phase.
#[derive(Debug, Clone, Copy, Default)]
struct Busy {
    seconds: f64,
    gemm_s: f64,
    bytes: f64,
    collectives_s: f64,
    routed_s: f64,
    /// Kernels that the host launches one by one.
    launches: f64,
}

impl Busy {
    /// Seconds that the part holds its stream: with the collectives that it waits for, and not
    /// before the host has launched it all.
    fn total_s(&self, s: &Scenario) -> f64 {
        // A collective in as many parts as ranks: all but one may run under the GEMMs.
        let part = self.collectives_s / s.parallel.tp as f64;
        let exposed = if s.stack.tp_overlap {
            part.max(self.collectives_s - self.gemm_s)
        } else {
            self.collectives_s
        };
        (self.seconds + exposed).max(self.launches * s.stack.launch_us / 1e6)
    }
}

impl FirstPrinciples {
    /// Times of the ops that `source` records, with the constants in use.
    pub fn new(source: impl OpSource + 'static) -> FirstPrinciples {
        FirstPrinciples {
            constants: Constants::FITTED,
            measured: Arc::default(),
            gemms: Arc::default(),
            source: Arc::new(source),
            known: Arc::default(),
        }
    }

    /// The same with other constants.
    pub fn with_constants(self, constants: Constants) -> FirstPrinciples {
        FirstPrinciples { constants, ..self }
    }

    /// The same with measured times of some kernels.
    pub fn with_measured(self, measured: KernelTimes) -> FirstPrinciples {
        FirstPrinciples { measured: Arc::new(measured), ..self }
    }

    /// The kernels of the measured table that a scenario does not have.
    ///
    /// # Errors
    /// Those of the source of records.
    pub fn unknown_measured(&self, s: &Scenario) -> Result<Vec<(String, String)>, SimError> {
        let kernels = self.kernels_of(&s.model, &FirstPrinciples::context(s))?;
        Ok(self.measured.unknown(kernels.all().map(|(_, kernel)| kernel)))
    }

    /// Every kernel of a scenario's layers with its time beside communication: kind of layer,
    /// kernel, seconds.
    ///
    /// # Errors
    /// Those of the source of records.
    pub fn kernel_times(&self, s: &Scenario) -> Result<Vec<(LayerKind, Kernel, f64)>, SimError> {
        let kernels = self.kernels_of(&s.model, &FirstPrinciples::context(s))?;
        let model = self.kernels(s, s.schedule.overlaps_pairs());
        let launched = kernels.all().filter_map(|(kind, k)| Some((kind, k.under(s)?)));
        let timed = launched.filter(|(_, k)| !matches!(k.work, Work::Collective { .. }));
        let with_time = |(kind, k): (LayerKind, Cow<'_, Kernel>)| {
            let seconds = self.kernel_s(&model, &k, s);
            (kind, k.into_owned(), seconds)
        };
        Ok(timed.map(with_time).collect())
    }

    /// Seconds of one kernel without the gap to the next: measured, or the model's, which measured
    /// GEMMs of like sizes correct.
    fn kernel_s(&self, model: &KernelModel, kernel: &Kernel, s: &Scenario) -> f64 {
        let own = || (model.kernel(kernel, &s.what_if) - self.constants.gap_s).max(0.0);
        let of_stack = || match &kernel.work {
            Work::Gemm(shape, kind) => own() * self.gemms.ratio(shape, *kind),
            Work::Attention(shape, backward) => {
                let seconds = model.attention_of(shape, *backward, s.stack.fp8_attention);
                seconds * s.stack.attention_time[usize::from(*backward)]
            }
            _ => own(),
        };
        self.measured.of(kernel).unwrap_or_else(of_stack)
    }

    /// The same with GEMMs measured on `gpu` alone, on all its SMs: the constants are fitted to
    /// them, and what is left of their times corrects GEMMs of like sizes.
    ///
    /// # Errors
    /// As [`crate::calibrate::fit_gemms`].
    pub fn with_gemms(self, gpu: &Gpu, table: &[MeasuredGemm]) -> Result<Self, SimError> {
        let fitted = fit_gemms(gpu, gpu.sms, table, self.constants)?;
        // Kernels beside communication were not in the table.
        let constants = Constants { contention: self.constants.contention, ..fitted };
        let model = KernelModel::alone(gpu, constants, &WhatIf::default());
        let gemms = Arc::new(GemmTable::new(&model, table));
        Ok(FirstPrinciples { constants, gemms, known: Arc::default(), ..self })
    }

    /// The op records that a scenario's layers are made of.
    ///
    /// # Errors
    /// Those of the source of records.
    pub fn op_records(&self, s: &Scenario) -> Result<Vec<OpRecord>, SimError> {
        let recorded = Recorded::ask(&*self.source, &s.model, &FirstPrinciples::context(s))?;
        let numbered = recorded.records().iter().enumerate();
        Ok(numbered.map(|(i, r)| OpRecord { seq: i as u64, ..r.clone() }).collect())
    }

    /// The layer context of a scenario with balanced experts.
    pub fn context(scenario: &Scenario) -> LayerContext {
        let (p, t) = (&scenario.parallel, &scenario.training);
        LayerContext {
            micro_batch: t.micro_batch,
            seq_len: t.seq_len,
            tp: p.tp,
            cp: p.cp,
            ep: p.ep,
            precision: t.precision,
            recompute: t.recompute,
            kept_in_fp8: scenario.stack.kept_in_fp8,
            load: (1.0, 1.0),
        }
    }

    /// The kernels of every kind of layer, recorded once for a model and context.
    ///
    /// # Errors
    /// Those of the source of records.
    pub fn kernels_of(
        &self,
        model: &ModelConfig,
        ctx: &LayerContext,
    ) -> Result<Arc<LayerKernels>, SimError> {
        let known = |k: &&Known| k.context == *ctx && k.model == *model;
        let list = || self.known.lock().expect("no holder panics");
        if let Some(found) = list().iter().find(known) {
            return Ok(found.kernels.clone());
        }
        let kernels = Arc::new(LayerKernels::record(&*self.source, model, ctx)?);
        let (model, context) = (model.clone(), ctx.clone());
        list().push(Known { model, context, kernels: kernels.clone() });
        Ok(kernels)
    }

    /// One layer of `kind`, alone and overlapped.
    ///
    /// # Errors
    /// Those of the source of records.
    pub fn layer(
        &self,
        s: &Scenario,
        ctx: &LayerContext,
        kind: LayerKind,
    ) -> Result<[LayerTimes; 2], SimError> {
        let kernels = self.kernels_of(&s.model, ctx)?;
        Ok([false, true].map(|overlapped| self.time_layer(s, ctx, kind, &kernels, overlapped)))
    }

    fn time_layer(
        &self,
        s: &Scenario,
        ctx: &LayerContext,
        kind: LayerKind,
        all: &LayerKernels,
        overlapped: bool,
    ) -> LayerTimes {
        let kernels = self.kernels(s, overlapped);
        let adapters = adapters(s, ctx.tokens());
        let busy = |kind: LayerKind, component: Component, phase: Phase| {
            let of = |k: &&Kernel| k.component == component && k.phase == phase;
            let outside = matches!(kind, LayerKind::Embedding | LayerKind::Head);
            let adapters = if outside { &[] } else { &adapters[..] };
            self.busy(s, &kernels, all.of(kind).iter().chain(adapters).filter(of))
        };
        let sum = |components: &[Component], phase| {
            let parts = components.iter().map(|&c| busy(kind, c, phase));
            parts.map(|b| b.total_s(s)).sum::<f64>()
        };
        // Measured as a whole, or kernel by kernel.
        let part = |components: &[Component], with: &[Component], phase| {
            let all = [components, with].concat();
            self.measured.of_part(kind, &all, phase).unwrap_or_else(|| sum(components, phase))
        };
        let phase_times = |phase| PhaseTimes {
            attention_s: part(&[Component::Attention, Component::Dispatch], &[], phase),
            mlp_s: part(
                &[Component::Mlp, Component::Mtp, Component::Embedding, Component::Head],
                &[Component::Combine],
                phase,
            ),
            ..PhaseTimes::default()
        };
        let mut layer = LayerTimes {
            kind,
            forward: phase_times(Phase::F),
            backward: phase_times(Phase::B),
            weight: phase_times(Phase::W),
            routed_share: 0.0,
        };
        let routed = matches!(kind, LayerKind::Moe | LayerKind::Mtp);
        let Some(moe) = s.model.moe.filter(|_| routed) else { return layer };
        let mlp_s = layer.forward.mlp_s + layer.backward.mlp_s + layer.weight.mlp_s;
        let phases = [Phase::F, Phase::B, Phase::W];
        let routed_s: f64 = phases.map(|p| busy(kind, Component::Mlp, p).routed_s).iter().sum();
        layer.routed_share = (routed_s / mlp_s).min(1.0);
        if ctx.ep == 1 {
            return layer;
        }
        // What the pair's other half does beside: combine(B) under attention(F), dispatch(F) under
        // mlp(B), dispatch(B) under mlp(W) and mlp(F), combine(F) under attention(B).
        let memory_s = |parts: &[(Component, Phase)]| {
            let bytes: f64 = parts.iter().map(|&(c, p)| busy(LayerKind::Moe, c, p).bytes).sum();
            bytes / s.cluster.gpu.memory_bytes_per_s
        };
        // A pair's layer computes all phases between its four exchanges.
        let pair_s = phases.map(|p| {
            let of = |c| busy(LayerKind::Moe, c, p).seconds;
            of(Component::Attention) + of(Component::Mlp)
        });
        let compute_s = pair_s.iter().sum::<f64>() / 4.0;
        let all_to_all = |exchange: Exchange, beside: &[(Component, Phase)], load: f64| {
            let beside = || Beside { memory_s: memory_s(beside), compute_s };
            self.all_to_all(s, ctx, &moe, exchange, load, overlapped.then(beside))
        };
        // The gradient of a combine is dispatched, that of a dispatch combined.
        let (out, back) = (Exchange::Dispatch, Exchange::Combine);
        let (a, m) = (Component::Attention, Component::Mlp);
        layer.forward.dispatch_s = all_to_all(out, &[(m, Phase::B)], ctx.load.0);
        layer.forward.combine_s = all_to_all(back, &[(a, Phase::B)], ctx.load.0);
        layer.backward.combine_s =
            all_to_all(out, &[(a, Phase::F)], ctx.load.1) + sum(&[Component::Combine], Phase::B);
        if ctx.recompute == Recompute::Full {
            // The experts' inputs were not kept: they come again.
            layer.backward.combine_s += layer.forward.dispatch_s;
        }
        layer.backward.dispatch_s = all_to_all(back, &[(m, Phase::W), (m, Phase::F)], ctx.load.1);
        layer
    }

    /// The GPU in one of the two situations.
    fn kernels(&self, s: &Scenario, overlapped: bool) -> KernelModel {
        let (gpu, c, wishes) = (&s.cluster.gpu, self.constants, &s.what_if);
        if s.parallel.ep == 1 {
            // Nothing that runs beside the computation holds SMs.
            KernelModel::alone(gpu, c, wishes)
        } else if overlapped {
            KernelModel::beside_communication(gpu, c, wishes, s.comm_sms)
        } else {
            KernelModel::partitioned(gpu, c, wishes, s.comm_sms)
        }
    }

    fn busy<'r>(
        &self,
        s: &Scenario,
        kernels: &KernelModel,
        of: impl Iterator<Item = &'r Kernel>,
    ) -> Busy {
        let mut busy = Busy::default();
        for kernel in of.filter_map(|k| k.under(s)) {
            let launched = match s.stack.graphs {
                Graphs::None => true,
                Graphs::Dense => kernel.routed,
                Graphs::Full => false,
            };
            let launched = f64::from(u8::from(launched));
            if let Work::Collective { op, group, bytes } = &kernel.work {
                let regathered = kernel.phase == Phase::B && s.stack.tp_regather;
                // One of the two halves of an all-reduce once more.
                let passes = if regathered && op == "all_reduce" { 1.5 } else { 1.0 };
                let backward = kernel.op.contains("backward");
                busy.collectives_s += passes * self.blocking(s, op, *group, *bytes, backward);
                busy.launches += launched;
                continue;
            }
            let seconds = self.constants.gap_s + self.kernel_s(kernels, &kernel, s);
            let (mut passes, mut launches) = (1.0, 1.0);
            match &kernel.work {
                // Casts are kernels of their own, whatever else is fused.
                Work::Memory { launches: own, .. } if kernel.is_cast() => launches = *own as f64,
                Work::Memory { launches: own, .. } => {
                    passes = s.stack.elementwise_passes;
                    launches = *own as f64 * passes;
                }
                Work::Gemm(..) => busy.gemm_s += seconds,
                _ => {}
            }
            let seconds = seconds * passes;
            busy.seconds += seconds;
            busy.launches += launched * launches;
            busy.bytes += kernel.bytes * passes;
            busy.routed_s += if kernel.routed { seconds } else { 0.0 };
        }
        busy
    }

    /// Seconds of a collective that blocks the computation: tensor and context parallelism.
    /// All-to-alls run beside.
    fn blocking(&self, s: &Scenario, op: &str, group: Group, bytes: f64, backward: bool) -> f64 {
        let (size, per_node) = (group.size as u64, s.cluster.gpus_per_node);
        match op {
            "ring_exchange" if gathers(s.stack.context) => {
                self.gathered_context_s(s, size, backward)
            }
            // With sequence parallelism its two halves stand before and behind the norms.
            "all_reduce" => {
                let shape = GroupShape::strided(size, 1, per_node);
                time_s(&s.cluster, Collective::AllReduce, Algorithm::Hierarchical, shape, bytes)
            }
            "ring_exchange" => self.context_s(s, size, bytes),
            _ => 0.0,
        }
    }

    /// Seconds of context parallelism's exchange that attention waits for in other forms than
    /// [`ContextForm::Gather`]; `ring_bytes` are those
    /// of keys and values that pass a rank around the whole ring.
    fn context_s(&self, s: &Scenario, size: u64, ring_bytes: f64) -> f64 {
        let per_node = (s.cluster.gpus_per_node / s.parallel.tp).clamp(1, size);
        let latency = s.cluster.network.cross_leaf_latency_s;
        // Keys and values pass while the attention of the previous part runs; what a link needs
        // beyond that is exposed, the latency always.
        let ring = |ranks: u64, bytes: f64, same_node: bool| {
            let whole = p2p_s(&s.cluster, bytes, same_node);
            (whole - self.attention_forward_s(s)).max(0.0) + (ranks as f64 - 1.0) * latency
        };
        // Queries, keys, values to heads and the output back to sequence; all but the own part
        // leaves the rank.
        let turned = |ranks: u64, same_node: bool| {
            let (qk, v) = s.model.head_dims();
            let keys = match s.model.attention {
                AttentionConfig::Mla { .. } => s.model.heads,
                AttentionConfig::Gqa { kv_heads, .. } => kv_heads,
            } as u64;
            let heads = (s.model.heads as u64).div_ceil(s.parallel.tp) * (qk + v) as u64;
            let keys = keys.div_ceil(s.parallel.tp) * (qk + v) as u64;
            let tokens = s.training.micro_batch * s.training.seq_len / s.parallel.cp;
            let bytes = (2 * tokens * (heads + keys)) as f64 * (ranks as f64 - 1.0) / ranks as f64;
            p2p_s(&s.cluster, bytes, same_node) + 2.0 * latency
        };
        match s.stack.context {
            ContextForm::Ring | ContextForm::Gather | ContextForm::GatherCompiled => {
                ring(size, ring_bytes, per_node == size)
            }
            ContextForm::AllToAll => turned(size, per_node == size),
            ContextForm::Hybrid => {
                let nodes = size.div_ceil(per_node);
                let inside = if per_node > 1 { turned(per_node, true) } else { 0.0 };
                let left = ring_bytes * (nodes as f64 - 1.0) / (size as f64 - 1.0);
                inside + if nodes > 1 { ring(nodes, left, false) } else { 0.0 }
            }
        }
    }

    /// What [`ContextForm::Gather`] adds to attention, its backward or its forward: the gathering
    /// of keys and values and the ring of their gradients, as far as attention does not hide them,
    /// and the kernels that merge the parts. Bytes are those of the tensors that these kernels
    /// read and write, by the source named there; of the parts after the first, half meet all
    /// queries and half the later ones.
    fn gathered_context_s(&self, s: &Scenario, size: u64, backward: bool) -> f64 {
        let (heads, tokens) = (
            (s.model.heads as u64).div_ceil(s.parallel.tp),
            (s.training.micro_batch * s.training.seq_len).div_ceil(size),
        );
        let (qk, v) = s.model.head_dims();
        let elements = |width: usize| (tokens * heads) as f64 * width as f64;
        let (keys, values) = (elements(qk), elements(v));
        let group = GroupShape::strided(size, s.parallel.tp, s.cluster.gpus_per_node);
        let ranks = size as f64;
        let whole = 2.0 * ranks * (keys + values);
        let gather_s =
            time_s(&s.cluster, Collective::AllGather, Algorithm::Hierarchical, group, whole);
        let compiled = s.stack.context == ContextForm::GatherCompiled;
        // As many parts as ranks, of equal work; dq, dk and dv take five products of seven.
        let products = if backward { 2.5 } else { 1.0 };
        let times = s.stack.attention_time[usize::from(backward)];
        let part_s = products * times * self.attention_forward_s(s) / ranks;
        let beside_s = if compiled { 0.0 } else { part_s };
        let (merged_bytes, ring_s) = if backward {
            let hop_s = p2p_s(&s.cluster, 4.0 * (keys + values), group.nodes == 1);
            // Into dq: 12 bytes an element and part; into dk and dv 11.5, and 8 to join them for
            // the ring. As one kernel 10 where all are added to, 9 where half are and half copied.
            let merged = if compiled {
                ranks * 9.5 * (2.0 * keys + values)
            } else {
                ranks * (12.0 * keys + 19.5 * (keys + values))
            };
            // Nothing runs beside the last hop.
            (merged, (ranks - 1.0) * (hop_s - beside_s).max(0.0) + hop_s)
        } else {
            // To FP32, difference, product, sum: 38 bytes an element, 27 where half stays as it
            // is; as one kernel 10 and 9. The first part to FP32 and the sum to BF16: 12.
            let part = if compiled { 9.5 } else { 32.5 };
            ((ranks - 1.0) * part * values + 12.0 * values, 0.0)
        };
        let kernels = self.kernels(s, false);
        let merge_s = kernels.memory(merged_bytes, MemoryClass::Stream, None);
        (gather_s - beside_s).max(0.0) + ring_s + merge_s
    }

    fn attention_forward_s(&self, s: &Scenario) -> f64 {
        let (qk_dim, v_dim) = s.model.head_dims();
        let heads = s.training.micro_batch * s.model.heads as u64 / s.parallel.tp;
        let whole = AttentionShape {
            heads,
            queries: s.training.seq_len,
            keys: s.training.seq_len,
            qk_dim: qk_dim as u64,
            v_dim: v_dim as u64,
            causal: true,
        };
        let shape = whole.share_of(s.parallel.cp);
        self.kernels(s, false).attention(&shape, false)
    }

    /// Seconds of one all-to-all: alone, or under the computation `beside`.
    fn all_to_all(
        &self,
        s: &Scenario,
        ctx: &LayerContext,
        moe: &MoeConfig,
        exchange: Exchange,
        load: f64,
        beside: Option<Beside>,
    ) -> f64 {
        let model = AllToAllModel::new(&s.cluster, self.constants, s.what_if);
        // The load of one rank stretches its own part; the group waits for its slowest either way.
        let token_bytes = match exchange {
            Exchange::Dispatch => dispatch_token_bytes(&s.model, ctx.precision),
            Exchange::Combine => 2.0 * s.model.hidden_size as f64,
        };
        let token_bytes = token_bytes * copies(s, moe, ctx.ep);
        let op = AllToAll {
            exchange,
            ep: ctx.ep,
            tokens: ctx.tokens() / ctx.tp,
            token_bytes,
            load: load.max(1.0),
            sms: s.comm_sms.max(2),
        };
        match beside {
            Some(beside) => model.under_compute(moe, &op, beside),
            None => model.met(moe, &op),
        }
    }

    /// Gradient reduction, optimizer and parameter gathering of a pipeline rank that holds
    /// `stages`.
    fn tail(&self, s: &Scenario, placement: &Placement, stages: &[usize]) -> TailTimes {
        let p = &s.parallel;
        // A head that is the embedding has no weights of its own.
        let own = |l: &&PlacedLayer| !(s.model.tie_word_embeddings && l.kind == LayerKind::Head);
        let placed = stages.iter().flat_map(|&i| &placement.stages[i]).filter(own);
        let layers: Vec<PlacedLayer> = placed.copied().collect();
        let StageParameters { dense, experts: expert } = trained_parameters(s, &layers);
        // Frozen weights are gathered where they are sharded.
        let gathered = if p.zero >= 3 {
            stage_parameters(s, &layers)
        } else {
            StageParameters { dense, experts: expert }
        };
        let per_node = s.cluster.gpus_per_node;
        let collective = |kind, group: GroupShape, bytes| {
            time_s(&s.cluster, kind, Algorithm::Hierarchical, group, bytes)
        };
        // Replicas of dense weights: dp x cp ranks, tp apart; of experts: every ep-th of them.
        let dense_group = GroupShape::strided(p.dp * p.cp, p.tp, per_node);
        let ways = (p.dp * p.cp * p.tp / p.ep.max(1)).max(1);
        let expert_group = GroupShape::strided(ways, p.ep, per_node);
        let copies = parallel::geometry(s).copies();
        let mut tail = TailTimes::default();
        if copies > 1 {
            // Both ranks that hold a stage exchange halves of FP32 gradients; they meet again as
            // parameters.
            let half = (dense + expert) / 2.0;
            tail.grad_reduce_s += p2p_s(&s.cluster, 4.0 * half, false);
            tail.param_gather_s += p2p_s(&s.cluster, 2.0 * half, false);
        }
        let copies = copies as f64;
        let (dense, expert) = (dense / copies, expert / copies);
        let sharded = p.zero >= 1;
        let reduce = if sharded { Collective::ReduceScatter } else { Collective::AllReduce };
        tail.grad_reduce_s += collective(reduce, dense_group, 4.0 * dense)
            + collective(reduce, expert_group, 4.0 * expert);
        let mut updated = dense + expert;
        if sharded {
            updated = dense / dense_group.size() as f64 + expert / expert_group.size() as f64;
            let (dense, expert) = (gathered.dense / copies, gathered.experts / copies);
            tail.param_gather_s += collective(Collective::AllGather, dense_group, 2.0 * dense)
                + collective(Collective::AllGather, expert_group, 2.0 * expert);
        }
        // Gradient norm, then AdamW.
        let kernels = self.kernels(s, false);
        let norm_s = kernels.memory(4.0 * (dense + expert), MemoryClass::Stream, None);
        let away = s.offload.optimizer;
        let own = UPDATE_BYTES * updated * (1.0 - away);
        let update_s = kernels.memory(own, MemoryClass::Stream, None);
        // FP32 gradients to the host, BF16 weights back.
        let host_s = away * updated * (6.0 / s.offload.link_bytes_per_s)
            + away * updated * (UPDATE_BYTES / s.offload.update_bytes_per_s);
        tail.optimizer_s = s.stack.elementwise_passes * (norm_s + update_s) + host_s;
        tail
    }
}

/// Whether keys and values are gathered, as PyTorch does.
fn gathers(context: ContextForm) -> bool {
    matches!(context, ContextForm::Gather | ContextForm::GatherCompiled)
}

/// Bytes that AdamW moves for a parameter: gradient, master and both moments in, all but the
/// gradient out, with the BF16 copy.
const UPDATE_BYTES: f64 = 22.0;

/// How often a token crosses to a place where one of its experts is, against once: a node where
/// the group spans several, a rank within one.
fn copies(s: &Scenario, moe: &MoeConfig, ep: u64) -> f64 {
    if !s.stack.expert_copies {
        return 1.0;
    }
    let places = if ep > s.cluster.gpus_per_node { ep / s.cluster.gpus_per_node } else { ep };
    let experts = moe.n_routed_experts as u64 / places.max(1);
    moe.top_k as f64 / (places as f64 * visit_probability(moe, experts.max(1)))
}

impl CostModel for FirstPrinciples {
    fn layer_times(&self, s: &Scenario, layer: PlacedLayer) -> Result<[LayerTimes; 2], SimError> {
        if let Some(message) = s.training.precision.refusal(&s.cluster.gpu) {
            return Err(SimError::Layout(message));
        }
        if s.stack.fp8_attention && s.cluster.gpu.fp8_flops == 0.0 {
            let gpu = &s.cluster.gpu.name;
            let message = format!("{gpu} has no FP8 tensor cores: use stack.fp8_attention = false");
            return Err(SimError::Layout(message));
        }
        let ctx = FirstPrinciples::context(s);
        self.layer(s, &ctx, layer.kind)
    }

    fn frame(&self, s: &Scenario, placement: &Placement) -> StepTimes {
        let ctx = FirstPrinciples::context(s);
        let p = &s.parallel;
        // Where pairs overlap, an activation and a gradient leave at once and share the NIC.
        let messages = if s.schedule.overlaps_pairs() { 2.0 } else { 1.0 };
        let bytes =
            messages * 2.0 * (ctx.tokens() * s.model.hidden_size as u64) as f64 / p.tp as f64;
        let same_node = p.tp * p.cp * p.dp * 2 <= s.cluster.gpus_per_node;
        let hop = p2p_s(&s.cluster, bytes, same_node);
        let geometry = parallel::geometry(s);
        let p2p = (0..geometry.stages.saturating_sub(1))
            .map(|stage| if geometry.stays(stage) { 0.0 } else { hop })
            .collect();
        let tail = |r: usize| {
            let own = self.tail(s, placement, &geometry.held(r));
            let measured = |what: &str, own: f64| self.measured.of_step(what).unwrap_or(own);
            TailTimes {
                grad_reduce_s: measured("gradient reduction", own.grad_reduce_s),
                optimizer_s: measured("optimizer", own.optimizer_s),
                param_gather_s: measured("parameter gather", own.param_gather_s),
            }
        };
        StepTimes {
            stages: Vec::new(),
            tail: (0..geometry.ranks).map(tail).collect(),
            p2p_s: p2p,
            wgrad_under_exchanges: true,
            instruction_overhead_s: self
                .measured
                .of_step("instruction")
                .unwrap_or(self.constants.gap_s),
            expert_load: Vec::new(),
        }
    }
}
