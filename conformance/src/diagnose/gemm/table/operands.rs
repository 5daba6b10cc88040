//! How operands are read, which part of K enters, in which order and parts.

use fathom_numerics::formats::Format;

use super::super::problem::Problem;
use super::super::variant::{Blocks, Narrow, Order, Place, Reading, Variant};
use super::{Named, numbered, operand, operands, splits, unaligned};
use crate::diagnose::hypothesis::{Row, each, one_if};

pub(super) const ROWS: &[Row<Problem, Variant>] = &[
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
        name: "{} read at the first 32 elements of each K block",
        meaning: "The descriptor's address is not advanced from instruction to instruction.",
        seen: "",
        changes: |p| {
            operands(
                |_| if p.is_fp8() { vec![("", ())] } else { vec![] },
                |v, w, ()| v.core.readings[w] = Reading::FirstGroup,
            )
        },
    },
    Row {
        axis: "operands",
        name: "a and b read at the first 32 elements of each K block",
        meaning: "Neither descriptor's address is advanced from instruction to instruction.",
        seen: "",
        changes: |p| one_if(p.is_fp8(), |v| v.core.readings = [Reading::FirstGroup; 2]),
    },
    Row {
        axis: "operands",
        name: "{} with a swizzle of {} bytes too many or too few",
        meaning: "Shared memory is written with a swizzle and read without, or the other way round.",
        seen: "",
        changes: |p| {
            operands(
                |_| {
                    if !p.is_fp8() {
                        return vec![];
                    }
                    vec![
                        ("128", Reading::Swizzled(128)),
                        ("64", Reading::Swizzled(64)),
                        ("32", Reading::Swizzled(32)),
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
                        ("two blocks too early along K", -256),
                        ("three blocks too early along K", -384),
                        ("four blocks too early along K", -512),
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
        name: "order of K: {}",
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
];
