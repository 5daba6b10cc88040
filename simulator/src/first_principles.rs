//! The cost side: from a scenario and its placement to the seconds of every part, from first
//! principles.
//!
//! Records of a layer come from [`workload`](crate::workload), kernels are timed by
//! [`KernelModel`], all-to-alls and collectives
//! by [`network`](crate::network). A layer is timed twice: alone on the whole GPU, and beside the
//! communication of an overlapped pair.

use fathom_trace::{Component, OpRecord, Phase};

use crate::config::{Precision, Scenario};
use crate::error::SimError;
use crate::hardware::model::Moe;
use crate::kernel_time::{
    AttentionShape, Constants, GemmKind, GemmShape, KernelModel, MemoryClass, Work,
};
use crate::network::alltoall::{AllToAll, AllToAllModel};
use crate::network::collectives::{Algorithm, Collective, GroupShape, p2p_s, time_s};
use crate::parallel::{CostModel, PlacedLayer, Placement};
use crate::schedules::ScheduleKind;
use crate::times::{LayerKind, LayerTimes, PhaseTimes, StepTimes, TailTimes};
use crate::workload::{LayerContext, dispatch_token_bytes, layer_records};

/// Times everything from shapes, data-sheet figures and [`Constants`].
#[derive(Debug, Clone, Copy)]
pub struct FirstPrinciples {
    /// Fitted constants.
    pub constants: Constants,
}

impl Default for FirstPrinciples {
    fn default() -> Self {
        FirstPrinciples { constants: Constants::FITTED }
    }
}

/// Seconds and bytes of a component's kernels in one phase.
#[derive(Debug, Clone, Copy, Default)]
struct Busy {
    seconds: f64,
    bytes: f64,
    collectives_s: f64,
}

