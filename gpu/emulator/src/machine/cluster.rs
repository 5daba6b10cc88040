//! A cluster of CTAs as it runs: shared memory, barriers, mbarriers' waiters, warps.

use std::collections::BTreeMap;
use std::rc::Rc;

use fathom_numerics::gemm::tensor_core::Packed;

use super::sectors::Cache;
use super::warp::Warp;
use crate::machine::checks::sanitizer::Sanitizer;

/// A named barrier of a CTA (`bar.sync` and its kin).
#[derive(Clone, Debug)]
pub struct NamedBarrier {
    /// Threads that have arrived in this generation, in whole warps.
    pub arrived: u32,
    /// Threads expected, as the arrivals so far say; 0 where all of the CTA are meant.
    pub expected: Option<u32>,
    /// How many times it has completed.
    pub generation: u64,
    /// Reduction so far of `bar.red`: popc, and, or.
    pub popc: u32,
    pub and: bool,
    pub or: bool,
    /// Result of the last generation.
    pub result: (u32, bool, bool),
}

impl Default for NamedBarrier {
    fn default() -> Self {
        NamedBarrier {
            arrived: 0,
            expected: None,
            generation: 0,
            popc: 0,
            and: true,
            or: false,
            result: (0, true, false),
        }
    }
}

impl NamedBarrier {
    /// Completes the generation if all that are expected have arrived.
    pub fn settle(&mut self, live_threads: u32) -> bool {
        let expected = self.expected.unwrap_or(live_threads);
        if self.arrived == 0 || self.arrived < expected {
            return false;
        }
        self.result = (self.popc, self.and, self.or);
        (self.popc, self.and, self.or) = (0, true, false);
        self.arrived = 0;
        self.expected = None;
        self.generation += 1;
        true
    }
}

/// How far the four warps of a warpgroup have come with their groups of wgmmas.
#[derive(Clone, Debug, Default)]
pub struct Warpgroup {
    /// Groups of which each warp has come to the first wgmma.
    pub begun: [u64; 4],
    /// Groups that each warp has committed.
    pub committed: [u64; 4],
}

/// A CTA as it runs: its shared memory, its warps, and what they wait for in it.
pub struct Cta {
    /// Its place in the grid.
    pub id: [u32; 3],
    /// Its number in the grid, x fastest.
    pub linear: u64,
    /// Rank in the cluster.
    pub rank: u32,
    /// Shared memory in words, from address 0 of its window; the reserved part comes first.
    pub shared: Vec<u32>,
    /// Writes to each KiB of shared memory, by which packed copies of it go stale.
    pub versions: Vec<u32>,
    /// Operands of wgmma that were packed for the matrix kernels, for the warps that follow.
    pub tiles: Vec<CachedTile>,
    /// The warps; a warp is taken out while it runs.
    pub warps: Vec<Option<Box<Warp>>>,
    pub barriers: BTreeMap<u32, NamedBarrier>,
    pub warpgroups: Vec<Warpgroup>,
    /// Threads that have not exited.
    pub live_threads: u32,
    /// Its share of the first-level cache, where a profile is wanted.
    pub cache: Cache,
    /// Registers a thread of each warpgroup, where `setmaxnreg` takes effect.
    pub registers: Vec<u32>,
    /// The `setmaxnreg` that each warpgroup has executed: its count and its line.
    pub register_log: Vec<Vec<(u32, u32)>>,
}

/// A packed B operand of wgmma.
pub struct CachedTile {
    /// Instructions and their descriptors.
    pub key: Vec<(usize, u64)>,
    /// The bytes of shared memory that it may come from.
    pub span: (usize, usize),
    /// [`Cta::version_of`] that span when it was packed.
    pub version: u64,
    pub packed: Rc<Packed>,
}

impl Cta {
    /// Notes a write to a range of shared memory.
    #[inline]
    pub fn touch(&mut self, offset: usize, bytes: usize) {
        let last = ((offset + bytes.max(1) - 1) / 1024).min(self.versions.len() - 1);
        for version in &mut self.versions[offset / 1024..=last] {
            *version = version.wrapping_add(1);
        }
    }

    /// A number that changes with every write to the range.
    pub fn version_of(&self, (from, to): (usize, usize)) -> u64 {
        let last = (to / 1024).min(self.versions.len() - 1);
        let first = (from / 1024).min(last);
        self.versions[first..=last].iter().map(|&v| u64::from(v)).sum()
    }
}

/// The CTAs of a cluster (one CTA where the launch has no clusters).
pub struct Cluster {
    pub ctas: Vec<Cta>,
    /// Threads that have arrived at the cluster barrier, and its completed generations.
    pub barrier_arrived: u32,
    pub barrier_generation: u64,
    /// What is known of shared memory, where `races` or `uninit` is checked.
    pub sanitizer: Option<Box<Sanitizer>>,
}

impl Cluster {
    /// Threads of all CTAs that have not exited.
    pub fn live_threads(&self) -> u32 {
        self.ctas.iter().map(|c| c.live_threads).sum()
    }

    /// Whether all threads have exited.
    pub fn done(&self) -> bool {
        self.live_threads() == 0
    }

    /// Completes the cluster barrier if all live threads have arrived.
    pub fn settle_barrier(&mut self) -> bool {
        let live = self.live_threads();
        if live > 0 && self.barrier_arrived >= live {
            self.barrier_arrived = 0;
            self.barrier_generation += 1;
            return true;
        }
        false
    }
}

/// The CTA of a rank of a cluster of a launch.
pub fn cta_id(grid: [u32; 3], cluster: [u32; 3], index: u64, rank: u32) -> [u32; 3] {
    let shape: [u64; 3] = std::array::from_fn(|d| u64::from(grid[d] / cluster[d]));
    let id = [index % shape[0], index / shape[0] % shape[1], index / shape[0] / shape[1]];
    let [cx, cy, _] = cluster;
    let inner = [rank % cx, rank / cx % cy, rank / cx / cy];
    std::array::from_fn(|d| id[d] as u32 * cluster[d] + inner[d])
}
