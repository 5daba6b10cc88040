//! Global memory: allocations of all devices in one address space, committed where touched.
//!
//! An allocation is a list of 2 MiB chunks that come into being when they are first written.
//! The unit of access is a relaxed atomic 32-bit word: CTAs that run on several host threads may
//! race in the guest, never in Rust. Addresses are not reused, so that a stale pointer is
//! recognised. Where else: shared and local memory live in their CTA and warp (`crate::machine`).

mod allocation;
mod multicast;

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering::Relaxed};
use std::sync::{Arc, OnceLock, RwLock};

use self::allocation::Backing;
pub(crate) use self::allocation::CHUNK_BYTES;
pub use self::allocation::{Allocation, AllocationKind, Piece};
use self::multicast::Multicast;
use crate::error::MemoryError;

/// First address of device 0; each further device starts [`DEVICE_STRIDE`] later.
pub const DEVICE_BASE: u64 = 0x1000_0000_0000;
/// Distance of two devices' address ranges.
pub const DEVICE_STRIDE: u64 = 0x0100_0000_0000;
/// Generic window of shared memory: 16 MiB a CTA of the cluster, by rank.
pub const SHARED_WINDOW: u64 = 0x0100_0000_0000;
/// Generic window of local memory.
pub const LOCAL_WINDOW: u64 = 0x0200_0000_0000;
/// Generic window of kernel parameters.
pub const PARAM_WINDOW: u64 = 0x0300_0000_0000;
/// Addresses a window spans.
pub const WINDOW_BYTES: u64 = 1 << 32;

/// The allocations that a launch sees, sorted by address, freed ones included.
#[derive(Clone, Debug, Default)]
pub struct View {
    allocations: Arc<Vec<Arc<Allocation>>>,
    multicasts: Arc<Vec<Multicast>>,
}

impl View {
    /// The allocation whose range holds `address` (live or freed).
    pub fn find(&self, address: u64) -> Option<&Arc<Allocation>> {
        let after = self.allocations.partition_point(|a| a.base <= address);
        let found = &self.allocations[after.checked_sub(1)?];
        (address - found.base < found.bytes).then_some(found)
    }

    /// The live allocation that holds all of `address..address + bytes`.
    pub fn locate(&self, address: u64, bytes: u64) -> Option<&Arc<Allocation>> {
        let found = self.find(address)?;
        (!found.is_freed() && found.bytes - (address - found.base) >= bytes).then_some(found)
    }

    /// As [`Self::locate`], looking first at the allocation of the number `place`, which becomes
    /// that of the one found.
    pub fn locate_near(
        &self,
        place: &mut u32,
        address: u64,
        bytes: u64,
    ) -> Option<&Arc<Allocation>> {
        let holds = |a: &Arc<Allocation>| address >= a.base && address - a.base < a.bytes;
        if !self.allocations.get(*place as usize).is_some_and(holds) {
            let after = self.allocations.partition_point(|a| a.base <= address);
            *place = after.checked_sub(1)? as u32;
        }
        let found = self.allocations.get(*place as usize).filter(|a| holds(a))?;
        (!found.is_freed() && found.bytes - (address - found.base) >= bytes).then_some(found)
    }

    /// A sentence about what lies at or beside `address`.
    pub fn nearest(&self, address: u64) -> String {
        if let Some(range) = self.multicast(address, 1) {
            let offset = address - range.base();
            return format!(
                "{offset} bytes into a multicast range, which only multimem may access"
            );
        }
        let after = self.allocations.partition_point(|a| a.base <= address);
        let below = after.checked_sub(1).map(|i| &self.allocations[i]);
        match (below, self.allocations.get(after)) {
            (Some(a), _) if address - a.base < a.bytes => {
                format!("{} bytes into {}", address - a.base, a.describe())
            }
            (Some(a), Some(b)) if b.base - address < address - (a.base + a.bytes) => {
                format!("{} bytes before {}", b.base - address, b.describe())
            }
            (Some(a), _) => {
                format!("{} bytes after the end of {}", address - (a.base + a.bytes), a.describe())
            }
            (None, Some(b)) => format!("{} bytes before {}", b.base - address, b.describe()),
            (None, None) => "there are no allocations".into(),
        }
    }
}

#[derive(Default)]
struct Table {
    view: View,
    count: u64,
    /// Next free address a device.
    next: Vec<u64>,
    used: Vec<u64>,
    limit: Vec<u64>,
}

