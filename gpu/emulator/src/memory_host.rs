//! Host memory that kernels reach at its own address (pinned, managed and registered memory).

use std::sync::atomic::AtomicU32;

use crate::device::Device;

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
        assert!(
            (pointer as usize).is_multiple_of(4) && bytes.is_multiple_of(4),
            "host memory in whole words"
        );
        // SAFETY: valid and not otherwise referenced by the caller's promise, aligned as
        // asserted; AtomicU32 has the layout of u32.
        let words = unsafe { std::slice::from_raw_parts(pointer.cast::<AtomicU32>(), bytes / 4) };
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
