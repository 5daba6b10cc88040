//! GEMMs of the routed experts: rows, weights and scales of the wrong expert.

use fathom_conformance::case_file::CaseFile;
use fathom_numerics::gemm::ScaleBlock;
use fathom_numerics::quant::{QuantConfig, Quantized, quantize};
use fathom_reference::Tensor;
use fathom_reference::ops::grouped_gemm_fp8::GroupedGemmFp8;
use fathom_reference::ops::wgrad_fp8::WgradFp8;
use fathom_trace::DType;
use ndarray::{Array2, s};

use super::Fault;
use super::data::{Random, bf16_tensor, case_file, partials, promote};
use super::gemm::HOPPER;

pub const FAULTS: &[Fault] = &[
    Fault {
        name: "a tile of 16 rows takes the expert of its first row",
        seen: "vllm-project/vllm #14568",
        plant: expert_of_the_tile,
        named: &["expert* tile*|first|boundar*|previous|neighbour*|align*|straddl*|16"],
        place: None,
    },
    Fault {
        name: "every expert takes the next one's weights",
        seen: "vllm-project/vllm-gaudi #1796",
        plant: next_expert,
        named: &[
            "expert* next|following|neighbour*|shift*|other|another weights|b",
            "expert* off by one",
            "weights|b expert* 1 0",
        ],
        place: None,
    },
    Fault {
        name: "all experts take expert 0's weight scales",
        seen: "from the contract",
        plant: scales_of_the_first,
        named: &["b_scale|scale* expert* 0|first|stride*|same"],
        place: None,
    },
    Fault {
        name: "activations were gathered by expert, their scales were not",
        seen: "from the contract",
        plant: scales_in_token_order,
        named: &["a_scale|scale* order|permut*|gather*|row*|token*"],
        place: None,
    },
    Fault {
        name: "rows behind the last expert's are not written",
        seen: "AMD-AGI/Primus-Turbo #397",
        plant: padding_not_written,
        named: &["row*|padding 120|behind|padding|beyond written|zero*|uninitiali*|stale|counts"],
        place: None,
    },
    Fault {
        name: "an expert without tokens adds the accumulators of the one before",
        seen: "after NVIDIA/cutlass #2674",
        plant: empty_expert,
        named: &["empty|tokens|segment|expert* previous|preceding|stale|neighbour*|uninitiali*|0"],
        place: None,
    },
];

const COUNTS: [usize; 4] = [40, 24, 37, 19];
const ROWS: usize = 128;
const N: usize = 128;
const K: usize = 512;

/// The experts' products with what a fault changes, row by row.
struct Experts {
    a: Quantized,
    b: Vec<Quantized>,
    /// The expert whose tokens each row is among; rows behind the last have none.
    of_row: Vec<Option<usize>>,
}

impl Experts {
    fn new(seed: u64) -> Experts {
        let mut random = Random::new(seed);
        let config = QuantConfig::default();
        let x = random.activations(ROWS, K);
        let a = quantize(x.view(), ScaleBlock::TILE_1X128, &config).unwrap();
        let b = COUNTS.map(|_| {
            let w = random.weights(N, K);
            quantize(w.view(), ScaleBlock::BLOCK_128X128, &config).unwrap()
        });
        let mut of_row: Vec<_> =
            COUNTS.iter().enumerate().flat_map(|(e, &rows)| vec![Some(e); rows]).collect();
        of_row.resize(ROWS, None);
        Experts { a, b: b.into(), of_row }
    }

    /// Row i by the weights of `expert(i)`, scaled by `scale(i, expert, K block)`.
    fn rows(
        &self,
        expert: impl Fn(usize) -> Option<usize>,
        scale: impl Fn(usize, usize, usize) -> f32,
    ) -> Array2<f32> {
        let mut d = Array2::zeros((ROWS, N));
        for (e, weights) in self.b.iter().enumerate() {
            let sums = partials(&self.a.codes, &weights.codes, 128, &HOPPER);
            let own = promote(&sums, |i, _, block| scale(i, e, block));
            for i in (0..ROWS).filter(|&i| expert(i) == Some(e)) {
                d.row_mut(i).assign(&own.row(i));
            }
        }
        d
    }

    fn scale(&self, i: usize, e: usize, block: usize) -> f32 {
        self.a.scales[[i, block]] * self.b[e].scales[[0, block]]
    }

