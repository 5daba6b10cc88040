//! Tables of handles: what each stands for.

use std::collections::BTreeMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use crate::abi::{ERROR_INVALID_HANDLE, Handle, R};

/// Objects behind handles of one kind.
pub(crate) struct Handles<T>(Mutex<BTreeMap<Handle, T>>);

/// Handles are spread like pointers, since clients print and compare them as such.
static NEXT_HANDLE: AtomicU64 = AtomicU64::new(0x1000);

/// From one handle to the next.
pub(crate) const HANDLE_STEP: usize = 0x40;

impl<T: Clone> Handles<T> {
    pub(crate) const fn new() -> Self {
        Handles(Mutex::new(BTreeMap::new()))
    }

    pub(crate) fn insert(&self, value: T) -> Handle {
        self.insert_with(|_| value)
    }

    /// As [`Handles::insert`], of a value that knows its handle.
    pub(crate) fn insert_with(&self, make: impl FnOnce(Handle) -> T) -> Handle {
        let handle = NEXT_HANDLE.fetch_add(HANDLE_STEP as u64, Relaxed) as Handle;
        self.lock().insert(handle, make(handle));
        handle
    }

    pub(crate) fn get(&self, handle: Handle) -> R<T> {
        self.lock().get(&handle).cloned().ok_or(ERROR_INVALID_HANDLE)
    }

    pub(crate) fn remove(&self, handle: Handle) -> R<T> {
        self.lock().remove(&handle).ok_or(ERROR_INVALID_HANDLE)
    }

    /// Handles of the objects that a condition holds for.
    pub(crate) fn which(&self, holds: impl Fn(&T) -> bool) -> Vec<Handle> {
        self.lock().iter().filter(|(_, value)| holds(value)).map(|(handle, _)| *handle).collect()
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, BTreeMap<Handle, T>> {
        self.0.lock().expect("no panic holds this lock")
    }
}
