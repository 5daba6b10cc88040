//! `context_exchange`: rows of the parts of sequences among the context parallel ranks.
//!
//! Every rank has rows of its own parts: `rows[i]` on rank i of the group, one above the other in
//! the order of ranks. Attention is over all of them, and each of its heads by itself, so the ranks
//! turn rows of all heads into all rows of some heads and back (DeepSpeed-Ulysses, arXiv
//! 2309.14509). Bits are moved. In a group of one it is the identity.

use fathom_trace::{DType, Group, GroupKind, OpClass, TensorMeta};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::collective::alone;
use crate::Tensor;
use crate::op::example::{Example, shape};
use crate::op::{Op, OpError, Role, input, rules};

/// What each rank has before and after.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Turn {
    /// From its rows \[rows\[member\], columns\] to all rows of its share of the columns
    /// \[rows in all, columns / ranks\].
    ToHeads,
    /// Back: from \[rows in all, columns\] to \[rows\[member\], columns * ranks\].
    ToRows,
    /// From its rows \[rows\[member\], columns\] to those of all ranks \[rows in all, columns\].
    Gather,
}

/// Exchanges rows of the parts of sequences.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ContextExchange {
    /// The context parallel ranks, in the order of their parts.
    pub group: Group,
    /// This rank's place among them, from 0.
    pub member: usize,
    /// Rows of each rank.
    pub rows: Vec<usize>,
    /// What is exchanged.
    pub turn: Turn,
}

impl ContextExchange {
    fn total(&self) -> usize {
        self.rows.iter().sum()
    }
}

impl Op for ContextExchange {
    const NAME: &'static str = "context_exchange";
    const CLASS: OpClass = OpClass::Collective;
    const INPUTS: &'static [Role] = &[input("x")];
    const OUTPUTS: &'static [&'static str] = &["y"];

    fn example() -> Example {
        let (rows, columns) = (3, 4);
        let group = Group { kind: GroupKind::Cp, size: 1 };
        Example::new(ContextExchange { group, member: 0, rows: vec![rows], turn: Turn::ToHeads })
            .input("x", DType::BF16, shape![rows, columns])
            .output("y", shape![rows, columns])
    }

    fn infer(&self, inputs: &[Option<TensorMeta>]) -> Result<Vec<TensorMeta>, OpError> {
        let [Some(x)] = inputs else { unreachable!("mandatory") };
        rules::rank(x, 2, "[rows, columns]")?;
        let (ranks, total, columns) = (self.group.size, self.total(), x.shape[1]);
        let undefined = |message: String| Err(OpError::Undefined { op: Self::NAME, message });
        if self.rows.len() != ranks || self.member >= ranks {
            let (rows, member) = (&self.rows, self.member);
            return undefined(format!("rows {rows:?} and member {member} of {ranks} ranks"));
        }
        let own = self.rows[self.member];
        let (before, after) = match self.turn {
            Turn::ToHeads if !columns.is_multiple_of(ranks) => {
                return undefined(format!("{columns} columns do not divide by {ranks} ranks"));
            }
            Turn::ToHeads => (own, [total, columns / ranks]),
            Turn::ToRows => (total, [own, columns * ranks]),
            Turn::Gather => (own, [total, columns]),
        };
        rules::shape(x, &[before, columns])?;
        Ok(vec![rules::meta("y", x.dtype, &after)])
    }

    fn flops(&self, _inputs: &[Option<TensorMeta>]) -> u64 {
        0
    }

    fn bytes_sent(&self, inputs: &[Option<TensorMeta>]) -> u64 {
        let bytes = inputs[0].as_ref().expect("mandatory").bytes();
        let (others, ranks) = (self.group.size as u64 - 1, self.group.size as u64);
        match self.turn {
            Turn::ToHeads => bytes * others / ranks,
            Turn::ToRows => {
                let total = self.total() as u64;
                (bytes * (total - self.rows[self.member] as u64)).checked_div(total).unwrap_or(0)
            }
            Turn::Gather => bytes * others,
        }
    }

    fn run(&self, inputs: Vec<Option<Tensor>>) -> Result<Vec<Tensor>, OpError> {
        alone(Self::NAME, self.group)?;
        Ok(inputs.into_iter().flatten().collect())
    }
}

impl ContextExchange {
    /// What this rank gives to each of the group, of its `x`.
    pub(crate) fn sent(&self, x: &Tensor) -> Vec<Tensor> {
        let ranks = self.group.size;
        match self.turn {
            Turn::ToHeads => (0..ranks).map(|to| columns(x, to, ranks)).collect(),
            Turn::ToRows => {
                let (mut rest, width) = (x.bytes(), row_bytes(x));
                let mut block = |&rows: &usize| {
                    let (own, behind) = rest.split_at(rows * width);
                    rest = behind;
                    Tensor::from_bytes(x.dtype(), &[rows, x.shape()[1]], own)
                };
                self.rows.iter().map(&mut block).collect()
            }
            Turn::Gather => vec![x.clone(); ranks],
        }
    }

