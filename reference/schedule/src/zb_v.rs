//! ZB-V (Qi et al. 2024, figure 4): two stages a rank in a V, every backward split; no bubble where
//! F, input backward and weight backward take the same time, with the activations of 1F1B.

use super::{Chunk, Op, Stream};

/// Stream of `rank` of `n` (2 n stages) for `m` micro-batches. Phase 0 goes down the V, phase 1 up.
pub(super) fn stream(n: usize, rank: usize, m: usize) -> Vec<Op> {
    let mut s = Stream::new(2, false);
    // The pattern needs 2n - 1 micro-batches to close; the ones that do not exist are struck out at
    // the end.
    let padded = m.max(2 * n - 1) as u32;

    // Phase 1: nF0
    for _ in 0..2 * (n - rank) - 1 {
        s.f(0);
    }

    // Phase 2: nF1F0
    for _ in 0..rank {
        s.f(1);
        s.f(0);
    }

    // Phase 3: nF1B1W1
    for _ in 0..n - rank {
        s.f(1);
        s.bi(1);
        s.w();
    }

    // Phase 4: nF0B0W0F1B1W1
    while s.next_f[1] < s.next_f[0] || s.next_f[0] < padded {
        if s.next_f[0] < padded {
            s.f(0);
        }
        s.bi(0);
        s.w();
        s.f(1);
        s.bi(1);
        s.w();
    }

    // Phase 5: nB0B1
    for _ in 0..rank {
        s.bi(0);
        s.bi(1);
    }

    // Phase 6: nB0W
    for _ in 0..n - rank {
        s.bi(0);
        s.w();
    }

    // Phase 7: nW
    while !s.queue.is_empty() {
        s.w();
    }
    let exists = |c: Option<Chunk>| c.is_none_or(|c| (c.mb as usize) < m);
    let mut ops = s.finish();
    ops.retain(|op| exists(op.forward()) && exists(op.backward()) && exists(op.weight()));
    ops
}
