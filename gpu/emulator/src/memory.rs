//! Global memory: allocations of all devices in one address space, committed where touched.
//!
//! An allocation is a list of 2 MiB chunks that come into being when they are first written.
//! The unit of access is a relaxed atomic 32-bit word: CTAs that run on several host threads may
//! race in the guest, never in Rust. Addresses are not reused, so that a stale pointer is
//! recognised. Where else: shared and local memory live in their CTA and warp (`crate::machine`).

use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering::Relaxed};
use std::sync::{Arc, OnceLock, RwLock};

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

pub(crate) const CHUNK_BYTES: u64 = 2 << 20;

/// What an allocation is for; the reports name it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Kind {
    /// `cuMemAlloc` and its kin.
    Device,
    /// A `.global` or `.const` variable of a module.
    Variable(String),
    /// Memory of the host process, at its host address.
    Host,
}

struct Chunk {
    words: Box<[AtomicU32]>,
    /// One bit a byte, set where somebody wrote; present where tracking is on.
    written: Option<Box<[AtomicU32]>>,
}

enum Backing {
    Chunks(Vec<OnceLock<Chunk>>),
    Host(&'static [AtomicU32]),
    /// Memory that somebody else owns, in pieces of a chunk each but for the last.
    Pieces(Vec<Piece>),
}

/// A chunk of memory that allocations share: mapped at several addresses, or by several processes.
#[derive(Clone)]
pub struct Piece {
    pub(crate) words: &'static [AtomicU32],
    /// Keeps the memory for as long as somebody may look at it.
    pub(crate) _owner: Arc<dyn std::any::Any + Send + Sync>,
}

/// One allocation. All offsets are bytes from its base.
pub struct Allocation {
    base: u64,
    bytes: u64,
    kind: Kind,
    device: u32,
    number: u64,
    tracked: bool,
    freed: AtomicBool,
    backing: Backing,
}

impl std::fmt::Debug for Allocation {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.describe())
    }
}

impl Allocation {
    /// First address.
    pub fn base(&self) -> u64 {
        self.base
    }

    /// Length in bytes.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// What it is for.
    pub fn kind(&self) -> &Kind {
        &self.kind
    }

    /// Index of the device that owns it.
    pub fn device(&self) -> u32 {
        self.device
    }

    /// Whether it was freed.
    pub fn is_freed(&self) -> bool {
        self.freed.load(Relaxed)
    }

    /// A sentence for reports.
    pub fn describe(&self) -> String {
        let what = match &self.kind {
            Kind::Device => format!("allocation {}", self.number),
            Kind::Variable(name) => format!("variable {name}"),
            Kind::Host => "host memory".into(),
        };
        let freed = if self.is_freed() { ", freed" } else { "" };
        format!("{what} of {} bytes at {:#x}{freed}", self.bytes, self.base)
    }

    fn chunk(&self, index: usize) -> Option<&Chunk> {
        match &self.backing {
            Backing::Chunks(chunks) => chunks[index].get(),
            Backing::Host(_) | Backing::Pieces(_) => None,
        }
    }

    fn chunk_mut(&self, index: usize) -> &Chunk {
        let Backing::Chunks(chunks) = &self.backing else { unreachable!("host memory") };
        chunks[index].get_or_init(|| {
            let bytes = (self.bytes - index as u64 * CHUNK_BYTES).min(CHUNK_BYTES) as usize;
            let words = bytemuck::allocation::zeroed_slice_box(bytes.div_ceil(4));
            let written =
                self.tracked.then(|| bytemuck::allocation::zeroed_slice_box(bytes.div_ceil(32)));
            Chunk { words, written }
        })
    }

    /// The committed words that hold `offset`, and the offset of the first of them; `None` where
    /// nothing is committed yet (it reads as zero).
    pub(crate) fn words(&self, offset: u64) -> Option<(&[AtomicU32], u64)> {
        match &self.backing {
            Backing::Host(words) => Some((words, 0)),
            Backing::Pieces(pieces) => Some(piece(pieces, offset)),
            Backing::Chunks(_) => {
                let index = (offset / CHUNK_BYTES) as usize;
                Some((&self.chunk(index)?.words, index as u64 * CHUNK_BYTES))
            }
        }
    }

    /// Like [`Self::words`], committing them.
    pub(crate) fn words_mut(&self, offset: u64) -> (&[AtomicU32], u64) {
        match &self.backing {
            Backing::Host(words) => (words, 0),
            Backing::Pieces(pieces) => piece(pieces, offset),
            Backing::Chunks(_) => {
                let index = (offset / CHUNK_BYTES) as usize;
                (&self.chunk_mut(index).words, index as u64 * CHUNK_BYTES)
            }
        }
    }

