//! Which scale a K block of a row takes, and what becomes of its value.

use super::super::problem::Problem;
use super::super::variant::{BlockOf, Earlier, RowOf, ScaleLayout, ScaleValue, Variant};
use super::{
    Named, both, many_blocks, many_rows, numbered, quotients, scales, scales_each, scales_where,
};
use crate::diagnose::hypothesis::{Row, each, one_if};

pub(super) const ROWS: &[Row<Problem, Variant>] = &[
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
                    // The last block taking another's is a row of its own.
                    let pairs = all
                        .filter(|(b, f)| b != f && b + 1 < blocks && (blocks <= 8 || near(*b, *f)));
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
        name: "{}_scale of the row's largest everywhere",
        meaning: "One scale a row, the largest of its K blocks'.",
        seen: "",
        changes: |p| scales_where(p, many_blocks, |s| s.block = BlockOf::Largest),
    },
    Row {
        axis: "scales",
        name: "last rows with {}_scale of block of rows {}",
        meaning: "The tail of the rows takes another block's scale: the index wrapped or was clamped.",
        seen: "",
        changes: |p| {
            scales_each(
                p,
                |x, _| numbered(x.scale_rows - 1).map(|r| (r.to_string(), r)).collect(),
                |s, r| s.row = RowOf::LastTakes(r),
            )
        },
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
        changes: |p| scales(p, |s| s.layout = ScaleLayout::Transposed(1)),
    },
    Row {
        axis: "scales",
        name: "{}_scale {} to a multiple of {}",
        meaning: "Scales are read with padding between their rows (or, transposed, columns), as TMA and \
                  packed words want them, that the memory does not have.",
        seen: "DeepGEMM issue #33",
        changes: |p| {
            scales_each(
                p,
                |x, _| {
                    let mut all = Vec::new();
                    for to in [4usize, 8, 16] {
                        if !x.scale_rows.is_multiple_of(to) && x.scale_rows > 1 {
                            let layout = ScaleLayout::Transposed(to);
                            all.push((format!("transposed with rows padded|{to}"), layout));
                        }
                        if !x.scale_columns.is_multiple_of(to) && x.scale_rows > 1 {
                            let layout = ScaleLayout::Padded(to);
                            all.push((format!("with K blocks padded|{to}"), layout));
                        }
                    }
                    all
                },
                |s, layout| s.layout = layout,
            )
        },
    },
    Row {
        axis: "scales",
        name: "{}_scale in reverse in every {} K blocks",
        meaning: "Scales packed into a word are taken in the other byte order.",
        seen: "",
        changes: |p| {
            scales_each(
                p,
                |x, _| {
                    let all = [2usize, 4].into_iter().filter(|n| *n <= x.scale_columns);
                    all.filter(|_| x.scale_columns > 1).map(|n| (n.to_string(), n)).collect()
                },
                |s, n| s.block = BlockOf::ReversedIn(n),
            )
        },
    },
    Row {
        axis: "scales",
        name: "{}_scale of the {} of each tile of {} rows",
        meaning: "A kernel's tile spans two blocks of scales and takes one's for both.",
        seen: "",
        changes: |p| {
            scales_each(
                p,
                |x, _| {
                    let crosses = |t: &usize| !x.block[0].is_multiple_of(*t) && x.scale_rows > 1;
                    let sizes = [
                        24, 40, 48, 56, 72, 80, 88, 96, 104, 112, 120, 136, 144, 152, 160, 176,
                        192, 208, 224, 240, 256, 320, 384, 512,
                    ];
                    let both = |t| {
                        [
                            (format!("first|{t}"), RowOf::TileFirst(t)),
                            (format!("last|{t}"), RowOf::TileLast(t)),
                        ]
                    };
                    sizes.into_iter().filter(crosses).flat_map(both).collect()
                },
                |s, row| s.row = row,
            )
        },
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
    Row {
        axis: "scales",
        name: "both scales of the K block modulo {}",
        meaning: "The K index of both scales starts again: each slice of split-K, or each round of the \
                  pipeline, counts its blocks from 0.",
        seen: "",
        changes: |p| {
            let blocks = p.a.scale_columns.min(p.b.scale_columns);
            let fits = |n: &usize| p.is_fp8() && *n < blocks;
            let halves = [blocks / 2, blocks.div_ceil(3), blocks / 4].into_iter();
            let all = [2, 3, 4, 5, 6, 8].into_iter().chain(halves.filter(|n| *n > 1));
            each(all.filter(fits), |v, n| both(v, |s| s.block = BlockOf::Modulo(n)))
        },
    },
    Row {
        axis: "scales",
        name: "both scales of the {} of every {} K blocks",
        meaning: "Neighbouring K blocks share the first or last one's scales of both operands.",
        seen: "TIRx-kernels PR #5",
        changes: |p| {
            let blocks = p.a.scale_columns.min(p.b.scale_columns);
            let sizes = [2, 3, 4, 8].into_iter().filter(|n| p.is_fp8() && *n < blocks);
            let named = sizes.flat_map(|n| {
                let first = Named(format!("first|{n}"), BlockOf::FirstOf(n));
                [first, Named(format!("last|{n}"), BlockOf::LastOf(n))]
            });
            each(named.collect::<Vec<_>>(), |v, Named(_, of)| both(v, |s| s.block = of))
        },
    },
    Row {
        axis: "scales",
        name: "both scales of block {} in block {}",
        meaning: "A single K block takes another's scales of both operands; of many blocks, a neighbour's.",
        seen: "",
        changes: |p| {
            let blocks = p.a.scale_columns.min(p.b.scale_columns);
            let near = |b: usize, from: usize| blocks <= 8 || b.abs_diff(from) == 1;
            let pairs = numbered(if p.is_fp8() { blocks } else { 0 })
                .flat_map(|b| numbered(blocks).map(move |from| (b, from)))
                .filter(|&(b, from)| b != from && b + 1 < blocks && near(b, from))
                .map(|(b, from)| Named(format!("{from}|{b}"), (b, from)));
            each(pairs.collect::<Vec<_>>(), |v, Named(_, (b, from))| {
                both(v, |s| s.block = BlockOf::OneTakes(b, from))
            })
        },
    },
    Row {
        axis: "scales",
        name: "both scales in reverse along K",
        meaning: "Scales of both operands run against K.",
        seen: "",
        changes: |p| {
            let blocks = p.a.scale_columns.min(p.b.scale_columns);
            one_if(p.is_fp8() && blocks > 1, |v| both(v, |s| s.block = BlockOf::Reversed))
        },
    },
    Row {
        axis: "scales",
        name: "the last K block without either scale",
        meaning: "The tail of K is added as the tensor core left it: its promotion is skipped.",
        seen: "FBGEMM issue #6159",
        changes: |p| {
            let sense = p.is_fp8() && many_blocks(&p.a) && many_blocks(&p.b);
            one_if(sense, |v| both(v, |s| s.value = ScaleValue::OneInLast))
        },
    },
    Row {
        axis: "scales",
        name: "{}_scale rows {}",
        meaning: "Rows of scales stand in another order than the rows of data: one of them was \
                  reordered on load.",
        seen: "SGLang PR #35703",
        changes: |p| {
            scales_each(
                p,
                |x, _| {
                    let all = [
                        ("in reverse order", RowOf::Reversed),
                        ("exchanged with their neighbours", RowOf::Xor(1)),
                        ("r and r + 2 exchanged", RowOf::Xor(2)),
                        ("r and r + 4 exchanged", RowOf::Xor(4)),
                        ("r and r + 8 exchanged", RowOf::Xor(8)),
                    ];
                    let all = all.into_iter().filter(|_| many_rows(x));
                    all.map(|(n, r)| (n.to_owned(), r)).collect()
                },
                |s, row| s.row = row,
            )
        },
    },
    Row {
        axis: "scales",
        name: "{}_scale of row r for rows r and r + {}",
        meaning: "The rows that one lane holds share the first one's scale; in a fragment of 16 rows \
                  they are 8 apart.",
        seen: "",
        changes: |p| {
            scales_each(
                p,
                |x, _| {
                    let fits = |n: &usize| *n < x.scale_rows;
                    let all = [1usize, 2, 4, 8, 16, 32, 64].into_iter().filter(fits);
                    all.map(|n| (n.to_string(), n)).collect()
                },
                |s, n| s.row = RowOf::Without(n),
            )
        },
    },
    Row {
        axis: "scales",
        name: "{}_scale of row r + {} for rows r and r + {}",
        meaning: "The rows that one lane holds share the last one's scale; in a fragment of 16 rows \
                  they are 8 apart.",
        seen: "",
        changes: |p| {
            scales_each(
                p,
                |x, _| {
                    let fits = |n: &usize| *n < x.scale_rows;
                    let all = [1usize, 2, 4, 8, 16, 32, 64].into_iter().filter(fits);
                    all.map(|n| (format!("{n}|{n}"), n)).collect()
                },
                |s, n| s.row = RowOf::With(n),
            )
        },
    },
    Row {
        axis: "scales",
        name: "a_scale and b_scale exchanged",
        meaning: "Rows are multiplied by b's scales and columns by a's: the two pointers are crossed.",
        seen: "PyTorch (ROCm) PR #2739",
        changes: |p| one_if(p.is_fp8() && p.counts.is_empty(), |v| v.scales_exchanged = true),
    },
    Row {
        axis: "scale values",
        name: "{}_scale times that of the {} row block once more",
        meaning: "The product of scales is not reset from one tile of rows to the next: another row's \
                  scale is multiplied in as well.",
        seen: "CUTLASS issue #3596",
        changes: |p| {
            scales_each(
                p,
                |x, _| {
                    let all = [
                        ("first", ScaleValue::TimesRow(Earlier::First)),
                        ("previous", ScaleValue::TimesRow(Earlier::Previous)),
                    ];
                    let all = all.into_iter().filter(|_| many_rows(x));
                    all.map(|(n, v)| (n.to_owned(), v)).collect()
                },
                |s, value| s.value = value,
            )
        },
    },
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
];
