//! What ranks exchange: messages between two of them, and over these the collectives of a group.
//!
//! An [`Exchange`] carries messages and knows who has ended. [`threads`] is the one for ranks that
//! are threads of a process, [`processes`] the one for ranks that are processes of their own, over
//! [`tcp`] or MPI; both put what comes into the table of `mail`. [`environment`] says which rank a
//! process is, [`store`] is where processes meet, [`launch`] starts them. A [`Communicator`]
//! is one rank's end of a group's exchanges. Every message says which exchange of
//! the group it belongs to, by number, operation, and what is exchanged: ranks that disagree on the
//! order are refused where they meet, with both sides.
//!
//! Posting never waits for the receiver. An exchange is begun by posting and ended by taking, so
//! what is posted early travels while its sender computes.
//!
//! Sums are ours, not a library's: [`Communicator::all_reduce`] adds in the order of ranks, and the
//! gradients' tree stands in `train::ranks::reduce`, over pieces that travelled unchanged.

pub mod backend;
pub mod clock;
pub mod environment;
pub mod launch;
mod links;
mod mail;
#[cfg(feature = "mpi")]
pub mod mpi;
pub mod processes;
pub mod store;
pub mod tcp;
pub mod threads;
mod wire;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use fathom_trace::DType;
use serde::{Deserialize, Serialize};

use crate::Tensor;
use crate::model::convert;
use crate::op::Op;
use crate::ops::add::Add;

/// What an exchange does: part of a message's name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Operation {
    /// From one rank to another.
    Send,
    /// From one rank to all of the group.
    Broadcast,
    /// From every rank to every rank, the same to each.
    AllGather,
    /// From every rank to every rank, something else to each.
    AllToAll,
    /// Nothing, from every rank to every rank: none goes on before all are here.
    Barrier,
}

/// The name of a message: sender and receiver agree on all of it, or one of them is out of step.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Label {
    /// The group whose exchange it is.
    pub channel: Arc<str>,
    /// Which of the group's exchanges, from 0; of sends, which between these two ranks.
    pub number: u64,
    /// What the exchange does.
    pub operation: Operation,
    /// What is exchanged, in words: `rows of layer 3, micro-batch 1`.
    pub what: String,
}

impl std::fmt::Display for Label {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Label { channel, number, operation, what } = self;
        write!(f, "{operation:?} {number} of {channel} ({what})")
    }
}

/// Tensors under their label.
#[derive(Clone, Debug)]
pub struct Message {
    /// What it is.
    pub label: Label,
    /// What it carries. Ranks of one process share the elements.
    pub tensors: Vec<Tensor>,
}

/// Why an exchange cannot be done.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum ExchangeError {
    /// A rank ended before it had given what others wait for.
    #[error("rank {rank}: rank {lost} has ended ({reason}); waited for {waiting}")]
    Lost {
        /// The rank that tells.
        rank: usize,
        /// The first rank that ended with an error.
        lost: usize,
        /// The error with which that rank ended.
        reason: String,
        /// What the telling rank was to exchange.
        waiting: String,
    },
    /// Nothing came within the time that the run allows.
    #[error(
        "rank {rank}: waited {seconds} s for {waiting}; {suspect}. Every rank: {}",
        waits.join("; ")
    )]
    TimedOut {
        /// The rank that tells.
        rank: usize,
        /// The time it waited (`parallel.timeout_seconds`).
        seconds: f64,
        /// The exchange that it waits for.
        waiting: String,
        /// Who does not answer: the rank at the end of the chain of waits.
        suspect: String,
        /// What each rank waits for.
        waits: Vec<String>,
    },
    /// Two ranks are not at the same exchange, or bring what does not fit.
    #[error("rank {rank} expects {own} from rank {other}, which is at {found}")]
    Disagree {
        /// The rank that tells.
        rank: usize,
        /// What it is at.
        own: String,
        /// The rank whose message came instead.
        other: usize,
        /// What that rank is at.
        found: String,
    },
}

/// Carries messages between the ranks of a run.
pub trait Exchange: Send + Sync {
    /// This rank, from 0.
    fn rank(&self) -> usize;

    /// How many ranks there are.
    fn world(&self) -> usize;

    /// Hands a message to a rank, without waiting until it is taken; those of one channel arrive in
    /// the order of posting.
    ///
    /// # Errors
    /// [`ExchangeError::Lost`] where a rank has failed.
    fn post(&self, to: usize, message: Message) -> Result<(), ExchangeError>;