impl Table {
    fn insert(&mut self, allocation: Arc<Allocation>) {
        let list = Arc::make_mut(&mut self.view.allocations);
        let at = list.partition_point(|a| a.base < allocation.base);
        list.insert(at, allocation);
    }
}

/// Global memory of a set of devices that can reach each other.
pub struct Memory {
    table: RwLock<Table>,
    track: AtomicBool,
}

/// A range of addresses behind which these pieces lie.
fn mapped(device: u32, base: u64, bytes: u64, number: u64, pieces: Vec<Piece>) -> Arc<Allocation> {
    Arc::new(Allocation {
        base,
        bytes,
        kind: AllocationKind::Device,
        device,
        number,
        tracked: false,
        freed: AtomicBool::new(false),
        backing: Backing::Pieces(pieces),
    })
}

impl Memory {
    /// Memory of devices with these capacities in bytes.
    pub(crate) fn new(limits: &[u64]) -> Self {
        let next = (0..limits.len() as u64).map(|d| DEVICE_BASE + d * DEVICE_STRIDE).collect();
        let table =
            Table { next, used: vec![0; limits.len()], limit: limits.to_vec(), ..Table::default() };
        Memory { table: RwLock::new(table), track: AtomicBool::new(false) }
    }

    /// Whether allocations made from now on record which bytes were written (for `uninit`).
    pub fn track_written(&self, on: bool) {
        self.track.store(on, Relaxed);
    }

    /// Reserves `bytes` on `device`, aligned to `align` (a power of two, at least 256 is used).
    /// Its contents read as zero until written.
    ///
    /// # Errors
    /// [`MemoryError::OutOfMemory`] beyond the device's capacity.
    pub(crate) fn alloc(
        &self,
        device: u32,
        bytes: u64,
        align: u64,
        kind: AllocationKind,
    ) -> Result<u64, MemoryError> {
        let mut table = self.table.write().expect("no panic holds this lock");
        let d = device as usize;
        let free = table.limit[d] - table.used[d];
        if bytes > free {
            return Err(MemoryError::OutOfMemory { requested: bytes, free });
        }
        let base = table.next[d].next_multiple_of(align.max(256));
        // A gap of at least 256 bytes keeps neighbours apart: overruns hit nothing.
        table.next[d] = base + bytes.max(1).next_multiple_of(256) + 256;
        table.used[d] += bytes;
        table.count += 1;
        let chunks = (0..bytes.div_ceil(CHUNK_BYTES)).map(|_| OnceLock::new()).collect();
        let allocation = Allocation {
            base,
            bytes,
            kind: kind.clone(),
            device,
            number: table.count,
            // A variable without initialiser is zero by the language.
            tracked: self.track.load(Relaxed) && !matches!(kind, AllocationKind::Variable(_)),
            freed: AtomicBool::new(false),
            backing: Backing::Chunks(chunks),
        };
        table.insert(Arc::new(allocation));
        Ok(base)
    }

    /// Makes memory of the host process reachable at its own address.
    pub(crate) fn insert_host(&self, address: u64, bytes: u64, words: &'static [AtomicU32]) {
        let mut table = self.table.write().expect("no panic holds this lock");
        table.count += 1;
        let number = table.count;
        // Host addresses come back: a freed registration in the way is forgotten.
        let list = Arc::make_mut(&mut table.view.allocations);
        list.retain(|a| !(a.is_freed() && a.base < address + bytes && address < a.base + a.bytes));
        table.insert(Arc::new(Allocation {
            base: address,
            bytes,
            kind: AllocationKind::Host,
            device: 0,
            number,
            tracked: false,
            freed: AtomicBool::new(false),
            backing: Backing::Host(words),
        }));
    }

    /// Gives a freed allocation that starts at `address` memory again, fresh; false where it is
    /// live already.
    ///
    /// # Errors
    /// [`MemoryError::NotAStart`], [`MemoryError::OutOfMemory`].
    pub fn restore(&self, address: u64) -> Result<bool, MemoryError> {
        let mut table = self.table.write().expect("no panic holds this lock");
        let found = table.view.find(address).filter(|a| a.base == address).cloned();
        let Some(found) = found else {
            let nearest = table.view.nearest(address);
            return Err(MemoryError::NotAStart { address, nearest });
        };
        if !found.is_freed() {
            return Ok(false);
        }
        let d = found.device as usize;
        let free = table.limit[d] - table.used[d];
        if found.bytes > free {
            return Err(MemoryError::OutOfMemory { requested: found.bytes, free });
        }
        table.used[d] += found.bytes;
        let chunks = (0..found.bytes.div_ceil(CHUNK_BYTES)).map(|_| OnceLock::new()).collect();
        let fresh = Allocation {
            base: found.base,
            bytes: found.bytes,
            kind: found.kind.clone(),
            device: found.device,
            number: found.number,
            tracked: self.track.load(Relaxed),
            freed: AtomicBool::new(false),
            backing: Backing::Chunks(chunks),
        };
        let list = Arc::make_mut(&mut table.view.allocations);
        let at = list.partition_point(|a| a.base < address);
        list[at] = Arc::new(fresh);
        Ok(true)
    }

