//! One allocation: its words, and which of its bytes somebody wrote.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering::Relaxed};
use std::sync::{Arc, OnceLock};

/// Bytes of a chunk, which is committed when it is first written.
pub(crate) const CHUNK_BYTES: u64 = 2 << 20;

/// What an allocation is for; the reports name it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum AllocationKind {
    /// `cuMemAlloc` and its kin.
    Device,
    /// A `.global` or `.const` variable of a module.
    Variable(String),
    /// Memory of the host process, at its host address.
    Host,
}

/// 2 MiB of an allocation.
pub(super) struct Chunk {
    words: Box<[AtomicU32]>,
    /// One bit a byte, set where somebody wrote; present where tracking is on.
    written: Option<Box<[AtomicU32]>>,
}

/// Where the bytes of an allocation are.
pub(super) enum Backing {
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
    pub(super) base: u64,
    pub(super) bytes: u64,
    pub(super) kind: AllocationKind,
    pub(super) device: u32,
    pub(super) number: u64,
    pub(super) tracked: bool,
    pub(super) freed: AtomicBool,
    pub(super) backing: Backing,
}

impl std::fmt::Debug for Allocation {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.describe())
    }
}

impl Allocation {
    /// Address of its first byte.
    pub fn base(&self) -> u64 {
        self.base
    }

    /// Length in bytes.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Whether it is memory of a device, a module's variable or the host's.
    pub fn kind(&self) -> &AllocationKind {
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

    /// What it is in a few words, for reports: kind, length, address, and whether it was freed.
    pub fn describe(&self) -> String {
        let what = match &self.kind {
            AllocationKind::Device => format!("allocation {}", self.number),
            AllocationKind::Variable(name) => format!("variable {name}"),
            AllocationKind::Host => "host memory".into(),
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

    /// The piece that holds `offset`, where it is made of pieces.
    pub(super) fn piece_at(&self, offset: u64) -> Option<&Piece> {
        match &self.backing {
            Backing::Pieces(pieces) => pieces.get((offset / CHUNK_BYTES) as usize),
            _ => None,
        }
    }

    /// Where the memory of a piece begins in it.
    pub(super) fn piece_of(&self, wanted: &Piece) -> Option<u64> {
        let Backing::Pieces(pieces) = &self.backing else { return None };
        let same = |piece: &Piece| std::ptr::eq(piece.words, wanted.words);
        pieces.iter().position(same).map(|index| index as u64 * CHUNK_BYTES)
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