    /// What this rank has of what each of the group gave to it.
    pub(crate) fn received(&self, parts: &[Tensor]) -> Tensor {
        let (dtype, width) = (parts[0].dtype(), parts[0].shape()[1]);
        match self.turn {
            Turn::ToHeads | Turn::Gather => Tensor::filled(dtype, &[self.total(), width], |out| {
                let mut rest = out;
                for part in parts {
                    let (own, behind) = rest.split_at_mut(part.bytes().len());
                    own.copy_from_slice(part.bytes());
                    rest = behind;
                }
            }),
            Turn::ToRows => {
                let shape = [self.rows[self.member], width * parts.len()];
                let block = row_bytes(&parts[0]);
                Tensor::filled(dtype, &shape, |out| {
                    for (i, out) in out.chunks_exact_mut(block.max(1)).enumerate() {
                        let (row, part) = (i / parts.len(), &parts[i % parts.len()]);
                        out.copy_from_slice(&part.bytes()[row * block..][..block]);
                    }
                })
            }
        }
    }
}

fn row_bytes(x: &Tensor) -> usize {
    x.shape()[1] * x.dtype().size()
}

/// Block `index` of the columns, which are cut into `blocks` equal ones.
fn columns(x: &Tensor, index: usize, blocks: usize) -> Tensor {
    let (rows, width) = (x.shape()[0], x.shape()[1] / blocks);
    let (row, block) = (row_bytes(x), width * x.dtype().size());
    Tensor::filled(x.dtype(), &[rows, width], |out| {
        for (out, row) in out.chunks_exact_mut(block.max(1)).zip(x.bytes().chunks_exact(row.max(1)))
        {
            out.copy_from_slice(&row[index * block..][..block]);
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn op(rows: &[usize], member: usize, turn: Turn) -> ContextExchange {
        let group = Group { kind: GroupKind::Cp, size: rows.len() };
        ContextExchange { group, member, rows: rows.to_vec(), turn }
    }

    /// What the ranks have after an exchange, each by its own op.
    fn exchanged(rows: &[usize], turn: Turn, own: &[Tensor]) -> Vec<Tensor> {
        let ranks = 0..rows.len();
        let sent: Vec<Vec<Tensor>> =
            own.iter().enumerate().map(|(i, x)| op(rows, i, turn).sent(x)).collect();
        let received = |to: usize| {
            let parts: Vec<Tensor> = sent.iter().map(|of| of[to].clone()).collect();
            op(rows, to, turn).received(&parts)
        };
        ranks.map(received).collect()
    }

    /// Worked out by hand: element (row, column) is 10 row + column, ranks with 2 and 1 rows.
    #[test]
    fn rows_of_all_heads_become_all_rows_of_some_heads_and_back() {
        let x = |rows: std::ops::Range<i32>, columns: std::ops::Range<i32>| {
            let shape = [rows.len(), columns.len()];
            let one = |row: i32| columns.clone().map(move |column| 10 * row + column);
            Tensor::from_vec(&shape, rows.flat_map(one).collect::<Vec<i32>>())
        };
        let by_rows = [x(0..2, 0..4), x(2..3, 0..4)];
        let by_heads = exchanged(&[2, 1], Turn::ToHeads, &by_rows);
        assert_eq!(by_heads, [x(0..3, 0..2), x(0..3, 2..4)]);
        assert_eq!(exchanged(&[2, 1], Turn::ToRows, &by_heads), by_rows);
        assert_eq!(exchanged(&[2, 1], Turn::Gather, &by_rows), [x(0..3, 0..4), x(0..3, 0..4)]);
        // A rank without rows takes part all the same.
        let by_rows = [x(0..3, 0..2), x(3..3, 0..2)];
        let by_heads = exchanged(&[3, 0], Turn::ToHeads, &by_rows);
        assert_eq!(by_heads, [x(0..3, 0..1), x(0..3, 1..2)]);
        assert_eq!(exchanged(&[3, 0], Turn::ToRows, &by_heads), by_rows);
    }

    #[test]
    fn shapes_and_bytes_follow_from_the_rows_of_each_rank() {
        let meta = |rows, columns| [Some(rules::meta("x", DType::BF16, &[rows, columns]))];
        let shape = |op: &ContextExchange, x: &[Option<TensorMeta>]| {
            op.infer(x).map(|mut y| y.remove(0).shape)
        };
        let (rows, x) = ([2, 1], meta(2, 8));
        let to_heads = op(&rows, 0, Turn::ToHeads);
        assert_eq!(shape(&to_heads, &x).unwrap(), [3, 4]);
        assert_eq!(to_heads.bytes_sent(&x), 16);
        let to_rows = op(&rows, 0, Turn::ToRows);
        assert_eq!(shape(&to_rows, &meta(3, 4)).unwrap(), [2, 8]);
        assert_eq!(to_rows.bytes_sent(&meta(3, 4)), 8);
        let gather = op(&rows, 0, Turn::Gather);
        assert_eq!((shape(&gather, &x).unwrap(), gather.bytes_sent(&x)), (vec![3, 8], 32));
        assert!(shape(&to_heads, &meta(2, 7)).is_err());
        assert!(shape(&to_heads, &meta(3, 8)).is_err());
        assert!(shape(&op(&rows, 2, Turn::Gather), &x).is_err());
    }
}
