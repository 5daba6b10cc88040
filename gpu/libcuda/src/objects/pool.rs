//! Memory pools: what their memory is, and how much of it is used.

use std::sync::Mutex;

use crate::machine::{HostKind, Location};

/// What a pool's memory is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum PoolMemory {
    Device(usize),
    /// Of the host; managed memory may have a device as its preferred place.
    Host(HostKind, Location),
}

/// A memory pool (`CUmemoryPool`).
pub(crate) struct Pool {
    pub memory: PoolMemory,
    pub state: Mutex<PoolState>,
}

/// What a pool's attributes say, in bytes where they are sizes.
#[derive(Clone, Copy, Default)]
pub(crate) struct PoolState {
    /// Three switches for reuse, which are on.
    pub reuse_off: [bool; 3],
    pub release_threshold: u64,
    pub used: u64,
    pub used_high: u64,
    pub reserved_high: u64,
    /// Of graphs: what is reserved until it is trimmed.
    pub reserved_now: u64,
    /// Of graphs: bytes that were freed since, and count as used until then.
    pub freed: u64,
}

/// Bytes in which a pool takes memory from its device.
const UNIT: u64 = 32 << 20;

impl PoolState {
    pub(crate) fn reserved(&self) -> u64 {
        self.used.next_multiple_of(UNIT)
    }
}

impl Pool {
    pub(crate) fn new(memory: PoolMemory) -> Pool {
        Pool { memory, state: Mutex::default() }
    }

    /// Changes how many bytes are used.
    pub(crate) fn used(&self, change: impl FnOnce(u64) -> u64) {
        let mut state = self.state.lock().expect("no panic holds this lock");
        state.used = change(state.used);
        state.used_high = state.used_high.max(state.used);
        state.reserved_now = state.reserved_now.max(state.reserved());
        state.reserved_high = state.reserved_high.max(state.reserved());
    }
}
