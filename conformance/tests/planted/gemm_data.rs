//! FP8 GEMMs that multiply the wrong codes: stale stages of the pipeline, shared memory read
//! without its swizzle, formats taken for others; and stores that go beside the output.

use fathom_conformance::case_file::CaseFile;
use fathom_numerics::formats::Format;
use ndarray::{Array2, s};

use super::data::{partials, patch};
use super::gemm::{Gemm, HOPPER};
use super::{Fault, Place};
use Format::{Bf16, F32};

pub const FAULTS: &[Fault] = &[
    Fault {
        name: "the second tile's K block 3 is multiplied from the stage that held K block 0",
        seen: "tile-ai/tilelang #2785",
        plant: stale_stage,
        named: &["k block* 3 block 0 stale|data|instead|again|operands|read*|holds|takes"],
        place: Some(Place { rows: 0..64, columns: 128..256, k_blocks: 3..4 }),
    },
    Fault {
        name: "the producer overwrites a stage too early: one warpgroup's A is 3 K blocks ahead",
        seen: "after AMD-AGI/Primus-Turbo #308",
        plant: overwritten_stage,
        named: &["k block* 1 4 overwritten|data|instead|ahead|operands|read*|holds|takes"],
        place: Some(Place { rows: 64..128, columns: 0..128, k_blocks: 1..2 }),
    },
    Fault {
        name: "a missing barrier: the second warpgroup's B is already the next K block's",
        seen: "tile-ai/tilelang #2613",
        plant: next_b,
        named: &["b k block* 2 3|next instead|data|ahead|operands|read*|holds|takes"],
        place: Some(Place { rows: 64..128, columns: 0..128, k_blocks: 2..3 }),
    },
    Fault {
        name: "an all-zero A stage: the copy of K block 0 did not arrive in time for one tile",
        seen: "after HazyResearch/HipKittens #40",
        plant: late_copy,
        named: &["k block* 0 left|dropped|missing|skipped|absent|zero*|not|without"],
        place: Some(Place { rows: 32..64, columns: 0..128, k_blocks: 0..1 }),
    },
    Fault {
        name: "a K loop rounded down: one output tile misses its last two K blocks",
        seen: "ggml-org/llama.cpp #8311",
        plant: stream_k_rounding,
        named: &["k block* 4 5 left|dropped|missing|skipped|absent|not|without"],
        place: Some(Place { rows: 0..64, columns: 64..128, k_blocks: 4..6 }),
    },
    Fault {
        name: "the last tile's columns beyond N are stored into the next row",
        seen: "huggingface/kernels-community #1153",
        plant: overhang,
        named: &[
            "next|following row*",
            "overhang*|beyond|past n|column*|row*",
            "zero* columns 0 55|56",
            "not written columns 0 55|56",
        ],
        place: None,
    },
    Fault {
        name: "A is read from shared memory without its swizzle",
        seen: "thecodacus/llama.cpp #12",
        plant: no_swizzle,
        named: &["swizzle*", "16 chunk*|permut*|xor* k|a"],
        place: None,
    },
    Fault {
        name: "E4M3FN codes are taken for E4M3FNUZ: every product is a quarter",
        seen: "ROCm/TransformerEngine #485",
        plant: fnuz,
        named: &["fnuz|e4m3fnuz", "bias 8", "quarter|0.25", "factor|divided 4"],
        place: None,
    },
    Fault {
        name: "subnormal codes of both operands count as zero",
        seen: "after tenstorrent/tt-metal #29734",
        plant: subnormals_flushed,
        named: &["subnormal*|denormal* zero*|flush*|codes|dropped"],
        place: None,
    },
];

/// The right sums with, in one tile, those of a K block from other codes.
fn one_block(gemm: &Gemm, a: &Array2<u8>, b: &Array2<u8>, place: &Place) -> Array2<f32> {
    let (mut sums, wrong) = (gemm.partials(), partials(a, b, 128, &HOPPER));
    for block in place.k_blocks.clone() {
        patch(&mut sums[block], &wrong[block], place.rows.clone(), place.columns.clone());
    }
    gemm.promoted(&sums)
}

