//! One host file per kernel: what it takes, how it is launched, and the op that it computes.
//!
//! To add a kernel: write its source in `gpu/kernels`, copy the host file of a neighbour, add it to
//! [`KERNELS`] and its cases to the suites of `fathom-conformance`. A host file has two parts: the
//! launch over device memory, which the backend calls, and `run`, which takes a case of the op from
//! host to host and says which parameters the kernel does not cover.

pub mod gemm_fp8;
pub mod quantize_tile;

use fathom_reference::{Case, DynOp, Engine, EngineError, Outputs, Tensor};

use crate::device::{Gpu, GpuError};

/// Why a kernel gives no outputs for a case.
#[derive(Debug)]
pub enum RunError {
    /// The kernel does not compute this variant of the op: the parameter and what it takes.
    Unsupported(String),
    /// Compiling, launching or waiting failed.
    Gpu(GpuError),
}

impl From<GpuError> for RunError {
    fn from(error: GpuError) -> RunError {
        RunError::Gpu(error)
    }
}

/// An op from host to host: the op with its parameters, the inputs in the order of its roles.
type Run = fn(&Gpu, &dyn DynOp, &[Option<Tensor>]) -> Result<Vec<Tensor>, RunError>;

/// A row of [`KERNELS`].
pub struct KernelEntry {
    /// The op's name in the table of ops.
    pub op: &'static str,
    run: Run,
}

/// The ops that have a kernel, in alphabetical order.
pub const KERNELS: &[KernelEntry] = &[
    KernelEntry { op: "gemm_fp8", run: gemm_fp8::run },
    KernelEntry { op: "quantize_tile", run: quantize_tile::run },
];

/// The kernels as an engine: what `check`, `conform` and `diagnose` stand on.
pub struct CudaEngine {
    gpu: Gpu,
}

impl CudaEngine {
    /// The kernels on this device.
    pub fn new(gpu: Gpu) -> CudaEngine {
        CudaEngine { gpu }
    }

    /// The device.
    pub fn gpu(&self) -> &Gpu {
        &self.gpu
    }
}

impl Engine for CudaEngine {
    fn name(&self) -> String {
        format!("{} ({})", self.gpu.kind().name(), self.gpu.description().name)
    }

    fn run(&self, case: &Case) -> Result<Outputs, EngineError> {
        case.infer()?;
        let unsupported = |reason: String| EngineError::Unsupported {
            engine: self.name(),
            op: case.op.name().to_owned(),
            reason,
        };
        let entry = KERNELS.iter().find(|k| k.op == case.op.name()).ok_or_else(|| {
            let known: Vec<_> = KERNELS.iter().map(|k| k.op).collect();
            unsupported(format!("there is no kernel for it, only for {}", known.join(", ")))
        })?;
        let inputs = case.ordered_inputs()?;
        let outputs = (entry.run)(&self.gpu, case.op.as_ref(), &inputs).map_err(|e| match e {
            RunError::Unsupported(reason) => unsupported(reason),
            RunError::Gpu(error) => EngineError::Failed {
                engine: self.name(),
                op: case.op.name().to_owned(),
                reason: error.to_string(),
            },
        })?;
        Ok(case.op.outputs().iter().map(|r| (*r).to_owned()).zip(outputs).collect())
    }
}
