//! Device memory of every pipeline rank over the step, by category.
//!
//! Weights, gradients and optimizer state are there all the time; activations come with a chunk's
//! forward and go with its weight gradient. Bytes per element follow the DeepSeek-V3 report
//! (section 3.3.3 and table of the recipe) in FP8 and Megatron-LM's mixed precision in BF16; what
//! is kept for backward is listed in [`activation_bytes_per_token`].
//!
//! Not what `fathom train` holds: `fathom_reference::memory` counts that by running the model's own
//! code, for one process or to the byte for one rank. Here are other programs' buffers and ZeRO
//! stages, in closed form, since a search asks for tens of thousands of layouts.

use fathom_schedule::{Op, Schedule};
use serde::Serialize;

use crate::config::{LoraTarget, Recompute, Scenario};
use crate::events::StepOutcome;
use crate::network::alltoall::largest_of;
use crate::parallel::{PlacedLayer, Placement, geometry};
use crate::times::LayerKind;
use fathom_config::{AttentionConfig, MoeConfig};

/// CUDA context, libraries and allocator slack of a rank: a round figure, stated, not fitted.
const RUNTIME_BYTES: f64 = 2e9;

/// Bytes of one rank by category.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub struct Categories {
    /// Weights in the format the GEMMs read: two bytes per element, BF16 or FP8 in both
    /// orientations.
    pub weights: f64,
    /// Gradient accumulators in FP32, bytes.
    pub gradients: f64,
    /// Master weights FP32 and the two moments (BF16 in FP8 training, else FP32), as ZeRO shards
    /// them.
    pub optimizer: f64,
    /// Activations that are kept for backward.
    pub activations: f64,
    /// Buffers of the all-to-alls and of the pipeline's sends.
    pub communication: f64,
    /// CUDA context, libraries, allocator slack.
    pub runtime: f64,
}

impl Categories {
    /// Bytes of all categories together.
    pub fn total(&self) -> f64 {
        self.weights
            + self.gradients
            + self.optimizer
            + self.activations
            + self.communication
            + self.runtime
    }

    /// Each category's name and bytes, in a fixed order.
    pub fn named(&self) -> [(&'static str, f64); 6] {
        [
            ("weights", self.weights),
            ("gradients", self.gradients),
            ("optimizer", self.optimizer),
            ("activations", self.activations),
            ("communication", self.communication),
            ("runtime", self.runtime),
        ]
    }
}

/// The memory of one pipeline rank over a step.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct RankMemory {
    /// Bytes by category at the moment of the peak.
    pub peak: Categories,
    /// Total over time: seconds from the start of the step, bytes from then on. Empty where the
    /// step was played without its instructions.
    pub over_time: Vec<(f64, f64)>,
    /// Most bytes that it has in its host's memory.
    pub host_bytes: f64,
}

/// Memory of all ranks of a pipeline.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Memory {
    /// Memory of each pipeline rank.
    pub ranks: Vec<RankMemory>,
    /// Bytes of memory per GPU that may be filled.
    pub capacity_bytes: f64,
    /// Bytes of its host's memory for each GPU.
    pub host_capacity_bytes: f64,
}

impl StageParameters {
    fn add(&mut self, other: StageParameters) {
        self.dense += other.dense;
        self.experts += other.experts;
    }
}

impl Memory {
    /// The fullest rank: its number, and its bytes at the peak.
    pub fn fullest(&self) -> (usize, f64) {
        let totals = self.ranks.iter().map(|r| r.peak.total()).enumerate();
        totals.fold((0, 0.0), |best, (r, b)| if b > best.1 { (r, b) } else { best })
    }

    /// Whether every rank's peak fits into its GPU, and what lies beside it into its host.
    pub fn fits(&self) -> bool {
        self.fullest().1 <= self.capacity_bytes && self.host_bytes() <= self.host_capacity_bytes
    }

    /// Most bytes that a rank has in its host's memory.
    pub fn host_bytes(&self) -> f64 {
        self.ranks.iter().map(|r| r.host_bytes).fold(0.0, f64::max)
    }

