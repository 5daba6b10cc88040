//! Hypotheses about casts to FP8 (`quantize_tile`, `quantize_block`).

mod table;

use std::sync::{Arc, Mutex};

use fathom_numerics::formats::{Format, Layout, Overflow, Rounding, to_bf16, to_f16};
use fathom_numerics::quant::ScaleKind;
use fathom_reference::Tensor;
use fathom_reference::ops::quantize_block::QuantizeBlock;
use fathom_reference::ops::quantize_tile::QuantizeTile;

use super::hypothesis::{Expanded, Family, Hypothesis, Sample, values};
use crate::case_file::CaseFile;

pub(super) use table::table;

/// How x is brought to the format's range.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Divide {
    Ieee,
    /// `x * (1 / scale)`.
    Reciprocal,
    /// `x * (max_of_format / amax)`.
    Inverse,
    Multiply,
    Not,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Round {
    NearestEven,
    TowardZero,
    Down,
    Up,
    TiesAway,
}

/// How a scale is made of amax.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Scale {
    F32,
    Pow2Up,
    Pow2Down,
    Pow2Nearest,
    /// Up from 1.5 times a power on.
    Pow2Half,
    /// Always the next power above.
    Pow2Above,
    /// `2^(floor(log2 amax) - largest exponent of the format)`.
    OcpMx,
    Bf16,
    F16,
    One,
}

/// Which bound amax has below.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Floor {
    At(f32),
    /// A zero amax gives scale 1.
    OneForZero,
    OfScale(f32),
    Added(f32),
}

/// What enters amax.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Amax {
    Magnitude,
    /// The largest value, signs kept.
    Signed,
    KeepsNan,
    Bf16,
    /// Only those many first columns of the block count.
    First(usize),
    /// Only every second column counts.
    EverySecond,
}

/// The code of a NaN.
#[derive(Clone, Copy, Debug, PartialEq)]
enum NanTo {
    Nan,
    Negative,
    Code(u32),
    Largest(bool),
}

/// The block that shares a scale, as the kernel takes it; scales are read at the case's places.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Block {
    rows: usize,
    columns: usize,
}

/// Whose scale x is divided by.
#[derive(Clone, Copy, Debug, PartialEq)]
enum From {
    Own,
    Next(isize),
    Row(isize),
    First,
    TailBefore,
    TailFirst,
}

/// Where a stored scale comes from.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Stored {
    AsGiven,
    Reciprocal,
    /// `max_of_format / amax`.
    Inverse,
    /// That of the last of the blocks that share it.
    Last,
    Transposed,
    Amax,
    Bf16,
    Unrounded,
    /// The exponent's field as a number.
    Exponent,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Narrow {
    F32,
    Bf16,
    F16,
}

impl Narrow {
    fn through(self, x: f32) -> f32 {
        match self {
            Narrow::F32 => x,
            Narrow::Bf16 => to_bf16(x).to_f32(),
            Narrow::F16 => to_f16(x).to_f32(),
        }
    }
}

/// Everything about a cast that may deviate.
#[derive(Clone, Debug, PartialEq)]
struct Variant {
    divide: Divide,
    round: Round,
    /// The magnitude from which on quotients are the largest value; infinite: never.
    saturate: f32,
    nan: NanTo,
    layout: Layout,
    /// The largest value that scales are made for; none: the format's.
    largest: Option<f32>,
    scale: Scale,
    codes_by_unrounded: bool,
    underflow: bool,
    floor: Floor,
    amax: Amax,
    block: Block,
    flat: bool,
    from: From,
    input: Narrow,
    quotient: Narrow,
    stored: Stored,
    flush: bool,
    flush_input: bool,
    positive_zero: bool,
}

/// What the case file states.
struct Case {
    format: Format,
    block: Block,
    floor: f32,
    shape: (usize, usize),
    /// Codes lie in a byte each.
    one_byte: bool,
}

/// The hypotheses about one cast.
pub(super) struct QuantizeFamily {
    expanded: Expanded<Variant>,
    case: Case,
    x: Vec<f32>,
    known: Mutex<Vec<(AmaxOf, Arc<Vec<f32>>)>>,
    /// Elements of q that the file holds, before those of the scale.
    q_elements: usize,
}

impl QuantizeFamily {
    pub(super) fn tile(op: &QuantizeTile, file: &CaseFile) -> QuantizeFamily {
        let block = Block { rows: 1, columns: op.tile };
        Self::new(op.format, block, op.scale, op.amax_floor, file)
    }

    pub(super) fn block(op: &QuantizeBlock, file: &CaseFile) -> QuantizeFamily {
        let [rows, columns] = op.block.map(|e| e.unwrap_or(usize::MAX));
        Self::new(op.format, Block { rows, columns }, op.scale, op.amax_floor, file)
    }

