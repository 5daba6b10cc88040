//! Where the differing elements of a matrix lie: rows, columns, tiles, lanes.

use serde::Serialize;

use super::{Map, grouped};

/// A description of a set of elements of a matrix.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Region {
    /// The tensor.
    pub tensor: String,
    /// Elements in the set.
    pub elements: usize,
    /// Of how many.
    pub of: usize,
    /// Rows from the first to the last, inclusive.
    pub rows: (usize, usize),
    /// Columns from the first to the last, inclusive.
    pub columns: (usize, usize),
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
    /// Describes the differing elements; `None` where there are none.
    pub fn of(map: &Map) -> Option<Region> {
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
            patterns: Vec::new(),
        };
        let box_size = (rows.1 - rows.0 + 1) * (columns.1 - columns.0 + 1);
        if box_size < region.of && places.len() * 10 >= box_size * 9 {
            let share = 100 * places.len() / box_size;
            region.patterns.push(format!("they fill {share} % of that box, nothing outside"));
        }
        for pattern in &PATTERNS {
            if let Some(words) = classes(pattern, map, &places) {
                region.patterns.push(words);
            }
        }
        Some(region)
    }

    /// The region in words.
    pub fn words(&self) -> String {
        let mut words = format!(
            "({} of {} in {}) lie in rows {}..={} and columns {}..={}",
            grouped(self.elements),
            grouped(self.of),
            self.tensor,
            self.rows.0,
            self.rows.1,
            self.columns.0,
            self.columns.1
        );
        for pattern in &self.patterns {
            words += "; ";
            words += pattern;
        }
        words
    }
}

/// The classes that hold every differing element, where they are at most half of the classes.
fn classes(pattern: &Pattern, map: &Map, places: &[(usize, usize)]) -> Option<String> {
    let mut all = std::collections::BTreeMap::new();
    for row in 0..map.rows {
        *all.entry((pattern.class)(row, 0)).or_insert(0usize) += 0;
    }
    for column in 0..map.columns {
        all.entry((pattern.class)(0, column)).or_insert(0usize);
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
    Some(format!("{} = {} only (of {} classes)", pattern.name, hit.join(", "), all.len()))
}
