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
}
