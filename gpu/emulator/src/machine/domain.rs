//! Clusters that take turns on one host thread, and what happens when none can go on.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::sync::Arc;

use super::cluster::{Cluster, Cta, Warpgroup, cta_id};
use super::cx::Grid;
use super::mbarrier::Mbarrier;
use super::sectors::{BYTES, Cache};
use super::stats::Stats;
use super::turn::{self, Around, Turn};
use super::warp::{Wait, Warp};
use crate::error::{Finding, Ub};
use crate::machine::checks::global::Global;
use crate::machine::checks::sanitizer::Sanitizer;
use crate::preset::Preset;

/// First-level cache and shared memory of an SM together (NVIDIA, "Hopper Tuning Guide", section
/// 1.4.2.4).
const FIRST_LEVEL_BYTES: u32 = 256 * 1024;

/// Rounds of given-up waits without any change of memory or barriers that mean deadlock.
const VAIN_ROUNDS: u32 = 64;

struct Resident {
    grid: usize,
    cluster: Cluster,
}

/// A set of clusters, of one or several launches.
pub struct Domain {
    /// The launches in the order in which they came; what has ended is let go.
    grids: Vec<Option<Arc<Grid>>>,
    resident: Vec<Resident>,
    /// Next cluster of each launch, and where its clusters end.
    next: Vec<(u64, u64)>,
    capacity: Vec<usize>,
    pub stats: Vec<Stats>,
    /// The race check of global memory.
    pub global: Option<Global>,
    changes: u64,
    round: u64,
    /// Launches that have ended and that nobody has taken note of.
    ended: Vec<usize>,
    /// Whether every warp that could go on gave its turn away in the last round.
    pub yields: bool,
    stalled: bool,
    /// Rounds of given-up waits since something changed.
    vain: u32,
    ran_in_vain: u64,
    total: u64,
}

impl Domain {
    /// No launch yet; `races`: whether those to come are checked for races on global memory.
    pub fn new(races: bool) -> Domain {
        Domain {
            grids: Vec::new(),
            resident: Vec::new(),
            next: Vec::new(),
            capacity: Vec::new(),
            stats: Vec::new(),
            global: races.then(Global::default),
            changes: 0,
            round: 0,
            ended: Vec::new(),
            yields: false,
            stalled: false,
            vain: 0,
            ran_in_vain: 0,
            total: 0,
        }
    }

    /// One cluster of a launch.
    pub fn of_cluster(grid: &Arc<Grid>, index: u64, stats: Stats) -> Domain {
        let mut domain = Domain::new(false);
        domain.grids.push(Some(Arc::clone(grid)));
        domain.next.push((index, index + 1));
        domain.capacity.push(1);
        domain.stats.push(stats);
        domain.admit();
        domain
    }

    /// All clusters of a launch, beside those that run already; what has ended comes before it.
    pub fn add(&mut self, grid: Arc<Grid>) {
        if let Some(global) = &mut self.global {
            let threads = grid.config.block.iter().product();
            let shape = (grid.config.grid, grid.cluster);
            global.add_launch(&grid.code.name, shape, threads, grid.previous.clone());
        }
        self.next.push((0, grid.clusters()));
        self.capacity.push(capacity(&grid));
        self.stats.push(grid.stats());
        self.grids.push(Some(grid));
        self.admit();
    }

    /// Whether no launch runs.
    pub fn is_empty(&self) -> bool {
        self.resident.is_empty()
    }

    /// The launches that have ended since the last call, by their number.
    pub fn ended(&mut self) -> Vec<usize> {
        std::mem::take(&mut self.ended)
    }

    /// The launches that have not ended.
    pub fn left(&self) -> Vec<usize> {
        (0..self.grids.len()).filter(|&at| self.grids[at].is_some()).collect()
    }

    /// Somebody outside does something that may let the warps here go on: they do not wait in vain.
    pub fn changed_outside(&mut self) {
        (self.vain, self.ran_in_vain) = (0, 0);
    }

    fn grid(&self, at: usize) -> &Arc<Grid> {
        self.grids[at].as_ref().expect("it has not ended")
    }

