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
    /// Ranks that share out each product (tensor parallelism).
    Tp,
    /// Ranks that share out the layers (pipeline parallelism).
    Pp,
    /// Ranks that share out the routed experts (expert parallelism).
    Ep,
    /// Ranks that share out the sequences (data parallelism).
    Dp,
    /// Ranks that share out a sequence's tokens (context parallelism).
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
    /// The embedding of tokens.
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
    /// The forward pass.
    F,
    /// Backward for input (dgrad).
    B,
    /// Backward for weights (wgrad).
    W,
}

/// How an op uses a GPU: which kernels it becomes and what bounds their time. Every op of the table
/// states its own, and whoever reads a record times it by this, whatever the op is called.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum OpClass {
    /// One matrix product of `a` and `b`, which lie as the parameter `layout` says.
    Gemm,
    /// One matrix product an expert, on the rows that the parameter `counts` gives it.
    GroupedGemm,
    /// One product of transposed casts `dy` and `x`, whose columns the parameter `segments` cuts.
    WeightGradient,
    /// Causal attention over whole sequences; sizes in the parameters `shape` and `segments`.
    Attention,
    /// The gradient of [`OpClass::Attention`].
    AttentionBackward,
    /// Products and attention of decoding, over a cache of earlier tokens.
    Decode,
    /// The product with the head's `weight`, then softmax and loss over its columns.
    Loss,
    /// The gradient of [`OpClass::Loss`]: two products and a pass over the logits.
    LossBackward,
    /// Tokens' rows to the ranks of their experts.
    Dispatch,
    /// The experts' rows back to the ranks of their tokens.
    Combine,
    /// Counting and placing of the rows that [`OpClass::Dispatch`] moves.
    DispatchPlan,
    /// Selection of experts: many passes over small rows of scores.
    Routing,
    /// The gradient of [`OpClass::Routing`].
    RoutingBackward,
    /// Reads the rows of a table that an index names.
    Gather,
    /// Adds rows onto those of a table that an index names.
    Scatter,
    /// Rotates some columns of every head in place; the parameters `head_dim` and `start` say
    /// which.
    Rotation,
    /// Communication along the record's group; a copy where the group has one member.
    Collective,
    /// Moves its bytes at the memory's pace: copies, element-wise arithmetic, transposes.
    Stream,
    /// Computes on the bytes that it moves: casts with block scales, SwiGLU.
    Convert,
    /// Moves short rows, each reduced or permuted: norms, gates.
    Row,
}

/// A tensor's role, element type and shape, without its elements.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct TensorMeta {
    /// The role in the op, as in a case file (`a`, `b_scale`, `out.d` without the `out.`).
    pub role: String,
    /// Type of the elements.
    pub dtype: DType,
    /// Length of each dimension, the slowest first.
    pub shape: Vec<usize>,
}

impl TensorMeta {
    /// Number of elements.
    pub fn elements(&self) -> u64 {
        self.shape.iter().map(|&d| d as u64).product()
    }

    /// Bytes of the dense tensor.
    pub fn bytes(&self) -> u64 {
        self.elements() * self.dtype.size() as u64
    }
}

/// One executed (or merely recorded) op.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct OpRecord {
    /// Position in the trace, counted from 0.
    pub seq: u64,
    /// Optimizer step to which it belongs.
    pub step: u64,
    /// Rank that executes it.
    pub rank: usize,
    /// Name in the op table, `gemm_fp8` for instance.
    pub op: String,
    /// How the op uses a GPU.
    pub class: OpClass,
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
