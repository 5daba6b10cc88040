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

/// What the launches of one kernel did.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct KernelTotals {
    /// How often it was launched.
    pub launches: u64,
    /// Instructions that threads executed: a warp's counts once for each active lane.
    pub thread_instructions: u64,
    /// Floating-point operations of tensor-core instructions.
    pub tensor_core_flops: u64,
    /// Bytes read from global memory (with profiling).
    pub global_bytes_read: u64,
    /// Bytes written to global memory (with profiling).
    pub global_bytes_written: u64,
    /// 32-byte sectors touched (with profiling).
    pub global_sectors: u64,
    /// Bytes of global memory that asynchronous copies and TMA read.
    pub copied_bytes: u64,
    /// 32-byte sectors that reads of warps fetched past a first-level cache (with profiling).
    pub fetched_sectors: u64,
    /// 32-byte sectors that were read, each once a launch (with profiling).
    pub sectors_read: u64,
    /// 32-byte sectors that were written, each once a launch (with profiling).
    pub sectors_written: u64,
    /// Requests of warps to shared memory (with profiling).
    pub shared_requests: u64,
    /// Extra wavefronts of shared memory (with profiling).
    pub bank_conflicts: u64,
    /// Failed waits on barriers.
    pub barrier_waits: u64,
    /// Seconds that the host took for them.
    pub host_seconds: f64,
    /// Approximate instructions by mnemonic; where there are none, the kernel's bits are exact.
    pub approximate: BTreeMap<String, u64>,
}

impl KernelTotals {
    /// Those of one launch, for which the host took so many seconds.
    pub fn of(record: &KernelRecord, host_seconds: f64) -> KernelTotals {
        KernelTotals {
            launches: 1,
            thread_instructions: record.thread_instructions,
            tensor_core_flops: record.tensor_core_flops,
            global_bytes_read: record.global_bytes_read,
            global_bytes_written: record.global_bytes_written,
            global_sectors: record.global_sectors,
            copied_bytes: record.copied_bytes,
            fetched_sectors: record.fetched_sectors,
            sectors_read: record.distinct_sectors_read,
            sectors_written: record.distinct_sectors_written,
            shared_requests: record.shared_requests,
            bank_conflicts: record.bank_conflicts,
            barrier_waits: record.barrier_waits,
            host_seconds,
            approximate: record.approximate.clone(),
        }
    }

    /// What came to these since they were `before`.
    pub fn since(&self, before: &KernelTotals) -> KernelTotals {
        let of = |name: &String, count: &u64| {
            let known = before.approximate.get(name).copied().unwrap_or(0);
            (*count > known).then(|| (name.clone(), count - known))
        };
        KernelTotals {
            launches: self.launches - before.launches,
            thread_instructions: self.thread_instructions - before.thread_instructions,
            tensor_core_flops: self.tensor_core_flops - before.tensor_core_flops,
            global_bytes_read: self.global_bytes_read - before.global_bytes_read,
            global_bytes_written: self.global_bytes_written - before.global_bytes_written,
            global_sectors: self.global_sectors - before.global_sectors,
            copied_bytes: self.copied_bytes - before.copied_bytes,
            fetched_sectors: self.fetched_sectors - before.fetched_sectors,
            sectors_read: self.sectors_read - before.sectors_read,
            sectors_written: self.sectors_written - before.sectors_written,
            shared_requests: self.shared_requests - before.shared_requests,
            bank_conflicts: self.bank_conflicts - before.bank_conflicts,
            barrier_waits: self.barrier_waits - before.barrier_waits,
            host_seconds: self.host_seconds - before.host_seconds,
            approximate: self.approximate.iter().filter_map(|(n, c)| of(n, c)).collect(),
        }
    }

    /// Adds what other launches did.
    pub fn merge(&mut self, other: &KernelTotals) {
        self.launches += other.launches;
        self.thread_instructions += other.thread_instructions;
        self.tensor_core_flops += other.tensor_core_flops;
        self.global_bytes_read += other.global_bytes_read;
        self.global_bytes_written += other.global_bytes_written;
        self.global_sectors += other.global_sectors;
        self.copied_bytes += other.copied_bytes;
        self.fetched_sectors += other.fetched_sectors;
        self.sectors_read += other.sectors_read;
        self.sectors_written += other.sectors_written;
        self.shared_requests += other.shared_requests;
        self.bank_conflicts += other.bank_conflicts;
        self.barrier_waits += other.barrier_waits;
        self.host_seconds += other.host_seconds;
        for (name, count) in &other.approximate {
            *self.approximate.entry(name.clone()).or_default() += count;
        }
    }
}
