//! The table of what GEMMs do otherwise.

use fathom_numerics::formats::{Format, Rounding};
use fathom_numerics::gemm::Promote;
use fathom_numerics::mma::{Accumulator, Output};
use fathom_reference::ops::gemm_fp8::AccumulateInto;

use super::problem::{Operand, Out, Problem};
use super::variant::{
    BlockOf, Blocks, Cast, Dealt, End, Expert, Narrow, Order, Place, Reading, RowOf, ScaleOf,
    ScaleValue, Scaling, Split, Variant,
};
use crate::diagnose::hypothesis::{Change, Row, each, one, one_if};

/// The table, for documentation.
pub(in crate::diagnose) fn table() -> Vec<[&'static str; 3]> {
    ROWS.iter().map(|r| [r.name, r.meaning, r.seen]).collect()
}

type Rows = Vec<Change<Variant>>;

/// A choice with its name, for a row's parameter.
#[derive(Clone)]
struct Named<T>(String, T);

impl<T> std::fmt::Display for Named<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

const OPERANDS: [&str; 2] = ["a", "b"];

fn operand(p: &Problem, which: usize) -> &Operand {
    if which == 0 { &p.a } else { &p.b }
}

/// A change of the scales of either operand, where it has more than one.
fn scales(p: &Problem, set: fn(&mut ScaleOf)) -> Rows {
    scales_where(p, |_| true, set)
}

fn scales_where(p: &Problem, sense: fn(&Operand) -> bool, set: fn(&mut ScaleOf)) -> Rows {
    let which = [0, 1].into_iter().filter(|&w| p.is_fp8() && sense(operand(p, w)));
    let named = which.map(|w| Named(OPERANDS[w].to_owned(), (w, set)));
    each(named, |v, Named(_, (w, set))| set(&mut v.scales[w]))
}

/// A change of the scales of either operand for each parameter that the operand gives.
fn scales_each<P: Clone + Send + Sync + 'static>(
    p: &Problem,
    parameters: fn(&Operand, &Problem) -> Vec<(String, P)>,
    set: fn(&mut ScaleOf, P),
) -> Rows {
    let of = |w: usize| {
        let named = parameters(operand(p, w), p).into_iter();
        named.map(move |(words, x)| Named(format!("{}|{words}", OPERANDS[w]), (w, x, set)))
    };
    let all = [0, 1].into_iter().filter(|_| p.is_fp8()).flat_map(of);
    each(all.collect::<Vec<_>>(), |v, Named(_, (w, x, set))| set(&mut v.scales[w], x))
}

/// A change of how either operand is read.
fn operands<P: Copy + Send + Sync + 'static>(
    parameters: impl Fn(usize) -> Vec<(&'static str, P)>,
    set: fn(&mut Variant, usize, P),
) -> Rows {
    let of = |w: usize| {
        let all = parameters(w).into_iter();
        all.map(move |(words, x)| Named(format!("{}|{words}", OPERANDS[w]), (w, x, set)))
    };
    let all: Vec<_> = [0, 1].into_iter().flat_map(of).collect();
    each(all, |v, Named(_, (w, x, set))| set(v, w, x))
}

fn many_blocks(x: &Operand) -> bool {
    x.scale_columns > 1
}

fn many_rows(x: &Operand) -> bool {
    x.scale_rows > 1
}

fn accumulator(bits: u32) -> Accumulator {
    let output = if bits < 23 { Output::F32 { fraction_bits: bits } } else { Output::FULL };
    Accumulator::tensor_core(32, bits, output)
}

/// Promotion intervals that make sense and the scales they would need.
fn spanning(p: &Problem, end: End) -> Rows {
    let intervals = [256, 384, 512, 1024].into_iter().filter(|&i| i < p.k && !p.uniform_over(i));
    let named = intervals.map(|i| Named(i.to_string(), (i, end)));
    let mut all: Vec<_> = named.collect();
    if !p.uniform_over(p.k) {
        all.push(Named("all of K".into(), (p.k, end)));
    }
    let usable = p.is_fp8();
    each(all.into_iter().filter(|_| usable), |v, Named(_, (i, end))| {
        v.core.interval = i;
        v.end = end;
    })
}

fn numbered(blocks: usize) -> std::ops::Range<usize> {
    0..blocks.min(64)
}

fn unaligned(p: &Problem, to: &[usize]) -> Vec<usize> {
    to.iter().copied().filter(|t| !p.k.is_multiple_of(*t) && p.k > *t).collect()
}

/// Quotients of an extent by its number of blocks that are not the block itself.
fn quotients(extent: usize, blocks: usize, block: usize) -> Vec<usize> {
    let mut all = vec![extent / blocks.max(1), extent.div_ceil(blocks.max(1))];
    all.dedup();
    all.retain(|q| *q != block && *q > 0 && blocks > 1);
    all
}

