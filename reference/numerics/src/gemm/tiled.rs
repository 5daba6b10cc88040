//! The fast exact GEMMs: how the work is cut into tiles, packed, promoted and shared among threads.
//!
//! The bits are those of `portable`. K goes interval by interval, an interval in chunks. A chunk's
//! rows of A and B are packed as its kernels want them; each tile of C chains the chunk's products
//! in registers; at the end of an interval the partial sums enter the FP32 accumulator with their
//! scales. Tiles do not depend on each other, so threads share them out freely.

use super::config::{Accumulate, Fp8Operand, GemmConfig, Promote};
use super::portable::promote;
use super::scratch::Scratch;
use super::tile::{Codes, MAX_COLS, PACK, TILE_ROWS, TileKernels, TileOutput};
use crate::formats::canonical_f32;
use ndarray::{Array2, ArrayViewMut2};
use rayon::prelude::*;

/// Longest chunk of K; a longer interval keeps its partial sums in memory between chunks.
const CHUNK: usize = 512;
/// Tiles of A that a task multiplies with one panel of B.
const TASK_TILES: usize = 32;
/// Below this many products a GEMM stays on the calling thread.
const PARALLEL_FROM: usize = 1 << 18;

/// What becomes of an interval's partial sums.
enum Finish<'a> {
    /// They enter the FP32 accumulator in D with the scales of A's rows and B's rows.
    Promote { how: Promote, scale_a: &'a [f32], scale_b: &'a [f32] },
    /// D holds them: the chain goes on over all of K.
    Store,
}

/// Packed operands of one chunk of K, and where its results go.
struct Chunk<'a> {
    kernels: &'a dyn TileKernels,
    depth: usize,
    a: &'a [u8],
    b: &'a [u8],
    /// The chunk continues partial sums.
    carry: bool,
    /// The chunk ends an interval.
    last: bool,
    /// The chunk ends K: results become canonical.
    end: bool,
    finish: Finish<'a>,
    m: usize,
    n: usize,
}

/// D as `multiply` can use it: contiguous, and holding what the chain starts from.
///
/// Calls `run` with it, then does what `accumulate` says with the result.
fn with_output(
    mut d: ArrayViewMut2<'_, f32>,
    accumulate: Accumulate,
    run: impl FnOnce(&mut [f32], Accumulate),
) {
    if let (true, Some(d)) = (accumulate != Accumulate::AddAtEnd, d.as_slice_mut()) {
        return run(d, accumulate);
    }
    let (mut product, inner) = match accumulate {
        Accumulate::Chain => (d.as_standard_layout().to_owned(), Accumulate::Chain),
        _ => (Array2::zeros(d.dim()), Accumulate::Overwrite),
    };
    run(product.as_slice_mut().expect("a fresh matrix is contiguous"), inner);
    let add = accumulate == Accumulate::AddAtEnd;
    d.zip_mut_with(&product, |d, &x| *d = if add { canonical_f32(*d + x) } else { x });
}

/// `D = A B^T` with promotion; the operands are checked.
pub(super) fn gemm_fp8(
    kernels: &dyn TileKernels,
    a: &Fp8Operand<'_>,
    b: &Fp8Operand<'_>,
    d: ArrayViewMut2<'_, f32>,
    accumulate: Accumulate,
    config: &GemmConfig,
) {
    let k = a.codes.ncols();
    let interval = config.promotion_interval.unwrap_or(k).min(k).max(1);
    with_output(d, accumulate, |d, accumulate| {
        if accumulate == Accumulate::Overwrite {
            d.fill(0.0);
        }
        let scales = |begin: usize| -> (Vec<f32>, Vec<f32>) {
            let scale_a = (0..a.rows()).map(|i| a.scale(i, begin)).collect();
            (scale_a, (0..b.rows()).map(|j| b.scale(j, begin)).collect())
        };
        let (a, b) = (Codes::U8(a.codes), Codes::U8(b.codes));
        multiply(kernels, (&a, &b), d, interval, Some((config.promote, &scales)), false);
    });
}

