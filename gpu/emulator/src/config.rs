//! What a run is asked for: the settings of a device and the configuration of a launch.
//!
//! The machine reads them; what makes and changes them is [`crate::Device`] and the caller.

use serde::{Deserialize, Serialize};

use crate::error::Finding;

/// Which sanitizers run. All off costs nothing; out-of-bounds, misaligned and freed accesses to
/// global memory stop a launch in any case, as the hardware does.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Checks {
    /// Accesses beyond a variable of shared or local memory, beyond a TMA box.
    pub memory: bool,
    /// Shared-memory races, missing proxy fences, operands of asynchronous operations touched
    /// too early, races between CTAs on plain accesses.
    pub races: bool,
    /// Reads of memory that nobody wrote. Set it before allocating.
    pub uninit: bool,
    /// Barrier and mbarrier misuse, divergent `.aligned` instructions.
    pub sync: bool,
}

impl Checks {
    /// All four on.
    pub const ALL: Checks = Checks { memory: true, races: true, uninit: true, sync: true };

    /// Whether any is on.
    pub fn any(self) -> bool {
        self != Checks::default()
    }

    /// Reads a comma-separated list (`memory,races,uninit,sync`, `all`, or empty).
    ///
    /// # Errors
    /// The word that is none of them.
    pub fn parse(list: &str) -> Result<Checks, String> {
        let mut checks = Checks::default();
        for word in list.split(',').map(str::trim).filter(|w| !w.is_empty()) {
            match word {
                "memory" => checks.memory = true,
                "races" => checks.races = true,
                "uninit" => checks.uninit = true,
                "sync" => checks.sync = true,
                "all" => checks = Checks::ALL,
                other => {
                    return Err(format!(
                        "no check '{other}': known are memory, races, uninit, sync, all"
                    ));
                }
            }
        }
        Ok(checks)
    }
}

/// Who is told of a finding as soon as it is made, on the thread that made it; kernels run on.
#[derive(Clone, Copy, Debug)]
pub struct Tell(pub fn(&Finding));

impl PartialEq for Tell {
    fn eq(&self, other: &Tell) -> bool {
        std::ptr::fn_addr_eq(self.0, other.0)
    }
}

impl Eq for Tell {}

/// Settings of a device's launches.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settings {
    /// Which sanitizers watch.
    pub checks: Checks,
    /// Permutes the order in which warps and CTAs take turns; 0 is launch order. Results of a
    /// correct kernel do not depend on it.
    pub schedule_seed: u64,
    /// Instructions a warp runs before the next one gets its turn.
    pub quantum: u32,
    /// Whether launches count transactions, bank conflicts and roles for their kernel record.
    pub profile: bool,
    /// Warp instructions without any store, atomic or barrier after which waiting warps are
    /// declared deadlocked.
    pub patience: u64,
    /// Warp instructions of a run after which it is stopped as if it were deadlocked; 0: none.
    pub limit: u64,
    /// Host threads at most; 0 is rayon's choice.
    pub threads: usize,
    /// Who is told of findings before the launch ends; once for each place and launch, and host
    /// thread.
    pub tell: Option<Tell>,
}

impl Default for Settings {
    fn default() -> Self {
        Settings {
            checks: Checks::default(),
            schedule_seed: 0,
            quantum: 2000,
            profile: false,
            patience: 200_000_000,
            limit: 0,
            threads: 0,
            tell: None,
        }
    }
}

/// How to launch a kernel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LaunchConfig {
    /// CTAs in x, y, z.
    pub grid: [u32; 3],
    /// Threads of a CTA in x, y, z.
    pub block: [u32; 3],
    /// CTAs of a cluster in x, y, z; all 1 where there is none. The kernel's own
    /// `.reqnctapercluster` holds where this says 1.
    pub cluster: [u32; 3],
    /// Dynamic shared memory of a CTA in bytes.
    pub dynamic_shared_bytes: u32,
    /// The parameters laid out as [`crate::Function::params`] says.
    pub params: Vec<u8>,
    /// All CTAs are resident at once (grid sync).
    pub cooperative: bool,
    /// Launched with programmatic stream serialisation; launches here run one after another, so
    /// `griddepcontrol.wait` never waits.
    pub pdl: bool,
}

impl LaunchConfig {
    /// A launch without cluster, dynamic shared memory or attributes.
    pub fn new(grid: [u32; 3], block: [u32; 3], params: Vec<u8>) -> Self {
        LaunchConfig {
            grid,
            block,
            cluster: [1; 3],
            dynamic_shared_bytes: 0,
            params,
            cooperative: false,
            pdl: false,
        }
    }
}

/// Packs kernel parameters: each value at its natural alignment, in order.
#[derive(Clone, Debug, Default)]
pub struct Params(Vec<u8>);

impl Params {
    /// An empty list, to be filled by [`Self::with`] in the order of the kernel's parameters.
    pub fn new() -> Self {
        Self::default()
    }

    /// Appends a value at an offset that is a multiple of its size.
    #[must_use]
    pub fn with<T: bytemuck::NoUninit>(self, value: T) -> Self {
        let bytes = bytemuck::bytes_of(&value);
        self.with_bytes(bytes, bytes.len().next_power_of_two().min(16))
    }

    /// Appends bytes at a multiple of `align`.
    #[must_use]
    pub fn with_bytes(mut self, bytes: &[u8], align: usize) -> Self {
        self.0.resize(self.0.len().next_multiple_of(align.max(1)), 0);
        self.0.extend_from_slice(bytes);
        self
    }

    /// The bytes, for [`LaunchConfig::params`].
    pub fn into_bytes(self) -> Vec<u8> {
        self.0
    }
}