    /// What is wrong, for people: `does not fit: 93 of 80 GB on rank 3, mostly X; try Y`; `None`
    /// where it fits.
    pub fn complaint(&self, scenario: &Scenario) -> Option<String> {
        if self.fits() {
            return None;
        }
        let (rank, bytes) = self.fullest();
        if bytes <= self.capacity_bytes {
            let (need, have) = (self.host_bytes() / 1e9, self.host_capacity_bytes / 1e9);
            return Some(format!(
                "does not fit: {need:.0} of {have:.0} GB of host memory a GPU; try a smaller \
                 offload.optimizer or offload.activations"
            ));
        }
        let named = self.ranks[rank].peak.named();
        let (most, _) = named.into_iter().fold(("", 0.0), |a, b| if b.1 > a.1 { b } else { a });
        let (need, have) = (bytes / 1e9, self.capacity_bytes / 1e9);
        let advice = advice(scenario, most);
        Some(format!(
            "does not fit: {need:.0} of {have:.0} GB on rank {rank}, mostly {most}; try {advice}"
        ))
    }
}

/// What helps against the largest category.
fn advice(s: &Scenario, most: &str) -> String {
    let p = &s.parallel;
    match most {
        "activations" => match s.training.recompute {
            Recompute::None => "recompute = \"selective\"".into(),
            _ if s.training.micro_batch > 1 => {
                format!("micro_batch = {}", s.training.micro_batch / 2)
            }
            Recompute::Selective | Recompute::Alternate => {
                "recompute = \"full\", or a larger tp or cp".into()
            }
            Recompute::Full => "a larger tp or cp".into(),
        },
        "optimizer" if p.zero == 0 => "zero = 1".into(),
        _ if geometry(s).copies() > 1 => {
            "dualpipev (one copy of the weights), or a larger ep, tp or pp".into()
        }
        _ => "a larger ep, tp or pp".into(),
    }
}

/// Parameters of a stage on one rank: those every data-parallel rank holds, and its share of routed
/// experts.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct StageParameters {
    /// Attention, norms, gates, dense and shared feed-forward parts, embedding, head; divided by
    /// tp.
    pub dense: f64,
    /// Routed experts that this rank holds.
    pub experts: f64,
}

/// The parameters that one rank holds of a stage with these layers.
pub fn stage_parameters(s: &Scenario, layers: &[PlacedLayer]) -> StageParameters {
    let (m, p) = (&s.model, &s.parallel);
    let tp = p.tp as f64;
    let vocabulary = (m.vocab_size * m.hidden_size) as f64 / tp;
    let mut sum = StageParameters::default();
    // Counted once, not for every layer.
    let attention = m.attention_params() as f64 / tp + m.norm_params() as f64;
    let dense_ffn = m.dense_ffn_params() as f64 / tp;
    let shared_ffn = |moe: &MoeConfig| {
        let gate = (moe.n_routed_experts * m.hidden_size) as f64;
        (m.moe_ffn_params(moe, 0) as f64 - gate) / tp + gate
    };
    let shared_ffn = m.moe.as_ref().map_or(0.0, shared_ffn);
    let mut block = |moe_layer: bool| {
        sum.dense += attention;
        match &m.moe {
            Some(moe) if moe_layer => {
                sum.dense += shared_ffn;
                let expert = (3 * m.hidden_size * moe.intermediate_size) as f64;
                sum.experts += expert * moe.n_routed_experts as f64 / p.ep as f64;
            }
            _ => sum.dense += dense_ffn,
        }
    };
    let (mut embeddings, mut projections) = (0.0, 0.0);
    for layer in layers {
        match layer.kind {
            LayerKind::Dense => block(false),
            LayerKind::Moe => block(true),
            LayerKind::Mtp => {
                block(m.moe.is_some());
                projections +=
                    (2 * m.hidden_size * m.hidden_size) as f64 / tp + 3.0 * m.hidden_size as f64;
            }
            LayerKind::Embedding => embeddings += 1.0,
            LayerKind::Head => embeddings += 1.0,
        }
    }
    sum.dense += embeddings * vocabulary + projections;
    sum
}

/// The parameters of a stage that are trained: all, or the adapters.
pub fn trained_parameters(s: &Scenario, layers: &[PlacedLayer]) -> StageParameters {
    let Some(lora) = &s.lora else { return stage_parameters(s, layers) };
    let adapted = |l: &&PlacedLayer| !matches!(l.kind, LayerKind::Embedding | LayerKind::Head);
    let layers = layers.iter().filter(adapted).count() as f64;
    let dense = layers * lora.parameters(&s.model) / s.parallel.tp as f64;
    StageParameters { dense, experts: 0.0 }
}

