//! The backend that the model runs on: every op by its kernel, on tensors in device memory.
//!
//! There is one stream, on which everything happens in the order in which it was asked for, and
//! nothing is computed on the CPU: an op or a variant without a kernel is refused. The host waits
//! for the device only where it reads something ([`Backend::download`]). [`Plan`] says before a run
//! what it would have to refuse, [`Rehearsal`] which kernels it would load.

mod plan;
mod rehearsal;

pub use plan::{Asked, Plan};
pub use rehearsal::Rehearsal;

use std::rc::Rc;
use std::sync::Arc;

use fathom_reference::backend::direct::Direct;
use fathom_reference::backend::{Backend, Result};
use fathom_reference::{DynOp, EngineError, Tensor};
use fathom_trace::DType;

use crate::device::{Gpu, GpuError};
use crate::kernels;
use crate::nccl::{Connection, Nccl, NcclError};
use crate::tensor::DeviceTensor;

/// Our kernels on a GPU, or on the emulated one; clones share the device.
#[derive(Clone)]
pub struct Cuda {
    gpu: Arc<Gpu>,
    name: &'static str,
    /// By which the device reaches those of other ranks.
    nccl: Option<Arc<Nccl>>,
}

impl Cuda {
    /// The backend on this device.
    pub fn new(gpu: impl Into<Arc<Gpu>>) -> Cuda {
        let gpu = gpu.into();
        let name = gpu.kind().name();
        Cuda { gpu, name, nccl: None }
    }

    /// The same, whose device reaches those of other ranks through NCCL.
    pub fn with_nccl(self, nccl: Arc<Nccl>) -> Cuda {
        Cuda { nccl: Some(nccl), ..self }
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

    fn connect(
        &self,
        (index, size): (usize, usize),
        from_first: &dyn Fn(Vec<u8>) -> Result<Vec<u8>>,
    ) -> Result<Option<Rc<dyn Direct<DeviceTensor>>>> {
        let Some(nccl) = &self.nccl else { return Ok(None) };
        let failed = |error: NcclError| {
            let (engine, op) = (self.name.to_owned(), "connect".to_owned());
            EngineError::Failed { engine, op, reason: error.to_string() }
        };
        let own = if index == 0 { nccl.unique_id().map_err(failed)? } else { Vec::new() };
        let id = from_first(own)?;
        let joined = Connection::join(nccl, &self.gpu, (index, size), &id).map_err(failed)?;
        Ok(Some(Rc::new(joined)))
    }
}
