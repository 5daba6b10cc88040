//! DualPipe (DeepSeek-V3 report, section 3.2.1, figure 5): micro-batches enter the pipeline at both
//! ends, every rank holds the stages `r` and `P-1-r`, and forward and backward chunks run as
//! overlapped pairs.
//!
//! Op for op what the official implementation executes, zero-bubble splits included.

use super::{Op, Stream};

/// Stream of `rank` of `p` (even) for `m` micro-batches of both directions (even, at least `2 p`).
pub(super) fn stream(p: usize, rank: usize, m: usize) -> Vec<Op> {
    half(p / 2, rank.min(p - 1 - rank), m / 2, rank >= p / 2)
}

/// Stream of the `rank`-th of `n` ranks from an end of the pipeline to its middle, for `m`
/// micro-batches a direction (at least `2 n`): half of DualPipe's ranks, or all of DualPipeV's.
///
/// Phase 0 enters at the rank's own end of the pipeline: direction 0, or 1 where `flip`.
pub(super) fn half(n: usize, rank: usize, m: usize, flip: bool) -> Vec<Op> {
    let is_middle_rank = rank == n - 1;
    let mut s = Stream::new(2, flip);

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

    // Phase 4, the main one: nF0B1F1B0 (the middle ranks open it unpaired, which shortens the
    // bubble)
    for i in 0..m - 2 * n + rank + 1 {
        if i == 0 && is_middle_rank {
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
    for i in 0..2 * (rank + 1) {
        let phase = 1 - (i % 2) as u8;
        if i > rank {
            s.bi(phase);
        } else {
            s.b(phase);
        }
    }

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