impl FirstPrinciples {
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
            load: (1.0, 1.0),
        }
    }

    /// One transformer layer, alone and overlapped.
    pub fn layer(&self, s: &Scenario, ctx: &LayerContext, index: u64) -> [LayerTimes; 2] {
        let records = layer_records(&s.model, ctx, index);
        [false, true].map(|overlapped| self.time_layer(s, ctx, index, &records, overlapped))
    }

    /// Times a layer from its records, whoever recorded them.
    pub fn time_layer(
        &self,
        s: &Scenario,
        ctx: &LayerContext,
        index: u64,
        records: &[OpRecord],
        overlapped: bool,
    ) -> LayerTimes {
        let kernels = self.kernels(s, overlapped);
        let busy = |component: Component, phase: Phase| {
            let of = |r: &&OpRecord| r.component == component && r.phase == phase;
            self.busy(s, &kernels, records.iter().filter(of))
        };
        let sum = |component, phase| {
            let b = busy(component, phase);
            b.seconds + b.collectives_s
        };
        let attention = |phase| sum(Component::Attention, phase) + sum(Component::Dispatch, phase);
        let mut layer = LayerTimes {
            kind: LayerKind::Dense,
            forward: PhaseTimes {
                attention_s: attention(Phase::F),
                mlp_s: sum(Component::Mlp, Phase::F),
                ..PhaseTimes::default()
            },
            backward: PhaseTimes {
                attention_s: attention(Phase::B),
                mlp_s: sum(Component::Mlp, Phase::B),
                ..PhaseTimes::default()
            },
            weight: PhaseTimes {
                attention_s: attention(Phase::W),
                mlp_s: sum(Component::Mlp, Phase::W),
                ..PhaseTimes::default()
            },
            routed_share: 0.0,
        };
        let Some(moe) = s.model.moe.filter(|_| s.model.is_moe_layer(index)) else { return layer };
        layer.kind = LayerKind::Moe;
        layer.routed_share = 0.8;
        if ctx.ep == 1 {
            return layer;
        }
        // What the pair's other half does beside: combine(B) under attention(F), dispatch(F) under
        // mlp(B), dispatch(B) under
        // mlp(W) and mlp(F), combine(F) under attention(B).
        let memory_s = |parts: &[(Component, Phase)]| {
            let bytes: f64 = parts.iter().map(|&(c, p)| busy(c, p).bytes).sum();
            bytes / s.cluster.gpu.memory_bytes_per_s
        };
        let all_to_all = |token_bytes: f64, beside: &[(Component, Phase)], load: f64| {
            self.all_to_all(s, ctx, &moe, token_bytes, load, overlapped.then(|| memory_s(beside)))
        };
        let (fp8, bf16) =
            (dispatch_token_bytes(&s.model, ctx.precision), 2.0 * s.model.hidden as f64);
        let (a, m) = (Component::Attention, Component::Mlp);
        layer.forward.dispatch_s = all_to_all(fp8, &[(m, Phase::B)], ctx.load.0);
        layer.forward.combine_s = all_to_all(bf16, &[(a, Phase::B)], ctx.load.0);
        layer.backward.combine_s =
            all_to_all(fp8, &[(a, Phase::F)], ctx.load.1) + sum(Component::Combine, Phase::B);
        layer.backward.dispatch_s = all_to_all(bf16, &[(m, Phase::W), (m, Phase::F)], ctx.load.1);
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
        records: impl Iterator<Item = &'r OpRecord>,
    ) -> Busy {
        let mut busy = Busy::default();
        for r in records {
            match Work::of(r) {
                Work::Collective => busy.collectives_s += self.blocking(s, r),
                work => {
                    busy.seconds += kernels.record(r, &s.what_if);
                    busy.bytes += match work {
                        Work::Gemm(shape, kind) => shape.bytes(kind),
                        _ => (r.bytes_read + r.bytes_written) as f64,
                    };
                }
            }
        }
        busy
    }

    /// Seconds of a collective that blocks the computation: tensor and context parallelism.
    /// All-to-alls run beside.
    fn blocking(&self, s: &Scenario, r: &OpRecord) -> f64 {
        let Some(group) = r.group else { return 0.0 };
        let (size, per_node) = (group.size as u64, s.cluster.gpus_per_node);
        let n = size as f64;
        match r.op.as_str() {
            "all_gather" | "reduce_scatter" => {
                let shape = GroupShape::strided(size, 1, per_node);
                let bytes = r.bytes_sent as f64 * n / (n - 1.0);
                time_s(&s.cluster, Collective::AllGather, Algorithm::Hierarchical, shape, bytes)
            }
            // Keys and values pass while the attention of the previous part runs; what a link needs
            // beyond that is
            // exposed, the latency always.
            "ring_exchange" => {
                let same_node = size * s.parallel.tp <= per_node;
                let whole = p2p_s(&s.cluster, r.bytes_sent as f64, same_node);
                (whole - self.attention_forward_s(s)).max(0.0)
                    + (n - 1.0) * s.cluster.network.cross_leaf_latency_s
            }
            _ => 0.0,
        }
    }

    fn attention_forward_s(&self, s: &Scenario) -> f64 {
        let (qk_dim, v_dim) = s.model.head_dims();
        let heads = s.training.micro_batch * s.model.n_heads / s.parallel.tp;
        let shape = AttentionShape {
            heads: heads.div_ceil(s.parallel.cp).max(1),
            queries: s.training.seq_len,
            keys: s.training.seq_len,
            qk_dim,
            v_dim,
            causal: true,
        };
        self.kernels(s, false).attention(&shape, false)
    }

    /// Seconds of one all-to-all: alone, or under kernels whose bytes take the memory so many
    /// seconds.
    fn all_to_all(
        &self,
        s: &Scenario,
        ctx: &LayerContext,
        moe: &Moe,
        token_bytes: f64,
        load: f64,
        memory_s: Option<f64>,
    ) -> f64 {
        let model = AllToAllModel::new(&s.cluster, self.constants, s.what_if.unified_network);
        // The load of one rank stretches its own part; the group waits for its slowest either way.
        let op = AllToAll {
            ep: ctx.ep,
            tokens: ctx.tokens() / ctx.tp,
            token_bytes,
            load: load.max(1.0),
            sms: s.comm_sms.max(2),
        };
        match memory_s {
            Some(u) => self.constants.notify_s + model.under_compute(moe, &op, u),
            None => 4.0 * s.cluster.network.cross_leaf_latency_s + model.alone(moe, &op).seconds,
        }
    }

    /// Embedding, head and prediction modules.
    fn special(
        &self,
        s: &Scenario,
        ctx: &LayerContext,
        kind: LayerKind,
        index: u64,
    ) -> [LayerTimes; 2] {
        let base = match kind {
            LayerKind::Mtp => self.layer(s, ctx, index),
            _ => [empty(kind), empty(kind)],
        };
        let mut out = base;
        for (overlapped, layer) in [false, true].into_iter().zip(&mut out) {
            layer.kind = kind;
            let kernels = self.kernels(s, overlapped);
            let (t, h) = (ctx.tokens() as f64, s.model.hidden as f64);
            let stream = |bytes: f64| kernels.memory(bytes, MemoryClass::Stream, None);
            match kind {
                LayerKind::Embedding => {
                    layer.forward.mlp_s += stream(4.0 * t * h);
                    // Gradients of rows are added into FP32.
                    layer.weight.mlp_s += stream(10.0 * t * h);
                }
                LayerKind::Mtp => {
                    let (f, b, w) = self.head(s, ctx, &kernels);
                    let join = GemmShape::new(ctx.tokens(), s.model.hidden, 2 * s.model.hidden);
                    let kind = match ctx.precision {
                        Precision::Fp8 => GemmKind::Fp8OneTwo,
                        Precision::Bf16 => GemmKind::Bf16,
                    };
                    let join_s = kernels.gemm(&join, kind).seconds;
                    layer.forward.mlp_s += f + join_s + stream(16.0 * t * h);
                    layer.backward.mlp_s += b + join_s + stream(24.0 * t * h);
                    layer.weight.mlp_s += w + join_s;
                }
                _ => {
                    let (f, b, w) = self.head(s, ctx, &kernels);
                    layer.forward.mlp_s += f;
                    layer.backward.mlp_s += b;
                    layer.weight.mlp_s += w;
                }
            }
        }
        out
    }

    /// Final norm, head (BF16) and loss: seconds of F, B and W.
    fn head(&self, s: &Scenario, ctx: &LayerContext, kernels: &KernelModel) -> (f64, f64, f64) {
        let (t, h, v) = (ctx.tokens(), s.model.hidden, s.model.vocab_size / ctx.tp);
        let gemm = |m, n, k, kind| kernels.gemm_best_block(&GemmShape::new(m, n, k), kind).seconds;
        let norm = kernels.memory(4.0 * (t * h) as f64, MemoryClass::Row, None);
        // Cross-entropy reads the logits twice and leaves their gradient in their place.
        let loss = kernels.memory(6.0 * (t * v) as f64, MemoryClass::Convert, None);
        (
            norm + gemm(t, v, h, GemmKind::Bf16) + loss,
            1.5 * norm + gemm(t, h, v, GemmKind::Bf16),
            gemm(v, h, t, GemmKind::Bf16Accumulate),
        )
    }

    /// Gradient reduction, optimizer and parameter gathering of a pipeline rank that holds
    /// `stages`.
    fn tail(&self, s: &Scenario, placement: &Placement, stages: &[usize]) -> TailTimes {
        let p = &s.parallel;
        let (mut dense, mut expert) = (0.0, 0.0);
        for layer in stages.iter().flat_map(|&i| &placement.stages[i]) {
            let (d, e) = rank_params(s, layer.kind, layer.index);
            dense += d;
            expert += e;
        }
        let per_node = s.cluster.gpus_per_node;
        let collective = |kind, group: GroupShape, bytes| {
            time_s(&s.cluster, kind, Algorithm::Hierarchical, group, bytes)
        };
        // Replicas of dense weights: dp x cp ranks, tp apart; of experts: every ep-th of them.
        let dense_group = GroupShape::strided(p.dp * p.cp, p.tp, per_node);
        let ways = (p.dp * p.cp * p.tp / p.ep.max(1)).max(1);
        let expert_group = GroupShape::strided(ways, p.ep, per_node);
        let two_copies = is_two_way(s.schedule) && placement.ranks > 1;
        let mut tail = TailTimes::default();
        if two_copies {
            // Both ranks that hold a stage exchange halves of FP32 gradients; they meet again as
            // parameters.
            let half = (dense + expert) / 2.0;
            tail.grad_reduce_s += p2p_s(&s.cluster, 4.0 * half, false);
            tail.param_gather_s += p2p_s(&s.cluster, 2.0 * half, false);
        }
        let copies = if two_copies { 2.0 } else { 1.0 };
        let (dense, expert) = (dense / copies, expert / copies);
        let sharded = p.zero >= 1;
        let reduce = if sharded { Collective::ReduceScatter } else { Collective::AllReduce };
        tail.grad_reduce_s += collective(reduce, dense_group, 4.0 * dense)
            + collective(reduce, expert_group, 4.0 * expert);
        let mut updated = dense + expert;
        if sharded {
            updated = dense / dense_group.size() as f64 + expert / expert_group.size() as f64;
            tail.param_gather_s += collective(Collective::AllGather, dense_group, 2.0 * dense)
                + collective(Collective::AllGather, expert_group, 2.0 * expert);
        }
        // Gradient norm, then AdamW: gradient, master and both moments in, all but the gradient
        // out, with the BF16 copy.
        let kernels = self.kernels(s, false);
        tail.optimizer_s = kernels.memory(4.0 * (dense + expert), MemoryClass::Stream, None)
            + kernels.memory(22.0 * updated, MemoryClass::Stream, None);
        tail
    }
}