    fn new(
        format: Format,
        block: Block,
        scale: ScaleKind,
        floor: f32,
        file: &CaseFile,
    ) -> QuantizeFamily {
        let x = &file.case.inputs["x"];
        let floor = match scale {
            ScaleKind::F32 | ScaleKind::Pow2 => floor,
            // The amax that gives the smallest scale.
            ScaleKind::Mx => 2f32.powi(-127) * 2f32.powf(format.max().log2().floor()),
        };
        let one_byte = format != Format::E5M6;
        let case = Case { format, block, floor, shape: x.rows_columns(), one_byte };
        let given = Variant {
            divide: Divide::Ieee,
            round: Round::NearestEven,
            saturate: format.max(),
            nan: NanTo::Nan,
            layout: *format.layout(),
            largest: None,
            scale: match scale {
                ScaleKind::F32 => Scale::F32,
                ScaleKind::Pow2 => Scale::Pow2Up,
                ScaleKind::Mx => Scale::OcpMx,
            },
            codes_by_unrounded: false,
            underflow: false,
            floor: Floor::At(floor),
            amax: Amax::Magnitude,
            block,
            flat: false,
            from: From::Own,
            input: Narrow::F32,
            quotient: Narrow::F32,
            stored: Stored::AsGiven,
            flush: false,
            flush_input: false,
            positive_zero: false,
        };
        QuantizeFamily {
            expanded: Expanded::new(table::ROWS, &case, given),
            x: values(x),
            known: Mutex::default(),
            q_elements: file.expected.get("q").map_or(0, Tensor::len),
            case,
        }
    }
}

impl Family for QuantizeFamily {
    fn hypotheses(&self) -> &[Hypothesis] {
        &self.expanded.hypotheses
    }

    fn cost_per_element(&self) -> u64 {
        256
    }

    fn evaluate(&self, chosen: &[usize], sample: &Sample) -> Option<Vec<u64>> {
        let v = self.expanded.variant(chosen);
        let scales = Scales::new(&v, &self.amax(&v), self.case.shape.1);
        let element = |&e: &usize| match e.checked_sub(self.q_elements) {
            None => self.code(&v, &scales, e),
            Some(e) => self.stored_scale(&v, &scales, e),
        };
        Some(sample.elements.iter().map(element).collect())
    }
}

impl Variant {
    fn entered(&self, x: f32) -> f32 {
        let x = self.input.through(x);
        if self.flush_input && x.is_subnormal() { 0.0f32.copysign(x) } else { x }
    }

    /// Another format without another largest value goes to its own.
    fn largest(&self) -> f32 {
        self.largest.unwrap_or(self.layout.to_f32(self.layout.max_code()))
    }

    /// A scale, and the same before it was rounded.
    fn scale(&self, amax: f32) -> (f32, f32) {
        let max = self.largest();
        let quotient = match self.floor {
            Floor::At(floor) => at_least(amax, floor) / max,
            Floor::OneForZero if amax == 0.0 => 1.0,
            Floor::OneForZero => amax / max,
            Floor::OfScale(floor) => at_least(amax / max, floor),
            Floor::Added(eps) => (amax + eps) / max,
        };
        let power = |x: f32| f32::from_bits(x.to_bits() & 0x7F80_0000);
        let exponent = power(quotient);
        let up = || fathom_numerics::quant::next_power_of_two(quotient);
        let scale = match self.scale {
            Scale::F32 => quotient,
            Scale::Pow2Up => up(),
            Scale::Pow2Down => exponent,
            Scale::Pow2Nearest if quotient < exponent * std::f32::consts::SQRT_2 => exponent,
            Scale::Pow2Half if quotient < exponent * 1.5 => exponent,
            Scale::Pow2Nearest | Scale::Pow2Half => exponent * 2.0,
            Scale::Pow2Above => exponent * 2.0,
            Scale::OcpMx => power(quotient * max) / power(max),
            Scale::Bf16 => to_bf16(quotient).to_f32(),
            Scale::F16 => to_f16(quotient).to_f32(),
            Scale::One => 1.0,
        };
        let zero = |s: f32| if self.underflow && s < f32::MIN_POSITIVE { 0.0 } else { s };
        // A power of two made of a subnormal's exponent field is zero as well.
        let lost = self.underflow && quotient < f32::MIN_POSITIVE;
        (if lost { 0.0 } else { zero(scale) }, zero(quotient))
    }

