//! What a run did, over its launches and processes: every process leaves its part in a file.

use std::collections::BTreeMap;
use std::io;
use std::path::Path;

use fathom_emulator::{Finding, KernelRecord};
use fathom_trace::KernelTotals;
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
    pub kernels: BTreeMap<String, KernelTotals>,
    /// Findings of the sanitizers, each defect once.
    pub findings: Vec<Finding>,
    /// Launches that could not run, as printed.
    pub errors: Vec<String>,
}

fn add_all(to: &mut BTreeMap<String, u64>, from: &BTreeMap<String, u64>) {
    for (name, count) in from {
        *to.entry(name.clone()).or_default() += count;
    }
}

impl Summary {
    /// What each kernel did since the summary was `before`; kernels that did nothing are left out.
    pub fn kernels_since(&self, before: &Summary) -> BTreeMap<String, KernelTotals> {
        let none = KernelTotals::default();
        let since = |(name, totals): (&String, &KernelTotals)| {
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
        let kernel = self.kernels.entry(record.kernel.clone()).or_default();
        kernel.merge(&KernelTotals::of(record, host_seconds));
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
