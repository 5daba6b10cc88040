//! A with half of its elements zero: which columns the stored ones belong to (PTX ISA, "Sparse
//! matrix storage" and "Matrix fragments for multiply-accumulate operation with sparse matrix A").
//!
//! Four bits of metadata say which two of four places are stored: columns of 16 and 8 bits, pairs
//! of columns of 4 bits, and halves of a column of 32 bits (of which there is one of two). A row of
//! 16 rows a warp has `k` bits of metadata for 8 and 16 bits an element, `k / 2` for 4, `2 k` for
//! 32, in the lanes of its quad: lanes of 16- and 32-bit elements hold 16 columns' (8 columns') for
//! row g in their lower and for row g + 8 in their upper half; lanes of 8- and 4-bit elements hold
//! 32 (64) columns' of one row, even lanes of row g and odd ones of row g + 8. Where not all lanes
//! are needed, the selector says which. CUTLASS's `reorder_meta` and its layouts of metadata for
//! wgmma say the same.
//!
//! The product is the dense instruction's over the stored elements: `k / 2` of them a row, each
//! with the element of B that its column meets. So it is where ptxas (13.5, sm_90) takes one apart:
//! FP8 becomes two F16 products of the stored elements 0, 1 and 2, 3 mod 4 and an addition of C, as
//! of a dense A.

use crate::error::Ub;
use crate::machine::cx::Cx;
use crate::machine::product::Product;
use crate::machine::registers::LANES;

/// Rows of A a warp.
const ROWS: usize = 16;

/// Metadata of one instruction, from the register of each lane.
#[derive(Clone, Copy)]
pub struct Metadata {
    pub words: [u32; LANES],
    /// Which lanes of a quad count, where not all do.
    pub selector: u32,
    /// Bits of an element of A.
    pub bits: u32,
    /// Columns of A, zeros included.
    pub k: usize,
}

impl Metadata {
    /// Bits of metadata of a row.
    fn row_bits(&self) -> usize {
        match self.bits {
            32 => 2 * self.k,
            4 => self.k / 2,
            _ => self.k,
        }
    }

    /// Whether the selector may be this one.
    pub fn selector_fits(bits: u32, k: usize, selector: u64) -> bool {
        let metadata = Metadata { words: [0; LANES], selector: 0, bits, k };
        let lanes = 2 * metadata.row_bits() / 32;
        selector < (4 / lanes) as u64
    }

    /// The metadata of one row.
    fn row(&self, row: usize) -> u64 {
        let (g, high) = (row % 8, row / 8);
        let (bits, selector) = (self.row_bits(), self.selector as usize);
        let lane = |i: usize| u64::from(self.words[4 * g + i]);
        if self.bits >= 16 {
            let lanes = bits / 16;
            let part = |i: usize| (lane(selector * lanes + i) >> (16 * high) & 0xffff) << (16 * i);
            return (0..lanes).map(part).sum();
        }
        let lanes = bits / 32;
        (0..lanes).map(|i| lane(2 * (selector + i) + high) << (32 * i)).sum()
    }

    /// The column of each stored element: 16 rows of `k / 2`. Also whether each is what the ISA
    /// allows: two places that differ, in their order.
    pub fn columns(&self) -> (Vec<usize>, Vec<bool>) {
        let stored = self.k / 2;
        let mut columns = Vec::with_capacity(ROWS * stored);
        let mut valid = Vec::with_capacity(ROWS * stored);
        for r in 0..ROWS {
            let row = self.row(r);
            for chunk in 0..self.row_bits() / 4 {
                let [first, second] = [0, 2].map(|at| (row >> (4 * chunk + at) & 3) as usize);
                let start = columns.len();
                match self.bits {
                    32 => columns.push(2 * chunk + first / 2),
                    4 => {
                        let pair = |place: usize| [0, 1].map(|i| 8 * chunk + 2 * place + i);
                        columns.extend(pair(first).into_iter().chain(pair(second)));
                    }
                    _ => columns.extend([4 * chunk + first, 4 * chunk + second]),
                }
                let fits = match self.bits {
                    32 => first % 2 == 0 && second == first + 1,
                    _ => first != second,
                };
                valid.extend((start..columns.len()).map(|_| fits));
            }
        }
        (columns, valid)
    }

    /// `d += a b`: `a` is 16 x k/2 as stored, `b` n x k, `d` 16 x n, all row-major, in codes.
    pub fn multiply(
        &self,
        cx: &mut Cx<'_>,
        product: &Product,
        n: usize,
        [a, b]: [&[u32]; 2],
        d: &mut [u32],
    ) {
        let (stored, k) = (self.k / 2, self.k);
        let (columns, valid) = self.columns();
        let wrong = valid.iter().zip(a).position(|(valid, a)| !valid && *a != 0);
        if let Some(at) = wrong.filter(|_| cx.grid.settings.checks.any()) {
            let (row, element) = (at / stored, at % stored);
            let lane = 4 * (row % 8);
            let message = format!(
                "metadata of row {row} names no two places for its stored element {element}, \
                 which is not zero"
            );
            cx.report(Ub::BadDescriptor, Some(lane), None, message);
        }
        let mut met = vec![0; n * stored];
        for row in 0..ROWS {
            let columns = &columns[row * stored..][..stored];
            for (met, b) in met.chunks_exact_mut(stored).zip(b.chunks_exact(k)) {
                met.iter_mut().zip(columns).for_each(|(met, &column)| *met = b[column]);
            }
            let a = &a[row * stored..][..stored];
            product.run32(&cx.grid.preset, [1, n, stored], a, &met, &mut d[row * n..][..n]);
        }
    }
}
