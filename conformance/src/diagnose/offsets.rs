//! Values added or factors multiplied, found from the outputs alone: a bias, a scale forgotten.
//!
//! If the file's element is the contract's plus a value that a whole column shares, then each
//! element bounds that value by an interval (both elements were rounded); where the intervals of
//! all elements of a column have a point in common, and it is not 0, one value explains the column.

use std::collections::BTreeMap;

use fathom_reference::Tensor;
use fathom_trace::DType;

use super::hypothesis::{Hypothesis, OUTPUT};
use crate::compare;

/// Who shares one value.
#[derive(Clone, Copy, PartialEq)]
enum Shared {
    All,
    Column,
    Row,
}

/// A kind of change with one value for each group of elements.
struct Kind {
    shared: Shared,
    multiplied: bool,
    name: &'static str,
    meaning: &'static str,
    seen: &'static str,
}

const KINDS: [Kind; 6] = [
    Kind {
        shared: Shared::All,
        multiplied: true,
        name: "output times one factor",
        meaning: "One factor for all elements explains them: an alpha, or a scale too much or too \
                  few.",
        seen: "MLX PR #2578",
    },
    Kind {
        shared: Shared::All,
        multiplied: false,
        name: "one value added to all elements",
        meaning: "One summand for all elements explains them.",
        seen: "",
    },
    Kind {
        shared: Shared::Column,
        multiplied: false,
        name: "a value added to each column",
        meaning: "One summand a column explains them: a bias.",
        seen: "XLA issue #46110",
    },
    Kind {
        shared: Shared::Row,
        multiplied: false,
        name: "a value added to each row",
        meaning: "One summand a row explains them: a bias along the wrong dimension.",
        seen: "",
    },
    Kind {
        shared: Shared::Row,
        multiplied: true,
        name: "each row times a factor",
        meaning: "One factor a row explains them: a row's scale or routing weight wrong, left out or \
                  applied twice.",
        seen: "",
    },
    Kind {
        shared: Shared::Column,
        multiplied: true,
        name: "each column times a factor",
        meaning: "One factor a column explains them: a column's scale wrong, left out or applied \
                  twice.",
        seen: "",
    },
];

/// Elements that a group needs before its common value says anything.
const LEAST: usize = 8;

/// The table, for documentation.
pub(super) fn table() -> Vec<[&'static str; 3]> {
    KINDS.iter().map(|k| [k.name, k.meaning, k.seen]).collect()
}

/// The first kind of change that explains every differing element; with some of its values.
pub(super) fn find(file: &Tensor, contract: &Tensor) -> Option<(Hypothesis, String)> {
    let dtype = file.dtype();
    if !matches!(dtype, DType::F32 | DType::BF16 | DType::F16) || file.shape().is_empty() {
        return None;
    }
    let columns = file.rows_columns().1;
    let differing: Vec<usize> =
        (0..file.len()).filter(|&i| file.bits(i) != contract.bits(i)).collect();
    KINDS.iter().find_map(|kind| {
        let values = explained(kind, (file, contract), columns, &differing)?;
        let hypothesis = Hypothesis {
            axis: OUTPUT,
            name: kind.name.to_owned(),
            meaning: kind.meaning,
            seen: kind.seen,
        };
        let shown = |(group, value): (&usize, &f64)| match kind.shared {
            Shared::All => format!("{value:.6}"),
            Shared::Column => format!("column {group}: {value:.6}"),
            Shared::Row => format!("row {group}: {value:.6}"),
        };
        let more = if values.len() > 3 { ", ..." } else { "" };
        let some: Vec<String> = values.iter().take(3).map(shown).collect();
        Some((hypothesis, format!("{}{more}", some.join(", "))))
    })
}

/// One value a group that all its differing elements allow, if there is one for every group.
fn explained(
    kind: &Kind,
    (file, contract): (&Tensor, &Tensor),
    columns: usize,
    differing: &[usize],
) -> Option<BTreeMap<usize, f64>> {
    let mut groups: BTreeMap<usize, (f64, f64, usize)> = BTreeMap::new();
    for &i in differing {
        let group = match kind.shared {
            Shared::All => 0,
            Shared::Column => i % columns,
            Shared::Row => i / columns,
        };
        let f = bounds(file.dtype(), file.bits(i))?;
        let c = bounds(file.dtype(), contract.bits(i))?;
        let (low, high) = match kind.multiplied {
            false => (f.0 - c.1, f.1 - c.0),
            // A contract's element near zero bounds no factor.
            true if c.0 <= 0.0 && c.1 >= 0.0 => continue,
            true => {
                let all = [f.0 / c.0, f.0 / c.1, f.1 / c.0, f.1 / c.1];
                let low = all.into_iter().fold(f64::INFINITY, f64::min);
                (low, all.into_iter().fold(f64::NEG_INFINITY, f64::max))
            }
        };
        let known = groups.entry(group).or_insert((f64::NEG_INFINITY, f64::INFINITY, 0));
        *known = (known.0.max(low), known.1.min(high), known.2 + 1);
        if known.0 > known.1 {
            return None;
        }
    }
    let neutral = if kind.multiplied { 1.0 } else { 0.0 };
    let elements: usize = groups.values().map(|g| g.2).sum();
    let most_elements = groups.values().filter(|g| g.2 >= LEAST).map(|g| g.2).sum::<usize>();
    // Groups of few elements agree with something by chance; the value must not be the neutral one.
    if elements < 4 * LEAST || most_elements * 10 < elements * 9 {
        return None;
    }
    let moved = groups.values().filter(|g| g.0 > neutral || g.1 < neutral).count();
    if moved * 10 < groups.len() * 9 {
        return None;
    }
    Some(groups.into_iter().map(|(group, g)| (group, (g.0 + g.1) / 2.0)).collect())
}

/// The numbers that round to a code; `None` for NaN and infinity.
fn bounds(dtype: DType, bits: u64) -> Option<(f64, f64)> {
    let x = compare::value(dtype, bits).filter(|x| x.is_finite())?;
    let fraction_bits = match dtype {
        DType::BF16 => 7,
        DType::F16 => 10,
        _ => 23,
    };
    let exponent = if x == 0.0 { -120.0 } else { x.abs().log2().floor() };
    let half = (exponent - f64::from(fraction_bits)).exp2() * 0.5001;
    Some((x - half, x + half))
}
