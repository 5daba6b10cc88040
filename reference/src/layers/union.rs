//! Micro-batches that share one call of the routed experts (`expert_union`), and the ranks of an
//! expert-parallel group: whose rows lie where.
//!
//! An expert's rows are those of the first micro-batch of the union, then those of the second, and
//! so on; within a micro-batch by part of its sequences, then in order of slot. Of a rank's own
//! micro-batches each has a number, and those of a rank come before those of the next; but the
//! parts of a micro-batch that lie on context parallel ranks stand together. Bits are only moved,
//! on the host.

use crate::EngineError;
use crate::Tensor;
use crate::backend::{Backend, Result};
use crate::layers::Cx;
use crate::layers::operand::{Codes, Operand};

/// How the rows of several micro-batches become those of one call.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Union {
    /// Rows of each local expert, of all micro-batches.
    counts: Vec<usize>,
    /// Rows of each micro-batch.
    rows: Vec<usize>,
    /// Of each row of the call, its place in the micro-batches' rows one after the other; none
    /// where there is one micro-batch, whose rows are the call's.
    order: Option<Vec<usize>>,
}

/// Where the parts of a micro-batch are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Parts {
    /// Neighbouring ranks of the group that have parts of the same micro-batches.
    pub ranks: usize,
    /// Neighbouring lanes of a rank that are parts of one micro-batch.
    pub each: usize,
}

