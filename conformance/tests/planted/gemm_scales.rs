//! FP8 GEMMs whose sums are right and whose scales are not: the wrong one, or one read wrongly.

use fathom_conformance::case_file::CaseFile;
use fathom_numerics::formats::Format;
use fathom_numerics::mma::Accumulator;
use fathom_reference::ops::gemm_fp8::GemmFp8;

use super::Fault;
use super::data::{partials, promote};
use super::gemm::Gemm;
use Format::{Bf16, F32};

pub const FAULTS: &[Fault] = &[
    Fault {
        name: "split-K: the second slice takes the first slice's scales",
        seen: "NVIDIA/cutlass #3615",
        plant: slice_of_scales,
        named: &[
            "scale*|a_scale|b_scale slice*|split*",
            "scale*|a_scale|b_scale k block* modulo|repeat*|restart*|wrap*|again",
            "scale*|a_scale|b_scale blocks 0 1 2 3",
        ],
        place: None,
    },
    Fault {
        name: "the trailing K block is added without its scales",
        seen: "pytorch/FBGEMM #6159",
        plant: trailing_unscaled,
        named: &[
            "last|trailing k block* scale*|a_scale|b_scale not|without|unscaled|missing|never|no",
            "k block* 4 scale*|a_scale|b_scale not|without|unscaled|missing|never|no",
            "unscaled k block*",
        ],
        place: None,
    },
    Fault {
        name: "four K blocks share the scales of the first of them",
        seen: "mlc-ai/TIRx-kernels #5",
        plant: first_of_four,
        named: &[
            "scale*|a_scale|b_scale first four|4",
            "scale*|a_scale|b_scale every|each four|4|512",
            "scale*|a_scale|b_scale 512",
        ],
        place: None,
    },
    Fault {
        name: "the pointer to the scales never advances along K",
        seen: "sgl-project/sglang #20819",
        plant: never_advances,
        named: &[
            "scale*|a_scale|b_scale first block",
            "scale*|a_scale|b_scale k block* 0 every|all|each|throughout",
            "scale*|a_scale|b_scale never|not advance*",
        ],
        place: None,
    },
    Fault {
        name: "threadblock swizzle: scale rows by launch coordinates, data by logical ones",
        seen: "NVIDIA/cutlass #3394",
        plant: raw_coordinates,
        named: &[
            "scale*|a_scale|b_scale tile*|coordinate* swizzle*|launch|another|other|wrong|permut*",
        ],
        place: None,
    },
    Fault {
        name: "the scale product of the first M wave is multiplied into the second's",
        seen: "NVIDIA/cutlass #3596",
        plant: scale_of_both_waves,
        named: &[
            "scale*|a_scale|b_scale twice|wave*",
            "a_scale|scale* row*|tile*|block* previous|preceding|first multipl*|times|product|also|again",
        ],
        place: None,
    },
    Fault {
        name: "a's scales are cut to a power of two",
        seen: "sgl-project/sglang #39193",
        plant: mantissa_cut,
        named: &[
            "a_scale|scale* power* two cut|truncat*|down|floor*|below",
            "a_scale|scale* ue8m0 cut|truncat*|down|floor*|below",
            "a_scale|scale* mantissa*|fraction* cut|truncat*|drop*",
        ],
        place: None,
    },
    Fault {
        name: "scales are raised to powers of two, codes stay",
        seen: "huggingface/transformers #47030",
        plant: raised_to_powers,
        named: &[
            "scale*|a_scale|b_scale power* two up|next|ceil*|raised|above",
            "scale*|a_scale|b_scale ue8m0 up|next|ceil*|raised|above",
        ],
        place: None,
    },
    Fault {
        name: "a's scales lie K-major and are read M-major",
        seen: "sgl-project/sglang #29038",
        plant: a_scale_other_major,
        named: &["a_scale|scale* transpos*|major|layout|stride*"],
        place: None,
    },
    Fault {
        name: "b's scales are transposed in memory",
        seen: "vllm-project/vllm #44630",
        plant: b_scale_transposed,
        named: &["b_scale|scale* transpos*|major|layout|stride*"],
        place: None,
    },
    Fault {
        name: "rows of weights were reordered on load, their scales were not",
        seen: "sgl-project/sglang #35703",
        plant: b_scale_rows_swapped,
        named: &[
            "b_scale|scale* rows|blocks|order swapped|exchanged|permut*|reorder*|revers*",
            "b_scale|scale* n|column* block* swapped|exchanged|permut*|reorder*|other|next|neighbour*",
        ],
        place: None,
    },
    Fault {
        name: "the scale block is taken as N / number of scales where the last block is partial",
        seen: "NVIDIA/TensorRT-Model-Connect #1115",
        plant: block_from_shape,
        named: &["b_scale|scale* block*|rows|columns 100 !64"],
        place: None,
    },
    Fault {
        name: "per-row scales: a's and b's are exchanged",
        seen: "ROCm/pytorch #2739",
        plant: operands_exchanged,
        named: &["scale*|a_scale|b_scale swapped|exchanged|interchanged|crossed"],
        place: None,
    },
    Fault {
        name: "K tiles of 64 count the scales, which are of 128",
        seen: "tile-ai/TileOPs #1666",
        plant: index_of_64,
        named: &[
            "scale*|a_scale|b_scale k|interval|indexed|counted 64",
            "scale*|a_scale|b_scale tile|index|step half|twice",
        ],
        place: None,
    },
    Fault {
        name: "shards of 64 rows: scale offsets are rounded up",
        seen: "vllm-project/vllm #52997",
        plant: shard_offset,
        named: &["b_scale|scale* 64", "b_scale|scale* columns|rows|n next|following|offset|shift*"],
        place: None,
    },
    Fault {
        name: "a fragment's rows r and r + 8 both take the scale of row r",
        seen: "from the contract",
        plant: fragment_rows,
        named: &["a_scale|scale* row* 8"],
        place: None,
    },
    Fault {
        name: "weight scales were stored as BF16",
        seen: "from the contract",
        plant: b_scale_bf16,
        named: &["b_scale|scale* bf16"],
        place: None,
    },
];

