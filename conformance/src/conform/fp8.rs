//! Cases of `grouped_gemm_fp8` and `wgrad_fp8`, and what they share with `gemm_fp8`: the formats,
//! scale blocks and promotion intervals of the report's recipe and of its baselines.

use fathom_reference::Tensor;
use fathom_reference::op::codes::{Block, scales};
use fathom_reference::ops::grouped_gemm_fp8::GroupedGemmFp8;
use fathom_reference::ops::wgrad_fp8::WgradFp8;
use fathom_trace::DType;
use proptest::prelude::{any, prop_oneof};
use proptest::sample::select;
use proptest::strategy::{BoxedStrategy, Strategy};

use super::draw::{Draw, lengths, size};
use super::values::Values;
use super::{Drawn, Suite};

/// The suites of this file.
pub const SUITES: &[Suite] = &[
    Suite { op: "grouped_gemm_fp8", strategy: grouped_gemm_fp8 },
    Suite { op: "wgrad_fp8", strategy: wgrad_fp8 },
];

/// How a product is scaled and promoted: blocks of a and of b, and the interval.
#[derive(Clone, Copy, Debug)]
pub struct Recipe {
    /// Which elements of a share a scale.
    pub a: Block,
    /// Which elements of b share a scale.
    pub b: Block,
    /// Elements of k between promotions.
    pub interval: Option<usize>,
}

const TILE: Block = [Some(1), Some(128)];
const BLOCK: Block = [Some(128), Some(128)];
const ROW: Block = [Some(1), None];
const TENSOR: Block = [None, None];

/// The recipes of products with weights; those whose a has one row a scale, or all, come first.
const WEIGHTS: [Recipe; 7] = [
    Recipe { a: TILE, b: BLOCK, interval: Some(128) },
    Recipe { a: TENSOR, b: TENSOR, interval: None },
    Recipe { a: TENSOR, b: TENSOR, interval: Some(256) },
    Recipe { a: ROW, b: ROW, interval: None },
    Recipe { a: TILE, b: TENSOR, interval: Some(128) },
    Recipe { a: BLOCK, b: BLOCK, interval: Some(128) },
    Recipe { a: TENSOR, b: BLOCK, interval: Some(128) },
];

/// The recipes of weight gradients; of the last two the operands' scales begin at different columns
/// of a range.
const GRADIENTS: [Recipe; 7] = [
    Recipe { a: TILE, b: TILE, interval: Some(128) },
    Recipe { a: BLOCK, b: TILE, interval: Some(128) },
    Recipe { a: BLOCK, b: BLOCK, interval: Some(128) },
    Recipe { a: TENSOR, b: TENSOR, interval: None },
    Recipe { a: ROW, b: TENSOR, interval: Some(256) },
    Recipe { a: TILE, b: ROW, interval: Some(128) },
    Recipe { a: TENSOR, b: TILE, interval: Some(128) },
];

/// A recipe of products with weights.
pub fn with_weights() -> impl Strategy<Value = Recipe> {
    select(WEIGHTS.to_vec())
}

/// E4M3, or now and then E5M2.
pub fn format() -> impl Strategy<Value = DType> {
    select(vec![DType::F8E4M3, DType::F8E4M3, DType::F8E5M2])
}

/// Codes and scales of one case.
#[derive(Clone, Copy)]
pub struct Codes {
    codes: Values,
    scales: Values,
    seed: u64,
}

impl Codes {
    /// The codes of case `index` walk through the kinds of values, and so do the scales every
    /// second round; else they are ordinary.
    pub fn new(index: usize, seed: u64) -> Codes {
        let kinds = Values::ALL.len();
        let codes = Values::ALL[index % kinds];
        let scales = match index / kinds % 2 {
            0 => Values::Normal,
            round => Values::ALL[(index + round) % kinds],
        };
        Codes { codes, scales, seed }
    }

