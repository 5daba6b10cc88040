//! Cases of the head with its cross-entropy, and its gradient: rows without a target, several
//! chunks of rows, segments.

use fathom_reference::Tensor;
use fathom_reference::ops::cross_entropy::{CrossEntropy, CrossEntropyBackward};
use fathom_trace::DType;
use proptest::prelude::any;
use proptest::strategy::{BoxedStrategy, Strategy};

use super::draw::{Draw, columns, float, rows};
use super::{Drawn, Suite};

/// The suites of this file.
pub const SUITES: &[Suite] = &[
    Suite { op: "cross_entropy", strategy: cross_entropy },
    Suite { op: "cross_entropy_backward", strategy: cross_entropy_backward },
];

/// Tokens of the vocabulary; now and then none.
fn targets(draw: Draw, t: usize, vocab: usize) -> Tensor {
    let one = |w: &u32| if w.is_multiple_of(5) { -1 } else { ((w >> 8) as usize % vocab) as i32 };
    Tensor::from_vec(&[t], draw.words(30, t).iter().map(one).collect())
}

fn cross_entropy(index: usize) -> BoxedStrategy<Drawn> {
    (rows(index, 0, 150), columns(index, 1, 80), columns(index, 1, 200), float(), any::<u64>())
        .prop_map(move |(t, hidden, vocab, dtype, seed)| {
            let draw = Draw::new(index, seed);
            draw.case(
                CrossEntropy {},
                [
                    ("x", Some(draw.floats(0, dtype, &[t, hidden]))),
                    ("weight", Some(draw.floats(1, dtype, &[vocab, hidden]))),
                    ("targets", Some(targets(draw, t, vocab))),
                ],
            )
        })
        .boxed()
}

fn cross_entropy_backward(index: usize) -> BoxedStrategy<Drawn> {
    (
        rows(index, 0, 150),
        columns(index, 1, 80),
        columns(index, 1, 130),
        [float(), float()],
        (1usize..=3, any::<u64>()),
    )
        .prop_map(move |(t, hidden, vocab, [dtype, out], (parts, seed))| {
            let draw = Draw::new(index, seed);
            let segments = draw.segments(20, parts, t);
            draw.case(
                CrossEntropyBackward { scale: 0.125, out, segments },
                [
                    ("x", Some(draw.floats(0, dtype, &[t, hidden]))),
                    ("weight", Some(draw.floats(1, dtype, &[vocab, hidden]))),
                    ("targets", Some(targets(draw, t, vocab))),
                    ("lse", Some(draw.floats(2, DType::F32, &[t]))),
                    ("acc", Some(draw.floats(3, DType::F32, &[vocab, hidden]))),
                ],
            )
        })
        .boxed()
}
