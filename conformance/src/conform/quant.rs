//! Cases of the casts with scales and their inverse: every format, kind of scale and block.

use fathom_numerics::formats::Format;
use fathom_numerics::quant::ScaleKind;
use fathom_numerics::quant::delayed::AmaxAlgorithm;
use fathom_reference::Tensor;
use fathom_reference::op::codes::{Block, scales, stored_columns};
use fathom_reference::ops::dequantize::Dequantize;
use fathom_reference::ops::quantize_block::QuantizeBlock;
use fathom_reference::ops::quantize_delayed::QuantizeDelayed;
use fathom_reference::ops::quantize_tile::QuantizeTile;
use fathom_reference::ops::quantize_weight::QuantizeWeight;
use fathom_reference::ops::transpose_codes::TransposeCodes;
use fathom_reference::ops::transpose_quantize::TransposeQuantize;
use fathom_trace::DType;
use proptest::prelude::any;
use proptest::sample::select;
use proptest::strategy::{BoxedStrategy, Strategy};

use super::draw::{Draw, as_dtype, columns, float, rows, size};
use super::values::Values;
use super::{Drawn, Suite};

/// The suites of this file.
pub const SUITES: &[Suite] = &[
    Suite { op: "dequantize", strategy: dequantize },
    Suite { op: "quantize_block", strategy: quantize_block },
    Suite { op: "quantize_delayed", strategy: quantize_delayed },
    Suite { op: "quantize_tile", strategy: quantize_tile },
    Suite { op: "quantize_weight", strategy: quantize_weight },
    Suite { op: "transpose_codes", strategy: transpose_codes },
    Suite { op: "transpose_quantize", strategy: transpose_quantize },
];

fn scale() -> impl Strategy<Value = ScaleKind> {
    select(vec![ScaleKind::F32, ScaleKind::Pow2, ScaleKind::Mx])
}

/// The report's floor, none to speak of, and one above everything ordinary.
fn floor() -> impl Strategy<Value = f32> {
    select(vec![1e-4f32, 1e-43, 1e3])
}

fn fp8() -> impl Strategy<Value = Format> {
    select(vec![Format::E4M3, Format::E5M2])
}

/// The report's blocks, those of baselines, and some that divide nothing.
pub fn block() -> impl Strategy<Value = Block> {
    let blocks = vec![
        [Some(1), Some(128)],
        [Some(128), Some(128)],
        [Some(128), Some(1)],
        [None, None],
        [Some(1), None],
        [Some(3), Some(40)],
        [Some(1), Some(32)],
    ];
    select(blocks)
}

/// Codes of any bits, NaNs among them, with their scales; in `U32` packed E5M6.
pub fn codes(draw: Draw, dtype: DType, rows: usize, columns: usize, block: Block) -> [Tensor; 2] {
    let stored = stored_columns(dtype, columns);
    let words = draw.words(10, rows * stored);
    let bytes: Vec<u8> = words.iter().flat_map(|w| w.to_le_bytes()).collect();
    let codes = Tensor::from_bytes(dtype, &[rows, stored], &bytes[..rows * stored * dtype.size()]);
    [codes, draw.positive(11, DType::F32, &scales(block, rows, columns))]
}

/// The element types that hold codes.
pub fn code_type() -> impl Strategy<Value = DType> {
    select(vec![DType::F8E4M3, DType::F8E5M2, DType::U32])
}

/// What is cast to `format`: of the draw's kind; with an exponent, powers of two times the largest
/// number of the format, so that scales are powers of two by themselves.
fn floats(draw: Draw, dtype: DType, shape: &[usize], format: Format, exact: Option<i32>) -> Tensor {
    let Some(exponent) = exact else { return draw.floats(0, dtype, shape) };
    let largest = f64::from(format.layout().to_f32(format.layout().max_code()));
    let one = |w: &u32| {
        let x = largest * 2f64.powi(exponent - (w % 3) as i32);
        if w >> 31 == 1 { -x as f32 } else { x as f32 }
    };
    as_dtype(draw.words(0, shape.iter().product()).iter().map(one).collect(), dtype, shape)
}

/// Mostly none; -127 gives the smallest scale that MX has.
fn exact() -> impl Strategy<Value = Option<i32>> {
    select(vec![None, None, None, Some(-127), Some(-126), Some(2)])
}

/// A cast in tiles of rows: every format, kind of scale and floor.
pub fn tile_cast() -> impl Strategy<Value = QuantizeTile> {
    let tile = select(vec![128usize, 128, 128, 32, 64, 40, 256]);
    let format = select(vec![Format::E4M3, Format::E5M2, Format::E5M6]);
    (format, tile, scale(), floor()).prop_map(|(format, tile, scale, amax_floor)| QuantizeTile {
        format,
        tile,
        scale,
        amax_floor,
    })
}

fn quantize_tile(index: usize) -> BoxedStrategy<Drawn> {
    (rows(index, 0, 64), columns(index, 0, 400), (float(), tile_cast(), exact()), any::<u64>())
        .prop_map(move |(m, k, (input, cast, exact), seed)| {
            let draw = Draw::new(index, seed);
            // Only MX says what the scale of an infinite tile is by a rule of its own.
            let infinite = index % 12 == 1;
            let scale = if infinite { ScaleKind::Mx } else { cast.scale };
            let exact = exact.filter(|_| !infinite);
            let op = QuantizeTile { scale, ..cast };
            let format = op.format;
            draw.case(op, [("x", Some(floats(draw, input, &[m, k], format, exact)))])
        })
        .boxed()
}

