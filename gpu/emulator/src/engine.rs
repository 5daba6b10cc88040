//! From launches to grids, from counters to reports: where the surface hands over to the machine.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use crate::error::Error;
use crate::launch::{Launch, LaunchReport};
use crate::machine::alu::Vectors;
use crate::machine::cx::Grid;
use crate::machine::domain::Domain;
use crate::machine::layout::Constant;
use crate::machine::op::Code;
use crate::machine::parallel;
use crate::machine::registers::{LANES, Slot, WideSlot};
use crate::machine::stats::Stats;
use crate::report::report;

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
        let (merged, fault) = parallel::run(&grids[0]);
        stats.push(merged);
        fault.map(|f| (0, f))
    };
    let mut reports: Vec<LaunchReport> =
        grids.iter().zip(stats).map(|(grid, s)| report(grid, s)).collect();
    if let Some((at, finding)) = fault {
        reports[at].findings.push(*finding);
    }
    Ok(reports)
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
    let shared = code.outline.static_shared_bytes + config.dynamic_shared_bytes;
    let shared_asked = preset.shared_bytes_reserved + shared;
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
        objects: device.objects().now(),
        previous: if config.pdl { device.previous() } else { None },
        seq,
        workspace,
        heap,
        shared_end: shared_asked.next_multiple_of(SHARED_UNIT),
        shared_asked,
        vectors: Vectors::detect(),
        parallel,
        settings,
        config,
    })
}

/// Bytes of shared memory are allocated in units of so many on sm_80 and later (PTX ISA,
/// `%total_smem_size`).
const SHARED_UNIT: u32 = 128;
