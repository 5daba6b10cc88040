//! What streams have been given to do: in order within a stream, after what it waits for, and
//! otherwise in the order in which it was given.
//!
//! A call that is not a launch runs at once where nothing stands before it. Launches are kept until
//! the host waits for something: then the thread that waits runs what it waits for, in the order
//! in which it was given. Where the host makes no call for a while - it polls memory that a kernel
//! will write, or is busy - other threads run what is there.
//!
//! With several devices kernels may wait for one another. Those whose CTAs take turns anyway then
//! run on a thread of their own, together: each joins as soon as it is at the head of its stream,
//! and what follows it may go on as soon as it has ended. Meanwhile another thread does what there
//! is beside them, since they may wait for it. No thread of the host's is held up by a kernel that
//! waits for what that very thread has yet to ask for.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::{Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use fathom_emulator::{Function, Launch, LaunchConfig};

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
    /// Whether it runs together with others.
    joined: bool,
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
    /// Whether launches run together at present.
    together: bool,
    /// Whether something was given or has ended beside them since they were last asked.
    progress: bool,
}

/// The work of all streams.
pub(crate) struct Queue {
    state: Mutex<State>,
    changed: Condvar,
    /// Whether kernels of several streams may wait for one another.
    together: bool,
    run: Run,
}

/// What the queue leaves to others.
pub(crate) struct Run {
    /// Does one thing.
    pub one: fn(Work),
    /// Runs what [`Queue::join`] gives until there is none.
    pub together: fn(&'static Queue),
}

/// Launches that join those that run together, each with its place in its stream.
#[derive(Default)]
pub(crate) struct Joined {
    pub launches: Vec<(Mark, Function, LaunchConfig)>,
    /// Whether something has happened beside them since the last call, or is happening.
    pub progress: bool,
}

/// Items kept before some run in any case.
const MOST_KEPT: usize = 256;

/// Without a call for so long, the host is taken to be busy, or to wait for memory to change.
const IDLE: Duration = Duration::from_millis(100);

/// How often a value in memory is looked at that a stream waits for.
const LOOK: Duration = Duration::from_millis(1);

impl Queue {
    pub(crate) fn new(together: bool, run: Run) -> Queue {
        let state = State {
            lines: BTreeMap::new(),
            last_number: 0,
            kept: 0,
            last_call: Instant::now(),
            together: false,
            progress: false,
        };
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
    pub(crate) fn give(&'static self, key: Key, mut after: Vec<Mark>, work: Work) -> (Mark, R) {
        let mut state = self.lock();
        state.last_call = Instant::now();
        state.progress = true;
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
    pub(crate) fn wait(&'static self, marks: &[Mark]) {
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

    /// Runs the oldest thing that can run and that the marks need, or of all. False where there is
    /// none, or none but those that join what runs together.
    fn run_one(&'static self, needed_by: Option<&[Mark]>) -> bool {
        let mut state = self.lock();
        state.last_call = Instant::now();
        let Some(key) = state.oldest(needed_by, self.together) else { return false };
        if self.together && state.takes_turns(key) {
            state.together = true;
            drop(state);
            std::thread::spawn(|| self.run_together());
            return true;
        }
        let (mark, work) = state.take(key);
        drop(state);
        (self.run.one)(work);
        self.ended(&[mark]);
        true
    }

    /// Runs launches together until there are none, and beside them what else there is.
    fn run_together(&'static self) {
        let beside = std::thread::spawn(|| {
            while self.lock().together {
                if !self.run_one(None) {
                    let state = self.lock();
                    drop(self.changed.wait_timeout(state, LOOK).expect("no panic holds this lock"));
                }
            }
        });
        (self.run.together)(self);
        // It panics where the emulator does, which has been told.
        let _ = beside.join();
    }

    /// The launches that now join those that run together. Where `none_left`, none runs any more:
    /// to give none then is the end of running together.
    pub(crate) fn join(&self, none_left: bool) -> Joined {
        let mut state = self.lock();
        state.last_call = Instant::now();
        let keys: Vec<Key> = state.lines.keys().copied().collect();
        let mut joined = Joined::default();
        for key in keys {
            if state.can_run(key) && state.takes_turns(key) {
                let (mark, work) = state.take(key);
                let line = state.lines.get_mut(&key).expect("it was taken from");
                line.joined = true;
                if let Work::Launch(function, config) = work {
                    joined.launches.push((mark, function, config));
                }
            }
        }
        let beside = state.lines.values().any(|line| line.running && !line.joined);
        joined.progress = std::mem::take(&mut state.progress) || beside;
        if none_left && joined.launches.is_empty() {
            state.together = false;
            drop(state);
            self.changed.notify_all();
        }
        joined
    }

    /// What stands at these places is done.
    pub(crate) fn ended(&self, marks: &[Mark]) {
        let mut state = self.lock();
        state.progress = true;
        for (key, number) in marks {
            let line = state.lines.entry(*key).or_default();
            line.running = false;
            line.joined = false;
            line.done = *number;
        }
        drop(state);
        self.changed.notify_all();
    }

    /// Lets another thread run one thing, if any can run.
    fn run_elsewhere(&'static self) {
        if self.lock().oldest(None, self.together).is_some() {
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

    /// Whether a stream's head is a launch whose CTAs take turns.
    fn takes_turns(&self, key: Key) -> bool {
        let front = self.lines[&key].items.front();
        front.is_some_and(|item| match &item.work {
            Work::Launch(function, config) => Launch { function, config }.takes_turns(),
            _ => false,
        })
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

    /// The stream with the oldest item that can run; where there are launches that run together,
    /// not one that would join them.
    fn oldest(&self, needed_by: Option<&[Mark]>, together: bool) -> Option<Key> {
        let number = |key: &Key| self.lines[key].items.front().map_or(u64::MAX, |i| i.number);
        let keys: Vec<Key> = match needed_by {
            Some(marks) => self.needed(marks).into_iter().collect(),
            None => self.lines.keys().copied().collect(),
        };
        let joins = |key: &Key| together && self.together && self.takes_turns(*key);
        let can_run = |key: &Key| self.can_run(*key) && !joins(key);
        keys.into_iter().filter(can_run).min_by_key(number)
    }

    fn take(&mut self, key: Key) -> (Mark, Work) {
        let line = self.lines.get_mut(&key).expect("it can run");
        let item = line.items.pop_front().expect("it can run");
        line.running = true;
        self.kept -= 1;
        ((key, item.number), item.work)
    }
}
