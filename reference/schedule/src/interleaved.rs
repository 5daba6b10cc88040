//! Interleaved 1F1B (Narayanan et al. 2021, section 2.2): a rank holds `v` stages in a loop and
//! walks through them in groups of `n` micro-batches, `n` being the number of ranks.

use super::{Chunk, Op};

/// Stream of `rank` of `n`, each with `v` stages, for `m` micro-batches, `m` a multiple of `n`.
pub(super) fn stream(n: usize, v: usize, rank: usize, m: usize) -> Vec<Op> {
    let total = m * v;
    // The k-th forward runs stage (k / n) mod v of micro-batch k mod n in group k / (n v);
    // backwards mirror the stages.
    let mb = |k: usize| (k / (n * v) * n + k % n) as u32;
    let forward = |k: usize| Op::F(Chunk { dir: (k / n % v) as u8, mb: mb(k) });
    let backward = |k: usize| Op::B(Chunk { dir: (v - 1 - k / n % v) as u8, mb: mb(k) });
    let warm_up = if m == n { total } else { ((n - rank - 1) * 2 + (v - 1) * n).min(total) };

    // Phase 1: nF
    let mut ops: Vec<Op> = (0..warm_up).map(forward).collect();

    // Phase 2: nFB
    for k in 0..total - warm_up {
        ops.push(forward(warm_up + k));
        ops.push(backward(k));
    }

    // Phase 3: nB
    ops.extend((total - warm_up..total).map(backward));
    ops
}