    fn admit(&mut self) {
        for at in 0..self.grids.len() {
            let Some(grid) = &self.grids[at] else { continue };
            let mut running = self.resident.iter().filter(|r| r.grid == at).count();
            while running < self.capacity[at] && self.next[at].0 < self.next[at].1 {
                let index = self.next[at].0;
                let base = self.global.as_ref().map_or(0, |g| g.base_of(at, index));
                let cluster = new_cluster(grid, index, base);
                self.next[at].0 += 1;
                self.resident.push(Resident { grid: at, cluster });
                running += 1;
            }
            if running == 0 {
                self.grids[at] = None;
                self.ended.push(at);
                if let Some(global) = &mut self.global {
                    global.end_launch(at);
                }
            }
        }
    }

    /// Runs all clusters to their end, or to the first fault: (launch, finding).
    pub fn run(&mut self) -> Option<(usize, Box<Finding>)> {
        while !self.is_empty() {
            if let Some(fault) = self.round() {
                return Some(fault);
            }
        }
        None
    }

    /// A turn of every warp; the first fault, if any: (launch, finding).
    pub fn round(&mut self) -> Option<(usize, Box<Finding>)> {
        let first = self.resident.first()?.grid;
        let (limit, patience) = {
            let settings = &self.grid(first).settings;
            (settings.limit, settings.patience)
        };
        let changes = self.changes;
        let mut ran = 0;
        self.yields = true;
        for at in 0..self.resident.len() {
            match self.turn_of_cluster(at) {
                Ok(n) => ran += n,
                Err(finding) => return Some((self.resident[at].grid, finding)),
            }
        }
        self.round += 1;
        self.total += ran;
        if limit > 0 && self.total > limit && self.resident.iter().any(|r| !r.cluster.done()) {
            let (grid, mut finding) = self.deadlock();
            finding.message = format!("stopped after {} warp instructions", self.total);
            return Some((grid, finding));
        }
        let before = self.resident.len();
        self.resident.retain(|r| !r.cluster.done());
        if self.resident.len() != before {
            self.admit();
        }
        if self.changes != changes {
            (self.stalled, self.vain, self.ran_in_vain) = (false, 0, 0);
            return None;
        }
        self.ran_in_vain += ran;
        let stuck = ran == 0 && self.stalled || self.vain > VAIN_ROUNDS;
        if stuck || self.ran_in_vain > patience {
            return Some(self.deadlock());
        }
        if ran == 0 {
            self.stalled = true;
        } else if self.stalled {
            self.vain += 1;
            self.stalled = false;
        }
        None
    }

    fn turn_of_cluster(&mut self, at: usize) -> Result<u64, Box<Finding>> {
        let grid = Arc::clone(self.grid(self.resident[at].grid));
        let grid = &*grid;
        let resident = &mut self.resident[at];
        let cluster = &mut resident.cluster;
        let warps = cluster.ctas[0].warps.len();
        let total = warps * cluster.ctas.len();
        let start = match grid.settings.schedule_seed {
            0 => 0,
            seed => permute(seed, self.round, at as u64),
        };
        let mut ran = 0;
        for i in 0..total {
            let i = (i + start as usize) % total;
            let (cta, warp) = (i / warps, i % warps);
            let Some(mut w) = cluster.ctas[cta].warps[warp].take() else { continue };
            if !w.done() {
                let around = Around {
                    cluster,
                    cta,
                    grid,
                    stats: &mut self.stats[resident.grid],
                    changes: &mut self.changes,
                    stalled: self.stalled,
                    global: self.global.as_mut(),
                };
                let outcome = turn::run(&mut w, around, u64::from(grid.settings.quantum));
                match outcome {
                    Turn::Ran(n) => {
                        ran += n;
                        self.yields &= n == 0;
                    }
                    Turn::Yielded(n) => ran += n,
                    Turn::Fault(finding) => return Err(finding),
                }
            }
            let done = w.done();
            if done {
                self.stats[resident.grid].retire(&w);
            }
            cluster.ctas[cta].warps[warp] = (!done).then_some(w);
        }
        Ok(ran)
    }