impl Union {
    /// The union of micro-batches, or parts of them, whose rows lie by expert, then by rank:
    /// `received` is \[rank\] \[expert\] of each.
    ///
    /// # Panics
    /// Where there is none.
    pub fn new<'a>(received: impl Iterator<Item = &'a Vec<Vec<usize>>>, parts: Parts) -> Union {
        let received: Vec<&Vec<Vec<usize>>> = received.collect();
        let (ranks, experts) = (received[0].len(), received[0][0].len());
        let rows: Vec<usize> = received.iter().map(|r| r.iter().flatten().sum()).collect();
        let of_expert = |e: usize| received.iter().flat_map(|r| r.iter()).map(|r| r[e]).sum();
        let counts = (0..experts).map(of_expert).collect();
        if received.len() == 1 {
            return Union { counts, rows, order: None };
        }
        // Where the next row of each micro-batch stands, in the rows one after the other.
        let first = rows.iter().scan(0, |sum, &n| {
            *sum += n;
            Some(*sum - n)
        });
        // A block for each expert, replica, micro-batch and rank of the replica, in this order.
        let Parts { ranks: beside, each } = parts;
        let micro_batches = received.len() / each;
        let mut blocks = vec![vec![Vec::new(); ranks * micro_batches]; experts];
        for (lane, mut next) in first.enumerate() {
            for (e, blocks) in blocks.iter_mut().enumerate() {
                for rank in 0..ranks {
                    let micro_batch = rank / beside * micro_batches + lane / each;
                    let block = &mut blocks[micro_batch * beside + rank % beside];
                    let count = received[lane][rank][e];
                    block.extend(next..next + count);
                    next += count;
                }
            }
        }
        let order = blocks.into_iter().flatten().flatten().collect();
        Union { counts, rows, order: Some(order) }
    }

    /// Rows of each local expert.
    pub fn counts(&self) -> &[usize] {
        &self.counts
    }

    /// The rows of all micro-batches \[rows, ..\] as the experts' call has them.
    ///
    /// # Errors
    /// Those of the backend.
    pub fn join<'b, B: Backend>(
        &self,
        backend: &B,
        mut parts: impl Iterator<Item = &'b B::Buffer>,
    ) -> Result<B::Buffer>
    where
        B::Buffer: 'b,
    {
        let Some(order) = &self.order else {
            return Ok(parts.next().expect("one micro-batch").clone());
        };
        let parts = parts.map(|x| backend.download(x)).collect::<Result<Vec<Tensor>>>()?;
        let bytes: Vec<u8> = parts.iter().flat_map(|x| x.bytes()).copied().collect();
        let width = bytes.len() / order.len().max(1);
        let rows = order.iter().flat_map(|&row| &bytes[row * width..][..width]);
        let mut shape = parts[0].shape().to_vec();
        shape[0] = order.len();
        let rows: Vec<u8> = rows.copied().collect();
        backend.upload(Tensor::from_bytes(parts[0].dtype(), &shape, &rows))
    }

    /// As [`Union::join`] for operands.
    ///
    /// # Errors
    /// Those of the backend; [`EngineError::Unsupported`] where a scale spans rows of several
    /// micro-batches.
    pub fn join_operands<'b, B: Backend + 'b>(
        &self,
        cx: &Cx<'_, B>,
        parts: impl Iterator<Item = &'b Operand<B>>,
    ) -> Result<Operand<B>> {
        let parts: Vec<&Operand<B>> = parts.collect();
        if self.order.is_none() {
            return Ok(parts[0].clone());
        }
        let backend = cx.backend;
        let (mut plain, mut q, mut scale) = (Vec::new(), Vec::new(), Vec::new());
        for part in &parts {
            match part {
                Operand::Plain(x) => plain.push(x),
                Operand::Codes(codes) => {
                    q.push(&codes.q);
                    scale.push(&codes.scale);
                }
            }
        }
        match parts[0] {
            Operand::Plain(_) => Ok(Operand::Plain(self.join(backend, plain.into_iter())?)),
            Operand::Codes(codes @ Codes { block: [Some(1), _], .. }) => {
                let q = self.join(backend, q.into_iter())?;
                let scale = self.join(backend, scale.into_iter())?;
                Ok(Operand::Codes(Codes { q, scale, ..*codes }))
            }
            Operand::Codes(_) => Err(EngineError::Unsupported {
                engine: backend.name(),
                op: "dispatch".into(),
                reason: "expert_union needs scales within rows (tiles of 1 x n)".into(),
            }),
        }
    }

    /// The transpose of [`Union::join`]: each micro-batch's rows.
    ///
    /// # Errors
    /// Those of the backend.
    pub fn split<B: Backend>(&self, backend: &B, joined: B::Buffer) -> Result<Vec<B::Buffer>> {
        let Some(order) = &self.order else { return Ok(vec![joined]) };
        let joined = backend.download(&joined)?;
        let width = joined.bytes().len() / order.len().max(1);
        let mut bytes = vec![0; joined.bytes().len()];
        for (from, &to) in order.iter().enumerate() {
            bytes[to * width..][..width].copy_from_slice(&joined.bytes()[from * width..][..width]);
        }
        let (mut rest, mut parts) = (&bytes[..], Vec::with_capacity(self.rows.len()));
        for &rows in &self.rows {
            let (own, after) = rest.split_at(rows * width);
            let mut shape = joined.shape().to_vec();
            shape[0] = rows;
            parts.push(backend.upload(Tensor::from_bytes(joined.dtype(), &shape, own))?);
            rest = after;
        }
        Ok(parts)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::Reference;

    const WHOLE: Parts = Parts { ranks: 1, each: 1 };

    /// Two micro-batches from two ranks to two experts, rows named by (expert, rank, micro-batch,
    /// place): worked out by hand.
    #[test]
    fn rows_stand_by_expert_then_rank_then_micro_batch() {
        let received = [vec![vec![2, 0], vec![1, 1]], vec![vec![1, 1], vec![0, 2]]];
        let union = Union::new(received.iter(), WHOLE);
        assert_eq!(union.counts(), [4, 4]);
        let rows = |names: &[i32]| Tensor::from_vec(&[names.len(), 1], names.to_vec());
        let first = rows(&[1000, 1001, 1100, 2100]);
        let second = rows(&[1010, 2010, 2110, 2111]);
        let joined = union.join(&Reference, [&first, &second].into_iter()).unwrap();
        let expected = [1000, 1001, 1010, 1100, 2010, 2100, 2110, 2111];
        assert_eq!(joined.as_slice::<i32>(), expected);
        assert_eq!(union.split(&Reference, joined).unwrap(), [first.clone(), second]);
        let alone = Union::new(received[..1].iter(), WHOLE);
        assert_eq!(alone.join(&Reference, [&first].into_iter()).unwrap(), first);
        // A micro-batch without rows takes part all the same.
        let received = [vec![vec![0, 0]], vec![vec![1, 1]]];
        let union = Union::new(received.iter(), WHOLE);
        let parts = [rows(&[]), rows(&[5, 6])];
        let joined = union.join(&Reference, parts.iter()).unwrap();
        assert_eq!(joined.as_slice::<i32>(), [5, 6]);
        assert_eq!(union.split(&Reference, joined).unwrap(), parts);
    }

    /// Two micro-batches in four parts each over two ranks, a row of each part for the one expert:
    /// rows named by (micro-batch, part), worked out by hand.
    #[test]
    fn parts_of_a_micro_batch_stand_together() {
        // A lane has a row from rank 0 (parts 0 and 1) and one from rank 1 (parts 2 and 3).
        let received = vec![vec![vec![1], vec![1]]; 4];
        let union = Union::new(received.iter(), Parts { ranks: 2, each: 2 });
        let rows = |names: [i32; 2]| Tensor::from_vec(&[2, 1], names.to_vec());
        let lanes = [[0, 2], [1, 3], [10, 12], [11, 13]].map(rows);
        let joined = union.join(&Reference, lanes.iter()).unwrap();
        assert_eq!(joined.as_slice::<i32>(), [0, 1, 2, 3, 10, 11, 12, 13]);
        assert_eq!(union.split(&Reference, joined).unwrap(), lanes);
    }
}
