//! Where the differing elements of a matrix lie: rows, columns, tiles, lanes.

use fathom_reference::Tensor;
use serde::Serialize;

use super::{Map, grouped};
use crate::compare;

/// Where a set of a matrix' elements lies, and what is special about it.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Region {
    /// Name of the tensor, `out.d` for instance.
    pub tensor: String,
    /// Elements in the set.
    pub elements: usize,
    /// Elements of the whole tensor.
    pub of: usize,
    /// Rows from the first to the last, inclusive.
    pub rows: (usize, usize),
    /// Columns from the first to the last, inclusive.
    pub columns: (usize, usize),
    /// The first few of the elements: row and column.
    pub first: Vec<(usize, usize)>,
    /// What the file holds there, where that can be said in a few words: all NaN, rows of its own.
    pub holds: Option<String>,
    /// What is special about the set, the most telling first; empty where nothing is.
    pub patterns: Vec<String>,
}

/// A way to sort a matrix' elements into classes: tiles of the kernel, lanes of the tensor core.
struct Pattern {
    name: &'static str,
    class: fn(row: usize, column: usize) -> usize,
}

/// Tile and fragment shapes of the field's kernels. A wgmma accumulator's row r and column c lie in
/// warp r / 16 % 4, lane 4 (r % 8) + c / 2 % 4 (PTX ISA, wgmma register fragments).
const PATTERNS: [Pattern; 10] = [
    Pattern { name: "rows r with r / 64", class: |r, _| r / 64 },
    Pattern { name: "rows r with r / 128", class: |r, _| r / 128 },
    Pattern { name: "columns c with c / 8", class: |_, c| c / 8 },
    Pattern { name: "columns c with c / 64", class: |_, c| c / 64 },
    Pattern { name: "columns c with c / 128", class: |_, c| c / 128 },
    Pattern { name: "warps of a warpgroup, r / 16 % 4", class: |r, _| r / 16 % 4 },
    Pattern { name: "halves of a 16-row fragment, r / 8 % 2", class: |r, _| r / 8 % 2 },
    Pattern { name: "lane groups, r % 8", class: |r, _| r % 8 },
    Pattern { name: "quads of lanes, c / 2 % 4", class: |_, c| c / 2 % 4 },
    Pattern { name: "registers of a pair, c % 2", class: |_, c| c % 2 },
];

impl Region {
    /// Describes the differing elements of the file's tensor; `None` where there are none.
    pub fn of(map: &Map, file: &Tensor, contract: &Tensor) -> Option<Region> {
        let places: Vec<(usize, usize)> = map
            .differs
            .iter()
            .enumerate()
            .filter(|(_, d)| **d)
            .map(|(i, _)| (i / map.columns, i % map.columns))
            .collect();
        let &(first, _) = places.first()?;
        let rows = (first, places.iter().map(|p| p.0).max()?);
        let columns = (places.iter().map(|p| p.1).min()?, places.iter().map(|p| p.1).max()?);
        let mut region = Region {
            tensor: map.tensor.clone(),
            elements: places.len(),
            of: map.differs.len(),
            rows,
            columns,
            first: places.iter().take(4).copied().collect(),
            holds: holds(map, file, contract, &places),
            patterns: Vec::new(),
        };
        let box_size = (rows.1 - rows.0 + 1) * (columns.1 - columns.0 + 1);
        if box_size < region.of && places.len() * 10 >= box_size * 9 {
            let share = 100 * places.len() / box_size;
            region.patterns.push(format!("they fill {share} % of that box, nothing outside"));
        }
        for pattern in &PATTERNS {
            if let Some(words) = classes(pattern, &region, &places) {
                region.patterns.push(words);
            }
        }
        Some(region)
    }

    /// Whether it is a part of the matrix only: outside its rows and columns nothing differs.
    pub fn is_part(&self) -> bool {
        let area = (self.rows.1 - self.rows.0 + 1) * (self.columns.1 - self.columns.0 + 1);
        area * 10 <= self.of * 9
    }

    /// The region in words: how many, which rows and columns, what the file holds there.
    pub fn place(&self) -> String {
        format!(
            "({} of {} in {}) lie in rows {}..={} and columns {}..={}",
            grouped(self.elements),
            grouped(self.of),
            self.tensor,
            self.rows.0,
            self.rows.1,
            self.columns.0,
            self.columns.1
        ) + &self.holds.as_ref().map_or(String::new(), |holds| format!(" and are {holds}"))
    }

    /// The region in words, with what is special about it.
    pub fn words(&self) -> String {
        let mut words = self.place();
        for pattern in &self.patterns {
            words += "; ";
            words += pattern;
        }
        words
    }
}

/// The classes that hold every differing element, where they are at most half of those that the
/// region's rows and columns have.
fn classes(pattern: &Pattern, region: &Region, places: &[(usize, usize)]) -> Option<String> {
    let mut all = std::collections::BTreeMap::new();
    for row in region.rows.0..=region.rows.1 {
        all.entry((pattern.class)(row, region.columns.0)).or_insert(0usize);
    }
    for column in region.columns.0..=region.columns.1 {
        all.entry((pattern.class)(region.rows.0, column)).or_insert(0usize);
    }
    for &(row, column) in places {
        *all.get_mut(&(pattern.class)(row, column))? += 1;
    }
    let hit: Vec<_> = all.iter().filter(|(_, n)| **n > 0).map(|(c, _)| c.to_string()).collect();
    // Few elements fall into few classes by chance; eight an empty class is beyond it.
    let empty = all.len() - hit.len();
    if empty == 0 || hit.len() * 2 > all.len() || places.len() < 8 * empty.min(8) {
        return None;
    }
    let more = if hit.len() > 8 { ", ..." } else { "" };
    let shown = hit.iter().take(8).cloned().collect::<Vec<_>>().join(", ");
    Some(format!("{} = {shown}{more} only (of {} classes)", pattern.name, all.len()))
}

/// What the file holds at the differing elements.
fn holds(map: &Map, file: &Tensor, contract: &Tensor, places: &[(usize, usize)]) -> Option<String> {
    let bits = |(r, c): (usize, usize)| file.bits(r * map.columns + c);
    let all = |what: &dyn Fn(u64) -> bool| places.iter().all(|&p| what(bits(p)));
    let value = |bits| compare::value(file.dtype(), bits);
    if all(&|b| value(b).is_some_and(f64::is_nan)) {
        return Some("all NaN".to_owned());
    }
    if all(&|b| value(b).map_or(b == 0, |x| x == 0.0)) {
        return Some("all zero".to_owned());
    }
    let one = bits(places[0]);
    if places.len() > 4 && all(&|b| b == one) {
        let pattern = compare::hex(file.dtype(), one);
        return Some(format!("all {pattern}"));
    }
    // Whole rows that stand elsewhere in the contract's output.
    let rows = map.rows.max(1);
    let width = file.bytes().len() / rows;
    fn row(t: &Tensor, r: usize, width: usize) -> &[u8] {
        &t.bytes()[r * width..(r + 1) * width]
    }
    let (first, last) = (places[0].0, places[places.len() - 1].0);
    let count = last - first + 1;
    let from = (0..rows - count.min(rows) + 1)
        .find(|&r| r != first && row(contract, r, width) == row(file, first, width))?;
    let equal = (0..count).all(|i| row(file, first + i, width) == row(contract, from + i, width));
    equal.then(|| format!("equal to rows {from}..={} of the output", from + count - 1))
}
