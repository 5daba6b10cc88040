//! Op records: what work a step consists of.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::DType;

/// How many ranks share the work, and along which dimension.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Parallel {
    /// Tensor parallel: ranks that split every layer's matrices.
    pub tp: usize,
    /// Pipeline parallel: ranks that split the layers.
    pub pp: usize,
    /// Expert parallel: ranks that split the routed experts.
    pub ep: usize,
    /// Data parallel: ranks that split the batch.
    pub dp: usize,
    /// Context parallel: ranks that split the sequence.
    pub cp: usize,
}

impl Default for Parallel {
    fn default() -> Self {
        Parallel { tp: 1, pp: 1, ep: 1, dp: 1, cp: 1 }
    }
}

/// The parallel dimension along which a collective's ranks lie.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema,
)]
#[serde(rename_all = "lowercase")]
pub enum GroupKind {
    /// Tensor parallel.
    Tp,
    /// Pipeline parallel.
    Pp,
    /// Expert parallel.
    Ep,
    /// Data parallel.
    Dp,
    /// Context parallel.
    Cp,
}

/// The ranks that take part in a collective op.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Group {
    /// The dimension along which they lie.
    pub kind: GroupKind,
    /// How many they are.
    pub size: usize,
}

/// The part of a layer (or of the step) that an op belongs to.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, JsonSchema,
)]
#[serde(rename_all = "lowercase")]
pub enum Component {
    /// Token embedding.
    Embedding,
    /// Norm, projections and the attention itself.
    Attention,
    /// Router and all-to-all to the experts' ranks.
    Dispatch,
    /// Feed-forward: dense, shared and routed experts.
    Mlp,
    /// All-to-all back and the weighted sum.
    Combine,
    /// Final norm, head and loss.
    Head,
    /// The multi-token-prediction module's own parts (norms, `eh_proj`).
    Mtp,
    /// Pipeline send and receive.
    Pipeline,
    /// Gradient reduction, clipping, optimizer, parameter gathering.
    Optimizer,
}

/// Forward, input-backward, weight-backward: the letters of the DualPipe paper.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, JsonSchema,
)]
pub enum Phase {
    /// Forward.
    F,
    /// Backward for input (dgrad).
    B,
    /// Backward for weights (wgrad).
    W,
}

/// A tensor's role, element type and shape, without its elements.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct TensorMeta {
    /// The role in the op, as in a case file (`a`, `b_scale`, `out.d` without the `out.`).
    pub role: String,
    /// Element type.
    pub dtype: DType,
    /// Row-major shape.
    pub shape: Vec<usize>,
}

impl TensorMeta {
    /// Bytes of the dense tensor.
    pub fn bytes(&self) -> u64 {
        self.shape.iter().map(|&d| d as u64).product::<u64>() * self.dtype.size() as u64
    }
}

/// One executed (or merely recorded) op.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct OpRecord {
    /// Position in the trace, counted from 0.
    pub seq: u64,
    /// Optimizer step.
    pub step: u64,
    /// Rank that executes it.
    pub rank: usize,
    /// Name in the op table, `gemm_fp8` for instance.
    pub op: String,
    /// The op's parameters, as in a case file.
    pub params: BTreeMap<String, serde_json::Value>,
    /// Input tensors in the order of the op's roles.
    pub inputs: Vec<TensorMeta>,
    /// Output tensors in the order of the op's roles.
    pub outputs: Vec<TensorMeta>,
    /// Floating-point operations (a multiply-add counts two).
    pub flops: u64,
    /// Bytes that the op must read at least.
    pub bytes_read: u64,
    /// Bytes that the op must write at least.
    pub bytes_written: u64,
    /// Bytes that leave this rank, for a collective or send; else 0.
    pub bytes_sent: u64,
    /// The ranks of a collective; `None` for a local op.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub group: Option<Group>,
    /// Decoder layer, counted from 0; MTP modules follow the last layer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub layer: Option<usize>,
    /// Part of the layer.
    pub component: Component,
    /// Forward, input-backward or weight-backward.
    pub phase: Phase,
    /// Micro-batch, counted from 0.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub micro_batch: Option<usize>,
}
