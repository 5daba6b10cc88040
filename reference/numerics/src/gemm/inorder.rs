//! Plain GEMMs in f32 and f64 whose every bit is fixed: `C[m][n]` is the chain
//! `acc = fma(A[m][k], B[k][n], acc)` with `k` ascending, whatever the instruction set, the shape,
//! the strides and the number of threads.
//!
//! They are what the `fp32` and `f64` modes of the model multiply with. Any strides will do, so a
//! transposed operand is a transposed view. The chain starts from +0, or from the old `C` where
//! `accumulate` is set, so that two calls over halves of K give the bits of one call over all of
//! it. A NaN result is stored as [`CANONICAL_NAN_F32`] or [`CANONICAL_NAN_F64`].
//!
//! Layout of the work: K in blocks of `KC`; A and B of a block are packed into panels (`mr` rows,
//! up to `nr` columns, K-major); the micro-kernels of `inorder_kernels` keep a tile of C in
//! registers. Blocks of K continue the chain through memory, where an f32 loses nothing. An operand
//! that too few tiles would read again is not packed but read where it lies.

use super::inorder_kernels::{InOrder, Panel, Tile};
use super::isa::Isa;
use super::scratch::Scratch;
use ndarray::{ArrayView2, ArrayViewMut2};
use rayon::prelude::*;

/// The NaN that every NaN result of [`gemm_f32`] is stored as: 0x7FFFFFFF, as NVIDIA's FMA gives
/// it.
pub const CANONICAL_NAN_F32: f32 = f32::from_bits(0x7FFF_FFFF);
/// The NaN that every NaN result of [`gemm_f64`] is stored as: 0x7FFFFFFFFFFFFFFF.
pub const CANONICAL_NAN_F64: f64 = f64::from_bits(0x7FFF_FFFF_FFFF_FFFF);

/// K block: a panel of B (48 columns) and one of A (8 rows) stay in the second-level cache.
const KC: usize = 256;
/// Rows packed at a time: bounds the packed copy of A.
const MC: usize = 1024;
/// Columns packed at a time: bounds the packed copy of B.
const NC: usize = 3072;
/// Up to this many columns of C, A is read in place: a packed copy would be read too few times.
const A_IN_PLACE: usize = 512;
/// Up to this many rows of C, B is read in place where its rows are contiguous.
const B_IN_PLACE: usize = 256;
/// Below this many multiply-adds a GEMM stays on the calling thread.
const PARALLEL_FROM: usize = 1 << 21;

/// `C = A B` or, with `accumulate`, `C` continues its chain with `A B`: in f32, K ascending, one
/// FMA a step. A is m x k, B is k x n, C is m x n; all with any strides.
///
/// # Panics
/// Where the three shapes do not fit each other.
pub fn gemm_f32(
    a: ArrayView2<'_, f32>,
    b: ArrayView2<'_, f32>,
    c: ArrayViewMut2<'_, f32>,
    accumulate: bool,
) {
    gemm_on(Isa::best(), a, b, c, accumulate);
}

/// [`gemm_f32`] in f64.
///
/// # Panics
/// Where the three shapes do not fit each other.
pub fn gemm_f64(
    a: ArrayView2<'_, f64>,
    b: ArrayView2<'_, f64>,
    c: ArrayViewMut2<'_, f64>,
    accumulate: bool,
) {
    gemm_on(Isa::best(), a, b, c, accumulate);
}

/// `A B` as [`gemm_f32`] and [`gemm_f64`] give it, row-major, in memory that was not cleared first.
///
/// # Panics
/// Where the shapes do not fit each other.
pub fn gemm_new<T: InOrder>(a: ArrayView2<'_, T>, b: ArrayView2<'_, T>) -> Vec<T> {
    let (m, n) = (a.nrows(), b.ncols());
    assert_eq!(b.nrows(), a.ncols(), "in-order GEMM: A is {:?}, B is {:?}", a.dim(), b.dim());
    if a.ncols() == 0 {
        return vec![T::zeroed(); m * n];
    }
    let mut c = Vec::with_capacity(m * n);
    let out = Output { data: c.as_mut_ptr(), row_stride: n as isize, col_stride: 1 };
    if m * n > 0 {
        run(Isa::best(), a, b, out, false);
    }
    // SAFETY: the chains start at zero and not from C, so that every element of the m x n was
    // written and none was read before.
    unsafe { c.set_len(m * n) };
    c
}

