//! Sums that start from another tile's: accumulators that nobody cleared between tiles.
//!
//! The file's element is then the contract's plus the contract's of the same place in another
//! tile, so many rows or columns away, less what that tile itself started from.

use fathom_reference::Tensor;

use super::hypothesis::{Hypothesis, OUTPUT, spread, values};

/// Tiles begin at multiples of that many rows or columns.
const STEP: usize = 8;
/// Elements on which distances are screened, and the fewest that say something.
const SAMPLE: usize = 64;
const FEWEST: usize = 32;
/// Share of the difference's square that may be left: both sums were rounded.
const LEFT: f64 = 1e-3;

const NAME: &str = "accumulators start from the preceding tile's";
const MEANING: &str = "A tile's sum starts from another tile's instead of zero or its own old value: \
                       the accumulators are not cleared where a tile has nothing to add, or between \
                       tiles.";
const SEEN: &str = "CUTLASS issue #2995";

/// The table, for documentation.
pub(super) fn table() -> Vec<[&'static str; 3]> {
    vec![[NAME, MEANING, SEEN]]
}

/// The distance at which the contract's elements explain every differing one, in words; `old` is
/// what the output is added to, if anything.
pub(super) fn find(
    file: &Tensor,
    contract: &Tensor,
    old: Option<&Tensor>,
) -> Option<(Hypothesis, String)> {
    let old = old.filter(|o| o.shape() == file.shape());
    if file.shape().len() < 2 || !file.shape().iter().all(|&n| n > 0) {
        return None;
    }
    let (rows, columns) = file.rows_columns();
    let (file_values, contract_values) = (values(file), values(contract));
    let old = old.map(values);
    let differing: Vec<usize> =
        (0..file.len()).filter(|&i| file.bits(i) != contract.bits(i)).collect();
    if differing.len() < FEWEST {
        return None;
    }
    let of = |line: &dyn Fn(usize) -> usize| {
        let all = || differing.iter().map(|&i| line(i));
        (all().min().unwrap_or(0), all().max().unwrap_or(0))
    };
    let row_bounds = of(&|i| i / columns);
    let column_bounds = of(&|i| i % columns);
    // Share of the difference that is left, where the elements so far away are taken off.
    let left = |by: isize, chosen: &mut dyn Iterator<Item = usize>| -> f64 {
        let (mut rest, mut whole) = (0.0, 0.0);
        for i in chosen {
            let d = f64::from(file_values[i]) - f64::from(contract_values[i]);
            let from = i.checked_add_signed(-by).expect("inside");
            let start = old.as_ref().map_or(0.0, |o| f64::from(o[from]));
            let other = f64::from(contract_values[from]) - start;
            rest += (d - other).powi(2);
            whole += d * d;
        }
        if whole.is_finite() && whole > 0.0 { rest / whole } else { 1.0 }
    };
    let sample = || spread(differing.len(), SAMPLE).map(|i| differing[i]);
    let explains = |by: isize| {
        left(by, &mut sample()) < LEFT && left(by, &mut differing.iter().copied()) < LEFT
    };
    let along_rows = distances(row_bounds, rows).find(|d| explains(d * columns as isize));
    let (by, along) = match along_rows {
        Some(by) => (by, "rows"),
        None => (distances(column_bounds, columns).find(|d| explains(*d))?, "columns"),
    };
    let hypothesis =
        Hypothesis { axis: OUTPUT, name: NAME.to_owned(), meaning: MEANING, seen: SEEN };
    let side = if by > 0 { "before" } else { "behind" };
    let height = file.shape()[file.shape().len() - 2];
    let matrices = match file.shape().len() > 2 && along == "rows" {
        true if by.unsigned_abs().is_multiple_of(height) => format!(
            "; that is expert {} with the sum of expert {}",
            row_bounds.0 / height,
            (row_bounds.0 as isize - by) as usize / height
        ),
        _ => String::new(),
    };
    let words = format!("the sum added is that of {} {along} {side}{matrices}", by.unsigned_abs());
    Some((hypothesis, words))
}

/// Distances at which lines that far before (or, negative, behind) lie inside, the nearest first.
fn distances(bounds: (usize, usize), extent: usize) -> impl Iterator<Item = isize> {
    let (before, behind) = (bounds.0, extent - 1 - bounds.1);
    let all = (1..=before.max(behind) / STEP).map(|n| n * STEP);
    all.flat_map(move |d| {
        let earlier = (d <= before).then_some(d as isize);
        [earlier, (d <= behind).then(|| -(d as isize))]
    })
    .flatten()
}
