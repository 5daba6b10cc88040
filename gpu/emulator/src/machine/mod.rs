//! The machine: runs the clusters of launches, warp by warp, and reports.
//!
//! A [`domain`] is a set of clusters that take turns on one host thread. Kernels whose CTAs
//! communicate run in one domain; all others have a domain a cluster, in parallel. What a warp is
//! stands in [`warp`], how it executes in [`turn`], what an operation sees in [`cx`].

pub mod access;
pub mod cluster;
pub mod cx;
pub mod domain;
pub mod global;
pub mod lane;
pub mod meeting;
pub mod op;
pub mod record;
pub mod sanitizer;
pub mod turn;
pub mod warp;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use rayon::prelude::*;

use crate::error::{Error, Finding};
use crate::launch::{Launch, LaunchReport};
use crate::preset::Preset;
use cx::{Grid, Stats};
use domain::Domain;
use lane::{LANES, Slot, WideSlot};
use op::{Code, Constant};

static SEQUENCE: AtomicU64 = AtomicU64::new(0);

/// Runs launches to their end, together.
pub fn run(launches: &[Launch<'_>], codes: &[Arc<Code>]) -> Result<Vec<LaunchReport>, Error> {
    let grids: Result<Vec<Grid>, Error> =
        launches.iter().zip(codes).map(|(l, c)| grid(l, c)).collect();
    let grids = grids?;
    let serial = grids.len() > 1 || !grids[0].parallel;
    let mut stats: Vec<Stats> = Vec::new();
    let fault = if serial {
        let mut domain = Domain::new(&grids);
        let fault = domain.run();
        stats.append(&mut domain.stats);
        if let Some(global) = domain.global.take() {
            let device = launches[0].function.module().device();
            device.remember((launches.len() == 1).then(|| global.into_touched()));
        }
        fault
    } else {
        let (merged, fault) = run_parallel(&grids[0]);
        stats.push(merged);
        fault.map(|f| (0, f))
    };
    let mut reports: Vec<LaunchReport> =
        grids.iter().zip(stats).map(|(grid, s)| record::report(grid, s)).collect();
    if let Some((at, finding)) = fault {
        reports[at].findings.push(*finding);
    }
    Ok(reports)
}

/// Clusters of one launch, each on its own, on rayon's threads. The fault is that of the first
/// cluster in launch order, whatever thread met one first.
fn run_parallel(grid: &Grid) -> (Stats, Option<Box<Finding>>) {
    let count = cluster_count(grid);
    let faulted = AtomicU64::new(u64::MAX);
    type Acc = (Stats, Option<(u64, Box<Finding>)>);
    let fold = |mut acc: Acc, index: u64| {
        if index < faulted.load(Relaxed) {
            let mut domain = Domain::of_cluster(grid, index, std::mem::take(&mut acc.0));
            let fault = domain.run();
            acc.0 = domain.stats.remove(0);
            if let Some((_, finding)) = fault {
                faulted.fetch_min(index, Relaxed);
                if acc.1.as_ref().is_none_or(|(known, _)| index < *known) {
                    acc.1 = Some((index, finding));
                }
            }
        }
        acc
    };
    let start = || (Stats::new(grid), None);
    let merge = |a: Acc, b: Acc| {
        let mut stats = a.0;
        stats.merge(b.0);
        let fault = match (a.1, b.1) {
            (Some(x), Some(y)) => Some(if x.0 <= y.0 { x } else { y }),
            (x, y) => x.or(y),
        };
        (stats, fault)
    };
    let (stats, fault) = if count == 1 || grid.settings.threads == 1 {
        (0..count).fold(start(), fold)
    } else {
        (0..count).into_par_iter().fold(start, fold).reduce(start, merge)
    };
    (stats, fault.map(|(_, f)| f))
}

/// Clusters of a launch.
pub fn cluster_count(grid: &Grid) -> u64 {
    (0..3).map(|d| u64::from(grid.config.grid[d] / grid.cluster[d])).product()
}

fn grid(launch: &Launch<'_>, code: &Arc<Code>) -> Result<Grid, Error> {
    let module = launch.function.module();
    let device = module.device();
    let mut constants = Vec::new();
    let mut wide_constants = Vec::new();
    for &constant in &code.constants {
        let (bits, wide) = match constant {
            Constant::Bits { bits, wide } => (bits, wide),
            Constant::Symbol { symbol, addend, wide } => {
                (module.address_of(symbol).wrapping_add(addend as u64), wide)
            }
        };
        if wide {
            wide_constants.push(WideSlot([bits; LANES]));
        } else {
            constants.push(Slot([bits as u32; LANES]));
        }
    }
    let preset = device.preset().clone();
    let settings = device.settings();
    let config = launch.config.clone();
    let shared = code.static_shared_bytes + config.dynamic_shared_bytes;
    let shared_asked = reserved(&preset) + shared;
    let seq = SEQUENCE.fetch_add(1, Relaxed);
    // Both may allocate, and must be there when the view is taken.
    let heap = if code.uses_heap { Some(device.heap()?) } else { None };
    let workspace = if config.cooperative { device.workspace(seq)? } else { 0 };
    let parallel = !code.communicates && !config.cooperative && !settings.checks.races;
    Ok(Grid {
        code: code.clone(),
        program: module.program().clone(),
        constants,
        wide_constants,
        cluster: launch.function.cluster(&config),
        preset,
        view: device.memory().view(),
        previous: if config.pdl { device.previous() } else { None },
        seq,
        workspace,
        heap,
        shared_end: shared_asked.next_multiple_of(SHARED_UNIT),
        shared_asked,
        simd: crate::exec::alu::available(),
        parallel,
        settings,
        config,
    })
}

/// Bytes of shared memory are allocated in units of so many on sm_80 and later (PTX ISA,
/// `%total_smem_size`).
const SHARED_UNIT: u32 = 128;

/// First usable shared address: the system's part lies below it.
pub fn reserved(preset: &Preset) -> u32 {
    preset.shared_bytes_reserved
}