/// [`gemm_f32`] and [`gemm_f64`] on a chosen instruction set: for tests and benches.
///
/// # Panics
/// Where the shapes do not fit, or the machine does not have `isa`.
pub fn gemm_on<T: InOrder>(
    isa: Isa,
    a: ArrayView2<'_, T>,
    b: ArrayView2<'_, T>,
    mut c: ArrayViewMut2<'_, T>,
    accumulate: bool,
) {
    let (m, k) = a.dim();
    let n = b.ncols();
    assert_eq!(b.nrows(), k, "in-order GEMM: A is {m} x {k}, B is {} x {n}", b.nrows());
    assert_eq!(
        c.dim(),
        (m, n),
        "in-order GEMM: A is {m} x {k}, B is {k} x {n}, C is {:?}",
        c.dim()
    );
    assert!(isa.is_available(), "in-order GEMM: this machine has no {}", isa.name());
    if m == 0 || n == 0 {
        return;
    }
    if k == 0 {
        if accumulate {
            c.mapv_inplace(T::canonical);
        } else {
            c.fill(T::zeroed());
        }
        return;
    }
    let out =
        Output { data: c.as_mut_ptr(), row_stride: c.strides()[0], col_stride: c.strides()[1] };
    run(isa, a, b, out, accumulate);
}

/// The blocks of a product that has at least one element and one step of k. `C` is read only where
/// the chain continues: with `accumulate`, or in what an earlier block of k wrote.
fn run<T: InOrder>(
    isa: Isa,
    a: ArrayView2<'_, T>,
    b: ArrayView2<'_, T>,
    out: Output<T>,
    accumulate: bool,
) {
    let ((m, k), n) = (a.dim(), b.ncols());
    let kernel = T::kernel(isa);
    let parallel = m * n * k >= PARALLEL_FROM && rayon::current_num_threads() > 1;
    for n0 in (0..n).step_by(NC) {
        let cols = NC.min(n - n0);
        for k0 in (0..k).step_by(KC) {
            let depth = KC.min(k - k0);
            let panels = Panels::new(cols, kernel.lanes, kernel.nr);
            let b_block = View::of(&b).offset(k0, n0).transposed();
            let in_place =
                m <= B_IN_PLACE && b_block.row_stride == 1 && cols.is_multiple_of(kernel.lanes);
            let packed = if in_place { 0 } else { depth * panels.width() };
            let mut b_buffer = Scratch::of::<T>(packed);
            let b_packed = b_buffer.slice::<T>(packed);
            let b_operand = if in_place {
                Operand::InPlace(b_block)
            } else {
                pack(b_block, depth, &panels, b_packed, parallel);
                Operand::Packed(b_packed)
            };
            for m0 in (0..m).step_by(MC) {
                let block = Block {
                    rows: MC.min(m - m0),
                    depth,
                    first: k0 == 0 && !accumulate,
                    last: k0 + depth == k,
                };
                let a_block = View::of(&a).offset(m0, k0);
                let b = (&panels, &b_operand);
                multiply(&kernel, &block, a_block, b, out.at(m0, n0), parallel);
            }
        }
    }
}

/// What one pass over packed operands covers.
struct Block {
    rows: usize,
    depth: usize,
    /// The chain starts here, from +0.
    first: bool,
    /// The chain ends here: NaNs are made canonical.
    last: bool,
}

/// One operand of a pass.
enum Operand<'a, T> {
    /// Copied into panels, K-major.
    Packed(&'a [T]),
    /// Where it lies; every panel is whole.
    InPlace(View<T>),
}

impl<T: Copy> Operand<'_, T> {
    /// The panel that begins at row (or column) `start` and is `width` wide.
    fn panel(&self, start: usize, width: usize, depth: usize) -> Panel<T> {
        match self {
            Operand::Packed(panels) => {
                let data = panels[start * depth..][..width * depth].as_ptr();
                Panel { data, stride: 1, step: width as isize }
            }
            Operand::InPlace(view) => {
                let View { data, row_stride, col_stride } = view.offset(start, 0);
                Panel { data, stride: row_stride, step: col_stride }
            }
        }
    }
}

