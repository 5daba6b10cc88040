//! What streams have been given to do: in order within a stream, after what it waits for, and
//! otherwise in the order in which it was given.
//!
//! A call that is not a launch runs at once where nothing stands before it. Launches are kept until
//! the host waits for something: then the thread that waits runs what it waits for, in the order
//! in which it was given. With several devices the launches at the heads of their streams run
//! together, so that kernels may wait for one another. Where the host makes no call for a while -
//! it polls memory that a kernel will write, or is busy - other threads run what is there.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::{Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use fathom_emulator::{Function, LaunchConfig};

use crate::abi::{Handle, R};

/// A stream: its device and handle, 0 for the device's legacy default stream.
pub(crate) type Key = (usize, Handle);

/// A place in a stream's order: what was given before is done when this is.
pub(crate) type Mark = (Key, u64);

/// Something to do.
pub(crate) enum Work {
    /// A kernel; kept.
    Launch(Function, LaunchConfig),
    /// Runs at once where nothing stands before it.
    Now(Box<dyn FnOnce() -> R + Send>),
    /// Kept like a launch: it may take long, or wait for the host.
    Later(Box<dyn FnOnce() -> R + Send>),
    /// Nothing, once this is true.
    Wait(Box<dyn Fn() -> bool + Send>),
}

struct Item {
    number: u64,
    after: Vec<Mark>,
    work: Work,
}

/// A stream's items, oldest first.
#[derive(Default)]
struct Line {
    items: VecDeque<Item>,
    /// Whether the item before the first one is running.
    running: bool,
    /// The last number given to the stream, and the last one that is done.
    given: u64,
    done: u64,
}

struct State {
    lines: BTreeMap<Key, Line>,
    last_number: u64,
    /// Items in all lines.
    kept: usize,
    last_call: Instant,
}

/// The work of all streams.
pub(crate) struct Queue {
    state: Mutex<State>,
    changed: Condvar,
    /// Whether launches at the heads of streams run together.
    together: bool,
    /// Runs several launches that run together, or one other thing.
    run: fn(Vec<Work>),
}

/// Items kept before some run in any case.
const MOST_KEPT: usize = 256;

/// Without a call for so long, the host is taken to be busy, or to wait for memory to change.
const IDLE: Duration = Duration::from_millis(100);

/// How often a value in memory is looked at that a stream waits for.
const LOOK: Duration = Duration::from_millis(1);

impl Queue {
    pub(crate) fn new(together: bool, run: fn(Vec<Work>)) -> Queue {
        let lines = BTreeMap::new();
        let state = State { lines, last_number: 0, kept: 0, last_call: Instant::now() };
        Queue { state: Mutex::new(state), changed: Condvar::new(), together, run }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no panic holds this lock")
    }

    /// What a stream has been given so far.
    pub(crate) fn mark(&self, key: Key) -> Mark {
        (key, self.lock().lines.get(&key).map_or(0, |line| line.given))
    }

    /// What all streams that `wanted` holds for have been given so far.
    pub(crate) fn marks(&self, wanted: impl Fn(Key) -> bool) -> Vec<Mark> {
        let state = self.lock();
        state.lines.iter().filter(|(k, _)| wanted(**k)).map(|(k, line)| (*k, line.given)).collect()
    }

    /// Gives a stream something to do after all of `after`; says which place in its order that has.
    /// What runs at once has its own result.
    pub(crate) fn give(&self, key: Key, mut after: Vec<Mark>, work: Work) -> (Mark, R) {
        let mut state = self.lock();
        state.last_call = Instant::now();
        after.retain(|mark| !state.is_done(*mark));
        state.last_number += 1;
        let number = state.last_number;
        let line = state.lines.entry(key).or_default();
        line.given = number;
        let free = after.is_empty() && line.items.is_empty() && !line.running;
        if let Work::Now(call) = work {
            if free {
                line.running = true;
                drop(state);
                let result = call();
                self.ended(&[(key, number)]);
                return ((key, number), result);
            }
            line.items.push_back(Item { number, after, work: Work::Now(call) });
        } else {
            line.items.push_back(Item { number, after, work });
        }
        state.kept += 1;
        let full = state.kept >= MOST_KEPT;
        drop(state);
        if full {
            self.run_one(None);
        }
        ((key, number), Ok(()))
    }

    /// Runs what stands before the marks, or waits for who does.
    pub(crate) fn wait(&self, marks: &[Mark]) {
        while !self.lock().are_done(marks) {
            if self.run_one(Some(marks)) || self.awaits_memory(marks) && self.run_one(None) {
                continue;
            }
            // Others run it, or a value is waited for that somebody else writes.
            let mut state = self.lock();
            state.last_call = Instant::now();
            if !state.are_done(marks) {
                drop(self.changed.wait_timeout(state, LOOK).expect("no panic holds this lock"));
            }
        }
    }

