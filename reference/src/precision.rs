//! The recipe: which element types a step uses, and what is kept for the backward.

use fathom_numerics::formats::Format;
use fathom_numerics::quant::ScaleKind;
use fathom_numerics::quant::delayed::AmaxAlgorithm;
use fathom_trace::DType;
use serde::de::Error;
use serde::{Deserialize, Deserializer, Serialize};

use crate::op::codes::Block;
use crate::ops::quantize_weight::QuantizeWeight;

/// The precision modes of the numerics contract.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// The report's recipe: Linears in FP8, everything else in BF16 and F32.
    Fp8,
    /// Products on BF16 tensor cores.
    Bf16,
    /// Plain F32: every product an in-order chain of fma.
    Fp32,
    /// Plain F64: for gradient checks; outside the contract.
    F64,
}

impl Mode {
    /// Every mode, the lowest precision first.
    pub const ALL: [Mode; 4] = [Mode::Fp8, Mode::Bf16, Mode::Fp32, Mode::F64];

    /// The name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Mode::Fp8 => "fp8",
            Mode::Bf16 => "bf16",
            Mode::Fp32 => "fp32",
            Mode::F64 => "f64",
        }
    }

    /// The mode of a name.
    pub fn from_name(name: &str) -> Option<Mode> {
        Mode::ALL.into_iter().find(|m| m.name() == name)
    }
}

/// How FP8 operands are cast and multiplied. The default is the report's; the baselines change
/// single entries.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Fp8Recipe {
    /// Rows and columns of an activation that share a scale.
    pub activation_block: Block,
    /// Rows and columns of a weight that share a scale.
    pub weight_block: Block,
    /// Rows and columns of a gradient that share a scale in dgrad, and of its transpose in wgrad.
    /// `[128, 128]` is the report's block-wise baseline; where experts share out rows, blocks are
    /// of the rows as they lie, and each row takes its block's scale with it.
    pub gradient_block: Block,
    /// What the scales of activations, weights and gradients may be; `mx`, in blocks of
    /// `[1, 32]`, is a baseline.
    pub scale: ScaleKind,
    /// Format of gradients; `e5m2` is a baseline.
    #[serde(deserialize_with = "fp8_format")]
    pub gradient_format: Format,
    /// Elements of k summed on the tensor core before promotion; none: all of them, which needs
    /// per-tensor scales.
    pub promotion_interval: Option<usize>,
    /// Delayed scales of activations and gradients, a baseline: none, so that a cast's scale
    /// follows from what it casts. Their blocks must be the whole tensor; `scale` is that of
    /// weights and `dispatch_scale` that of kept values only.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub delayed: Option<Delayed>,
}

/// Delayed per-tensor scaling (Transformer Engine's recipe): the scale of a step's casts follows
/// from the largest magnitudes of the steps before.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Delayed {
    /// Steps that count; at least 1.
    pub history: usize,
    /// Powers of two of headroom below the format's largest value.
    pub margin: u8,
    /// Which amax of the history counts: the largest or the newest.
    pub amax: AmaxAlgorithm,
}

impl Default for Delayed {
    /// Transformer Engine's: 1024 steps, no headroom, the largest.
    fn default() -> Self {
        Delayed { history: 1024, margin: 0, amax: AmaxAlgorithm::Max }
    }
}

/// A format that products take.
fn fp8_format<'de, D: Deserializer<'de>>(from: D) -> Result<Format, D::Error> {
    match Format::deserialize(from)? {
        fp8 @ (Format::E4M3 | Format::E5M2) => Ok(fp8),
        other => Err(D::Error::custom(format!("expected e4m3 or e5m2, found {other}"))),
    }
}

impl Default for Fp8Recipe {
    fn default() -> Self {
        let tile = [Some(1), Some(128)];
        Fp8Recipe {
            activation_block: tile,
            weight_block: [Some(128), Some(128)],
            gradient_block: tile,
            scale: ScaleKind::F32,
            gradient_format: Format::E4M3,
            promotion_interval: Some(128),
            delayed: None,
        }
    }
}

