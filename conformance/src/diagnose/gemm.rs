//! Hypotheses about an FP8 GEMM: everything that kernels do otherwise than the contract.

use fathom_numerics::formats::{Format, Layout, Overflow, Rounding, canonical_f32, to_bf16};
use fathom_numerics::gemm::{GemmConfig, Promote};
use fathom_numerics::mma::{Accumulator, Fraction, Operand, Output, Terms};
use fathom_reference::ops::gemm_fp8::{AccumulateInto, GemmFp8, OutputType};
use fathom_reference::{Case, Tensor};
use fathom_trace::DType;

use super::{Axis, Family, axis, pick};

/// What the scales multiply, and when.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Scaling {
    /// Each partial sum at its promotion: the contract, with the case's way of promoting.
    AtPromotion(Promote),
    /// As fma, the partial sum rounded to BF16 first.
    Bf16Partial,
    /// As fma, the accumulator kept in BF16.
    Bf16Accumulator,
    /// The elements before the product: operands dequantised to BF16, BF16 tensor core.
    BeforeBf16,
    /// The elements before the product: operands dequantised to FP32, one fma a product.
    BeforeFp32,
    /// The whole sum at its end, by the first block's scales.
    AtTheEnd,
}

/// Which scale a K block of an operand's row gets.
#[derive(Clone, Copy, Debug, PartialEq)]
enum ScaleIndex {
    AsGiven,
    /// The K block this far on, the last one repeated.
    Shifted(isize),
    /// Row and K block exchanged.
    Transposed,
    /// No scale: 1.
    Ignored,
    /// Rows grouped by another size than the case's.
    RowsBy(usize),
    /// The scale of the row this far on.
    RowShifted(isize),
}

/// The order in which K is worked off.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Order {
    Ascending,
    IntervalsDescending,
    GroupsDescending,
    EvenIntervalsFirst,
}

/// Which part of K enters.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Extent {
    All,
    TailDropped,
    Without(usize),
}

/// The cast to the output.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Cast {
    Nearest,
    Truncated,
    ViaBf16,
    ViaF16,
}

pub(super) struct GemmFamily {
    axes: Vec<Axis>,
    accumulators: Vec<Accumulator>,
    groups: Vec<usize>,
    roundings: Vec<(Rounding, Rounding)>,
    intervals: Vec<Option<usize>>,
    scalings: Vec<Scaling>,
    a_indices: Vec<ScaleIndex>,
    b_indices: Vec<ScaleIndex>,
    orders: Vec<Order>,
    splits: Vec<usize>,
    formats: Vec<(Format, Format)>,
    extents: Vec<Extent>,
    casts: Vec<Cast>,
    given: GemmConfig,
    given_formats: (Format, Format),
    op: GemmFp8,
    a: Tensor,
    b: Tensor,
    a_scale: Tensor,
    b_scale: Tensor,
    c: Option<Tensor>,
}

fn accumulators() -> Vec<(String, Accumulator)> {
    let of = |bits: u32| {
        let output = if bits < 23 { Output::F32 { fraction_bits: bits } } else { Output::FULL };
        (format!("accumulator of {bits} fraction bits"), Accumulator::tensor_core(32, bits, output))
    };
    let mut all: Vec<_> = [10, 12, 13, 14, 22, 23, 25].map(of).into();
    all.push(("exact accumulator, rounded to FP32 every group".into(), Accumulator::EXACT));
    all.push(("FP32 accumulator, one fma a product".into(), Accumulator::FP32_FMA));
    all
}

