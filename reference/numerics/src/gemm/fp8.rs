//! The fast FP8 GEMM: Hopper's accumulator in tiles, packed operands, promotion, threads.
//!
//! The bits are those of `portable`; here is how the work is cut. K goes interval by interval. The
//! interval's rows of A and B are packed (6 bytes an element); tiles of [`TILE_ROWS`] x [`TILE_COLS`]
//! elements chain the interval's groups of [`GROUP`] products from zero in registers; then the
//! partial sums enter the FP32 accumulator with their scales. Tiles do not depend on each other, so
//! threads share them out freely.

use super::config::{Accumulate, Fp8Operand, GemmConfig, Promote};
use super::isa::Isa;
use super::portable::promote;
use super::scratch::Scratch;
use super::tile::{Kernels, Tables};
use crate::formats::canonical_f32;
use crate::mma::Accumulator;
use ndarray::{Array2, ArrayView2, ArrayViewMut2};
use rayon::prelude::*;

/// Products a step of Hopper's FP8 tensor core adds at once.
pub(super) const GROUP: usize = 32;
/// Rows of a tile.
pub(super) const TILE_ROWS: usize = 4;
/// Columns of a tile.
pub(super) const TILE_COLS: usize = 32;
/// Rows that are packed together.
pub(super) const PACK: usize = 16;
/// Groups packed at a time; a longer interval keeps its partial sums in memory between chunks.
const CHUNK_GROUPS: usize = 16;
/// Tiles of A that a task multiplies with one panel of B.
const TASK_TILES: usize = 32;
/// Below this many products a GEMM stays on the calling thread.
const PARALLEL_FROM: usize = 1 << 18;

/// Whether the kernels of this file compute `accumulator`.
pub(super) fn supports(accumulator: &Accumulator) -> bool {
    *accumulator == Accumulator::HOPPER_FP8
}

/// Packed operands of one chunk of K, and where its results go.
struct Chunk<'a> {
    kernels: &'a Kernels,
    groups: usize,
    a: &'a [u8],
    b: &'a [u8],
    /// The chunk begins an interval: partial sums start from zero.
    first: bool,
    /// The chunk ends an interval: partial sums are promoted.
    last: bool,
    /// The chunk ends K: results become canonical.
    end: bool,
    promote: Promote,
    /// Scales of the interval: one for every row of A, one for every column of B (padded).
    scale_a: &'a [f32],
    scale_b: &'a [f32],
    m: usize,
    n: usize,
}

