//! Virtual memory: physical memory, ranges of addresses, and what is mapped where.

use std::any::Any;
use std::collections::BTreeMap;
use std::fs::File;
use std::sync::{Arc, Mutex};

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
    pub physical: Arc<Physical>,
    pub offset: usize,
    pub bytes: usize,
    pub accessible: bool,
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
            let new = pieces(&mapping.physical.map, mapping.offset, mapping.bytes);
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
