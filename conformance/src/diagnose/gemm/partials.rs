//! Partial sums of a grid of rows and columns, interval by interval, by the exact GEMM: what most
//! hypotheses share, so it is kept.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use fathom_numerics::formats::{Format, f16};
use fathom_numerics::gemm::tensor_core::TensorCore;
use fathom_numerics::gemm::{Accumulate, gemm_bf16_into, gemm_f16_into, inorder};
use fathom_numerics::mma::{self, Accumulator, Output, Terms};
use half::bf16;
use ndarray::{Array2, ArrayView2, ArrayViewMut2, Axis, Slice};

use super::problem::{Codes, Operand, Problem};
use super::variant::{Blocks, Core, Expert, Place, Scaling, Variant};
use crate::diagnose::hypothesis::Sample;

/// The rows and columns that a sample touches.
pub(super) struct Grid {
    pub(super) rows: Vec<usize>,
    pub(super) columns: Vec<usize>,
    /// Place of each sampled element in the grid, row-major.
    pub(super) places: Vec<usize>,
}

impl Grid {
    pub(super) fn new(elements: &[usize], n: usize) -> Grid {
        let unique = |of: &dyn Fn(usize) -> usize| -> Vec<usize> {
            let mut all: Vec<usize> = elements.iter().map(|&e| of(e)).collect();
            all.sort_unstable();
            all.dedup();
            all
        };
        let (rows, columns) = (unique(&|e| e / n), unique(&|e| e % n));
        let find = |all: &[usize], x| all.binary_search(&x).expect("taken from the elements");
        let place = |&e: &usize| find(&rows, e / n) * columns.len() + find(&columns, e % n);
        let places = elements.iter().map(place).collect();
        Grid { rows, columns, places }
    }

    pub(super) fn len(&self) -> usize {
        self.rows.len() * self.columns.len()
    }
}

/// Partial sums `[interval][row][column]` of a grid.
pub(super) type Partials = Arc<Vec<f32>>;

/// Partial sums already computed, by sample and core.
#[derive(Default)]
pub(super) struct Cache {
    partials: Mutex<HashMap<(usize, Core), Partials>>,
    grids: Mutex<HashMap<usize, Arc<Grid>>>,
}

impl Cache {
    pub(super) fn grid(&self, sample: &Sample, n: usize) -> Arc<Grid> {
        let mut grids = self.grids.lock().expect("no panic holds it");
        let grid = grids.entry(sample.id);
        grid.or_insert_with(|| Arc::new(Grid::new(&sample.elements, n))).clone()
    }

    /// The partial sums of a core; two threads may compute the same at once, and get the same.
    pub(super) fn partials(&self, p: &Problem, sample: &Sample, core: &Core) -> Partials {
        let key = (sample.id, core.clone());
        if let Some(found) = self.partials.lock().expect("no panic holds it").get(&key) {
            return found.clone();
        }
        let computed = Arc::new(computed(p, &self.grid(sample, p.n), core));
        let mut all = self.partials.lock().expect("no panic holds it");
        all.insert(key, computed.clone());
        computed
    }
}

/// Begin and end of every interval of K.
pub(super) fn intervals(core: &Core) -> Vec<(usize, usize)> {
    let step = core.interval.max(1);
    (0..core.extent).step_by(step).map(|k| (k, (k + step).min(core.extent))).collect()
}

impl Expert {
    /// The expert of a row; `None` for padding, whose result is zero.
    pub(super) fn of(self, p: &Problem, row: usize) -> Option<usize> {
        if p.counts.is_empty() {
            return Some(0);
        }
        let experts = p.counts.len();
        let given = |row: usize| -> Option<usize> {
            let mut end = 0;
            p.counts.iter().position(|&count| {
                end += count;
                row < end
            })
        };
        match self {
            Expert::AsGiven => given(row),
            Expert::Next(by) => {
                Some((given(row)? as isize + by).rem_euclid(experts as isize) as usize)
            }
            Expert::Only(e) => given(row).map(|_| e),
            Expert::Offset(by) => {
                given(row)?;
                let moved = row.saturating_add_signed(-by);
                Some(given(moved).unwrap_or(experts - 1))
            }
            Expert::Aligned(to) => {
                given(row)?;
                let mut start = 0;
                let inside = |count: &usize| {
                    start += count.next_multiple_of(to);
                    row < start
                };
                Some(p.counts.iter().position(inside).unwrap_or(experts - 1))
            }
            Expert::LastForPadding => Some(given(row).unwrap_or(experts - 1)),
        }
    }
}