/// `D = A B^T` with promotion; the operands are checked and the accumulator is supported.
pub(super) fn gemm_fp8(
    kernels: &Kernels,
    a: &Fp8Operand<'_>,
    b: &Fp8Operand<'_>,
    mut d: ArrayViewMut2<'_, f32>,
    accumulate: Accumulate,
    config: &GemmConfig,
) {
    let (m, n, k) = (a.rows(), b.rows(), a.codes.ncols());
    if accumulate == Accumulate::AddAtEnd || !d.is_standard_layout() {
        let mut product = match accumulate {
            Accumulate::Chain => d.to_owned(),
            _ => Array2::zeros((m, n)),
        };
        let chain = Accumulate::Chain;
        gemm_fp8(kernels, a, b, product.view_mut(), chain, config);
        let add = accumulate == Accumulate::AddAtEnd;
        d.zip_mut_with(&product, |d, &x| *d = if add { canonical_f32(*d + x) } else { x });
        return;
    }
    if accumulate == Accumulate::Overwrite {
        d.fill(0.0);
    }
    if m == 0 || n == 0 {
        return;
    }
    if k == 0 {
        d.mapv_inplace(canonical_f32);
        return;
    }
    let interval = config.promotion_interval.unwrap_or(k).min(k);
    let tables = (Tables::new(a.format, true), Tables::new(b.format, false));
    let parallel = m * n * k >= PARALLEL_FROM && rayon::current_num_threads() > 1;
    let (tiles, panels) = (m.div_ceil(PACK) * PACK / TILE_ROWS, n.div_ceil(TILE_COLS));
    let chunk_k = CHUNK_GROUPS * GROUP;
    let needs_carry = interval > chunk_k;
    let mut carry =
        vec![0f32; if needs_carry { tiles * panels * TILE_ROWS * TILE_COLS } else { 0 }];
    let mut a_buffer = Scratch::bytes(tiles * CHUNK_GROUPS * kernels.a_group);
    let mut b_buffer = Scratch::bytes(panels * CHUNK_GROUPS * kernels.b_group);
    let out = Shared(d.as_mut_ptr());
    let carried = Shared(carry.as_mut_ptr());
    for begin in (0..k).step_by(interval) {
        let end = (begin + interval).min(k);
        let scale_a: Vec<f32> = (0..m).map(|i| a.scale(i, begin)).collect();
        let scale_b: Vec<f32> = (0..n).map(|j| b.scale(j, begin)).collect();
        for from in (begin..end).step_by(chunk_k) {
            let to = (from + chunk_k).min(end);
            let groups = (to - from).div_ceil(GROUP);
            let a_packed = a_buffer.slice::<u8>(tiles * groups * kernels.a_group);
            pack_a(kernels, &tables.0, a.codes, (from, to), a_packed, parallel);
            let b_packed = b_buffer.slice::<u8>(panels * groups * kernels.b_group);
            pack_b(kernels, &tables.1, b.codes, (from, to), b_packed, parallel);
            let chunk = Chunk {
                kernels,
                groups,
                a: a_packed,
                b: b_packed,
                first: from == begin,
                last: to == end,
                end: to == k,
                promote: config.promote,
                scale_a: &scale_a,
                scale_b: &scale_b,
                m,
                n,
            };
            let used = m.div_ceil(TILE_ROWS);
            let tasks = used.div_ceil(TASK_TILES);
            let run = |task: usize| {
                let (panel, strip) = (task / tasks, task % tasks);
                let last = ((strip + 1) * TASK_TILES).min(used);
                for tile in strip * TASK_TILES..last {
                    chunk.tile(tile, panel, panels, out, needs_carry.then_some(carried));
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

/// A matrix that tasks write disjoint tiles of.
#[derive(Clone, Copy)]
struct Shared(*mut f32);

// SAFETY: every task touches its own tile only; see `Chunk::tile`.
unsafe impl Send for Shared {}
// SAFETY: as for Send.
unsafe impl Sync for Shared {}

impl Shared {
    fn pointer(self) -> *mut f32 {
        self.0
    }
}

impl Chunk<'_> {
    /// Chains the chunk's groups for one tile, and promotes it where the interval ends.
    fn tile(&self, tile: usize, panel: usize, panels: usize, out: Shared, carried: Option<Shared>) {
        let kernels = self.kernels;
        let a = &self.a[tile * self.groups * kernels.a_group..][..self.groups * kernels.a_group];
        let b = &self.b[panel * self.groups * kernels.b_group..][..self.groups * kernels.b_group];
        let mut own = [0f32; TILE_ROWS * TILE_COLS];
        let partial: &mut [f32] = match carried {
            // SAFETY: the buffer has a place for every pair of tile and panel, and this pair is ours.
            Some(all) => unsafe {
                let place = (tile * panels + panel) * TILE_ROWS * TILE_COLS;
                std::slice::from_raw_parts_mut(all.pointer().add(place), TILE_ROWS * TILE_COLS)
            },
            None => &mut own,
        };
        // SAFETY: the operands hold `groups` groups, the tile 128 elements; the instruction set
        // was found on this machine when `kernels` was made.
        unsafe {
            (kernels.tile)(self.groups, a.as_ptr(), b.as_ptr(), partial.as_mut_ptr(), !self.first);
        }
        if !self.last {
            return;
        }
        let (row, col) = (tile * TILE_ROWS, panel * TILE_COLS);
        let cols = TILE_COLS.min(self.n - col);
        for i in 0..TILE_ROWS.min(self.m - row) {
            // SAFETY: row `row + i`, columns `col..col + cols` of D, which are this tile's alone.
            let acc = unsafe {
                let first = out.pointer().add((row + i) * self.n + col);
                std::slice::from_raw_parts_mut(first, cols)
            };
            let scales = (self.scale_a[row + i], &self.scale_b[col..col + cols]);
            let partial = &partial[i * TILE_COLS..][..cols];
            // SAFETY: as above, for the instruction set.
            unsafe { (kernels.promote)(self.promote, scales, partial, acc, self.end) };
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

/// Packs rows of A: tiles one after another, rounded up to whole packs with zeros.
pub(super) fn pack_a(
    kernels: &Kernels,
    tables: &Tables,
    codes: ArrayView2<'_, u8>,
    (from, to): (usize, usize),
    packed: &mut [u8],
    parallel: bool,
) {
    let groups = (to - from).div_ceil(GROUP);
    let size = groups * kernels.a_group * (PACK / TILE_ROWS);
    let pack = |(i, tiles): (usize, &mut [u8])| {
        with_rows(codes, i * PACK, (from, to), |rows, stride| {
            // SAFETY: 16 rows of whole groups of codes; room for 16 rows.
            unsafe { (kernels.pack_a)(tables, rows.as_ptr(), stride, groups, tiles.as_mut_ptr()) };
        });
    };
    if parallel {
        packed.par_chunks_exact_mut(size).enumerate().for_each(pack);
    } else {
        packed.chunks_exact_mut(size).enumerate().for_each(pack);
    }
}

/// Packs rows of B, the columns of the product: panels of [`TILE_COLS`], padded with zeros.
pub(super) fn pack_b(
    kernels: &Kernels,
    tables: &Tables,
    codes: ArrayView2<'_, u8>,
    (from, to): (usize, usize),
    packed: &mut [u8],
    parallel: bool,
) {
    let groups = (to - from).div_ceil(GROUP);
    let size = groups * kernels.b_group;
    let pack = |(j, panel): (usize, &mut [u8])| {
        for part in 0..TILE_COLS / PACK {
            with_rows(codes, j * TILE_COLS + part * PACK, (from, to), |rows, stride| {
                let panel = panel.as_mut_ptr();
                // SAFETY: 16 rows of whole groups of codes; a whole panel, this part of it ours.
                unsafe { (kernels.pack_b)(tables, rows.as_ptr(), stride, groups, panel, part) };
            });
        }
    };
    if parallel {
        packed.par_chunks_exact_mut(size).enumerate().for_each(pack);
    } else {
        packed.chunks_exact_mut(size).enumerate().for_each(pack);
    }
}

/// Calls `work` with [`PACK`] rows of whole groups of codes: in place where they are there and
/// contiguous, else by way of a copy filled up with zeros.
fn with_rows(
    codes: ArrayView2<'_, u8>,
    row: usize,
    (from, to): (usize, usize),
    work: impl FnOnce(&[u8], usize),
) {
    let (rows, _) = codes.dim();
    let width = (to - from).next_multiple_of(GROUP);
    if let Some(all) = codes.to_slice() {
        let stride = codes.ncols();
        if width == to - from && row + PACK <= rows {
            return work(&all[row * stride + from..][..(PACK - 1) * stride + width], stride);
        }
    }
    let mut buffer = Scratch::bytes(PACK * width);
    let copy = buffer.slice::<u8>(PACK * width);
    copy.fill(0);
    for i in 0..PACK.min(rows.saturating_sub(row)) {
        let source = codes.row(row + i);
        for (to, &code) in
            copy[i * width..].iter_mut().zip(source.iter().skip(from).take(to - from))
        {
            *to = code;
        }
    }
    work(copy, width);
}

/// The kernels for `isa`, if it has any for Hopper's FP8 accumulator.
pub(super) fn kernels(isa: Isa) -> Option<Kernels> {
    Kernels::new(isa)
}