/// Bytes that a layer keeps for backward for each of the rank's tokens (after cp, before tp).
///
/// Always: the inputs of both norms. Kept or recomputed: outputs of the norms, MLA's up-projected
/// heads, SwiGLU's output. FP8: inputs of Linears one byte per element with their scales; where the
/// stack keeps them so, the input of the output projection E5M6 (12 bits), that of SwiGLU one
/// byte. Routed experts keep the
/// rows that arrive: `top_k` per token on average.
pub fn activation_bytes_per_token(s: &Scenario, kind: LayerKind) -> f64 {
    let m = &s.model;
    let (h, heads) = (m.hidden_size as f64, m.heads as f64);
    let fp8 = s.training.precision.is_quantised();
    // SwiGLU's input a byte, the attention's output twelve bits.
    let cast = fp8 && s.stack.kept_in_fp8;
    let recompute = s.training.recompute;
    // Operands that only a weight's gradient reads are not kept where weights are frozen; what an
    // adapter reads is, in BF16.
    let adapted = |target| s.lora.as_ref().is_some_and(|l| l.targets.contains(&target));
    let operand = |target| match s.lora {
        None => s.training.precision.operand_bytes(),
        Some(_) => {
            if adapted(target) {
                2.0
            } else {
                0.0
            }
        }
    };
    match kind {
        LayerKind::Embedding => return 8.0,
        LayerKind::Head => return 2.0 * h + 2.0 * m.vocab_size as f64,
        _ if recompute == Recompute::Full => return 2.0 * h + mtp_extra(s, kind),
        _ => {}
    }
    let kept = if recompute == Recompute::None { 1.0 } else { 0.0 };
    let (qk, v) = m.head_dims();
    // Attention: norm input and output, latents, heads, output with its log-sum-exp.
    let mut bytes = 2.0 * h + kept * operand(LoraTarget::Qkv) * h;
    bytes += match m.attention {
        AttentionConfig::Mla { q_lora_rank, kv_lora_rank, qk_rope_head_dim, .. } => {
            let query = q_lora_rank.unwrap_or(0);
            let latents = 2.0 * (query + kv_lora_rank + qk_rope_head_dim) as f64;
            latents + kept * 2.0 * heads * (2 * qk + v) as f64
        }
        AttentionConfig::Gqa { kv_heads, head_dim } => {
            2.0 * (heads + 2.0 * kv_heads as f64) * head_dim as f64
        }
    };
    bytes += heads * v as f64 * if cast { 1.5 } else { 2.0 } + 4.0 * heads;
    // FFN: norm input and output, SwiGLU's input and output.
    bytes += 2.0 * h + kept * operand(LoraTarget::GateUp) * h;
    let swiglu = |width: f64| {
        2.0 * width * if cast { 1.0 + 4.0 / 128.0 } else { 2.0 }
            + kept * operand(LoraTarget::Down) * width
    };
    let routed = matches!(kind, LayerKind::Moe | LayerKind::Mtp);
    bytes += match &m.moe {
        Some(moe) if routed => {
            let width = moe.intermediate_size as f64;
            let rows = moe.top_k as f64 * busiest(s, m.layers);
            let gate = 4.0 * moe.n_routed_experts as f64;
            gate + rows * (operand(LoraTarget::GateUp) * h + swiglu(width))
                + moe.n_shared_experts as f64 * swiglu(width)
        }
        _ => swiglu(m.intermediate_size as f64),
    };
    bytes + mtp_extra(s, kind)
}

/// Rows of the fullest expert rank against the mean, over so many layers whose loads are drawn one
/// by one and add up.
fn busiest(s: &Scenario, layers: usize) -> f64 {
    let spread = s.expert_load.deviation / (layers.max(1) as f64).sqrt();
    1.0 + spread * largest_of(s.parallel.ep as f64)
}

/// A prediction module also keeps its concatenated inputs and its logits.
fn mtp_extra(s: &Scenario, kind: LayerKind) -> f64 {
    let m = &s.model;
    if kind == LayerKind::Mtp {
        4.0 * m.hidden_size as f64 + 2.0 * m.vocab_size as f64
    } else {
        0.0
    }
}

/// Bytes of activations that one chunk (a stage's layers on a micro-batch) keeps on one rank.
pub fn chunk_bytes(s: &Scenario, layers: &[PlacedLayer]) -> f64 {
    let t = &s.training;
    let tokens = (t.micro_batch * t.seq_len) as f64 / s.parallel.cp as f64;
    let bytes: f64 = layers.iter().map(|l| activation_bytes_per_token(s, l.kind)).sum();
    tokens * bytes / s.parallel.tp as f64
}