fn quantize_block(index: usize) -> BoxedStrategy<Drawn> {
    (
        rows(index, 0, 200),
        columns(index, 0, 300),
        (float(), fp8(), block(), scale(), floor()),
        any::<u64>(),
    )
        .prop_map(move |(m, k, (input, format, block, scale, amax_floor), seed)| {
            let draw = Draw::new(index, seed);
            let op = QuantizeBlock { format, block, scale, amax_floor };
            draw.case(op, [("x", Some(draw.floats(0, input, &[m, k])))])
        })
        .boxed()
}

fn quantize_weight(index: usize) -> BoxedStrategy<Drawn> {
    let experts = select(vec![None, Some(1usize), Some(3)]);
    ((experts, size(0, 200), size(0, 200)), block(), scale(), any::<(bool, u64)>())
        .prop_map(move |((experts, n, k), block, scale, (transpose_anew, seed))| {
            let draw = Draw::new(index, seed);
            let shape: Vec<usize> = experts.into_iter().chain([n, k]).collect();
            let op = QuantizeWeight { block, scale, transpose_anew };
            draw.case(op, [("w", Some(draw.floats(0, DType::F32, &shape)))])
        })
        .boxed()
}

/// The case so large that a CTA of `transpose_quantize` has several times 32 columns.
const SPAN: usize = 18;
const SPAN_ROWS: usize = 1024;
const SPAN_COLUMNS: usize = 1050;

/// Plain floats or codes; one to five segments, empty ones among them, and rows behind them.
fn transpose_quantize(index: usize) -> BoxedStrategy<Drawn> {
    let from = select(vec![[Some(1), Some(128)], [Some(1), Some(32)], [Some(128), Some(128)]]);
    let kinds = (select(vec![None, Some(DType::F8E4M3), Some(DType::F8E5M2), Some(DType::U32)]),);
    (
        (rows(index, 0, 300), size(0, 20), columns(index, 0, 150), 1usize..=5),
        (block(), from, kinds, float()),
        (fp8(), scale()),
        any::<u64>(),
    )
        .prop_map(move |((taken, behind, columns, parts), rest, (format, scale), seed)| {
            let (block, from, (coded,), plain) = rest;
            let draw = Draw::new(index, seed);
            let (taken, columns, block) = match index {
                SPAN => (taken + SPAN_ROWS, columns + SPAN_COLUMNS, [Some(1), Some(32)]),
                _ => (taken, columns, block),
            };
            let segments = draw.segments(20, parts, taken);
            let rows = taken + behind;
            let op = TransposeQuantize { columns, from, block, format, scale, segments };
            match coded {
                None => draw.case(op, [("x", Some(draw.floats(0, plain, &[rows, columns])))]),
                Some(dtype) => {
                    let [x, x_scale] = codes(draw, dtype, rows, columns, from);
                    draw.case(op, [("x", Some(x)), ("x_scale", Some(x_scale))])
                }
            }
        })
        .boxed()
}

/// Codes of any bits; one to five segments, empty ones among them, and rows behind them.
fn transpose_codes(index: usize) -> BoxedStrategy<Drawn> {
    let codes_of = select(vec![DType::F8E4M3, DType::F8E5M2]);
    (size(0, 300), size(0, 20), size(0, 150), 1usize..=5, codes_of, any::<u64>())
        .prop_map(move |(taken, behind, columns, parts, dtype, seed)| {
            let draw = Draw::new(index, seed);
            let op = TransposeCodes { segments: draw.segments(20, parts, taken) };
            let [q, _] = codes(draw, dtype, taken + behind, columns, [None, None]);
            let scale = draw.positive(11, DType::F32, &[1, 1]);
            draw.case(op, [("q", Some(q)), ("scale", Some(scale))])
        })
        .boxed()
}

fn dequantize(index: usize) -> BoxedStrategy<Drawn> {
    (rows(index, 0, 60), columns(index, 0, 300), code_type(), block(), float(), any::<u64>())
        .prop_map(move |(rows, columns, dtype, block, out, seed)| {
            let draw = Draw::new(index, seed);
            let [q, scale] = codes(draw, dtype, rows, columns, block);
            let op = Dequantize { columns, block, out };
            draw.case(op, [("q", Some(q)), ("scale", Some(scale))])
        })
        .boxed()
}

/// Scales are numbers: what a NaN scale's reciprocal is, no contract says.
fn quantize_delayed(index: usize) -> BoxedStrategy<Drawn> {
    let amax = select(vec![AmaxAlgorithm::Max, AmaxAlgorithm::MostRecent]);
    let rest = (float(), fp8(), amax, select(vec![0u8, 1, 7]));
    (size(0, 60), size(0, 300), size(1, 40), rest, any::<u64>())
        .prop_map(move |(m, k, steps, (input, format, amax, margin), seed)| {
            let draw = Draw::new(index, seed);
            let numbers = Draw { values: Values::Normal, seed };
            let op = QuantizeDelayed { format, margin, amax };
            draw.case(
                op,
                [
                    ("x", Some(draw.floats(0, input, &[m, k]))),
                    ("history", Some(numbers.positive(1, DType::F32, &[steps]))),
                    ("scale", Some(numbers.positive(2, DType::F32, &[1]))),
                ],
            )
        })
        .boxed()
}
