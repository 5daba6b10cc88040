//! What the bytes of a CTA's shared memory remember, kept once for sixteen neighbours that remember
//! the same: tensor copies and wgmma access such rows whole.

use super::Cell;

/// Bytes that may share what they remember: what wgmma and tensor copies access at least.
const ROW: usize = 16;

/// A row's bytes.
enum Row {
    /// All remember this.
    Alike(Cell),
    /// Each remembers something of its own.
    Apart(Box<[Cell; ROW]>),
}

impl Row {
    /// Byte by byte, whether or not they are alike.
    fn apart(&mut self) -> &mut [Cell; ROW] {
        if let Row::Alike(cell) = *self {
            *self = Row::Apart(Box::new([cell; ROW]));
        }
        match self {
            Row::Apart(cells) => cells,
            Row::Alike(_) => unreachable!("set apart above"),
        }
    }
}

/// What every byte of a CTA's shared memory remembers.
#[derive(Default)]
pub(super) struct Cells {
    bytes: usize,
    rows: Vec<Row>,
}

impl Cells {
    /// Of so many bytes that nobody has accessed.
    pub(super) fn new(bytes: usize) -> Cells {
        let rows = (0..bytes.div_ceil(ROW)).map(|_| Row::Alike(Cell::default())).collect();
        Cells { bytes, rows }
    }

    /// What a byte remembers; absent behind the end.
    pub(super) fn get(&self, byte: usize) -> Option<&Cell> {
        if byte >= self.bytes {
            return None;
        }
        match &self.rows[byte / ROW] {
            Row::Alike(cell) => Some(cell),
            Row::Apart(cells) => Some(&cells[byte % ROW]),
        }
    }

    /// Calls `f` with what `count` bytes from `first` on remember, once for bytes that are alike;
    /// what lies behind the end is left out.
    pub(super) fn each(&mut self, first: usize, count: usize, mut f: impl FnMut(&mut Cell)) {
        let end = (first + count).min(self.bytes);
        let mut at = first;
        while at < end {
            let (row, from) = (at / ROW, at % ROW);
            let to = (end - row * ROW).min(ROW);
            let whole = from == 0 && to == ROW;
            match &mut self.rows[row] {
                Row::Alike(cell) if whole => f(cell),
                row => {
                    let cells = row.apart();
                    cells[from..to].iter_mut().for_each(&mut f);
                    let one = cells[0];
                    if whole && cells.iter().all(|cell| *cell == one) {
                        *row = Row::Alike(one);
                    }
                }
            }
            at = row * ROW + to;
        }
    }

    /// What bytes remember, with the first of those that are alike.
    pub(super) fn iter(&self) -> impl Iterator<Item = (usize, &Cell)> {
        self.rows.iter().enumerate().flat_map(|(row, of)| {
            let cells = match of {
                Row::Alike(cell) => std::slice::from_ref(cell),
                Row::Apart(cells) => &cells[..],
            };
            cells.iter().enumerate().map(move |(byte, cell)| (row * ROW + byte, cell))
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::Access;
    use super::*;

    /// A step of a test: marks bytes, or counts what they are marked with.
    fn marked(mark: u32) -> Cell {
        Cell { write: Access { clock: mark, ..Access::default() }, ..Cell::default() }
    }

    proptest! {
        /// The bytes remember what they would remember each for itself.
        #[test]
        fn bytes_that_are_kept_together_are_bytes(
            bytes in 1usize..100,
            steps in prop::collection::vec((0usize..110, 0usize..70, 0u32..3), 0..40),
        ) {
            let (mut cells, mut plain) = (Cells::new(bytes), vec![Cell::default(); bytes]);
            for (first, count, mark) in steps {
                let change = |cell: &mut Cell| match mark {
                    0 => cell.layout = cell.layout.wrapping_add(1),
                    mark => *cell = marked(mark),
                };
                cells.each(first, count, change);
                let end = (first + count).min(bytes);
                plain[first.min(end)..end].iter_mut().for_each(change);
                for (byte, expected) in plain.iter().enumerate() {
                    prop_assert_eq!(cells.get(byte), Some(expected));
                }
                prop_assert_eq!(cells.get(bytes), None);
                for (first, cell) in cells.iter().filter(|(first, _)| *first < bytes) {
                    prop_assert_eq!(cell, &plain[first]);
                }
            }
        }
    }
}
