//! What a backend offers whose devices reach those of other ranks without the host.

use std::ops::Range;

use fathom_trace::DType;

use super::Result;

/// Elements of a buffer that go to a member of the group.
pub struct Sent<T> {
    /// The member, from 0.
    pub to: usize,
    /// The buffer that has them.
    pub buffer: T,
    /// Which of its elements, counted in row-major order.
    pub elements: Range<usize>,
}

/// Elements that come from a member of the group.
pub struct Received {
    /// The member, from 0.
    pub from: usize,
    /// Which of the new buffers they are of.
    pub buffer: usize,
    /// Which of its elements, counted in row-major order.
    pub elements: Range<usize>,
}

/// What a rank gives and gets at once. Between two members the k-th range that one sends is the
/// k-th that the other receives, and has as many bytes; what one transfer sends to a member, one
/// transfer of that member receives.
pub struct Transfer<T> {
    /// What goes out.
    pub sent: Vec<Sent<T>>,
    /// Element types and shapes of the new buffers, which `received` fills.
    pub room: Vec<(DType, Vec<usize>)>,
    /// What comes in.
    pub received: Vec<Received>,
}

/// The end of a transfer: what is computed on the device from then on finds the new buffers full.
pub type Landing<T> = Box<dyn FnOnce() -> Result<Vec<T>>>;

/// A connection between the devices of a group's ranks.
pub trait Direct<T> {
    /// Begins a transfer. Neither the host nor what the device computes waits for it.
    ///
    /// # Errors
    /// [`crate::EngineError::Failed`].
    fn begin(&self, transfer: Transfer<T>) -> Result<Landing<T>>;

    /// This rank has failed, or another has: transfers that were begun may never end, and nothing
    /// is to wait for them.
    fn give_up(&self) {}
}
