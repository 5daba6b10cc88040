//! Events: when they were recorded, also those that processes share.

use std::fs::File;
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{
    AtomicU32, AtomicU64,
    Ordering::{Relaxed, SeqCst},
};

use memmap2::{MmapOptions, MmapRaw};

use super::stream::Captured;
use crate::abi::*;
use crate::queue::Mark;

/// An event: when it was last recorded, where that stands in its stream, and in which capture.
pub(crate) struct Event {
    /// When it was last recorded, in emulated nanoseconds of its device; `NEVER` before.
    at: AtomicU64,
    pub timed: bool,
    pub recorded: Mutex<Option<Mark>>,
    /// Of an event that processes may share: how often it was recorded, and how often that is done.
    pub shared: Option<SharedEvent>,
    pub captured: Mutex<Option<Captured>>,
}

/// An event's time before it is recorded.
const NEVER: u64 = u64::MAX;

impl Event {
    pub(crate) fn new(timed: bool, shared: Option<SharedEvent>) -> Event {
        let at = AtomicU64::new(NEVER);
        let (recorded, captured) = (Mutex::default(), Mutex::default());
        Event { at, timed, recorded, shared, captured }
    }

    /// Counts a record of a shared event that a stream is about to be given.
    pub(crate) fn count_record(&self) {
        if let Some(shared) = &self.shared {
            shared.recorded().fetch_add(1, SeqCst);
        }
    }

    /// Takes its time; of a shared event that is one more record done.
    pub(crate) fn taken(&self, ns: u64) {
        self.at.store(ns, Relaxed);
        if let Some(shared) = &self.shared {
            shared.done().fetch_add(1, SeqCst);
        }
    }

    /// Whether so many records of a shared event are done, counting round.
    pub(crate) fn shared_reached(&self, wanted: u32) -> bool {
        let done = |shared: &SharedEvent| shared.done().load(SeqCst).wrapping_sub(wanted) as i32;
        self.shared.as_ref().is_none_or(|shared| done(shared) >= 0)
    }

    /// Whether all records of a shared event are done; of others, true.
    pub(crate) fn shared_done(&self) -> bool {
        let recorded = |shared: &SharedEvent| shared.recorded().load(SeqCst);
        self.shared.as_ref().is_none_or(|shared| self.shared_reached(recorded(shared)))
    }

    /// Its time, if it has one.
    pub(crate) fn at(&self) -> Option<u64> {
        Some(self.at.load(Relaxed)).filter(|at| *at != NEVER && self.timed)
    }
}

/// An event in a file: two counters that processes share.
pub(crate) struct SharedEvent {
    map: MmapRaw,
    pub process: u64,
    pub number: u64,
}

impl SharedEvent {
    /// # Errors
    /// Where the file cannot be made (`create`) or is not there.
    pub(crate) fn open(path: &Path, (process, number): (u64, u64), create: bool) -> R<SharedEvent> {
        let open = || -> std::io::Result<MmapRaw> {
            let file = File::options().read(true).write(true).create(create).open(path)?;
            file.set_len(8)?;
            MmapOptions::new().map_raw(&file)
        };
        let map = open().map_err(|_| ERROR_MAP_FAILED)?;
        Ok(SharedEvent { map, process, number })
    }

    fn counter(&self, index: usize) -> &AtomicU32 {
        // SAFETY: the mapping has two words, which all processes use as atomics.
        unsafe { AtomicU32::from_ptr(self.map.as_mut_ptr().cast::<u32>().add(index)) }
    }

    /// How often the event was recorded.
    pub(crate) fn recorded(&self) -> &AtomicU32 {
        self.counter(0)
    }

    /// How many of the records are done.
    pub(crate) fn done(&self) -> &AtomicU32 {
        self.counter(1)
    }
}
