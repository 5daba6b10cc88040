//! Casts to FP8: scales from the wrong maximum or rounded wrongly, codes rounded wrongly.

use fathom_conformance::case_file::CaseFile;
use fathom_numerics::formats::{E4M3, Format, Overflow, Rounding, to_bf16};
use fathom_numerics::quant::ScaleKind;
use fathom_reference::Tensor;
use fathom_reference::ops::quantize_block::QuantizeBlock;
use fathom_reference::ops::quantize_tile::QuantizeTile;
use fathom_trace::DType;
use ndarray::{Array2, s};

use super::Fault;
use super::data::{Random, bf16_tensor, case_file, rounded};

pub const FAULTS: &[Fault] = &[
    Fault {
        name: "x is multiplied by the scale's reciprocal",
        seen: "sgl-project/sglang #4362",
        plant: reciprocal,
        named: &["reciprocal*", "inverse* multipl*|times", "1 scale multipl*|times"],
        place: None,
    },
    Fault {
        name: "x is multiplied by 448 / amax",
        seen: "sgl-project/sglang #32616",
        plant: max_over_amax,
        named: &["448|max*|largest amax multipl*|times"],
        place: None,
    },
    Fault {
        name: "the power of two is the one below the quotient",
        seen: "inclusionAI/humming #39",
        plant: floor_power,
        named: &["power* two below|down|floor*|largest|cut|truncat*", "scale* down|floor*|below"],
        place: None,
    },
    Fault {
        name: "frexp: quotients that are powers of two give the next one",
        seen: "microsoft/onnxruntime #32122",
        plant: frexp_power,
        named: &["power* two twice|doubled|strictly|frexp|exact*", "scale* strictly|frexp"],
        place: None,
    },
    Fault {
        name: "the largest value is taken to be 224",
        seen: "sgl-project/sglang #30900",
        plant: max_224,
        named: &["224"],
        place: None,
    },
    Fault {
        name: "codes are cut, not rounded",
        seen: "NVlabs/cutile-rs #250",
        plant: cut,
        named: &["truncat*|cut|rz", "toward zero"],
        place: None,
    },
    Fault {
        name: "ties are rounded away from zero",
        seen: "sgl-project/sglang #40581",
        plant: ties_away,
        named: &["ties|half|halves away|up"],
        place: None,
    },
    Fault {
        name: "everything from 256 on saturates",
        seen: "sgl-project/sglang #40581",
        plant: early_saturation,
        named: &["satur*|clamp*|448|largest 256", "top|highest|last binade|exponent"],
        place: None,
    },
    Fault {
        name: "amax of the tile's first half only",
        seen: "after vllm-project/vllm-xpu-kernels #520",
        plant: half_amax,
        named: &["amax|maximum|scale* half|64"],
        place: None,
    },
    Fault {
        name: "the largest element, not the largest magnitude",
        seen: "from the contract",
        plant: signed_maximum,
        named: &["amax|maximum|max|scale* sign*|positive|absolute|negative*|abs"],
        place: None,
    },
    Fault {
        name: "another floor under amax: 1e-10",
        seen: "ROCm/TransformerEngine #737",
        plant: other_floor,
        named: &["floor*|eps*|amax_floor 1e-10", "amax_floor|floor* other|another|lower|no|none|0"],
        place: None,
    },
    Fault {
        name: "subnormal codes are flushed to zero",
        seen: "tenstorrent/tt-metal #29734",
        plant: flushed,
        named: &["subnormal*|denormal* flush*|zero*"],
        place: None,
    },
    Fault {
        name: "the scale's reciprocal is stored",
        seen: "meta-pytorch/tritonbench #1145",
        plant: scale_inverted,
        named: &["scale* inver*|reciprocal* stored|output*|written|itself"],
        place: None,
    },
    Fault {
        name: "groups behind the last 16 are not written",
        seen: "sgl-project/sglang #4231",
        plant: groups_not_written,
        named: &[
            "not written",
            "zero*|left|skipped|missing|unwritten rows|group*|tile* last|28|29",
        ],
        place: None,
    },
    Fault {
        name: "the quotient is rounded to BF16 before the cast",
        seen: "from the contract",
        plant: twice_rounded,
        named: &["bf16 quotient|twice|double|before|first|intermediate|through|via"],
        place: None,
    },
    Fault {
        name: "halves of 64 rows find amax each for itself, the second's scale is kept",
        seen: "from the contract",
        plant: half_block,
        named: &["amax|maximum|scale* half|halves|64"],
        place: None,
    },
];

