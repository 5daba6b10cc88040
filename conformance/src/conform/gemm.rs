//! Cases of `gemm` and `grouped_gemm`: all layouts and results, from zero or from c, k in segments,
//! experts with all rows or none, sizes around those that kernels work in.

use fathom_reference::ops::gemm::{Gemm, Layout};
use fathom_reference::ops::grouped_gemm::GroupedGemm;
use fathom_trace::DType;
use proptest::prelude::{any, prop_oneof};
use proptest::sample::select;
use proptest::strategy::{BoxedStrategy, Just, Strategy};

use super::draw::{Draw, as_dtype, float, lengths, size};
use super::{Drawn, Suite};

/// The suites of this file.
pub const SUITES: &[Suite] =
    &[Suite { op: "gemm", strategy: gemm }, Suite { op: "grouped_gemm", strategy: grouped_gemm }];

fn layout() -> impl Strategy<Value = Layout> {
    select(vec![Layout::Nt, Layout::Nn, Layout::Tn])
}

/// Element types of the operands and of the result.
fn types() -> impl Strategy<Value = [DType; 2]> {
    let result = |from: DType| match from {
        DType::BF16 => select(vec![DType::F32, DType::BF16]),
        _ => select(vec![DType::F32]),
    };
    float().prop_flat_map(move |from| (Just(from), result(from)).prop_map(|(a, b)| [a, b]))
}

fn gemm(index: usize) -> BoxedStrategy<Drawn> {
    // Now and then deeper than the pipeline has stages for.
    let k = prop_oneof![4 => lengths(3, 140), 1 => (400usize..=900).prop_map(|k| vec![k])];
    (layout(), types(), size(0, 260), size(0, 260), k, any::<(bool, bool, u64)>())
        .prop_map(move |(layout, [from, out], m, n, mut segments, (add, split, seed))| {
            // What lies behind a range of k must not count: seen where it is not finite, in one
            // place or in many.
            let one = index % 12 == 6;
            let ranges = index % 12 == 1 || one;
            let (layout, from) = if ranges { (Layout::Tn, DType::BF16) } else { (layout, from) };
            // A sum of few zeros may be -0, which a step with zeros too many turns into +0.
            let signs = index % 12 == 4;
            let ([from, out], add) =
                if signs { ([DType::F32, DType::F32], true) } else { ([from, out], add) };
            if signs {
                segments = vec![1 + seed as usize % 3];
            }
            if one {
                // Not whole blocks of a kernel's, so that one reaches into the second range.
                segments = vec![1 + seed as usize % 63, 65];
            }
            let [m, n] = [m, n].map(|size| if one { size.max(1) } else { size });
            let k = segments.iter().sum();
            if layout != Layout::Tn || !(split || ranges) {
                segments.clear();
            }
            let draw = Draw::new(index, seed);
            let a = if layout == Layout::Tn { [k, m] } else { [m, k] };
            let b = if layout == Layout::Nt { [n, k] } else { [k, n] };
            // The infinity is the first that the first range must not see.
            let infinite = |stream, shape: &[usize; 2]| {
                let mut floats = draw.values.floats(seed, stream, k * shape[1], false);
                floats[segments[0] * shape[1] + seed as usize % shape[1]] = f32::INFINITY;
                as_dtype(floats, from, shape)
            };
            let [a, b] = match one {
                true if (index / 12).is_multiple_of(2) => {
                    [infinite(0, &a), draw.floats(1, from, &b)]
                }
                true => [draw.floats(0, from, &a), infinite(1, &b)],
                false => [draw.floats(0, from, &a), draw.floats(1, from, &b)],
            };
            draw.case(
                Gemm { layout, out, segments },
                [
                    ("a", Some(a)),
                    ("b", Some(b)),
                    ("c", add.then(|| draw.floats(2, DType::F32, &[m, n]))),
                ],
            )
        })
        .boxed()
}

fn grouped_gemm(index: usize) -> BoxedStrategy<Drawn> {
    let counts = lengths(5, 150);
    (layout(), types(), counts, size(0, 40), size(0, 150), size(0, 150), any::<(bool, u64)>())
        .prop_map(move |(layout, [from, out], counts, dropped, n, k, (add, seed))| {
            let (draw, experts) = (Draw::new(index, seed), counts.len());
            let rows = counts.iter().sum::<usize>() + dropped;
            let (b, d) = match layout {
                Layout::Nt => (vec![experts, n, k], vec![rows, n]),
                Layout::Nn => (vec![experts, k, n], vec![rows, n]),
                Layout::Tn => (vec![rows, n], vec![experts, k, n]),
            };
            draw.case(
                GroupedGemm { layout, out, counts },
                [
                    ("a", Some(draw.floats(0, from, &[rows, k]))),
                    ("b", Some(draw.floats(1, from, &b))),
                    ("c", add.then(|| draw.floats(2, DType::F32, &d))),
                ],
            )
        })
        .boxed()
}
