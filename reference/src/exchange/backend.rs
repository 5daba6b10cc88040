//! A rank's backend: ops with a group of several ranks execute through the exchange, all others on
//! the backend inside.
//!
//! What is exchanged passes the host: downloaded, handed over, uploaded. Bits are moved, and sums
//! are those of [`Communicator::all_reduce`].
//!
//! A dispatch or a combine sends at once and is waited for where its result is first used. So the
//! order in which a pair of forward and backward calls its parts is what lets rows travel while
//! something else is computed.

use std::cell::{Cell, RefCell};
use std::ops::Range;
use std::rc::Rc;
use std::sync::Arc;

use fathom_schedule::perfetto::{COMMUNICATION, COMPUTE};
use fathom_trace::{DType, Group, GroupKind, TensorMeta};

use super::clock::Clock;
use super::{Communicator, ExchangeError, Pending, one};
use crate::backend::{Backend, Place, Result, input_metas};
use crate::op::Op;
use crate::ops::collective::{AllGather, AllReduce, ReduceScatter};
use crate::ops::dispatch::{Combine, Dispatch, DispatchCodes};
use crate::{DynOp, EngineError, Tensor};

/// A backend of one rank among several.
pub struct Ranked<B> {
    inner: B,
    groups: Vec<(GroupKind, Communicator)>,
    place: Cell<Place>,
    clock: Arc<Clock>,
}

/// A tensor that is here, or rows that the other ranks of a group have yet to send.
pub enum Arriving<B: Backend> {
    /// It is here.
    Here(B::Buffer),
    /// It is on its way.
    Underway(Rc<Underway<B>>),
}

impl<B: Backend> Clone for Arriving<B> {
    fn clone(&self) -> Self {
        match self {
            Arriving::Here(buffer) => Arriving::Here(buffer.clone()),
            Arriving::Underway(underway) => Arriving::Underway(Rc::clone(underway)),
        }
    }
}

impl<B: Backend> std::fmt::Debug for Arriving<B> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Arriving::Here(buffer) => buffer.fmt(f),
            Arriving::Underway(underway) => write!(f, "{:?}, on its way", underway.meta),
        }
    }
}

/// The result of an exchange that was begun.
pub struct Underway<B: Backend> {
    meta: TensorMeta,
    /// Where in the step it was begun.
    place: Place,
    state: RefCell<State<B>>,
}

enum State<B: Backend> {
    Begun(Box<(Pending, Rest<B>)>),
    Here(B::Buffer),
    /// The exchange failed; whoever used it first was told why.
    Failed,
}

/// What is left to do once all rows are here.
enum Rest<B: Backend> {
    /// To put them in the order of the experts.
    Dispatch(Exchanged),
    /// To add them up by token.
    Combine(Combine, B::Buffer),
}

impl<B: Backend> Ranked<B> {
    /// Wraps `inner`; `groups` has the communicator of every kind of group with several members.
    pub fn new(inner: B, groups: Vec<(GroupKind, Communicator)>, clock: Arc<Clock>) -> Ranked<B> {
        Ranked { inner, groups, place: Cell::default(), clock }
    }

    /// The tensor, waited for where it is still on its way.
    ///
    /// # Errors
    /// Those of the exchange.
    pub fn here(&self, buffer: Arriving<B>) -> Result<B::Buffer> {
        match buffer {
            Arriving::Here(buffer) => Ok(buffer),
            Arriving::Underway(underway) => self.arrived(&underway),
        }
    }

    fn arrived(&self, underway: &Underway<B>) -> Result<B::Buffer> {
        let name = underway.op_name();
        match underway.state.replace(State::Failed) {
            State::Begun(begun) => {
                let (pending, rest) = *begun;
                let begin = self.clock.now();
                let all = pending.end().map_err(self.failed(name))?;
                self.clock.part(COMMUNICATION, underway.place, begin);
                let begin = self.clock.now();
                let buffer = self.finish(all.into_iter().map(one).collect(), rest)?;
                self.clock.part(COMPUTE, underway.place, begin);
                underway.state.replace(State::Here(buffer.clone()));
                Ok(buffer)
            }
            State::Here(buffer) => {
                underway.state.replace(State::Here(buffer.clone()));
                Ok(buffer)
            }
            State::Failed => {
                let (engine, op) = (self.name(), name.to_owned());
                Err(EngineError::Failed { engine, op, reason: "its exchange has failed".into() })
            }
        }
    }

