//! The backend that the model runs on: every op by its kernel, on tensors in device memory.
//!
//! There is one stream, on which everything happens in the order in which it was asked for, and
//! nothing is computed on the CPU: an op or a variant without a kernel is refused. The host waits
//! for the device only where it reads something ([`Backend::download`]). [`Plan`] says before a run
//! what it would have to refuse.

mod plan;

pub use plan::{Asked, Plan};

use std::sync::Arc;

use fathom_reference::backend::{Backend, Result};
use fathom_reference::{DynOp, Tensor};
use fathom_trace::DType;

use crate::device::{Gpu, GpuError};
use crate::kernels;
use crate::tensor::DeviceTensor;

/// Our kernels on a GPU, or on the emulated one; clones share the device.
#[derive(Clone)]
pub struct Cuda {
    gpu: Arc<Gpu>,
    name: &'static str,
}

impl Cuda {
    /// The backend on this device.
    pub fn new(gpu: impl Into<Arc<Gpu>>) -> Cuda {
        let gpu = gpu.into();
        let name = gpu.kind().name();
        Cuda { gpu, name }
    }

    /// The device on which it runs its ops.
    pub fn gpu(&self) -> &Gpu {
        &self.gpu
    }

    /// Runs `call` with its allocations booked under `purpose`.
    fn on_device<T>(
        &self,
        purpose: &'static str,
        call: impl FnOnce(&Gpu) -> Result<T, GpuError>,
    ) -> Result<T> {
        self.gpu.purpose(purpose, "");
        call(&self.gpu).map_err(|error| kernels::failed(self.name, purpose, &error))
    }
}

impl Backend for Cuda {
    type Buffer = DeviceTensor;

    fn name(&self) -> String {
        self.name.to_owned()
    }

    fn execute(
        &self,
        op: &dyn DynOp,
        inputs: Vec<Option<DeviceTensor>>,
    ) -> Result<Vec<DeviceTensor>> {
        kernels::execute(&self.gpu, self.name, op, inputs)
    }

    fn upload(&self, tensor: Tensor) -> Result<DeviceTensor> {
        self.on_device("upload", |gpu| gpu.upload(&tensor))
    }

    fn download(&self, buffer: &DeviceTensor) -> Result<Tensor> {
        self.on_device("download", |gpu| gpu.download(buffer))
    }

    fn zeros(&self, dtype: DType, shape: &[usize]) -> Result<DeviceTensor> {
        self.on_device("zeros", |gpu| gpu.zeros(dtype, shape))
    }

    fn dtype(&self, buffer: &DeviceTensor) -> DType {
        buffer.dtype()
    }

    fn shape(&self, buffer: &DeviceTensor) -> Vec<usize> {
        buffer.shape().to_vec()
    }

    fn fuses(&self) -> bool {
        true
    }
}
