//! A block-scaled FP8 GEMM whose scales, data and sums a fault can get at.

use fathom_conformance::case_file::CaseFile;
use fathom_numerics::formats::{Format, to_bf16};
use fathom_numerics::gemm::ScaleBlock;
use fathom_numerics::mma::Accumulator;
use fathom_numerics::quant::{QuantConfig, quantize};
use fathom_reference::Tensor;
use fathom_reference::ops::gemm_fp8::GemmFp8;
use fathom_trace::DType;
use half::bf16;
use ndarray::Array2;

use super::data::{Random, case_file, partials, promote};

/// Hopper's tensor core on FP8: what the contract's GEMM uses.
pub const HOPPER: Accumulator = Accumulator::HOPPER_FP8;

/// An FP8 GEMM with its inputs.
#[derive(Clone)]
pub struct Gemm {
    pub op: GemmFp8,
    pub a: Array2<u8>,
    pub a_scale: Array2<f32>,
    pub b: Array2<u8>,
    pub b_scale: Array2<f32>,
}

impl Gemm {
    /// 1 x 128 tiles times 128 x 128 blocks, promotion every 128.
    pub fn blockwise(seed: u64, [m, n, k]: [usize; 3], d: Format) -> Gemm {
        Gemm::of(seed, GemmFp8::hopper(m, n, k, d))
    }

    /// Any scale blocks.
    pub fn of(seed: u64, op: GemmFp8) -> Gemm {
        let mut random = Random::new(seed);
        let cast = |x: Array2<f32>, block: [Option<usize>; 2]| {
            let [rows, k] = block.map(|extent| extent.unwrap_or(usize::MAX));
            quantize(x.view(), ScaleBlock { rows, k }, &QuantConfig::default()).unwrap()
        };
        let a = cast(random.activations(op.m, op.k), op.a_tile);
        let b = cast(random.weights(op.n, op.k), op.b_block);
        Gemm { op, a: a.codes, a_scale: a.scales, b: b.codes, b_scale: b.scales }
    }

    /// How many K blocks of 128 there are.
    pub fn blocks(&self) -> usize {
        self.op.k.div_ceil(128)
    }

    /// a's scale for row `i` and K block `block`.
    pub fn sa(&self, i: usize, block: usize) -> f32 {
        let column = self.op.a_tile[1].map_or(0, |k| block * 128 / k);
        self.a_scale[[self.op.a_tile[0].map_or(0, |rows| i / rows), column]]
    }

    /// b's scale for column `j` of d and K block `block`.
    pub fn sb(&self, j: usize, block: usize) -> f32 {
        let column = self.op.b_block[1].map_or(0, |k| block * 128 / k);
        self.b_scale[[self.op.b_block[0].map_or(0, |rows| j / rows), column]]
    }

    /// The product of both, rounded.
    pub fn scale(&self, i: usize, j: usize, block: usize) -> f32 {
        self.sa(i, block) * self.sb(j, block)
    }

    /// The tensor core's sums over each K block, as the contract has them.
    pub fn partials(&self) -> Vec<Array2<f32>> {
        partials(&self.a, &self.b, 128, &HOPPER)
    }

    /// The contract's promotion of these sums.
    pub fn promoted(&self, partials: &[Array2<f32>]) -> Array2<f32> {
        promote(partials, |i, j, block| self.scale(i, j, block))
    }

    /// A case file of this GEMM whose output is `d`, rounded to nearest even where it is BF16.
    pub fn file(self, d: Array2<f32>) -> CaseFile {
        let d = match self.op.d {
            Format::Bf16 => Tensor::from_array(d.map(|&x| to_bf16(x))),
            _ => Tensor::from_array(d),
        };
        self.file_of(d)
    }

    /// A case file whose output is rounded to BF16 already.
    pub fn file_bf16(self, d: Array2<bf16>) -> CaseFile {
        self.file_of(Tensor::from_array(d))
    }

    fn file_of(self, d: Tensor) -> CaseFile {
        let codes = |x| Tensor::from_array(x).reinterpret(DType::F8E4M3);
        let inputs = [
            ("a", codes(self.a)),
            ("a_scale", Tensor::from_array(self.a_scale)),
            ("b", codes(self.b)),
            ("b_scale", Tensor::from_array(self.b_scale)),
        ];
        case_file(self.op, &inputs, &[("d", d)])
    }
}

/// The contract's output, by this file's loops.
pub fn without_fault(d: Format) -> CaseFile {
    let gemm = Gemm::blockwise(900, [48, 208, 576], d);
    let d = gemm.promoted(&gemm.partials());
    gemm.file(d)
}
