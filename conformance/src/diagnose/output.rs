//! Hypotheses about the output as a whole, for every op: values that are none of the op's, or the
//! op's values in other places.
//!
//! They need the contract's output only, so any op that the reference computes has them.

use fathom_reference::Tensor;
use fathom_trace::DType;

use super::hypothesis::{
    Change, Expanded, Family, Hypothesis, OUTPUT, Row, Sample, each, one, one_if,
};
use crate::compare;

/// What stands in the output instead of the contract's element of that place.
#[derive(Clone, Copy, Debug)]
enum Holds {
    Contract,
    Nan,
    /// As the contract, but a NaN may have any bits.
    AnyNan,
    Zero,
    Bits(u64),
    /// The contract's value under a function of it, rounded to the output's type.
    Value(fn(f64) -> f64),
    /// The contract's element of another place; none: zero.
    Place(fn(Shape, usize, usize) -> Option<(usize, usize)>),
    /// Row-major with rows that far apart instead of the number of columns.
    LeadingDimension(usize),
    /// The row that many rows before.
    RowsBefore(usize),
    /// The place within a tile of that many rows and columns transposed.
    TileTransposed(usize),
    /// Rows, columns within a tile repeated: every tile holds the first one's.
    RowModulo(usize),
    ColumnModulo(usize),
    /// The rows, or columns, that the file's were found to be.
    RowsFound,
    ColumnsFound,
    /// The bits of the value in FP16.
    F16Bits,
}

/// Rows and columns of the (first) output.
#[derive(Clone, Copy, Debug)]
pub(super) struct Shape {
    rows: usize,
    columns: usize,
}

#[derive(Clone)]
struct Variant {
    holds: Holds,
}

/// Every row is a variant of its own: functions cannot be compared.
impl PartialEq for Variant {
    fn eq(&self, _: &Variant) -> bool {
        false
    }
}

/// What the rows of the table look at.
pub(super) struct Outputs {
    /// Name, file's tensor, contract's tensor of each output, in order.
    tensors: Vec<(Tensor, Tensor)>,
    shape: Shape,
    /// The commonest bits among the differing elements, where they are most of them.
    filled_with: Option<u64>,
    /// Which of the contract's rows (columns) each of the file's is, where most are one.
    rows_from: Vec<Option<usize>>,
    columns_from: Vec<Option<usize>>,
    /// How far before a differing row the row lies whose bits it repeats.
    repeats: Vec<usize>,
}