pub(super) const ROWS: &[Row<Problem, Variant>] = &[
    // The tensor core.
    Row {
        axis: "accumulator",
        name: "accumulator of {} fraction bits",
        meaning: "Products are aligned and summed with another width than this architecture's.",
        seen: "DeepGEMM issues #37 and #176",
        changes: |p| {
            each([10, 12, 13, 14, 22, 23, 25, 33].into_iter().filter(|_| p.is_fp8()), |v, bits| {
                v.core.accumulator = accumulator(bits)
            })
        },
    },
    Row {
        axis: "accumulator",
        name: "exact accumulator, rounded to FP32 every group",
        meaning: "Each group of 32 products is summed exactly and rounded once to nearest.",
        seen: "",
        changes: |_| one(|v| v.core.accumulator = Accumulator::EXACT),
    },
    Row {
        axis: "accumulator",
        name: "FP32 accumulator, one fma a product",
        meaning: "CUDA cores sum product after product in FP32: no tensor core.",
        seen: "",
        changes: |_| one(|v| v.core.accumulator = Accumulator::FP32_FMA),
    },
    Row {
        axis: "accumulator",
        name: "FP16 accumulator",
        meaning: "The tensor core accumulates in FP16 (`.f16` as the type of D).",
        seen: "TransformerEngine issue #758",
        changes: |p| {
            one_if(p.is_fp8(), |v| {
                v.core.accumulator = Accumulator::tensor_core(32, 13, Output::F16)
            })
        },
    },
    Row {
        axis: "accumulator",
        name: "FP8 mma.sync of sm_90",
        meaning: "The kernel uses mma.sync, which Hopper runs as F16 products, and not wgmma.",
        seen: "",
        changes: |p| one_if(p.is_fp8(), |v| v.core.mma_sync = true),
    },
    Row {
        axis: "group",
        name: "groups of {} products",
        meaning: "The tensor core sums another number of products in a step.",
        seen: "",
        changes: |_| each([4, 8, 16, 32, 64, 128], |v, g| v.core.accumulator.group = g),
    },
    Row {
        axis: "rounding",
        name: "{}",
        meaning: "Terms or sums of the tensor core are rounded in another direction.",
        seen: "",
        changes: |_| {
            use Rounding::{NearestEven as Rn, TowardZero as Rz};
            let named = [
                ("alignment to nearest", (Rn, Rz)),
                ("group results to nearest", (Rz, Rn)),
                ("alignment and group results to nearest", (Rn, Rn)),
                ("truncation throughout", (Rz, Rz)),
            ];
            each(named.map(|(n, r)| Named(n.to_owned(), r)), |v, Named(_, r)| {
                (v.core.accumulator.align, v.core.accumulator.round) = r
            })
        },
    },
    Row {
        axis: "order within",
        name: "groups descending within a K block",
        meaning: "The tensor core works off a K block from its last group to its first.",
        seen: "",
        changes: |_| one(|v| v.core.groups_descending = true),
    },
    // Promotion.
    Row {
        axis: "promotion interval",
        name: "promotion interval {}",
        meaning: "Partial sums leave the tensor core after another number of elements of K.",
        seen: "CUTLASS PR #3149",
        changes: |p| {
            let fits = |i: &usize| *i < p.k && p.uniform_over(*i);
            each([16, 32, 64, 128, 256, 512, 1024, 2048].into_iter().filter(fits), |v, i| {
                v.core.interval = i
            })
        },
    },
    Row {
        axis: "promotion interval",
        name: "no promotion",
        meaning: "The tensor core keeps the sum over all of K: fast accumulation.",
        seen: "Triton PR #2300, FlashAttention PR #2250",
        changes: |p| {
            let k = p.k;
            each([Named(String::new(), k)].into_iter().filter(|_| p.uniform_over(k)), |v, n| {
                v.core.interval = n.1
            })
        },
    },
    Row {
        axis: "promotion interval",
        name: "promotion interval {} with the first block's scales",
        meaning: "The tensor core sums over several K blocks; the sum gets the first one's scales.",
        seen: "TileOPs PR #1666",
        changes: |p| spanning(p, End::First),
    },
    Row {
        axis: "promotion interval",
        name: "promotion interval {} with the last block's scales",
        meaning: "The tensor core sums over several K blocks; the sum gets the last one's scales.",
        seen: "TileOPs PR #1666",
        changes: |p| spanning(p, End::Last),
    },
    Row {
        axis: "promotion interval",
        name: "promotion interval {} with its number as the scales' index",
        meaning: "The loop's counter indexes the scales although an iteration spans several of their \
                  blocks.",
        seen: "TileOPs PR #1666",
        changes: |p| spanning(p, End::Counted),
    },
    Row {
        axis: "scaling",
        name: "promotion by {}",
        meaning: "Scale and partial sum enter the accumulator by another sequence of operations.",
        seen: "",
        changes: |p| {
            let named = [
                ("fma", Promote::Fma),
                ("separate multiply and add", Promote::MulAdd),
                ("both scales in turn", Promote::ScalesInTurn),
            ];
            let usable = p.is_fp8();
            let named = named.into_iter().filter(|_| usable);
            each(named.map(|(n, p)| Named(n.to_owned(), p)), |v, Named(_, p)| {
                v.scaling = Scaling::AtPromotion(p)
            })
        },
    },
    Row {
        axis: "scaling",
        name: "scales applied before, operands in {}",
        meaning: "Operands are dequantised first and multiplied in a wider type.",
        seen: "vllm-xpu-kernels PR #436",
        changes: |p| {
            let named = [
                ("BF16", Scaling::BeforeBf16),
                ("FP16", Scaling::BeforeF16),
                ("FP32", Scaling::BeforeFp32),
            ];
            let usable = p.is_fp8();
            let named = named.into_iter().filter(|_| usable);
            each(named.map(|(n, s)| Named(n.to_owned(), s)), |v, Named(_, s)| v.scaling = s)
        },
    },
    Row {
        axis: "scaling",
        name: "the first block's scales applied at the end",
        meaning: "All partial sums are added unscaled; the total gets the first K block's scales.",
        seen: "",
        changes: |p| one_if(p.is_fp8(), |v| v.scaling = Scaling::AtTheEnd),
    },
    Row {
        axis: "partial sums",
        name: "partial sums rounded to {}",
        meaning: "What leaves the tensor core passes through a narrower type before promotion.",
        seen: "",
        changes: |_| each(narrow(), |v, Named(_, n)| v.partial = n),
    },
    Row {
        axis: "accumulator type",
        name: "accumulator kept in {}",
        meaning: "The accumulator of the promotions is rounded to a narrower type after each.",
        seen: "FlagGems PR #5876",
        changes: |_| each(narrow(), |v, Named(_, n)| v.accumulator = n),
    },
    // Which scale.
    Row {
        axis: "scales",
        name: "{}_scale shifted to the next K block",
        meaning: "Each K block takes the scale of the block behind it: the pipeline stage is off by \
                  one.",
        seen: "",
        changes: |p| scales_where(p, many_blocks, |s| s.block = BlockOf::Next(1)),
    },
    Row {
        axis: "scales",
        name: "{}_scale shifted to the K block before",
        meaning: "Each K block takes the scale of the block before it: the pipeline stage is off by \
                  one.",
        seen: "",
        changes: |p| scales_where(p, many_blocks, |s| s.block = BlockOf::Next(-1)),
    },
    Row {
        axis: "scales",
        name: "{}_scale of the first K block everywhere",
        meaning: "The scale's K index is never advanced: one scale a row.",
        seen: "",
        changes: |p| scales_where(p, many_blocks, |s| s.block = BlockOf::Always(0)),
    },
    Row {
        axis: "scales",
        name: "{}_scale of the last K block everywhere",
        meaning: "One scale a row, the last K block's: it overwrote the others.",
        seen: "",
        changes: |p| scales_where(p, many_blocks, |s| s.block = BlockOf::Always(usize::MAX)),
    },
    Row {
        axis: "scales",
        name: "last K block with {}_scale of block {}",
        meaning: "The tail of K takes another block's scale, as of a scale index that wrapped or was \
                  clamped.",
        seen: "FBGEMM issue #6159",
        changes: |p| {
            scales_each(
                p,
                |x, _| {
                    let last = x.scale_columns - 1;
                    numbered(last).map(|b| (b.to_string(), b)).collect()
                },
                |s, b| s.block = BlockOf::LastTakes(b),
            )
        },
    },
    Row {
        axis: "scales",
        name: "{}_scale of block {} in block {}",
        meaning: "A single K block takes a neighbour's or the first block's scale.",
        seen: "",
        changes: |p| {
            scales_each(
                p,
                |x, _| {
                    let blocks = x.scale_columns;
                    // Of few blocks every pair; of many, neighbours and the first.
                    let near = |b: usize, from: usize| from == 0 || b.abs_diff(from) == 1;
                    let all = numbered(blocks).flat_map(|b| numbered(blocks).map(move |f| (b, f)));
                    let pairs = all.filter(|(b, f)| b != f && (blocks <= 8 || near(*b, *f)));
                    pairs.map(|x| (format!("{}|{}", x.1, x.0), x)).collect()
                },
                |s, (b, from)| s.block = BlockOf::OneTakes(b, from),
            )
        },
    },
    Row {
        axis: "scales",
        name: "the last K block without {}_scale",
        meaning: "The tail of K enters unscaled: its promotion is skipped.",
        seen: "FBGEMM issue #6159",
        changes: |p| scales_where(p, many_blocks, |s| s.value = ScaleValue::OneInLast),
    },
    Row {
        axis: "scales",
        name: "{}_scale of the {} blocks",
        meaning: "Neighbouring K blocks share the first or last one's scale: a packed word of scales \
                  is not advanced.",
        seen: "TIRx-kernels PR #5",
        changes: |p| {
            scales_each(
                p,
                |x, _| {
                    let fits = |n: &usize| *n < x.scale_columns.max(2) && x.scale_columns > 1;
                    let sizes: Vec<usize> = [2, 4, 8].into_iter().filter(fits).collect();
                    let first =
                        sizes.iter().map(|&n| (format!("first of every {n}"), BlockOf::FirstOf(n)));
                    let last =
                        sizes.iter().map(|&n| (format!("last of every {n}"), BlockOf::LastOf(n)));
                    first.chain(last).collect()
                },
                |s, block| s.block = block,
            )
        },
    },
    Row {
        axis: "scales",
        name: "{}_scale index counted by {} along K",
        meaning: "The scale's K index is K divided by another number than the block: K / number of \
                  blocks, say, or the kernel's own tile.",
        seen: "vLLM PR #46593, TileOPs PR #1666",
        changes: |p| {
            scales_each(
                p,
                |x, p| {
                    let block = x.block[1];
                    let q = quotients(p.k, x.scale_columns, block);
                    let all = q
                        .into_iter()
                        .chain([32, 64, 128, 256].into_iter().filter(|_| many_blocks(x)));
                    all.filter(|&n| n != block).map(|n| (n.to_string(), n)).collect()
                },
                |s, n| s.block = BlockOf::Of(n),
            )
        },
    },
    Row {
        axis: "scales",
        name: "{}_scale of the K block modulo {}",
        meaning: "The ring of scale stages is read modulo its depth and never refilled.",
        seen: "",
        changes: |p| {
            scales_each(
                p,
                |x, _| {
                    let fits = |n: &usize| *n < x.scale_columns;
                    let all = [2, 3, 4, 5, 6, 8].into_iter().filter(fits);
                    all.map(|n| (n.to_string(), n)).collect()
                },
                |s, n| s.block = BlockOf::Modulo(n),
            )
        },
    },
    Row {
        axis: "scales",
        name: "{}_scale in reverse along K",
        meaning: "Scales run against K.",
        seen: "",
        changes: |p| scales_where(p, many_blocks, |s| s.block = BlockOf::Reversed),
    },
    Row {
        axis: "scales",
        name: "{}_scale mapped to blocks of {} rows",
        meaning: "The scale's row index is the row divided by another number than the block: the \
                  number of rows / number of blocks, say, or the kernel's own tile.",
        seen: "vLLM PR #49596",
        changes: |p| {
            scales_each(
                p,
                |x, _| {
                    let q = quotients(x.rows, x.scale_rows, x.block[0]);
                    let others = [1, 16, 32, 64, 128, 192, 256].into_iter();
                    let all = q.into_iter().chain(others.filter(|_| many_rows(x)));
                    let all = all.filter(|&n| n != x.block[0]);
                    all.map(|n| (n.to_string(), n)).collect()
                },
                |s, n| s.row = RowOf::Of(n),
            )
        },
    },
    Row {
        axis: "scales",
        name: "{}_scale of the next row",
        meaning: "Scales are read one row too far.",
        seen: "",
        changes: |p| scales_where(p, many_rows, |s| s.row = RowOf::Next(1)),
    },
    Row {
        axis: "scales",
        name: "{}_scale of the row before",
        meaning: "Scales are read one row too early.",
        seen: "",
        changes: |p| scales_where(p, many_rows, |s| s.row = RowOf::Next(-1)),
    },
    Row {
        axis: "scales",
        name: "{}_scale of the first row everywhere",
        meaning: "The scale's row index does not enter: one scale a K block.",
        seen: "",
        changes: |p| scales_where(p, many_rows, |s| s.row = RowOf::Always(0)),
    },
    Row {
        axis: "scales",
        name: "{}_scale of the row modulo {}",
        meaning: "Scale rows repeat tile by tile: the tile's offset is missing.",
        seen: "",
        changes: |p| {
            scales_each(
                p,
                |x, _| {
                    let fits = |n: &usize| *n < x.scale_rows;
                    let all = [8, 16, 32, 64, 128].into_iter().filter(fits);
                    all.map(|n| (n.to_string(), n)).collect()
                },
                |s, n| s.row = RowOf::Modulo(n),
            )
        },
    },
    Row {
        axis: "scales",
        name: "one {}_scale for all",
        meaning: "The first scale is used everywhere: block scales taken as one a tensor.",
        seen: "",
        changes: |p| {
            scales(p, |s| {
                s.row = RowOf::Always(0);
                s.block = BlockOf::Always(0);
            })
        },
    },
    Row {
        axis: "scales",
        name: "{}_scale transposed",
        meaning: "Scales are read as if stored with the other dimension contiguous.",
        seen: "FlashInfer PR #2614, DeepGEMM issue #33",
        changes: |p| scales(p, |s| s.transposed = true),
    },
    Row {
        axis: "scales",
        name: "{}_scale ignored",
        meaning: "The scale does not enter the result.",
        seen: "",
        changes: |p| scales(p, |s| s.value = ScaleValue::One),
    },
    Row {
        axis: "scales",
        name: "a_scale and b_scale ignored",
        meaning: "Neither scale enters the result: the sum of the codes' values.",
        seen: "",
        changes: |p| {
            one_if(p.is_fp8(), |v| v.scales.iter_mut().for_each(|s| s.value = ScaleValue::One))
        },
    },
    Row {
        axis: "scales",
        name: "the first scales of a and b everywhere",
        meaning: "Both operands are taken as scaled by one number a tensor.",
        seen: "",
        changes: |p| {
            one_if(p.is_fp8(), |v| {
                for s in &mut v.scales {
                    (s.row, s.block) = (RowOf::Always(0), BlockOf::Always(0));
                }
            })
        },
    },
    Row {
        axis: "scales",
        name: "the first K block's a_scale and b_scale everywhere",
        meaning: "Neither scale's K index is advanced.",
        seen: "TIRx-kernels PR #5",
        changes: |p| {
            one_if(p.is_fp8(), |v| v.scales.iter_mut().for_each(|s| s.block = BlockOf::Always(0)))
        },
    },
    Row {
        axis: "scales",
        name: "last K block with both scales of {}",
        meaning: "The tail of K takes another block's scales of both operands.",
        seen: "FBGEMM issue #6159",
        changes: |p| {
            let last = p.a.scale_columns.min(p.b.scale_columns) - 1;
            let blocks = numbered(if p.is_fp8() { last } else { 0 });
            each(blocks.map(|b| Named(format!("block {b}"), b)), |v, Named(_, b)| {
                v.scales.iter_mut().for_each(|s| s.block = BlockOf::LastTakes(b))
            })
        },
    },
    Row {
        axis: "scales",
        name: "both scales of the {} K block",
        meaning: "Each K block takes a neighbour's scales of both operands: the pipeline stage is off \
                  by one.",
        seen: "",
        changes: |p| {
            let named = [("next", 1isize), ("previous", -1)].into_iter();
            let named = named.filter(|_| p.is_fp8()).map(|(n, by)| Named(n.to_owned(), by));
            each(named, |v, Named(_, by)| {
                v.scales.iter_mut().for_each(|s| s.block = BlockOf::Next(by))
            })
        },
    },
    // The scale's value.
    Row {
        axis: "scale values",
        name: "{}_scale {}",
        meaning: "Scales pass through a narrower type: BF16, FP16, or a power of two (UE8M0), rounded \
                  in some direction.",
        seen: "SGLang issue #39193",
        changes: |p| {
            scales_each(
                p,
                |_, _| {
                    let all = [
                        ("rounded to BF16", ScaleValue::Bf16),
                        ("rounded to FP16", ScaleValue::F16),
                        ("rounded up to a power of two", ScaleValue::Pow2Up),
                        ("rounded down to a power of two", ScaleValue::Pow2Down),
                        ("rounded to the nearest power of two", ScaleValue::Pow2Nearest),
                        ("rounded to a power of two at 1.5", ScaleValue::Pow2Half),
                    ];
                    all.map(|(n, s)| (n.to_owned(), s)).to_vec()
                },
                |s, value| s.value = value,
            )
        },
    },
    Row {
        axis: "scale values",
        name: "both scales {}",
        meaning: "Scales of both operands pass through a narrower type: BF16, or a power of two \
                  (UE8M0).",
        seen: "SGLang issue #39193",
        changes: |p| {
            let all = [
                ("rounded to BF16", ScaleValue::Bf16),
                ("rounded to FP16", ScaleValue::F16),
                ("rounded up to a power of two", ScaleValue::Pow2Up),
                ("rounded down to a power of two", ScaleValue::Pow2Down),
                ("rounded to the nearest power of two", ScaleValue::Pow2Nearest),
                ("rounded to a power of two at 1.5", ScaleValue::Pow2Half),
                ("inverted", ScaleValue::Reciprocal),
                ("applied twice", ScaleValue::Squared),
            ];
            let named = all.into_iter().filter(|_| p.is_fp8());
            each(named.map(|(n, s)| Named(n.to_owned(), s)), |v, Named(_, value)| {
                v.scales.iter_mut().for_each(|s| s.value = value)
            })
        },
    },
    Row {
        axis: "scale values",
        name: "{}_scale inverted",
        meaning: "The kernel multiplies by the reciprocal of the scale: scale and inverse confused.",
        seen: "",
        changes: |p| scales(p, |s| s.value = ScaleValue::Reciprocal),
    },
    Row {
        axis: "scale values",
        name: "{}_scale applied twice",
        meaning: "The scale enters squared.",
        seen: "",
        changes: |p| scales(p, |s| s.value = ScaleValue::Squared),
    },
    Row {
        axis: "scale values",
        name: "{}_scale halved",
        meaning: "The operand counts half: E4M3FN codes taken as E4M3FNUZ, whose bias is one larger.",
        seen: "vLLM PR #7210",
        changes: |p| scales(p, |s| s.value = ScaleValue::Times(0.5)),
    },
    Row {
        axis: "scale values",
        name: "{}_scale doubled",
        meaning: "The operand counts double: E4M3FNUZ codes taken as E4M3FN, whose bias is one \
                  smaller.",
        seen: "vLLM PR #7210",
        changes: |p| scales(p, |s| s.value = ScaleValue::Times(2.0)),
    },
    // Operands.
    Row {
        axis: "formats",
        name: "a read as {}",
        meaning: "The bits of an operand are decoded as the other FP8 format.",
        seen: "",
        changes: |p| {
            let (e4, e5) = (Format::E4M3, Format::E5M2);
            let all = [(e4, e4), (e4, e5), (e5, e4), (e5, e5)];
            let given = (p.a.codes.format(), p.b.codes.format());
            let all = all.into_iter().filter(|f| p.is_fp8() && *f != given);
            each(all.map(|f| Named(format!("{} and b as {}", f.0, f.1), f)), |v, Named(_, f)| {
                v.core.readings = [Reading::As(f.0), Reading::As(f.1)]
            })
        },
    },
    Row {
        axis: "formats",
        name: "values of {} converted to {} first",
        meaning: "The values of an operand are rounded to the other FP8 format before the product.",
        seen: "",
        changes: |p| {
            operands(
                |w| match operand(p, w).codes.format() {
                    Format::E4M3 => vec![("E5M2", Format::E5M2)],
                    Format::E5M2 => vec![("E4M3", Format::E4M3)],
                    _ => vec![],
                },
                |v, w, f| v.core.readings[w] = Reading::ConvertedTo(f),
            )
        },
    },
    Row {
        axis: "formats",
        name: "values of a and b converted to {} first",
        meaning: "The values of both operands are rounded to one FP8 format before the product.",
        seen: "",
        changes: |p| {
            let all = [Format::E4M3, Format::E5M2].into_iter().filter(|_| p.is_fp8());
            each(all, |v, f| v.core.readings = [Reading::ConvertedTo(f); 2])
        },
    },
    Row {
        axis: "formats",
        name: "subnormals of {} count as zero",
        meaning: "Subnormal codes are flushed before the product.",
        seen: "",
        changes: |p| {
            let all = [("a", [true, false]), ("b", [false, true]), ("a and b", [true, true])];
            let all = all.into_iter().filter(|_| p.is_fp8());
            let named = all.map(|(n, f)| Named(n.to_owned(), f));
            each(named, |v, Named(_, flushed)| {
                for (reading, flushed) in v.core.readings.iter_mut().zip(flushed) {
                    if flushed {
                        *reading = Reading::Flushed;
                    }
                }
            })
        },
    },
    Row {
        axis: "formats",
        name: "sign of {} ignored",
        meaning: "The operand's sign bit is lost.",
        seen: "",
        changes: |p| {
            operands(
                |_| if p.is_fp8() { vec![("", ())] } else { vec![] },
                |v, w, ()| v.core.readings[w] = Reading::Unsigned,
            )
        },
    },
    Row {
        axis: "operands",
        name: "{} with {} along K",
        meaning: "Elements of one operand lie in another order along K than those of the other, as \
                  after a wrong shuffle or byte order.",
        seen: "",
        changes: |_| {
            operands(
                |_| {
                    vec![
                        ("neighbours exchanged", Reading::PairsExchanged),
                        ("every four reversed", Reading::WordsReversed),
                    ]
                },
                |v, w, r| v.core.readings[w] = r,
            )
        },
    },
    Row {
        axis: "operands",
        name: "{} transposed in memory",
        meaning: "The operand's memory is read as if the other dimension were contiguous: a missing \
                  or superfluous transpose.",
        seen: "",
        changes: |_| operands(|_| vec![("", ())], |v, w, ()| v.core.places[w] = Place::Transposed),
    },
    Row {
        axis: "operands",
        name: "{} of the {} row",
        meaning: "The operand is read one row off.",
        seen: "",
        changes: |_| {
            operands(
                |_| vec![("next", 1isize), ("previous", -1)],
                |v, w, by| v.core.places[w] = Place::Row(by),
            )
        },
    },
    Row {
        axis: "operands",
        name: "{} read {}",
        meaning: "One operand is read some elements of K off against the other: a stale or early \
                  pipeline stage.",
        seen: "",
        changes: |_| {
            operands(
                |_| {
                    vec![
                        ("one block too far along K", 128isize),
                        ("one block too early along K", -128),
                        ("one group of 32 too far along K", 32),
                        ("one group of 32 too early along K", -32),
                        ("16 elements too far along K", 16),
                        ("16 elements too early along K", -16),
                        ("one element too far along K", 1),
                        ("one element too early along K", -1),
                    ]
                },
                |v, w, by| v.core.places[w] = Place::Along(by),
            )
        },
    },
    // Which part of K, in which order.
    Row {
        axis: "extent of K",
        name: "the tail of K below a multiple of {} dropped",
        meaning: "The loop over K runs K / tile times, rounded down.",
        seen: "CUTLASS issue #3536, tilelang issue #2381",
        changes: |p| {
            let sizes = unaligned(p, &[4, 8, 16, 32, 64, 128, 256, 512]);
            each(sizes, |v, t| v.core.extent = v.core.extent / t * t)
        },
    },
    Row {
        axis: "extent of K",
        name: "memory behind K read up to a multiple of {}",
        meaning: "The last tile of K is not masked: what follows in memory, the next row, enters.",
        seen: "Triton issue #630",
        changes: |p| {
            let sizes: Vec<usize> =
                [16, 32, 64, 128, 256].into_iter().filter(|t| !p.k.is_multiple_of(*t)).collect();
            each(sizes, |v, t| v.core.extent = v.core.extent.next_multiple_of(t))
        },
    },
    Row {
        axis: "extent of K",
        name: "K block {} missing",
        meaning: "One block of 128 elements of K does not enter.",
        seen: "",
        changes: |p| each(numbered(p.k_blocks()), |v, b| v.blocks = Blocks::Without(b)),
    },
    Row {
        axis: "extent of K",
        name: "K block {} counted twice",
        meaning: "One block of 128 elements of K enters twice, as at the seam of two parts.",
        seen: "",
        changes: |p| each(numbered(p.k_blocks()), |v, b| v.blocks = Blocks::Twice(b)),
    },
    Row {
        axis: "extent of K",
        name: "all K blocks counted {} times",
        meaning: "The loop over K runs more than once, or onto an accumulator not cleared.",
        seen: "",
        changes: |_| each([2, 3, 4], |v, n| v.blocks = Blocks::Times(n)),
    },
    Row {
        axis: "extent of K",
        name: "only K block {}",
        meaning: "One block of 128 elements of K is all that enters: the accumulator is overwritten.",
        seen: "",
        changes: |p| {
            let last = p.k_blocks() - 1;
            each([0, last].into_iter().filter(|_| last > 0), |v, b| v.blocks = Blocks::Only(b))
        },
    },
    Row {
        axis: "extent of K",
        name: "K begins at block {}",
        meaning: "The first blocks of K do not enter: the accumulator is cleared once too late.",
        seen: "",
        changes: |p| each(numbered(p.k_blocks()).skip(2), |v, b| v.blocks = Blocks::From(b)),
    },
    Row {
        axis: "order",
        name: "{}",
        meaning: "K blocks are promoted in another order, which changes the roundings.",
        seen: "",
        changes: |_| {
            let named = [
                ("K blocks descending", Order::Descending),
                ("even K blocks before odd ones", Order::EvenFirst),
                ("even and odd K blocks in two accumulators", Order::TwoChains),
                ("promoted sums added by a tree", Order::Tree),
            ];
            each(named.map(|(n, o)| Named(n.to_owned(), o)), |v, Named(_, o)| v.order = o)
        },
    },
    Row {
        axis: "order",
        name: "K begins at block {} and wraps around",
        meaning: "K blocks are rotated, as for staggered tiles.",
        seen: "",
        changes: |p| each(numbered(p.k_blocks()).skip(1), |v, b| v.order = Order::From(b)),
    },
    Row {
        axis: "split",
        name: "split-K by {}, parts added in order{}",
        meaning: "Parts of K are summed apart and added in FP32.",
        seen: "",
        changes: |p| splits(p, (Narrow::F32, Narrow::F32), false),
    },
    Row {
        axis: "split",
        name: "split-K by {}, parts added from the last{}",
        meaning: "Parts of K are summed apart and added in FP32, last part first.",
        seen: "",
        changes: |p| splits(p, (Narrow::F32, Narrow::F32), true),
    },
    Row {
        axis: "split",
        name: "split-K by {}, parts added in BF16{}",
        meaning: "Parts of K are rounded to BF16 and added in it, as by atomics on the output.",
        seen: "Modular issue #7165, FlagGems PR #5876",
        changes: |p| splits(p, (Narrow::Bf16, Narrow::Bf16), false),
    },
    Row {
        axis: "split",
        name: "split-K by {}, parts added in FP16{}",
        meaning: "Parts of K are rounded to FP16 and added in it.",
        seen: "Liger-Kernel PR #185",
        changes: |p| splits(p, (Narrow::F16, Narrow::F16), false),
    },
    Row {
        axis: "split",
        name: "split-K by {}, parts in BF16 added in FP32{}",
        meaning: "Parts of K are stored in a BF16 workspace and added in FP32.",
        seen: "Modular issue #7165",
        changes: |p| splits(p, (Narrow::Bf16, Narrow::F32), false),
    },
    Row {
        axis: "split",
        name: "split-K by {}, FP32 parts added onto a BF16 output{}",
        meaning: "Each part is added to the output, which is rounded to BF16 every time.",
        seen: "b12x PR #277",
        changes: |p| splits(p, (Narrow::F32, Narrow::Bf16), false),
    },
    // The epilogue.
    Row {
        axis: "alpha",
        name: "output times {}",
        meaning: "The result is scaled by a constant: an epilogue's alpha, a scale applied twice or \
                  not at all.",
        seen: "MLX PR #2578",
        changes: |p| each(p.factors(), |v, alpha| v.alpha = alpha),
    },
    Row {
        axis: "epilogue",
        name: "ReLU before the cast",
        meaning: "Negative results became zero: an epilogue of another kernel.",
        seen: "",
        changes: |_| one(|v| v.relu = true),
    },
    Row {
        axis: "c",
        name: "c {}",
        meaning: "The old value of the output enters otherwise.",
        seen: "",
        changes: |p| {
            let all = [("ignored", 0.0f32), ("added twice", 2.0), ("subtracted", -1.0)];
            let all = all.into_iter().filter(|_| p.c.is_some());
            each(all.map(|(n, b)| Named(n.to_owned(), b)), |v, Named(_, b)| v.beta = b)
        },
    },
    Row {
        axis: "c",
        name: "{}",
        meaning: "The old value of the output enters first or last, which rounds otherwise.",
        seen: "",
        changes: |p| {
            let all = [
                ("the accumulator starts from c", AccumulateInto::Chain),
                ("c added at the end", AccumulateInto::AddAtEnd),
            ];
            let all = all.into_iter().filter(|_| p.c.is_some());
            each(all.map(|(n, b)| Named(n.to_owned(), b)), |v, Named(_, a)| v.accumulate = a)
        },
    },
    Row {
        axis: "cast",
        name: "output rounded to FP16 on the way",
        meaning: "The result passes through FP16: rounded to 10 fraction bits, infinite above 65504.",
        seen: "Liger-Kernel PR #185",
        changes: |_| one(|v| v.cast = Cast::Via(Narrow::F16)),
    },
    Row {
        axis: "cast",
        name: "output rounded to BF16 on the way",
        meaning: "The FP32 result passes through BF16.",
        seen: "",
        changes: |p| one_if(p.out == Out::F32, |v| v.cast = Cast::Via(Narrow::Bf16)),
    },
    Row {
        axis: "cast",
        name: "output truncated to BF16",
        meaning: "The low 16 bits are cut off instead of rounded.",
        seen: "",
        changes: |_| one(|v| v.cast = Cast::Truncated),
    },
    Row {
        axis: "cast",
        name: "output rounded half up to BF16",
        meaning: "0x8000 is added before the low 16 bits are cut off: ties go away from zero.",
        seen: "SGLang PR #40581",
        changes: |p| one_if(p.out == Out::Bf16, |v| v.cast = Cast::HalfUp),
    },
    // Experts.
    Row {
        axis: "expert",
        name: "weights of {}",
        meaning: "Rows are multiplied by another expert's weights and scales.",
        seen: "",
        changes: |p| {
            let experts = p.counts.len();
            let mut all = vec![];
            if experts > 1 {
                all.push(Named("the next expert".to_owned(), Expert::Next(1)));
                all.push(Named("the expert before".to_owned(), Expert::Next(-1)));
                let only = |e| Named(format!("expert {e} for all rows"), Expert::Only(e));
                all.extend((0..experts.min(64)).map(only));
            }
            each(all, |v, Named(_, e)| v.core.expert = e)
        },
    },
    Row {
        axis: "expert",
        name: "groups begin {}",
        meaning: "The boundaries between the experts' rows are off: rows near them get a neighbour's \
                  weights.",
        seen: "",
        changes: |p| {
            let rows = |n: isize| {
                let word = if n > 0 { "late" } else { "early" };
                let unit = if n.abs() == 1 { "row" } else { "rows" };
                Named(format!("{} {unit} too {word}", n.abs()), Expert::Offset(n))
            };
            let offsets = [1, -1, 2, -2, 8, -8, 16, -16, 64, -64, 128, -128].map(rows);
            let aligned = [8, 16, 32, 64, 128, 256]
                .map(|a| Named(format!("at multiples of {a} rows"), Expert::Aligned(a)));
            let all = offsets.into_iter().chain(aligned).filter(|_| p.counts.len() > 1);
            each(all.collect::<Vec<_>>(), |v, Named(_, e)| v.core.expert = e)
        },
    },
    Row {
        axis: "expert",
        name: "padding rows computed as the last expert's",
        meaning: "Rows behind the last group are multiplied although nobody owns them.",
        seen: "PyTorch issue #193633",
        changes: |p| one_if(!p.counts.is_empty(), |v| v.core.expert = Expert::LastForPadding),
    },
    Row {
        axis: "scales",
        name: "b_scale of {}",
        meaning: "Rows are multiplied by their expert's weights with another expert's scales.",
        seen: "FlashInfer issue #3103",
        changes: |p| {
            let all = [("the next expert", 1isize), ("the expert before", -1)].into_iter();
            let all = all.filter(|_| p.is_fp8() && p.counts.len() > 1);
            each(all.map(|(n, by)| Named(n.to_owned(), by)), |v, Named(_, by)| {
                v.scales[1].row = RowOf::OfExpert(by)
            })
        },
    },
    Row {
        axis: "scales",
        name: "a_scale counted from the expert's first row",
        meaning: "The group's row offset is missing in the index of a's scales.",
        seen: "",
        changes: |p| {
            one_if(p.is_fp8() && p.counts.len() > 1, |v| v.scales[0].row = RowOf::WithinExpert)
        },
    },
];