    /// Whether the marks wait for a value in memory, which any stream may write.
    fn awaits_memory(&self, marks: &[Mark]) -> bool {
        let state = self.lock();
        let waits = |key: &Key| {
            let head = state.lines[key].items.front();
            head.is_some_and(|item| matches!(item.work, Work::Wait(_)))
        };
        state.needed(marks).iter().any(waits)
    }

    /// Lets other threads run what stands before a mark, and looks a little later whether it is
    /// done.
    pub(crate) fn is_done_soon(&'static self, marks: &[Mark]) -> bool {
        if !self.lock().are_done(marks) {
            self.run_elsewhere();
            let state = self.lock();
            drop(self.changed.wait_timeout(state, LOOK).expect("no panic holds this lock"));
        }
        self.lock().are_done(marks)
    }

    /// Runs the oldest thing that can run and that the marks need, or of all; with it, where
    /// launches run together, those at the heads of other streams. False where there is none.
    fn run_one(&self, needed_by: Option<&[Mark]>) -> bool {
        let mut state = self.lock();
        state.last_call = Instant::now();
        let Some(first) = state.oldest(needed_by) else { return false };
        let mut keys = vec![first];
        if self.together && state.is_launch(first) {
            let others: Vec<Key> = state.lines.keys().copied().filter(|k| *k != first).collect();
            keys.extend(others.into_iter().filter(|k| state.can_run(*k) && state.is_launch(*k)));
        }
        let (marks, works) = keys.iter().map(|key| state.take(*key)).unzip::<_, _, Vec<_>, _>();
        drop(state);
        (self.run)(works);
        self.ended(&marks);
        true
    }

    fn ended(&self, marks: &[Mark]) {
        let mut state = self.lock();
        for (key, number) in marks {
            let line = state.lines.entry(*key).or_default();
            line.running = false;
            line.done = *number;
        }
        drop(state);
        self.changed.notify_all();
    }

    /// Lets another thread run one thing, if any can run.
    fn run_elsewhere(&'static self) {
        if self.lock().oldest(None).is_some() {
            std::thread::spawn(|| self.run_one(None));
        }
    }

    /// Looks after the work while the host makes no calls, for as long as the process lives, and
    /// calls `meanwhile` now and then.
    pub(crate) fn attend(&'static self, meanwhile: fn()) {
        std::thread::spawn(move || {
            loop {
                std::thread::sleep(IDLE / 2);
                meanwhile();
                if self.lock().last_call.elapsed() >= IDLE {
                    self.run_elsewhere();
                }
            }
        });
    }
}

impl State {
    fn is_done(&self, (key, number): Mark) -> bool {
        self.lines.get(&key).is_none_or(|line| line.done >= number)
    }

    fn are_done(&self, marks: &[Mark]) -> bool {
        marks.iter().all(|mark| self.is_done(*mark))
    }

    fn can_run(&self, key: Key) -> bool {
        let line = &self.lines[&key];
        let Some(item) = line.items.front().filter(|_| !line.running) else { return false };
        let ready = match &item.work {
            Work::Wait(ready) => ready(),
            _ => true,
        };
        ready && self.are_done(&item.after)
    }

    fn is_launch(&self, key: Key) -> bool {
        let front = self.lines[&key].items.front();
        front.is_some_and(|item| matches!(item.work, Work::Launch(..)))
    }

    /// The streams whose heads must run for the marks to be done.
    fn needed(&self, marks: &[Mark]) -> BTreeSet<Key> {
        let mut found = BTreeSet::new();
        let mut open: Vec<Mark> = marks.to_vec();
        while let Some(mark) = open.pop() {
            if !self.is_done(mark) && found.insert(mark.0) {
                let head = self.lines[&mark.0].items.front();
                open.extend(head.iter().flat_map(|item| item.after.iter().copied()));
            }
        }
        found
    }

    /// The stream with the oldest item that can run.
    fn oldest(&self, needed_by: Option<&[Mark]>) -> Option<Key> {
        let number = |key: &Key| self.lines[key].items.front().map_or(u64::MAX, |i| i.number);
        let keys: Vec<Key> = match needed_by {
            Some(marks) => self.needed(marks).into_iter().collect(),
            None => self.lines.keys().copied().collect(),
        };
        keys.into_iter().filter(|key| self.can_run(*key)).min_by_key(number)
    }

    fn take(&mut self, key: Key) -> (Mark, Work) {
        let line = self.lines.get_mut(&key).expect("it can run");
        let item = line.items.pop_front().expect("it can run");
        line.running = true;
        self.kept -= 1;
        ((key, item.number), item.work)
    }
}
