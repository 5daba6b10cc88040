//! What suites draw with: sizes at random and at the edges of tiles, tensors of a kind of values,
//! indices, and the case of them.

use std::collections::BTreeMap;

use fathom_numerics::philox::Philox;
use fathom_reference::{Case, DynOp, Tensor};
use fathom_trace::DType;
use half::bf16;
use proptest::collection::vec;
use proptest::prelude::{Just, prop_oneof};
use proptest::sample::select;
use proptest::strategy::{BoxedStrategy, Strategy};

use super::Drawn;
use super::values::Values;

/// A size of `least` to `most`: mostly any, now and then at an edge.
pub fn size(least: usize, most: usize) -> impl Strategy<Value = usize> {
    let edges = [0, 1, 2, 15, 16, 17, 31, 32, 33, 127, 128, 129, 255, 256, 257];
    let within: Vec<usize> =
        edges.into_iter().chain([least, most]).filter(|n| (least..=most).contains(n)).collect();
    prop_oneof![2 => least..=most, 1 => select(within)]
}

/// The case in which ops that work row by row get [`TALL_ROWS`] rows: the one after those of a
/// walk through small shapes.
const TALL: usize = 24;
/// Rows of a large micro-batch.
const TALL_ROWS: usize = 20_000;
/// Most columns that so many rows have.
const TALL_COLUMNS: usize = 16;

/// Rows of an op that works row by row: as [`size`], but in one case a micro-batch's.
pub fn rows(index: usize, least: usize, most: usize) -> BoxedStrategy<usize> {
    match index {
        TALL => Just(TALL_ROWS).boxed(),
        _ => size(least, most).boxed(),
    }
}

/// Columns beside [`rows`]: as [`size`], but few where there are many rows.
pub fn columns(index: usize, least: usize, most: usize) -> BoxedStrategy<usize> {
    match index {
        TALL => size(least.max(1), most.min(TALL_COLUMNS)).boxed(),
        _ => size(least, most).boxed(),
    }
}

/// Lengths of up to `most` segments or groups: some are 0, now and then all but one.
pub fn lengths(most: usize, longest: usize) -> impl Strategy<Value = Vec<usize>> {
    let one = prop_oneof![1 => Just(0), 3 => size(0, longest)];
    let only = (1..=most, 0..most, size(1, longest)).prop_map(|(count, at, length)| {
        let mut lengths = vec![0; count];
        lengths[at % count] = length;
        lengths
    });
    prop_oneof![4 => vec(one, 1..=most), 1 => only]
}

/// F32 or BF16.
pub fn float() -> impl Strategy<Value = DType> {
    select(vec![DType::F32, DType::BF16])
}

/// The tensors of one case: each a function of the kind of values, the seed and its stream.
#[derive(Clone, Copy, Debug)]
pub struct Draw {
    /// Kind of the floats.
    pub values: Values,
    /// Seed of the case.
    pub seed: u64,
}

impl Draw {
    /// The draw of case `index`, which walks through the kinds of values.
    pub fn new(index: usize, seed: u64) -> Draw {
        Draw { values: Values::ALL[index % Values::ALL.len()], seed }
    }

    /// Floats of the kind, F32 or BF16.
    pub fn floats(self, stream: u64, dtype: DType, shape: &[usize]) -> Tensor {
        let len = shape.iter().product();
        as_dtype(self.values.floats(self.seed, stream, len, false), dtype, shape)
    }

    /// The same, positive and around 1e-3 where the kind allows: scales, roots, affinities.
    pub fn positive(self, stream: u64, dtype: DType, shape: &[usize]) -> Tensor {
        let len = shape.iter().product();
        as_dtype(self.values.floats(self.seed, stream, len, true), dtype, shape)
    }

    /// Floats of the kind with infinities at these places, in row-major order: where elements that
    /// must not count are multiplied by zero, there is a NaN too many.
    pub fn infinite_at(
        self,
        stream: u64,
        dtype: DType,
        shape: &[usize],
        places: impl IntoIterator<Item = usize>,
    ) -> Tensor {
        let mut floats = self.values.floats(self.seed, stream, shape.iter().product(), false);
        places.into_iter().for_each(|place| floats[place] = f32::INFINITY);
        as_dtype(floats, dtype, shape)
    }

    /// Numbers below `bound`, which is not 0.
    pub fn indices(self, stream: u64, shape: &[usize], bound: usize) -> Tensor {
        let len = shape.iter().product();
        let words = self.words(stream, len);
        Tensor::from_vec(shape, words.iter().map(|w| (*w as usize % bound) as i32).collect())
    }

    /// `len` words of any bits, NaN and infinities among the floats that they make.
    pub fn words(self, stream: u64, len: usize) -> Vec<u32> {
        let mut words = vec![0; len];
        Philox::new(self.seed, 1000 + stream).words(0, &mut words);
        words
    }

    /// `parts` lengths, 0 among them, that add up to `total`.
    pub fn segments(self, stream: u64, parts: usize, total: usize) -> Vec<usize> {
        let words = self.words(stream, parts.saturating_sub(1));
        let mut ends: Vec<usize> = words.iter().map(|w| *w as usize % (total + 1)).collect();
        ends.push(total);
        ends.sort_unstable();
        let begins = std::iter::once(0).chain(ends.iter().copied());
        begins.zip(&ends).map(|(begin, end)| end - begin).collect()
    }

    /// The case of an op with these inputs; `None`: the optional role is left out.
    pub fn case(
        self,
        op: impl DynOp,
        inputs: impl IntoIterator<Item = (&'static str, Option<Tensor>)>,
    ) -> Drawn {
        let there = |(role, tensor): (&str, Option<Tensor>)| Some((role.to_owned(), tensor?));
        let inputs: BTreeMap<String, Tensor> = inputs.into_iter().filter_map(there).collect();
        let tensors =
            inputs.iter().map(|(role, t)| format!("{role} {} {:?}", t.dtype(), t.shape()));
        let tensors: Vec<String> = tensors.collect();
        let what = format!("{}, {:?}, {:?}", tensors.join(", "), self.values, op);
        Drawn { what, case: Case { op: op.boxed(), inputs } }
    }
}

/// Floats as a tensor. BF16 takes the upper half of the bits: NaNs that live in the lower half
/// become infinities.
pub fn as_dtype(floats: Vec<f32>, dtype: DType, shape: &[usize]) -> Tensor {
    match dtype {
        DType::BF16 => {
            let upper = |x: &f32| bf16::from_bits((x.to_bits() >> 16) as u16);
            Tensor::from_vec(shape, floats.iter().map(upper).collect())
        }
        _ => Tensor::from_vec(shape, floats),
    }
}
