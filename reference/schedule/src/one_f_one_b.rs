//! 1F1B with a flush at the end of the step (Narayanan et al. 2021, figure 4): a rank keeps at most
//! `p - rank` micro-batches alive.

use super::{Op, Stream};

/// Stream of `rank` of `p` for `m` micro-batches.
pub(super) fn stream(p: usize, rank: usize, m: usize) -> Vec<Op> {
    let mut s = Stream::new(1, false);
    let warm_up = (p - rank - 1).min(m);

    // Phase 1: nF
    for _ in 0..warm_up {
        s.f(0);
    }

    // Phase 2: nFB
    for _ in 0..m - warm_up {
        s.f(0);
        s.b(0);
    }

    // Phase 3: nB
    for _ in 0..warm_up {
        s.b(0);
    }
    s.finish()
}
