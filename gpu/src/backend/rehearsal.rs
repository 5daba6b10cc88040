//! Which kernels a run would load, before it begins: a backend whose ops do all that the host does
//! for them, on tensors without memory, and launch nothing.

use std::ops::Range;
use std::sync::Arc;

use fathom_reference::backend::{Backend, Load, Meta, MetaBuffer, Result};
use fathom_reference::{DynOp, Tensor};
use fathom_trace::DType;

use super::Cuda;
use crate::device::Gpu;
use crate::tensor::DeviceTensor;

/// Our kernels, of which only the names are asked; what is downloaded is zeros. A run on it asks
/// for the kernels of a run on the device that it was made from, which [`Gpu::uncompiled`] then
/// says.
pub struct Rehearsal {
    cuda: Cuda,
    /// Says how many rows experts get.
    meta: Meta,
}

impl Rehearsal {
    /// For runs on `gpu`, tokens spread evenly over experts.
    pub fn new(gpu: &Gpu) -> Rehearsal {
        Rehearsal { cuda: Cuda::new(gpu.rehearsing()), meta: Meta::new(0, Load::Balanced) }
    }

    /// The device that was rehearsed on.
    pub fn gpu(&self) -> &Arc<Gpu> {
        &self.cuda.gpu
    }
}

impl Backend for Rehearsal {
    type Buffer = DeviceTensor;

    fn name(&self) -> String {
        self.cuda.name()
    }

    fn execute(
        &self,
        op: &dyn DynOp,
        inputs: Vec<Option<DeviceTensor>>,
    ) -> Result<Vec<DeviceTensor>> {
        self.cuda.execute(op, inputs)
    }

    fn upload(&self, tensor: Tensor) -> Result<DeviceTensor> {
        self.cuda.upload(tensor)
    }

    fn download(&self, buffer: &DeviceTensor) -> Result<Tensor> {
        self.cuda.download(buffer)
    }

    fn zeros(&self, dtype: DType, shape: &[usize]) -> Result<DeviceTensor> {
        self.cuda.zeros(dtype, shape)
    }

    fn dtype(&self, buffer: &DeviceTensor) -> DType {
        buffer.dtype()
    }

    fn shape(&self, buffer: &DeviceTensor) -> Vec<usize> {
        buffer.shape().to_vec()
    }

    fn fuses(&self) -> bool {
        self.cuda.fuses()
    }

    fn expert_counts(
        &self,
        counts: &DeviceTensor,
        local: Range<usize>,
        slots: usize,
    ) -> Result<Vec<usize>> {
        let counts = MetaBuffer { dtype: counts.dtype(), shape: counts.shape().to_vec() };
        self.meta.expert_counts(&counts, local, slots)
    }
}