fn empty(kind: LayerKind) -> LayerTimes {
    let zero = PhaseTimes::default();
    LayerTimes { kind, forward: zero, backward: zero, weight: zero, routed_share: 0.0 }
}

/// Schedules whose two directions keep two copies of the weights.
fn is_two_way(kind: ScheduleKind) -> bool {
    matches!(kind, ScheduleKind::DualPipe | ScheduleKind::Chimera)
}

/// Parameters of a placed layer on one rank: dense ones and routed experts'.
fn rank_params(s: &Scenario, kind: LayerKind, index: u64) -> (f64, f64) {
    let (m, p) = (&s.model, &s.parallel);
    let tp = p.tp as f64;
    let embedding = (m.vocab_size * m.hidden) as f64 / tp;
    let layer = || {
        let attention = m.attention_params() as f64 / tp;
        match m.moe.filter(|_| m.is_moe_layer(index)) {
            Some(moe) => {
                let expert = (3 * m.hidden * moe.moe_intermediate) as f64;
                let gate = (moe.n_routed_experts * m.hidden) as f64;
                let shared = moe.n_shared_experts as f64 * expert;
                (attention + gate + shared, expert * (moe.n_routed_experts as f64 / p.ep as f64))
            }
            None => (attention + m.dense_ffn_params() as f64 / tp, 0.0),
        }
    };
    match kind {
        LayerKind::Embedding => (embedding, 0.0),
        LayerKind::Head => (if m.tied_embeddings { 0.0 } else { embedding }, 0.0),
        // Embedding and head are the main model's.
        LayerKind::Mtp => {
            let (d, e) = layer();
            (d + (2 * m.hidden * m.hidden) as f64 / tp, e)
        }
        LayerKind::Dense | LayerKind::Moe => layer(),
    }
}