fn slice_of_scales() -> CaseFile {
    let gemm = Gemm::blockwise(1, [64, 128, 512], Bf16);
    let d = promote(&gemm.partials(), |i, j, block| gemm.scale(i, j, block % 2));
    gemm.file(d)
}

fn trailing_unscaled() -> CaseFile {
    let gemm = Gemm::blockwise(2, [64, 128, 640], F32);
    let last = gemm.blocks() - 1;
    let d = promote(
        &gemm.partials(),
        |i, j, block| {
            if block == last { 1.0 } else { gemm.scale(i, j, block) }
        },
    );
    gemm.file(d)
}

fn first_of_four() -> CaseFile {
    let gemm = Gemm::blockwise(3, [32, 128, 768], Bf16);
    let d = promote(&gemm.partials(), |i, j, block| gemm.scale(i, j, block / 4 * 4));
    gemm.file(d)
}

fn never_advances() -> CaseFile {
    let gemm = Gemm::blockwise(4, [64, 128, 512], Bf16);
    let d = promote(&gemm.partials(), |i, j, _| gemm.scale(i, j, 0));
    gemm.file(d)
}

/// `GemmIdentityThreadblockSwizzle<2>` launches `(2 m, n / 2)` tiles for `(m, n)`; a row of scales
/// behind the last is what lies there, here the first again.
fn raw_coordinates() -> CaseFile {
    let gemm = Gemm::blockwise(5, [128, 256, 512], F32);
    let d = promote(&gemm.partials(), |i, j, block| {
        let (tile_m, tile_n) = (i / 32, j / 128);
        let (x, y) = (2 * tile_m + tile_n % 2, tile_n / 2);
        gemm.sa(x % 4 * 32 + i % 32, block) * gemm.sb(y * 128, block)
    });
    gemm.file(d)
}

fn scale_of_both_waves() -> CaseFile {
    let op = GemmFp8 { a_tile: [Some(64), Some(128)], ..GemmFp8::hopper(128, 128, 512, F32) };
    let gemm = Gemm::of(6, op);
    let d = promote(&gemm.partials(), |i, j, block| {
        let own = gemm.scale(i, j, block);
        if i < 64 { own } else { gemm.sa(i, block) * gemm.scale(0, j, block) }
    });
    gemm.file(d)
}

