//! Hypotheses about casts to FP8 (`quantize_tile`, `quantize_block`).

use fathom_numerics::formats::{Format, Overflow, Rounding, to_bf16};
use fathom_reference::Tensor;
use fathom_reference::ops::quantize::{
    BlockFormat, QuantizeBlock, QuantizeTile, ScaleType, TileFormat,
};
use fathom_trace::DType;

use super::{Axis, Family, axis, pick};
use crate::case_file::CaseFile;
use crate::compare;

/// How x is brought to the format's range.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Divide {
    Ieee,
    /// `x * (1 / scale)`.
    Reciprocal,
    /// `x * (max_of_format / amax)`.
    Inverse,
}

/// How a scale is made of amax.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Scale {
    F32,
    Pow2Up,
    Pow2Down,
    Pow2Nearest,
    Bf16,
}

/// Which bound amax has below.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Floor {
    At(f32),
    /// A zero amax gives scale 1.
    OneForZero,
}

/// What enters amax.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Amax {
    Magnitude,
    /// The largest value, signs kept.
    Signed,
}

/// The block that shares a scale, as the kernel takes it; scales are read at the case's places.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Block {
    rows: usize,
    columns: usize,
}

/// Where a stored scale comes from.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Stored {
    AsGiven,
    Reciprocal,
    Transposed,
}

pub(super) struct QuantizeFamily {
    axes: Vec<Axis>,
    divides: Vec<Divide>,
    roundings: Vec<Rounding>,
    overflows: Vec<Overflow>,
    formats: Vec<Format>,
    maxima: Vec<f32>,
    scales: Vec<Scale>,
    floors: Vec<Floor>,
    amaxes: Vec<Amax>,
    blocks: Vec<Block>,
    inputs: Vec<bool>,
    stored: Vec<Stored>,
    flushes: Vec<bool>,
    given: Given,
    x: Vec<f32>,
    shape: (usize, usize),
    /// Elements of q that the file expects, before those of the scale.
    q_elements: usize,
}

/// What the case file states.
struct Given {
    format: Format,
    block: Block,
    scale: Scale,
    floor: f32,
}

impl QuantizeFamily {
    pub(super) fn tile(op: &QuantizeTile, file: &CaseFile) -> QuantizeFamily {
        let format = match op.format {
            TileFormat::E4m3 => Format::E4M3,
            TileFormat::E5m2 => Format::E5M2,
            TileFormat::E5m6 => Format::E5M6,
        };
        let block = Block { rows: 1, columns: op.tile };
        Self::new(format, block, op.scale, op.amax_floor, file)
    }

    pub(super) fn block(op: &QuantizeBlock, file: &CaseFile) -> QuantizeFamily {
        let format = match op.format {
            BlockFormat::E4m3 => Format::E4M3,
            BlockFormat::E5m2 => Format::E5M2,
        };
        let [rows, columns] = op.block.map(|e| e.unwrap_or(usize::MAX));
        Self::new(format, Block { rows, columns }, op.scale, op.amax_floor, file)
    }

