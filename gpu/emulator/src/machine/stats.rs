//! Counters of a run, and how those of several clusters add up.

use super::sectors::Sectors;
use super::warp::Warp;
use crate::error::Finding;

/// Counters of a run; sums of them do not depend on the order of CTAs.
#[derive(Clone, Debug, Default)]
pub struct Stats {
    /// Executions by operation: of warps, of threads.
    pub warps: Vec<u64>,
    pub threads: Vec<u64>,
    pub findings: Vec<Finding>,
    pub printed: Vec<(u64, String)>,
    pub global_transactions: u64,
    pub global_sectors: u64,
    pub global_bytes_read: u64,
    pub global_bytes_written: u64,
    pub shared_requests: u64,
    pub bank_conflicts: u64,
    pub tma_bytes_read: u64,
    pub tma_bytes_written: u64,
    /// Bytes of global memory that asynchronous copies and TMA read.
    pub copied_bytes: u64,
    /// Sectors that reads of warps would fetch past their CTA's share of the first-level cache.
    pub fetched_sectors: u64,
    /// Where a profile is wanted: the sectors that reads touched, and writes.
    pub sectors_read: Sectors,
    pub sectors_written: Sectors,
    /// Texture fetches of warps whose values are interpolated.
    pub filtered: u64,
    pub barrier_waits: u64,
    /// Executions by warp of the CTA and operation, where a profile is wanted.
    pub by_warp: Vec<Vec<u64>>,
    pub waits_by_warp: Vec<u64>,
}

impl Stats {
    /// Zero counters for a launch of `ops` operations; `warps` of a CTA are counted each for
    /// itself.
    pub fn new(ops: usize, warps: usize) -> Stats {
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
            let known = |f: &&mut Finding| f.kind == finding.kind && f.line == finding.line;
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
        self.copied_bytes += other.copied_bytes;
        self.fetched_sectors += other.fetched_sectors;
        self.sectors_read.merge(other.sectors_read);
        self.sectors_written.merge(other.sectors_written);
        self.filtered += other.filtered;
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