impl CostModel for FirstPrinciples {
    fn layer_times(&self, s: &Scenario, layer: PlacedLayer) -> Result<[LayerTimes; 2], SimError> {
        if s.training.precision == Precision::Fp8 && s.cluster.gpu.fp8_flops == 0.0 {
            return Err(SimError::Layout(format!(
                "{} has no FP8 tensor cores: use precision = \"bf16\"",
                s.cluster.gpu.name
            )));
        }
        let ctx = FirstPrinciples::context(s);
        Ok(match layer.kind {
            LayerKind::Dense | LayerKind::Moe => self.layer(s, &ctx, layer.index),
            kind => self.special(s, &ctx, kind, layer.index),
        })
    }

    fn frame(&self, s: &Scenario, placement: &Placement) -> StepTimes {
        let ctx = FirstPrinciples::context(s);
        let (n, ranks) = (placement.stages.len(), placement.ranks);
        let p = &s.parallel;
        // Where pairs overlap, an activation and a gradient leave at once and share the NIC.
        let messages = if s.schedule.overlaps_pairs() { 2.0 } else { 1.0 };
        let bytes = messages * 2.0 * (ctx.tokens() * s.model.hidden) as f64 / p.tp as f64;
        let same_node = p.tp * p.cp * p.dp * 2 <= s.cluster.gpus_per_node;
        let hop = p2p_s(&s.cluster, bytes, same_node);
        let turns = matches!(s.schedule, ScheduleKind::DualPipeV | ScheduleKind::ZbV);
        let p2p = (0..n.saturating_sub(1))
            .map(|b| if ranks == 1 || (turns && b + 1 == ranks) { 0.0 } else { hop })
            .collect();
        let tail =
            (0..ranks).map(|r| self.tail(s, placement, &held(s.schedule, n, ranks, r))).collect();
        StepTimes {
            stages: Vec::new(),
            tail,
            p2p_s: p2p,
            instruction_overhead_s: self.constants.gap_s,
            expert_load: Vec::new(),
        }
    }
}

/// Stages that pipeline rank `r` holds.
fn held(kind: ScheduleKind, stages: usize, ranks: usize, r: usize) -> Vec<usize> {
    if is_two_way(kind) && stages > 1 {
        return vec![r, stages - 1 - r];
    }
    match kind {
        ScheduleKind::DualPipeV | ScheduleKind::ZbV if stages == 2 * ranks => {
            vec![r, stages - 1 - r]
        }
        _ => (r..stages).step_by(ranks.max(1)).collect(),
    }
}