const ROWS: &[Row<Outputs, Variant>] = &[
    Row {
        axis: OUTPUT,
        name: "all NaN",
        meaning: "The elements are NaN: a division 0/0, an overflow in between, or memory that nobody \
                  wrote and that held NaN.",
        seen: "DeepGEMM issue #20, FlashInfer PR #3650",
        changes: |_| one(|v| v.holds = Holds::Nan),
    },
    Row {
        axis: OUTPUT,
        name: "all zero",
        meaning: "The elements are zero: the kernel did not run, returned early, or wrote elsewhere.",
        seen: "FlashInfer issue #4267",
        changes: |_| one(|v| v.holds = Holds::Zero),
    },
    Row {
        axis: OUTPUT,
        name: "one bit pattern throughout ({})",
        meaning: "Every element has the same bits: unwritten memory with its fill pattern.",
        seen: "Primus-Turbo issue #397",
        changes: |c| filled(c),
    },
    Row {
        axis: OUTPUT,
        name: "NaNs with other bits than the canonical one",
        meaning: "NaN stands where it should, with another sign or payload.",
        seen: "",
        changes: |_| one(|v| v.holds = Holds::AnyNan),
    },
    Row {
        axis: OUTPUT,
        name: "output transposed",
        meaning: "The result is stored column-major, or as a transposed view's memory.",
        seen: "FlashInfer issue #3103",
        changes: |_| {
            one(|v| {
                v.holds = Holds::Place(|s, i, j| {
                    let at = i * s.columns + j;
                    Some((at % s.rows, at / s.rows))
                })
            })
        },
    },
    Row {
        axis: OUTPUT,
        name: "output transposed within tiles of {} x {}",
        meaning: "Each tile is stored transposed, as by a missing `.trans` of stmatrix.",
        seen: "",
        changes: |_| each([8, 16, 64, 128], |v, t| v.holds = Holds::TileTransposed(t)),
    },
    Row {
        axis: OUTPUT,
        name: "rows one too late",
        meaning: "Row i holds what belongs into row i - 1.",
        seen: "",
        changes: |_| one(|v| v.holds = Holds::Place(|_, i, j| i.checked_sub(1).map(|i| (i, j)))),
    },
    Row {
        axis: OUTPUT,
        name: "rows one too early",
        meaning: "Row i holds what belongs into row i + 1.",
        seen: "",
        changes: |_| one(|v| v.holds = Holds::Place(|_, i, j| Some((i + 1, j)))),
    },
    Row {
        axis: OUTPUT,
        name: "columns one too late",
        meaning: "Column j holds what belongs into column j - 1.",
        seen: "",
        changes: |_| one(|v| v.holds = Holds::Place(|_, i, j| j.checked_sub(1).map(|j| (i, j)))),
    },
    Row {
        axis: OUTPUT,
        name: "columns one too early",
        meaning: "Column j holds what belongs into column j + 1.",
        seen: "",
        changes: |_| one(|v| v.holds = Holds::Place(|_, i, j| Some((i, j + 1)))),
    },
    Row {
        axis: OUTPUT,
        name: "neighbouring columns exchanged",
        meaning: "Columns 2j and 2j + 1 are exchanged: the two halves of a packed pair.",
        seen: "",
        changes: |_| one(|v| v.holds = Holds::Place(|_, i, j| Some((i, j ^ 1)))),
    },
    Row {
        axis: OUTPUT,
        name: "rows r and r + 8 of a fragment exchanged",
        meaning: "The two row halves of a 16-row accumulator fragment are exchanged.",
        seen: "",
        changes: |_| one(|v| v.holds = Holds::Place(|_, i, j| Some((i ^ 8, j)))),
    },
    Row {
        axis: OUTPUT,
        name: "columns c and c + 8 of a fragment exchanged",
        meaning: "Two neighbouring 8-column pieces of the accumulator are exchanged.",
        seen: "",
        changes: |_| one(|v| v.holds = Holds::Place(|_, i, j| Some((i, j ^ 8)))),
    },
    Row {
        axis: OUTPUT,
        name: "the two 64-row halves of a 128-row tile exchanged",
        meaning: "Two math warpgroups store each other's rows.",
        seen: "",
        changes: |_| one(|v| v.holds = Holds::Place(|_, i, j| Some((i ^ 64, j)))),
    },
    Row {
        axis: OUTPUT,
        name: "rows in reverse",
        meaning: "The rows are stored from the last to the first.",
        seen: "",
        changes: |_| one(|v| v.holds = Holds::Place(|s, i, j| Some((s.rows - 1 - i, j)))),
    },
    Row {
        axis: OUTPUT,
        name: "every row holds row 0",
        meaning: "The row index does not enter the result.",
        seen: "",
        changes: |_| one(|v| v.holds = Holds::Place(|_, _, j| Some((0, j)))),
    },
    Row {
        axis: OUTPUT,
        name: "every column holds column 0",
        meaning: "The column index does not enter the result.",
        seen: "",
        changes: |_| one(|v| v.holds = Holds::Place(|_, i, _| Some((i, 0)))),
    },
    Row {
        axis: OUTPUT,
        name: "rows modulo {}",
        meaning: "Every tile of rows holds the first tile's result: the tile's row offset is missing.",
        seen: "",
        changes: |_| each([8, 16, 32, 64, 128, 256], |v, t| v.holds = Holds::RowModulo(t)),
    },
    Row {
        axis: OUTPUT,
        name: "columns modulo {}",
        meaning: "Every tile of columns holds the first tile's result: the tile's column offset is \
                  missing.",
        seen: "",
        changes: |_| each([8, 16, 32, 64, 128, 256], |v, t| v.holds = Holds::ColumnModulo(t)),
    },
    Row {
        axis: OUTPUT,
        name: "stored with {} elements from row to row",
        meaning: "The store's leading dimension is not the number of columns.",
        seen: "FlashInfer issue #3103",
        changes: |c| leading_dimensions(c),
    },
    Row {
        axis: OUTPUT,
        name: "rows that repeat those {} rows before",
        meaning: "Rows hold other rows of the same output: stale shared memory or registers of the \
                  tile before, stored once more.",
        seen: "",
        changes: |c| each(c.repeats.clone(), |v, d| v.holds = Holds::RowsBefore(d)),
    },
    Row {
        axis: OUTPUT,
        name: "rows in another order",
        meaning: "The file's rows are rows of the contract's output, in other places.",
        seen: "",
        changes: |c| one_if(!c.rows_from.is_empty(), |v| v.holds = Holds::RowsFound),
    },
    Row {
        axis: OUTPUT,
        name: "columns in another order",
        meaning: "The file's columns are columns of the contract's output, in other places.",
        seen: "",
        changes: |c| one_if(!c.columns_from.is_empty(), |v| v.holds = Holds::ColumnsFound),
    },
    Row {
        axis: OUTPUT,
        name: "FP16 bits in a BF16 tensor",
        meaning: "The result is stored as FP16 where BF16 is expected.",
        seen: "",
        changes: |c| {
            let bf16 = c.tensors[0].0.dtype() == DType::BF16;
            one_if(bf16, |v| v.holds = Holds::F16Bits)
        },
    },
    Row {
        axis: OUTPUT,
        name: "output negated",
        meaning: "Every element has the other sign.",
        seen: "",
        changes: |_| one(|v| v.holds = Holds::Value(|x| -x)),
    },
    Row {
        axis: OUTPUT,
        name: "output through ReLU",
        meaning: "Negative elements became zero: an epilogue of another kernel.",
        seen: "",
        changes: |_| one(|v| v.holds = Holds::Value(|x| if x < 0.0 { 0.0 } else { x })),
    },
    Row {
        axis: OUTPUT,
        name: "magnitude of the output",
        meaning: "The sign is lost.",
        seen: "",
        changes: |_| one(|v| v.holds = Holds::Value(f64::abs)),
    },
    Row {
        axis: OUTPUT,
        name: "output clamped to the range of E4M3",
        meaning: "Elements beyond 448 became 448, as for a cast that follows.",
        seen: "",
        changes: |c| one_if(c.is_float(), |v| v.holds = Holds::Value(|x| x.clamp(-448.0, 448.0))),
    },
    Row {
        axis: OUTPUT,
        name: "output clamped to the range of FP16",
        meaning: "Elements beyond 65504 became 65504.",
        seen: "",
        changes: |c| {
            one_if(c.is_float(), |v| v.holds = Holds::Value(|x| x.clamp(-65504.0, 65504.0)))
        },
    },
    Row {
        axis: OUTPUT,
        name: "subnormal outputs flushed to zero",
        meaning: "Elements below the smallest normal number became zero (ftz).",
        seen: "",
        changes: |c| one_if(c.is_float(), |v| v.holds = Holds::Value(flushed)),
    },
    Row {
        axis: OUTPUT,
        name: "negative zeros stored as zero",
        meaning: "A zero's sign is lost, as by adding +0.",
        seen: "",
        changes: |c| one_if(c.is_float(), |v| v.holds = Holds::Value(|x| x + 0.0)),
    },
];