/// The codes of an operand's rows as a core reads them.
fn codes(x: &Operand, core: &Core, which: usize, k: usize, rows: &[usize]) -> Array2<u32> {
    let (reading, place) = (core.readings[which], core.places[which]);
    let total = match &x.codes {
        Codes::Fp8(all, _) => all.len() / k.max(1),
        Codes::Bf16(all) => all.len() / k.max(1),
        Codes::F32(all) => all.len() / k.max(1),
    };
    let table = x.codes.is_fp8().then(|| reading.table(x.codes.format()));
    let flat = |row: usize, kk: usize| -> usize {
        let kk = reading.along(row, kk, core.extent);
        match place {
            Place::AsGiven => row * k + kk,
            Place::Transposed => {
                let (matrix, row) = (row / x.rows, row % x.rows);
                matrix * x.rows * k + kk * x.rows + row
            }
            Place::Row(by) => row.saturating_add_signed(by).min(total - 1) * k + kk,
            Place::Along(by) => {
                let to = kk.checked_add_signed(by).filter(|&to| to < k).unwrap_or(kk);
                row * k + to
            }
        }
    };
    let mut all = Array2::from_shape_fn((rows.len(), core.extent), |(i, kk)| {
        let inside = (core.within.0..core.within.1).contains(&(kk % 128));
        if core.blocks.weight(kk / 128) == 0 || !inside {
            return 0;
        }
        let code = x.codes.at(flat(rows[i], kk));
        table.map_or(code, |t| t[code as usize].into())
    });
    if core.groups_descending {
        for (begin, end) in intervals(core) {
            let order: Vec<usize> = (begin..end)
                .collect::<Vec<_>>()
                .rchunks(core.accumulator.group)
                .flatten()
                .copied()
                .collect();
            let turned = all.select(Axis(1), &order);
            all.slice_axis_mut(Axis(1), Slice::from(begin..end)).assign(&turned);
        }
    }
    all
}

/// The grid's partial sums from the specification's exact GEMM.
pub(super) fn computed(p: &Problem, grid: &Grid, core: &Core) -> Vec<f32> {
    let intervals = intervals(core);
    let mut all = vec![0.0; intervals.len() * grid.len()];
    let width = grid.columns.len();
    for (first, rows, expert) in by_expert(p, core.expert, &grid.rows) {
        let b_rows: Vec<usize> = grid.columns.iter().map(|j| expert * p.n + j).collect();
        let a = codes(&p.a, core, 0, p.k, rows);
        let b = codes(&p.b, core, 1, p.k, &b_rows);
        let mut part = Array2::zeros((rows.len(), width));
        for (number, &(begin, end)) in intervals.iter().enumerate() {
            let along = Slice::from(begin..end);
            let (a, b) = (a.slice_axis(Axis(1), along), b.slice_axis(Axis(1), along));
            product(p, core, a, b, part.view_mut(), core.carried && number > 0);
            let at = number * grid.len() + first * width;
            all[at..at + part.len()].copy_from_slice(part.as_slice().expect("row-major"));
        }
    }
    all
}

/// Runs of neighbouring grid rows of one expert: the first's number, the rows, the expert.
fn by_expert<'a>(p: &Problem, of: Expert, rows: &'a [usize]) -> Vec<(usize, &'a [usize], usize)> {
    let mut runs = Vec::new();
    let mut first = 0;
    for run in rows.chunk_by(|&x, &y| of.of(p, x) == of.of(p, y)) {
        if let Some(expert) = of.of(p, run[0]) {
            runs.push((first, run, expert));
        }
        first += run.len();
    }
    runs
}

/// One interval's sums into `d`, from zero or from what it holds.
fn product(
    p: &Problem,
    core: &Core,
    a: ArrayView2<'_, u32>,
    b: ArrayView2<'_, u32>,
    mut d: ArrayViewMut2<'_, f32>,
    carry: bool,
) {
    let formats =
        (core.readings[0].format(p.a.codes.format()), core.readings[1].format(p.b.codes.format()));
    if formats.0 == Format::F32 {
        let (a, b) = (a.map(|&x| f32::from_bits(x)), b.map(|&x| f32::from_bits(x)));
        return inorder::gemm_f32(a.view(), b.t(), d, carry);
    }
    if core.mma_sync {
        return d.assign(&mma_sync(formats, a, b));
    }
    if core.accumulator.output == Output::F16 {
        return d.assign(&f16_accumulator(core.accumulator, formats, a, b));
    }
    let tensor_core = TensorCore::new(core.accumulator, formats.0, formats.1);
    let tensor_core = tensor_core.expect("FP32 output");
    if p.is_fp8() {
        let (a, b) = (a.map(|&x| x as u8), b.map(|&x| x as u8));
        let (a, b) = (tensor_core.pack_a(a.view()), tensor_core.pack_b(b.view()));
        tensor_core.multiply_add(&a, &b, d.view_mut(), carry);
    } else {
        let (a, b) = (tensor_core.pack_a(a), tensor_core.pack_b(b));
        tensor_core.multiply_add(&a, &b, d.view_mut(), carry);
    }
}

