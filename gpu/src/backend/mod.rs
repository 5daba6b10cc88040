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
use crate::nccl::{self, Nccl};
use crate::peer;
use crate::tensor::DeviceTensor;

/// Our kernels on a GPU, or on the emulated one; clones share the device.
#[derive(Clone)]
pub struct Cuda {
    gpu: Arc<Gpu>,
    name: &'static str,
    reach: Reach,
}

/// By which a device reaches those of other ranks.
#[derive(Clone)]
enum Reach {
    /// What ranks exchange passes the host.
    Host,
    /// By NCCL's sends and receives.
    Nccl(Arc<Nccl>),
    /// By kernels of ours on peer memory, on so many SMs.
    Peer(usize),
}

impl Cuda {
    /// The backend on this device.
    pub fn new(gpu: impl Into<Arc<Gpu>>) -> Cuda {
        let gpu = gpu.into();
        let name = gpu.kind().name();
        Cuda { gpu, name, reach: Reach::Host }
    }

    /// The same, whose device reaches those of other ranks through NCCL.
    pub fn with_nccl(self, nccl: Arc<Nccl>) -> Cuda {
        Cuda { reach: Reach::Nccl(nccl), ..self }
    }

    /// The same, whose device reaches those of other ranks of this process by kernels of ours on at
    /// most `sms` SMs, over peer memory.
    pub fn with_peers(self, sms: usize) -> Cuda {
        Cuda { reach: Reach::Peer(sms), ..self }
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
        meet: &dyn Fn(Vec<u8>) -> Result<Vec<Vec<u8>>>,
    ) -> Result<Option<Rc<dyn Direct<DeviceTensor>>>> {
        let failed = |reason: String| {
            let (engine, op) = (self.name.to_owned(), "connect".to_owned());
            EngineError::Failed { engine, op, reason }
        };
        match &self.reach {
            Reach::Host => Ok(None),
            Reach::Nccl(nccl) => {
                let failed = |error: nccl::NcclError| failed(error.to_string());
                let own = if index == 0 { nccl.unique_id().map_err(failed)? } else { Vec::new() };
                let id = meet(own)?.swap_remove(0);
                let joined = nccl::Connection::join(nccl, &self.gpu, (index, size), &id);
                Ok(Some(Rc::new(joined.map_err(failed)?)))
            }
            Reach::Peer(sms) => {
                let failed = |error: peer::PeerError| failed(error.to_string());
                let mailbox = peer::Mailbox::new(&self.gpu, size).map_err(failed)?;
                let members = meet(mailbox.card())?;
                let joined = mailbox.connect((index, *sms), &members).map_err(failed)?;
                // Nobody sends before all have opened their memory.
                meet(Vec::new())?;
                Ok(Some(Rc::new(joined)))
            }
        }
    }
}
