//! Hypotheses about a GEMM: FP8 with scales, one product or one an expert, and BF16 or F32.
//!
//! `table` lists them; `variant` is what they change; `problem` is the case. Partial sums come from
//! the exact GEMM on a grid of rows and columns ([`partials`]) and are kept: all that comes after
//! them (scales, order, splits, casts) is a cheap recombination. [`solve`] finds the K blocks
//! behind a difference that no hypothesis explains, [`stages`] those of another block's data.

mod partials;
mod problem;
mod solve;
mod stages;
mod table;
mod variant;

use fathom_numerics::formats::{Layout, Overflow, Rounding, canonical_f32, to_bf16};
use fathom_numerics::gemm::{Accumulate, Promote};
use fathom_reference::Case;
use fathom_reference::ops::gemm::Gemm;
use fathom_reference::ops::gemm_fp8::GemmFp8;
use fathom_reference::ops::grouped_gemm::GroupedGemm;
use fathom_reference::ops::grouped_gemm_fp8::GroupedGemmFp8;

use super::hypothesis::{Expanded, Family, Hypothesis, KBlocks, Sample, spread};
use partials::{Cache, Grid, intervals, scaled_before};
use problem::{Out, Problem};
use variant::{
    BlockOf, Blocks, Cast, Earlier, End, Order, RowOf, ScaleLayout, ScaleOf, ScaleValue, Scaling,
    Split, Variant,
};

/// What is said where only padding rows differ; named by place, not by values.
const PADDING: [&str; 3] = [
    "rows behind the last expert's are not written as zeros",
    "Nobody wrote the padding rows, so they hold what lay there, or somebody wrote other than zeros.",
    "Primus-Turbo issue #397",
];

/// The table, for documentation.
pub(super) fn table() -> Vec<[&'static str; 3]> {
    let mut all = table::table();
    all.push(PADDING);
    all
}

/// The hypotheses about one product.
pub(super) struct GemmFamily {
    problem: Problem,
    expanded: Expanded<Variant>,
    cache: Cache,
}

impl GemmFamily {
    fn of(problem: Problem) -> GemmFamily {
        let expanded = Expanded::new(table::rows(), &problem, Variant::given(&problem));
        GemmFamily { problem, expanded, cache: Cache::default() }
    }

    /// The family of a case, `outputs` giving the file's and the contract's as numbers; `None`
    /// where the op is no product, or none that this family knows.
    pub(super) fn new(
        case: &Case,
        outputs: impl Fn() -> (Vec<f32>, Vec<f32>),
    ) -> Option<GemmFamily> {
        let any = case.op.as_any();
        let problem = if let Some(op) = any.downcast_ref::<GemmFp8>() {
            Some(Problem::fp8(op, case, outputs()))
        } else if let Some(op) = any.downcast_ref::<GroupedGemmFp8>() {
            Problem::grouped_fp8(op, case, outputs())
        } else if let Some(op) = any.downcast_ref::<Gemm>() {
            Problem::plain(op, case, outputs())
        } else if let Some(op) = any.downcast_ref::<GroupedGemm>() {
            Problem::grouped(op, case, outputs())
        } else {
            None
        };
        problem.filter(|p| p.m * p.n * p.k > 0).map(GemmFamily::of)
    }

