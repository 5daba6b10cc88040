//! Hypotheses about RMSNorm: where eps, the weight and the casts stand, and what is summed.

use fathom_numerics::formats::{to_bf16, to_f16};
use fathom_reference::Tensor;
use fathom_reference::op::compute_type::{Real, tree_sum_rows};
use fathom_reference::ops::rms_norm::RmsNorm;
use fathom_trace::DType;

use super::hypothesis::{Expanded, Family, Hypothesis, Row, Sample, each, one, values, whole_rows};
use crate::case_file::CaseFile;

/// Where eps enters.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Eps {
    Inside(f32),
    /// Added to the root.
    Outside(f32),
    /// The mean's lower bound.
    Bound(f32),
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Weight {
    AsGiven,
    PlusOne,
    /// `1 + w` rounded to BF16.
    PlusOneBf16,
    Ignored,
    Bf16,
    Twice,
    Reversed,
}

/// In which order x, the root's reciprocal and the weight are multiplied.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Order {
    RootFirst,
    WeightFirst,
    RootTimesWeight,
    Divided,
    /// The normalised value rounded to the output's type before the weight.
    CastBetween,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Sum {
    Tree,
    Sequential,
    Warp,
    F64,
    /// Of squares rounded to BF16.
    Bf16Squares,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Centre {
    /// The mean square alone.
    None,
    /// LayerNorm: the mean is taken off.
    Mean,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Root {
    Reciprocal,
    /// Not taken: the variance itself.
    Not,
    Bf16,
    /// The L2 norm: no division by the width.
    Sum,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Kept {
    AsGiven,
    Root,
    Mean,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Output {
    Nearest,
    Truncated,
    ViaF16,
}

#[derive(Clone, Debug, PartialEq)]
struct Variant {
    eps: Eps,
    weight: Weight,
    order: Order,
    sum: Sum,
    centre: Centre,
    root: Root,
    /// First column and how many enter the mean.
    columns: (usize, usize),
    /// What the sum is divided by.
    divisor: usize,
    /// First column that is normalised.
    offset: usize,
    /// Whose row's root is taken.
    row: isize,
    kept: Kept,
    output: Output,
}

struct Case {
    eps: f32,
    offset: usize,
    width: usize,
    columns: usize,
}

#[derive(Clone)]
struct Named<T>(String, T);

impl<T> std::fmt::Display for Named<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

fn named<T: Clone, const N: usize>(all: [(&str, T); N]) -> [Named<T>; N] {
    all.map(|(n, x)| Named(n.to_owned(), x))
}

const ROWS: &[Row<Case, Variant>] = &[
    Row {
        axis: "eps",
        name: "eps {}",
        meaning: "Another eps, or none, is added to the mean square.",
        seen: "",
        changes: |_| {
            let all = [0.0f32, 1e-12, 1e-8, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3];
            each(all.map(|e| Named(format!("{e:e}"), e)), |v, e| v.eps = Eps::Inside(e.1))
        },
    },
    Row {
        axis: "eps",
        name: "eps outside the root",
        meaning: "eps is added to the root instead of the mean square.",
        seen: "",
        changes: |c| each([Named(String::new(), c.eps)], |v, e| v.eps = Eps::Outside(e.1)),
    },
    Row {
        axis: "eps",
        name: "eps as a lower bound",
        meaning: "The mean square is bounded below by eps instead of increased.",
        seen: "",
        changes: |c| each([Named(String::new(), c.eps)], |v, e| v.eps = Eps::Bound(e.1)),
    },
    Row {
        axis: "weight",
        name: "weight {}",
        meaning: "The weight enters otherwise: as an offset from one (Gemma), narrower, twice, or not.",
        seen: "vLLM PR #29810, llama.cpp PR #5810",
        changes: |_| {
            let all = named([
                ("plus one", Weight::PlusOne),
                ("plus one, rounded to BF16", Weight::PlusOneBf16),
                ("ignored", Weight::Ignored),
                ("rounded to BF16", Weight::Bf16),
                ("applied twice", Weight::Twice),
                ("in reverse", Weight::Reversed),
            ]);
            each(all, |v, Named(_, w)| v.weight = w)
        },
    },
    Row {
        axis: "order",
        name: "order: {}",
        meaning: "x, the reciprocal root and the weight are multiplied, or cast, in another order.",
        seen: "gemma_pytorch PR #67, LMDeploy PR #2842",
        changes: |_| {
            let all = named([
                ("rounded to BF16 by the cast before the weight", Order::CastBetween),
                ("x times weight first", Order::WeightFirst),
                ("root times weight first", Order::RootTimesWeight),
                ("x divided by the root", Order::Divided),
            ]);
            each(all, |v, Named(_, o)| v.order = o)
        },
    },
    Row {
        axis: "sum",
        name: "squares summed {}",
        meaning: "The squares are added in another order or precision.",
        seen: "",
        changes: |_| {
            let all = named([
                ("one after the other", Sum::Sequential),
                ("by 32 lanes and a butterfly", Sum::Warp),
                ("in FP64", Sum::F64),
                ("after rounding to BF16", Sum::Bf16Squares),
            ]);
            each(all, |v, Named(_, s)| v.sum = s)
        },
    },
    Row {
        axis: "columns",
        name: "mean over {}",
        meaning: "The mean is taken over another number of columns than the width.",
        seen: "",
        changes: |c| {
            let mut all = vec![Named("all columns of x".to_owned(), (0, c.columns))];
            all.push(Named("the first columns of x".to_owned(), (0, c.width)));
            let power = c.width.next_power_of_two();
            for n in [c.width / 2, c.width - 1, c.width / 128 * 128, c.width / 32 * 32, power] {
                if n > 0 && c.offset + n <= c.columns {
                    all.push(Named(format!("{n} columns"), (c.offset, n)));
                }
            }
            each(all, |v, Named(_, columns)| {
                v.columns = columns;
                v.divisor = columns.1;
            })
        },
    },
    Row {
        axis: "divisor",
        name: "sum divided by {}",
        meaning: "The sum over the width is divided by another number: a padded or a whole width.",
        seen: "",
        changes: |c| {
            let power = c.width.next_power_of_two();
            let all = [c.columns, c.width - 1, power, c.width.next_multiple_of(128), 1];
            each(all.into_iter().filter(|n| *n > 0), |v, n| v.divisor = n)
        },
    },
    Row {
        axis: "offset",
        name: "columns from {} on",
        meaning: "Other columns of x are normalised.",
        seen: "",
        changes: |c| {
            let all = [0, c.columns - c.width];
            each(all, |v, o| {
                v.offset = o;
                v.columns.0 = o;
            })
        },
    },
    Row {
        axis: "centre",
        name: "LayerNorm",
        meaning: "The mean is taken off before the squares are summed.",
        seen: "",
        changes: |_| one(|v| v.centre = Centre::Mean),
    },
    Row {
        axis: "root",
        name: "root: {}",
        meaning: "The reciprocal root is another number: rounded, of the sum, or not taken.",
        seen: "",
        changes: |_| {
            let all = named([
                ("no root", Root::Not),
                ("reciprocal root rounded to BF16", Root::Bf16),
                ("root of the sum, not of the mean", Root::Sum),
            ]);
            each(all, |v, Named(_, r)| v.root = r)
        },
    },
    Row {
        axis: "row",
        name: "root of the {} row",
        meaning: "Rows are scaled by a neighbour's root.",
        seen: "",
        changes: |_| each(named([("next", 1isize), ("previous", -1)]), |v, n| v.row = n.1),
    },
    Row {
        axis: "kept",
        name: "{} kept for the backward",
        meaning: "What is stored as rstd is not the reciprocal root.",
        seen: "",
        changes: |_| {
            let all = named([("the root itself", Kept::Root), ("the mean square", Kept::Mean)]);
            each(all, |v, Named(_, k)| v.kept = k)
        },
    },
    Row {
        axis: "output",
        name: "output {}",
        meaning: "The result is cast otherwise.",
        seen: "",
        changes: |_| {
            let all = named([
                ("truncated to BF16", Output::Truncated),
                ("rounded to FP16 on the way", Output::ViaF16),
            ]);
            each(all, |v, Named(_, o)| v.output = o)
        },
    },
];

/// The table, for documentation.
pub(super) fn table() -> Vec<[&'static str; 3]> {
    ROWS.iter().map(|r| [r.name, r.meaning, r.seen]).collect()
}

/// The hypotheses about one RMSNorm.
pub(super) struct RmsNormFamily {
    expanded: Expanded<Variant>,
    case: Case,
    x: Vec<f32>,
    weight: Vec<f32>,
    rows: usize,
    out: DType,
    /// Elements of y that the file holds, before those of rstd.
    y_elements: usize,
}

impl RmsNormFamily {
    /// `None` for F64 and where there is nothing to normalise.
    pub(super) fn new(op: &RmsNorm, file: &CaseFile) -> Option<RmsNormFamily> {
        let x = &file.case.inputs["x"];
        let (rows, columns) = x.rows_columns();
        if x.dtype() == DType::F64 || op.width == 0 || rows == 0 {
            return None;
        }
        let case = Case { eps: op.eps as f32, offset: op.offset, width: op.width, columns };
        let given = Variant {
            eps: Eps::Inside(case.eps),
            weight: Weight::AsGiven,
            order: Order::RootFirst,
            sum: Sum::Tree,
            centre: Centre::None,
            root: Root::Reciprocal,
            columns: (op.offset, op.width),
            divisor: op.width,
            offset: op.offset,
            row: 0,
            kept: Kept::AsGiven,
            output: Output::Nearest,
        };
        Some(RmsNormFamily {
            expanded: Expanded::new(ROWS, &case, given),
            case,
            x: values(x),
            weight: values(&file.case.inputs["weight"]),
            rows,
            out: op.out,
            y_elements: file.expected.get("y").map_or(0, Tensor::len),
        })
    }

    fn row(&self, row: usize) -> &[f32] {
        &self.x[row * self.case.columns..(row + 1) * self.case.columns]
    }

    /// Mean of the row, mean square with eps, and the reciprocal root.
    fn statistics(&self, v: &Variant, row: usize) -> (f32, f32, f32) {
        let row = row.saturating_add_signed(v.row).min(self.rows - 1);
        let x = &self.row(row)[v.columns.0..v.columns.0 + v.columns.1];
        let divisor = v.divisor as f32;
        let mean = match v.centre {
            Centre::None => 0.0,
            Centre::Mean => tree_sum_rows([x], |[x]| x) / divisor,
        };
        let square = |x: f32| (x - mean) * (x - mean);
        let sum = match v.sum {
            Sum::Tree => tree_sum_rows([x], |[x]| square(x)),
            Sum::Sequential => x.iter().fold(0.0, |s, &x| s + square(x)),
            Sum::Warp => warp(x, square),
            Sum::F64 => x.iter().map(|&x| f64::from(x) * f64::from(x)).sum::<f64>() as f32,
            Sum::Bf16Squares => tree_sum_rows([x], |[x]| to_bf16(square(x)).to_f32()),
        };
        let square = if v.root == Root::Sum { sum } else { sum / divisor };
        let (variance, outside) = match v.eps {
            Eps::Inside(eps) => (square + eps, 0.0),
            Eps::Outside(eps) => (square, eps),
            Eps::Bound(eps) => (square.max(eps), 0.0),
        };
        let root = match v.root {
            Root::Not => 1.0 / (variance + outside),
            Root::Bf16 => to_bf16(1.0 / (Real::sqrt(variance) + outside)).to_f32(),
            _ => 1.0 / (Real::sqrt(variance) + outside),
        };
        (mean, variance, root)
    }

    fn element(&self, v: &Variant, (mean, variance, root): (f32, f32, f32), e: usize) -> f32 {
        let (row, column) = (e / self.case.width, e % self.case.width);
        let x = self.row(row)[v.offset + column] - mean;
        let given = self.weight[column];
        let w = match v.weight {
            Weight::AsGiven => given,
            Weight::PlusOne => 1.0 + given,
            Weight::PlusOneBf16 => to_bf16(1.0 + given).to_f32(),
            Weight::Ignored => 1.0,
            Weight::Bf16 => to_bf16(given).to_f32(),
            Weight::Twice => given * given,
            Weight::Reversed => self.weight[self.case.width - 1 - column],
        };
        match v.order {
            Order::RootFirst => (x * root) * w,
            Order::WeightFirst => (x * w) * root,
            Order::RootTimesWeight => x * (root * w),
            Order::Divided => x / Real::sqrt(variance) * w,
            Order::CastBetween => to_bf16(x * root).to_f32() * w,
        }
    }
}

/// 32 chains over the elements and a butterfly over them.
fn warp(x: &[f32], term: impl Fn(f32) -> f32) -> f32 {
    let mut lanes = [0.0f32; 32];
    for (i, &x) in x.iter().enumerate() {
        lanes[i % 32] += term(x);
    }
    for step in [16, 8, 4, 2, 1] {
        for i in 0..step {
            lanes[i] += lanes[i + step];
        }
    }
    lanes[0]
}

impl Family for RmsNormFamily {
    fn hypotheses(&self) -> &[Hypothesis] {
        &self.expanded.hypotheses
    }

    fn cost_per_element(&self) -> u64 {
        64
    }

    fn choose(&self, differing: &[usize], all: usize, count: usize) -> Vec<usize> {
        whole_rows(differing, all, self.case.width, self.y_elements, count)
    }

    fn evaluate(&self, chosen: &[usize], sample: &Sample) -> Option<Vec<u64>> {
        let v = self.expanded.variant(chosen);
        let mut known = (usize::MAX, (0.0, 0.0, 0.0));
        let element = |&e: &usize| {
            let kept = e.checked_sub(self.y_elements);
            let row = kept.unwrap_or(e / self.case.width);
            if known.0 != row {
                known = (row, self.statistics(&v, row));
            }
            let (_, variance, root) = known.1;
            if kept.is_some() {
                let kept = match v.kept {
                    Kept::AsGiven => root,
                    Kept::Root => Real::sqrt(variance),
                    Kept::Mean => variance,
                };
                return f32::store(vec![kept], &[1], DType::F32).bits(0);
            }
            let y = self.element(&v, known.1, e);
            let y = match v.output {
                Output::ViaF16 => to_f16(y).to_f32(),
                Output::Truncated if y.is_finite() => f32::from_bits(y.to_bits() & 0xFFFF_0000),
                _ => y,
            };
            f32::store(vec![y], &[1], self.out).bits(0)
        };
        Some(sample.elements.iter().map(element).collect())
    }
}
