//! The table of what casts to FP8 do otherwise.

use fathom_numerics::formats::{Layout, Special};

use super::{Amax, Block, Case, Divide, Floor, From, NanTo, Narrow, Round, Scale, Stored, Variant};
use crate::diagnose::hypothesis::{Row, each, one, one_if};

/// The table, for documentation.
pub(in crate::diagnose) fn table() -> Vec<[&'static str; 3]> {
    ROWS.iter().map(|r| [r.name, r.meaning, r.seen]).collect()
}

/// E4M3FNUZ: bias 8, largest 240, one NaN where -0 would be.
pub(super) const E4M3_FNUZ: Layout = Layout { bias: 8, special: Special::None, ..Layout::E4M3 };

/// A size, or the whole dimension.
fn size(n: usize) -> String {
    if n == usize::MAX { "all".to_owned() } else { n.to_string() }
}

#[derive(Clone)]
struct Named<T>(String, T);

impl<T> std::fmt::Display for Named<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

fn blocks(c: &Case) -> Vec<Named<Block>> {
    let all = usize::MAX;
    let (m, k) = c.shape;
    let given = c.block;
    let tiles = k.div_ceil(given.columns.min(k.max(1))).max(1);
    let rows = m.div_ceil(given.rows.min(m.max(1))).max(1);
    let mut sizes = vec![
        (1, 16),
        (1, 32),
        (1, 64),
        (1, 128),
        (1, 256),
        (1, 512),
        (1, all),
        (32, 1),
        (64, 1),
        (128, 1),
        (all, 1),
        (16, 16),
        (32, 32),
        (64, 64),
        (64, 128),
        (128, 64),
        (128, 128),
        (256, 128),
        (128, 256),
        (all, all),
    ];
    // The dimension divided by the number of blocks, where the last block is shorter.
    sizes.extend([(given.rows, k / tiles), (given.rows, k.div_ceil(tiles))]);
    sizes.extend([(m / rows, given.columns), (m.div_ceil(rows), given.columns)]);
    sizes.retain(|s| s.0 > 0 && s.1 > 0);
    let named = |(rows, columns)| {
        Named(format!("{} x {}", size(rows), size(columns)), Block { rows, columns })
    };
    sizes.into_iter().map(named).collect()
}

