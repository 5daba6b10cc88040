//! A wrapper around any backend that counts the bytes of the buffers that are alive.
//!
//! What a training step holds follows from which handles are alive at each moment, so it can be
//! counted on [`Meta`](super::Meta), which computes nothing, as well as on
//! [`Reference`](super::Reference).

use std::cell::Cell;
use std::ops::Range;
use std::rc::Rc;

use fathom_trace::{DType, Group};

use super::{Backend, Place, Result};
use crate::{DynOp, Tensor};

/// Bytes of all buffers that are alive now, and the most that ever were at once.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Alive {
    /// Bytes alive at this moment.
    pub bytes: u64,
    /// Most bytes alive at once since the ledger began, or since [`Ledger::reset_peak`].
    pub peak: u64,
}

/// Counts the buffers of `inner`; handles to one buffer count once.
#[derive(Debug, Default)]
pub struct Ledger<B> {
    inner: B,
    alive: Rc<Cell<Alive>>,
}

/// A buffer of the backend inside, and its entry in the ledger.
#[derive(Clone, Debug)]
pub struct Counted<T> {
    inner: T,
    _entry: Rc<Entry>,
}

#[derive(Debug)]
struct Entry {
    bytes: u64,
    alive: Rc<Cell<Alive>>,
}

impl Drop for Entry {
    fn drop(&mut self) {
        let alive = self.alive.get();
        self.alive.set(Alive { bytes: alive.bytes - self.bytes, ..alive });
    }
}

impl<B: Backend> Ledger<B> {
    /// Wraps `inner`; buffers that `inner` made before are not counted.
    pub fn new(inner: B) -> Ledger<B> {
        Ledger { inner, alive: Rc::default() }
    }

    /// Bytes alive at this moment, and their peak.
    pub fn alive(&self) -> Alive {
        self.alive.get()
    }

    /// Forgets the peak: it begins again at what is alive.
    pub fn reset_peak(&self) {
        let Alive { bytes, .. } = self.alive.get();
        self.alive.set(Alive { bytes, peak: bytes });
    }

    fn count(&self, inner: B::Buffer) -> Counted<B::Buffer> {
        let elements: usize = self.inner.shape(&inner).iter().product();
        let bytes = (elements * self.inner.dtype(&inner).size()) as u64;
        let Alive { bytes: before, peak } = self.alive.get();
        let now = before + bytes;
        self.alive.set(Alive { bytes: now, peak: peak.max(now) });
        Counted { inner, _entry: Rc::new(Entry { bytes, alive: self.alive.clone() }) }
    }
}

impl<B: Backend> Backend for Ledger<B> {
    type Buffer = Counted<B::Buffer>;

    fn name(&self) -> String {
        self.inner.name()
    }

    fn execute(
        &self,
        op: &dyn DynOp,
        inputs: Vec<Option<Self::Buffer>>,
    ) -> Result<Vec<Self::Buffer>> {
        // What the caller gave away is gone before the outputs come: it may be written in place.
        let inputs = inputs.into_iter().map(|b| b.map(|b| b.inner)).collect();
        let outputs = self.inner.execute(op, inputs)?;
        Ok(outputs.into_iter().map(|b| self.count(b)).collect())
    }

    fn fuses(&self) -> bool {
        self.inner.fuses()
    }

    fn upload(&self, tensor: Tensor) -> Result<Self::Buffer> {
        Ok(self.count(self.inner.upload(tensor)?))
    }

    fn download(&self, buffer: &Self::Buffer) -> Result<Tensor> {
        self.inner.download(&buffer.inner)
    }

    fn zeros(&self, dtype: DType, shape: &[usize]) -> Result<Self::Buffer> {
        Ok(self.count(self.inner.zeros(dtype, shape)?))
    }

    fn dtype(&self, buffer: &Self::Buffer) -> DType {
        self.inner.dtype(&buffer.inner)
    }

    fn shape(&self, buffer: &Self::Buffer) -> Vec<usize> {
        self.inner.shape(&buffer.inner)
    }

    fn at(&self, place: Place) {
        self.inner.at(place);
    }

    fn expert_counts(
        &self,
        counts: &Self::Buffer,
        local: Range<usize>,
        slots: usize,
    ) -> Result<Vec<usize>> {
        self.inner.expert_counts(&counts.inner, local, slots)
    }

    fn group_counts(&self, counts: &Self::Buffer, group: Group) -> Result<Option<Vec<Vec<usize>>>> {
        self.inner.group_counts(&counts.inner, group)
    }
}

#[cfg(test)]
mod tests {
    use super::super::Reference;
    use super::*;
    use crate::ops::add::Add;

    #[test]
    fn handles_to_one_buffer_count_once_and_dropped_buffers_not_at_all() {
        let ledger = Ledger::new(Reference);
        let a = ledger.zeros(DType::F32, &[4, 4]).unwrap();
        let b = a.clone();
        assert_eq!(ledger.alive(), Alive { bytes: 64, peak: 64 });
        let c = ledger.add(&Add { out: DType::BF16 }, &a, &b, None).unwrap();
        drop((a, b));
        assert_eq!(ledger.alive(), Alive { bytes: 32, peak: 96 });
        ledger.reset_peak();
        drop(c);
        assert_eq!(ledger.alive(), Alive { bytes: 0, peak: 32 });
    }
}
