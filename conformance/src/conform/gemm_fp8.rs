//! Cases of `gemm_fp8`: Hopper's contract, sizes around the 128s that kernels work in.

use std::collections::BTreeMap;

use fathom_numerics::formats::Format;
use fathom_numerics::gemm::Accumulate;
use fathom_reference::op::codes::scales;
use fathom_reference::ops::gemm_fp8::GemmFp8;
use fathom_reference::{Case, DynOp, Tensor};
use fathom_trace::DType;
use proptest::prelude::{any, prop_oneof};
use proptest::sample::select;
use proptest::strategy::{BoxedStrategy, Strategy};

use super::draw::{Draw, size};
use super::values::Values;
use super::{Drawn, fp8};

#[derive(Clone, Copy, Debug)]
struct Spec {
    m: usize,
    n: usize,
    k: usize,
    output: Format,
    codes: Values,
    scales: Values,
    seed: u64,
}

/// Case `index`: codes and scales walk through their kinds, the rest is drawn; every second round
/// of the kinds has the variants of the recipe's baselines.
pub fn strategy(index: usize) -> BoxedStrategy<Drawn> {
    let kinds = Values::ALL.len();
    if index / kinds % 2 == 1 {
        return variants(index);
    }
    let codes = Values::ALL[index % kinds];
    if index % (4 * kinds) == 2 * kinds {
        return wide(codes);
    }
    // Ordinary scales every second round, else each kind in turn.
    let scales = match index / kinds % 2 {
        0 if codes != Values::NonFinite => Values::Normal,
        round => Values::ALL[(index + round) % kinds],
    };
    let edges = vec![1usize, 127, 128, 129, 256, 257];
    let rows = || prop_oneof![2 => 1usize..=300, 1 => select(edges.clone())];
    // More than the pipeline has stages for, now and then.
    let depths = vec![1usize, 16, 31, 33, 127, 128, 129, 512, 1030, 1920];
    let depth = prop_oneof![2 => 1usize..=640, 1 => select(depths)];
    let output = select(vec![Format::Bf16, Format::F32]);
    (rows(), rows(), depth, output, any::<u64>())
        .prop_map(move |(m, n, k, output, seed)| {
            Spec { m, n, k, output, codes, scales, seed }.draw()
        })
        .boxed()
}

/// More tiles than an H200 has SMs, so that CTAs take several, and rows in several sweeps.
fn wide(codes: Values) -> BoxedStrategy<Drawn> {
    let output = select(vec![Format::Bf16, Format::F32]);
    (2305usize..=2600, 1025usize..=1100, 1usize..=300, output, any::<u64>())
        .prop_map(move |(m, n, k, output, seed)| {
            Spec { m, n, k, output, codes, scales: Values::Normal, seed }.draw()
        })
        .boxed()
}

/// Other formats, scale blocks and intervals, sizes from 0, and products that are added to c.
fn variants(index: usize) -> BoxedStrategy<Drawn> {
    let how = select(vec![Accumulate::Overwrite, Accumulate::Chain, Accumulate::AddAtEnd]);
    let output = select(vec![Format::Bf16, Format::F32]);
    let sizes = (size(0, 260), size(0, 260), size(0, 600));
    (fp8::with_weights(), [fp8::format(), fp8::format()], (how, output), sizes, any::<u64>())
        .prop_map(move |(recipe, [a, b], (accumulate, d), (m, n, k), seed)| {
            let codes = fp8::Codes::new(index, seed);
            let draw = Draw::new(index, seed);
            let op = GemmFp8 {
                a_tile: recipe.a,
                b_block: recipe.b,
                promotion_interval: recipe.interval,
                accumulate,
                ..GemmFp8::hopper(m, n, k, d)
            };
            let adds = accumulate != Accumulate::Overwrite;
            draw.case(
                op,
                [
                    ("a", Some(codes.codes(0, a, &[m, k]))),
                    ("a_scale", Some(codes.scales(1, &scales(recipe.a, m, k)))),
                    ("b", Some(codes.codes(2, b, &[n, k]))),
                    ("b_scale", Some(codes.scales(3, &scales(recipe.b, n, k)))),
                    ("c", adds.then(|| draw.floats(4, DType::F32, &[m, n]))),
                ],
            )
        })
        .boxed()
}

impl Spec {
    fn draw(self) -> Drawn {
        let Spec { m, n, k, output, codes, scales, seed } = self;
        let e4m3 = |stream, shape: [usize; 2]| {
            let codes = codes.e4m3(seed, stream, shape[0] * shape[1]);
            Tensor::from_vec(&shape, codes).reinterpret(DType::F8E4M3)
        };
        let f32s = |stream, shape: [usize; 2]| {
            Tensor::from_vec(&shape, scales.floats(seed, stream, shape[0] * shape[1], true))
        };
        let inputs = BTreeMap::from([
            ("a".to_owned(), e4m3(0, [m, k])),
            ("b".to_owned(), e4m3(1, [n, k])),
            ("a_scale".to_owned(), f32s(2, [m, k.div_ceil(128)])),
            ("b_scale".to_owned(), f32s(3, [n.div_ceil(128), k.div_ceil(128)])),
        ]);
        let what = format!("{m} x {n} x {k} to {output:?}, codes {codes:?}, scales {scales:?}");
        Drawn { what, case: Case { op: GemmFp8::hopper(m, n, k, output).boxed(), inputs } }
    }
}