    fn encoded(&self, x: f32) -> u32 {
        let layout = &self.layout;
        let largest = |negative: bool| {
            layout.max_code() | if negative { 1 << (layout.bits() - 1) } else { 0 }
        };
        if x.is_nan() {
            return match self.nan {
                NanTo::Nan if *layout == table::E4M3_FNUZ => 0x80,
                NanTo::Nan => layout.nan(),
                NanTo::Negative => layout.nan() | 1 << (layout.bits() - 1),
                NanTo::Code(code) => code,
                NanTo::Largest(negative) => largest(negative),
            };
        }
        let own = layout.to_f32(layout.max_code());
        if self.saturate < own && x.abs() >= self.saturate {
            return largest(x < 0.0);
        }
        let overflow =
            if self.saturate.is_infinite() { Overflow::Ieee } else { Overflow::Saturate };
        let to = |rounding| layout.from_f32(x, rounding, overflow);
        let code = match self.round {
            Round::NearestEven => to(Rounding::NearestEven),
            Round::TowardZero => to(Rounding::TowardZero),
            Round::Down => to(Rounding::Down),
            Round::Up => to(Rounding::Up),
            Round::TiesAway => {
                let (below, above) = (to(Rounding::Down), to(Rounding::Up));
                let (low, high) = (layout.to_f64(below), layout.to_f64(above));
                let tie = f64::from(x) - low == high - f64::from(x) && low != high;
                let away = if x < 0.0 { below } else { above };
                if tie { away } else { to(Rounding::NearestEven) }
            }
        };
        let exponent_mask = !((1u32 << layout.fraction_bits) - 1);
        let sign = 1u32 << (layout.bits() - 1);
        let code = if self.flush && code & exponent_mask & !sign == 0 { code & sign } else { code };
        let lost = code == sign && (self.positive_zero || *layout == table::E4M3_FNUZ);
        if lost { 0 } else { code }
    }
}

/// The larger of two maxima; a NaN among them stays.
fn larger_of(x: f32, y: f32) -> f32 {
    if x.is_nan() || y.is_nan() { f32::NAN } else { x.max(y) }
}

fn at_least(x: f32, floor: f32) -> f32 {
    if x.is_nan() { x } else { x.max(floor) }
}

/// What decides the amax of every block: shared by all variants that differ elsewhere.
#[derive(Clone, PartialEq)]
struct AmaxOf {
    block: Block,
    flat: bool,
    amax: Amax,
    input: Narrow,
    flush_input: bool,
}

/// Scale, scale before rounding, and amax of every block of a variant.
struct Scales {
    columns: usize,
    k: usize,
    block: Block,
    flat: bool,
    of: Vec<(f32, f32, f32)>,
}

impl Scales {
    fn new(v: &Variant, amax: &[f32], k: usize) -> Scales {
        let narrow = |a: f32| if v.amax == Amax::Bf16 { to_bf16(a).to_f32() } else { a };
        let of = |&amax: &f32| {
            let (scale, unrounded) = v.scale(narrow(amax));
            let floored = match v.floor {
                Floor::At(floor) => at_least(narrow(amax), floor),
                _ => narrow(amax),
            };
            (scale, unrounded, floored)
        };
        Scales {
            columns: k.div_ceil(v.block.columns),
            k,
            block: v.block,
            flat: v.flat,
            of: amax.iter().map(of).collect(),
        }
    }

    fn index(&self, row: usize, column: usize) -> usize {
        if self.flat {
            (row * self.k + column) / self.block.columns
        } else {
            row / self.block.rows * self.columns + column / self.block.columns
        }
    }

    fn at(&self, row: usize, column: usize) -> (f32, f32, f32) {
        self.of[self.index(row, column)]
    }
}

impl QuantizeFamily {
    /// The amax of every block, computed once for all variants that share it.
    fn amax(&self, v: &Variant) -> Arc<Vec<f32>> {
        let key = AmaxOf {
            block: v.block,
            flat: v.flat,
            amax: v.amax,
            input: v.input,
            flush_input: v.flush_input,
        };
        let known = || self.known.lock().expect("no panic holds it");
        if let Some((_, amax)) = known().iter().find(|(k, _)| *k == key) {
            return amax.clone();
        }
        let k = self.case.shape.1;
        let larger = |amax: f32, x: &f32| {
            let x = v.entered(*x);
            // `max` drops a NaN, as the contract does.
            match v.amax {
                Amax::Signed => amax.max(x),
                Amax::KeepsNan if amax.is_nan() || x.is_nan() => f32::NAN,
                _ => amax.max(x.abs()),
            }
        };
        let of = |x: &[f32]| match v.amax {
            Amax::First(n) => x.iter().take(n).fold(0.0, larger),
            Amax::EverySecond => x.iter().step_by(2).fold(0.0, larger),
            _ => x.iter().fold(0.0, larger),
        };
        let amax: Vec<f32> = if v.flat {
            self.x.chunks(v.block.columns).map(of).collect()
        } else {
            let width = v.block.columns.min(k);
            let band = v.block.rows.min(self.case.shape.0).saturating_mul(k);
            let of_band = |band: &[f32]| -> Vec<f32> {
                let rows = band.chunks(k).map(|row| row.chunks(width).map(of));
                let mut all = vec![0.0f32; k.div_ceil(width)];
                for row in rows {
                    for (all, one) in all.iter_mut().zip(row) {
                        *all = larger_of(*all, one);
                    }
                }
                all
            };
            self.x.chunks(band).flat_map(of_band).collect()
        };
        let amax = Arc::new(amax);
        known().push((key, amax.clone()));
        amax
    }

