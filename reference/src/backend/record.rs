//! A wrapper around any backend that shows every op call to a hook: what record, op traces and the
//! search for the first non-finite tensor stand on.

use std::cell::Cell;
use std::ops::Range;

use fathom_trace::DType;

use super::{Backend, Place, Result};
use crate::{DynOp, Tensor};

/// One op call, after it was executed.
pub struct Call<'a, B: Backend> {
    /// The backend that executed it: download a buffer to see its elements.
    pub backend: &'a B,
    /// The op with its parameters.
    pub op: &'a dyn DynOp,
    /// Inputs, one entry a role.
    pub inputs: &'a [Option<B::Buffer>],
    /// Outputs, one a role.
    pub outputs: &'a [B::Buffer],
    /// Where in the step it stands.
    pub place: Place,
}

/// Executes on `inner` and calls `hook` after every op.
///
/// Inputs stay alive until the hook has seen them, so an op that would write in place copies.
pub struct Recorder<B, F> {
    inner: B,
    hook: F,
    place: Cell<Place>,
}

impl<B: Backend, F: Fn(&Call<'_, B>) -> Result<()>> Recorder<B, F> {
    /// Wraps `inner`; an error of `hook` becomes the op's.
    pub fn new(inner: B, hook: F) -> Recorder<B, F> {
        Recorder { inner, hook, place: Cell::default() }
    }

    /// The backend inside.
    pub fn inner(&self) -> &B {
        &self.inner
    }
}

impl<B: Backend, F: Fn(&Call<'_, B>) -> Result<()>> Backend for Recorder<B, F> {
    type Buffer = B::Buffer;

    fn name(&self) -> String {
        self.inner.name()
    }

    fn execute(&self, op: &dyn DynOp, inputs: Vec<Option<B::Buffer>>) -> Result<Vec<B::Buffer>> {
        let outputs = self.inner.execute(op, inputs.clone())?;
        (self.hook)(&Call {
            backend: &self.inner,
            op,
            inputs: &inputs,
            outputs: &outputs,
            place: self.place.get(),
        })?;
        Ok(outputs)
    }

    fn upload(&self, tensor: Tensor) -> Result<B::Buffer> {
        self.inner.upload(tensor)
    }

    fn download(&self, buffer: &B::Buffer) -> Result<Tensor> {
        self.inner.download(buffer)
    }

    fn zeros(&self, dtype: DType, shape: &[usize]) -> Result<B::Buffer> {
        self.inner.zeros(dtype, shape)
    }

    fn dtype(&self, buffer: &B::Buffer) -> DType {
        self.inner.dtype(buffer)
    }

    fn shape(&self, buffer: &B::Buffer) -> Vec<usize> {
        self.inner.shape(buffer)
    }

    fn at(&self, place: Place) {
        self.place.set(place);
        self.inner.at(place);
    }

    fn expert_counts(
        &self,
        counts: &B::Buffer,
        local: Range<usize>,
        slots: usize,
    ) -> Result<Vec<usize>> {
        self.inner.expert_counts(counts, local, slots)
    }
}
