//! The tensor core, and how its sums are promoted.

use fathom_numerics::formats::Rounding;
use fathom_numerics::gemm::Promote;
use fathom_numerics::mma::{Accumulator, Output};

use super::super::problem::Problem;
use super::super::variant::{End, Scaling, Variant};
use super::{Named, accumulator, narrow, spanning};
use crate::diagnose::hypothesis::{Row, each, one, one_if};

pub(super) const ROWS: &[Row<Problem, Variant>] = &[
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
        name: "rounding: {}",
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
        axis: "start of an interval",
        name: "the tensor core's sum not cleared between intervals",
        meaning: "Each promotion adds the sum of all K so far: scale-d is 1 where it should be 0.",
        seen: "",
        changes: |p| one_if(p.interval < p.k, |v| v.core.carried = true),
    },
    Row {
        axis: "part of a block",
        name: "only elements {} to {} of each K block",
        meaning: "Some of a block's instructions do not enter: the others overwrite them, or the loop \
                  ends early.",
        seen: "",
        changes: |_| {
            let parts = [(0, 32), (96, 128), (0, 64), (64, 128), (0, 96), (32, 128), (0, 16)];
            each(parts.map(|(b, e)| Named(format!("{b}|{}", e - 1), (b, e))), |v, Named(_, w)| {
                v.core.within = w
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
        axis: "promotion interval",
        name: "promotion every {}, scales indexed by the number of the promotion",
        meaning: "The loop's counter indexes the scales although several iterations lie in one of \
                  their blocks.",
        seen: "TileOPs PR #1666",
        changes: |p| {
            let fits = |i: &usize| p.is_fp8() && *i < p.a.block[1].max(p.b.block[1]).min(p.k);
            each([32, 64].into_iter().filter(fits), |v, i| {
                v.core.interval = i;
                v.end = End::Counted;
            })
        },
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
];
