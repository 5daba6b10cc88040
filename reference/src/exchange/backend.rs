//! A rank's backend: ops with a group of several ranks execute through the exchange, all others on
//! the backend inside.
//!
//! What is exchanged passes the host: downloaded, handed over, uploaded. Bits are moved, and sums
//! are those of [`Communicator::all_reduce`].

use std::cell::Cell;
use std::ops::Range;

use fathom_trace::{Group, GroupKind};

use super::{Communicator, ExchangeError, one};
use crate::backend::{Backend, Place, Result, passes_on};
use crate::op::Op;
use crate::ops::collective::{AllGather, AllReduce, ReduceScatter};
use crate::ops::dispatch::{Combine, Dispatch};
use crate::{DynOp, EngineError, Tensor};

/// A backend of one rank among several.
pub struct Ranked<B> {
    inner: B,
    groups: Vec<(GroupKind, Communicator)>,
    place: Cell<Place>,
}

impl<B: Backend> Ranked<B> {
    /// Wraps `inner`; `groups` has the communicator of every kind of group with several members.
    pub fn new(inner: B, groups: Vec<(GroupKind, Communicator)>) -> Ranked<B> {
        Ranked { inner, groups, place: Cell::default() }
    }

    /// The backend inside.
    pub fn inner(&self) -> &B {
        &self.inner
    }

    fn communicator(&self, op: &str, group: Group) -> Result<&Communicator> {
        let found = self.groups.iter().find(|(kind, _)| *kind == group.kind);
        match found {
            Some((_, communicator)) if communicator.size() == group.size => Ok(communicator),
            _ => Err(EngineError::Unsupported {
                engine: self.name(),
                op: op.to_owned(),
                reason: format!(
                    "a group of {} ranks ({:?}) that this rank is in none of",
                    group.size, group.kind
                ),
            }),
        }
    }

    /// Where the step is, in words that the ranks of a group have in common.
    fn what(&self, op: &str) -> String {
        let Place { step, layer, phase, .. } = self.place.get();
        let layer = layer.map_or(String::new(), |layer| format!(" of layer {layer}"));
        format!("{op}{layer}, {phase:?}, step {step}")
    }

    fn failed(&self, op: &str) -> impl Fn(ExchangeError) -> EngineError {
        let (engine, op) = (self.name(), op.to_owned());
        move |e| EngineError::Failed {
            engine: engine.clone(),
            op: op.clone(),
            reason: e.to_string(),
        }
    }

    fn all_reduce(&self, op: &AllReduce, x: &B::Buffer) -> Result<B::Buffer> {
        let name = AllReduce::NAME;
        let communicator = self.communicator(name, op.group)?;
        let sum = communicator.all_reduce(&self.what(name), self.inner.download(x)?);
        self.inner.upload(sum.map_err(self.failed(name))?)
    }

    fn all_gather(&self, op: &AllGather, x: &B::Buffer) -> Result<B::Buffer> {
        let name = AllGather::NAME;
        let communicator = self.communicator(name, op.group)?;
        let own = self.inner.download(x)?;
        let mut shape = own.shape().to_vec();
        shape[0] *= op.group.size;
        let dtype = own.dtype();
        let all = communicator.all_gather(&self.what(name), vec![own]);
        let bytes: Vec<u8> = all
            .map_err(self.failed(name))?
            .into_iter()
            .flat_map(|part| one(part).bytes().to_vec())
            .collect();
        self.inner.upload(Tensor::from_bytes(dtype, &shape, &bytes))
    }

    fn reduce_scatter(&self, op: &ReduceScatter, x: &B::Buffer) -> Result<B::Buffer> {
        let name = ReduceScatter::NAME;
        let communicator = self.communicator(name, op.group)?;
        let whole = self.inner.download(x)?;
        if !whole.shape()[0].is_multiple_of(op.group.size) {
            let (engine, op) = (self.name(), name.to_owned());
            let reason = format!("{:?} rows do not divide", whole.shape());
            return Err(EngineError::Failed { engine, op, reason });
        }
        let sum = communicator.all_reduce(&self.what(name), whole).map_err(self.failed(name))?;
        let mut shape = sum.shape().to_vec();
        shape[0] /= op.group.size;
        let bytes = sum.bytes().len() / op.group.size;
        let own = &sum.bytes()[communicator.index() * bytes..][..bytes];
        self.inner.upload(Tensor::from_bytes(sum.dtype(), &shape, own))
    }

