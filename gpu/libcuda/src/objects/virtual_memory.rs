//! Virtual memory: physical memory, ranges of addresses, and what is mapped where.

use std::any::Any;
use std::collections::BTreeMap;
use std::fs::File;
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use fathom_emulator::memory::{Memory, Piece};
use memmap2::MmapRaw;

use crate::abi::DevicePtr;

/// `CUmemAllocationProp`: type, handle types, location's type and number, and what is not read.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct Properties {
    pub kind: u32,
    pub handle_types: u32,
    pub location: [u32; 2],
    pub rest: [u64; 2],
}

/// Physical memory (`cuMemCreate`), which ranges of addresses are mapped to.
pub(crate) struct Physical {
    pub properties: Properties,
    pub bytes: usize,
    pub map: Arc<MmapRaw>,
    /// Of memory that processes may share.
    pub file: Option<File>,
}

/// A reserved range of addresses, and what is mapped there: by offset, the memory, the offset in
/// it, the length, and whether somebody has access.
pub(crate) struct Range {
    pub device: u32,
    pub bytes: usize,
    pub mapped: BTreeMap<usize, Mapping>,
}

pub(crate) struct Mapping {
    pub what: Mapped,
    pub offset: usize,
    pub bytes: usize,
    pub accessible: bool,
}

/// What a range of addresses is mapped to.
#[derive(Clone)]
pub(crate) enum Mapped {
    Memory(Arc<Physical>),
    Multicast(Arc<Multicast>),
}

/// A multicast object (`cuMulticastCreate`): memory of several devices behind the same offsets.
pub(crate) struct Multicast {
    /// How many devices take part.
    pub count: usize,
    pub bytes: usize,
    pub team: Mutex<Team>,
    /// A device has been added.
    pub added: Condvar,
}

/// Devices of a multicast object, and what each has bound, by offset.
#[derive(Default)]
pub(crate) struct Team {
    pub devices: Vec<u32>,
    pub bound: BTreeMap<(u32, usize), Bound>,
}

/// Memory that is bound: from which of its bytes on, and how much of it.
pub(crate) struct Bound {
    pub memory: Arc<Physical>,
    pub offset: usize,
    pub bytes: usize,
}

/// How long others may take to add their devices.
const PATIENCE: Duration = Duration::from_secs(10);

impl Multicast {
    /// Waits until all devices have been added, as binding and mapping do; false where others take
    /// too long.
    pub(crate) fn is_complete(&self) -> bool {
        let team = self.team.lock().expect("no panic holds this lock");
        let lacking = |team: &mut Team| team.devices.len() < self.count;
        let waited = self.added.wait_timeout_while(team, PATIENCE, lacking);
        !waited.expect("no panic holds this lock").1.timed_out()
    }

    /// The memory behind a part of the object, by device; none where a device has not bound all of
    /// it yet.
    fn copies(&self, offset: usize, bytes: usize) -> Option<Vec<(u32, Vec<Piece>)>> {
        let team = self.team.lock().expect("no panic holds this lock");
        let copy = |device: &u32| {
            let (mut at, mut list) = (offset, Vec::new());
            while at < offset + bytes {
                let (&(_, begin), bound) =
                    team.bound.range((*device, 0)..=(*device, at)).next_back()?;
                let inside = at - begin;
                let length = bound.bytes.checked_sub(inside).filter(|n| *n > 0)?;
                let length = length.min(offset + bytes - at);
                list.extend(pieces(&bound.memory.map, bound.offset + inside, length));
                at += length;
            }
            Some((*device, list))
        };
        team.devices.iter().map(copy).collect()
    }
}

/// Reserved ranges by their first address.
pub(crate) type Ranges = Mutex<BTreeMap<DevicePtr, Range>>;

/// Bytes from `offset` of a mapping on, as pieces.
pub(crate) fn pieces(map: &Arc<MmapRaw>, offset: usize, bytes: usize) -> Vec<Piece> {
    let owner: Arc<dyn Any + Send + Sync> = map.clone();
    // SAFETY: the mapping is as long as that and stays as long as its owner; nothing else looks
    // at it but other processes.
    unsafe { Piece::cut(map.as_mut_ptr().add(offset), bytes, &owner) }
}

impl Range {
    /// Whether its mappings cover `bytes` from `offset` on exactly.
    pub(crate) fn covers(&self, offset: usize, bytes: usize) -> bool {
        let mut at = offset;
        for (begin, mapping) in self.mapped.range(offset..offset + bytes) {
            if *begin != at {
                return false;
            }
            at += mapping.bytes;
        }
        at == offset + bytes
    }

    /// Tells the emulator what is accessible: neighbours are one allocation, which accesses may
    /// cross.
    pub(crate) fn publish(&self, memory: &Memory, base: DevicePtr) {
        memory.unmap(base, self.bytes as u64);
        let mut open: Option<(usize, usize, Vec<Piece>)> = None;
        let close = |run: Option<(usize, usize, Vec<Piece>)>| {
            if let Some((begin, end, pieces)) = run {
                memory.map(self.device, base + begin as u64, (end - begin) as u64, pieces);
            }
        };
        for (at, mapping) in self.mapped.iter().filter(|(_, mapping)| mapping.accessible) {
            let new = match &mapping.what {
                Mapped::Memory(physical) => pieces(&physical.map, mapping.offset, mapping.bytes),
                Mapped::Multicast(multicast) => {
                    close(open.take());
                    if let Some(copies) = multicast.copies(mapping.offset, mapping.bytes) {
                        let begin = base + *at as u64;
                        memory.map_multicast(begin, mapping.bytes as u64, copies);
                    }
                    continue;
                }
            };
            match &mut open {
                Some((_, end, list)) if *end == *at => {
                    *end += mapping.bytes;
                    list.extend(new);
                }
                _ => {
                    close(open.take());
                    open = Some((*at, at + mapping.bytes, new));
                }
            }
        }
        close(open);
    }
}

/// Memory of a device that other processes may open: the number of the file that it lies in.
pub(crate) type Shared = Mutex<BTreeMap<DevicePtr, u64>>;