/// The table, for documentation.
pub(super) fn table() -> Vec<[&'static str; 3]> {
    ROWS.iter().map(|r| [r.name, r.meaning, r.seen]).collect()
}

fn filled(c: &Outputs) -> Vec<Change<Variant>> {
    #[derive(Clone)]
    struct Pattern(u64, DType);
    impl std::fmt::Display for Pattern {
        fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            f.write_str(&compare::hex(self.1, self.0))
        }
    }
    let dtype = c.tensors[0].0.dtype();
    each(c.filled_with.map(|bits| Pattern(bits, dtype)), |v, p| v.holds = Holds::Bits(p.0))
}

fn leading_dimensions(c: &Outputs) -> Vec<Change<Variant>> {
    let columns = c.shape.columns;
    let mut all: Vec<usize> = [8, 16, 32, 64, 128, 256]
        .iter()
        .flat_map(|&t| [columns.next_multiple_of(t), columns / t * t])
        .chain([columns + 1, columns + 8, columns + 16, c.shape.rows])
        .filter(|&d| d != columns && d > 0)
        .collect();
    all.sort_unstable();
    all.dedup();
    each(all, |v, d| v.holds = Holds::LeadingDimension(d))
}

impl Outputs {
    fn is_float(&self) -> bool {
        matches!(self.tensors[0].0.dtype(), DType::F32 | DType::BF16 | DType::F16 | DType::F64)
    }

