//! DualPipeV (Sea AI Lab's cut-in-half of DualPipe): a V of `2 n` stages on `n` ranks, each
//! micro-batch passes a rank twice; the streams are those of DualPipe's first half of ranks with
//! their two directions joined: phase 0 goes down the V, phase 1 up.
//!
//! Op for op what the official implementation executes, zero-bubble splits included.

use super::{Op, dualpipe};

/// Stream of `rank` of `n` for `m` micro-batches, at least `2 n`.
pub(super) fn stream(n: usize, rank: usize, m: usize) -> Vec<Op> {
    dualpipe::half(n, rank, m, false)
}