    fn plan(
        &self,
        op: &str,
        sent: &[Vec<usize>],
        communicator: &Communicator,
    ) -> Result<Exchanged> {
        if sent.len() == communicator.size() {
            return Ok(Exchanged::of(sent, communicator.index()));
        }
        Err(EngineError::Unsupported {
            engine: self.name(),
            op: op.to_owned(),
            reason: "the counts of the group's ranks are not told (Backend::group_counts)".into(),
        })
    }

    /// Rows to the ranks of their experts. They are sorted by expert already, so each rank's are
    /// one piece; what arrives is put in the order expert, rank, slot.
    fn dispatch(&self, op: &Dispatch, x: B::Buffer, rows: B::Buffer) -> Result<B::Buffer> {
        let name = Dispatch::NAME;
        let communicator = self.communicator(name, op.group)?;
        let plan = self.plan(name, &op.sent, communicator)?;
        let alone = Group { size: 1, ..op.group };
        let received = plan.own_total();
        let local =
            Dispatch { group: alone, received, copies_sent: 0, sent: Vec::new(), ..op.clone() };
        let sorted = self.inner.execute(&local, vec![Some(x), Some(rows)])?.remove(0);
        let sorted = self.inner.download(&sorted)?;
        let parts = split(&sorted, &plan.by_member);
        let sent = parts.into_iter().map(|part| vec![part]).collect();
        let all = communicator.all_to_all(&self.what(name), sent).map_err(self.failed(name))?;
        let all: Vec<Tensor> = all.into_iter().map(one).collect();
        self.inner.upload(plan.by_expert(&all))
    }

    /// The experts' rows back to the ranks of their tokens, then the sum, here.
    fn combine(&self, op: &Combine, y: B::Buffer, inverse: B::Buffer) -> Result<B::Buffer> {
        let name = Combine::NAME;
        let communicator = self.communicator(name, op.group)?;
        let plan = self.plan(name, &op.sent, communicator)?;
        let parts = plan.by_rank(&self.inner.download(&y)?);
        let sent = parts.into_iter().map(|part| vec![part]).collect();
        let all = communicator.all_to_all(&self.what(name), sent).map_err(self.failed(name))?;
        let all: Vec<Tensor> = all.into_iter().map(one).collect();
        let sorted = self.inner.upload(concat(&all))?;
        let alone = Group { size: 1, ..op.group };
        let local = Combine { group: alone, copies_sent: 0, sent: Vec::new(), ..op.clone() };
        Ok(self.inner.execute(&local, vec![Some(sorted), Some(inverse)])?.remove(0))
    }
}

/// Who sends how many rows to which expert, seen from one member of the group.
struct Exchanged {
    /// Rows of this member for the experts of each.
    by_member: Vec<usize>,
    /// Rows of each member for each expert here.
    received: Vec<Vec<usize>>,
}

impl Exchanged {
    fn of(sent: &[Vec<usize>], index: usize) -> Exchanged {
        let members = sent.len();
        let local = sent[index].len() / members;
        let by_member = sent[index].chunks(local).map(|counts| counts.iter().sum()).collect();
        let own = index * local..(index + 1) * local;
        let received = sent.iter().map(|counts| counts[own.clone()].to_vec()).collect();
        Exchanged { by_member, received }
    }

    fn own_total(&self) -> usize {
        self.by_member.iter().sum()
    }

    /// Each block of rows of one member for one expert here, in the order expert, member: member
    /// and range of its rows.
    fn blocks(&self) -> Vec<(usize, Range<usize>)> {
        let mut next = vec![0; self.received.len()];
        let mut blocks = Vec::new();
        for expert in 0..self.received[0].len() {
            for (member, next) in next.iter_mut().enumerate() {
                let count = self.received[member][expert];
                blocks.push((member, *next..*next + count));
                *next += count;
            }
        }
        blocks
    }

    /// Rows of all members, each by expert, in the order expert, member.
    fn by_expert(&self, members: &[Tensor]) -> Tensor {
        let width = width(&members[0]);
        let mut bytes = Vec::new();
        for (member, rows) in self.blocks() {
            bytes.extend(&members[member].bytes()[rows.start * width..rows.end * width]);
        }
        with_rows(&members[0], &bytes)
    }