pub(super) const ROWS: &[Row<Case, Variant>] = &[
    Row {
        axis: "division",
        name: "multiplication by the reciprocal of the scale",
        meaning: "x * (1 / scale) is rounded twice where x / scale is rounded once.",
        seen: "aiter PR #5259",
        changes: |_| one(|v| v.divide = Divide::Reciprocal),
    },
    Row {
        axis: "division",
        name: "multiplication by max_of_format / amax",
        meaning: "The inverse scale is computed from amax, not from the stored scale.",
        seen: "",
        changes: |_| one(|v| v.divide = Divide::Inverse),
    },
    Row {
        axis: "division",
        name: "multiplication by the scale",
        meaning: "Scale and inverse are confused.",
        seen: "ROCm/vllm PR #381",
        changes: |_| one(|v| v.divide = Divide::Multiply),
    },
    Row {
        axis: "division",
        name: "no division",
        meaning: "x is cast as it is; the scale is only stored.",
        seen: "",
        changes: |_| one(|v| v.divide = Divide::Not),
    },
    Row {
        axis: "rounding",
        name: "the cast {}",
        meaning: "The quotient is rounded to the format in another direction.",
        seen: "SGLang PR #40581",
        changes: |_| {
            let all = [
                ("truncates", Round::TowardZero),
                ("rounds down", Round::Down),
                ("rounds up", Round::Up),
                ("rounds ties away from zero", Round::TiesAway),
            ];
            each(all.map(|(n, r)| Named(n.to_owned(), r)), |v, Named(_, r)| v.round = r)
        },
    },
    Row {
        axis: "saturation",
        name: "the cast does not saturate",
        meaning: "Quotients beyond the largest value become NaN or infinity.",
        seen: "ROCm/vllm PR #381",
        changes: |_| one(|v| v.saturate = f32::INFINITY),
    },
    Row {
        axis: "saturation",
        name: "the cast saturates from {} on",
        meaning: "Quotients from there on become the largest value.",
        seen: "SGLang PR #40581",
        changes: |_| each([128.0f32, 224.0, 240.0, 256.0], |v, s| v.saturate = s),
    },
    Row {
        axis: "NaN",
        name: "NaN cast to {}",
        meaning: "A NaN quotient (of a NaN, or 0/0) becomes this code: clamping by min and max loses \
                  it.",
        seen: "",
        changes: |_| {
            let all = [
                ("zero", NanTo::Code(0)),
                ("the largest value", NanTo::Largest(false)),
                ("minus the largest value", NanTo::Largest(true)),
                ("NaN with the sign set", NanTo::Negative),
            ];
            each(all.map(|(n, r)| Named(n.to_owned(), r)), |v, Named(_, n)| v.nan = n)
        },
    },
    Row {
        axis: "format",
        name: "cast to {}",
        meaning: "The codes are of another format, with its own largest value.",
        seen: "vLLM PR #7210",
        changes: |c| {
            let all = [("e4m3", Layout::E4M3), ("e5m2", Layout::E5M2), ("e4m3fnuz", E4M3_FNUZ)];
            let usable = c.one_byte;
            let all = all.into_iter().filter(|_| usable);
            each(all.map(|(n, l)| Named(n.to_owned(), l)), |v, Named(_, l)| v.layout = l)
        },
    },
    Row {
        axis: "largest value",
        name: "scaled to a largest value of {}",
        meaning: "Scales are made for another largest value than the format's.",
        seen: "DeepEP (ROCm) PR #17",
        changes: |_| {
            each([1.0f32, 127.0, 224.0, 240.0, 256.0, 416.0, 448.0, 57344.0, 65504.0], |v, m| {
                v.largest = Some(m)
            })
        },
    },
    Row {
        axis: "scale",
        name: "kind of scale: {}",
        meaning: "Scales are other numbers: any FP32, powers of two (UE8M0) rounded in some \
                  direction, BF16 or FP16.",
        seen: "SGLang PR #31210, aiter PR #3212, onnxruntime PR #32122",
        changes: |_| {
            let all = [
                ("FP32 scales", Scale::F32),
                ("power-of-two scales, rounded up", Scale::Pow2Up),
                ("power-of-two scales, rounded down", Scale::Pow2Down),
                ("power-of-two scales, to nearest", Scale::Pow2Nearest),
                ("power-of-two scales, rounded up from 1.5", Scale::Pow2Half),
                ("power-of-two scales, exact powers doubled", Scale::Pow2Above),
                ("power-of-two scales of amax's exponent (OCP MX)", Scale::OcpMx),
                ("scales rounded to BF16", Scale::Bf16),
                ("scales rounded to FP16", Scale::F16),
                ("scale 1 everywhere", Scale::One),
            ];
            each(all.map(|(n, s)| Named(n.to_owned(), s)), |v, Named(_, s)| v.scale = s)
        },
    },
    Row {
        axis: "scale order",
        name: "codes by the unrounded scale",
        meaning: "x is divided by the scale before that is rounded to a power of two, so stored scale \
                  and codes do not match.",
        seen: "Transformers PR #46763",
        changes: |_| one(|v| v.codes_by_unrounded = true),
    },
    Row {
        axis: "underflow",
        name: "subnormal scales are zero",
        meaning: "A scale below the smallest normal FP32 underflows to zero: flushed, or its exponent \
                  field is 0.",
        seen: "",
        changes: |_| one(|v| v.underflow = true),
    },
    Row {
        axis: "amax floor",
        name: "no floor of amax",
        meaning: "Nothing keeps the scale of an all-zero or tiny tile from 0 or from underflow; 0/0 is \
                  NaN.",
        seen: "kernels-community issue #681, torchao issue #4713",
        changes: |_| one(|v| v.floor = Floor::At(0.0)),
    },
    Row {
        axis: "amax floor",
        name: "no floor of amax, and subnormal scales are zero",
        meaning: "The scale of a tile of tiny values underflows to 0, and x/0 is infinite.",
        seen: "kernels-community issue #681",
        changes: |_| {
            one(|v| {
                v.floor = Floor::At(0.0);
                v.underflow = true;
            })
        },
    },
    Row {
        axis: "amax floor",
        name: "amax floor {}",
        meaning: "amax is bounded below by another number.",
        seen: "kernels-community PR #680",
        changes: |_| {
            let all = [1e-30f32, 1e-12, 1e-10, 1e-9, 1e-8, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2];
            each(all.map(|f| Named(format!("{f:e}"), f)), |v, Named(_, f)| v.floor = Floor::At(f))
        },
    },
    Row {
        axis: "amax floor",
        name: "scale 1 where amax is 0",
        meaning: "An all-zero tile gets scale 1 instead of the floor's.",
        seen: "aiter issue #4289",
        changes: |_| one(|v| v.floor = Floor::OneForZero),
    },
    Row {
        axis: "amax floor",
        name: "scale floor {}",
        meaning: "The scale is bounded below, not amax.",
        seen: "torchao PR #4762",
        changes: |c| {
            let all = [1.0, f32::MIN_POSITIVE, 1e-12, 1e-10, 1e-8, 1e-6, 1e-5, 1e-4, c.floor];
            each(all.map(|f| Named(format!("{f:e}"), f)), |v, Named(_, f)| {
                v.floor = Floor::OfScale(f)
            })
        },
    },
    Row {
        axis: "amax floor",
        name: "{} added to amax",
        meaning: "An epsilon is added where a bound is meant.",
        seen: "",
        changes: |c| {
            let all = [1e-12f32, 1e-10, 1e-8, 1e-6, 1e-5, 1e-4, c.floor];
            each(all.map(|f| Named(format!("{f:e}"), f)), |v, Named(_, f)| {
                v.floor = Floor::Added(f)
            })
        },
    },
    Row {
        axis: "amax",
        name: "amax without the magnitude (the largest signed value)",
        meaning: "Negative elements do not count for amax.",
        seen: "",
        changes: |_| one(|v| v.amax = Amax::Signed),
    },
    Row {
        axis: "amax",
        name: "amax that a NaN makes NaN",
        meaning: "A NaN in the block makes its scale NaN, where the contract leaves it out.",
        seen: "",
        changes: |_| one(|v| v.amax = Amax::KeepsNan),
    },
    Row {
        axis: "amax",
        name: "amax rounded to BF16",
        meaning: "The maximum passes through BF16 before the scale is made.",
        seen: "",
        changes: |_| one(|v| v.amax = Amax::Bf16),
    },
    Row {
        axis: "amax",
        name: "amax of {} of each tile",
        meaning: "Part of the tile does not count for amax: a reduction over lanes is cut short.",
        seen: "",
        changes: |c| {
            let width = c.block.columns.min(c.shape.1);
            let firsts = [width / 4, width / 2, width * 3 / 4, width.saturating_sub(1), 32];
            let firsts = firsts.into_iter().filter(|n| *n > 0 && *n < width);
            let mut all: Vec<_> =
                firsts.map(|n| Named(format!("the first {n} columns"), Amax::First(n))).collect();
            all.push(Named("every second column".to_owned(), Amax::EverySecond));
            each(all, |v, Named(_, a)| v.amax = a)
        },
    },
    Row {
        axis: "block",
        name: "amax over {}",
        meaning: "Another set of elements shares a scale: another block shape, or a dimension divided \
                  by the number of blocks.",
        seen: "vLLM PRs #46593 and #49596",
        changes: |c| each(blocks(c), |v, Named(_, b)| v.block = b),
    },
    Row {
        axis: "block",
        name: "amax over runs of {} in memory",
        meaning: "Tiles are counted through memory and run over the ends of rows.",
        seen: "",
        changes: |c| {
            let tile = c.block.columns;
            let usable = c.block.rows == 1 && c.shape.1 % tile.min(c.shape.1.max(1)) != 0;
            each([tile].into_iter().filter(|_| usable), |v, _| v.flat = true)
        },
    },
    Row {
        axis: "used scale",
        name: "codes by the scale of {}",
        meaning: "x is divided by another block's scale; the stored scales are right.",
        seen: "",
        changes: |_| {
            let all = [
                ("the next tile", From::Next(1)),
                ("the tile before", From::Next(-1)),
                ("the next row", From::Row(1)),
                ("the row before", From::Row(-1)),
                ("the row's first tile", From::First),
                ("the tile before in the last tile", From::TailBefore),
                ("the row's first tile in the last tile", From::TailFirst),
            ];
            each(all.map(|(n, f)| Named(n.to_owned(), f)), |v, Named(_, f)| v.from = f)
        },
    },
    Row {
        axis: "input",
        name: "x rounded to {} first",
        meaning: "The input passes through a narrower type.",
        seen: "",
        changes: |_| {
            let all = [("BF16", Narrow::Bf16), ("FP16", Narrow::F16)];
            each(all.map(|(n, f)| Named(n.to_owned(), f)), |v, Named(_, n)| v.input = n)
        },
    },
    Row {
        axis: "quotient",
        name: "quotient rounded to {} before the cast",
        meaning: "x / scale passes through a narrower type, so it is rounded twice.",
        seen: "",
        changes: |_| {
            let all = [("BF16", Narrow::Bf16), ("FP16", Narrow::F16)];
            each(all.map(|(n, f)| Named(n.to_owned(), f)), |v, Named(_, n)| v.quotient = n)
        },
    },
    Row {
        axis: "stored scale",
        name: "the reciprocal of the scale stored",
        meaning: "What is stored multiplies x, not the codes.",
        seen: "",
        changes: |_| one(|v| v.stored = Stored::Reciprocal),
    },
    Row {
        axis: "stored scale",
        name: "the inverse scale, max_of_format / amax, stored",
        meaning: "What is stored is the number that multiplies x, made of amax by a division of its \
                  own.",
        seen: "tritonbench PR #1145",
        changes: |_| one(|v| v.stored = Stored::Inverse),
    },
    Row {
        axis: "block and stored scale",
        name: "amax over {}, the last one's scale stored",
        meaning: "Parts of a block find amax each for itself; their scales overwrite each other.",
        seen: "",
        changes: |c| {
            let (rows, columns) = (c.block.rows.min(c.shape.0), c.block.columns.min(c.shape.1));
            let parts = [2, 4, 8].into_iter().flat_map(|n| {
                let of_rows = (rows % n == 0).then(|| (rows / n, columns));
                [of_rows, (columns % n == 0).then(|| (rows, columns / n))]
            });
            let named = parts.flatten().map(|(rows, columns)| {
                Named(format!("{rows} x {columns}"), Block { rows, columns })
            });
            each(named.collect::<Vec<_>>(), |v, Named(_, b)| {
                v.block = b;
                v.stored = Stored::Last;
            })
        },
    },
    Row {
        axis: "stored scale",
        name: "scales stored transposed",
        meaning: "Scales lie with the other dimension contiguous, as TMA wants them.",
        seen: "DeepGEMM issues #33 and #289",
        changes: |_| one(|v| v.stored = Stored::Transposed),
    },
    Row {
        axis: "stored scale",
        name: "amax stored for the scale",
        meaning: "The division by the largest value of the format is missing in what is stored.",
        seen: "",
        changes: |_| one(|v| v.stored = Stored::Amax),
    },
    Row {
        axis: "stored scale",
        name: "scales stored rounded to BF16",
        meaning: "Codes are made by the FP32 scale; what is stored is narrower.",
        seen: "",
        changes: |_| one(|v| v.stored = Stored::Bf16),
    },
    Row {
        axis: "stored scale",
        name: "scales stored unrounded",
        meaning: "Codes are made by the power of two; the FP32 number is stored.",
        seen: "Transformers PR #46763",
        changes: |_| one(|v| v.stored = Stored::Unrounded),
    },
    Row {
        axis: "stored scale",
        name: "exponents stored for scales",
        meaning: "The byte of UE8M0 is stored as a number instead of the power of two.",
        seen: "",
        changes: |_| one(|v| v.stored = Stored::Exponent),
    },
    Row {
        axis: "subnormals",
        name: "subnormal results flushed to zero",
        meaning: "Quotients below the smallest normal of the format become zero.",
        seen: "",
        changes: |_| one(|v| v.flush = true),
    },
    Row {
        axis: "subnormals",
        name: "subnormal inputs flushed to zero",
        meaning: "Subnormal FP32 elements of x count as zero (ftz).",
        seen: "",
        changes: |_| one(|v| v.flush_input = true),
    },
    Row {
        axis: "zeros",
        name: "negative zeros lose their sign",
        meaning: "-0, and what underflows to it, becomes +0.",
        seen: "",
        changes: |c| one_if(c.one_byte, |v| v.positive_zero = true),
    },
];