    /// The aligned word at `offset`.
    pub(crate) fn word(&self, offset: u64) -> u32 {
        match self.words(offset) {
            Some((words, start)) => words[((offset - start) / 4) as usize].load(Relaxed),
            None => 0,
        }
    }

    /// Overwrites the bits of `mask` in the aligned word at `offset`.
    pub(crate) fn set_word(&self, offset: u64, value: u32, mask: u32) {
        let (words, start) = self.words_mut(offset);
        let word = &words[((offset - start) / 4) as usize];
        if mask == !0 {
            word.store(value, Relaxed);
        } else {
            let merge = |old: u32| Some(old & !mask | value & mask);
            word.fetch_update(Relaxed, Relaxed, merge).expect("always Some");
        }
    }

    /// Copies bytes out, from `offset` on.
    pub(crate) fn load(&self, offset: u64, out: &mut [u8]) {
        let (head, words) = whole_words(offset, out.len());
        if words < out.len() {
            self.load_bytes(offset, &mut out[..head]);
            self.load_bytes(offset + (head + words) as u64, &mut out[head + words..]);
        }
        let (mut at, mut out) = (offset + head as u64, &mut out[head..head + words]);
        while !out.is_empty() {
            let left = (CHUNK_BYTES - at % CHUNK_BYTES) as usize;
            let (part, rest) = out.split_at_mut(left.min(out.len()));
            match self.words(at) {
                None => part.fill(0),
                Some((from, start)) => {
                    let from = &from[((at - start) / 4) as usize..];
                    for (to, word) in part.as_chunks_mut::<4>().0.iter_mut().zip(from) {
                        *to = word.load(Relaxed).to_le_bytes();
                    }
                }
            }
            at += part.len() as u64;
            out = rest;
        }
    }

    /// The words of a range, as far as they are committed and follow one another.
    pub(crate) fn range(&self, offset: u64, bytes: u64) -> &[AtomicU32] {
        if offset >= self.bytes {
            return &[];
        }
        let Some((words, start)) = self.words(offset) else { return &[] };
        let from = ((offset - start) / 4) as usize;
        &words[from..(from + (bytes / 4) as usize).min(words.len())]
    }

    fn load_bytes(&self, offset: u64, out: &mut [u8]) {
        self.for_words(offset, out.len() as u64, |at, range, shift| {
            let word = self.word(at).to_le_bytes();
            let n = range.len();
            out[range].copy_from_slice(&word[shift..shift + n]);
        });
    }

    /// Copies bytes in, from `offset` on, and marks them written.
    pub(crate) fn store(&self, offset: u64, data: &[u8]) {
        let (head, words) = whole_words(offset, data.len());
        if words < data.len() {
            self.store_bytes(offset, &data[..head]);
            self.store_bytes(offset + (head + words) as u64, &data[head + words..]);
        }
        let (mut at, mut left) = (offset + head as u64, &data[head..head + words]);
        while !left.is_empty() {
            let room = (CHUNK_BYTES - at % CHUNK_BYTES) as usize;
            let (part, rest) = left.split_at(room.min(left.len()));
            let (to, start) = self.words_mut(at);
            let to = &to[((at - start) / 4) as usize..];
            for (from, word) in part.as_chunks::<4>().0.iter().zip(to) {
                word.store(u32::from_le_bytes(*from), Relaxed);
            }
            at += part.len() as u64;
            left = rest;
        }
        self.mark_written(offset, data.len() as u64);
    }

    fn store_bytes(&self, offset: u64, data: &[u8]) {
        self.for_words(offset, data.len() as u64, |at, range, shift| {
            let mut bytes = [0; 4];
            let n = range.len();
            bytes[shift..shift + n].copy_from_slice(&data[range]);
            let mask = if n == 4 { !0 } else { ((1u32 << (8 * n)) - 1) << (8 * shift) };
            self.set_word(at, u32::from_le_bytes(bytes), mask);
        });
    }

    /// Calls `f(word offset, range of the buffer, first byte in the word)` for every word touched.
    fn for_words(&self, offset: u64, bytes: u64, mut f: impl FnMut(u64, Range<usize>, usize)) {
        let end = offset + bytes;
        let mut at = offset;
        while at < end {
            let word = at & !3;
            let next = (word + 4).min(end);
            f(word, (at - offset) as usize..(next - offset) as usize, (at - word) as usize);
            at = next;
        }
    }

