//! Inputs as kernels meet them: rows and K blocks of different magnitudes, a few channels twenty
//! times as large as the rest, weights around 0.02; and the case files made of them.

use std::collections::BTreeMap;
use std::ops::Range;

use fathom_conformance::case_file::CaseFile;
use fathom_numerics::formats::{bf16, to_bf16};
use fathom_numerics::gemm::{
    Accumulate, Fp8Operand, GemmConfig, ScaleBlock, gemm_bf16_into, gemm_fp8,
};
use fathom_numerics::mma::Accumulator;
use fathom_numerics::philox::Philox;
use fathom_reference::{Case, Op, Outputs, Tensor};
use ndarray::{Array2, ArrayView2, s};

/// Streams of one case's random numbers.
#[derive(Clone, Copy)]
pub struct Random {
    seed: u64,
    stream: u64,
}

impl Random {
    pub fn new(seed: u64) -> Random {
        Random { seed, stream: 0 }
    }

    /// `n` standard normals, no two calls alike.
    pub fn normals(&mut self, n: usize) -> Vec<f32> {
        self.stream += 1;
        let mut xs = vec![0.0; n];
        Philox::new(self.seed, self.stream).normals(0, &mut xs);
        xs
    }

    /// `n` magnitudes around 1, by factors of about two.
    pub fn magnitudes(&mut self, n: usize) -> Vec<f32> {
        self.normals(n).into_iter().map(f32::exp2).collect()
    }

    /// Activations `[rows, columns]`: every row, every 128 columns and every 37th column has a
    /// magnitude of its own.
    pub fn activations(&mut self, rows: usize, columns: usize) -> Array2<f32> {
        let (of_row, of_block) = (self.magnitudes(rows), self.magnitudes(columns.div_ceil(128)));
        let x = self.normals(rows * columns);
        Array2::from_shape_fn((rows, columns), |(i, c)| {
            let outlier = if c % 37 == 5 { 20.0 } else { 1.0 };
            x[i * columns + c] * of_row[i] * of_block[c / 128] * outlier
        })
    }

    /// Weights `[rows, columns]`: every 64 x 128 has a magnitude of its own.
    pub fn weights(&mut self, rows: usize, columns: usize) -> Array2<f32> {
        let wide = columns.div_ceil(128);
        let of_block = self.magnitudes(rows.div_ceil(64) * wide);
        let x = self.normals(rows * columns);
        Array2::from_shape_fn((rows, columns), |(i, c)| {
            0.02 * x[i * columns + c] * of_block[i / 64 * wide + c / 128]
        })
    }
}

/// The matrix rounded to BF16.
pub fn rounded(x: &Array2<f32>) -> Array2<f32> {
    x.map(|&x| to_bf16(x).to_f32())
}

/// A BF16 tensor of values that are BF16 already, or are rounded to it.
pub fn bf16_tensor(x: &Array2<f32>) -> Tensor {
    Tensor::from_array(x.map(|&x| to_bf16(x)))
}

/// FP32 to BF16 by cutting off the low half.
pub fn cut_bf16(x: f32) -> bf16 {
    bf16::from_bits((x.to_bits() >> 16) as u16)
}

/// One chain of tensor-core steps over all of k: `a[m, k] b[n, k]^T` of E4M3 codes from zero.
pub fn product(a: ArrayView2<'_, u8>, b: ArrayView2<'_, u8>, core: &Accumulator) -> Array2<f32> {
    let one = Array2::ones((1, 1));
    let [a, b] = [a, b].map(|codes| Fp8Operand::e4m3(codes, one.view(), ScaleBlock::PER_TENSOR));
    let config =
        GemmConfig { accumulator: *core, promotion_interval: None, ..GemmConfig::default() };
    gemm_fp8(&a, &b, &config).unwrap()
}

/// [`product`] of BF16 values on Hopper's tensor core, from zero or, chained, from `d`.
pub fn product_bf16(
    a: ArrayView2<'_, f32>,
    b: ArrayView2<'_, f32>,
    d: &mut Array2<f32>,
    accumulate: Accumulate,
) {
    let [a, b] = [a, b].map(|x| x.map(|&x| to_bf16(x)));
    let core = Accumulator::HOPPER_16BIT;
    gemm_bf16_into(a.view(), b.view(), d.view_mut(), accumulate, &core).unwrap();
}

/// The products over each `depth` of k.
pub fn partials(
    a: &Array2<u8>,
    b: &Array2<u8>,
    depth: usize,
    core: &Accumulator,
) -> Vec<Array2<f32>> {
    let starts = (0..a.ncols()).step_by(depth);
    starts
        .map(|k| {
            let own = s![.., k..(k + depth).min(a.ncols())];
            product(a.slice(own), b.slice(own), core)
        })
        .collect()
}

/// The contract's promotion, `acc = fma(scale(i, j, block), partial, acc)`, with any scales.
pub fn promote(
    partials: &[Array2<f32>],
    scale: impl Fn(usize, usize, usize) -> f32,
) -> Array2<f32> {
    let mut d = Array2::<f32>::zeros(partials[0].raw_dim());
    for (block, partial) in partials.iter().enumerate() {
        for ((i, j), acc) in d.indexed_iter_mut() {
            *acc = scale(i, j, block).mul_add(partial[[i, j]], *acc);
        }
    }
    d
}

/// Puts `from`'s elements of a tile into `into`.
pub fn patch(
    into: &mut Array2<f32>,
    from: &Array2<f32>,
    rows: Range<usize>,
    columns: Range<usize>,
) {
    let tile = s![rows, columns];
    into.slice_mut(tile).assign(&from.slice(tile));
}

/// A case file from an op, its inputs and the outputs that a kernel gave.
pub fn case_file<O: Op>(op: O, inputs: &[(&str, Tensor)], outputs: &[(&str, Tensor)]) -> CaseFile {
    let map = |list: &[(&str, Tensor)]| -> BTreeMap<String, Tensor> {
        list.iter().map(|(role, tensor)| ((*role).to_owned(), tensor.clone())).collect()
    };
    let expected: Outputs = map(outputs);
    let case = Case { op: Box::new(op), inputs: map(inputs) };
    CaseFile { case, expected, metadata: BTreeMap::new() }
}
