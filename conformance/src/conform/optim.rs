//! Cases of the optimizer: updates, norms over tensors of many blocks, averages.

use fathom_reference::ops::adamw::AdamW;
use fathom_reference::ops::clip_factor::ClipFactor;
use fathom_reference::ops::ema::Ema;
use fathom_reference::ops::sum_of_squares::SumOfSquares;
use fathom_trace::DType;
use proptest::prelude::any;
use proptest::sample::select;
use proptest::strategy::{BoxedStrategy, Strategy};

use super::draw::{Draw, float, size};
use super::{Drawn, Suite};

/// The suites of this file.
pub const SUITES: &[Suite] = &[
    Suite { op: "adamw", strategy: adamw },
    Suite { op: "clip_factor", strategy: clip_factor },
    Suite { op: "ema", strategy: ema },
    Suite { op: "sum_of_squares", strategy: sum_of_squares },
];

fn adamw(index: usize) -> BoxedStrategy<Drawn> {
    let step = (select(vec![1.0, 0.9999]), select(vec![1e-3, 0.5]), select(vec![0.01, 0.9]));
    (size(0, 40), size(0, 200), float(), float(), step, any::<u64>())
        .prop_map(move |(rows, columns, m, v, (decay, step_size, correction), seed)| {
            let (draw, shape) = (Draw::new(index, seed), [rows, columns]);
            let (beta1, beta2, eps) = (0.9, 0.95, 1e-8);
            draw.case(
                AdamW { beta1, beta2, eps, decay, step_size, correction },
                [
                    ("w", Some(draw.floats(0, DType::F32, &shape))),
                    ("m", Some(draw.floats(1, m, &shape))),
                    ("v", Some(draw.positive(2, v, &shape))),
                    ("grad", Some(draw.floats(3, DType::F32, &shape))),
                    ("factor", Some(draw.positive(4, DType::F32, &[1]))),
                ],
            )
        })
        .boxed()
}

fn ema(index: usize) -> BoxedStrategy<Drawn> {
    (size(0, 40), size(0, 200), select(vec![0.001, 0.5, 1.0]), any::<u64>())
        .prop_map(move |(rows, columns, rate, seed)| {
            let (draw, shape) = (Draw::new(index, seed), [rows, columns]);
            let e = draw.floats(0, DType::F32, &shape);
            let w = draw.floats(1, DType::F32, &shape);
            draw.case(Ema { rate }, [("e", Some(e)), ("w", Some(w))])
        })
        .boxed()
}

/// Lengths around the block of 65,536 elements, or short ones. All slots are compared.
fn sum_of_squares(index: usize) -> BoxedStrategy<Drawn> {
    let long = select(vec![65535usize, 65536, 65537, 200_000]);
    (size(0, 3000), long, size(1, 300), any::<(bool, u64)>())
        .prop_map(move |(short, long, slots, (few, seed))| {
            let draw = Draw::new(index, seed);
            let n = if few { short } else { long };
            let slot = draw.words(2, 1)[0] as usize % slots;
            draw.case(
                SumOfSquares { slot },
                [
                    ("x", Some(draw.floats(0, DType::F32, &[n]))),
                    ("partials", Some(draw.positive(1, DType::F32, &[slots]))),
                ],
            )
        })
        .boxed()
}

fn clip_factor(index: usize) -> BoxedStrategy<Drawn> {
    (size(0, 3000), select(vec![None, Some(1.0), Some(1e-3)]), any::<u64>())
        .prop_map(move |(tensors, max_norm, seed)| {
            let draw = Draw::new(index, seed);
            let partials = draw.positive(0, DType::F32, &[tensors]);
            draw.case(ClipFactor { max_norm }, [("partials", Some(partials))])
        })
        .boxed()
}
