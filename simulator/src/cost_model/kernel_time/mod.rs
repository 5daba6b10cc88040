//! Kernel time from first principles: tiles, waves, tensor-core rate, bytes, launches.
//!
//! [`KernelModel`] is a GPU under given circumstances (SMs available, communication beside it,
//! wishes granted); it times a [`Work`], which an op record says it is. [`Constants`] lists what
//! was fitted, and on what.

mod attention;
mod constants;
mod gemm;
mod measured;
mod record;
mod table;
mod work;

use serde::{Deserialize, Serialize};

use crate::config::WhatIf;
use fathom_config::Gpu;

pub use attention::AttentionShape;
pub use constants::Constants;
pub use gemm::{GemmKind, GemmShape, GemmTime, GroupedBy};
pub use measured::{KernelTimes, MeasuredKernel};
pub use table::GemmTable;
pub use work::Work;

/// How a memory-bound kernel touches memory; decides which share of the bandwidth it reaches.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MemoryClass {
    /// Copies, element-wise kernels, transposes, permutations.
    Stream,
    /// Casts with block scales, SwiGLU.
    Convert,
    /// Norms, RoPE, odd formats.
    Row,
}

/// A GPU under given circumstances.
#[derive(Debug, Clone)]
pub struct KernelModel {
    /// The GPU's data sheet.
    pub gpu: Gpu,
    /// The fitted constants.
    pub constants: Constants,
    /// SMs that the kernels may use.
    pub sms: u64,
    /// Whether communication kernels run beside, and slow these down.
    pub contended: bool,
    /// FP8 partial sums need no promotion: the tensor core takes the scales.
    pub no_promotion: bool,
}

impl KernelModel {
    /// The GPU with nothing beside, and the communication's SMs left to it: the partition is fixed
    /// for a run, as the grids of the profiled kernels are.
    pub fn partitioned(
        gpu: &Gpu,
        constants: Constants,
        what_if: &WhatIf,
        comm_sms: u64,
    ) -> KernelModel {
        let beside = KernelModel::beside_communication(gpu, constants, what_if, comm_sms);
        KernelModel { contended: false, ..beside }
    }

    /// The whole GPU, with nothing beside.
    pub fn alone(gpu: &Gpu, constants: Constants, what_if: &WhatIf) -> KernelModel {
        let mut gpu = gpu.clone();
        // What tensor cores sustain is measured under the whole TDP.
        let clock = gpu.power_clock_factor();
        gpu.clock_hz *= clock;
        gpu.bf16_achievable *= clock;
        gpu.fp8_achievable *= clock;
        gpu.fp4_achievable *= clock;
        KernelModel {
            sms: gpu.sms,
            gpu,
            constants,
            contended: false,
            no_promotion: what_if.scaling_in_tensor_core,
        }
    }

    /// The GPU while communication kernels hold `comm_sms`; with communication off the SMs, all of
    /// them compute.
    pub fn beside_communication(
        gpu: &Gpu,
        constants: Constants,
        what_if: &WhatIf,
        comm_sms: u64,
    ) -> KernelModel {
        let held = if what_if.comm_off_sms { 0 } else { comm_sms.min(gpu.sms - 1) };
        KernelModel {
            sms: gpu.sms - held,
            contended: true,
            ..KernelModel::alone(gpu, constants, what_if)
        }
    }

    /// Factor of the time while communication runs beside.
    pub(crate) fn slowdown(&self) -> f64 {
        if self.contended { self.constants.contention } else { 1.0 }
    }

    /// Bytes/s that streaming kernels reach on the SMs at hand.
    pub(crate) fn stream_bytes_per_s(&self) -> f64 {
        self.gpu.memory_bytes_per_s * self.constants.stream_efficiency
    }

    /// Seconds of a memory-bound kernel that moves `bytes` (reads and writes) on at most `max_sms`
    /// SMs.
    pub fn memory(&self, bytes: f64, class: MemoryClass, max_sms: Option<u64>) -> f64 {
        let c = &self.constants;
        let efficiency = match class {
            MemoryClass::Stream => c.stream_efficiency,
            MemoryClass::Convert => c.convert_efficiency,
            MemoryClass::Row => c.row_efficiency,
        };
        // Kernels that compute on the way are bound by the SMs, those that stream by the memory.
        let sms = max_sms.map_or(self.sms, |m| m.min(self.sms)) as f64 / self.gpu.sms as f64;
        let reached = match class {
            MemoryClass::Stream if max_sms.is_none() => efficiency,
            _ => efficiency * sms,
        };
        c.ramp_s + self.slowdown() * bytes / (self.gpu.memory_bytes_per_s * reached)
    }
}
