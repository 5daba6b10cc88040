//! Streams: where they run, and what they capture.

use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex};

use crate::abi::Handle;

/// A stream: where it runs, and what it captures.
#[derive(Clone)]
pub(crate) struct Stream {
    pub handle: Handle,
    pub device: usize,
    pub capture: Arc<Mutex<Option<Captured>>>,
    pub flags: u32,
    pub priority: i32,
    /// The green context that it was made in, or 0.
    pub green: Handle,
}

/// What streams capture together into a graph, until the one that began ends it.
pub(crate) struct Capture {
    pub graph: Handle,
    /// Whether the client gave the graph, and so need not be told it.
    pub given: bool,
    pub id: u64,
    pub origin: Handle,
    pub ended: AtomicBool,
}

/// A stream's part in a capture: the nodes that its next one will wait for.
#[derive(Clone)]
pub(crate) struct Captured {
    pub capture: Arc<Capture>,
    pub after: Vec<Handle>,
}

impl Captured {
    pub(crate) fn lasts(&self) -> bool {
        !self.capture.ended.load(Relaxed)
    }
}

impl Stream {
    /// What this stream captures, while it does.
    pub(crate) fn capturing(&self) -> Option<Captured> {
        let mut own = self.capture.lock().expect("no panic holds this lock");
        if !own.as_ref().is_some_and(Captured::lasts) {
            *own = None;
        }
        own.clone()
    }

    pub(crate) fn set_captured(&self, captured: Captured) {
        *self.capture.lock().expect("no panic holds this lock") = Some(captured);
    }
}
