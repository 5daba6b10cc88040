//! FP8 GEMMs that read the right data with the right scales and add it up wrongly: accumulators,
//! promotion, splits of K, rounding of the output.

use fathom_conformance::case_file::CaseFile;
use fathom_numerics::formats::{E4M3, Format, to_bf16};
use fathom_numerics::gemm::Accumulate;
use fathom_numerics::mma::{Accumulator, Output};
use fathom_reference::ops::gemm_fp8::GemmFp8;
use ndarray::{Array2, s};

use super::data::{cut_bf16, partials, patch, product, product_bf16, promote};
use super::gemm::{Gemm, HOPPER};
use super::{Fault, Place};
use Format::{Bf16, F32};

pub const FAULTS: &[Fault] = &[
    Fault {
        name: "fast accumulation: no promotion at all",
        seen: "triton-lang/triton #8056",
        plant: no_promotion,
        named: &[
            "no|without|never promot*",
            "promot* none|never|whole",
            "promot* interval 512",
            "fast accum*",
        ],
        place: None,
    },
    Fault {
        name: "promotion every 32, the interval counted in k of one instruction",
        seen: "after NVIDIA/cutlass #3149",
        plant: promotion_32,
        named: &["promot* 32"],
        place: None,
    },
    Fault {
        name: "Ada's tensor core: 16 products a step",
        seen: "after thu-ml/SageAttention #287",
        plant: ada_steps,
        named: &["16 group*|products|step*", "ada", "sm_89"],
        place: None,
    },
    Fault {
        name: "sums in FP32 to the last bit, as a fallback without tensor cores gives them",
        seen: "after deepseek-ai/DeepGEMM #37",
        plant: fp32_chain,
        named: &["fp32|f32 fma|chain*|cuda|accumul*", "one product"],
        place: None,
    },
    Fault {
        name: "the tensor core's sums go through BF16 before promotion",
        seen: "after tenstorrent/tt-metal #43367",
        plant: bf16_partials,
        named: &["partial*|intermediate*|accumul*|sum* bf16"],
        place: None,
    },
    Fault {
        name: "promotion by a multiplication and an addition",
        seen: "from the contract",
        plant: unfused,
        named: &[
            "promot* mul_add|unfused|separate*",
            "promot* two rounding*",
            "promot* multipl* add*",
            "promot* without|no fma",
            "product rounded promot*|add*|before",
        ],
        place: None,
    },
    Fault {
        name: "the output is cut to BF16, not rounded",
        seen: "after ROCm/rocm-systems #10806",
        plant: cut_output,
        named: &["output*|bf16|cast toward zero", "output*|bf16|cast truncat*|cut", "output* rz"],
        place: None,
    },
    Fault {
        name: "split-K: both slices' sums are rounded to BF16 before they are added",
        seen: "modular/modular #7165",
        plant: split_bf16,
        named: &["split*|slice*|halves|parts bf16", "k 2|two parts|pieces bf16"],
        place: None,
    },
    Fault {
        name: "split-K: four FP32 sums are added at the end",
        seen: "ROCm/composable_kernel #2271",
        plant: split_f32,
        named: &["split*|slice*|parts 4|four"],
        place: None,
    },
    Fault {
        name: "operands are dequantised to BF16 and multiplied there",
        seen: "HabanaAI/vllm-fork #1500",
        plant: dequantised,
        named: &["dequanti* bf16", "bf16 operands|product*|gemm scale*"],
        place: None,
    },
    Fault {
        name: "the K tail of 64 is left out",
        seen: "NVIDIA/cutlass #3536",
        plant: tail_left_out,
        named: &[
            "tail left|dropped|missing|skipped|not|without",
            "last k|block left|dropped|missing|skipped|absent|not|without",
            "k block* 4 left|dropped|missing|skipped|absent|not|without",
            "64 k left|dropped|missing|skipped|absent|not",
        ],
        place: Some(Place { rows: 0..64, columns: 0..128, k_blocks: 4..5 }),
    },
    Fault {
        name: "the accumulator is cleared by every instruction: only the last 32 of a block count",
        seen: "tile-ai/tilelang #2627",
        plant: cleared_each_step,
        named: &[
            "only last 32|group*|step*|instruction*|slice*",
            "clear*|zeroed|reset*|overwrit* each|every group*|step*|instruction*|32",
        ],
        place: None,
    },
    Fault {
        name: "the accumulator is not cleared after promotion",
        seen: "tile-ai/tilelang #2617",
        plant: never_cleared,
        named: &[
            "accumul*|partial*|sum* not|never clear*|zero*|reset*",
            "accumul*|partial*|sum* stale|carried|kept|running|runs|continues",
        ],
        place: None,
    },
    Fault {
        name: "the second tile starts from the first tile's accumulators",
        seen: "NVIDIA/cutlass #2995",
        plant: previous_tile,
        named: &[
            "accumul*|starts|start previous|preceding|first|neighbour*|left tile*|columns",
            "tile* previous|preceding added|accumul*|start*|carried|overlap*",
        ],
        place: None,
    },
];

fn no_promotion() -> CaseFile {
    let op = GemmFp8 {
        a_tile: [None, None],
        b_block: [None, None],
        ..GemmFp8::hopper(64, 128, 512, F32)
    };
    let gemm = Gemm::of(31, op);
    let d = promote(&partials(&gemm.a, &gemm.b, 512, &HOPPER), |i, j, _| gemm.scale(i, j, 0));
    gemm.file(d)
}