impl GemmFamily {
    pub(super) fn new(op: &GemmFp8, case: &Case) -> GemmFamily {
        let given = op.config();
        let input = |name: &str| case.inputs[name].clone();
        let (a, b) = (input("a"), input("b"));
        let format =
            |t: &Tensor| if t.dtype() == DType::F8E5M2 { Format::E5M2 } else { Format::E4M3 };
        let given_formats = (format(&a), format(&b));

        let (core, accumulators) = axis("accumulator", &given.accumulator, accumulators());
        let groups = [4, 8, 16, 32, 64, 128].map(|g| (format!("groups of {g} products"), g));
        let (group, groups) = axis("group size", &given.accumulator.group, groups.into());
        use Rounding::{NearestEven as Rn, TowardZero as Rz};
        let (rounding, roundings) = axis(
            "rounding",
            &(given.accumulator.align, given.accumulator.round),
            vec![
                ("alignment to nearest".into(), (Rn, Rz)),
                ("group results to nearest".into(), (Rz, Rn)),
                ("alignment and group results to nearest".into(), (Rn, Rn)),
                ("truncation throughout".into(), (Rz, Rz)),
            ],
        );
        let whole = |i: &Option<usize>| i.is_none_or(|i| i >= op.k);
        let interval = |i: usize| (format!("promotion interval {i}"), Some(i));
        let mut choices: Vec<_> = [32, 64, 128, 256, 512, 1024]
            .map(interval)
            .into_iter()
            .filter(|(_, i)| !whole(i))
            .collect();
        choices.push(("no promotion".into(), None));
        let given_interval = given.promotion_interval.filter(|i| *i < op.k);
        let (interval, intervals) = axis("promotion interval", &given_interval, choices);
        let (scaling, scalings) = axis(
            "scaling",
            &Scaling::AtPromotion(given.promote),
            vec![
                ("promotion by fma".into(), Scaling::AtPromotion(Promote::Fma)),
                (
                    "promotion by separate multiply and add".into(),
                    Scaling::AtPromotion(Promote::MulAdd),
                ),
                (
                    "promotion by both scales in turn".into(),
                    Scaling::AtPromotion(Promote::ScalesInTurn),
                ),
                ("partial sums rounded to BF16".into(), Scaling::Bf16Partial),
                ("accumulator kept in BF16".into(), Scaling::Bf16Accumulator),
                ("scales applied before, operands in BF16".into(), Scaling::BeforeBf16),
                ("scales applied before, operands in FP32".into(), Scaling::BeforeFp32),
                ("the first block's scales applied at the end".into(), Scaling::AtTheEnd),
            ],
        );
        let indices = |x: &str, block: usize| {
            let mut all = vec![
                (format!("{x}_scale shifted to the next K block"), ScaleIndex::Shifted(1)),
                (format!("{x}_scale shifted to the K block before"), ScaleIndex::Shifted(-1)),
                (format!("{x}_scale transposed"), ScaleIndex::Transposed),
                (format!("{x}_scale ignored"), ScaleIndex::Ignored),
                (format!("{x}_scale of the next row"), ScaleIndex::RowShifted(1)),
                (format!("{x}_scale of the row before"), ScaleIndex::RowShifted(-1)),
            ];
            for rows in [1, 64, 128, 256] {
                if rows != block {
                    let words = format!("{x}_scale mapped to blocks of {rows} rows");
                    all.push((words, ScaleIndex::RowsBy(rows)));
                }
            }
            all
        };
        let block = |extent: [Option<usize>; 2]| extent[0].unwrap_or(usize::MAX);
        let given_index = ScaleIndex::AsGiven;
        let (a_index, a_indices) = axis("a_scale", &given_index, indices("a", block(op.a_tile)));
        let (b_index, b_indices) = axis("b_scale", &given_index, indices("b", block(op.b_block)));
        let (order, orders) = axis(
            "order of K",
            &Order::Ascending,
            vec![
                ("K blocks descending".into(), Order::IntervalsDescending),
                ("groups descending within a K block".into(), Order::GroupsDescending),
                ("even K blocks before odd ones".into(), Order::EvenIntervalsFirst),
            ],
        );
        let split = |s: usize| (format!("split-K by {s}, parts added in order"), s);
        let (split, splits) = axis("split-K", &1, [2, 3, 4, 8, 16].map(split).into());
        let (e4, e5) = (Format::E4M3, Format::E5M2);
        let (formats_axis, formats) = axis(
            "formats",
            &given_formats,
            [(e4, e4), (e4, e5), (e5, e4), (e5, e5)]
                .map(|(a, b)| (format!("a read as {a} and b as {b}"), (a, b)))
                .into(),
        );
        let mut extents = vec![];
        if !op.k.is_multiple_of(128) {
            extents.push((
                "the tail of K below a multiple of 128 dropped".into(),
                Extent::TailDropped,
            ));
        }
        for block in 0..op.k.div_ceil(128).min(64) {
            extents.push((format!("K block {block} missing"), Extent::Without(block)));
        }
        let (extent, extents) = axis("extent of K", &Extent::All, extents);
        let mut casts = vec![("output rounded to FP16 on the way".into(), Cast::ViaF16)];
        match op.d {
            OutputType::Bf16 => casts.push(("output truncated to BF16".into(), Cast::Truncated)),
            OutputType::F32 => {
                casts.push(("output rounded to BF16 on the way".into(), Cast::ViaBf16))
            }
        }
        let (cast, casts) = axis("output cast", &Cast::Nearest, casts);
        GemmFamily {
            axes: vec![
                core,
                group,
                rounding,
                interval,
                scaling,
                a_index,
                b_index,
                order,
                split,
                formats_axis,
                extent,
                cast,
            ],
            accumulators,
            groups,
            roundings,
            intervals,
            scalings,
            a_indices,
            b_indices,
            orders,
            splits,
            formats,
            extents,
            casts,
            given,
            given_formats,
            a,
            b,
            a_scale: input("a_scale"),
            b_scale: input("b_scale"),
            c: case.inputs.get("c").cloned(),
            op: op.clone(),
        }
    }
}

