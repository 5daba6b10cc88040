//! GPipe (Huang et al. 2019, figure 2c): all forwards, then all backwards, the last micro-batch
//! first.

use super::{Chunk, Op};

/// Stream of any rank for `m` micro-batches.
pub(super) fn stream(m: usize) -> Vec<Op> {
    let chunk = |mb: usize| Chunk { dir: 0, mb: mb as u32 };

    // Phase 1: nF
    let forwards = (0..m).map(|mb| Op::F(chunk(mb)));

    // Phase 2: nB
    let backwards = (0..m).rev().map(|mb| Op::B(chunk(mb)));

    forwards.chain(backwards).collect()
}