/// Bytes of optimizer state that the GPU holds for a parameter: the master weight, and what of the
/// moments is not offloaded.
fn state_bytes(s: &Scenario) -> f64 {
    let moment = if s.training.precision.is_quantised() { 2.0 } else { 4.0 };
    4.0 + (1.0 - s.offload.optimizer) * 2.0 * moment
}

/// What a rank holds all the time: a lower bound of its peak. The streams of `schedule` may be
/// empty.
pub fn standing(
    s: &Scenario,
    placement: &Placement,
    schedule: &Schedule,
    rank: usize,
) -> Categories {
    let p = &s.parallel;
    let fp8 = s.training.precision.is_quantised();
    let (mut own, mut trained) = (StageParameters::default(), StageParameters::default());
    let stages = schedule.geometry.held(rank);
    for &stage in &stages {
        let layers = &placement.stages[stage];
        own.add(stage_parameters(s, layers));
        trained.add(trained_parameters(s, layers));
    }
    // A prediction module needs the embedding: the rank that also holds stage 0 has it.
    let deepest = stages.contains(&(schedule.geometry.stages - 1));
    if s.model.mtp_depth > 0 && deepest && !stages.contains(&0) {
        let embedding = (s.model.vocab_size * s.model.hidden_size) as f64 / p.tp as f64;
        own.dense += embedding;
        trained.dense += if s.lora.is_none() { embedding } else { 0.0 };
    }
    let adapters = if s.lora.is_some() { trained.dense } else { 0.0 };
    let dense_group = (p.dp * p.cp) as f64;
    let expert_group = ((p.tp * p.cp * p.dp) as f64 / p.ep as f64).max(1.0);
    let share = |of: StageParameters, sharded: bool| {
        if sharded {
            of.dense / dense_group + of.experts / expert_group
        } else {
            of.dense + of.experts
        }
    };

    let tokens = (s.training.micro_batch * s.training.seq_len) as f64 / (p.cp * p.tp) as f64;
    let h = s.model.hidden_size as f64;
    let rows = s.model.moe.map_or(0.0, |moe| if p.ep > 1 { moe.top_k as f64 } else { 0.0 });
    let rows = rows * busiest(s, 1);
    // Dispatch FP8 or BF16 out and combine BF16 back, one set for the forward and one for the
    // backward chunk; two micro-batches arriving and two leaving the pipeline rank.
    let all_to_all = 2.0 * tokens * rows * h * (if fp8 { 1.0 } else { 2.0 } + 2.0);
    let pipeline = if p.pp > 1 { 4.0 * tokens * h * 2.0 } else { 0.0 };
    // A layer's activations come while the one before it is used.
    let layers = stages.iter().flat_map(|&stage| &placement.stages[stage]);
    let largest = layers.map(|l| chunk_bytes(s, std::slice::from_ref(l))).fold(0.0, f64::max);
    let moved = 2.0 * s.offload.activations * largest;
    Categories {
        weights: 2.0 * (share(own, p.zero >= 3) + adapters),
        gradients: 4.0 * share(trained, p.zero >= 2),
        optimizer: state_bytes(s) * share(trained, p.zero >= 1),
        activations: 0.0,
        communication: all_to_all + pipeline + moved,
        runtime: RUNTIME_BYTES,
    }
}

