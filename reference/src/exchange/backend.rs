//! A rank's backend: ops with a group of several ranks execute through the exchange, all others on
//! the backend inside.
//!
//! What is exchanged passes the host: downloaded, handed over, uploaded. Where the backend connects
//! its devices ([`Backend::connect`]), experts' rows, hidden states, gradients and weights go from
//! one to the other, and the host sends their labels alone, by which it knows that every rank has
//! come so far. Bits are moved; nothing is added on the way.
//!
//! A dispatch, a combine or a context exchange sends at once and is waited for where its result is
//! first used. So the order in which a pair of forward and backward calls its parts is what lets
//! rows travel while something else is computed.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::rc::Rc;
use std::sync::Arc;

use fathom_schedule::perfetto::{COMMUNICATION, COMPUTE};
use fathom_trace::{DType, Group, GroupKind, TensorMeta};

use super::clock::Clock;
use super::{Communicator, ExchangeError, Pending, one};
use crate::backend::direct::{Direct, Landing, Received, Sent, Transfer};
use crate::backend::{Backend, Hook, Place, Recorder, Result, input_metas};
use crate::op::Op;
use crate::ops::collective::{AllGather, AllReduce, ReduceScatter};
use crate::ops::context_exchange::ContextExchange;
use crate::ops::dispatch::{Combine, Dispatch, DispatchCodes};
use crate::{DynOp, EngineError, Tensor};

/// A backend of one rank among several.
pub struct Ranked<B: Backend> {
    inner: B,
    groups: Vec<(GroupKind, Communicator)>,
    /// Connections between devices, by the channel of the group.
    direct: BTreeMap<Arc<str>, Rc<dyn Direct<B::Buffer>>>,
    place: Cell<Place>,
    clock: Arc<Clock>,
}

/// A backend whose buffers go from rank to rank.
pub trait Travelling: Backend {
    /// Sends buffers to a member of the link, without waiting for it.
    ///
    /// # Errors
    /// Those of backend and exchange.
    fn send_to(
        &self,
        link: &Communicator,
        what: &str,
        to: usize,
        buffers: Vec<Self::Buffer>,
    ) -> Result<()>;

    /// Receives what a member of the link has sent.
    ///
    /// # Errors
    /// Those of backend and exchange.
    fn receive_from(
        &self,
        link: &Communicator,
        what: &str,
        from: usize,
    ) -> Result<Vec<Self::Buffer>>;

    /// Whether the devices of the group's members are connected.
    fn connects(&self, group: &Communicator) -> bool;

    /// Moves ranges of buffers to members whose devices are connected, each to its place in a new
    /// buffer there. Every member that sends to another or receives from it calls this, in the same
    /// order; messages carry labels alone.
    ///
    /// # Errors
    /// Those of backend and exchange.
    ///
    /// # Panics
    /// Where the devices are not connected.
    fn move_ranges(
        &self,
        group: &Communicator,
        what: &str,
        transfer: Transfer<Self::Buffer>,
    ) -> Result<Vec<Self::Buffer>>;
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
    /// The op, for errors.
    op: &'static str,
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

/// What is left to do once all messages are here.
enum Rest<B: Backend> {
    /// Nothing more with the rows.
    Rows(Rows<B>),
    /// To add them up by token.
    Combine(Combine, B::Buffer, Rows<B>),
}

/// Puts the rows of all members into their order.
type Order = Box<dyn FnOnce(&[Tensor]) -> Tensor>;

/// How rows come from the other ranks.
enum Rows<B: Backend> {
    /// With their messages; this puts them into their order.
    ByHost(Order),
    /// From device to device, each to its place; the messages are empty.
    Direct(Landing<B::Buffer>),
}

impl<B: Backend> Ranked<B> {
    /// Wraps `inner`; `groups` has the communicator of every kind of group with several members.
    pub fn new(inner: B, groups: Vec<(GroupKind, Communicator)>, clock: Arc<Clock>) -> Ranked<B> {
        Ranked { inner, groups, direct: BTreeMap::new(), place: Cell::default(), clock }
    }