    fn new(
        format: Format,
        block: Block,
        scale: ScaleType,
        floor: f32,
        file: &CaseFile,
    ) -> QuantizeFamily {
        let x = &file.case.inputs["x"];
        let shape = x.rows_columns();
        let given = Given {
            format,
            block,
            scale: if scale == ScaleType::Pow2 { Scale::Pow2Up } else { Scale::F32 },
            floor,
        };
        let word = |s: &str| s.to_owned();
        let (divide, divides) = axis(
            "division",
            &Divide::Ieee,
            vec![
                (word("multiplication by the reciprocal of the scale"), Divide::Reciprocal),
                (word("multiplication by max_of_format / amax"), Divide::Inverse),
            ],
        );
        let (rounding, roundings) = axis(
            "rounding",
            &Rounding::NearestEven,
            vec![
                (word("the cast truncates"), Rounding::TowardZero),
                (word("the cast rounds down"), Rounding::Down),
                (word("the cast rounds up"), Rounding::Up),
            ],
        );
        let (overflow, overflows) = axis(
            "saturation",
            &Overflow::Saturate,
            vec![(word("the cast does not saturate"), Overflow::Ieee)],
        );
        let (format_axis, formats) = axis(
            "format",
            &format,
            [Format::E4M3, Format::E5M2].map(|f| (format!("cast to {f}"), f)).into(),
        );
        let max = format.layout().to_f32(format.layout().max_code());
        let (maximum, maxima) = axis(
            "largest value",
            &max,
            [240.0, 256.0, 448.0, 57344.0, 65504.0]
                .map(|m: f32| (format!("scaled to a largest value of {m}"), m))
                .into(),
        );
        let (scale_axis, scales) = axis(
            "scale",
            &given.scale,
            vec![
                (word("FP32 scales"), Scale::F32),
                (word("power-of-two scales, rounded up"), Scale::Pow2Up),
                (word("power-of-two scales, rounded down"), Scale::Pow2Down),
                (word("power-of-two scales, to nearest"), Scale::Pow2Nearest),
                (word("scales rounded to BF16"), Scale::Bf16),
            ],
        );
        let mut floors: Vec<(String, Floor)> = [0.0f32, 1e-12, 1e-10, 1e-8, 1e-6, 1e-4, 1e-3]
            .map(|f| {
                (
                    if f == 0.0 { word("no floor of amax") } else { format!("amax floor {f:e}") },
                    Floor::At(f),
                )
            })
            .into();
        floors.push((word("scale 1 where amax is 0"), Floor::OneForZero));
        let (floor_axis, floors) = axis("amax floor", &Floor::At(floor), floors);
        let (amax, amaxes) = axis(
            "amax",
            &Amax::Magnitude,
            vec![(word("amax without the magnitude (the largest signed value)"), Amax::Signed)],
        );
        let all = usize::MAX;
        let (block_axis, blocks) = axis(
            "block",
            &block,
            [
                (1, 32),
                (1, 64),
                (1, 128),
                (1, 256),
                (1, all),
                (128, 1),
                (64, 64),
                (128, 128),
                (all, all),
            ]
            .map(|(rows, columns)| {
                let show = |n: usize| if n == all { "all".to_owned() } else { n.to_string() };
                let words = format!("amax over {} x {}", show(rows), show(columns));
                (words, Block { rows, columns })
            })
            .into(),
        );
        let inputs = if x.dtype() == DType::BF16 {
            vec![]
        } else {
            vec![(word("x rounded to BF16 first"), true)]
        };
        let (input_axis, inputs) = axis("input", &false, inputs);
        let (stored_axis, stored) = axis(
            "stored scale",
            &Stored::AsGiven,
            vec![
                (word("the reciprocal of the scale stored"), Stored::Reciprocal),
                (word("scales stored transposed"), Stored::Transposed),
            ],
        );
        let (flush, flushes) =
            axis("subnormals", &false, vec![(word("subnormal results flushed to zero"), true)]);
        QuantizeFamily {
            axes: vec![
                divide,
                rounding,
                overflow,
                format_axis,
                maximum,
                scale_axis,
                floor_axis,
                amax,
                block_axis,
                input_axis,
                stored_axis,
                flush,
            ],
            divides,
            roundings,
            overflows,
            formats,
            maxima,
            scales,
            floors,
            amaxes,
            blocks,
            inputs,
            stored,
            flushes,
            x: values(x),
            shape,
            q_elements: file.expected.get("q").map_or(0, Tensor::len),
            given,
        }
    }
}

fn values(x: &Tensor) -> Vec<f32> {
    let value = |i| compare::value(x.dtype(), x.bits(i)).expect("a float") as f32;
    (0..x.len()).map(value).collect()
}

impl Family for QuantizeFamily {
    fn axes(&self) -> &[Axis] {
        &self.axes
    }

    fn cost_per_element(&self) -> u64 {
        16
    }

    fn evaluate(&self, choice: &[Option<usize>], elements: &[usize]) -> Option<Vec<u64>> {
        let v = Variant {
            divide: pick(&self.divides, choice[0], Divide::Ieee),
            rounding: pick(&self.roundings, choice[1], Rounding::NearestEven),
            overflow: pick(&self.overflows, choice[2], Overflow::Saturate),
            format: pick(&self.formats, choice[3], self.given.format),
            scale: pick(&self.scales, choice[5], self.given.scale),
            floor: pick(&self.floors, choice[6], Floor::At(self.given.floor)),
            amax: pick(&self.amaxes, choice[7], Amax::Magnitude),
            block: pick(&self.blocks, choice[8], self.given.block),
            bf16_input: pick(&self.inputs, choice[9], false),
            stored: pick(&self.stored, choice[10], Stored::AsGiven),
            flush: pick(&self.flushes, choice[11], false),
            max: 0.0,
        };
        // Another format without another largest value goes to its own.
        let own = v.format.layout().to_f32(v.format.layout().max_code());
        let v = Variant { max: pick(&self.maxima, choice[4], own), ..v };
        let x: Vec<f32> = if v.bf16_input {
            self.x.iter().map(|&x| to_bf16(x).to_f32()).collect()
        } else {
            self.x.clone()
        };
        let scales = Scales::new(&v, &x, self.shape);
        let element = |&e: &usize| match e.checked_sub(self.q_elements) {
            None => self.code(&v, &x, &scales, e),
            Some(e) => self.stored_scale(&v, &scales, e),
        };
        Some(elements.iter().map(element).collect())
    }
}

