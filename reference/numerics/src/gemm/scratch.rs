//! Cache-line aligned work buffers, one pool a thread, so that small GEMMs do not pay for fresh
//! pages.

use std::cell::RefCell;

/// One cache line; the unit in which buffers are allocated, so that panels start aligned.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Line([u8; 64]);

// SAFETY: an array of 64 bytes, without padding (size equals alignment), valid for all bit
// patterns.
unsafe impl bytemuck::Zeroable for Line {}
// SAFETY: as above; `Line` is Copy and 'static.
unsafe impl bytemuck::Pod for Line {}

thread_local! {
    static POOL: RefCell<Vec<Vec<Line>>> = const { RefCell::new(Vec::new()) };
}

/// A buffer on loan from the thread's pool; it returns there when dropped. Its content is whatever
/// the last user left.
pub(crate) struct Scratch(Vec<Line>);

impl Scratch {
    /// A buffer of at least `bytes` bytes.
    pub(crate) fn bytes(bytes: usize) -> Self {
        let mut lines = POOL.with_borrow_mut(Vec::pop).unwrap_or_default();
        let count = bytes.div_ceil(64);
        if lines.len() < count {
            lines.resize(count, Line([0; 64]));
        }
        Scratch(lines)
    }

    /// A buffer of at least `len` elements of `T`.
    pub(crate) fn of<T>(len: usize) -> Self {
        Self::bytes(len * size_of::<T>())
    }

    /// The first `len` elements, whatever they hold.
    pub(crate) fn slice<T: bytemuck::Pod>(&mut self, len: usize) -> &mut [T] {
        &mut bytemuck::cast_slice_mut(&mut self.0)[..len]
    }

    /// [`Scratch::slice`] to read.
    pub(crate) fn as_slice<T: bytemuck::Pod>(&self, len: usize) -> &[T] {
        &bytemuck::cast_slice(&self.0)[..len]
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let lines = std::mem::take(&mut self.0);
        // A thread that is being torn down has no pool any more: then the buffer is simply freed.
        let _ = POOL.try_with(|pool| pool.borrow_mut().push(lines));
    }
}
