//! Cases of RMSNorm and SwiGLU with their gradients.

use fathom_reference::ops::rms_norm::{RmsNorm, RmsNormBackward, RmsNormWgrad};
use fathom_reference::ops::swiglu::{Swiglu, SwigluBackward};
use fathom_trace::DType;
use proptest::prelude::any;
use proptest::sample::select;
use proptest::strategy::{BoxedStrategy, Strategy};

use super::draw::{Draw, columns, float, rows, size};
use super::values::Values;
use super::{Drawn, Suite};

/// The suites of this file.
pub const SUITES: &[Suite] = &[
    Suite { op: "rms_norm", strategy: rms_norm },
    Suite { op: "rms_norm_backward", strategy: rms_norm_backward },
    Suite { op: "rms_norm_wgrad", strategy: rms_norm_wgrad },
    Suite { op: "swiglu", strategy: swiglu },
    Suite { op: "swiglu_backward", strategy: swiglu_backward },
];

/// Rows, the columns that take part, and those before and behind them.
fn shape(index: usize) -> impl Strategy<Value = (usize, usize, usize, usize)> {
    (rows(index, 0, 70), columns(index, 1, 300), size(0, 20), size(0, 20))
}

fn rms_norm(index: usize) -> BoxedStrategy<Drawn> {
    (shape(index), float(), float(), select(vec![1e-6, 1e-20, 0.0]), any::<u64>())
        .prop_map(move |((t, width, offset, behind), x, out, eps, seed)| {
            let draw = Draw::new(index, seed);
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

fn rms_norm_backward(index: usize) -> BoxedStrategy<Drawn> {
    (shape(index), [float(), float(), float(), float()], any::<(bool, u64)>())
        .prop_map(move |((t, width, offset, behind), [x, dy, r, out], (residual, seed))| {
            let draw = Draw::new(index, seed);
            draw.case(
                RmsNormBackward { offset, width, out },
                [
                    ("dy", Some(draw.floats(0, dy, &[t, width]))),
                    ("x", Some(draw.floats(1, x, &[t, offset + width + behind]))),
                    ("weight", Some(draw.floats(2, DType::F32, &[width]))),
                    ("rstd", Some(draw.positive(3, DType::F32, &[t]))),
                    ("residual", residual.then(|| draw.floats(4, r, &[t, width]))),
                ],
            )
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
