//! Memory of this process that kernels reach: at its own address (pinned, managed and registered
//! memory), or mapped at addresses of a device.

use std::any::Any;
use std::sync::Arc;
use std::sync::atomic::AtomicU32;

use crate::device::Device;
use crate::memory::{CHUNK_BYTES, Piece};

impl Piece {
    /// Bytes of a piece, but for the last of an allocation, which may have fewer.
    pub const BYTES: u64 = CHUNK_BYTES;

    /// `bytes` of memory of this process in pieces; `owner` keeps them.
    ///
    /// # Safety
    /// The range stays valid for reads and writes while `owner` lives, and no Rust reference to it
    /// is used meanwhile.
    ///
    /// # Panics
    /// Where pointer or length are not multiples of 4.
    pub unsafe fn cut(
        pointer: *mut u8,
        bytes: usize,
        owner: &Arc<dyn Any + Send + Sync>,
    ) -> Vec<Piece> {
        // SAFETY: the caller's promise; pieces that are looked at keep the owner.
        let words = unsafe { words(pointer, bytes) };
        words
            .chunks((Self::BYTES / 4) as usize)
            .map(|words| Piece { words, _owner: owner.clone() })
            .collect()
    }
}

/// Memory of this process as words.
///
/// # Safety
/// The range stays valid for as long as the words are used.
///
/// # Panics
/// Where pointer or length are not multiples of 4.
unsafe fn words(pointer: *mut u8, bytes: usize) -> &'static [AtomicU32] {
    assert!(
        (pointer as usize).is_multiple_of(4) && bytes.is_multiple_of(4),
        "host memory in whole words"
    );
    // SAFETY: valid by the caller's promise, aligned as asserted; AtomicU32 has the layout of u32.
    unsafe { std::slice::from_raw_parts(pointer.cast::<AtomicU32>(), bytes / 4) }
}

impl Device {
    /// Makes `bytes` of memory of this process at `pointer` reachable by kernels, at that address.
    /// Undo it with [`Device::free`].
    ///
    /// # Safety
    /// The range must stay valid for reads and writes until it is freed here, and no Rust
    /// reference to it may be used while a launch runs.
    ///
    /// # Panics
    /// Where pointer or length are not multiples of 4.
    pub unsafe fn register_host(&self, pointer: *mut u8, bytes: usize) {
        // SAFETY: the caller's promise.
        let words = unsafe { words(pointer, bytes) };
        self.memory().insert_host(pointer as u64, bytes as u64, words);
    }

    /// A zeroed variable in memory of this process, which kernels reach at that address, for
    /// good.
    pub(crate) fn managed_variable(&self, bytes: u64, align: u64) -> u64 {
        // In units of 16 bytes, the largest alignment of a scalar or vector.
        let (units, align) = (bytes.div_ceil(16).max(1), align.max(16));
        let room = vec![0u128; (units + align / 16) as usize].leak();
        let start = room.as_mut_ptr() as u64;
        let at = start.next_multiple_of(align);
        // SAFETY: leaked memory, which nothing else refers to; aligned, and within the room.
        unsafe { self.register_host(at as *mut u8, units as usize * 16) };
        at
    }
}