const TILE: usize = 128;
const FLOOR: f32 = 1e-4;

fn amax(tile: &[f32]) -> f32 {
    tile.iter().fold(0.0, |top, x| top.max(x.abs()))
}

fn quotient(tile: &[f32]) -> f32 {
    amax(tile).max(FLOOR) / 448.0
}

/// The smallest power of two that is not below x.
fn power(x: f32) -> f32 {
    let below = f32::from_bits(x.to_bits() & 0x7F80_0000);
    if x == below { x } else { 2.0 * below }
}

fn nearest(x: f32, scale: f32) -> u8 {
    E4M3::saturating(x / scale).0
}

/// Tile by tile: the scale from the tile, the code from an element, the scale and the tile's amax.
fn tiles(
    x: &Array2<f32>,
    scale: impl Fn(&[f32]) -> f32,
    code: impl Fn(f32, f32, f32) -> u8,
) -> [Tensor; 2] {
    let (m, k) = x.dim();
    let mut codes = Array2::<u8>::zeros((m, k));
    let mut scales = Array2::<f32>::zeros((m, k.div_ceil(TILE)));
    for i in 0..m {
        let row = x.row(i).to_vec();
        for (block, tile) in row.chunks(TILE).enumerate() {
            let (own, top) = (scale(tile), amax(tile));
            scales[[i, block]] = own;
            for (c, &x) in tile.iter().enumerate() {
                codes[[i, block * TILE + c]] = code(x, own, top);
            }
        }
    }
    [Tensor::from_array(codes).reinterpret(DType::F8E4M3), Tensor::from_array(scales)]
}

fn file(x: &Array2<f32>, scale: ScaleKind, [q, scales]: [Tensor; 2]) -> CaseFile {
    let op = QuantizeTile { format: Format::E4M3, tile: TILE, scale, amax_floor: FLOOR };
    case_file(op, &[("x", bf16_tensor(x))], &[("q", q), ("scale", scales)])
}

fn activations(seed: u64, rows: usize, columns: usize) -> Array2<f32> {
    rounded(&Random::new(seed).activations(rows, columns))
}

/// The contract's output, by this file's loops.
pub fn without_fault() -> CaseFile {
    let x = activations(920, 40, 500);
    let out = tiles(&x, |tile| power(quotient(tile)), |x, scale, _| nearest(x, scale));
    file(&x, ScaleKind::Pow2, out)
}

fn reciprocal() -> CaseFile {
    let x = activations(101, 128, 1024);
    let out = tiles(&x, quotient, |x, scale, _| E4M3::saturating(x * (1.0 / scale)).0);
    file(&x, ScaleKind::F32, out)
}

fn max_over_amax() -> CaseFile {
    let x = activations(102, 128, 1024);
    let out = tiles(&x, quotient, |x, _, top| E4M3::saturating(x * (448.0 / top.max(FLOOR))).0);
    file(&x, ScaleKind::F32, out)
}

fn floor_power() -> CaseFile {
    let x = activations(103, 64, 512);
    let below = |tile: &[f32]| f32::from_bits(quotient(tile).to_bits() & 0x7F80_0000);
    file(&x, ScaleKind::Pow2, tiles(&x, below, |x, scale, _| nearest(x, scale)))
}

fn frexp_power() -> CaseFile {
    let x = activations(104, 128, 1024);
    let next = |tile: &[f32]| f32::from_bits((quotient(tile).to_bits() & 0x7F80_0000) + (1 << 23));
    file(&x, ScaleKind::Pow2, tiles(&x, next, |x, scale, _| nearest(x, scale)))
}

fn max_224() -> CaseFile {
    let x = activations(105, 64, 512);
    let scale = |tile: &[f32]| amax(tile).max(FLOOR) / 224.0;
    let out = tiles(&x, scale, |x, scale, _| E4M3::saturating((x / scale).clamp(-224.0, 224.0)).0);
    file(&x, ScaleKind::F32, out)
}

fn cut() -> CaseFile {
    let x = activations(106, 64, 512);
    let out = tiles(&x, quotient, |x, scale, _| {
        E4M3::from_f32(x / scale, Rounding::TowardZero, Overflow::Saturate).0
    });
    file(&x, ScaleKind::F32, out)
}