    fn finish(&self, all: Vec<Tensor>, rest: Rest<B>) -> Result<B::Buffer> {
        match rest {
            Rest::Dispatch(plan) => self.inner.upload(plan.by_expert(&all)),
            Rest::Combine(local, inverse) => {
                let sorted = self.inner.upload(concat(&all))?;
                Ok(self.inner.execute(&local, vec![Some(sorted), Some(inverse)])?.remove(0))
            }
        }
    }

    fn begun(
        &self,
        op: &dyn DynOp,
        inputs: &[Option<B::Buffer>],
        begun: (Pending, Rest<B>),
    ) -> Result<Arriving<B>> {
        let meta = op.infer(&input_metas(&self.inner, op, inputs))?.remove(0);
        let state = RefCell::new(State::Begun(Box::new(begun)));
        Ok(Arriving::Underway(Rc::new(Underway { meta, place: self.place.get(), state })))
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
    fn dispatch(&self, op: &Dispatch, x: B::Buffer, rows: B::Buffer) -> Result<(Pending, Rest<B>)> {
        let name = Dispatch::NAME;
        let communicator = self.communicator(name, op.group)?;
        let plan = self.plan(name, &op.sent, communicator)?;
        let alone = Group { size: 1, ..op.group };
        let received = plan.own_total();
        let local =
            Dispatch { group: alone, received, copies_sent: 0, sent: Vec::new(), ..op.clone() };
        let sorted = self.inner.execute(&local, vec![Some(x), Some(rows)])?.remove(0);
        let parts = split(&self.inner.download(&sorted)?, &plan.by_member);
        let sent = parts.into_iter().map(|part| vec![part]).collect();
        let pending = communicator.begin_all_to_all(&self.what(name), sent);
        Ok((pending.map_err(self.failed(name))?, Rest::Dispatch(plan)))
    }

    /// The experts' rows back to the ranks of their tokens, then the sum, here.
    fn combine(
        &self,
        op: &Combine,
        y: B::Buffer,
        inverse: B::Buffer,
    ) -> Result<(Pending, Rest<B>)> {
        let name = Combine::NAME;
        let communicator = self.communicator(name, op.group)?;
        let plan = self.plan(name, &op.sent, communicator)?;
        let parts = plan.by_rank(&self.inner.download(&y)?);
        let sent = parts.into_iter().map(|part| vec![part]).collect();
        let pending = communicator.begin_all_to_all(&self.what(name), sent);
        let alone = Group { size: 1, ..op.group };
        let local = Combine { group: alone, copies_sent: 0, sent: Vec::new(), ..op.clone() };
        Ok((pending.map_err(self.failed(name))?, Rest::Combine(local, inverse)))
    }

    /// An op whose inputs are here.
    fn compute(
        &self,
        op: &dyn DynOp,
        mut inputs: Vec<Option<B::Buffer>>,
    ) -> Result<Vec<Arriving<B>>> {
        let any = op.as_any();
        let several = |group: Group| group.size > 1;
        if let Some(op) = any.downcast_ref::<AllReduce>().filter(|op| several(op.group)) {
            return self.all_reduce(op, &take(&mut inputs, 0)).map(|y| vec![Arriving::Here(y)]);
        }
        if let Some(op) = any.downcast_ref::<AllGather>().filter(|op| several(op.group)) {
            return self.all_gather(op, &take(&mut inputs, 0)).map(|y| vec![Arriving::Here(y)]);
        }
        if let Some(op) = any.downcast_ref::<ReduceScatter>().filter(|op| several(op.group)) {
            return self.reduce_scatter(op, &take(&mut inputs, 0)).map(|y| vec![Arriving::Here(y)]);
        }
        if let Some(own) = any.downcast_ref::<Dispatch>().filter(|op| several(op.group)) {
            let [x, rows] = [0, 1].map(|i| inputs[i].clone().expect("a mandatory input"));
            return Ok(vec![self.begun(op, &inputs, self.dispatch(own, x, rows)?)?]);
        }
        if let Some(own) = any.downcast_ref::<DispatchCodes>().filter(|op| several(op.group)) {
            let [q, scale, rows] = [0, 1, 2].map(|i| inputs[i].clone().expect("a mandatory input"));
            let each = own.each();
            let begin = |x: B::Buffer| {
                let inputs = [Some(x.clone()), Some(rows.clone())];
                self.begun(&each, &inputs, self.dispatch(&each, x, rows.clone())?)
            };
            return Ok(vec![begin(q)?, begin(scale)?]);
        }
        if let Some(own) = any.downcast_ref::<Combine>().filter(|op| several(op.group)) {
            let [y, inverse] = [0, 1].map(|i| inputs[i].clone().expect("a mandatory input"));
            return Ok(vec![self.begun(op, &inputs, self.combine(own, y, inverse)?)?]);
        }
        Ok(self.inner.execute(op, inputs)?.into_iter().map(Arriving::Here).collect())
    }
}

impl<B: Backend> Underway<B> {
    /// The op, for errors.
    fn op_name(&self) -> &'static str {
        match &*self.state.borrow() {
            State::Begun(begun) if matches!(begun.1, Rest::Dispatch(_)) => Dispatch::NAME,
            _ => Combine::NAME,
        }
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
    type Buffer = Arriving<B>;

