//! What a run did, over its launches and processes: every process leaves its part in a file.

use std::collections::BTreeMap;
use std::io;
use std::path::Path;

use fathom_emulator::{Finding, KernelRecord};
use serde::{Deserialize, Serialize};

/// What a run did, over all its launches.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Summary {
    /// How many kernels were launched.
    pub launches: u64,
    /// Instructions that threads executed: a warp's counts once for each active lane.
    pub thread_instructions: u64,
    /// Instructions that warps executed.
    pub warp_instructions: u64,
    /// Floating-point operations of tensor-core instructions.
    pub tensor_core_flops: u64,
    /// Tensor-core instructions by shape and types.
    pub tensor_core: BTreeMap<String, u64>,
    /// Approximate instructions by mnemonic; their bits are not guaranteed.
    pub approximate: BTreeMap<String, u64>,
    /// Kernels by name.
    pub kernels: BTreeMap<String, Totals>,
    /// Findings of the sanitizers, each defect once.
    pub findings: Vec<Finding>,
    /// Launches that could not run, as printed.
    pub errors: Vec<String>,
}

/// What the launches of one kernel did.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Totals {
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

impl Totals {
    /// What came to these since they were `before`.
    fn since(&self, before: &Totals) -> Totals {
        let of = |name: &String, count: &u64| {
            let known = before.approximate.get(name).copied().unwrap_or(0);
            (*count > known).then(|| (name.clone(), count - known))
        };
        Totals {
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

    fn merge(&mut self, other: &Totals) {
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
        add_all(&mut self.approximate, &other.approximate);
    }
}

fn add_all(to: &mut BTreeMap<String, u64>, from: &BTreeMap<String, u64>) {
    for (name, count) in from {
        *to.entry(name.clone()).or_default() += count;
    }
}

impl Summary {
    /// What each kernel did since the summary was `before`; kernels that did nothing are left out.
    pub fn kernels_since(&self, before: &Summary) -> BTreeMap<String, Totals> {
        let none = Totals::default();
        let since = |(name, totals): (&String, &Totals)| {
            let done = totals.since(before.kernels.get(name).unwrap_or(&none));
            (done.launches > 0).then(|| (name.clone(), done))
        };
        self.kernels.iter().filter_map(since).collect()
    }

    /// Whether a finding's defect is known.
    pub(crate) fn knows(&self, finding: &Finding) -> bool {
        self.findings.iter().any(|known| known.is_same(finding))
    }

    fn find(&mut self, finding: &Finding) {
        match self.findings.iter_mut().find(|known| known.is_same(finding)) {
            Some(known) => known.count += finding.count,
            None => self.findings.push(finding.clone()),
        }
    }

    pub(crate) fn add(&mut self, record: &KernelRecord, findings: &[Finding], host_seconds: f64) {
        self.launches += 1;
        self.thread_instructions += record.thread_instructions;
        self.warp_instructions += record.warp_instructions;
        self.tensor_core_flops += record.tensor_core_flops;
        add_all(&mut self.tensor_core, &record.tensor_core);
        add_all(&mut self.approximate, &record.approximate);
        self.kernels.entry(record.kernel.clone()).or_default().merge(&Totals {
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
        });
        findings.iter().for_each(|finding| self.find(finding));
    }

    /// Adds what another process did.
    pub(crate) fn merge(&mut self, other: Summary) {
        self.launches += other.launches;
        self.thread_instructions += other.thread_instructions;
        self.warp_instructions += other.warp_instructions;
        self.tensor_core_flops += other.tensor_core_flops;
        add_all(&mut self.tensor_core, &other.tensor_core);
        add_all(&mut self.approximate, &other.approximate);
        for (name, totals) in &other.kernels {
            self.kernels.entry(name.clone()).or_default().merge(totals);
        }
        other.findings.iter().for_each(|finding| self.find(finding));
        self.errors.extend(other.errors);
    }

    pub(crate) fn save(&self, folder: &Path) -> io::Result<()> {
        let name = format!("{}.json", std::process::id());
        let beside = folder.join(format!("{name}.part"));
        std::fs::write(&beside, serde_json::to_vec(self)?)?;
        std::fs::rename(beside, folder.join(name))
    }
}
