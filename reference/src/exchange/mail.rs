//! Messages that have come and were not taken yet, what each rank waits for, and who has ended: the
//! table under a lock that every transport puts its messages into.
//!
//! Ranks that are threads share one; a process has one of its own, into which what other processes
//! say is entered.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::{ExchangeError, Label, Message};
use crate::Tensor;

/// Sender, receiver and channel of a queue of messages.
type Key = (usize, usize, Arc<str>);

/// What a rank waits for: whose message, and what it is.
pub(super) type Wait = Option<(usize, String)>;

/// What came for the ranks of this process and was not taken yet.
pub(super) struct Mail {
    state: Mutex<State>,
    /// One a rank: something came for it, or a rank ended.
    changed: Vec<Condvar>,
    timeout: Duration,
}

#[derive(Default)]
struct State {
    queues: HashMap<Key, VecDeque<Message>>,
    waits: Vec<Wait>,
    /// Ranks that have ended, well or not.
    ended: Vec<bool>,
    /// Ranks that were asked what they wait for and have not answered.
    asked: Vec<bool>,
    /// The first rank that failed, its error, and when that was heard.
    failure: Option<(usize, String, Instant)>,
}

impl Mail {
    /// An empty table for `world` ranks, of which none waits longer than `timeout`.
    pub fn new(world: usize, timeout: Duration) -> Mail {
        let state = State {
            waits: vec![None; world],
            ended: vec![false; world],
            asked: vec![false; world],
            ..State::default()
        };
        let changed = (0..world).map(|_| Condvar::new()).collect();
        Mail { state: Mutex::new(state), changed, timeout }
    }

    /// How many ranks there are.
    pub fn world(&self) -> usize {
        self.changed.len()
    }

    /// The longest wait.
    pub fn timeout(&self) -> Duration {
        self.timeout
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes that a rank has ended; its error, where it has one, ends the others too.
    pub fn end(&self, rank: usize, error: Option<String>) {
        let mut state = self.lock();
        state.ended[rank] = true;
        if let Some(error) = error {
            state.failure.get_or_insert((rank, error, Instant::now()));
        }
        drop(state);
        self.changed.iter().for_each(Condvar::notify_all);
    }

    /// Whether a rank has ended.
    pub fn has_ended(&self, rank: usize) -> bool {
        self.lock().ended[rank]
    }

    /// The first rank that failed, its error, and how long ago that was heard.
    pub fn failure(&self) -> Option<(usize, String, Duration)> {
        let failure = self.lock().failure.clone();
        failure.map(|(rank, error, since)| (rank, error, since.elapsed()))
    }

    /// Refuses to go on once a rank has failed; `doing` is what `rank` is at.
    pub fn check(&self, rank: usize, doing: &Label) -> Result<(), ExchangeError> {
        self.lock().failed(rank, doing)
    }

    /// Puts a message where its receiver finds it.
    pub fn deliver(&self, from: usize, to: usize, message: Message) {
        let key = (from, to, message.label.channel.clone());
        self.lock().queues.entry(key).or_default().push_back(message);
        self.changed[to].notify_all();
    }

    /// What a rank waits for.
    pub fn wait_of(&self, rank: usize) -> Wait {
        self.lock().waits[rank].clone()
    }

    /// Notes that these ranks were asked what they wait for.
    pub fn ask(&self, ranks: impl Iterator<Item = usize>) {
        let mut state = self.lock();
        ranks.for_each(|rank| state.asked[rank] = true);
    }

    /// Notes a rank's answer.
    pub fn answer(&self, rank: usize, wait: Wait) {
        let mut state = self.lock();
        (state.waits[rank], state.asked[rank]) = (wait, false);
    }

    /// Whether every rank that was asked and lives has answered.
    pub fn all_answered(&self) -> bool {
        let state = self.lock();
        state.asked.iter().zip(&state.ended).all(|(asked, ended)| !asked || *ended)
    }

    /// Takes the message for `rank` that `from` has sent under a label; waits for it. `ask` is
    /// called where nothing came in time, and finds out what the other ranks wait for.
    pub fn take(
        &self,
        rank: usize,
        from: usize,
        expected: &Label,
        ask: &dyn Fn(),
    ) -> Result<Vec<Tensor>, ExchangeError> {
        let begin = Instant::now();
        let key = (from, rank, expected.channel.clone());
        let mut state = self.lock();
        loop {
            state.failed(rank, expected)?;
            if let Some(message) = state.queues.get_mut(&key).and_then(|q| next(q, expected)) {
                state.waits[rank] = None;
                if message.label == *expected {
                    return Ok(message.tensors);
                }
                let (own, found) = (expected.to_string(), message.label.to_string());
                return Err(ExchangeError::Disagree { rank, own, other: from, found });
            }
            if state.ended[from] {
                let reason = "it came to its end".to_owned();
                let (lost, waiting) = (from, expected.to_string());
                return Err(ExchangeError::Lost { rank, lost, reason, waiting });
            }
            if state.waits[rank].is_none() {
                state.waits[rank] = Some((from, expected.to_string()));
            }
            let left = self.timeout.saturating_sub(begin.elapsed());
            if left.is_zero() {
                drop(state);
                ask();
                // The rank stays among those that wait until it ends: one whose time is over at the
                // same moment then still sees whom all of them wait for.
                let state = self.lock();
                state.failed(rank, expected)?;
                return Err(ExchangeError::TimedOut {
                    rank,
                    seconds: self.timeout.as_secs_f64(),
                    waiting: expected.to_string(),
                    suspect: state.suspect(rank),
                    waits: state.all_waits(),
                });
            }
            let waited = self.changed[rank].wait_timeout(state, left);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

/// The message of the expected number, or one behind it: its sender is past what is expected.
fn next(queue: &mut VecDeque<Message>, expected: &Label) -> Option<Message> {
    // Exchanges are ended in another order than they were begun in where results are first used so.
    let at = queue.iter().position(|message| message.label.number >= expected.number)?;
    queue.remove(at)
}

impl State {
    fn failed(&self, rank: usize, waiting: &Label) -> Result<(), ExchangeError> {
        let Some((lost, reason, _)) = &self.failure else { return Ok(()) };
        let (lost, reason, waiting) = (*lost, reason.clone(), waiting.to_string());
        Err(ExchangeError::Lost { rank, lost, reason, waiting })
    }

    /// Follows who waits for whom from `rank` on.
    fn suspect(&self, rank: usize) -> String {
        let (mut at, mut seen) = (rank, vec![rank]);
        loop {
            let Some((next, _)) = &self.waits[at] else {
                return format!("rank {at} waits for nobody and does not answer");
            };
            if self.ended[*next] {
                return format!("rank {next} has ended without it");
            }
            if seen.contains(next) {
                return format!("ranks {seen:?} wait for each other");
            }
            at = *next;
            seen.push(at);
        }
    }

    fn all_waits(&self) -> Vec<String> {
        let words = |(rank, wait): (usize, &Option<(usize, String)>)| match wait {
            Some((from, what)) => format!("rank {rank} waits for rank {from}, {what}"),
            None if self.ended[rank] => format!("rank {rank} has ended"),
            None if self.asked[rank] => format!("rank {rank} does not answer"),
            None => format!("rank {rank} computes"),
        };
        self.waits.iter().enumerate().map(words).collect()
    }
}
