//! Parts of sequences (`context_shards`): everything but attention is done on a part's rows by
//! themselves, attention on the rows of the whole sequence.
//!
//! The parts of a micro-batch are lanes side by side, on one rank or over the context parallel
//! ranks. In one process joining them is putting rows one above the other; over ranks the rows of
//! all heads turn into all rows of some heads (op `context_exchange`), so that the work is shared
//! and every head has the bits that it has in one process. Here bits are only moved.

use fathom_trace::Group;

use crate::backend::{Backend, Result};
use crate::ops::concat_rows::ConcatRows;
use crate::ops::context_exchange::{ContextExchange, Turn};
use crate::ops::gather_rows::GatherRows;
use crate::ops::slice_rows::SliceRows;

/// How the rows of parts are those of whole sequences; the parts of a micro-batch have it in
/// common.
#[derive(Clone, Debug)]
pub struct Context<B: Backend> {
    /// The context parallel ranks, in the order of their parts.
    pub group: Group,
    /// This rank's place among them, from 0.
    pub member: usize,
    /// Rows of each of this rank's parts, in order.
    pub parts: Vec<usize>,
    /// Rows of each rank.
    pub rows: Vec<usize>,
    /// Lengths of the whole segments, over all parts.
    pub segments: Vec<usize>,
    /// Of each row of the whole sequences its place among the rows of the parts, which stand one
    /// part above the other, I32 \[rows in all\]; and the other way round. None where both orders
    /// are one.
    pub order: Option<[B::Buffer; 2]>,
}

impl<B: Backend> Context<B> {
    /// All rows \[rows in all, columns / ranks\] of this rank's share of the heads, of rows
    /// \[rows, columns\] of its parts, whose columns are heads side by side.
    ///
    /// # Errors
    /// Those of the backend.
    pub fn to_heads(&self, backend: &B, parts: Vec<B::Buffer>) -> Result<B::Buffer> {
        self.joined(backend, parts, Turn::ToHeads)
    }

    /// The transpose of [`Context::to_heads`]: the rows of each of this rank's parts.
    ///
    /// # Errors
    /// Those of the backend.
    pub fn to_parts(&self, backend: &B, whole: B::Buffer) -> Result<Vec<B::Buffer>> {
        let by_part = self.ordered(backend, whole, 1)?;
        let own = self.exchange(backend, by_part, Turn::ToRows)?;
        self.cut(backend, own, 0)
    }

    /// All rows \[rows in all, columns\], on every rank, of the rows of its parts.
    ///
    /// # Errors
    /// Those of the backend.
    pub fn gather(&self, backend: &B, parts: Vec<B::Buffer>) -> Result<B::Buffer> {
        self.joined(backend, parts, Turn::Gather)
    }

    /// The rows of each of this rank's parts, of all.
    ///
    /// # Errors
    /// Those of the backend.
    pub fn own(&self, backend: &B, whole: B::Buffer) -> Result<Vec<B::Buffer>> {
        let by_part = self.ordered(backend, whole, 1)?;
        self.cut(backend, by_part, self.rows[..self.member].iter().sum())
    }

    fn joined(&self, backend: &B, parts: Vec<B::Buffer>, turn: Turn) -> Result<B::Buffer> {
        let mut parts = parts.into_iter();
        let mut own = parts.next().expect("a rank has a part");
        for part in parts {
            own = backend.concat_rows(&ConcatRows {}, &own, &part)?;
        }
        let by_part = self.exchange(backend, own, turn)?;
        self.ordered(backend, by_part, 0)
    }

    fn exchange(&self, backend: &B, x: B::Buffer, turn: Turn) -> Result<B::Buffer> {
        let Context { group, member, rows, .. } = self;
        if group.size == 1 {
            return Ok(x);
        }
        let op = ContextExchange { group: *group, member: *member, rows: rows.clone(), turn };
        backend.context_exchange(&op, &x)
    }

    /// The rows in the other order: that of the sequences (0), or that of the parts (1).
    fn ordered(&self, backend: &B, x: B::Buffer, which: usize) -> Result<B::Buffer> {
        let Some(order) = &self.order else { return Ok(x) };
        backend.gather_rows(&GatherRows { out: backend.dtype(&x) }, &x, &order[which])
    }

    /// The rows of this rank's parts, which begin at row `offset` of `x`.
    fn cut(&self, backend: &B, x: B::Buffer, mut offset: usize) -> Result<Vec<B::Buffer>> {
        let all = backend.shape(&x)[0];
        let mut part = |&rows: &usize| {
            let op = SliceRows { offset, rows };
            offset += rows;
            if rows == all { Ok(x.clone()) } else { backend.slice_rows(&op, &x) }
        };
        self.parts.iter().map(&mut part).collect()
    }
}