    /// Whether uninitialised reads of this allocation are recognised.
    pub(crate) fn tracked(&self) -> bool {
        self.tracked
    }

    /// Marks bytes as written, where that is tracked.
    pub(crate) fn mark_written(&self, offset: u64, bytes: u64) {
        if !self.tracked {
            return;
        }
        for at in offset..offset + bytes {
            let index = at / CHUNK_BYTES;
            let bit = at - index * CHUNK_BYTES;
            let written = self.chunk_mut(index as usize).written.as_ref().expect("tracked");
            written[(bit / 32) as usize].fetch_or(1 << (bit % 32), Relaxed);
        }
    }

    /// First byte of the range that nobody wrote, where that is tracked.
    pub(crate) fn first_unwritten(&self, offset: u64, bytes: u64) -> Option<u64> {
        if !self.tracked {
            return None;
        }
        (offset..offset + bytes).find(|&at| {
            let index = at / CHUNK_BYTES;
            let bit = at - index * CHUNK_BYTES;
            let word = self.chunk(index as usize).map_or(0, |c| {
                c.written.as_ref().expect("tracked")[(bit / 32) as usize].load(Relaxed)
            });
            word >> (bit % 32) & 1 == 0
        })
    }
}

/// The piece that holds `offset`, and the offset of its first word.
fn piece(pieces: &[Piece], offset: u64) -> (&[AtomicU32], u64) {
    let index = (offset / CHUNK_BYTES) as usize;
    (pieces[index].words, index as u64 * CHUNK_BYTES)
}

/// Bytes of a range before its first aligned word, and bytes of its whole words.
fn whole_words(offset: u64, bytes: usize) -> (usize, usize) {
    let head = (offset.next_multiple_of(4) - offset) as usize;
    if head > bytes { (bytes, 0) } else { (head, (bytes - head) & !3) }
}

/// The allocations that a launch sees, sorted by address, freed ones included.
#[derive(Clone, Debug, Default)]
pub struct View {
    allocations: Arc<Vec<Arc<Allocation>>>,
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

    /// A sentence about what lies at or beside `address`.
    pub fn nearest(&self, address: u64) -> String {
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
        kind: Kind,
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
            tracked: self.track.load(Relaxed) && !matches!(kind, Kind::Variable(_)),
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
            kind: Kind::Host,
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
        table.insert(Arc::new(Allocation {
            base,
            bytes,
            kind: Kind::Device,
            device,
            number,
            tracked: false,
            freed: AtomicBool::new(false),
            backing: Backing::Pieces(pieces),
        }));
    }

    /// Forgets what lies in a range: its addresses may get other memory.
    pub fn unmap(&self, base: u64, bytes: u64) {
        let mut table = self.table.write().expect("no panic holds this lock");
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
        if found.kind != Kind::Host {
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

    /// Bytes in use and capacity of a device.
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

    /// Reads bytes.
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

    /// Writes bytes.
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
        let at = memory.alloc(0, 3 * CHUNK_BYTES + 5, 1, Kind::Device).unwrap();
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
        let at = memory.alloc(0, 64 << 30, 1, Kind::Device).unwrap();
        memory.write(at + (40 << 30), &[7]).unwrap();
        let view = memory.view();
        let Backing::Chunks(chunks) = &view.find(at).unwrap().backing else { unreachable!() };
        assert_eq!(chunks.iter().filter(|c| c.get().is_some()).count(), 1);
    }

    #[test]
    fn freed_memory_is_remembered_and_its_bytes_are_given_back() {
        let memory = Memory::new(&[1000]);
        let at = memory.alloc(0, 1000, 1, Kind::Device).unwrap();
        assert!(memory.alloc(0, 1, 1, Kind::Device).is_err());
        memory.free(at).unwrap();
        assert!(memory.free(at).is_err());
        let error = memory.read(at, &mut [0]).unwrap_err().to_string();
        assert!(error.contains("freed"), "{error}");
        assert_ne!(memory.alloc(0, 1000, 1, Kind::Device).unwrap(), at);
    }

    #[test]
    fn unwritten_bytes_are_found_where_tracked() {
        let memory = Memory::new(&[1 << 20]);
        memory.track_written(true);
        let at = memory.alloc(0, 100, 1, Kind::Device).unwrap();
        memory.write(at + 10, &[1; 20]).unwrap();
        let a = memory.view().find(at).unwrap().clone();
        assert_eq!(a.first_unwritten(10, 20), None);
        assert_eq!(a.first_unwritten(10, 21), Some(30));
        assert_eq!(a.first_unwritten(9, 2), Some(9));
    }
}