fn narrow() -> [Named<Narrow>; 2] {
    [("BF16", Narrow::Bf16), ("FP16", Narrow::F16)].map(|(n, t)| Named(n.to_owned(), t))
}

/// Split-K by any number of parts and any way to deal out K blocks.
fn splits(p: &Problem, (part, sum): (Narrow, Narrow), descending: bool) -> Rows {
    let blocks = p.k.div_ceil(p.interval);
    let numbers = (2..=16).chain([18, 20, 24, 28, 32]).filter(|n| *n <= blocks);
    let ways = [
        ("", Dealt::Ceil),
        (" (the last part longest)", Dealt::Floor),
        (" (parts of nearly equal length)", Dealt::Even),
        (" (K blocks dealt out in turn)", Dealt::InTurn),
    ];
    // Each way once: they differ only where the parts do not divide the blocks.
    let order: Vec<usize> = (0..blocks).collect();
    let mut all = Vec::new();
    for n in numbers.filter(|n| *n > 2 || !descending) {
        let mut seen = Vec::new();
        for (words, dealt) in ways {
            let parts = dealt.parts(&order, n);
            if !seen.contains(&parts) {
                seen.push(parts);
                let split = Split { parts: n, part, sum, descending, dealt };
                all.push(Named(format!("{n}|{words}"), split));
            }
        }
    }
    each(all, |v, Named(_, split)| v.split = split)
}