/// Half a unit added to the magnitude, the rest cut.
fn ties_away() -> CaseFile {
    let x = activations(107, 64, 512);
    let code = |x: f32, scale: f32, _: f32| {
        let q = x / scale;
        let down = E4M3::from_f32(q, Rounding::TowardZero, Overflow::Saturate).0;
        let up = if down & 0x7F == 0x7E { down } else { down + 1 };
        let value = |code: u8| f64::from(E4M3(code).to_f32().abs());
        if f64::from(q.abs()) * 2.0 >= value(down) + value(up) { up } else { down }
    };
    file(&x, ScaleKind::Pow2, tiles(&x, |tile| power(quotient(tile)), code))
}

fn early_saturation() -> CaseFile {
    let x = activations(108, 64, 512);
    let code = |x: f32, scale: f32, _: f32| {
        let code = nearest(x, scale);
        if (x / scale).abs() >= 256.0 { code & 0x80 | 0x7E } else { code }
    };
    file(&x, ScaleKind::Pow2, tiles(&x, |tile| power(quotient(tile)), code))
}

fn half_amax() -> CaseFile {
    let x = activations(109, 64, 512);
    let out = tiles(&x, |tile| quotient(&tile[..TILE / 2]), |x, scale, _| nearest(x, scale));
    file(&x, ScaleKind::F32, out)
}

fn signed_maximum() -> CaseFile {
    let x = activations(110, 64, 512);
    let scale = |tile: &[f32]| tile.iter().fold(FLOOR, |top, &x| top.max(x)) / 448.0;
    file(&x, ScaleKind::F32, tiles(&x, scale, |x, scale, _| nearest(x, scale)))
}

/// Padded tokens: rows of zeros, and rows that a gate has all but closed.
fn other_floor() -> CaseFile {
    let mut x = activations(111, 64, 512);
    x.slice_mut(s![56.., ..]).fill(0.0);
    x.slice_mut(s![40..48, ..]).mapv_inplace(|x| to_bf16(x * 1e-7).to_f32());
    let scale = |tile: &[f32]| amax(tile).max(1e-10) / 448.0;
    file(&x, ScaleKind::F32, tiles(&x, scale, |x, scale, _| nearest(x, scale)))
}

fn flushed() -> CaseFile {
    let x = activations(112, 64, 512);
    let code = |x: f32, scale: f32, _: f32| {
        let code = nearest(x, scale);
        if code & 0x78 == 0 { code & 0x80 } else { code }
    };
    file(&x, ScaleKind::F32, tiles(&x, quotient, code))
}

fn scale_inverted() -> CaseFile {
    let x = activations(113, 64, 512);
    let [q, _] = tiles(&x, quotient, |x, scale, _| nearest(x, scale));
    let [_, inverse] = tiles(&x, |tile| 448.0 / amax(tile).max(FLOOR), |_, _, _| 0);
    file(&x, ScaleKind::F32, [q, inverse])
}

/// 30 rows of 4 groups; launches of 16 groups cover 112 of the 120.
fn groups_not_written() -> CaseFile {
    let x = activations(114, 30, 512);
    let [mut q, mut scale] = tiles(&x, quotient, |x, scale, _| nearest(x, scale));
    let mut codes = q.reinterpret(DType::U8);
    codes.as_mut_slice::<u8>()[112 * TILE..].fill(0);
    scale.as_mut_slice::<f32>()[112..].fill(0.0);
    q = codes.reinterpret(DType::F8E4M3);
    file(&x, ScaleKind::F32, [q, scale])
}

fn twice_rounded() -> CaseFile {
    let x = activations(115, 64, 512);
    let code = |x: f32, scale: f32, _: f32| E4M3::saturating(to_bf16(x / scale).to_f32()).0;
    file(&x, ScaleKind::F32, tiles(&x, quotient, code))
}

fn half_block() -> CaseFile {
    let x = Random::new(116).weights(128, 256);
    let scale = |half: usize, block: usize| {
        let own = x.slice(s![half * 64..(half + 1) * 64, block * 128..(block + 1) * 128]);
        quotient(&own.iter().copied().collect::<Vec<_>>())
    };
    let q = Array2::from_shape_fn(x.dim(), |(i, c)| nearest(x[[i, c]], scale(i / 64, c / 128)));
    let scales = Array2::from_shape_fn((1, 2), |(_, block)| scale(1, block));
    let op = QuantizeBlock {
        format: Format::E4M3,
        block: [Some(128), Some(128)],
        scale: ScaleKind::F32,
        amax_floor: FLOOR,
    };
    let q = Tensor::from_array(q).reinterpret(DType::F8E4M3);
    let outputs = [("q", q), ("scale", Tensor::from_array(scales))];
    case_file(op, &[("x", Tensor::from_array(x))], &outputs)
}
