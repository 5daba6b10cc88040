//! What the cost side hands to the event engine: seconds of every part of every layer, by phase and
//! stream.
//!
//! A chunk is one pipeline stage's layers on one micro-batch. Every layer has four components in
//! the order attention, dispatch, mlp, combine; attention and mlp run on the compute stream,
//! dispatch and combine (all-to-all) on the communication stream. Collectives that block the
//! computation (tensor and context parallelism) are part of `attention_s` and `mlp_s`. Backward
//! runs the components in reverse: combine(B), mlp(B), dispatch(B), attention(B).

use serde::{Deserialize, Serialize};

/// Seconds of one layer's four components in one phase (F, B input only, or W).
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct PhaseTimes {
    /// Attention with its norms and projections, seconds on the compute stream.
    pub attention_s: f64,
    /// All-to-all dispatch (its gradient in B), seconds on the communication stream; 0 in W and for
    /// dense layers.
    pub dispatch_s: f64,
    /// Gate, experts, shared expert or dense FFN, seconds on the compute stream.
    pub mlp_s: f64,
    /// All-to-all combine (its gradient in B), seconds on the communication stream.
    pub combine_s: f64,
}

/// What a [`LayerTimes`] stands for; only a label, the engine treats all alike.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LayerKind {
    /// The embedding of tokens.
    Embedding,
    /// Transformer layer with a dense FFN.
    Dense,
    /// Transformer layer with routed experts.
    Moe,
    /// Multi-token-prediction module (its transformer layer, projection and its own pass of the
    /// head).
    Mtp,
    /// Output norm, head and loss.
    Head,
}

/// One layer's times in all phases. The full backward of a layer is `backward` and `weight`
/// together.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct LayerTimes {
    /// What the layer is.
    pub kind: LayerKind,
    /// Seconds of F.
    pub forward: PhaseTimes,
    /// Seconds of B, gradient of the inputs only; recomputation that the policy asks for is
    /// included.
    pub backward: PhaseTimes,
    /// Seconds of W, gradient of the weights; `dispatch_s` and `combine_s` are 0.
    pub weight: PhaseTimes,
    /// Share of `mlp_s` that grows with the load of the busiest expert rank (the routed experts),
    /// 0..=1.
    pub routed_share: f64,
}

/// Times of a pipeline stage. The two lists describe the same layers, shallow to deep, in two
/// situations.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct StageTimes {
    /// The layers of a chunk that runs by itself, nothing communicating beside it.
    pub alone: Vec<LayerTimes>,
    /// The layers of a chunk that runs as half of an overlapped forward-backward pair: fewer SMs,
    /// shared memory bandwidth.
    pub overlapped: Vec<LayerTimes>,
}

/// What happens on a pipeline rank after its last backward.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct TailTimes {
    /// Reduce-scatter (or all-reduce) of the gradients that is not hidden under the pipeline,
    /// seconds.
    pub grad_reduce_s: f64,
    /// Optimizer step with clipping, seconds.
    pub optimizer_s: f64,
    /// All-gather of the updated parameters, seconds.
    pub param_gather_s: f64,
}

/// Everything the event engine needs to play one training step of one pipeline.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct StepTimes {
    /// One entry a pipeline stage, stage 0 the shallowest. For DualPipe both directions share them:
    /// rank `r` runs stage `r` for direction 0 and stage `P-1-r` for direction 1.
    pub stages: Vec<StageTimes>,
    /// One entry a pipeline rank.
    pub tail: Vec<TailTimes>,
    /// Time of an activation (or its gradient) from a stage to the next, by boundary `s -> s+1`:
    /// `stages.len() - 1` entries, seconds. Boundaries inside a rank (the turn of a V) cost nothing
    /// and hold 0.
    pub p2p_s: Vec<f64>,
    /// Whether a full backward runs its weight gradients while its exchanges are on the way.
    pub wgrad_under_exchanges: bool,
    /// Fixed time before every instruction in which neither stream runs (launches, bookkeeping),
    /// seconds.
    pub instruction_overhead_s: f64,
    /// Load of the busiest rank of the expert group relative to the mean, by `[layer][micro-batch]`
    /// with layers counted over all stages' lists in order; empty when the load is balanced.
    /// `routed_share` of the mlp times and the all-to-all times are multiplied by it.
    pub expert_load: Vec<Vec<f32>>,
}
