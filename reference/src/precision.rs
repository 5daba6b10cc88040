//! The recipe: which element types a step uses, and what is kept for the backward.

use fathom_trace::DType;
use serde::{Deserialize, Serialize};

/// The precision modes of the numerics contract.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// Plain F32: every product an in-order chain of fma.
    Fp32,
    /// Plain F64: for gradient checks; outside the contract.
    F64,
}

impl Mode {
    /// Every mode.
    pub const ALL: [Mode; 2] = [Mode::Fp32, Mode::F64];

    /// The name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Mode::Fp32 => "fp32",
            Mode::F64 => "f64",
        }
    }

    /// The mode of a name.
    pub fn from_name(name: &str) -> Option<Mode> {
        Mode::ALL.into_iter().find(|m| m.name() == name)
    }
}

/// What a step computes in and keeps.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Recipe {
    /// Precision mode.
    pub mode: Mode,
    /// Recompute normalised activations in the backward.
    pub recompute_norms: bool,
    /// Recompute the attention's up-projections (queries, keys, values) in the backward.
    pub recompute_up_projections: bool,
    /// Recompute SwiGLU in the backward.
    pub recompute_swiglu: bool,
    /// Rows of a KV block of the attention.
    pub attention_block_kv: usize,
}

impl Recipe {
    /// The mode's defaults.
    pub fn new(mode: Mode) -> Recipe {
        let recompute = false;
        Recipe {
            mode,
            recompute_norms: recompute,
            recompute_up_projections: recompute,
            recompute_swiglu: recompute,
            attention_block_kv: 64,
        }
    }

    /// Element type of master weights, gradients and router values.
    pub fn master(&self) -> DType {
        if self.mode == Mode::F64 { DType::F64 } else { DType::F32 }
    }

    /// Element type of the residual stream and of activations between ops.
    pub fn activation(&self) -> DType {
        self.master()
    }
}