    /// Takes the next message of a rank on the label's channel; waits for it.
    ///
    /// # Errors
    /// [`ExchangeError`]; also where the message that comes has another label.
    fn take(&self, from: usize, expected: &Label) -> Result<Vec<Tensor>, ExchangeError>;
}

/// One rank's end of the exchanges of a group. Every member calls the same in the same order.
#[derive(Clone)]
pub struct Communicator {
    exchange: Arc<dyn Exchange>,
    channel: Arc<str>,
    members: Arc<[usize]>,
    index: usize,
    done: Arc<Counters>,
}

/// How many exchanges were begun: collectives, and sends and receives by member.
#[derive(Default)]
struct Counters {
    collectives: AtomicU64,
    sends: Vec<AtomicU64>,
    receives: Vec<AtomicU64>,
}

impl std::fmt::Debug for Communicator {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} {:?}, member {}", self.channel, self.members, self.index)
    }
}

impl Communicator {
    /// The end of this exchange's rank in the group of `members`, called `name`.
    ///
    /// # Panics
    /// Where the rank is no member.
    pub fn new(exchange: &Arc<dyn Exchange>, name: &str, members: &[usize]) -> Communicator {
        let rank = exchange.rank();
        let index = members.iter().position(|&m| m == rank);
        Communicator {
            exchange: Arc::clone(exchange),
            channel: format!("{name} {members:?}").into(),
            members: members.into(),
            index: index.unwrap_or_else(|| panic!("rank {rank} is none of {name} {members:?}")),
            done: Arc::new(Counters {
                sends: members.iter().map(|_| AtomicU64::default()).collect(),
                receives: members.iter().map(|_| AtomicU64::default()).collect(),
                ..Counters::default()
            }),
        }
    }

    /// The same group, for other exchanges beside these.
    pub(super) fn beside(&self, name: &str) -> Communicator {
        Communicator::new(&self.exchange, &format!("{name} {}", self.channel), &self.members)
    }

    /// How many ranks the group has.
    pub fn size(&self) -> usize {
        self.members.len()
    }

    /// This rank's place in the group, from 0.
    pub fn index(&self) -> usize {
        self.index
    }

    /// The ranks of the group, in order.
    pub fn members(&self) -> &[usize] {
        &self.members
    }

    fn label(&self, operation: Operation, what: &str) -> Label {
        self.numbered(operation, what, &self.done.collectives)
    }

    fn numbered(&self, operation: Operation, what: &str, count: &AtomicU64) -> Label {
        let number = count.fetch_add(1, Ordering::Relaxed);
        Label { channel: self.channel.clone(), number, operation, what: what.to_owned() }
    }

    fn post(&self, to: usize, label: &Label, tensors: Vec<Tensor>) -> Result<(), ExchangeError> {
        self.exchange.post(self.members[to], Message { label: label.clone(), tensors })
    }

    fn take(&self, from: usize, label: &Label) -> Result<Vec<Tensor>, ExchangeError> {
        self.exchange.take(self.members[from], label)
    }

    /// Gives `sent[i]` to member i of the group, and what each gives to this one, in order; counts
    /// may differ, also be none.
    ///
    /// # Errors
    /// [`ExchangeError`].
    ///
    /// # Panics
    /// Where `sent` has not an entry a member.
    pub fn all_to_all(
        &self,
        what: &str,
        sent: Vec<Vec<Tensor>>,
    ) -> Result<Vec<Vec<Tensor>>, ExchangeError> {
        self.begin_all_to_all(what, sent)?.end()
    }

    /// As [`Communicator::all_to_all`], without waiting: what is sent travels until
    /// [`Pending::end`].
    ///
    /// # Errors
    /// [`ExchangeError::Lost`].
    ///
    /// # Panics
    /// As [`Communicator::all_to_all`].
    pub fn begin_all_to_all(
        &self,
        what: &str,
        sent: Vec<Vec<Tensor>>,
    ) -> Result<Pending, ExchangeError> {
        assert_eq!(sent.len(), self.size(), "an entry a member of {self:?}");
        self.begin(self.label(Operation::AllToAll, what), sent)
    }

    fn begin(&self, label: Label, sent: Vec<Vec<Tensor>>) -> Result<Pending, ExchangeError> {
        let mut own = Vec::new();
        for (to, tensors) in sent.into_iter().enumerate() {
            if to == self.index {
                own = tensors;
            } else {
                self.post(to, &label, tensors)?;
            }
        }
        Ok(Pending { communicator: self.clone(), label, own })
    }

