//! From counters to a [`KernelRecord`] and a [`LaunchReport`].

use std::collections::BTreeMap;

use fathom_trace::{KernelRecord, RoleRecord};

use super::cx::{Grid, Stats};
use super::warp::Warp;
use crate::launch::LaunchReport;

impl Stats {
    /// Zero counters for a launch.
    pub fn new(grid: &Grid) -> Stats {
        let ops = grid.code.ops.len();
        let threads: u32 = grid.config.block.iter().product();
        let warps = if grid.settings.profile { threads.div_ceil(32) as usize } else { 0 };
        Stats {
            warps: vec![0; ops],
            threads: vec![0; ops],
            by_warp: vec![vec![0; ops]; warps],
            waits_by_warp: vec![0; warps],
            ..Stats::default()
        }
    }

    /// A warp has ended.
    pub fn retire(&mut self, warp: &Warp) {
        self.barrier_waits += warp.barrier_waits;
        if let Some(waits) = self.waits_by_warp.get_mut(warp.index as usize) {
            *waits += warp.barrier_waits;
        }
    }

    /// Adds the counters of other clusters.
    pub fn merge(&mut self, other: Stats) {
        let add = |to: &mut Vec<u64>, from: &[u64]| {
            to.resize(to.len().max(from.len()), 0);
            to.iter_mut().zip(from).for_each(|(a, b)| *a += b);
        };
        add(&mut self.warps, &other.warps);
        add(&mut self.threads, &other.threads);
        for finding in other.findings {
            let known = |f: &&mut crate::Finding| f.kind == finding.kind && f.line == finding.line;
            match self.findings.iter_mut().find(known) {
                Some(first) => {
                    let count = first.count + finding.count;
                    if (finding.cta, finding.warp) < (first.cta, first.warp) {
                        *first = finding;
                    }
                    first.count = count;
                }
                None => self.findings.push(finding),
            }
        }
        self.printed.extend(other.printed);
        self.global_transactions += other.global_transactions;
        self.global_sectors += other.global_sectors;
        self.global_bytes_read += other.global_bytes_read;
        self.global_bytes_written += other.global_bytes_written;
        self.shared_requests += other.shared_requests;
        self.bank_conflicts += other.bank_conflicts;
        self.tma_bytes_read += other.tma_bytes_read;
        self.tma_bytes_written += other.tma_bytes_written;
        self.barrier_waits += other.barrier_waits;
        if self.by_warp.len() < other.by_warp.len() {
            self.by_warp.resize(other.by_warp.len(), Vec::new());
            self.waits_by_warp.resize(other.by_warp.len(), 0);
        }
        for (to, from) in self.by_warp.iter_mut().zip(&other.by_warp) {
            add(to, from);
        }
        add(&mut self.waits_by_warp, &other.waits_by_warp);
    }
}

/// The report of a launch.
pub fn report(grid: &Grid, mut stats: Stats) -> LaunchReport {
    let code = &grid.code;
    let mut record = KernelRecord {
        seq: grid.seq,
        kernel: code.name.clone(),
        device: grid.preset.key.clone(),
        grid: grid.config.grid,
        block: grid.config.block,
        cluster: grid.cluster,
        shared_bytes: u64::from(grid.shared_asked - super::reserved(&grid.preset)),
        warp_instructions: stats.warps.iter().sum(),
        thread_instructions: stats.threads.iter().sum(),
        instructions: by_class(grid, &stats.warps),
        global_transactions: stats.global_transactions,
        global_sectors: stats.global_sectors,
        global_bytes_read: stats.global_bytes_read,
        global_bytes_written: stats.global_bytes_written,
        shared_requests: stats.shared_requests,
        bank_conflicts: stats.bank_conflicts,
        tma_bytes_read: stats.tma_bytes_read,
        tma_bytes_written: stats.tma_bytes_written,
        barrier_waits: stats.barrier_waits,
        ..KernelRecord::default()
    };
    for (at, mnemonic, flops) in &code.tensor_core {
        let count = stats.warps[*at as usize];
        if count > 0 {
            *record.tensor_core.entry(mnemonic.clone()).or_default() += count;
            record.tensor_core_flops += count * flops;
        }
    }
    for (at, mnemonic) in &code.approximate {
        let count = stats.warps[*at as usize];
        if count > 0 {
            *record.approximate.entry(mnemonic.clone()).or_default() += count;
        }
    }
    record.roles = roles(grid, &stats);
    stats.printed.sort_by_key(|(cta, _)| *cta);
    stats.findings.sort_by_key(|f| (f.line, f.kind));
    let cycles = record.warp_instructions.div_ceil(u64::from(grid.preset.sm_count));
    LaunchReport {
        findings: stats.findings,
        printed: stats.printed.into_iter().map(|(_, text)| text).collect(),
        record,
        cycles,
    }
}

fn by_class(grid: &Grid, counts: &[u64]) -> BTreeMap<String, u64> {
    let mut map = BTreeMap::new();
    for (op, &count) in grid.code.ops.iter().zip(counts) {
        if count > 0 {
            *map.entry(op.class.name().to_owned()).or_default() += count;
        }
    }
    map
}

/// Warps that executed the same operations play the same role.
fn roles(grid: &Grid, stats: &Stats) -> Vec<RoleRecord> {
    let mut roles: BTreeMap<Vec<bool>, (Vec<u32>, Vec<u64>, u64)> = BTreeMap::new();
    for (warp, counts) in stats.by_warp.iter().enumerate() {
        let executed: Vec<bool> = counts.iter().map(|&c| c > 0).collect();
        let role = roles.entry(executed).or_insert((Vec::new(), vec![0; counts.len()], 0));
        role.0.push(warp as u32);
        role.1.iter_mut().zip(counts).for_each(|(a, b)| *a += b);
        role.2 += stats.waits_by_warp.get(warp).copied().unwrap_or(0);
    }
    let mut out: Vec<RoleRecord> = roles
        .into_values()
        .map(|(warps, counts, barrier_waits)| RoleRecord {
            warps,
            warp_instructions: counts.iter().sum(),
            instructions: by_class(grid, &counts),
            barrier_waits,
        })
        .collect();
    out.sort_by_key(|r| r.warps.first().copied());
    out
}