/// One hypothesis, resolved.
struct Variant {
    accumulator: Accumulator,
    interval: usize,
    scaling: Scaling,
    a_index: ScaleIndex,
    b_index: ScaleIndex,
    order: Order,
    split: usize,
    extent: Extent,
    cast: Cast,
    a_values: Vec<Operand>,
    b_values: Vec<Operand>,
    formats: (Format, Format),
}

impl Family for GemmFamily {
    fn axes(&self) -> &[Axis] {
        &self.axes
    }

    fn cost_per_element(&self) -> u64 {
        self.op.k as u64
    }

    fn evaluate(&self, choice: &[Option<usize>], elements: &[usize]) -> Option<Vec<u64>> {
        let mut accumulator = pick(&self.accumulators, choice[0], self.given.accumulator);
        accumulator.group = pick(&self.groups, choice[1], accumulator.group);
        let given = (accumulator.align, accumulator.round);
        (accumulator.align, accumulator.round) = pick(&self.roundings, choice[2], given);
        let interval = pick(&self.intervals, choice[3], self.given.promotion_interval);
        let formats = pick(&self.formats, choice[9], self.given_formats);
        let decode = |format| (0..256).map(|code| Operand::decode(format, code)).collect();
        let scaling = Scaling::AtPromotion(self.given.promote);
        let variant = Variant {
            accumulator,
            interval: interval.unwrap_or(usize::MAX).min(self.op.k.max(1)),
            scaling: pick(&self.scalings, choice[4], scaling),
            a_index: pick(&self.a_indices, choice[5], ScaleIndex::AsGiven),
            b_index: pick(&self.b_indices, choice[6], ScaleIndex::AsGiven),
            order: pick(&self.orders, choice[7], Order::Ascending),
            split: pick(&self.splits, choice[8], 1),
            extent: pick(&self.extents, choice[10], Extent::All),
            cast: pick(&self.casts, choice[11], Cast::Nearest),
            a_values: decode(formats.0),
            b_values: decode(formats.1),
            formats,
        };
        elements.iter().map(|&e| self.element(&variant, e / self.op.n, e % self.op.n)).collect()
    }
}