impl Fp8Recipe {
    /// One scale a tensor, everywhere.
    pub fn per_tensor() -> Fp8Recipe {
        let whole = [None, None];
        Fp8Recipe {
            activation_block: whole,
            weight_block: whole,
            gradient_block: whole,
            ..Fp8Recipe::default()
        }
    }

    /// As [`Fp8Recipe::per_tensor`] with scales from the steps before.
    pub fn delayed(delayed: Delayed) -> Fp8Recipe {
        Fp8Recipe { delayed: Some(delayed), ..Fp8Recipe::per_tensor() }
    }

    /// MXFP8 (OCP Microscaling v1.0): a power of two for every 32 elements along k of every
    /// operand, each block's sum promoted with its scales.
    pub fn mx() -> Fp8Recipe {
        let block = [Some(1), Some(32)];
        Fp8Recipe {
            activation_block: block,
            weight_block: block,
            gradient_block: block,
            scale: ScaleKind::Mx,
            promotion_interval: Some(32),
            ..Fp8Recipe::default()
        }
    }

    /// The cast of a weight. Blocks that are not as many rows as columns have no transpose that
    /// dgrad could read: it is cast from the values, as hardware with MX formats needs it.
    pub fn weight_cast(&self) -> QuantizeWeight {
        let [rows, columns] = self.weight_block;
        let transpose_anew = rows != columns;
        QuantizeWeight { block: self.weight_block, scale: self.scale, transpose_anew }
    }
}

/// What a step computes in and keeps.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Recipe {
    /// Whether products are in FP8, BF16, FP32 or FP64.
    pub mode: Mode,
    /// The FP8 casts, in mode `fp8`.
    #[serde(default)]
    pub fp8: Fp8Recipe,
    /// Scales of the activations before dispatch, of the gradients before the backward dispatch and
    /// of the attention's output, in mode `fp8`.
    pub dispatch_scale: ScaleKind,
    /// Recompute normalised activations in the backward.
    pub recompute_norms: bool,
    /// Recompute the attention's up-projections (queries, keys, values) in the backward.
    pub recompute_up_projections: bool,
    /// Recompute SwiGLU in the backward.
    pub recompute_swiglu: bool,
    /// Keep SwiGLU's input in FP8, in mode `fp8`.
    pub keep_swiglu_input_fp8: bool,
    /// Keep the attention's output in E5M6, in mode `fp8`.
    pub keep_attention_output_e5m6: bool,
    /// Keys a block: the attention's softmax runs online over blocks of that many rows.
    pub attention_block_kv: usize,
    /// Whether ops that follow each other run as one where the table has an op for both: a norm and
    /// the cast of its result, for instance. It changes no bit. None: where the backend computes
    /// them faster so ([`Backend::fuses`](crate::backend::Backend::fuses)).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fused: Option<bool>,
}

impl Recipe {
    /// The mode's defaults: in `fp8` and `bf16` the report's recomputation, in the plain modes
    /// none.
    pub fn new(mode: Mode) -> Recipe {
        let low = matches!(mode, Mode::Fp8 | Mode::Bf16);
        let fp8 = mode == Mode::Fp8;
        Recipe {
            mode,
            fp8: Fp8Recipe::default(),
            dispatch_scale: ScaleKind::Pow2,
            recompute_norms: low,
            recompute_up_projections: low,
            recompute_swiglu: low,
            keep_swiglu_input_fp8: fp8,
            keep_attention_output_e5m6: fp8,
            attention_block_kv: 64,
            fused: None,
        }
    }

    /// Element type of master weights, gradients and router values.
    pub fn master(&self) -> DType {
        if self.mode == Mode::F64 { DType::F64 } else { DType::F32 }
    }

    /// Element type of the residual stream and of activations between ops.
    pub fn activation(&self) -> DType {
        match self.mode {
            Mode::Fp8 | Mode::Bf16 => DType::BF16,
            Mode::Fp32 | Mode::F64 => self.master(),
        }
    }
}
