//! ZB1P, the zero-bubble paper's ZB-H1 (Qi et al. 2023, figure 2): 1F1B whose backward is split.
//! The gradient travels on after the input part; rank `r` starts its weight gradients `r`
//! micro-batches late, so that every rank keeps `p` micro-batches alive and the weight gradients
//! that are left fill the drain.

use super::{Op, Stream};

/// Stream of `rank` of `p` for `m` micro-batches.
pub(super) fn stream(p: usize, rank: usize, m: usize) -> Vec<Op> {
    let mut s = Stream::new(1, false);
    let warm_up = (p - rank - 1).min(m);
    let steady = m - warm_up;

    // Phase 1: nF
    for _ in 0..warm_up {
        s.f(0);
    }

    // Phase 2: nFB
    for _ in 0..steady.min(rank) {
        s.f(0);
        s.bi(0);
    }

    // Phase 3: nFBW
    for _ in 0..steady.saturating_sub(rank) {
        s.f(0);
        s.bi(0);
        s.w();
    }

    // Phase 4: nBW
    for _ in 0..warm_up {
        s.bi(0);
        s.w();
    }

    // Phase 5: nW
    while !s.queue.is_empty() {
        s.w();
    }
    s.finish()
}