impl GemmFamily {
    /// Bits of d[i, j]; `None` where the variant is not defined here (a partial sum would span
    /// scales that differ).
    fn element(&self, v: &Variant, i: usize, j: usize) -> Option<u64> {
        let k = self.op.k;
        let codes = |t: &Tensor, row: usize| t.bytes()[row * k..(row + 1) * k].to_vec();
        let (a, b) = (codes(&self.a, i), codes(&self.b, j));
        let old = self.c.as_ref().map_or(0.0, |c| c.as_slice::<f32>()[i * self.op.n + j]);
        let chain = self.op.accumulate == AccumulateInto::Chain;
        let sum = match v.scaling {
            Scaling::BeforeBf16 | Scaling::BeforeFp32 => self.scaled_before(v, i, j, &a, &b),
            _ => self.scaled_after(v, (i, j), (&a, &b), if chain { old } else { 0.0 })?,
        };
        let sum = match self.op.accumulate {
            AccumulateInto::Overwrite => sum,
            AccumulateInto::Chain
                if v.split == 1
                    && !matches!(v.scaling, Scaling::BeforeBf16 | Scaling::BeforeFp32) =>
            {
                sum
            }
            _ => old + sum,
        };
        let sum = match v.cast {
            Cast::ViaBf16 => to_bf16(sum).to_f32(),
            Cast::ViaF16 => half::f16::from_f32(sum).to_f32(),
            Cast::Nearest | Cast::Truncated => sum,
        };
        let sum = canonical_f32(sum);
        Some(match (self.op.d, v.cast) {
            (OutputType::F32, _) => u64::from(sum.to_bits()),
            (OutputType::Bf16, Cast::Truncated) => {
                u64::from(Layout::BF16.from_f32(sum, Rounding::TowardZero, Overflow::Ieee))
            }
            (OutputType::Bf16, _) => u64::from(to_bf16(sum).to_bits()),
        })
    }

    /// The intervals of K in the order in which they are worked off.
    fn intervals(&self, v: &Variant) -> Vec<(usize, usize)> {
        let k = if v.extent == Extent::TailDropped { self.op.k / 128 * 128 } else { self.op.k };
        let mut all: Vec<_> =
            (0..k).step_by(v.interval).map(|begin| (begin, (begin + v.interval).min(k))).collect();
        match v.order {
            Order::Ascending | Order::GroupsDescending => {}
            Order::IntervalsDescending => all.reverse(),
            Order::EvenIntervalsFirst => {
                let odd = all.iter().copied().skip(1).step_by(2).collect::<Vec<_>>();
                all = all.into_iter().step_by(2).chain(odd).collect();
            }
        }
        all
    }

    /// The contract's form: partial sums on the tensor core, scales at their promotion.
    fn scaled_after(
        &self,
        v: &Variant,
        (i, j): (usize, usize),
        (a, b): (&[u8], &[u8]),
        start: f32,
    ) -> Option<f32> {
        let intervals = self.intervals(v);
        let part = intervals.len().div_ceil(v.split).max(1);
        let mut total = None;
        for (number, intervals) in intervals.chunks(part).enumerate() {
            let mut acc = if number == 0 && v.split == 1 { start } else { 0.0 };
            for &(begin, end) in intervals {
                let (scale_a, scale_b) = match v.scaling {
                    Scaling::AtTheEnd => (1.0, 1.0),
                    _ => (
                        self.scale_over(v, true, i, begin, end)?,
                        self.scale_over(v, false, j, begin, end)?,
                    ),
                };
                let partial = self.partial(v, a, b, begin, end);
                let fma = |partial: f32, acc: f32| (scale_a * scale_b).mul_add(partial, acc);
                acc = match v.scaling {
                    Scaling::AtPromotion(Promote::MulAdd) => acc + (scale_a * scale_b) * partial,
                    Scaling::AtPromotion(Promote::ScalesInTurn) => {
                        acc + (partial * scale_a) * scale_b
                    }
                    Scaling::Bf16Partial => fma(to_bf16(partial).to_f32(), acc),
                    Scaling::Bf16Accumulator => to_bf16(fma(partial, acc)).to_f32(),
                    _ => fma(partial, acc),
                };
            }
            total = Some(total.map_or(acc, |t: f32| t + acc));
        }
        let total = total.unwrap_or(start);
        if v.scaling == Scaling::AtTheEnd {
            return Some(total * (self.scale(v, true, i, 0) * self.scale(v, false, j, 0)));
        }
        Some(total)
    }