    /// The scale of an operand's row over an interval.
    fn scale(
        &self,
        v: &Variant,
        which: usize,
        expert: Option<usize>,
        row: usize,
        (begin, end): (usize, usize),
    ) -> f32 {
        let p = &self.problem;
        let x = if which == 0 { &p.a } else { &p.b };
        let of: &ScaleOf = &v.scales[which];
        let at = match v.end {
            End::First => begin,
            End::Last => end - 1,
            End::Counted => (begin / v.core.interval).saturating_mul(x.block[1].min(p.k)),
        };
        let at = at.min(p.k - 1);
        let (rows, columns) = (x.scale_rows, x.scale_columns);
        let last = columns - 1;
        let own = at / x.block[1];
        let column = match of.block {
            BlockOf::Own => own,
            BlockOf::Next(by) => own.saturating_add_signed(by),
            BlockOf::Always(b) => b,
            BlockOf::LastTakes(b) => {
                if own == last {
                    b
                } else {
                    own
                }
            }
            BlockOf::OneTakes(block, from) => {
                if own == block {
                    from
                } else {
                    own
                }
            }
            BlockOf::FirstOf(n) => own / n * n,
            BlockOf::LastOf(n) => own / n * n + n - 1,
            BlockOf::Of(n) => at / n,
            BlockOf::Reversed => last - own.min(last),
            BlockOf::Modulo(n) => own % n,
            BlockOf::ReversedIn(n) => own / n * n + (n - 1 - own % n),
            BlockOf::Largest => {
                let row = (row / x.block[0]).min(rows - 1);
                let all = &x.scales[row * columns..(row + 1) * columns];
                let larger = |b: usize, c: usize| if all[c] > all[b] { c } else { b };
                (0..columns).fold(0, larger)
            }
        };
        let mut matrix = if which == 0 { 0 } else { expert.unwrap_or(0) };
        let own = row / x.block[0];
        let line = match of.row {
            RowOf::Own => own,
            RowOf::Next(by) => own.saturating_add_signed(by),
            RowOf::Always(r) => r,
            RowOf::LastTakes(r) => {
                if own == rows - 1 {
                    r
                } else {
                    own
                }
            }
            RowOf::TileFirst(n) => row / n * n / x.block[0],
            RowOf::TileLast(n) => (row / n * n + n - 1) / x.block[0],
            RowOf::Of(n) => row / n,
            RowOf::Modulo(n) => own % n,
            RowOf::WithinExpert => {
                let start: usize = p.counts.iter().take(expert.unwrap_or(0)).sum();
                row.saturating_sub(start) / x.block[0]
            }
            RowOf::OfExpert(by) => {
                let experts = p.experts() as isize;
                matrix = (matrix as isize + by).rem_euclid(experts) as usize;
                own
            }
            RowOf::OnlyExpert(e) => {
                matrix = if which == 0 { 0 } else { e };
                own
            }
            RowOf::Reversed => (rows - 1).saturating_sub(own),
            RowOf::Xor(bit) => own ^ bit,
            RowOf::Without(bit) => own & !bit,
            RowOf::With(bit) => own | bit,
        };
        let (line, column) = (line.min(rows - 1), column.min(last));
        let place = match of.layout {
            ScaleLayout::AsGiven => line * columns + column,
            ScaleLayout::Transposed(to) => column * rows.next_multiple_of(to) + line,
            ScaleLayout::Padded(to) => line * columns.next_multiple_of(to) + column,
        };
        // What lies behind the scales is not known: the last one.
        let value = x.scales[matrix * rows * columns + place.min(rows * columns - 1)];
        let earlier = match of.value {
            ScaleValue::TimesRow(_) if line == 0 => None,
            ScaleValue::TimesRow(Earlier::First) => Some(0),
            ScaleValue::TimesRow(Earlier::Previous) => Some(line - 1),
            _ => None,
        };
        let earlier = earlier.map(|line| x.scales[(matrix * rows + line) * columns + column]);
        of.value.of(value, at / x.block[1] == last) * earlier.unwrap_or(1.0)
    }