    /// Connects the devices of the groups' ranks, and of those of each of `links`, where the
    /// backend does that. Every rank has the links that it shares with another in the same order.
    ///
    /// # Errors
    /// Those of backend and exchange.
    pub fn connect_devices(&mut self, links: &[&Communicator]) -> Result<()> {
        // Experts' rows go from device to device; tensor parallel sums are the host's.
        let experts = self.groups.iter().filter(|(kind, _)| *kind == GroupKind::Ep);
        let groups: Vec<Communicator> = experts.map(|(_, group)| group.clone()).collect();
        for group in groups.iter().chain(links.iter().copied()) {
            let meeting = group.beside("devices of");
            let meet = |own: Vec<u8>| {
                let own = vec![Tensor::from_vec(&[own.len()], own)];
                let all = meeting.all_gather("how devices meet", own);
                let all = all.map_err(self.failed("connect"))?.into_iter();
                Ok(all.map(|member| one(member).bytes().to_vec()).collect())
            };
            let place = (group.index(), group.size());
            if let Some(direct) = self.inner.connect(place, &meet)? {
                self.direct.insert(group.channel.clone(), direct);
            }
        }
        Ok(())
    }

    fn direct(&self, group: &Communicator) -> Option<&Rc<dyn Direct<B::Buffer>>> {
        self.direct.get(&group.channel)
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
        let name = underway.op;
        match underway.state.replace(State::Failed) {
            State::Begun(begun) => {
                let (pending, rest) = *begun;
                let begin = self.clock.now();
                let all = pending.end().map_err(self.failed(name))?;
                self.clock.part(COMMUNICATION, underway.place, begin);
                let begin = self.clock.now();
                let buffer = self.finish(all, rest)?;
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

    fn finish(&self, all: Vec<Vec<Tensor>>, rest: Rest<B>) -> Result<B::Buffer> {
        let landed = |rows| match rows {
            Rows::Direct(landing) => Ok(landing()?.remove(0)),
            Rows::ByHost(order) => {
                let members: Vec<Tensor> = all.into_iter().map(one).collect();
                self.inner.upload(order(&members))
            }
        };
        match rest {
            Rest::Rows(rows) => landed(rows),
            Rest::Combine(local, inverse, rows) => {
                let inputs = vec![Some(landed(rows)?), Some(inverse)];
                Ok(self.inner.execute(&local, inputs)?.remove(0))
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
        Ok(Arriving::Underway(Rc::new(Underway {
            op: op.name(),
            meta,
            place: self.place.get(),
            state,
        })))
    }

    /// The connections between devices.
    pub fn devices(&self) -> Vec<Rc<dyn Direct<B::Buffer>>> {
        self.direct.values().cloned().collect()
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
        let (sent, rows) = match self.direct(communicator) {
            Some(direct) => {
                let (out, into) = (plan.own_blocks(), plan.blocks());
                let landing = self.move_rows(direct, &sorted, (&out, &into))?;
                (nothing(communicator), Rows::Direct(landing))
            }
            None => {
                let parts = split(&self.inner.download(&sorted)?, &plan.by_member());
                let sent = parts.into_iter().map(|part| vec![part]).collect();
                let order = move |members: &[Tensor]| plan.by_expert(members);
                (sent, Rows::ByHost(Box::new(order)))
            }
        };
        let pending = communicator.begin_all_to_all(&self.what(name), sent);
        Ok((pending.map_err(self.failed(name))?, Rest::Rows(rows)))
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
        let alone = Group { size: 1, ..op.group };
        let local = Combine { group: alone, copies_sent: 0, sent: Vec::new(), ..op.clone() };
        let (sent, rows) = match self.direct(communicator) {
            Some(direct) => {
                let (out, into) = (plan.blocks(), plan.own_blocks());
                let landing = self.move_rows(direct, &y, (&out, &into))?;
                (nothing(communicator), Rows::Direct(landing))
            }
            None => {
                let parts = plan.by_rank(&self.inner.download(&y)?);
                let sent = parts.into_iter().map(|part| vec![part]).collect();
                (sent, Rows::ByHost(Box::new(concat)))
            }
        };
        let pending = communicator.begin_all_to_all(&self.what(name), sent);
        Ok((pending.map_err(self.failed(name))?, Rest::Combine(local, inverse, rows)))
    }

    /// Rows of parts to the context parallel ranks, and theirs here.
    fn context_exchange(&self, op: &ContextExchange, x: &B::Buffer) -> Result<(Pending, Rest<B>)> {
        let name = ContextExchange::NAME;
        let communicator = self.communicator(name, op.group)?;
        let sent = op.sent(&self.inner.download(x)?).into_iter().map(|part| vec![part]).collect();
        let op = op.clone();
        let order = move |members: &[Tensor]| op.received(members);
        let pending = communicator.begin_all_to_all(&self.what(name), sent);
        Ok((pending.map_err(self.failed(name))?, Rest::Rows(Rows::ByHost(Box::new(order)))))
    }

    /// Begins to move rows of `x` from device to device: blocks of rows with the members that they
    /// go to, and those of the new rows with the members that they come from.
    fn move_rows(
        &self,
        direct: &Rc<dyn Direct<B::Buffer>>,
        x: &B::Buffer,
        (out, into): (&[Block], &[Block]),
    ) -> Result<Landing<B::Buffer>> {
        let mut shape = self.inner.shape(x);
        let width: usize = shape[1..].iter().product();
        let elements = |rows: &Range<usize>| rows.start * width..rows.end * width;
        shape[0] = into.iter().map(|(_, rows)| rows.len()).sum();
        let sent =
            |(to, rows): &Block| Sent { to: *to, buffer: x.clone(), elements: elements(rows) };
        let received =
            |(from, rows): &Block| Received { from: *from, buffer: 0, elements: elements(rows) };
        direct.begin(Transfer {
            sent: out.iter().map(sent).collect(),
            room: vec![(self.inner.dtype(x), shape)],
            received: into.iter().map(received).collect(),
        })
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
        if let Some(own) = any.downcast_ref::<ContextExchange>().filter(|op| several(op.group)) {
            let x = inputs[0].clone().expect("a mandatory input");
            return Ok(vec![self.begun(op, &inputs, self.context_exchange(own, &x)?)?]);
        }
        Ok(self.inner.execute(op, inputs)?.into_iter().map(Arriving::Here).collect())
    }
}

/// A block of rows of one member: the member, and the rows.
type Block = (usize, Range<usize>);

/// Who sends how many rows to which expert, seen from one member of the group.
struct Exchanged {
    /// Rows of this member for each expert of each.
    sent: Vec<Vec<usize>>,
    /// Rows of each member for each expert here.
    received: Vec<Vec<usize>>,
}

impl Exchanged {
    fn of(sent: &[Vec<usize>], index: usize) -> Exchanged {
        let members = sent.len();
        let local = sent[index].len() / members;
        let own = index * local..(index + 1) * local;
        let received = sent.iter().map(|counts| counts[own.clone()].to_vec()).collect();
        let sent = sent[index].chunks(local).map(<[usize]>::to_vec).collect();
        Exchanged { sent, received }
    }

    /// Rows of this member for the experts of each.
    fn by_member(&self) -> Vec<usize> {
        self.sent.iter().map(|counts| counts.iter().sum()).collect()
    }

    fn own_total(&self) -> usize {
        self.by_member().iter().sum()
    }

    /// This member's rows by the member and the expert that they go to.
    fn own_blocks(&self) -> Vec<Block> {
        let mut next = 0;
        let blocks = self
            .sent
            .iter()
            .enumerate()
            .flat_map(|(member, counts)| counts.iter().map(move |count| (member, *count)));
        let mut block = |(member, count)| {
            next += count;
            (member, next - count..next)
        };
        blocks.map(&mut block).collect()
    }

    /// The rows for the experts here in the order expert, member.
    fn blocks(&self) -> Vec<Block> {
        let mut next = 0;
        let mut blocks = Vec::new();
        for expert in 0..self.received[0].len() {
            for (member, counts) in self.received.iter().enumerate() {
                blocks.push((member, next..next + counts[expert]));
                next += counts[expert];
            }
        }
        blocks
    }

    /// Rows of all members, each by expert, in the order expert, member.
    fn by_expert(&self, members: &[Tensor]) -> Tensor {
        let width = width(&members[0]);
        let mut rest: Vec<&[u8]> = members.iter().map(Tensor::bytes).collect();
        let mut bytes = Vec::new();
        for (member, rows) in self.blocks() {
            let (block, after) = rest[member].split_at(rows.len() * width);
            rest[member] = after;
            bytes.extend(block);
        }
        with_rows(&members[0], &bytes)
    }

    /// The transpose of [`Exchanged::by_expert`].
    fn by_rank(&self, rows: &Tensor) -> Vec<Tensor> {
        let width = width(rows);
        let mut members = vec![Vec::new(); self.received.len()];
        for (member, block) in self.blocks() {
            members[member].extend(&rows.bytes()[block.start * width..block.end * width]);
        }
        members.iter().map(|bytes| with_rows(rows, bytes)).collect()
    }
}

/// Messages that carry nothing, one for each member.
fn nothing(group: &Communicator) -> Vec<Vec<Tensor>> {
    vec![Vec::new(); group.size()]
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

impl<B: Backend> Travelling for Ranked<B> {
    fn send_to(
        &self,
        link: &Communicator,
        what: &str,
        to: usize,
        buffers: Vec<Arriving<B>>,
    ) -> Result<()> {
        let buffers = buffers.into_iter().map(|buffer| self.here(buffer));
        let buffers = buffers.collect::<Result<Vec<_>>>()?;
        let message = match self.direct(link) {
            None => buffers.iter().map(|b| self.inner.download(b)).collect::<Result<_>>()?,
            Some(direct) => {
                let meta = |b| (self.inner.dtype(b), self.inner.shape(b));
                let room: Room = buffers.iter().map(meta).collect();
                let whole = |(buffer, (_, shape)): (_, &(_, Vec<usize>))| {
                    let elements = 0..shape.iter().product();
                    Sent { to, buffer, elements }
                };
                let sent = buffers.into_iter().zip(&room).map(whole).collect();
                let json = serde_json::to_vec(&room).expect("plain data");
                // Nothing lands here.
                drop(direct.begin(Transfer { sent, room: Vec::new(), received: Vec::new() })?);
                vec![Tensor::from_vec(&[json.len()], json)]
            }
        };
        link.send(what, to, message).map_err(self.failed("pipeline"))
    }

    fn receive_from(
        &self,
        link: &Communicator,
        what: &str,
        from: usize,
    ) -> Result<Vec<Arriving<B>>> {
        let message = link.receive(what, from).map_err(self.failed("pipeline"))?;
        let buffers = match self.direct(link) {
            None => message.into_iter().map(|t| self.inner.upload(t)).collect::<Result<_>>()?,
            Some(direct) => {
                let json = one(message);
                let room: Room = serde_json::from_slice(json.bytes()).expect("a rank's own JSON");
                let whole = |(buffer, (_, shape)): (usize, &(_, Vec<usize>))| {
                    let elements = 0..shape.iter().product();
                    Received { from, buffer, elements }
                };
                let received = room.iter().enumerate().map(whole).collect();
                direct.begin(Transfer { sent: Vec::new(), room, received })?()?
            }
        };
        Ok(buffers.into_iter().map(Arriving::Here).collect())
    }

    fn connects(&self, group: &Communicator) -> bool {
        self.direct(group).is_some()
    }

    fn move_ranges(
        &self,
        group: &Communicator,
        what: &str,
        transfer: Transfer<Arriving<B>>,
    ) -> Result<Vec<Arriving<B>>> {
        let Transfer { sent, room, received } = transfer;
        let direct = self.direct(group).expect("connected devices");
        let others = |members: BTreeSet<usize>| members.into_iter().filter(|&m| m != group.index());
        let to = others(sent.iter().map(|s| s.to).collect());
        let from = others(received.iter().map(|r| r.from).collect());
        let here = |Sent { to, buffer, elements }: Sent<Arriving<B>>| {
            Ok(Sent { to, buffer: self.here(buffer)?, elements })
        };
        let sent = sent.into_iter().map(here).collect::<Result<_>>()?;
        let landing = direct.begin(Transfer { sent, room, received })?;
        let failed = self.failed("exchange");
        for member in to {
            group.send(what, member, Vec::new()).map_err(&failed)?;
        }
        for member in from {
            group.receive(what, member).map_err(&failed)?;
        }
        Ok(landing()?.into_iter().map(Arriving::Here).collect())
    }
}

/// Element types and shapes of buffers.
type Room = Vec<(DType, Vec<usize>)>;

impl<B: Travelling, H: Hook<B>> Travelling for Recorder<B, H> {
    fn send_to(
        &self,
        link: &Communicator,
        what: &str,
        to: usize,
        buffers: Vec<B::Buffer>,
    ) -> Result<()> {
        self.inner().send_to(link, what, to, buffers)
    }

    fn receive_from(&self, link: &Communicator, what: &str, from: usize) -> Result<Vec<B::Buffer>> {
        self.inner().receive_from(link, what, from)
    }

    fn connects(&self, group: &Communicator) -> bool {
        self.inner().connects(group)
    }

    fn move_ranges(
        &self,
        group: &Communicator,
        what: &str,
        transfer: Transfer<B::Buffer>,
    ) -> Result<Vec<B::Buffer>> {
        self.inner().move_ranges(group, what, transfer)
    }
}
