//! Cases of `quantize_tile`: E4M3, tiles of 128, both kinds of scale.

use std::collections::BTreeMap;

use fathom_numerics::formats::Format;
use fathom_numerics::quant::ScaleKind;
use fathom_reference::ops::quantize_tile::QuantizeTile;
use fathom_reference::{Case, DynOp, Tensor};
use fathom_trace::DType;
use half::bf16;
use proptest::prelude::{any, prop_oneof};
use proptest::sample::select;
use proptest::strategy::{BoxedStrategy, Strategy};

use super::Drawn;
use super::values::Values;

#[derive(Clone, Copy, Debug)]
struct Spec {
    m: usize,
    k: usize,
    input: DType,
    scale: ScaleKind,
    amax_floor: f32,
    values: Values,
    seed: u64,
}

/// Case `index`: values walk through their kinds, the rest is drawn.
pub fn strategy(index: usize) -> BoxedStrategy<Drawn> {
    let values = Values::ALL[index % Values::ALL.len()];
    let k = prop_oneof![2 => 1usize..=400, 1 => select(vec![1usize, 127, 128, 129, 256, 384])];
    let input = select(vec![DType::F32, DType::BF16]);
    let scale = select(vec![ScaleKind::F32, ScaleKind::Pow2]);
    // The report's floor, none to speak of, and one above everything ordinary.
    let floor = select(vec![1e-4f32, 1e-43, 1e3]);
    (1usize..=64, k, input, scale, floor, any::<u64>())
        .prop_map(move |(m, k, input, scale, amax_floor, seed)| {
            Spec { m, k, input, scale, amax_floor, values, seed }.draw()
        })
        .boxed()
}

impl Spec {
    fn draw(self) -> Drawn {
        let Spec { m, k, input, scale, amax_floor, values, seed } = self;
        let floats = values.floats(seed, 0, m * k, false);
        let x = match input {
            // The upper half of the bits: NaNs that live in the lower half become infinities.
            DType::BF16 => {
                let upper = |x: &f32| bf16::from_bits((x.to_bits() >> 16) as u16);
                Tensor::from_vec(&[m, k], floats.iter().map(upper).collect())
            }
            _ => Tensor::from_vec(&[m, k], floats),
        };
        let op = QuantizeTile { format: Format::E4M3, tile: 128, scale, amax_floor };
        let what =
            format!("{m} x {k} of {input}, {scale:?} scales, floor {amax_floor:e}, {values:?}");
        let inputs = BTreeMap::from([("x".to_owned(), x)]);
        Drawn { what, case: Case { op: op.boxed(), inputs } }
    }
}
