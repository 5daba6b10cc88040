//! Cases of RMSNorm and SwiGLU with their gradients.

use fathom_reference::Tensor;
use fathom_reference::op::codes::Block;
use fathom_reference::ops::add::Add;
use fathom_reference::ops::add_rms_norm::{AddRmsNorm, AddRmsNormQuantize};
use fathom_reference::ops::dequantize::Dequantize;
use fathom_reference::ops::rms_norm::{RmsNorm, RmsNormBackward, RmsNormWgrad};
use fathom_reference::ops::rms_norm_backward_quantize::RmsNormBackwardQuantize;
use fathom_reference::ops::rms_norm_quantize::RmsNormQuantize;
use fathom_reference::ops::swiglu::{Swiglu, SwigluBackward};
use fathom_reference::ops::swiglu_quantize::{SwigluBackwardQuantize, SwigluQuantize};
use fathom_trace::DType;
use proptest::prelude::{any, prop_oneof};
use proptest::sample::select;
use proptest::strategy::{BoxedStrategy, Strategy};

use super::draw::{Draw, columns, float, rows, size};
use super::values::Values;
use super::{Drawn, Suite, quant};

/// The suites of this file.
pub const SUITES: &[Suite] = &[
    Suite { op: "add_rms_norm", strategy: add_rms_norm },
    Suite { op: "add_rms_norm_quantize", strategy: add_rms_norm_quantize },
    Suite { op: "rms_norm", strategy: rms_norm },
    Suite { op: "rms_norm_backward", strategy: rms_norm_backward },
    Suite { op: "rms_norm_backward_quantize", strategy: rms_norm_backward_quantize },
    Suite { op: "rms_norm_quantize", strategy: rms_norm_quantize },
    Suite { op: "rms_norm_wgrad", strategy: rms_norm_wgrad },
    Suite { op: "swiglu", strategy: swiglu },
    Suite { op: "swiglu_backward", strategy: swiglu_backward },
    Suite { op: "swiglu_backward_quantize", strategy: swiglu_backward_quantize },
    Suite { op: "swiglu_quantize", strategy: swiglu_quantize },
];

/// Rows, the columns that take part, and those before and behind them.
fn shape(index: usize) -> impl Strategy<Value = (usize, usize, usize, usize)> {
    (rows(index, 0, 70), columns(index, 1, 300), size(0, 20), size(0, 20))
}

/// The case of which a CTA takes an odd number of rows at a time.
const SEVERAL: usize = 0;
const SEVERAL_ROWS: usize = 270;
/// The case of which a CTA comes back for more.
const RETURNING: usize = 6;
const RETURNING_ROWS: usize = 2200;
/// The case whose rows are too long for shared memory.
const TOO_LONG: usize = 12;
const TOO_LONG_WIDTH: usize = 39_000;

/// Rows and columns that take part; now and then a row is long, with the edges of tiles and of an
/// odd number of rows.
fn long(index: usize, t: usize, width: usize) -> (usize, usize) {
    match index % 24 {
        SEVERAL => (SEVERAL_ROWS + t, (129 + width) | 1),
        RETURNING => (RETURNING_ROWS + t, width.min(9)),
        TOO_LONG => (t.clamp(1, 2), TOO_LONG_WIDTH + width),
        index if index % 5 == 3 => (t.min(5), 1021 + 7 * width),
        _ => (t, width),
    }
}

/// The columns before and behind those that take part: in case [`SEVERAL`] such that rows begin at
/// multiples of 16 bytes, where their parts do not end at one.
fn around(index: usize, width: usize, offset: usize, behind: usize) -> [usize; 2] {
    match index % 24 {
        SEVERAL => [8, width.next_multiple_of(8) - width],
        _ => [offset, behind],
    }
}

fn rms_norm(index: usize) -> BoxedStrategy<Drawn> {
    (shape(index), float(), float(), select(vec![1e-6, 1e-20, 0.0]), any::<u64>())
        .prop_map(move |((t, width, offset, behind), x, out, eps, seed)| {
            let draw = Draw::new(index, seed);
            let (t, width) = long(index, t, width);
            let [offset, behind] = around(index, width, offset, behind);
            draw.case(
                RmsNorm { eps, offset, width, out },
                [
                    ("x", Some(draw.floats(0, x, &[t, offset + width + behind]))),
                    ("weight", Some(draw.floats(1, DType::F32, &[width]))),
                ],
            )
        })
        .boxed()
}

