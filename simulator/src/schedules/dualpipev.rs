//! DualPipeV (Sea AI Lab's cut-in-half of DualPipe): a V of `2 n` stages on `n` ranks, each
//! micro-batch passes a rank
//! twice; the streams are those of DualPipe's first half of ranks with their two directions joined.
//!
//! Op for op what the official implementation executes, zero-bubble splits included.

use super::dualpipe::drain_both;
use super::{Op, Stream};

/// Stream of `rank` of `n` for `m` micro-batches, at least `2 n`. Phase 0 goes down the V, phase 1
/// up.
pub(super) fn stream(n: usize, rank: usize, m: usize) -> Vec<Op> {
    let is_last_rank = rank == n - 1;
    let mut s = Stream::new(2, false);

    // Phase 1: nF0
    for _ in 0..(n - rank - 1) * 2 {
        s.f(0);
    }

    // Phase 2: nF0F1
    for _ in 0..rank + 1 {
        s.f(0);
        s.f(1);
    }

    // Phase 3: nB1W1F1 (zero bubble)
    for _ in 0..n - rank - 1 {
        s.bi(1);
        s.w();
        s.f(1);
    }

    // Phase 4, the main one: nF0B1F1B0 (the last rank opens it unpaired, which shortens the bubble)
    for i in 0..m - 2 * n + rank + 1 {
        if i == 0 && is_last_rank {
            s.f(0);
            s.b(1);
        } else {
            s.fb(0, 1);
        }
        s.fb(1, 0);
    }

    // Phase 5: nB1F1B0
    for _ in 0..n - rank - 1 {
        s.b(1);
        s.fb(1, 0);
    }

    // Phase 6: nB1B0 (the second half zero bubble)
    drain_both(&mut s, rank);

    // Phase 7: nWB0 (zero bubble)
    for _ in 0..n - rank - 1 {
        s.w();
        s.bi(0);
    }

    // Phase 8: nW
    for _ in 0..rank + 1 {
        s.w();
    }
    s.finish()
}