/// FP8 `mma.sync` on sm_90 becomes F16 instructions: of each 32 elements of K those with k mod 4 of
/// 0 and 1 first, then the others; their sum is added to the accumulator in FP32.
fn mma_sync(
    formats: (Format, Format),
    a: ArrayView2<'_, u32>,
    b: ArrayView2<'_, u32>,
) -> Array2<f32> {
    let core = TensorCore::new(Accumulator::HOPPER_16BIT, Format::F16, Format::F16);
    let core = core.expect("FP32 output");
    let half = |format: Format, code: u32| f16::from_f32(format.layout().to_f32(code)).to_bits();
    let mut d = Array2::zeros((a.nrows(), b.nrows()));
    let k = a.ncols();
    for begin in (0..k).step_by(32) {
        let own = begin..(begin + 32).min(k);
        let halves = own.clone().filter(|k| k % 4 < 2).chain(own.filter(|k| k % 4 >= 2));
        let order: Vec<usize> = halves.collect();
        let a = a.select(Axis(1), &order).map(|&code| half(formats.0, code));
        let b = b.select(Axis(1), &order).map(|&code| half(formats.1, code));
        let mut sum = Array2::zeros(d.dim());
        core.multiply_add(&core.pack_a(a.view()), &core.pack_b(b.view()), sum.view_mut(), false);
        d += &sum;
    }
    d
}

/// An accumulator kept in FP16, by the specification.
fn f16_accumulator(
    accumulator: Accumulator,
    formats: (Format, Format),
    a: ArrayView2<'_, u32>,
    b: ArrayView2<'_, u32>,
) -> Array2<f32> {
    let decode = |format: Format, codes: ArrayView2<'_, u32>| -> Vec<Vec<mma::Operand>> {
        let row = |r: ndarray::ArrayView1<'_, u32>| {
            r.iter().map(|&c| mma::Operand::decode(format, c)).collect()
        };
        codes.rows().into_iter().map(row).collect()
    };
    let (a, b) = (decode(formats.0, a), decode(formats.1, b));
    Array2::from_shape_fn((a.len(), b.len()), |(i, j)| {
        let terms = Terms {
            a: &a[i],
            b: &b[j],
            scale_a: &[],
            scale_b: &[],
            fraction_a: formats.0.layout().fraction_bits,
            fraction_b: formats.1.layout().fraction_bits,
        };
        Format::F16.layout().to_f32(accumulator.chain(&terms, 0))
    })
}

/// Operands dequantised before the product: the grid's sums over all of K.
pub(super) fn scaled_before(
    p: &Problem,
    grid: &Grid,
    v: &Variant,
    scale: &dyn Fn(usize, Option<usize>, usize, usize) -> f32,
) -> Vec<f32> {
    let mut all = vec![0.0; grid.len()];
    let width = grid.columns.len();
    let core = Core { extent: p.k, ..v.core.clone() };
    for (first, rows, expert) in by_expert(p, core.expert, &grid.rows) {
        let b_rows: Vec<usize> = grid.columns.iter().map(|j| expert * p.n + j).collect();
        let values = |which: usize, x: &Operand, rows: &[usize]| -> Array2<f32> {
            let format = core.readings[which].format(x.codes.format()).layout();
            let codes = codes(x, &core, which, p.k, rows);
            Array2::from_shape_fn(codes.dim(), |(i, k)| {
                let row = if which == 0 { rows[i] } else { grid.columns[i] };
                format.to_f32(codes[[i, k]]) * scale(which, Some(expert), row, k)
            })
        };
        let (a, b) = (values(0, &p.a, rows), values(1, &p.b, &b_rows));
        let mut d = Array2::zeros((rows.len(), width));
        let overwrite = Accumulate::Overwrite;
        match v.scaling {
            Scaling::BeforeFp32 => inorder::gemm_f32(a.view(), b.t(), d.view_mut(), false),
            Scaling::BeforeF16 => {
                let (a, b) = (a.mapv(f16::from_f32), b.mapv(f16::from_f32));
                let core = &Accumulator::HOPPER_16BIT;
                gemm_f16_into(a.view(), b.view(), d.view_mut(), overwrite, core).expect("equal K");
            }
            _ => {
                let (a, b) = (a.mapv(bf16::from_f32), b.mapv(bf16::from_f32));
                let core = &Accumulator::HOPPER_16BIT;
                gemm_bf16_into(a.view(), b.view(), d.view_mut(), overwrite, core).expect("equal K");
            }
        }
        all[first * width..first * width + d.len()]
            .copy_from_slice(d.as_slice().expect("row-major"));
    }
    all
}

impl Core {
    /// The core for blocks that intervals do not split evenly: left out on the tensor core.
    pub(super) fn without(&self, blocks: Blocks) -> Core {
        Core { blocks, ..self.clone() }
    }
}
