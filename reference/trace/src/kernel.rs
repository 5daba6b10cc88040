//! Kernel records: what one launch on the (emulated) device executed.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Counts of one kernel launch. Maps have sorted keys, so that equal launches give equal lines.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct KernelRecord {
    /// Position of the launch in the process, counted from 0.
    pub seq: u64,
    /// Entry name in the PTX.
    pub kernel: String,
    /// Device preset, `h800` for instance.
    pub device: String,
    /// CTAs in x, y, z.
    pub grid: [u32; 3],
    /// Threads of a CTA in x, y, z.
    pub block: [u32; 3],
    /// CTAs of a cluster in x, y, z; all 1 where there is none.
    pub cluster: [u32; 3],
    /// Static and dynamic shared memory of a CTA.
    pub shared_bytes: u64,
    /// Instructions executed by warps.
    pub warp_instructions: u64,
    /// Instructions executed by threads (active lanes summed).
    pub thread_instructions: u64,
    /// Warp instructions by class (`alu`, `fma`, `ld.global`, `wgmma`, `bar`, ...).
    pub instructions: BTreeMap<String, u64>,
    /// Warp-level global-memory requests.
    pub global_transactions: u64,
    /// 32-byte sectors touched by those requests.
    pub global_sectors: u64,
    /// Bytes read from global memory by loads, async copies and TMA.
    pub global_bytes_read: u64,
    /// Bytes written to global memory.
    pub global_bytes_written: u64,
    /// Warp-level shared-memory requests.
    pub shared_requests: u64,
    /// Extra cycles that bank conflicts cost these requests (wavefronts beyond the ideal).
    pub bank_conflicts: u64,
    /// Bytes moved by TMA (bulk and tensor copies) towards shared memory.
    pub tma_bytes_read: u64,
    /// Bytes moved by TMA towards global memory.
    pub tma_bytes_written: u64,
    /// Tensor-core instructions by shape and types (`wgmma.m64n128k32.f32.e4m3.e4m3`).
    pub tensor_core: BTreeMap<String, u64>,
    /// Floating-point operations of those instructions (a multiply-add counts two).
    pub tensor_core_flops: u64,
    /// Bytes of global memory that asynchronous copies and TMA read.
    #[serde(default)]
    pub copied_bytes: u64,
    /// 32-byte sectors that reads of warps fetch where each CTA has its share of a first-level
    /// cache to itself, which forgets the oldest first.
    #[serde(default)]
    pub fetched_sectors: u64,
    /// 32-byte sectors of global memory that any read touched, each counted once.
    #[serde(default)]
    pub distinct_sectors_read: u64,
    /// 32-byte sectors of global memory that any write touched, each counted once.
    #[serde(default)]
    pub distinct_sectors_written: u64,
    /// Failed waits on barriers and mbarriers (a warp had to try again).
    pub barrier_waits: u64,
    /// Approximate instructions executed, by mnemonic; their bits are not guaranteed.
    pub approximate: BTreeMap<String, u64>,
    /// The same counts by warp role: warps of a CTA that executed the same blocks.
    pub roles: Vec<RoleRecord>,
}

/// Counts of the warps of one role, a producer or a consumer warpgroup for instance.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct RoleRecord {
    /// Warp indices in the CTA that play this role.
    pub warps: Vec<u32>,
    /// Instructions executed by these warps, over all CTAs.
    pub warp_instructions: u64,
    /// Warp instructions by class.
    pub instructions: BTreeMap<String, u64>,
    /// Failed waits on barriers and mbarriers.
    pub barrier_waits: u64,
}