    /// Codes of a format. Those of E4M3 are of the kind; in E5M2 the same bits are other numbers,
    /// NaNs and infinities among them where the kind has any.
    pub fn codes(self, stream: u64, dtype: DType, shape: &[usize]) -> Tensor {
        let mut codes = self.codes.e4m3(self.seed, stream, shape.iter().product());
        if dtype == DType::F8E5M2 && self.codes != Values::NonFinite {
            // No top exponent: it stands for infinities and NaNs.
            codes.iter_mut().filter(|c| **c & 0x7C == 0x7C).for_each(|c| *c &= !0x40);
        }
        Tensor::from_vec(shape, codes).reinterpret(dtype)
    }

    /// Scales of `shape`, positive F32, as casts give them.
    pub fn scales(self, stream: u64, shape: &[usize]) -> Tensor {
        let len = shape.iter().product();
        Tensor::from_vec(shape, self.scales.floats(self.seed, stream, len, true))
    }
}

fn grouped_gemm_fp8(index: usize) -> BoxedStrategy<Drawn> {
    let recipe = select(WEIGHTS[..5].to_vec());
    let out = select(vec![DType::BF16, DType::F32]);
    // Now and then deeper than the pipeline has stages for.
    let depth = prop_oneof![4 => size(0, 400), 1 => 1000usize..=1500];
    let sizes = (lengths(5, 300), size(0, 40), size(0, 200), depth);
    (recipe, [format(), format()], out, sizes, any::<u64>())
        .prop_map(move |(recipe, [a, b], out, (counts, dropped, n, k), seed)| {
            let (codes, experts) = (Codes::new(index, seed), counts.len());
            let rows = counts.iter().sum::<usize>() + dropped;
            let [b_rows, b_columns] = scales(recipe.b, n, k);
            let op = GroupedGemmFp8 {
                counts,
                a_tile: recipe.a,
                b_block: recipe.b,
                promotion_interval: recipe.interval,
                out,
            };
            Draw { values: codes.codes, seed }.case(
                op,
                [
                    ("a", Some(codes.codes(0, a, &[rows, k]))),
                    ("a_scale", Some(codes.scales(1, &scales(recipe.a, rows, k)))),
                    ("b", Some(codes.codes(2, b, &[experts, n, k]))),
                    ("b_scale", Some(codes.scales(3, &[experts, b_rows, b_columns]))),
                ],
            )
        })
        .boxed()
}

fn wgrad_fp8(index: usize) -> BoxedStrategy<Drawn> {
    let recipe = select(GRADIENTS.to_vec());
    let sizes = (lengths(5, 300), size(0, 260), size(0, 260));
    (recipe, [format(), format()], sizes, any::<(bool, u64)>())
        .prop_map(move |(recipe, [dy, x], (segments, m, n), (grouped, seed))| {
            let codes = Codes::new(index, seed);
            let k = segments.iter().sum();
            let columns = |block: Block| -> usize {
                segments.iter().map(|&length| scales(block, 1, length)[1]).sum()
            };
            let scales_of = |stream, block: Block, rows| {
                codes.scales(stream, &[scales(block, rows, 1)[0], columns(block)])
            };
            let draw = Draw { values: codes.codes, seed };
            let (dy_scale, x_scale) = (scales_of(1, recipe.a, m), scales_of(3, recipe.b, n));
            let d = if grouped { vec![segments.len(), m, n] } else { vec![m, n] };
            let op = WgradFp8 {
                segments: segments.clone(),
                grouped,
                dy_block: recipe.a,
                x_block: recipe.b,
                promotion_interval: recipe.interval,
            };
            draw.case(
                op,
                [
                    ("dy", Some(codes.codes(0, dy, &[m, k]))),
                    ("dy_scale", Some(dy_scale)),
                    ("x", Some(codes.codes(2, x, &[n, k]))),
                    ("x_scale", Some(x_scale)),
                    ("acc", Some(draw.floats(4, DType::F32, &d))),
                ],
            )
        })
        .boxed()
}