/// `D = A B^T`, one chain over all of K.
pub(super) fn gemm_unscaled(
    kernels: &dyn TileKernels,
    a: &Codes<'_>,
    b: &Codes<'_>,
    d: ArrayViewMut2<'_, f32>,
    accumulate: Accumulate,
) {
    let k = a.dim().1;
    with_output(d, accumulate, |d, accumulate| {
        let chain = accumulate == Accumulate::Chain;
        if !chain {
            d.fill(0.0);
        }
        multiply(kernels, (a, b), d, k.max(1), None, chain);
    });
}

/// Scales of the interval that begins at an index: one for every row of A, one for every row of B.
type Scales<'a> = &'a dyn Fn(usize) -> (Vec<f32>, Vec<f32>);

/// All of K; `d` is contiguous and holds what the accumulators start from.
fn multiply(
    kernels: &dyn TileKernels,
    (a, b): (&Codes<'_>, &Codes<'_>),
    d: &mut [f32],
    interval: usize,
    promotion: Option<(Promote, Scales<'_>)>,
    chain: bool,
) {
    let ((m, k), n) = (a.dim(), b.dim().0);
    if m * n == 0 || k == 0 {
        d.iter_mut().for_each(|d| *d = canonical_f32(*d));
        return;
    }
    let parallel = m * n * k >= PARALLEL_FROM && rayon::current_num_threads() > 1;
    let tiles = m.div_ceil(PACK) * (PACK / TILE_ROWS);
    let panels = n.div_ceil(kernels.cols());
    let chunk_depth = (CHUNK / kernels.depth_unit()).max(1) * kernels.depth_unit();
    let carries = promotion.is_some() && interval > chunk_depth;
    let mut carry =
        vec![0f32; if carries { tiles * panels * TILE_ROWS * kernels.cols() } else { 0 }];
    let longest = kernels.packed_depth(chunk_depth.min(interval));
    let mut a_buffer = Scratch::bytes(tiles * longest * kernels.a_bytes());
    let mut b_buffer = Scratch::bytes(panels * longest * kernels.b_bytes());
    let (out, carried) = (Shared(d.as_mut_ptr()), carries.then_some(Shared(carry.as_mut_ptr())));
    for begin in (0..k).step_by(interval) {
        let end = (begin + interval).min(k);
        let scales = promotion.map(|(_, scales)| scales(begin)).unwrap_or_default();
        for from in (begin..end).step_by(chunk_depth) {
            let to = (from + chunk_depth).min(end);
            let depth = kernels.packed_depth(to - from);
            let a_packed = a_buffer.slice::<u8>(tiles * depth * kernels.a_bytes());
            let pack = depth * kernels.a_bytes() * (PACK / TILE_ROWS);
            for_each_chunk(a_packed, pack, parallel, |i, tiles| {
                kernels.pack_a(a, i * PACK, (from, to), tiles);
            });
            let b_packed = b_buffer.slice::<u8>(panels * depth * kernels.b_bytes());
            for_each_chunk(b_packed, depth * kernels.b_bytes(), parallel, |j, panel| {
                kernels.pack_b(b, j * kernels.cols(), (from, to), panel);
            });
            let chunk = Chunk {
                kernels,
                depth,
                a: a_packed,
                b: b_packed,
                carry: from > begin || chain,
                last: to == end,
                end: to == k,
                finish: match promotion {
                    Some((how, _)) => {
                        Finish::Promote { how, scale_a: &scales.0, scale_b: &scales.1 }
                    }
                    None => Finish::Store,
                },
                m,
                n,
            };
            let used = m.div_ceil(TILE_ROWS);
            let tasks = used.div_ceil(TASK_TILES);
            let run = |task: usize| {
                let (panel, strip) = (task / tasks, task % tasks);
                for tile in strip * TASK_TILES..((strip + 1) * TASK_TILES).min(used) {
                    chunk.tile(tile, panel, panels, out, carried);
                }
            };
            if parallel {
                (0..tasks * panels).into_par_iter().for_each(run);
            } else {
                (0..tasks * panels).for_each(run);
            }
        }
    }
}

/// Calls `work(index, chunk)` on chunks of `size`.
fn for_each_chunk(
    bytes: &mut [u8],
    size: usize,
    parallel: bool,
    work: impl Fn(usize, &mut [u8]) + Sync,
) {
    if parallel {
        bytes.par_chunks_exact_mut(size).enumerate().for_each(|(i, chunk)| work(i, chunk));
    } else {
        bytes.chunks_exact_mut(size).enumerate().for_each(|(i, chunk)| work(i, chunk));
    }
}

/// A matrix that tasks write disjoint tiles of.
#[derive(Clone, Copy)]
struct Shared(*mut f32);

// SAFETY: every task touches its own tile only; see `Chunk::tile`.
unsafe impl Send for Shared {}
// SAFETY: as for Send.
unsafe impl Sync for Shared {}

impl Shared {
    /// `len` elements from `place` on.
    ///
    /// # Safety
    /// They exist, and nobody else uses them while the slice lives.
    unsafe fn slice<'a>(self, place: usize, len: usize) -> &'a mut [f32] {
        // SAFETY: the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.0.add(place), len) }
    }
}

impl Chunk<'_> {
    /// Chains the chunk's products for one tile, and finishes it where the interval ends.
    fn tile(&self, tile: usize, panel: usize, panels: usize, out: Shared, carried: Option<Shared>) {
        let (cols, kernels) = (self.kernels.cols(), self.kernels);
        let (row, col) = (tile * TILE_ROWS, panel * cols);
        let used_cols = cols.min(self.n - col);
        let used_rows = TILE_ROWS.min(self.m - row);
        // SAFETY: columns `col..` of row `row + i` of D lie in this tile, which is ours alone.
        let d_row = |i: usize| unsafe { out.slice((row + i) * self.n + col, used_cols) };
        let mut own = [0f32; TILE_ROWS * MAX_COLS];
        let partial: &mut [f32] = match carried {
            // SAFETY: the buffer has a place for every pair of tile and panel, and this pair is
            // ours.
            Some(all) => unsafe {
                all.slice((tile * panels + panel) * TILE_ROWS * cols, TILE_ROWS * cols)
            },
            None => &mut own[..TILE_ROWS * cols],
        };
        if matches!(self.finish, Finish::Store) && self.carry {
            for i in 0..used_rows {
                partial[i * cols..][..used_cols].copy_from_slice(d_row(i));
            }
        }
        let place = TileOutput { data: d_row(0).as_mut_ptr(), stride: self.n };
        place.prefetch(used_rows, used_cols);
        let a = &self.a[tile * self.depth * kernels.a_bytes()..][..self.depth * kernels.a_bytes()];
        let b = &self.b[panel * self.depth * kernels.b_bytes()..][..self.depth * kernels.b_bytes()];
        // SAFETY: both are packed for `depth`, and the tile has room for its rows and columns.
        unsafe {
            let c = TileOutput { data: partial.as_mut_ptr(), stride: cols };
            kernels.tile(self.depth, a.as_ptr(), b.as_ptr(), c, self.carry);
        }
        for i in 0..used_rows {
            let partial = &partial[i * cols..][..used_cols];
            match self.finish {
                Finish::Promote { how, scale_a, scale_b } if self.last => {
                    let scales = (scale_a[row + i], &scale_b[col..col + used_cols]);
                    // SAFETY: the machine has the instruction set of the kernels.
                    unsafe { (kernels.promote())(how, scales, partial, d_row(i), self.end) };
                }
                Finish::Promote { .. } => {}
                Finish::Store if self.end => {
                    for (d, &x) in d_row(i).iter_mut().zip(partial) {
                        *d = canonical_f32(x);
                    }
                }
                Finish::Store => d_row(i).copy_from_slice(partial),
            }
        }
    }
}

/// One row of a tile: partial sums enter the FP32 accumulator; at the end NaNs become canonical.
#[inline(always)]
pub(super) fn promote_row(
    how: Promote,
    (scale_a, scale_b): (f32, &[f32]),
    partial: &[f32],
    acc: &mut [f32],
    end: bool,
) {
    for ((acc, &partial), &scale_b) in acc.iter_mut().zip(partial).zip(scale_b) {
        let sum = promote(how, scale_a, scale_b, partial, *acc);
        *acc = if end { canonical_f32(sum) } else { sum };
    }
}