    /// The FP32 result at each place of a grid, before c, the epilogue and the cast.
    fn sums(&self, v: &Variant, sample: &Sample, grid: &Grid) -> Option<Vec<f32>> {
        let p = &self.problem;
        if matches!(v.scaling, Scaling::BeforeBf16 | Scaling::BeforeF16 | Scaling::BeforeFp32) {
            let scale = |which, expert, row, k| self.scale(v, which, expert, row, (k, k + 1));
            return Some(scaled_before(p, grid, v, &scale));
        }
        // Blocks of 128 that an interval does not split: left out on the tensor core, if at all.
        let split_by_intervals = 128 % v.core.interval == 0;
        let core = match v.blocks {
            _ if split_by_intervals => v.core.clone(),
            Blocks::Twice(_) => return None,
            blocks => v.core.without(blocks),
        };
        let partials = self.cache.partials(p, sample, &core);
        let intervals = intervals(&core);
        let scales = |which: usize, expert: Option<usize>, row: usize| -> Vec<f32> {
            intervals.iter().map(|&i| self.scale(v, which, expert, row, i)).collect()
        };
        let weights: Vec<usize> = intervals
            .iter()
            .map(|i| if split_by_intervals { v.blocks.weight(i.0 / 128) } else { 1 })
            .collect();
        let chain = v.accumulate == Accumulate::Chain && v.split.parts == 1;
        let mut all = vec![0.0; grid.len()];
        let mut b_scales: Option<(Option<usize>, Vec<Vec<f32>>)> = None;
        for (r, &row) in grid.rows.iter().enumerate() {
            let expert = v.core.expert.of(p, row);
            if expert.is_none() {
                continue;
            }
            let [rows_of, columns_of] = if v.scales_exchanged { [1, 0] } else { [0, 1] };
            let a = scales(rows_of, expert, row);
            if b_scales.as_ref().is_none_or(|b| b.0 != expert) {
                let each = grid.columns.iter().map(|&j| scales(columns_of, expert, j)).collect();
                b_scales = Some((expert, each));
            }
            let (_, b) = b_scales.as_ref().expect("just set");
            for ((number, b), &column) in b.iter().enumerate().zip(&grid.columns) {
                let place = r * grid.columns.len() + number;
                let old = |c: &Vec<f32>| c[row * p.n + column] * v.beta;
                let start = if chain { p.c.as_ref().map_or(0.0, old) } else { 0.0 };
                let partial = |t: usize| partials[t * grid.len() + place];
                all[place] = chain_of(v, start, &partial, (&a, b), &weights);
            }
        }
        Some(all)
    }

    fn bits(&self, v: &Variant, sum: f32, row: usize, column: usize) -> u64 {
        let p = &self.problem;
        let chained = v.accumulate == Accumulate::Chain
            && v.split.parts == 1
            && matches!(v.scaling, Scaling::AtPromotion(_) | Scaling::AtTheEnd);
        let sum = match (&p.c, v.accumulate) {
            (None, _) | (_, Accumulate::Overwrite) => sum * v.alpha,
            (Some(_), _) if chained => sum * v.alpha,
            (Some(c), _) => c[row * p.n + column] * v.beta + sum * v.alpha,
        };
        let sum = v.activation.of(sum);
        let sum = if let Cast::Via(narrow) = v.cast { narrow.through(sum) } else { sum };
        let sum = canonical_f32(sum);
        match (p.out, v.cast) {
            (Out::F32, Cast::Truncated) => u64::from(sum.to_bits() & 0xFFFF_0000),
            (Out::F32, _) => u64::from(sum.to_bits()),
            (Out::Bf16, Cast::Truncated) => {
                u64::from(Layout::BF16.from_f32(sum, Rounding::TowardZero, Overflow::Ieee))
            }
            (Out::Bf16, Cast::HalfUp) if sum.is_finite() => {
                u64::from(sum.to_bits().wrapping_add(0x8000) >> 16)
            }
            (Out::Bf16, _) => u64::from(to_bf16(sum).to_bits()),
        }
    }
}

/// Promotes the partial sums of one element into its accumulator, part by part of split-K.
fn chain_of(
    v: &Variant,
    start: f32,
    partial: &dyn Fn(usize) -> f32,
    (a, b): (&[f32], &[f32]),
    weights: &[usize],
) -> f32 {
    let promote = |acc: f32, t: usize| -> f32 {
        let partial = v.partial.through(partial(t));
        let (a, b) = (a[t], b[t]);
        v.accumulator.through(match v.scaling {
            Scaling::AtPromotion(Promote::MulAdd) => acc + (a * b) * partial,
            Scaling::AtPromotion(Promote::ScalesInTurn) => acc + (partial * a) * b,
            Scaling::AtTheEnd => acc + partial,
            _ => (a * b).mul_add(partial, acc),
        })
    };
    let run = |start: f32, order: &[usize]| {
        order.iter().fold(start, |acc, &t| (0..weights[t]).fold(acc, |acc, _| promote(acc, t)))
    };
    let order = ordered(v.order, weights.len());
    let sum = match (v.order, v.split) {
        (Order::TwoChains, _) => {
            let (even, odd): (Vec<usize>, Vec<usize>) = order.iter().partition(|&&t| t % 2 == 0);
            run(start, &even) + run(0.0, &odd)
        }
        (Order::Tree, _) => {
            let terms: Vec<f32> = order.iter().map(|&t| run(0.0, &[t])).collect();
            start + tree(&terms)
        }
        (_, Split { parts: 1, .. }) => run(start, &order),
        (_, split) => split_k(split, &order, &|order| run(0.0, order)),
    };
    match v.scaling {
        Scaling::AtTheEnd => sum * (a.first().unwrap_or(&1.0) * b.first().unwrap_or(&1.0)),
        _ => sum,
    }
}