    /// The rows before a differing row whose bits it repeats, for a few differing rows.
    fn repeats(tensors: &[(Tensor, Tensor)], shape: Shape) -> Vec<usize> {
        let (file, contract) = &tensors[0];
        let width = file.bytes().len() / shape.rows.max(1);
        if width == 0 {
            return Vec::new();
        }
        let rows =
            |t: &Tensor| -> Vec<Vec<u8>> { t.bytes().chunks(width).map(<[u8]>::to_vec).collect() };
        let (file, contract) = (rows(file), rows(contract));
        let differing: Vec<usize> =
            (0..file.len()).filter(|&r| file[r] != contract[r]).take(4096).collect();
        let mut found = Vec::new();
        for &row in super::hypothesis::spread(differing.len(), 8).map(|i| &differing[i]) {
            // A constant row repeats whatever else is constant.
            if file[row].iter().all(|b| *b == file[row][0]) {
                continue;
            }
            let before = (0..row).rev().find(|&r| contract[r] == file[row]);
            found.extend(before.map(|r| row - r));
        }
        found.sort_unstable();
        found.dedup();
        found
    }

    /// For each row (column) of the file, the contract's of the same bits; empty where fewer than
    /// nine in ten are found, or all are in place.
    fn found_lines(
        (file, contract): &(Tensor, Tensor),
        shape: Shape,
        rows: bool,
    ) -> Vec<Option<usize>> {
        let (lines, across) =
            if rows { (shape.rows, shape.columns) } else { (shape.columns, shape.rows) };
        // One element says nothing about its line.
        if across < 4 || file.bytes() == contract.bytes() {
            return Vec::new();
        }
        let line = |t: &Tensor, l: usize| -> Vec<u64> {
            let at = |o| if rows { l * shape.columns + o } else { o * shape.columns + l };
            (0..across).map(|o| t.bits(at(o))).collect()
        };
        let known: std::collections::HashMap<Vec<u64>, usize> =
            (0..lines).rev().map(|l| (line(contract, l), l)).collect();
        let from: Vec<Option<usize>> =
            (0..lines).map(|l| known.get(&line(file, l)).copied()).collect();
        let found = from.iter().flatten().count();
        let moved = from.iter().enumerate().filter(|(l, f)| f.is_some_and(|f| f != *l)).count();
        if found * 10 >= lines * 9 && moved > 0 { from } else { Vec::new() }
    }

    /// The bits that most of the differing elements share.
    fn filled_with(tensors: &[(Tensor, Tensor)]) -> Option<u64> {
        let (file, contract) = &tensors[0];
        let (mut candidate, mut lead, mut differing) = (0, 0usize, 0usize);
        let differs = |i: &usize| file.bits(*i) != contract.bits(*i);
        for i in (0..file.len()).filter(differs) {
            differing += 1;
            match (lead, file.bits(i)) {
                (0, bits) => (candidate, lead) = (bits, 1),
                (_, bits) if bits == candidate => lead += 1,
                _ => lead -= 1,
            }
        }
        let filled = (0..file.len()).filter(differs).filter(|&i| file.bits(i) == candidate).count();
        (filled * 10 > differing * 9).then_some(candidate)
    }
}

/// The hypotheses about whole outputs.
pub(super) struct OutputFamily {
    outputs: Outputs,
    expanded: Expanded<Variant>,
}

impl OutputFamily {
    /// From file's and contract's tensors, in the order of the op's roles.
    pub(super) fn new(tensors: Vec<(Tensor, Tensor)>) -> OutputFamily {
        let (rows, columns) = match tensors[0].0.shape() {
            [] => (1, 1),
            _ => tensors[0].0.rows_columns(),
        };
        let shape = Shape { rows, columns };
        let outputs = Outputs {
            filled_with: Outputs::filled_with(&tensors),
            rows_from: Outputs::found_lines(&tensors[0], shape, true),
            columns_from: Outputs::found_lines(&tensors[0], shape, false),
            repeats: Outputs::repeats(&tensors, shape),
            tensors,
            shape,
        };
        let expanded = Expanded::new(ROWS, &outputs, Variant { holds: Holds::Contract });
        OutputFamily { outputs, expanded }
    }