    /// What every member gives, in order.
    ///
    /// # Errors
    /// [`ExchangeError`].
    pub fn all_gather(
        &self,
        what: &str,
        own: Vec<Tensor>,
    ) -> Result<Vec<Vec<Tensor>>, ExchangeError> {
        self.begin(self.label(Operation::AllGather, what), vec![own; self.size()])?.end()
    }

    /// What member `root` gives; the others give nothing.
    ///
    /// # Errors
    /// [`ExchangeError`].
    pub fn broadcast(
        &self,
        what: &str,
        root: usize,
        own: Vec<Tensor>,
    ) -> Result<Vec<Tensor>, ExchangeError> {
        let label = self.label(Operation::Broadcast, what);
        if self.index != root {
            return self.take(root, &label);
        }
        for to in (0..self.size()).filter(|&to| to != root) {
            self.post(to, &label, own.clone())?;
        }
        Ok(own)
    }

    /// Waits until every member is here.
    ///
    /// # Errors
    /// [`ExchangeError`].
    pub fn barrier(&self, what: &str) -> Result<(), ExchangeError> {
        let label = self.label(Operation::Barrier, what);
        self.begin(label, vec![Vec::new(); self.size()])?.end().map(|_| ())
    }

    /// The sum of what the members give, to each: added in the order of ranks in F32 (F64), rounded
    /// once to the element type.
    ///
    /// # Errors
    /// [`ExchangeError`]; [`ExchangeError::Disagree`] where shapes or element types differ.
    pub fn all_reduce(&self, what: &str, own: Tensor) -> Result<Tensor, ExchangeError> {
        let dtype = own.dtype();
        let mut parts = self.all_gather(what, vec![own])?.into_iter().map(one);
        let first = parts.next().expect("a group has a member");
        let wide = if dtype == DType::F64 { DType::F64 } else { DType::F32 };
        let mut sum = convert(first.clone(), wide);
        for (from, part) in parts.enumerate() {
            if (part.dtype(), part.shape()) != (dtype, first.shape()) {
                return Err(ExchangeError::Disagree {
                    rank: self.members[self.index],
                    own: format!("{dtype} {:?} ({what})", first.shape()),
                    other: self.members[from + 1],
                    found: format!("{} {:?}", part.dtype(), part.shape()),
                });
            }
            let inputs = vec![Some(sum), Some(convert(part, wide)), None];
            sum = Op::run(&Add { out: wide }, inputs).expect("same shapes").remove(0);
        }
        Ok(convert(sum, dtype))
    }

    /// Sends to a member; the k-th send to it meets its k-th receive from here. A communicator that
    /// sends and receives has no collectives.
    ///
    /// # Errors
    /// [`ExchangeError::Lost`].
    pub fn send(&self, what: &str, to: usize, tensors: Vec<Tensor>) -> Result<(), ExchangeError> {
        self.post(to, &self.numbered(Operation::Send, what, &self.done.sends[to]), tensors)
    }

    /// Receives from a member.
    ///
    /// # Errors
    /// [`ExchangeError`].
    pub fn receive(&self, what: &str, from: usize) -> Result<Vec<Tensor>, ExchangeError> {
        self.take(from, &self.numbered(Operation::Send, what, &self.done.receives[from]))
    }
}

/// An all-to-all that was begun.
#[derive(Debug)]
#[must_use = "the others' messages wait until it is ended"]
pub struct Pending {
    communicator: Communicator,
    label: Label,
    own: Vec<Tensor>,
}

impl Pending {
    /// Waits for what every member sent here, in order.
    ///
    /// # Errors
    /// [`ExchangeError`].
    pub fn end(self) -> Result<Vec<Vec<Tensor>>, ExchangeError> {
        let Pending { communicator, label, own } = self;
        let mut own = Some(own);
        let received = |from| {
            if from == communicator.index {
                Ok(own.take().expect("once"))
            } else {
                communicator.take(from, &label)
            }
        };
        (0..communicator.size()).map(received).collect()
    }
}

/// The only tensor of a message that has one.
///
/// # Panics
/// Where there is not exactly one.
pub fn one(mut tensors: Vec<Tensor>) -> Tensor {
    assert_eq!(tensors.len(), 1, "a message of one tensor");
    tensors.remove(0)
}