/// One hypothesis, resolved.
struct Variant {
    divide: Divide,
    rounding: Rounding,
    overflow: Overflow,
    format: Format,
    max: f32,
    scale: Scale,
    floor: Floor,
    amax: Amax,
    block: Block,
    bf16_input: bool,
    stored: Stored,
    flush: bool,
}

/// Scales and amax of every block of a variant.
struct Scales {
    columns: usize,
    block: Block,
    of: Vec<(f32, f32)>,
}

impl Scales {
    fn new(v: &Variant, x: &[f32], (m, k): (usize, usize)) -> Scales {
        let (rows, columns) = (m.div_ceil(v.block.rows), k.div_ceil(v.block.columns));
        let mut amax = vec![0.0f32; rows * columns];
        for (i, &x) in x.iter().enumerate() {
            let at = i / k / v.block.rows * columns + i % k / v.block.columns;
            // `max` drops a NaN, as the contract does.
            amax[at] = amax[at].max(if v.amax == Amax::Magnitude { x.abs() } else { x });
        }
        let scale = |amax: f32| {
            let floored = match v.floor {
                Floor::At(floor) => amax.max(floor),
                Floor::OneForZero if amax == 0.0 => v.max,
                Floor::OneForZero => amax,
            };
            let scale = floored / v.max;
            let exponent = f32::from_bits(scale.to_bits() & 0x7F80_0000);
            let scale = match v.scale {
                Scale::F32 => scale,
                Scale::Pow2Up if scale == exponent => scale,
                Scale::Pow2Up => exponent * 2.0,
                Scale::Pow2Down => exponent,
                Scale::Pow2Nearest => {
                    if scale < exponent * 1.5 {
                        exponent
                    } else {
                        exponent * 2.0
                    }
                }
                Scale::Bf16 => to_bf16(scale).to_f32(),
            };
            (scale, floored)
        };
        Scales { columns, block: v.block, of: amax.into_iter().map(scale).collect() }
    }

    fn at(&self, row: usize, column: usize) -> (f32, f32) {
        self.of[row / self.block.rows * self.columns + column / self.block.columns]
    }
}

impl QuantizeFamily {
    fn code(&self, v: &Variant, x: &[f32], scales: &Scales, e: usize) -> u64 {
        if self.given.format != Format::E5M6 {
            return u64::from(self.one_code(v, x, scales, e));
        }
        // Word w of a row: codes of eight elements in three words.
        let words = self.shape.1.div_ceil(8) * 3;
        let (row, word) = (e / words, e % words);
        let eight = std::array::from_fn(|i| {
            let column = word / 3 * 8 + i;
            let inside = column < self.shape.1;
            let code =
                if inside { self.one_code(v, x, scales, row * self.shape.1 + column) } else { 0 };
            fathom_numerics::formats::E5M6::from_bits(code as u16)
        });
        u64::from(fathom_numerics::formats::packed::pack_e5m6(eight)[word % 3])
    }

    fn one_code(&self, v: &Variant, x: &[f32], scales: &Scales, e: usize) -> u32 {
        let (scale, amax) = scales.at(e / self.shape.1, e % self.shape.1);
        let scaled = match v.divide {
            Divide::Ieee => x[e] / scale,
            Divide::Reciprocal => x[e] * (1.0 / scale),
            Divide::Inverse => x[e] * (v.max / amax),
        };
        let layout = v.format.layout();
        if scaled.is_nan() {
            return layout.nan();
        }
        let code = layout.from_f32(scaled, v.rounding, v.overflow);
        let exponent_mask = !((1u32 << layout.fraction_bits) - 1);
        let sign = 1u32 << (layout.bits() - 1);
        if v.flush && code & exponent_mask & !sign == 0 { code & sign } else { code }
    }

    fn stored_scale(&self, v: &Variant, scales: &Scales, e: usize) -> u64 {
        let given = self.given.block;
        let rows = self.shape.0.div_ceil(given.rows);
        let columns = self.shape.1.div_ceil(given.columns);
        let (i, j) = match v.stored {
            Stored::Transposed => (e % rows, e / rows),
            _ => (e / columns, e % columns),
        };
        let row = i.saturating_mul(given.rows);
        let column = j.saturating_mul(given.columns);
        let (scale, _) = scales.at(row, column);
        u64::from(if v.stored == Stored::Reciprocal { 1.0 / scale } else { scale }.to_bits())
    }
}
