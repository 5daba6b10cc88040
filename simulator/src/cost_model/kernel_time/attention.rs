//! Attention time: flash attention by blocks of 128 queries and 128 keys.
//!
//! Per pair of blocks an SM runs the MMAs (two forward, five backward) and the softmax arithmetic
//! that these do not hide.

use serde::{Deserialize, Serialize};

use super::KernelModel;

/// A batch of attention heads over one sequence length, on one GPU.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct AttentionShape {
    /// Sequences times query heads on this GPU.
    pub heads: u64,
    /// Queries per head.
    pub queries: u64,
    /// Keys per head.
    pub keys: u64,
    /// Head dimension of queries and keys.
    pub qk_dim: u64,
    /// Head dimension of values.
    pub v_dim: u64,
    /// Whether the keys after a query are masked.
    pub causal: bool,
}

const BLOCK: u64 = 128;

impl AttentionShape {
    /// Pairs of blocks that are computed.
    fn block_pairs(&self) -> f64 {
        let (q, k) = (self.queries.div_ceil(BLOCK), self.keys.div_ceil(BLOCK));
        let pairs = if self.causal && q == k { q * (q + 1) / 2 } else { q * k };
        (pairs * self.heads) as f64
    }

    /// A rank's share among `ranks` that deal the square out evenly, each with an early and a late
    /// part of the sequence: its queries meet half of the keys on average.
    pub fn share_of(self, ranks: u64) -> AttentionShape {
        if ranks == 1 {
            return self;
        }
        let queries = self.queries.div_ceil(ranks);
        let keys = if self.causal { (self.keys + BLOCK) / 2 } else { self.keys };
        AttentionShape { queries, keys, causal: false, ..self }
    }

    /// Sizes as tables of measured times name them: heads, queries, keys, widths.
    pub fn name(&self) -> String {
        let AttentionShape { heads, queries, keys, qk_dim, v_dim, .. } = self;
        format!("{heads}x{queries}x{keys} {qk_dim}/{v_dim}")
    }

    /// Floating-point operations; causal counts half the square.
    pub fn flops(&self, backward: bool) -> f64 {
        let scores = (self.heads * self.queries) as f64 * self.keys as f64;
        let scores = if self.causal { scores / 2.0 } else { scores };
        2.0 * scores * self.dims(backward)
    }

    /// Sum of the inner or outer dimensions of the MMAs: `QK, PV` forward; `QK, dP, dV, dQ, dK`
    /// backward.
    fn dims(&self, backward: bool) -> f64 {
        let (qk, v) = (self.qk_dim as f64, self.v_dim as f64);
        if backward { 3.0 * qk + 2.0 * v } else { qk + v }
    }
}

impl KernelModel {
    /// Seconds of the attention kernel of `shape` in BF16, or of its backward.
    pub fn attention(&self, shape: &AttentionShape, backward: bool) -> f64 {
        self.attention_of(shape, backward, false)
    }

    /// Seconds of the attention kernel of `shape`, or of its backward; with `fp8` the products run
    /// at the rate of FP8, the softmax between them as ever.
    pub fn attention_of(&self, shape: &AttentionShape, backward: bool, fp8: bool) -> f64 {
        let (c, gpu) = (&self.constants, &self.gpu);
        let scores = (BLOCK * BLOCK) as f64;
        let (flops, achievable) = if fp8 {
            (gpu.fp8_flops, gpu.fp8_achievable)
        } else {
            (gpu.bf16_flops, gpu.bf16_achievable)
        };
        // What the power limit leaves, or what measured GEMMs reach, whichever is less.
        let share = achievable.min(c.mma_efficiency);
        let sm_rate = flops * share / gpu.sms as f64;
        let mma_s = 2.0 * scores * shape.dims(backward) / sm_rate;
        let cycles = if backward { c.softmax_backward_cycles } else { c.softmax_cycles };
        let softmax_s = scores * cycles / self.gpu.clock_hz;
        let steps = (shape.block_pairs() / self.sms as f64).max(1.0);
        c.ramp_s + self.slowdown() * steps * (mma_s + softmax_s)
    }
}