fn power_below(x: f32) -> f32 {
    f32::from_bits(x.to_bits() & 0x7F80_0000)
}

fn power_above(x: f32) -> f32 {
    if x == power_below(x) { x } else { 2.0 * power_below(x) }
}

fn mantissa_cut() -> CaseFile {
    let gemm = Gemm::blockwise(7, [64, 128, 512], Bf16);
    let d =
        promote(&gemm.partials(), |i, j, block| power_below(gemm.sa(i, block)) * gemm.sb(j, block));
    gemm.file(d)
}

fn raised_to_powers() -> CaseFile {
    let gemm = Gemm::blockwise(8, [64, 128, 512], Bf16);
    let d = promote(&gemm.partials(), |i, j, block| {
        power_above(gemm.sa(i, block)) * power_above(gemm.sb(j, block))
    });
    gemm.file(d)
}

fn a_scale_other_major() -> CaseFile {
    let gemm = Gemm::blockwise(9, [64, 128, 512], Bf16);
    let stored: Vec<f32> = gemm.a_scale.iter().copied().collect();
    let d = promote(&gemm.partials(), |i, j, block| stored[block * 64 + i] * gemm.sb(j, block));
    gemm.file(d)
}

fn b_scale_transposed() -> CaseFile {
    let gemm = Gemm::blockwise(10, [32, 256, 512], F32);
    let stored: Vec<f32> = gemm.b_scale.iter().copied().collect();
    let d =
        promote(&gemm.partials(), |i, j, block| gemm.sa(i, block) * stored[block * 2 + j / 128]);
    gemm.file(d)
}

fn b_scale_rows_swapped() -> CaseFile {
    let gemm = Gemm::blockwise(11, [64, 256, 512], Bf16);
    let d = promote(&gemm.partials(), |i, j, block| gemm.sa(i, block) * gemm.sb(255 - j, block));
    gemm.file(d)
}

fn block_from_shape() -> CaseFile {
    let gemm = Gemm::blockwise(12, [64, 200, 512], Bf16);
    let d =
        promote(&gemm.partials(), |i, j, block| gemm.sa(i, block) * gemm.b_scale[[j / 100, block]]);
    gemm.file(d)
}

fn operands_exchanged() -> CaseFile {
    let op = GemmFp8 {
        a_tile: [Some(1), None],
        b_block: [Some(1), None],
        ..GemmFp8::hopper(128, 128, 512, Bf16)
    };
    let gemm = Gemm::of(13, op);
    let d = promote(&gemm.partials(), |i, j, _| gemm.sa(j, 0) * gemm.sb(i, 0));
    gemm.file(d)
}

fn index_of_64() -> CaseFile {
    let gemm = Gemm::blockwise(14, [64, 128, 512], Bf16);
    let halves = partials(&gemm.a, &gemm.b, 64, &Accumulator::HOPPER_FP8);
    let last = gemm.blocks() - 1;
    let d = promote(&halves, |i, j, tile| gemm.scale(i, j, tile.min(last)));
    gemm.file(d)
}

fn shard_offset() -> CaseFile {
    let gemm = Gemm::blockwise(15, [64, 256, 512], F32);
    let d = promote(&gemm.partials(), |i, j, block| {
        let row = (j / 64 * 64).div_ceil(128).min(1);
        gemm.sa(i, block) * gemm.b_scale[[row, block]]
    });
    gemm.file(d)
}

fn fragment_rows() -> CaseFile {
    let gemm = Gemm::blockwise(16, [64, 128, 512], Bf16);
    let d = promote(&gemm.partials(), |i, j, block| gemm.scale(i & !8, j, block));
    gemm.file(d)
}

fn b_scale_bf16() -> CaseFile {
    let gemm = Gemm::blockwise(17, [64, 128, 512], F32);
    let d = promote(&gemm.partials(), |i, j, block| {
        gemm.sa(i, block) * half::bf16::from_f32(gemm.sb(j, block)).to_f32()
    });
    gemm.file(d)
}
