//! One host file per kernel: what it takes, how it is launched, and the op that it computes.
//!
//! To add a kernel: write its source in `gpu/kernels`, copy the host file of a neighbour, move its
//! op from [`WITHOUT_KERNEL`] to [`KERNELS`] and write the suite of its cases in
//! `conformance/src/conform`. A host file has two parts: the
//! launch over device memory, which the backend calls, and `run`, which takes a case of the op from
//! host to host and says which parameters the kernel does not cover.

pub mod gemm_fp8;
pub mod quantize_tile;

use fathom_reference::ops::gemm_fp8::GemmFp8;
use fathom_reference::ops::quantize_tile::QuantizeTile;
use fathom_reference::{Case, DynOp, Engine, EngineError, Op, Outputs, Tensor};

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
    KernelEntry { op: GemmFp8::NAME, run: gemm_fp8::run },
    KernelEntry { op: QuantizeTile::NAME, run: quantize_tile::run },
];

/// The ops that only the CPU computes so far, in alphabetical order.
pub const WITHOUT_KERNEL: &[&str] = &[
    "adamw",
    "add",
    "all_gather",
    "all_reduce",
    "attention",
    "attention_backward",
    "attention_cached",
    "attention_latent",
    "balance_loss",
    "cast",
    "clip_factor",
    "combine",
    "concat_columns",
    "concat_rows",
    "cross_entropy",
    "cross_entropy_backward",
    "dequantize",
    "dispatch",
    "dispatch_plan",
    "drop_tokens",
    "ema",
    "gather_rows",
    "gemm",
    "grouped_gemm",
    "grouped_gemm_fp8",
    "mla_absorb_query",
    "mla_absorb_value",
    "mla_kv",
    "mla_kv_backward",
    "mma",
    "quantize_block",
    "quantize_delayed",
    "quantize_weight",
    "recv",
    "reduce_scatter",
    "rms_norm",
    "rms_norm_backward",
    "rms_norm_wgrad",
    "rope",
    "router",
    "router_backward",
    "scatter_add_rows",
    "send",
    "slice_columns",
    "slice_rows",
    "sum_of_squares",
    "swiglu",
    "swiglu_backward",
    "transpose_quantize",
    "wgrad_fp8",
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

#[cfg(test)]
mod tests {
    use fathom_reference::op::op_names;

    use super::*;

    #[test]
    fn every_op_has_a_kernel_or_is_said_to_have_none() {
        let have: Vec<&str> = KERNELS.iter().map(|k| k.op).collect();
        assert!(have.is_sorted() && WITHOUT_KERNEL.is_sorted());
        for op in op_names() {
            match (have.contains(&op), WITHOUT_KERNEL.contains(&op)) {
                (false, false) => panic!(
                    "op {op} has no kernel: write gpu/src/kernels/{op}.rs and add it to KERNELS, \
                     or name it in WITHOUT_KERNEL"
                ),
                (true, true) => panic!("op {op} has a kernel: take it out of WITHOUT_KERNEL"),
                _ => {}
            }
        }
        let all = op_names();
        let unknown: Vec<_> = WITHOUT_KERNEL.iter().filter(|op| !all.contains(op)).collect();
        assert!(unknown.is_empty(), "WITHOUT_KERNEL names no op of the table: {unknown:?}");
    }
}