    /// Reserves addresses on `device` that [`Self::map`] may give memory, aligned to `align` (a
    /// power of two).
    pub fn reserve(&self, device: u32, bytes: u64, align: u64) -> u64 {
        let mut table = self.table.write().expect("no panic holds this lock");
        let next = &mut table.next[device as usize];
        let base = next.next_multiple_of(align.max(CHUNK_BYTES));
        *next = base + bytes.next_multiple_of(CHUNK_BYTES) + CHUNK_BYTES;
        base
    }

    /// Lets `bytes` from a reserved address on be the memory of `pieces`, in place of what was
    /// there.
    pub fn map(&self, device: u32, base: u64, bytes: u64, pieces: Vec<Piece>) {
        self.unmap(base, bytes);
        let mut table = self.table.write().expect("no panic holds this lock");
        table.count += 1;
        let number = table.count;
        table.insert(mapped(device, base, bytes, number, pieces));
    }

    /// Lets `bytes` from a reserved address on be a multicast range: behind it lies, by device, the
    /// memory of these pieces.
    pub fn map_multicast(&self, base: u64, bytes: u64, copies: Vec<(u32, Vec<Piece>)>) {
        self.unmap(base, bytes);
        let mut table = self.table.write().expect("no panic holds this lock");
        table.count += 1;
        let number = table.count;
        let copy = |(device, pieces)| mapped(device, base, bytes, number, pieces);
        let copies = copies.into_iter().map(copy).collect();
        Arc::make_mut(&mut table.view.multicasts).push(Multicast { base, bytes, copies });
    }

    /// Forgets what lies in a range: its addresses may get other memory.
    pub fn unmap(&self, base: u64, bytes: u64) {
        let mut table = self.table.write().expect("no panic holds this lock");
        let apart = |at: u64, length: u64| at >= base + bytes || base >= at + length;
        if table.view.multicasts.iter().any(|m| !apart(m.base(), m.bytes)) {
            Arc::make_mut(&mut table.view.multicasts).retain(|m| apart(m.base(), m.bytes));
        }
        let list = Arc::make_mut(&mut table.view.allocations);
        list.retain(|a| !(a.base < base + bytes && base < a.base + a.bytes));
    }

    /// Frees the allocation that starts at `address`. It stays known, so that later accesses are
    /// reported as use after free.
    ///
    /// # Errors
    /// [`MemoryError::NotAStart`].
    pub fn free(&self, address: u64) -> Result<(), MemoryError> {
        let mut table = self.table.write().expect("no panic holds this lock");
        let found = table.view.find(address).filter(|a| a.base == address && !a.is_freed());
        let Some(found) = found.cloned() else {
            let nearest = table.view.nearest(address);
            return Err(MemoryError::NotAStart { address, nearest });
        };
        if found.kind != AllocationKind::Host {
            table.used[found.device as usize] -= found.bytes;
        }
        found.freed.store(true, Relaxed);
        // The tombstone keeps range and name, not the bytes.
        let tombstone = Allocation {
            base: found.base,
            bytes: found.bytes,
            kind: found.kind.clone(),
            device: found.device,
            number: found.number,
            tracked: false,
            freed: AtomicBool::new(true),
            backing: Backing::Chunks(Vec::new()),
        };
        let list = Arc::make_mut(&mut table.view.allocations);
        let at = list.partition_point(|a| a.base < address);
        list[at] = Arc::new(tombstone);
        Ok(())
    }

    /// The allocations as they are now.
    pub fn view(&self) -> View {
        self.table.read().expect("no panic holds this lock").view.clone()
    }

    /// How many bytes a device has in use, and how many it has at most.
    pub fn usage(&self, device: u32) -> (u64, u64) {
        let table = self.table.read().expect("no panic holds this lock");
        (table.used[device as usize], table.limit[device as usize])
    }