    fn file(self, d: &Array2<f32>) -> CaseFile {
        let op = GroupedGemmFp8 {
            counts: COUNTS.to_vec(),
            a_tile: [Some(1), Some(128)],
            b_block: [Some(128), Some(128)],
            promotion_interval: Some(128),
            out: DType::BF16,
        };
        let codes: Vec<u8> = self.b.iter().flat_map(|b| b.codes.iter().copied()).collect();
        let scales: Vec<f32> = self.b.iter().flat_map(|b| b.scales.iter().copied()).collect();
        let b = Tensor::from_vec(&[COUNTS.len(), N, K], codes).reinterpret(DType::F8E4M3);
        let inputs = [
            ("a", Tensor::from_array(self.a.codes).reinterpret(DType::F8E4M3)),
            ("a_scale", Tensor::from_array(self.a.scales)),
            ("b", b),
            ("b_scale", Tensor::from_vec(&[COUNTS.len(), 1, K / 128], scales)),
        ];
        case_file(op, &inputs, &[("d", bf16_tensor(d))])
    }
}

/// The contract's output, by this file's loops.
pub fn without_fault() -> CaseFile {
    let x = Experts::new(910);
    let d = x.rows(|i| x.of_row[i], |i, e, block| x.scale(i, e, block));
    x.file(&d)
}

fn expert_of_the_tile() -> CaseFile {
    let x = Experts::new(81);
    let d = x.rows(|i| x.of_row[i].and(x.of_row[i / 16 * 16]), |i, e, block| x.scale(i, e, block));
    x.file(&d)
}

fn next_expert() -> CaseFile {
    let x = Experts::new(82);
    let d = x.rows(|i| x.of_row[i].map(|e| (e + 1) % 4), |i, e, block| x.scale(i, e, block));
    x.file(&d)
}

fn scales_of_the_first() -> CaseFile {
    let x = Experts::new(83);
    let d =
        x.rows(|i| x.of_row[i], |i, _, block| x.a.scales[[i, block]] * x.b[0].scales[[0, block]]);
    x.file(&d)
}

/// Token t stands in row 5 t mod 128 after the gather.
fn scales_in_token_order() -> CaseFile {
    let x = Experts::new(84);
    let d = x.rows(
        |i| x.of_row[i],
        |i, e, block| x.a.scales[[i * 5 % ROWS, block]] * x.b[e].scales[[0, block]],
    );
    x.file(&d)
}

/// What lies there is another step's output.
fn padding_not_written() -> CaseFile {
    let (x, before) = (Experts::new(85), Experts::new(86));
    let mut d = x.rows(|i| x.of_row[i], |i, e, block| x.scale(i, e, block));
    let old = before.rows(|_| Some(3), |i, e, block| before.scale(i, e, block));
    d.slice_mut(s![120.., ..]).assign(&old.slice(s![120.., ..]));
    x.file(&d)
}

fn empty_expert() -> CaseFile {
    const SEGMENTS: [usize; 3] = [128, 0, 256];
    let mut random = Random::new(87);
    let cast = |x: Array2<f32>| {
        quantize(x.view(), ScaleBlock::TILE_1X128, &QuantConfig::default()).unwrap()
    };
    let (dy, x) = (cast(random.activations(64, 384)), cast(random.activations(96, 384)));
    let acc = random.normals(3 * 64 * 96);
    let mut d = acc.clone();
    let sums = partials(&dy.codes, &x.codes, 128, &HOPPER);
    for (expert, blocks) in [0..1, 0..1, 1..3].into_iter().enumerate() {
        for block in blocks {
            for ((i, j), &sum) in sums[block].indexed_iter() {
                let scale = dy.scales[[i, block]] * x.scales[[j, block]];
                let acc = &mut d[(expert * 64 + i) * 96 + j];
                *acc = scale.mul_add(sum, *acc);
            }
        }
    }
    let tile = [Some(1), Some(128)];
    let op = WgradFp8 {
        segments: SEGMENTS.to_vec(),
        grouped: true,
        dy_block: tile,
        x_block: tile,
        promotion_interval: Some(128),
    };
    let codes = |x: Array2<u8>| Tensor::from_array(x).reinterpret(DType::F8E4M3);
    let shape = [3, 64, 96];
    let inputs = [
        ("dy", codes(dy.codes)),
        ("dy_scale", Tensor::from_array(dy.scales)),
        ("x", codes(x.codes)),
        ("x_scale", Tensor::from_array(x.scales)),
        ("acc", Tensor::from_vec(&shape, acc)),
    ];
    case_file(op, &inputs, &[("d", Tensor::from_vec(&shape, d))])
}