    /// The report that nobody can go on, with every warp's position.
    fn deadlock(&self) -> (usize, Box<Finding>) {
        let mut positions: BTreeMap<(u32, String), Vec<String>> = BTreeMap::new();
        for resident in &self.resident {
            let grid = self.grid(resident.grid);
            for cta in &resident.cluster.ctas {
                for warp in cta.warps.iter().flatten() {
                    for group in warp.groups.iter() {
                        let line = grid.code.ops[group.pc as usize].line;
                        let who =
                            format!("CTA {:?} warp {} lanes {:#x}", cta.id, warp.index, group.mask);
                        let what = describe_wait(group.wait, &resident.cluster, cta.rank);
                        positions.entry((line, what)).or_default().push(who);
                    }
                }
            }
        }
        let mut message = String::from("no warp can go on:");
        for ((line, what), who) in &positions {
            let text = self.grid(self.resident[0].grid).program.line(*line);
            write!(message, "\n  line {line}: {text}\n    {what}: {}", who.join(", "))
                .expect("writing to a String");
        }
        // To blame is who waits for the most particular thing.
        let mut blamed = None;
        for resident in &self.resident {
            for cta in &resident.cluster.ctas {
                for warp in cta.warps.iter().flatten() {
                    for group in &warp.groups {
                        let rank = particular(group.wait);
                        if blamed.as_ref().is_none_or(|b: &Blamed<'_>| rank > b.rank) {
                            blamed = Some(Blamed { rank, resident, cta, warp, group });
                        }
                    }
                }
            }
        }
        let Blamed { resident, cta, warp, group, .. } = blamed.expect("somebody waits");
        let grid = self.grid(resident.grid);
        let line = grid.code.ops[group.pc as usize].line;
        let finding = Finding {
            kind: Ub::Deadlock,
            kernel: grid.code.name.clone(),
            line,
            instruction: grid.program.line(line).to_owned(),
            source: grid.program.source_of(line),
            cta: cta.id,
            warp: warp.index,
            lane: None,
            address: match group.wait {
                Wait::Mbarrier { address, .. } => Some(address),
                _ => None,
            },
            allocation: None,
            message,
            fatal: true,
            count: 1,
        };
        (resident.grid, Box::new(finding))
    }
}

/// A waiting group, and how telling its wait is.
struct Blamed<'a> {
    rank: u32,
    resident: &'a Resident,
    cta: &'a Cta,
    warp: &'a Warp,
    group: &'a super::warp::Group,
}

fn particular(wait: Wait) -> u32 {
    match wait {
        Wait::Ready => 1,
        Wait::Cluster => 2,
        Wait::Lanes { .. } | Wait::Members { .. } | Wait::Warpgroup { .. } => 3,
        Wait::Barrier { .. } => 4,
        Wait::Registers { .. } => 5,
        Wait::Mbarrier { .. } => 6,
    }
}

fn describe_wait(wait: Wait, cluster: &Cluster, rank: u32) -> String {
    match wait {
        Wait::Ready => "runs without changing anything".into(),
        Wait::Barrier { id, .. } => format!("waits at barrier {id}"),
        Wait::Lanes { mask } => format!("waits for lanes {mask:#010x}"),
        Wait::Members { missing } => {
            format!("waits for lanes {missing:#010x} of its mask, which do not execute the like")
        }
        Wait::Cluster => "waits at the cluster barrier".into(),
        Wait::Warpgroup { missing } => {
            format!("waits for the wgmmas of warps {missing:#06b} of its warpgroup")
        }
        Wait::Mbarrier { address, parity } => {
            let state = mbarrier_state(cluster, rank, address).unwrap_or_default();
            format!("waits for phase parity {parity} of the mbarrier at {address:#x}{state}")
        }
        Wait::Registers { wanted } => {
            format!("waits for registers, to have {wanted} a thread")
        }
    }
}