/// Memory of every rank. `step` gives the times of the curve; without its instructions only the
/// peaks are there, and they are the same, since a rank's peak depends on the order of its
/// instructions alone.
pub fn memory(
    s: &Scenario,
    placement: &Placement,
    schedule: &Schedule,
    step: &StepOutcome,
) -> Memory {
    let chunk: Vec<f64> = placement.stages.iter().map(|layers| chunk_bytes(s, layers)).collect();
    // Recomputing a whole layer brings its activations back while it runs backward.
    let transient = match s.training.recompute {
        Recompute::Full => {
            let mut once = s.clone();
            once.training.recompute = Recompute::None;
            let layers = placement.stages.iter().flatten();
            layers.map(|l| chunk_bytes(&once, std::slice::from_ref(l))).fold(0.0, f64::max)
        }
        _ => 0.0,
    };
    let here = 1.0 - s.offload.activations;
    let rank_memory = |(rank, ops): (usize, &Vec<Op>)| {
        let mut now = standing(s, placement, schedule, rank);
        let of = |dir: u8| chunk[schedule.geometry.stage(rank, dir)];
        let spans = step.ranks.get(rank).map_or(&[][..], |r| &r.instructions);
        let (mut over_time, mut alive, mut most_alive) = (Vec::new(), 0.0, 0.0f64);
        let mut peak = now;
        for (i, op) in ops.iter().enumerate() {
            alive += op.forward().map_or(0.0, |c| of(c.dir));
            most_alive = most_alive.max(alive);
            now.activations += op.forward().map_or(0.0, |c| here * of(c.dir));
            let during = if op.backward().is_some() { transient } else { 0.0 };
            now.activations += during;
            if now.activations > peak.activations {
                peak = now;
            }
            if let Some(&(start, _)) = spans.get(i) {
                over_time.push((start, now.total()));
            }
            alive -= op.weight().map_or(0.0, |c| of(c.dir));
            now.activations -= during + op.weight().map_or(0.0, |c| here * of(c.dir));
            if let Some(&(_, end)) = spans.get(i) {
                over_time.push((end, now.total()));
            }
        }
        // The moments that are not on the GPU, in FP32.
        let parameters = peak.optimizer / state_bytes(s);
        let host_bytes =
            s.offload.optimizer * 8.0 * parameters + s.offload.activations * most_alive;
        RankMemory { peak, over_time, host_bytes }
    };
    Memory {
        ranks: schedule.ranks.iter().enumerate().map(rank_memory).collect(),
        capacity_bytes: s.usable_memory_bytes(),
        host_capacity_bytes: s.offload.memory_bytes,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::parallel::{LayerWeights, place, schedule};

    fn v3() -> Scenario {
        Scenario::preset("deepseek-v3-h800-2048", &[]).unwrap()
    }

    fn peaks(s: &Scenario) -> Memory {
        let placement =
            place(s, LayerWeights { layer: 1.0, mtp: 2.2, head: 1.1, spared: 0.0 }).unwrap();
        memory(s, &placement, &schedule(s).unwrap(), &StepOutcome::default())
    }

    /// All ranks of a pipeline and an expert group together hold the model once a copy.
    #[test]
    fn parameters_of_all_ranks_are_the_models() {
        let s = v3();
        let placement = place(&s, LayerWeights::by_flops(&s)).unwrap();
        let stages = placement.stages.iter().map(|l| stage_parameters(&s, l));
        let total: f64 = stages.map(|p| p.dense + p.experts * s.parallel.ep as f64).sum();
        let p = s.model.parameters();
        // The final norm is not counted to the head.
        let want = (p.total + p.mtp - s.model.hidden_size as u64) as f64;
        assert!((total / want - 1.0).abs() < 1e-9, "{total} {want}");
    }

    #[test]
    fn v3_fits_as_published_and_a_batch_of_two_does_not() {
        let m = peaks(&v3());
        assert!(m.fits(), "{:?}", m.fullest());
        let mut s = v3();
        s.training.micro_batch = 2;
        s.training.recompute = Recompute::None;
        let complaint = peaks(&s).complaint(&s).unwrap();
        assert!(
            complaint.starts_with("does not fit: ") && complaint.contains(" of 80 GB"),
            "{complaint}"
        );
        assert!(
            complaint.contains("mostly activations; try recompute = \"selective\""),
            "{complaint}"
        );
    }

    #[test]
    fn weights_and_optimizer_by_hand() {
        // A rank of the middle: 8 MoE layers. A layer: attention 187.1 M, shared expert 44.04 M,
        // gate 1.835 M, norms; 4 routed experts of 44.04 M.
        let s = v3();
        let c = peaks(&s).ranks[5].peak;
        let dense = 8.0 * (187_105_280.0 + 44_040_192.0 + 1_835_008.0 + 2.0 * 7168.0 + 2048.0);
        let experts = 8.0 * 4.0 * 44_040_192.0;
        assert_eq!(c.weights, 2.0 * (dense + experts));
        assert_eq!(c.gradients, 4.0 * (dense + experts));
        assert!((c.optimizer - 8.0 * (dense / 128.0 + experts / 2.0)).abs() < 1.0);
    }

    #[test]
    fn uneven_experts_hold_more() {
        let of = |deviation: f64| {
            let mut s = v3();
            s.expert_load.deviation = deviation;
            peaks(&s).ranks[4].peak
        };
        let (even, uneven) = (of(0.0), of(0.5));
        assert!(uneven.activations > even.activations);
        assert!(uneven.communication > 1.5 * even.communication);
    }

    #[test]
    fn recomputing_more_keeps_less() {
        let activations = |r| {
            let mut s = v3();
            s.training.recompute = r;
            peaks(&s).ranks[4].peak.activations
        };
        assert!(activations(Recompute::None) > activations(Recompute::Selective));
        assert!(activations(Recompute::Selective) > activations(Recompute::Full));
    }
}
