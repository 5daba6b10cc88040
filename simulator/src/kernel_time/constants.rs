//! The physical constants of the kernel-time model: a handful, each with what it was fitted on.
//!
//! Nothing here belongs to one row of a validation table. GEMM constants come from the fitting half of the GEMMs of one profiled
//! chunk on H800 (their fastest runs), memory classes from the forward phases of the same chunk, all-to-all from EP16
//! alone. `fathom simulate calibrate TRACE --fit` repeats the GEMM fit on another machine's trace.

use serde::{Deserialize, Serialize};

/// Constants of the model, dimensionless or in clock cycles so that they carry over to other GPUs.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Constants {
    /// Share of the tensor-core peak that the MMAs of a tile's main loop reach.
    pub mma_efficiency: f64,
    /// Cycles of an SM's 128 lanes for one multiply-add each in the promotion of FP8 partial sums, waits included.
    pub promotion_cycles: f64,
    /// Cycles from the end of a tile's main loop to the start of the next that are not memory time.
    pub tile_cycles: f64,
    /// From launch to the first useful work of a kernel, and from its last to its end, seconds.
    pub ramp_s: f64,
    /// Between two kernels of a stream, seconds.
    pub gap_s: f64,
    /// Slow-down of kernels while communication kernels share memory and power.
    pub contention: f64,
    /// Share of memory bandwidth that copies, element-wise kernels, transposes and permutations reach on all SMs.
    pub stream_efficiency: f64,
    /// The same for kernels that compute on the way: casts with block scales, SwiGLU.
    pub convert_efficiency: f64,
    /// The same for kernels that reduce a row or touch short pieces: norms, RoPE, odd formats.
    pub row_efficiency: f64,
    /// Cycles of an SM for one attention score in the forward pass beside the MMAs (softmax).
    pub softmax_cycles: f64,
    /// The same in the backward pass.
    pub softmax_backward_cycles: f64,
    /// Share of the usable scale-up bandwidth that the forwarding stage of the all-to-all reaches.
    pub forwarding_efficiency: f64,
    /// Slow-down of an all-to-all under compute kernels that take the share `u` of the memory bandwidth: `1 + a u`.
    pub comm_contention: f64,
    /// Time that an all-to-all under compute kernels waits for peers that start later, seconds.
    pub comm_skew_s: f64,
    /// Time of a rendezvous of all ranks of an expert group (notify, barrier) beyond load imbalance, seconds.
    pub notify_s: f64,
}

impl Constants {
    /// The values in use.
    pub const FITTED: Constants = Constants {
        mma_efficiency: 0.927,
        promotion_cycles: 1.539,
        tile_cycles: 586.0,
        ramp_s: 2.0e-6,
        gap_s: 2.0e-6,
        contention: 1.029,
        stream_efficiency: 0.83,
        convert_efficiency: 0.78,
        row_efficiency: 0.41,
        softmax_cycles: 0.0275,
        softmax_backward_cycles: 0.1734,
        forwarding_efficiency: 0.82,
        comm_contention: 0.67,
        comm_skew_s: 1.48e-3,
        notify_s: 2.06e-3,
    };
}