    fn element(&self, holds: Holds, element: usize) -> u64 {
        let mut at = element;
        let mut output = 0;
        while at >= self.outputs.tensors[output].0.len() {
            at -= self.outputs.tensors[output].0.len();
            output += 1;
        }
        let (file, contract) = &self.outputs.tensors[output];
        let dtype = file.dtype();
        let is_nan = |bits| compare::value(dtype, bits).is_some_and(f64::is_nan);
        // Places are those of the first output; the others stay.
        let place = |to: Option<(usize, usize)>| match to {
            _ if output > 0 => contract.bits(at),
            Some((i, j)) if i < self.outputs.shape.rows && j < self.outputs.shape.columns => {
                contract.bits(i * self.outputs.shape.columns + j)
            }
            _ => 0,
        };
        let columns = self.outputs.shape.columns.max(1);
        let (i, j) = (at / columns, at % columns);
        match holds {
            Holds::Contract => contract.bits(at),
            // For types without a NaN, bits that are not the file's.
            Holds::Nan => encode(dtype, f64::NAN).unwrap_or(!file.bits(at)),
            Holds::AnyNan if is_nan(file.bits(at)) && is_nan(contract.bits(at)) => file.bits(at),
            Holds::AnyNan => contract.bits(at),
            Holds::Zero => 0,
            Holds::Bits(bits) => bits,
            Holds::Value(f) => match compare::value(dtype, contract.bits(at)) {
                Some(x) if !x.is_nan() => encode(dtype, f(x)).unwrap_or(contract.bits(at)),
                _ => contract.bits(at),
            },
            Holds::Place(to) => place(to(self.outputs.shape, i, j)),
            Holds::LeadingDimension(d) => {
                // The last row to write a place wins where rows overlap.
                let row = (at / d).min(self.outputs.shape.rows.saturating_sub(1));
                let column = at - row * d;
                place((column < columns).then_some((row, column)))
            }
            Holds::RowsBefore(d) => match i.checked_sub(d) {
                Some(row) => place(Some((row, j))),
                None => contract.bits(at),
            },
            Holds::TileTransposed(t) => {
                let (r, c) = (i % t, j % t);
                place(Some((i - r + c, j - c + r)))
            }
            Holds::RowsFound => {
                place(self.outputs.rows_from.get(i).copied().flatten().map(|i| (i, j)))
            }
            Holds::ColumnsFound => {
                place(self.outputs.columns_from.get(j).copied().flatten().map(|j| (i, j)))
            }
            Holds::F16Bits => match compare::value(dtype, contract.bits(at)) {
                Some(x) => half::f16::from_f64(x).to_bits().into(),
                None => contract.bits(at),
            },
            Holds::RowModulo(t) => place(Some((i % t, j))),
            Holds::ColumnModulo(t) => place(Some((i, j % t))),
        }
    }
}

fn flushed(x: f64) -> f64 {
    if x.abs() < f64::from(f32::MIN_POSITIVE) { 0f64.copysign(x) } else { x }
}

/// The bits of a value in an output's type, to nearest even; `None` for types that are no numbers.
fn encode(dtype: DType, x: f64) -> Option<u64> {
    use fathom_numerics::formats::{Layout, Overflow, Rounding};
    let layout = match dtype {
        DType::F64 => return Some(x.to_bits()),
        DType::F32 => &Layout::F32,
        DType::BF16 => &Layout::BF16,
        DType::F16 => &Layout::F16,
        DType::F8E4M3 => &Layout::E4M3,
        DType::F8E5M2 => &Layout::E5M2,
        _ => return None,
    };
    Some(u64::from(layout.from_f64(x, Rounding::NearestEven, Overflow::Ieee)))
}

impl Family for OutputFamily {
    fn hypotheses(&self) -> &[Hypothesis] {
        &self.expanded.hypotheses
    }

    fn evaluate(&self, chosen: &[usize], sample: &Sample) -> Option<Vec<u64>> {
        let holds = self.expanded.variant(chosen).holds;
        Some(sample.elements.iter().map(|&e| self.element(holds, e)).collect())
    }

    fn cost_per_element(&self) -> u64 {
        1
    }
}