    fn code(&self, v: &Variant, scales: &Scales, e: usize) -> u64 {
        if self.case.one_byte {
            return u64::from(self.one_code(v, scales, e));
        }
        // Word w of a row: codes of eight elements in three words.
        let words = self.case.shape.1.div_ceil(8) * 3;
        let (row, word) = (e / words, e % words);
        let eight = std::array::from_fn(|i| {
            let column = word / 3 * 8 + i;
            let inside = column < self.case.shape.1;
            let at = row * self.case.shape.1 + column;
            let code = if inside { self.one_code(v, scales, at) } else { 0 };
            fathom_numerics::formats::E5M6::from_bits(code as u16)
        });
        debug_assert_eq!(self.case.format, Format::E5M6);
        u64::from(fathom_numerics::formats::packed::pack_e5m6(eight)[word % 3])
    }

    fn one_code(&self, v: &Variant, scales: &Scales, e: usize) -> u32 {
        let (m, k) = self.case.shape;
        let (row, column) = (e / k, e % k);
        let width = v.block.columns.min(k);
        let tail = column / width == (k - 1) / width;
        let beside = |by: isize| column.saturating_add_signed(by * width as isize).min(k - 1);
        let (row, column) = match v.from {
            From::Own => (row, column),
            From::Next(by) => (row, beside(by)),
            From::Row(by) => (row.saturating_add_signed(by).min(m - 1), column),
            From::First => (row, 0),
            From::TailBefore => (row, if tail { beside(-1) } else { column }),
            From::TailFirst => (row, if tail { 0 } else { column }),
        };
        let (scale, unrounded, amax) = scales.at(row, column);
        let scale = if v.codes_by_unrounded { unrounded } else { scale };
        let x = v.entered(self.x[e]);
        let scaled = match v.divide {
            Divide::Ieee => x / scale,
            Divide::Reciprocal => x * (1.0 / scale),
            Divide::Inverse => x * (v.largest() / amax),
            Divide::Multiply => x * scale,
            Divide::Not => x,
        };
        v.encoded(v.quotient.through(scaled))
    }

    fn stored_scale(&self, v: &Variant, scales: &Scales, e: usize) -> u64 {
        let given = self.case.block;
        let rows = self.case.shape.0.div_ceil(given.rows);
        let columns = self.case.shape.1.div_ceil(given.columns);
        if v.flat {
            let (scale, ..) = scales.of.get(e).copied().unwrap_or_default();
            return u64::from(scale.to_bits());
        }
        let (i, j) = match v.stored {
            Stored::Transposed => (e % rows, e / rows),
            _ => (e / columns, e % columns),
        };
        // A variant with as many blocks stores them in order, another at the case's places.
        let (m, k) = self.case.shape;
        let place = |n: usize, given: usize, own: usize, extent: usize| {
            let same_number = extent.div_ceil(given) == extent.div_ceil(own);
            n.saturating_mul(if same_number { own } else { given }).min(extent - 1)
        };
        let (row, column) = match v.stored {
            Stored::Last => {
                let end = |n: usize, given: usize, extent: usize| {
                    n.saturating_mul(given).saturating_add(given - 1).min(extent - 1)
                };
                (end(i, given.rows, m), end(j, given.columns, k))
            }
            _ => {
                (place(i, given.rows, v.block.rows, m), place(j, given.columns, v.block.columns, k))
            }
        };
        let (scale, unrounded, amax) = scales.at(row, column);
        let stored = match v.stored {
            Stored::AsGiven | Stored::Transposed | Stored::Last => scale,
            Stored::Reciprocal => 1.0 / scale,
            Stored::Inverse => v.largest() / amax,
            Stored::Amax => amax,
            Stored::Bf16 => to_bf16(scale).to_f32(),
            Stored::Unrounded => unrounded,
            Stored::Exponent => (scale.to_bits() >> 23 & 0xFF) as f32,
        };
        u64::from(stored.to_bits())
    }
}