/// The codes with K block `to` replaced by K block `from`.
fn moved(codes: &Array2<u8>, from: usize, to: usize) -> Array2<u8> {
    let mut other = codes.clone();
    let block = codes.slice(s![.., from * 128..(from + 1) * 128]);
    other.slice_mut(s![.., to * 128..(to + 1) * 128]).assign(&block);
    other
}

fn stale_stage() -> CaseFile {
    let gemm = Gemm::blockwise(61, [64, 256, 512], F32);
    let place = Place { rows: 0..64, columns: 128..256, k_blocks: 3..4 };
    let d = one_block(&gemm, &moved(&gemm.a, 0, 3), &moved(&gemm.b, 0, 3), &place);
    gemm.file(d)
}

fn overwritten_stage() -> CaseFile {
    let gemm = Gemm::blockwise(62, [128, 192, 640], Bf16);
    let place = Place { rows: 64..128, columns: 0..128, k_blocks: 1..2 };
    let d = one_block(&gemm, &moved(&gemm.a, 4, 1), &gemm.b, &place);
    gemm.file(d)
}

fn next_b() -> CaseFile {
    let gemm = Gemm::blockwise(63, [128, 128, 512], F32);
    let place = Place { rows: 64..128, columns: 0..128, k_blocks: 2..3 };
    let d = one_block(&gemm, &gemm.a, &moved(&gemm.b, 3, 2), &place);
    gemm.file(d)
}

fn late_copy() -> CaseFile {
    let gemm = Gemm::blockwise(64, [64, 256, 512], Bf16);
    let place = Place { rows: 32..64, columns: 0..128, k_blocks: 0..1 };
    let d = one_block(&gemm, &Array2::zeros(gemm.a.raw_dim()), &gemm.b, &place);
    gemm.file(d)
}

fn stream_k_rounding() -> CaseFile {
    let gemm = Gemm::blockwise(65, [128, 192, 768], F32);
    let place = Place { rows: 0..64, columns: 64..128, k_blocks: 4..6 };
    let d = one_block(&gemm, &Array2::zeros(gemm.a.raw_dim()), &gemm.b, &place);
    gemm.file(d)
}

/// Columns 200 to 255 of the second tile are zeros, as the copy fills what lies outside with them.
fn overhang() -> CaseFile {
    let gemm = Gemm::blockwise(66, [64, 200, 512], Bf16);
    let mut d = gemm.promoted(&gemm.partials());
    d.slice_mut(s![1.., ..56]).fill(0.0);
    gemm.file(d)
}

/// 128-byte rows in chunks of 16; the copy exchanged chunk c of row r for chunk c ^ (r % 8).
fn no_swizzle() -> CaseFile {
    let gemm = Gemm::blockwise(67, [64, 128, 512], Bf16);
    let a = Array2::from_shape_fn((64, 512), |(i, k)| gemm.a[[i, k ^ ((i % 8) << 4)]]);
    let d = gemm.promoted(&partials(&a, &gemm.b, 128, &HOPPER));
    gemm.file(d)
}

/// FNUZ has bias 8: its codes stand for half of FN's values. Loaders turn -0, FNUZ's NaN, into 0.
fn fnuz() -> CaseFile {
    let mut gemm = Gemm::blockwise(68, [64, 128, 512], Bf16);
    for codes in [&mut gemm.a, &mut gemm.b] {
        codes.mapv_inplace(|code| if code == 0x80 { 0 } else { code });
    }
    let d = gemm.promoted(&gemm.partials()) * 0.25;
    gemm.file(d)
}

fn subnormals_flushed() -> CaseFile {
    let gemm = Gemm::blockwise(69, [64, 128, 512], F32);
    let flush = |codes: &Array2<u8>| codes.map(|&c| if c & 0x78 == 0 { c & 0x80 } else { c });
    let d = gemm.promoted(&partials(&flush(&gemm.a), &flush(&gemm.b), 128, &HOPPER));
    gemm.file(d)
}
