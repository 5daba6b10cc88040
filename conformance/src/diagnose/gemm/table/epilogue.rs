//! What happens after the sums, and whose weights a row gets.

use super::super::problem::{Out, Problem};
use super::super::variant::{Activation, Cast, Expert, Narrow, RowOf, Variant};
use super::Named;
use crate::diagnose::hypothesis::{Row, each, one, one_if};
use fathom_numerics::gemm::Accumulate;

pub(super) const ROWS: &[Row<Problem, Variant>] = &[
    Row {
        axis: "alpha",
        name: "output times {}",
        meaning: "The result is scaled by a constant: an epilogue's alpha, or an operand's scale (2 and \
                  1/2 are also E4M3FNUZ taken for E4M3FN).",
        seen: "MLX PR #2578, vLLM PR #7210",
        changes: |p| each(p.factors(), |v, alpha| v.alpha = alpha),
    },
    Row {
        axis: "epilogue",
        name: "{} before the cast",
        meaning: "The result goes through an activation: an epilogue of another kernel.",
        seen: "",
        changes: |_| {
            let all = [
                ("ReLU", Activation::Relu),
                ("SiLU", Activation::Silu),
                ("GELU by tanh", Activation::Gelu),
                ("squared ReLU", Activation::ReluSquared),
            ];
            each(all.map(|(n, a)| Named(n.to_owned(), a)), |v, Named(_, a)| v.activation = a)
        },
    },
    Row {
        axis: "cast",
        name: "output rounded to E4M3 on the way",
        meaning: "The result passes through E4M3 without a scale.",
        seen: "",
        changes: |_| one(|v| v.cast = Cast::Via(Narrow::E4m3)),
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
        name: "order of c: {}",
        meaning: "The old value of the output enters first or last, which rounds otherwise.",
        seen: "",
        changes: |p| {
            let all = [
                ("the accumulator starts from c", Accumulate::Chain),
                ("c added at the end", Accumulate::AddAtEnd),
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
        name: "b_scale of expert {} for every expert",
        meaning: "The scales' stride from expert to expert is missing, or one expert's are broadcast.",
        seen: "",
        changes: |p| {
            let experts = if p.is_fp8() && p.counts.len() > 1 { p.counts.len().min(64) } else { 0 };
            each(0..experts, |v, e| v.scales[1].row = RowOf::OnlyExpert(e))
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
