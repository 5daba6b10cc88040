//! A GPU as data: what its data sheet says, and what CUDA reports of it.

use serde::{Deserialize, Serialize};

use crate::ConfigError;
use crate::presets::gpu_text;

/// One GPU as the simulator knows it: the figures of its data sheet.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Gpu {
    /// Name for people.
    pub name: String,
    /// Architecture, `hopper` for instance; a label for reports.
    pub architecture: String,
    /// Streaming multiprocessors (compute units).
    pub sms: u64,
    /// Boost clock at which the data sheet counts its FLOPS, Hz.
    pub clock_hz: f64,
    /// Dense BF16 tensor-core peak of the whole chip, FLOP/s.
    pub bf16_flops: f64,
    /// Dense FP8 tensor-core peak of the whole chip, FLOP/s; 0 where the chip has none.
    pub fp8_flops: f64,
    /// Dense FP4 tensor-core peak of the whole chip, FLOP/s; 0 where the chip has none. Chips that
    /// have it apply the scales of MX blocks in the tensor core.
    #[serde(default)]
    pub fp4_flops: f64,
    /// FP32 vector peak, FLOP/s.
    pub fp32_flops: f64,
    /// Share of the BF16 peak that a large library GEMM sustains under the power limit (published
    /// measurements).
    pub bf16_achievable: f64,
    /// Share of the FP8 peak that a large library GEMM sustains under the power limit.
    pub fp8_achievable: f64,
    /// Share of the FP4 peak that a large library GEMM sustains under the power limit.
    #[serde(default)]
    pub fp4_achievable: f64,
    /// FP8 partial sums must be promoted to FP32 on the vector units (Hopper), for every 128 of K.
    pub fp8_promotion: bool,
    /// Device memory, bytes.
    pub memory_bytes: u64,
    /// Peak memory bandwidth, bytes/s.
    pub memory_bytes_per_s: f64,
    /// Last-level cache, bytes.
    pub l2_bytes: u64,
    /// Bandwidth of the last-level cache, bytes/s.
    pub l2_bytes_per_s: f64,
    /// Scale-up link (NVLink, Infinity Fabric) of one GPU, one direction, bytes/s.
    pub scale_up_bytes_per_s: f64,
    /// Share of the scale-up bandwidth that large copies reach.
    pub scale_up_usable: f64,
    /// Share of the scale-up bandwidth that reducing and gathering collectives reach;
    /// `scale_up_usable` where absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub collective_usable: Option<f64>,
    /// Board power (TDP), watts.
    pub tdp_w: f64,
    /// Power to which the board is limited, watts; the TDP where absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub power_limit_w: Option<f64>,
    /// Shares of the BF16 peak between which nine of ten library GEMMs lie on machines of this kind
    /// (published tables); `bf16_achievable` alone where absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bf16_achievable_range: Option<[f64; 2]>,
    /// What CUDA reports of it; none where the emulator cannot be this GPU.
    #[serde(default, skip_serializing)]
    pub cuda: Option<CudaDevice>,
}

impl Gpu {
    /// Bytes/s of the scale-up link that large copies reach, one direction.
    pub fn scale_up_usable_bytes_per_s(&self) -> f64 {
        self.scale_up_bytes_per_s * self.scale_up_usable
    }

    /// Bytes/s of the scale-up link that collectives reach, one direction.
    pub fn collective_bytes_per_s(&self) -> f64 {
        self.scale_up_bytes_per_s * self.collective_usable.unwrap_or(self.scale_up_usable)
    }

    /// Factor on the clock under load that the power limit leaves: voltage falls with the clock, so
    /// the power above idle goes with the cube of the clock (CMOS; idle taken as a tenth of the
    /// TDP).
    pub fn power_clock_factor(&self) -> f64 {
        let limit = self.power_limit_w.unwrap_or(self.tdp_w);
        if limit >= self.tdp_w {
            return 1.0;
        }
        let idle = 0.1 * self.tdp_w;
        ((limit - idle).max(0.01 * self.tdp_w) / (self.tdp_w - idle)).cbrt()
    }
}

impl Gpu {
    /// A GPU that comes with the project, by its name in [`crate::presets::GPUS`].
    ///
    /// # Errors
    /// [`ConfigError::Preset`].
    pub fn preset(name: &str) -> Result<Gpu, ConfigError> {
        let text = gpu_text(name).map_err(ConfigError::Preset)?;
        toml::from_str(text).map_err(|e| ConfigError::Value {
            path: name.into(),
            place: "preset".into(),
            expected: "a GPU".into(),
            found: e.to_string(),
        })
    }
}

/// What CUDA reports of a device: identity and limits. All sizes are bytes, clocks kHz.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CudaDevice {
    /// The name that `cuDeviceGetName` gives.
    pub name: String,
    /// Compute capability: major, minor.
    pub compute_capability: [u32; 2],
    /// SM clock, kHz; `clock64` counts emulated cycles of it.
    pub clock_khz: u32,
    /// Memory clock, kHz.
    pub memory_clock_khz: u32,
    /// Memory bus width in bits.
    pub memory_bus_bits: u32,
    /// Device memory, bytes; allocations beyond it fail.
    pub memory_bytes: u64,
    /// Level-2 cache, bytes.
    pub l2_bytes: u32,
    /// Threads resident on an SM at most.
    pub threads_per_sm: u32,
    /// CTAs resident on an SM at most.
    pub blocks_per_sm: u32,
    /// Shared memory of one SM, bytes.
    pub shared_bytes_per_sm: u32,
    /// Bytes of shared memory that a CTA may have without opting in.
    pub shared_bytes_per_block: u32,
    /// Bytes of shared memory that a CTA may have after opting in.
    pub shared_bytes_per_block_optin: u32,
    /// Bytes of shared memory that the system keeps of each CTA, at its start.
    pub shared_bytes_reserved: u32,
    /// Most CTAs of a portable cluster; 1 where there are no clusters.
    pub max_cluster_ctas: u32,
    /// Most CTAs of a cluster with the non-portable attribute set.
    pub max_cluster_ctas_nonportable: u32,
}