    fn locate(&self, address: u64, bytes: u64) -> Result<Arc<Allocation>, MemoryError> {
        let view = self.view();
        view.locate(address, bytes).cloned().ok_or_else(|| MemoryError::Unmapped {
            address,
            bytes,
            nearest: view.nearest(address),
        })
    }

    /// Copies guest memory from `address` on to `out`; what nobody wrote reads as zero.
    ///
    /// # Errors
    /// [`MemoryError::Unmapped`] where the range is not inside one live allocation.
    pub fn read(&self, address: u64, out: &mut [u8]) -> Result<(), MemoryError> {
        if !out.is_empty() {
            let found = self.locate(address, out.len() as u64)?;
            found.load(address - found.base, out);
        }
        Ok(())
    }

    /// Copies `data` to guest memory from `address` on.
    ///
    /// # Errors
    /// As [`Self::read`].
    pub fn write(&self, address: u64, data: &[u8]) -> Result<(), MemoryError> {
        if !data.is_empty() {
            let found = self.locate(address, data.len() as u64)?;
            found.store(address - found.base, data);
        }
        Ok(())
    }

    /// Fills `count` elements with `pattern` (1, 2 or 4 bytes).
    ///
    /// # Errors
    /// As [`Self::read`].
    pub fn fill(&self, address: u64, pattern: &[u8], count: u64) -> Result<(), MemoryError> {
        let bytes = pattern.len() as u64 * count;
        if bytes == 0 {
            return Ok(());
        }
        let found = self.locate(address, bytes)?;
        let block = pattern.repeat((1 << 16) / pattern.len());
        let mut done = 0;
        while done < bytes {
            let n = (bytes - done).min(block.len() as u64);
            found.store(address - found.base + done, &block[..n as usize]);
            done += n;
        }
        Ok(())
    }

    /// Copies between (possibly overlapping) ranges.
    ///
    /// # Errors
    /// As [`Self::read`].
    pub fn copy(&self, to: u64, from: u64, bytes: u64) -> Result<(), MemoryError> {
        let mut buffer = vec![0; bytes as usize];
        self.read(from, &mut buffer)?;
        self.write(to, &buffer)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_come_back_across_words_and_chunks() {
        let memory = Memory::new(&[1 << 40]);
        let at = memory.alloc(0, 3 * CHUNK_BYTES + 5, 1, AllocationKind::Device).unwrap();
        let data: Vec<u8> = (0..=255).collect();
        for offset in [0, 1, 3, CHUNK_BYTES - 7, 2 * CHUNK_BYTES - 255, 3 * CHUNK_BYTES - 251] {
            memory.write(at + offset, &data).unwrap();
            let mut back = [0; 256];
            memory.read(at + offset, &mut back).unwrap();
            assert_eq!(back.as_slice(), data, "at {offset}");
        }
        assert!(memory.write(at + 3 * CHUNK_BYTES, &[0; 6]).is_err());
    }

    #[test]
    fn only_touched_chunks_are_committed() {
        let memory = Memory::new(&[1 << 40]);
        let at = memory.alloc(0, 64 << 30, 1, AllocationKind::Device).unwrap();
        memory.write(at + (40 << 30), &[7]).unwrap();
        let view = memory.view();
        let Backing::Chunks(chunks) = &view.find(at).unwrap().backing else { unreachable!() };
        assert_eq!(chunks.iter().filter(|c| c.get().is_some()).count(), 1);
    }

    #[test]
    fn freed_memory_is_remembered_and_its_bytes_are_given_back() {
        let memory = Memory::new(&[1000]);
        let at = memory.alloc(0, 1000, 1, AllocationKind::Device).unwrap();
        assert!(memory.alloc(0, 1, 1, AllocationKind::Device).is_err());
        memory.free(at).unwrap();
        assert!(memory.free(at).is_err());
        let error = memory.read(at, &mut [0]).unwrap_err().to_string();
        assert!(error.contains("freed"), "{error}");
        assert_ne!(memory.alloc(0, 1000, 1, AllocationKind::Device).unwrap(), at);
    }

    #[test]
    fn unwritten_bytes_are_found_where_tracked() {
        let memory = Memory::new(&[1 << 20]);
        memory.track_written(true);
        let at = memory.alloc(0, 100, 1, AllocationKind::Device).unwrap();
        memory.write(at + 10, &[1; 20]).unwrap();
        let a = memory.view().find(at).unwrap().clone();
        assert_eq!(a.first_unwritten(10, 20), None);
        assert_eq!(a.first_unwritten(10, 21), Some(30));
        assert_eq!(a.first_unwritten(9, 2), Some(9));
    }
}