    fn name(&self) -> String {
        self.inner.name()
    }

    fn execute(
        &self,
        op: &dyn DynOp,
        inputs: Vec<Option<Arriving<B>>>,
    ) -> Result<Vec<Arriving<B>>> {
        let here = |input: Option<_>| input.map(|input| self.here(input)).transpose();
        let inputs = inputs.into_iter().map(here).collect::<Result<_>>()?;
        if !self.clock.traces() {
            return self.compute(op, inputs);
        }
        let begin = self.clock.now();
        let outputs = self.compute(op, inputs);
        self.clock.part(COMPUTE, self.place.get(), begin);
        outputs
    }

    fn upload(&self, tensor: Tensor) -> Result<Arriving<B>> {
        self.inner.upload(tensor).map(Arriving::Here)
    }

    fn download(&self, buffer: &Arriving<B>) -> Result<Tensor> {
        match buffer {
            Arriving::Here(buffer) => self.inner.download(buffer),
            Arriving::Underway(underway) => self.inner.download(&self.arrived(underway)?),
        }
    }

    fn zeros(&self, dtype: DType, shape: &[usize]) -> Result<Arriving<B>> {
        self.inner.zeros(dtype, shape).map(Arriving::Here)
    }

    fn dtype(&self, buffer: &Arriving<B>) -> DType {
        match buffer {
            Arriving::Here(buffer) => self.inner.dtype(buffer),
            Arriving::Underway(underway) => underway.meta.dtype,
        }
    }

    fn shape(&self, buffer: &Arriving<B>) -> Vec<usize> {
        match buffer {
            Arriving::Here(buffer) => self.inner.shape(buffer),
            Arriving::Underway(underway) => underway.meta.shape.clone(),
        }
    }

    fn fuses(&self) -> bool {
        self.inner.fuses()
    }

    fn at(&self, place: Place) {
        self.place.set(place);
        self.inner.at(place);
    }

    fn expert_counts(
        &self,
        counts: &Arriving<B>,
        local: Range<usize>,
        slots: usize,
    ) -> Result<Vec<usize>> {
        self.inner.expert_counts(&self.here(counts.clone())?, local, slots)
    }

    fn group_counts(&self, counts: &Arriving<B>, group: Group) -> Result<Option<Vec<Vec<usize>>>> {
        if group.size == 1 {
            return self.inner.group_counts(&self.here(counts.clone())?, group);
        }
        let name = "expert_counts";
        let communicator = self.communicator(name, group)?;
        let own = self.download(counts)?;
        let begin = self.clock.now();
        let all = communicator.all_gather(&self.what(name), vec![own]);
        self.clock.part(COMMUNICATION, self.place.get(), begin);
        let numbers =
            |counts: Tensor| counts.as_slice::<i32>().iter().map(|&n| n as usize).collect();
        let all = all.map_err(self.failed(name))?.into_iter();
        Ok(Some(all.map(|counts| numbers(one(counts))).collect()))
    }
}
