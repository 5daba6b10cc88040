//! Launching kernels: configuration in, report out.

use fathom_trace::KernelRecord;

pub use crate::config::{LaunchConfig, Params};
use crate::device::Device;
use crate::error::{Error, Finding};
use crate::module::Function;

/// What a launch did.
#[derive(Clone, Debug, Default)]
pub struct LaunchReport {
    /// What is wrong with the program; at most one is fatal, and it is the last.
    pub findings: Vec<Finding>,
    /// Counts. Always: instructions, tensor-core work, TMA bytes, approximate instructions. With
    /// [`crate::Settings::profile`] also transactions, bank conflicts and roles.
    pub record: KernelRecord,
    /// What `vprintf` printed.
    pub printed: String,
    /// Emulated duration in SM clock cycles (the busiest SM's warp instructions).
    pub cycles: u64,
}

impl LaunchReport {
    /// The finding that stopped the launch.
    pub fn fatal(&self) -> Option<&Finding> {
        self.findings.iter().find(|f| f.fatal)
    }
}

/// One kernel launch on one device.
#[derive(Clone, Copy, Debug)]
pub struct Launch<'a> {
    /// The kernel; its module is loaded on the device that runs it.
    pub function: &'a Function,
    /// Grid, block, dynamic shared memory, parameters and attributes.
    pub config: &'a LaunchConfig,
}

impl Device {
    /// Runs a kernel to its end.
    ///
    /// # Errors
    /// [`Error::Launch`] where the configuration does not fit, [`Error::Unsupported`] where the
    /// kernel needs an instruction the emulator does not have. A program that goes wrong is no
    /// `Err`: see [`LaunchReport::findings`].
    pub fn launch(
        &self,
        function: &Function,
        config: &LaunchConfig,
    ) -> Result<LaunchReport, Error> {
        let mut reports = launch_together(&[Launch { function, config }])?;
        Ok(reports.remove(0))
    }
}

/// Runs several launches at the same time, on one or several devices: for kernels that wait for
/// one another. All their CTAs that fit their device take turns on one host thread.
///
/// # Errors
/// As [`Device::launch`]; nothing runs then.
pub fn launch_together(launches: &[Launch<'_>]) -> Result<Vec<LaunchReport>, Error> {
    let mut grids = Vec::with_capacity(launches.len());
    for launch in launches {
        check_launch(launch)?;
        grids.push(launch.function.code()?);
    }
    crate::engine::run(launches, &grids)
}

/// Launches that join others while these run, and who is told of each one's end.
pub trait Joining {
    /// Launches that begin now, beside those that run; asked for now and then. Where `none_left`,
    /// none runs any more, and to give none is the end.
    fn more(&mut self, none_left: bool) -> More;

    /// The launch of this number, counted from 0 as [`Joining::more`] has given them, has ended, or
    /// could not run.
    fn ended(&mut self, launch: usize, report: Result<LaunchReport, Error>);
}

/// What [`Joining::more`] gives.
#[derive(Debug, Default)]
pub struct More {
    /// Launches that begin now.
    pub launches: Vec<(Function, LaunchConfig)>,
    /// Whether something has been done elsewhere since the last call, or is being done: who waits
    /// for it is not deadlocked.
    pub progress: bool,
}

/// Runs launches on this host thread as they come, together with those that have not ended yet.
/// Each is told of as it ends, so that what follows it may come. A fault ends all that run.
pub fn launch_joining(source: &mut dyn Joining) {
    crate::engine::run_joining(source);
}

impl Launch<'_> {
    /// Whether its CTAs take turns on one host thread, as those do that may communicate with other
    /// CTAs or launches, and all where races are looked for.
    pub fn takes_turns(&self) -> bool {
        let races = self.function.module().device().settings().checks.races;
        let communicates = || self.function.code().is_ok_and(|code| code.communicates);
        races || self.config.cooperative || communicates()
    }
}

/// What [`Error::Launch`] calls a cooperative launch whose CTAs are not all resident.
pub const COOPERATIVE_GRID: &str = "cooperative grid";

/// What [`Error::Launch`] calls a cluster that the device does not have.
pub const CLUSTER: &str = "cluster";

/// Whether a launch could run.
///
/// # Errors
/// As [`Device::launch`].
pub fn check_launch(launch: &Launch<'_>) -> Result<(), Error> {
    launch.function.code()?;
    fits(launch)
}

/// Refuses a configuration that does not fit device or kernel.
fn fits(launch: &Launch<'_>) -> Result<(), Error> {
    let (function, config) = (launch.function, launch.config);
    let preset = function.module().device().preset().clone();
    let attributes = function.attributes();
    let fail = |what, expected: String, found: String| {
        Err(Error::Launch { kernel: function.name().into(), what, expected, found })
    };
    let threads: u64 = config.block.iter().map(|&n| u64::from(n)).product();
    if threads == 0 || threads > u64::from(attributes.max_threads) {
        let expected = format!("1 to {} threads", attributes.max_threads);
        return fail("block", expected, format!("{:?}", config.block));
    }
    if let Some(required) = attributes.required_block
        && required.iter().product::<u32>() as u64 != threads
    {
        return fail("block", format!("{required:?}"), format!("{:?}", config.block));
    }
    for d in 0..3 {
        if config.grid[d] == 0 || config.grid[d] > crate::Preset::MAX_GRID[d] {
            let expected = format!("1 to {:?}", crate::Preset::MAX_GRID);
            return fail("grid", expected, format!("{:?}", config.grid));
        }
        if config.block[d] > crate::Preset::MAX_BLOCK[d] {
            let expected = format!("at most {:?}", crate::Preset::MAX_BLOCK);
            return fail("block", expected, format!("{:?}", config.block));
        }
    }
    let cluster = function.cluster(config);
    let ctas: u32 = cluster.iter().product();
    if ctas == 0 || ctas > preset.max_cluster_ctas_nonportable {
        let expected = format!("1 to {} CTAs", preset.max_cluster_ctas_nonportable);
        return fail(CLUSTER, expected, format!("{cluster:?}"));
    }
    if (0..3).any(|d| config.grid[d] % cluster[d] != 0) {
        return fail("grid", format!("multiples of {cluster:?}"), format!("{:?}", config.grid));
    }
    let shared = attributes.static_shared_bytes + config.dynamic_shared_bytes;
    if shared > preset.shared_bytes_per_block_optin {
        let expected = format!("at most {} bytes", preset.shared_bytes_per_block_optin);
        return fail("shared memory", expected, format!("{shared}"));
    }
    if config.cooperative {
        let registers = attributes.registers.clamp(16, 255);
        let most = preset.blocks_per_sm(threads as u32, registers, shared) * preset.sm_count;
        let found: u64 = config.grid.iter().map(|&n| u64::from(n)).product();
        if found > u64::from(most) {
            let expected = format!("at most {most} CTAs, all resident");
            return fail(COOPERATIVE_GRID, expected, format!("{found}"));
        }
    }
    let bytes = function.param_bytes();
    if config.params.len() < bytes {
        return fail("parameters", format!("{bytes} bytes"), format!("{}", config.params.len()));
    }
    Ok(())
}