    /// One interval on the tensor core, from zero.
    fn partial(&self, v: &Variant, a: &[u8], b: &[u8], begin: usize, end: usize) -> f32 {
        let mut kept: Vec<usize> = (begin..end).collect();
        if let Extent::Without(block) = v.extent {
            kept.retain(|k| k / 128 != block);
        }
        if v.order == Order::GroupsDescending {
            kept = kept.rchunks(v.accumulator.group).flatten().copied().collect();
        }
        let values = |codes: &[u8], values: &[Operand]| -> Vec<Operand> {
            kept.iter().map(|&k| values[usize::from(codes[k])]).collect()
        };
        let terms = Terms {
            a: &values(a, &v.a_values),
            b: &values(b, &v.b_values),
            scale_a: &[],
            scale_b: &[],
            fraction_a: v.formats.0.layout().fraction_bits,
            fraction_b: v.formats.1.layout().fraction_bits,
        };
        f32::from_bits(v.accumulator.chain(&terms, 0))
    }

    /// Operands dequantised first: a BF16 tensor-core GEMM, or FP32 fma.
    fn scaled_before(&self, v: &Variant, i: usize, j: usize, a: &[u8], b: &[u8]) -> f32 {
        let value = |is_a: bool, row: usize, codes: &[u8], k: usize| {
            let format = if is_a { v.formats.0 } else { v.formats.1 };
            format.layout().to_f32(u32::from(codes[k])) * self.scale(v, is_a, row, k)
        };
        if v.scaling == Scaling::BeforeFp32 {
            return (0..self.op.k)
                .fold(0.0, |acc, k| value(true, i, a, k).mul_add(value(false, j, b, k), acc));
        }
        let operands = |is_a: bool, row: usize, codes: &[u8]| -> Vec<Operand> {
            let bits = |k| u32::from(to_bf16(value(is_a, row, codes, k)).to_bits());
            (0..self.op.k).map(|k| Operand::decode(Format::Bf16, bits(k))).collect()
        };
        let terms = Terms {
            a: &operands(true, i, a),
            b: &operands(false, j, b),
            scale_a: &[],
            scale_b: &[],
            fraction_a: 7,
            fraction_b: 7,
        };
        let core = Accumulator { fraction: Fraction::Bits(25), ..Accumulator::HOPPER_16BIT };
        f32::from_bits(core.chain(&terms, 0))
    }

    /// The one scale of an interval; `None` where the blocks it spans have different ones.
    fn scale_over(
        &self,
        v: &Variant,
        is_a: bool,
        row: usize,
        begin: usize,
        end: usize,
    ) -> Option<f32> {
        let first = self.scale(v, is_a, row, begin);
        let block = if is_a { self.op.a_tile[1] } else { self.op.b_block[1] }.unwrap_or(usize::MAX);
        let mut next = (begin / block).checked_add(1).and_then(|b| b.checked_mul(block));
        while let Some(k) = next.filter(|k| *k < end) {
            if self.scale(v, is_a, row, k).to_bits() != first.to_bits() {
                return None;
            }
            next = k.checked_add(block);
        }
        Some(first)
    }

    /// The scale that an element of a row gets under the variant's mapping.
    fn scale(&self, v: &Variant, is_a: bool, row: usize, k: usize) -> f32 {
        let (scales, extent, index) = if is_a {
            (&self.a_scale, self.op.a_tile, v.a_index)
        } else {
            (&self.b_scale, self.op.b_block, v.b_index)
        };
        let (rows, columns) = (scales.shape()[0], scales.shape()[1]);
        let r = row / extent[0].unwrap_or(usize::MAX);
        let c = k / extent[1].unwrap_or(usize::MAX);
        let values = scales.as_slice::<f32>();
        let clamp = |x: usize, by: isize, len: usize| x.saturating_add_signed(by).min(len - 1);
        match index {
            ScaleIndex::AsGiven => values[r * columns + c],
            ScaleIndex::Shifted(by) => values[r * columns + clamp(c, by, columns)],
            ScaleIndex::RowShifted(by) => values[clamp(r, by, rows) * columns + c],
            // As if the same memory were laid out [columns, rows].
            ScaleIndex::Transposed => values[c * rows + r],
            ScaleIndex::Ignored => 1.0,
            ScaleIndex::RowsBy(by) => values[(row / by).min(rows - 1) * columns + c],
        }
    }
}
