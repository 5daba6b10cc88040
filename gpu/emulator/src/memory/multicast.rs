//! Multicast ranges: addresses behind which lies memory of several devices, a copy on each.
//!
//! Only `multimem` instructions may use such an address (PTX ISA, "Multimem Addresses"), so a range
//! is no allocation: every other access of it is one outside of all of them.

use std::sync::Arc;

use super::View;
use super::allocation::{Allocation, Piece};

/// A range of multicast addresses.
#[derive(Clone, Debug)]
pub struct Multicast {
    pub(super) base: u64,
    pub(super) bytes: u64,
    /// The memory behind it, a device each, in the order of devices; offsets are those of the
    /// range.
    pub(super) copies: Vec<Arc<Allocation>>,
}

impl Multicast {
    /// The copies that lie behind its addresses.
    pub(crate) fn copies(&self) -> &[Arc<Allocation>] {
        &self.copies
    }

    /// Its first address.
    pub(crate) fn base(&self) -> u64 {
        self.base
    }
}

impl View {
    /// The multicast range that holds all of `address..address + bytes`.
    pub(crate) fn multicast(&self, address: u64, bytes: u64) -> Option<&Multicast> {
        let inside = |m: &&Multicast| address >= m.base && address + bytes <= m.base + m.bytes;
        self.multicasts.iter().find(inside)
    }

    /// An ordinary address of the memory that a copy has at `offset`, where there is one: by which
    /// the checks of order know it.
    pub(crate) fn home(&self, copy: &Allocation, offset: u64) -> Option<u64> {
        let wanted: &Piece = copy.piece_at(offset)?;
        let at = |a: &Arc<Allocation>| {
            let index = a.piece_of(wanted)?;
            Some(a.base() + index + offset % super::CHUNK_BYTES)
        };
        self.allocations.iter().find_map(at)
    }
}
