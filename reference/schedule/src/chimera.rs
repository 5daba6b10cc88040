//! Chimera (Li and Hoefler 2021): two pipelines in opposite directions over the same ranks, whose
//! chunks fall into each other's gaps. Units of `p` micro-batches, half for each direction, follow
//! each other without a flush.

use super::{Chunk, Op};

/// Stream of `rank` of `p` (even) for `m` micro-batches (even).
///
/// On a clock where a forward and a backward each take one tick, micro-batch `j` of unit `u` is at
/// stage `s` forward in tick `2 p u + 2 j + s` and backward in tick `2 p u + 2 j + 2 p - 1 - s`.
/// Stages `s` and `p - 1 - s` of one rank have different parities, so no two chunks meet; the
/// stream is the chunks in order of their ticks.
pub(super) fn stream(p: usize, rank: usize, m: usize) -> Vec<Op> {
    let unit = p / 2;
    let mut timed = Vec::with_capacity(2 * m);
    for (dir, stage) in [(0, rank), (1, p - 1 - rank)] {
        for mb in 0..m / 2 {
            let entry = 2 * p * (mb / unit) + 2 * (mb % unit);
            let chunk = Chunk { dir, mb: mb as u32 };
            timed.push((entry + stage, Op::F(chunk)));
            timed.push((entry + 2 * p - 1 - stage, Op::B(chunk)));
        }
    }
    timed.sort_by_key(|&(tick, _)| tick);
    debug_assert!(timed.windows(2).all(|w| w[0].0 < w[1].0), "two chunks in one tick");
    timed.into_iter().map(|(_, op)| op).collect()
}
