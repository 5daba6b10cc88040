//! From launches to grids, from counters to reports: where the surface hands over to the machine.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use crate::device::Device;
use crate::error::Error;
use crate::launch::{Joining, Launch, LaunchConfig, LaunchReport, More, check_launch};
use crate::machine::alu::Vectors;
use crate::machine::cx::Grid;
use crate::machine::domain::Domain;
use crate::machine::layout::Constant;
use crate::machine::op::Code;
use crate::machine::parallel;
use crate::machine::registers::{LANES, Slot, WideSlot};
use crate::machine::stats::Stats;
use crate::module::Function;
use crate::report::report;

static SEQUENCE: AtomicU64 = AtomicU64::new(0);

/// Runs launches to their end, together.
pub fn run(launches: &[Launch<'_>], codes: &[Arc<Code>]) -> Result<Vec<LaunchReport>, Error> {
    let grids: Result<Vec<Arc<Grid>>, Error> =
        launches.iter().zip(codes).map(|(l, c)| grid(l, c).map(Arc::new)).collect();
    let grids = grids?;
    let serial = grids.len() > 1 || !grids[0].parallel;
    let mut stats: Vec<Stats> = Vec::new();
    let fault = if serial {
        let mut domain = Domain::new(grids.iter().any(|g| g.settings.checks.races));
        grids.iter().for_each(|grid| domain.add(Arc::clone(grid)));
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

/// Rounds from one look for launches that join to the next.
const ROUNDS: u32 = 16;

/// How long the host thread rests where every warp has given its turn away.
const REST: Duration = Duration::from_micros(50);

/// A launch that has joined: its number in the source, its device, what it runs.
type Joined = (usize, Device, Arc<Grid>);

/// Runs the launches of `source` to their end, or to the first fault.
pub fn run_joining(source: &mut dyn Joining) {
    let mut domain: Option<Domain> = None;
    let mut joined: Vec<Option<Joined>> = Vec::new();
    let (mut given, mut rounds) = (0, 0);
    let mut last = None;
    loop {
        let none_left = domain.as_ref().is_none_or(Domain::is_empty);
        let rests = domain.as_ref().is_some_and(|domain| domain.yields);
        if none_left || rests || rounds % ROUNDS == 0 {
            let More { launches, progress } = source.more(none_left);
            if none_left && launches.is_empty() {
                break;
            }
            for (function, config) in launches {
                match grid_of(&function, &config) {
                    Ok(grid) => {
                        let races = grid.settings.checks.races;
                        let domain = domain.get_or_insert_with(|| Domain::new(races));
                        let device = function.module().device().clone();
                        joined.push(Some((given, device, Arc::clone(&grid))));
                        domain.add(grid);
                    }
                    Err(error) => source.ended(given, Err(error)),
                }
                given += 1;
            }
            if let Some(domain) = domain.as_mut().filter(|_| progress) {
                domain.changed_outside();
            }
        }
        rounds += 1;
        let Some(domain) = &mut domain else { continue };
        let fault = domain.round();
        let mut ended = domain.ended();
        if fault.is_some() {
            // The others end where they stand.
            ended.extend(domain.left());
        }
        for at in ended {
            let (number, device, grid) = joined[at].take().expect("it ends once");
            let mut report = report(&grid, std::mem::take(&mut domain.stats[at]));
            if let Some((_, finding)) = fault.as_ref().filter(|(of, _)| *of == at) {
                report.findings.push((**finding).clone());
            }
            device.remember(None);
            last = Some(device);
            source.ended(number, Ok(report));
        }
        if fault.is_some() {
            break;
        }
        if domain.yields && !domain.is_empty() {
            std::thread::sleep(REST);
        }
    }
    let global = domain.and_then(|domain| domain.global).filter(|_| joined.len() == 1);
    if let (Some(global), Some(device)) = (global, last) {
        device.remember(Some(global.into_touched()));
    }
}

fn grid_of(function: &Function, config: &LaunchConfig) -> Result<Arc<Grid>, Error> {
    let launch = Launch { function, config };
    check_launch(&launch)?;
    Ok(Arc::new(grid(&launch, &function.code()?)?))
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