fn promotion_32() -> CaseFile {
    let gemm = Gemm::blockwise(32, [64, 128, 512], Bf16);
    let quarters = partials(&gemm.a, &gemm.b, 32, &HOPPER);
    let d = promote(&quarters, |i, j, quarter| gemm.scale(i, j, quarter / 4));
    gemm.file(d)
}

fn with_core(seed: u64, d: Format, core: &Accumulator) -> CaseFile {
    let gemm = Gemm::blockwise(seed, [64, 128, 512], d);
    let d = gemm.promoted(&partials(&gemm.a, &gemm.b, 128, core));
    gemm.file(d)
}

fn ada_steps() -> CaseFile {
    with_core(33, F32, &Accumulator::tensor_core(16, 13, Output::E8M13))
}

fn fp32_chain() -> CaseFile {
    with_core(34, F32, &Accumulator::FP32_FMA)
}

fn bf16_partials() -> CaseFile {
    let gemm = Gemm::blockwise(35, [64, 128, 512], F32);
    let rounded: Vec<_> = gemm.partials().iter().map(|p| p.map(|&x| to_bf16(x).to_f32())).collect();
    let d = gemm.promoted(&rounded);
    gemm.file(d)
}

fn unfused() -> CaseFile {
    let gemm = Gemm::blockwise(36, [64, 128, 512], F32);
    let mut d = Array2::<f32>::zeros((64, 128));
    for (block, partial) in gemm.partials().iter().enumerate() {
        for ((i, j), acc) in d.indexed_iter_mut() {
            *acc += gemm.scale(i, j, block) * partial[[i, j]];
        }
    }
    gemm.file(d)
}

fn cut_output() -> CaseFile {
    let gemm = Gemm::blockwise(37, [64, 128, 512], Bf16);
    let d = gemm.promoted(&gemm.partials()).map(|&x| cut_bf16(x));
    gemm.file_bf16(d)
}

/// The promoted sums of every `length` K blocks.
fn slices(gemm: &Gemm, length: usize) -> Vec<Array2<f32>> {
    let sums = gemm.partials();
    let parts = sums.chunks(length).enumerate();
    parts
        .map(|(slice, sums)| promote(sums, |i, j, block| gemm.scale(i, j, slice * length + block)))
        .collect()
}

fn split_bf16() -> CaseFile {
    let gemm = Gemm::blockwise(38, [64, 128, 512], Bf16);
    let [first, second] = slices(&gemm, 2).try_into().unwrap();
    let [first, second] = [first, second].map(|x| x.map(|&x| to_bf16(x).to_f32()));
    gemm.file(first + second)
}

fn split_f32() -> CaseFile {
    let gemm = Gemm::blockwise(39, [64, 128, 1024], F32);
    let [a, b, c, d] = slices(&gemm, 2).try_into().unwrap();
    gemm.file(a + b + c + d)
}

fn dequantised() -> CaseFile {
    let gemm = Gemm::blockwise(40, [64, 128, 512], Bf16);
    let value = |code: u8| E4M3(code).to_f32();
    let a = Array2::from_shape_fn((64, 512), |(i, k)| value(gemm.a[[i, k]]) * gemm.sa(i, k / 128));
    let b = Array2::from_shape_fn((128, 512), |(j, k)| value(gemm.b[[j, k]]) * gemm.sb(j, k / 128));
    let mut d = Array2::zeros((64, 128));
    product_bf16(a.view(), b.view(), &mut d, Accumulate::Overwrite);
    gemm.file(d)
}

fn tail_left_out() -> CaseFile {
    let gemm = Gemm::blockwise(41, [64, 128, 576], F32);
    let d = gemm.promoted(&gemm.partials()[..4]);
    gemm.file(d)
}

fn cleared_each_step() -> CaseFile {
    let gemm = Gemm::blockwise(42, [64, 128, 512], Bf16);
    let steps = partials(&gemm.a, &gemm.b, 32, &HOPPER);
    let last: Vec<_> = steps.into_iter().skip(3).step_by(4).collect();
    let d = gemm.promoted(&last);
    gemm.file(d)
}

/// The tensor core runs on over all of K; each promotion takes what it holds by then.
fn never_cleared() -> CaseFile {
    let gemm = Gemm::blockwise(43, [64, 128, 512], Bf16);
    let runs = |blocks: usize| {
        let own = s![.., ..blocks * 128];
        product(gemm.a.slice(own), gemm.b.slice(own), &HOPPER)
    };
    let running: Vec<_> = (1..=4).map(runs).collect();
    let d = gemm.promoted(&running);
    gemm.file(d)
}

fn previous_tile() -> CaseFile {
    let gemm = Gemm::blockwise(44, [64, 256, 512], Bf16);
    let sums = gemm.partials();
    let mut d = gemm.promoted(&sums);
    let mut second = Array2::from_shape_fn((64, 256), |(i, j)| d[[i, j % 128]]);
    for (block, sum) in sums.iter().enumerate() {
        for ((i, j), acc) in second.indexed_iter_mut() {
            *acc = gemm.scale(i, j, block).mul_add(sum[[i, j]], *acc);
        }
    }
    patch(&mut d, &second, 0..64, 128..256);
    gemm.file(d)
}