fn rms_norm_quantize(index: usize) -> BoxedStrategy<Drawn> {
    let norm = (float(), float(), select(vec![1e-6, 1e-20, 0.0]));
    (shape(index), norm, quant::tile_cast(), any::<(bool, u64)>())
        .prop_map(move |((t, width, offset, behind), (x, out, eps), cast, (keep, seed))| {
            let draw = Draw::new(index, seed);
            let (t, width) = long(index, t, width);
            let [offset, behind] = around(index, width, offset, behind);
            let norm = RmsNorm { eps, offset, width, out };
            draw.case(
                RmsNormQuantize { norm, cast, keep },
                [
                    ("x", Some(draw.floats(0, x, &[t, offset + width + behind]))),
                    ("weight", Some(draw.floats(1, DType::F32, &[width]))),
                ],
            )
        })
        .boxed()
}

/// A sum of two or three terms, of these element types, and its norm of all columns.
type Terms = ([DType; 5], f64, bool);

fn terms() -> impl Strategy<Value = Terms> {
    ([float(), float(), float(), float(), float()], select(vec![1e-6, 1e-20, 0.0]), any::<bool>())
}

/// The sum, the norm, and their inputs.
#[allow(clippy::type_complexity)]
fn summed(
    draw: Draw,
    [t, width]: [usize; 2],
    ([a, b, c, h, out], eps, third): Terms,
) -> (Add, RmsNorm, [(&'static str, Option<Tensor>); 4]) {
    let inputs = [
        ("a", Some(draw.floats(0, a, &[t, width]))),
        ("b", Some(draw.floats(1, b, &[t, width]))),
        ("c", third.then(|| draw.floats(2, c, &[t, width]))),
        ("weight", Some(draw.floats(3, DType::F32, &[width]))),
    ];
    (Add { out: h }, RmsNorm { eps, offset: 0, width, out }, inputs)
}

fn add_rms_norm(index: usize) -> BoxedStrategy<Drawn> {
    (shape(index), terms(), any::<u64>())
        .prop_map(move |((t, width, ..), terms, seed)| {
            let draw = Draw::new(index, seed);
            let (t, width) = long(index, t, width);
            let (add, norm, inputs) = summed(draw, [t, width], terms);
            draw.case(AddRmsNorm { add, norm }, inputs)
        })
        .boxed()
}

fn add_rms_norm_quantize(index: usize) -> BoxedStrategy<Drawn> {
    (shape(index), terms(), quant::tile_cast(), any::<(bool, u64)>())
        .prop_map(move |((t, width, ..), terms, cast, (keep, seed))| {
            let draw = Draw::new(index, seed);
            let (t, width) = long(index, t, width);
            let (add, norm, inputs) = summed(draw, [t, width], terms);
            draw.case(AddRmsNormQuantize { add, norm, cast, keep }, inputs)
        })
        .boxed()
}

/// What is drawn of a norm's gradient: element types of x, dy, the residual and dx, and whether
/// there is a residual.
type Backward = ([DType; 4], bool);

fn backward() -> impl Strategy<Value = Backward> {
    ([float(), float(), float(), float()], any::<bool>())
}

/// A norm's gradient with its inputs.
#[allow(clippy::type_complexity)]
fn gradient(
    draw: Draw,
    [t, width, offset, behind]: [usize; 4],
    ([x, dy, r, out], residual): Backward,
) -> (RmsNormBackward, [(&'static str, Option<Tensor>); 5]) {
    let inputs = [
        ("dy", Some(draw.floats(0, dy, &[t, width]))),
        ("x", Some(draw.floats(1, x, &[t, offset + width + behind]))),
        ("weight", Some(draw.floats(2, DType::F32, &[width]))),
        ("rstd", Some(draw.positive(3, DType::F32, &[t]))),
        ("residual", residual.then(|| draw.floats(4, r, &[t, width]))),
    ];
    (RmsNormBackward { offset, width, out }, inputs)
}

fn rms_norm_backward(index: usize) -> BoxedStrategy<Drawn> {
    (shape(index), backward(), any::<u64>())
        .prop_map(move |((t, width, offset, behind), drawn, seed)| {
            let draw = Draw::new(index, seed);
            let (t, width) = long(index, t, width);
            let [offset, behind] = around(index, width, offset, behind);
            let (op, inputs) = gradient(draw, [t, width, offset, behind], drawn);
            draw.case(op, inputs)
        })
        .boxed()
}

fn rms_norm_backward_quantize(index: usize) -> BoxedStrategy<Drawn> {
    (shape(index), backward(), quant::tile_cast(), any::<u64>())
        .prop_map(move |((t, width, offset, behind), drawn, cast, seed)| {
            let draw = Draw::new(index, seed);
            let (t, width) = long(index, t, width);
            let [offset, behind] = around(index, width, offset, behind);
            let (norm, inputs) = gradient(draw, [t, width, offset, behind], drawn);
            draw.case(RmsNormBackwardQuantize { norm, cast }, inputs)
        })
        .boxed()
}

/// Now and then no row, so that what is added to passes through, NaNs among it.
fn rms_norm_wgrad(index: usize) -> BoxedStrategy<Drawn> {
    (shape(index), float(), float(), any::<u64>())
        .prop_map(move |((t, width, offset, behind), x, dy, seed)| {
            let draw = Draw::new(index, seed);
            let t = if draw.values == Values::NonFinite && seed % 2 == 0 { 0 } else { t };
            draw.case(
                RmsNormWgrad { offset, width },
                [
                    ("dy", Some(draw.floats(0, dy, &[t, width]))),
                    ("x", Some(draw.floats(1, x, &[t, offset + width + behind]))),
                    ("rstd", Some(draw.positive(2, DType::F32, &[t]))),
                    ("acc", Some(draw.floats(3, DType::F32, &[width]))),
                ],
            )
        })
        .boxed()
}

fn swiglu(index: usize) -> BoxedStrategy<Drawn> {
    (rows(index, 0, 60), columns(index, 0, 200), float(), float(), any::<(bool, u64)>())
        .prop_map(move |(rows, columns, x, out, (weight, seed))| {
            let draw = Draw::new(index, seed);
            draw.case(
                Swiglu { out },
                [
                    ("x", Some(draw.floats(0, x, &[rows, 2 * columns]))),
                    ("weight", weight.then(|| draw.floats(1, DType::F32, &[rows]))),
                ],
            )
        })
        .boxed()
}

fn swiglu_backward(index: usize) -> BoxedStrategy<Drawn> {
    (rows(index, 0, 60), columns(index, 0, 200), [float(), float(), float()], any::<(bool, u64)>())
        .prop_map(move |(rows, columns, [x, dy, out], (weight, seed))| {
            let draw = Draw::new(index, seed);
            draw.case(
                SwigluBackward { out },
                [
                    ("dy", Some(draw.floats(0, dy, &[rows, columns]))),
                    ("x", Some(draw.floats(1, x, &[rows, 2 * columns]))),
                    ("weight", weight.then(|| draw.floats(2, DType::F32, &[rows]))),
                ],
            )
        })
        .boxed()
}

/// How SwiGLU's input lies: as floats of this type, or as codes in blocks.
type Input = Result<DType, (DType, Block)>;

fn input() -> impl Strategy<Value = Input> {
    prop_oneof![float().prop_map(Ok), (quant::code_type(), quant::block()).prop_map(Err)]
}

/// The input of `columns` as the fused ops take it: how it is kept, and its tensors.
fn kept_input(
    draw: Draw,
    input: Input,
    [rows, columns]: [usize; 2],
    out: DType,
) -> (Option<Dequantize>, Tensor, Option<Tensor>) {
    match input {
        Ok(dtype) => (None, draw.floats(0, dtype, &[rows, columns]), None),
        Err((dtype, block)) => {
            let [q, scale] = quant::codes(draw, dtype, rows, columns, block);
            (Some(Dequantize { columns, block, out }), q, Some(scale))
        }
    }
}

fn swiglu_quantize(index: usize) -> BoxedStrategy<Drawn> {
    let parts = (input(), float(), float(), quant::tile_cast());
    (rows(index, 0, 60), columns(index, 0, 200), parts, any::<(bool, u64)>())
        .prop_map(move |(rows, columns, (input, values, out, cast), (weight, seed))| {
            let draw = Draw::new(index, seed);
            let (kept, x, x_scale) = kept_input(draw, input, [rows, 2 * columns], values);
            draw.case(
                SwigluQuantize { kept, swiglu: Swiglu { out }, cast },
                [
                    ("x", Some(x)),
                    ("x_scale", x_scale),
                    ("weight", weight.then(|| draw.floats(1, DType::F32, &[rows]))),
                ],
            )
        })
        .boxed()
}

/// The case whose rows are too long for shared memory, with weights or without.
const WIDE: usize = 22;
const WIDE_COLUMNS: usize = 29_057;

fn swiglu_backward_quantize(index: usize) -> BoxedStrategy<Drawn> {
    let parts = (input(), [float(), float(), float()], quant::tile_cast());
    (rows(index, 0, 60), columns(index, 0, 200), parts, any::<(bool, u64)>())
        .prop_map(move |(rows, columns, (input, [values, dy, out], cast), (weight, seed))| {
            let draw = Draw::new(index, seed);
            let (rows, columns) = if index == WIDE {
                (rows.clamp(1, 3), WIDE_COLUMNS + columns)
            } else {
                (rows, columns)
            };
            let (kept, x, x_scale) = kept_input(draw, input, [rows, 2 * columns], values);
            draw.case(
                SwigluBackwardQuantize { kept, swiglu: SwigluBackward { out }, cast },
                [
                    ("dy", Some(draw.floats(2, dy, &[rows, columns]))),
                    ("x", Some(x)),
                    ("x_scale", x_scale),
                    ("weight", weight.then(|| draw.floats(1, DType::F32, &[rows]))),
                ],
            )
        })
        .boxed()
}