/// Multiplies A with the panels of B, tile by tile, packing A's rows where that pays.
fn multiply<T: InOrder>(
    kernel: &Tile<T>,
    block: &Block,
    a: View<T>,
    (b_panels, b): (&Panels, &Operand<'_, T>),
    out: Output<T>,
    parallel: bool,
) {
    let (depth, mr) = (block.depth, kernel.mr);
    // In place, a last panel that is not whole is packed by itself.
    let in_place = b_panels.len <= A_IN_PLACE;
    let whole = if in_place { block.rows - block.rows % mr } else { 0 };
    let a_panels = Panels::new(block.rows, mr, mr);
    let rest = Panels::new(block.rows - whole, mr, mr);
    let packed = if rest.len == 0 { 0 } else { depth * rest.width() };
    let mut a_buffer = Scratch::of::<T>(packed);
    let a_packed = a_buffer.slice::<T>(packed);
    pack(a.offset(whole, 0), depth, &rest, a_packed, parallel);
    let (a_packed, a_in_place) = (Operand::Packed(a_packed), Operand::InPlace(a));
    let strip = |j: usize, from: usize, to: usize| {
        let (col, cols, width) = b_panels.get(j);
        let b = b.panel(col, width, depth);
        for i in from..to {
            let (row, rows, _) = a_panels.get(i);
            let a = if row < whole {
                a_in_place.panel(row, mr, depth)
            } else {
                a_packed.panel(row - whole, mr, depth)
            };
            tile(kernel, block, (a, rows), (b, cols, width), out.at(row, col));
        }
    };
    if parallel {
        // Tasks of one panel of B by some panels of A: tiles of C that no two tasks share.
        let group = a_panels.count.div_ceil(rayon::current_num_threads()).clamp(1, 32);
        let groups = a_panels.count.div_ceil(group);
        (0..b_panels.count * groups).into_par_iter().for_each(|task| {
            let (j, g) = (task % b_panels.count, task / b_panels.count);
            strip(j, g * group, ((g + 1) * group).min(a_panels.count));
        });
    } else {
        (0..b_panels.count).for_each(|j| strip(j, 0, a_panels.count));
    }
}

/// One tile of C, in place where it is whole and its rows are contiguous, else by way of a copy.
fn tile<T: InOrder>(
    kernel: &Tile<T>,
    block: &Block,
    (a, rows): (Panel<T>, usize),
    (b, cols, width): (Panel<T>, usize, usize),
    out: Output<T>,
) {
    debug_assert!(rows <= kernel.mr && cols <= width && width <= kernel.nr);
    if rows == kernel.mr && cols == width && out.col_stride == 1 {
        let run = kernel.run[width / kernel.lanes - 1];
        // SAFETY: the panels hold mr and width elements at each of `depth` steps; the tile lies
        // inside C with contiguous rows; the instruction set was found on this machine by the
        // caller.
        unsafe { run(block.depth, a, b, out.data, out.row_stride, block.first, block.last) };
        return;
    }
    let mut copy = [T::zeroed(); 8 * 48];
    for i in 0..if block.first { 0 } else { rows } {
        for j in 0..cols {
            // SAFETY: (i, j) lies inside the tile, and the tile inside C.
            copy[i * width + j] = unsafe { *out.at(i, j).data };
        }
    }
    let run = kernel.run[width / kernel.lanes - 1];
    // SAFETY: as above, with the copy, which holds mr x width elements, as the tile.
    unsafe { run(block.depth, a, b, copy.as_mut_ptr(), width as isize, block.first, block.last) };
    for i in 0..rows {
        for j in 0..cols {
            // SAFETY: (i, j) lies inside the tile, and the tile inside C.
            unsafe { *out.at(i, j).data = copy[i * width + j] };
        }
    }
}

/// Where a tile of C is written: a pointer with strides, shared by tasks that write disjoint tiles.
#[derive(Clone, Copy)]
struct Output<T> {
    data: *mut T,
    row_stride: isize,
    col_stride: isize,
}

// SAFETY: every task writes its own tiles of C, and nobody else holds C, which is borrowed mutably.
unsafe impl<T: Send> Send for Output<T> {}
// SAFETY: as for Send.
unsafe impl<T: Send> Sync for Output<T> {}

impl<T> Output<T> {
    /// The output shifted to (row, col), which must lie inside C.
    fn at(self, row: usize, col: usize) -> Self {
        let shift = row as isize * self.row_stride + col as isize * self.col_stride;
        // SAFETY: the caller stays inside the array that `data` points into.
        Output { data: unsafe { self.data.offset(shift) }, ..self }
    }
}

/// A matrix operand: pointer and strides, bounds kept by the callers.
#[derive(Clone, Copy)]
struct View<T> {
    data: *const T,
    row_stride: isize,
    col_stride: isize,
}

// SAFETY: it is only read, and borrowed from a shared view of plain numbers.
unsafe impl<T: Sync> Send for View<T> {}
// SAFETY: as for Send.
unsafe impl<T: Sync> Sync for View<T> {}

impl<T> View<T> {
    fn of(view: &ArrayView2<'_, T>) -> Self {
        View { data: view.as_ptr(), row_stride: view.strides()[0], col_stride: view.strides()[1] }
    }

    fn offset(self, row: usize, col: usize) -> Self {
        let shift = row as isize * self.row_stride + col as isize * self.col_stride;
        // SAFETY: the callers pass a position inside the array.
        View { data: unsafe { self.data.offset(shift) }, ..self }
    }

    fn transposed(self) -> Self {
        View { data: self.data, row_stride: self.col_stride, col_stride: self.row_stride }
    }
}

/// `len` rows or columns cut into panels of `full`, the last two shared evenly in units of `unit`.
struct Panels {
    len: usize,
    unit: usize,
    full: usize,
    count: usize,
}

impl Panels {
    fn new(len: usize, unit: usize, full: usize) -> Self {
        Panels { len, unit, full, count: len.div_ceil(full) }
    }

    /// Start, used length and padded width of panel `j`.
    fn get(&self, j: usize) -> (usize, usize, usize) {
        let rest = (self.len - (self.count - 1) * self.full).next_multiple_of(self.unit);
        let tail = if self.count > 1 { self.full + rest } else { rest };
        let shared = tail / self.unit;
        let split = if self.count > 1 { shared.div_ceil(2) * self.unit } else { tail };
        let start = j * self.full;
        let (start, width) = match self.count - j {
            1 if self.count > 1 => (start - self.full + split, tail - split),
            1 => (start, tail),
            2 => (start, split),
            _ => (start, self.full),
        };
        (start, width.min(self.len - start), width)
    }

    /// The sum of the padded widths.
    fn width(&self) -> usize {
        let (start, _, width) = self.get(self.count - 1);
        start + width
    }
}

/// Packs `panels.len` rows of `from`, `depth` long, into K-major panels; the padding is zero.
fn pack<T: InOrder>(from: View<T>, depth: usize, panels: &Panels, to: &mut [T], parallel: bool) {
    if !parallel || depth * panels.len < 1 << 15 {
        for j in 0..panels.count {
            let (start, used, width) = panels.get(j);
            let panel = &mut to[start * depth..][..width * depth];
            pack_panel(from.offset(start, 0), depth, used, width, panel);
        }
        return;
    }
    let mut jobs = Vec::with_capacity(panels.count);
    let mut rest = to;
    for j in 0..panels.count {
        let (start, used, width) = panels.get(j);
        let (panel, after) = rest.split_at_mut(width * depth);
        jobs.push((start, used, width, panel));
        rest = after;
    }
    jobs.into_par_iter().for_each(|(start, used, width, panel)| {
        pack_panel(from.offset(start, 0), depth, used, width, panel);
    });
}

/// One panel: `panel[k * width + i] = from[i][k]` for `i < used`, zero above.
fn pack_panel<T: InOrder>(from: View<T>, depth: usize, used: usize, width: usize, panel: &mut [T]) {
    if used < width {
        panel.fill(T::zeroed());
    }
    if from.row_stride == 1 {
        for (k, line) in panel.chunks_exact_mut(width).enumerate() {
            // SAFETY: column k of the block has `used` contiguous elements.
            let column = unsafe {
                std::slice::from_raw_parts(from.data.offset(k as isize * from.col_stride), used)
            };
            line[..used].copy_from_slice(column);
        }
        return;
    }
    // Eight rows at a time: short transpositions that stay in registers.
    let mut i = 0;
    while i < used {
        let rows = (used - i).min(8);
        let source = from.offset(i, 0);
        let mut k = 0;
        if rows == 8 && from.col_stride == 1 {
            while k + 8 <= depth {
                let mut block = [[T::zeroed(); 8]; 8];
                for (r, line) in block.iter_mut().enumerate() {
                    // SAFETY: row i + r has `depth` contiguous elements, k + 8 of them exist.
                    let row = unsafe { source.data.offset(r as isize * from.row_stride).add(k) };
                    // SAFETY: as above; 8 elements are read.
                    *line = unsafe { row.cast::<[T; 8]>().read_unaligned() };
                }
                for q in 0..8 {
                    let line = &mut panel[(k + q) * width + i..][..8];
                    for r in 0..8 {
                        line[r] = block[r][q];
                    }
                }
                k += 8;
            }
        }
        for k in k..depth {
            let line = &mut panel[k * width + i..][..rows];
            for (r, to) in line.iter_mut().enumerate() {
                // SAFETY: (i + r, k) lies inside the block.
                *to = unsafe { *source.offset(r, k).data };
            }
        }
        i += rows;
    }
}