/// What an mbarrier still misses.
fn mbarrier_state(cluster: &Cluster, rank: u32, address: u64) -> Option<String> {
    let cta = if address >> 24 == 0 { rank as usize } else { (address >> 24) as usize };
    let words = &cluster.ctas.get(cta)?.shared;
    let at = (address & 0xff_ffff) as usize / 4;
    let bits = u64::from(*words.get(at)?) | u64::from(*words.get(at + 1)?) << 32;
    let b = Mbarrier::unpack(bits);
    let (pending, expected) = (b.pending, b.expected);
    Some(format!(", which misses {pending} of {expected} arrivals and {} bytes", b.transactions))
}

/// A number that depends on the seed, the round and the cluster (SplitMix64's finaliser).
fn permute(seed: u64, round: u64, at: u64) -> u64 {
    let mut z = seed ^ round.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ at.rotate_left(32);
    z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    (z ^ z >> 31) >> 1
}

/// Clusters of a launch that its device holds at once.
fn capacity(grid: &Grid) -> usize {
    let ctas: u32 = grid.cluster.iter().product();
    (ctas_per_sm(grid) * grid.preset.sm_count / ctas).max(1) as usize
}

fn ctas_per_sm(grid: &Grid) -> u32 {
    let threads: u32 = grid.config.block.iter().product();
    let shared = grid.shared_asked - grid.preset.shared_bytes_reserved;
    grid.preset.blocks_per_sm(threads, grid.code.outline.registers.clamp(16, 255), shared).max(1)
}

/// Bytes of a CTA's share of the first-level cache: what the shared memory of the CTAs on an SM
/// leaves of the memory that both are parts of.
fn cache_share(grid: &Grid) -> u32 {
    if !grid.settings.profile {
        return 0;
    }
    let ctas = ctas_per_sm(grid);
    (FIRST_LEVEL_BYTES.saturating_sub(ctas * grid.shared_asked) / ctas).max(BYTES as u32)
}

/// Cluster number `index` of a launch, x fastest, its warps at the first instruction.
fn new_cluster(grid: &Grid, index: u64, base: u32) -> Cluster {
    let count: u32 = grid.cluster.iter().product();
    let threads: u32 = grid.config.block.iter().product();
    let function = &grid.code.functions[0];
    let ctas = (0..count)
        .map(|rank| {
            let cta = cta_id(grid.config.grid, grid.cluster, index, rank);
            let [gx, gy, _] = grid.config.grid.map(u64::from);
            let linear = (u64::from(cta[2]) * gy + u64::from(cta[1])) * gx + u64::from(cta[0]);
            let warps = (0..threads.div_ceil(Preset::WARP)).map(|w| {
                let left = threads - w * 32;
                let mask = if left >= 32 { !0 } else { (1 << left) - 1 };
                let mut warp = Warp::new(w, mask, function);
                warp.grow_local(function.local_bytes);
                Some(Box::new(warp))
            });
            Cta {
                id: cta,
                linear,
                rank,
                shared: vec![0; grid.shared_end.div_ceil(4) as usize],
                versions: vec![0; grid.shared_end.div_ceil(1024).max(1) as usize],
                tiles: Vec::new(),
                warps: warps.collect(),
                barriers: BTreeMap::new(),
                warpgroups: vec![Warpgroup::default(); threads.div_ceil(128) as usize],
                live_threads: threads,
                registers: grid
                    .code
                    .launch_registers
                    .map(|r| vec![r; threads.div_ceil(128) as usize])
                    .unwrap_or_default(),
                register_log: Vec::new(),
                cache: Cache::new(cache_share(grid)),
            }
        })
        .collect();
    let checks = grid.settings.checks;
    let sanitizer = (checks.races || checks.uninit || checks.sync).then(|| {
        let (warps, bytes) = (threads.div_ceil(32) as usize, grid.shared_end as usize);
        let sanitizer = Sanitizer::new(count as usize, warps, bytes, base);
        Box::new(sanitizer.checking(checks.races, checks.uninit))
    });
    Cluster { ctas, barrier_arrived: 0, barrier_generation: 0, sanitizer }
}