fn ordered(order: Order, intervals: usize) -> Vec<usize> {
    let all = 0..intervals;
    match order {
        Order::Descending => all.rev().collect(),
        Order::EvenFirst => all.clone().step_by(2).chain(all.skip(1).step_by(2)).collect(),
        Order::From(first) => all.clone().skip(first).chain(all.take(first)).collect(),
        Order::Ascending | Order::TwoChains | Order::Tree => all.collect(),
    }
}

fn tree(terms: &[f32]) -> f32 {
    match terms {
        [] => 0.0,
        [one] => *one,
        _ => {
            let (low, high) = terms.split_at(terms.len().div_ceil(2));
            tree(low) + tree(high)
        }
    }
}

fn split_k(split: Split, order: &[usize], run: &dyn Fn(&[usize]) -> f32) -> f32 {
    let parts = split.dealt.parts(order, split.parts);
    let mut parts: Vec<f32> = parts.iter().map(|part| split.part.through(run(part))).collect();
    if split.descending {
        parts.reverse();
    }
    let Some((first, others)) = parts.split_first() else { return 0.0 };
    others.iter().fold(split.sum.through(*first), |sum, x| split.sum.through(sum + x))
}

impl Family for GemmFamily {
    fn hypotheses(&self) -> &[Hypothesis] {
        &self.expanded.hypotheses
    }

    fn evaluate(&self, chosen: &[usize], sample: &Sample) -> Option<Vec<u64>> {
        let v = self.expanded.variant(chosen);
        let grid = self.cache.grid(sample, self.problem.n);
        let sums = self.sums(&v, sample, &grid)?;
        let element = |&place: &usize| {
            let (r, c) = (place / grid.columns.len(), place % grid.columns.len());
            self.bits(&v, sums[place], grid.rows[r], grid.columns[c])
        };
        Some(grid.places.iter().map(element).collect())
    }

    fn cost_per_element(&self) -> u64 {
        self.problem.k as u64
    }

    /// A grid: the rows and columns of some of the differing elements, and others evenly spread.
    fn choose(&self, differing: &[usize], all: usize, count: usize) -> Vec<usize> {
        let (m, n) = (self.problem.m, self.problem.n);
        debug_assert_eq!(all, m * n);
        let side = (count as f64).sqrt() as usize;
        let rows = side.max(count / n.max(1)).clamp(1, m);
        let columns = (count / rows).clamp(1, n);
        let lines = |of: &dyn Fn(usize) -> usize, from: usize, count: usize| -> Vec<usize> {
            let mut lines: Vec<usize> =
                spread(differing.len(), count / 2).map(|i| of(differing[i])).collect();
            lines.sort_unstable();
            lines.dedup();
            let missing = count - lines.len();
            lines.extend(spread(from, missing));
            lines.sort_unstable();
            lines.dedup();
            lines
        };
        let rows = lines(&|e| e / n, m, rows);
        let columns = lines(&|e| e % n, n, columns);
        rows.iter().flat_map(|i| columns.iter().map(move |j| i * n + j)).collect()
    }

    fn along_k(&self, file: &[u64], contract: &[u64], differing: &[usize]) -> Option<KBlocks> {
        solve::along_k(self, file, contract, differing)
    }

    /// Padding rows, which are zero in the contract.
    fn by_place(&self, differing: &[usize]) -> Option<(Hypothesis, String)> {
        let p = &self.problem;
        let own: usize = p.counts.iter().sum();
        let first = differing.iter().map(|e| e / p.n).min()?;
        if p.counts.is_empty() || first < own {
            return None;
        }
        let hypothesis = Hypothesis {
            axis: "rows",
            name: PADDING[0].to_owned(),
            meaning: PADDING[1],
            seen: PADDING[2],
        };
        let last = p.m - 1;
        Some((hypothesis, format!("the last expert's rows end at {own}, the matrix at row {last}")))
    }
}