    /// The transpose of [`Exchanged::by_expert`].
    fn by_rank(&self, rows: &Tensor) -> Vec<Tensor> {
        let width = width(rows);
        let mut members = vec![Vec::new(); self.received.len()];
        let mut begin = 0;
        for (member, range) in self.blocks() {
            let end = begin + range.len() * width;
            members[member].extend(&rows.bytes()[begin..end]);
            begin = end;
        }
        members.iter().map(|bytes| with_rows(rows, bytes)).collect()
    }
}

/// Bytes of a row.
fn width(x: &Tensor) -> usize {
    x.shape()[1..].iter().product::<usize>() * x.dtype().size()
}

/// A tensor like `x` with other rows.
fn with_rows(x: &Tensor, bytes: &[u8]) -> Tensor {
    let mut shape = x.shape().to_vec();
    shape[0] = bytes.len().checked_div(width(x)).unwrap_or(0);
    Tensor::from_bytes(x.dtype(), &shape, bytes)
}

/// The rows of `x` in pieces of these lengths.
fn split(x: &Tensor, lengths: &[usize]) -> Vec<Tensor> {
    let (mut rest, width) = (x.bytes(), width(x));
    let mut piece = |rows: &usize| {
        let (own, after) = rest.split_at(rows * width);
        rest = after;
        with_rows(x, own)
    };
    lengths.iter().map(&mut piece).collect()
}

/// Rows one after the other.
fn concat(parts: &[Tensor]) -> Tensor {
    let bytes: Vec<u8> = parts.iter().flat_map(|x| x.bytes()).copied().collect();
    with_rows(&parts[0], &bytes)
}

fn take<T>(inputs: &mut [Option<T>], i: usize) -> T {
    inputs[i].take().expect("a mandatory input")
}

impl<B: Backend> Backend for Ranked<B> {
    type Buffer = B::Buffer;

    passes_on!(self => self.inner, B);

    fn execute(
        &self,
        op: &dyn DynOp,
        mut inputs: Vec<Option<B::Buffer>>,
    ) -> Result<Vec<B::Buffer>> {
        let any = op.as_any();
        let several = |group: Group| group.size > 1;
        if let Some(op) = any.downcast_ref::<AllReduce>().filter(|op| several(op.group)) {
            return self.all_reduce(op, &take(&mut inputs, 0)).map(|y| vec![y]);
        }
        if let Some(op) = any.downcast_ref::<AllGather>().filter(|op| several(op.group)) {
            return self.all_gather(op, &take(&mut inputs, 0)).map(|y| vec![y]);
        }
        if let Some(op) = any.downcast_ref::<ReduceScatter>().filter(|op| several(op.group)) {
            return self.reduce_scatter(op, &take(&mut inputs, 0)).map(|y| vec![y]);
        }
        if let Some(op) = any.downcast_ref::<Dispatch>().filter(|op| several(op.group)) {
            let (x, rows) = (take(&mut inputs, 0), take(&mut inputs, 1));
            return self.dispatch(op, x, rows).map(|y| vec![y]);
        }
        if let Some(op) = any.downcast_ref::<Combine>().filter(|op| several(op.group)) {
            let (y, inverse) = (take(&mut inputs, 0), take(&mut inputs, 1));
            return self.combine(op, y, inverse).map(|x| vec![x]);
        }
        self.inner.execute(op, inputs)
    }

    fn at(&self, place: Place) {
        self.place.set(place);
        self.inner.at(place);
    }

    fn group_counts(&self, counts: &B::Buffer, group: Group) -> Result<Option<Vec<Vec<usize>>>> {
        if group.size == 1 {
            return self.inner.group_counts(counts, group);
        }
        let name = "expert_counts";
        let communicator = self.communicator(name, group)?;
        let own = self.inner.download(counts)?;
        let all = communicator.all_gather(&self.what(name), vec![own]);
        let numbers =
            |counts: Tensor| counts.as_slice::<i32>().iter().map(|&n| n as usize).collect();
        let all = all.map_err(self.failed(name))?.into_iter();
        Ok(Some(all.map(|counts| numbers(one(counts))).collect()))
    }
}
