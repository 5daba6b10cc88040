//! From counters to a [`KernelRecord`] and a [`LaunchReport`].

use std::collections::BTreeMap;

use fathom_trace::{KernelRecord, RoleRecord};

use crate::launch::LaunchReport;
use crate::machine::cx::Grid;
use crate::machine::stats::Stats;

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
        shared_bytes: u64::from(grid.shared_asked - grid.preset.shared_bytes_reserved),
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
        copied_bytes: stats.copied_bytes,
        fetched_sectors: stats.fetched_sectors,
        distinct_sectors_read: stats.sectors_read.count(),
        distinct_sectors_written: stats.sectors_written.count(),
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
    if stats.filtered > 0 {
        record.approximate.insert("tex with a linear filter".to_owned(), stats.filtered);
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
