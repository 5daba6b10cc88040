//! What a micro-operation sees: the warp that executes it, its cluster, its launch.

use std::sync::{Arc, Mutex};

use super::alu::Vectors;
use super::cluster::Cluster;
use super::op::{Code, Step};
use super::registers::{CONSTANT, LANES, Reg, SINK_SLOTS, Slot, WIDE, WideSlot};
use super::stats::Stats;
use super::warp::{Wait, Warp};
use crate::config::{LaunchConfig, Settings, Tell};
use crate::error::{Finding, Ub};
use crate::heap::Heap;
use crate::machine::checks::global::{Global, Strength, Touched};
use crate::memory::View;
use crate::preset::Preset;
use crate::program::Program;
use crate::texture::Snapshot;

/// What all warps of a launch share.
pub struct Grid {
    /// The kernel's code, lowered.
    pub code: Arc<Code>,
    /// The text it comes from, which findings quote.
    pub program: Arc<Program>,
    /// Literals and addresses, in all lanes: narrow ones, and wide ones below.
    pub constants: Vec<Slot>,
    pub wide_constants: Vec<WideSlot>,
    pub config: LaunchConfig,
    /// CTAs of a cluster in x, y, z: the launch's, or what the kernel requires.
    pub cluster: [u32; 3],
    pub preset: Preset,
    pub settings: Settings,
    /// Global memory as it was allocated when the launch began.
    pub view: View,
    /// Texture and surface objects as they were when the launch began.
    pub objects: Snapshot,
    /// What the launch before touched, where this one may start before its end.
    pub previous: Option<Arc<Touched>>,
    /// Number of the launch in this process (`%gridid`).
    pub seq: u64,
    /// Workspace of a cooperative launch (`%envreg1`, `%envreg2`), else 0.
    pub workspace: u64,
    /// The heap of `malloc`, where the code calls it.
    pub heap: Option<Arc<Mutex<Heap>>>,
    /// Shared memory of a CTA up to its end, reserved part included; hardware allocates it in whole
    /// units.
    pub shared_end: u32,
    /// Up to where the kernel and its launch ask for it.
    pub shared_asked: u32,
    /// The instructions of the CPU that `super::alu` compiles for.
    pub vectors: Vectors,
    /// Whether several host threads run this launch.
    pub parallel: bool,
}

impl Grid {
    /// Counters of the launch, all zero: one a micro-operation and, with a profile, warp of a CTA.
    pub fn stats(&self) -> Stats {
        let threads: u32 = self.config.block.iter().product();
        let warps = if self.settings.profile { threads.div_ceil(32) as usize } else { 0 };
        Stats::new(self.code.ops.len(), warps)
    }

    /// Clusters of the launch.
    pub fn clusters(&self) -> u64 {
        (0..3).map(|d| u64::from(self.config.grid[d] / self.cluster[d])).product()
    }
}

/// The state of one turn of one warp.
pub struct Cx<'a> {
    /// Lanes that execute the present operation: those of the group whose guard holds.
    pub mask: u32,
    /// All lanes of the group, guarded off or not.
    pub active: u32,
    /// First slot of the frame, the same in both register files.
    pub base: usize,
    /// First predicate of the frame.
    pub pred_base: usize,
    /// Byte of local memory at which the frame begins.
    pub local_base: u32,
    /// Index of the present operation in [`Code::ops`].
    pub pc: u32,
    /// The group that runs, an index into [`Warp::groups`].
    pub at: usize,
    pub w: &'a mut Warp,
    pub cluster: &'a mut Cluster,
    /// Rank of the warp's CTA.
    pub cta: usize,
    pub grid: &'a Grid,
    pub stats: &'a mut Stats,
    /// Counts what other warps may notice: stores, arrivals, exits.
    pub changes: &'a mut u64,
    /// Nothing else can go on: waits with a time limit give up, incomplete gatherings proceed.
    pub stalled: bool,
    pub fault: Option<Box<Finding>>,
    /// The next shared store is that of a cp.async.
    pub copying: bool,
    /// Bytes of the present load whose values nothing reads, as a mask.
    pub idle_bytes: u32,
    /// How strong the present memory operation is.
    pub strength: Strength,
    /// The race check of global memory, where it is on.
    pub global: Option<&'a mut Global>,
}

impl<'a> Cx<'a> {
    /// The 32 lanes of a 32-bit register, or of a narrow constant.
    #[inline(always)]
    pub fn slot(&self, reg: Reg) -> &[u32; LANES] {
        debug_assert!(reg & WIDE == 0, "register {reg:#x} has 64 bits");
        if reg & CONSTANT == 0 {
            &self.w.regs[self.base + reg as usize].0
        } else {
            &self.grid.constants[(reg & !CONSTANT) as usize].0
        }
    }

    /// As [`Self::slot`], to be written: in all lanes, so that the caller minds [`Self::mask`].
    #[inline(always)]
    pub fn slot_mut(&mut self, reg: Reg) -> &mut [u32; LANES] {
        debug_assert!(reg & WIDE == 0, "register {reg:#x} has 64 bits");
        &mut self.w.regs[self.base + reg as usize].0
    }

    /// The 32 lanes of a 64-bit register, or of a wide constant.
    #[inline(always)]
    pub fn slot64(&self, reg: Reg) -> &[u64; LANES] {
        debug_assert!(reg & WIDE != 0, "register {reg:#x} has 32 bits");
        let i = (reg & !(CONSTANT | WIDE)) as usize;
        if reg & CONSTANT == 0 {
            &self.w.wide_regs[self.base + i].0
        } else {
            &self.grid.wide_constants[i].0
        }
    }

    /// As [`Self::slot64`], to be written: in all lanes, so that the caller minds [`Self::mask`].
    #[inline(always)]
    pub fn slot64_mut(&mut self, reg: Reg) -> &mut [u64; LANES] {
        let sink = u32::from(reg) < SINK_SLOTS;
        debug_assert!(reg & WIDE != 0 || sink, "register {reg:#x} has 32 bits");
        &mut self.w.wide_regs[self.base + (reg & !WIDE) as usize].0
    }

    /// A predicate as a mask of lanes.
    #[inline(always)]
    pub fn pred(&self, p: Reg) -> u32 {
        match p {
            PRED_TRUE => !0,
            PRED_FALSE => 0,
            p => self.w.preds[self.pred_base + p as usize],
        }
    }

    /// Writes the executing lanes of a predicate.
    #[inline(always)]
    pub fn set_pred(&mut self, p: Reg, value: u32) {
        if p != PRED_SINK {
            let to = &mut self.w.preds[self.pred_base + p as usize];
            *to = *to & !self.mask | value & self.mask;
        }
    }

    /// The executing lanes, in order.
    pub fn lanes(&self) -> impl Iterator<Item = usize> + use<> {
        let mut mask = self.mask;
        std::iter::from_fn(move || {
            let lane = mask.trailing_zeros() as usize;
            mask &= mask.wrapping_sub(1);
            (lane < LANES).then_some(lane)
        })
    }

    /// The lowest executing lane.
    pub fn leader(&self) -> usize {
        self.mask.trailing_zeros() as usize
    }

    /// The warp waits and tries the same operation again.
    pub fn block(&mut self, wait: Wait) -> Step {
        self.w.groups[self.at].wait = wait;
        self.w.barrier_waits += 1;
        Step::Block
    }

    /// For `.aligned` instructions: waits until the live lanes of `required` execute
    /// together. `None`: they do (or never will, which is reported).
    pub fn converge(&mut self, required: u32) -> Option<Step> {
        let need = required & self.w.live;
        if self.mask & need == need {
            return None;
        }
        if self.active & need == need {
            // The guard excludes lanes that the instruction counts on.
            self.divergence(need & !self.mask);
            return None;
        }
        self.w.groups[self.at].pc = self.pc;
        let before = self.w.groups.len();
        self.w.gather(self.at, !0);
        if self.w.groups.len() != before {
            return Some(Step::Regrouped);
        }
        if self.stalled {
            self.divergence(need & !self.mask);
            return None;
        }
        Some(self.block(Wait::Lanes { mask: need }))
    }

    fn divergence(&mut self, missing: u32) {
        if self.grid.settings.checks.sync {
            let message = format!("lanes {missing:#010x} are required and do not take part");
            self.report(Ub::Divergence, None, None, message);
        }
    }

    /// Rank of this CTA in its cluster.
    pub fn rank(&self) -> u32 {
        self.cta as u32
    }

    fn finding(
        &self,
        kind: Ub,
        lane: Option<usize>,
        address: Option<u64>,
        message: String,
    ) -> Finding {
        let line = self.grid.code.ops[self.pc as usize].line;
        Finding {
            kind,
            kernel: self.grid.code.name.clone(),
            line,
            instruction: self.grid.program.line(line).to_owned(),
            source: self.grid.program.source_of(line),
            cta: self.cluster.ctas[self.cta].id,
            warp: self.w.index,
            lane: lane.map(|l| l as u32),
            address,
            allocation: None,
            message,
            fatal: false,
            count: 1,
        }
    }

    /// Reports and goes on. The same kind at the same line is counted, not repeated.
    pub fn report(&mut self, kind: Ub, lane: Option<usize>, address: Option<u64>, message: String) {
        self.report_about(kind, lane, address, None, message);
    }

    /// Reports with a sentence about the memory in question.
    pub fn report_about(
        &mut self,
        kind: Ub,
        lane: Option<usize>,
        address: Option<u64>,
        allocation: Option<String>,
        message: String,
    ) {
        let line = self.grid.code.ops[self.pc as usize].line;
        let mut known = self.stats.findings.iter_mut();
        if let Some(known) = known.find(|f| f.kind == kind && f.line == line) {
            known.count += 1;
            return;
        }
        let finding = Finding { allocation, ..self.finding(kind, lane, address, message) };
        if let Some(Tell(tell)) = self.grid.settings.tell {
            tell(&finding);
        }
        self.stats.findings.push(finding);
    }

    /// Stops the launch with a fatal finding, its last.
    pub fn fail(
        &mut self,
        kind: Ub,
        lane: Option<usize>,
        address: Option<u64>,
        message: impl Into<String>,
    ) -> Step {
        let mut finding = self.finding(kind, lane, address, message.into());
        finding.fatal = true;
        self.fault = Some(Box::new(finding));
        Step::Fault
    }
}

/// Stands for a predicate that holds in all lanes; no register has this number.
pub const PRED_TRUE: Reg = 0xfffe;
/// Stands for a predicate that holds in no lane.
pub const PRED_FALSE: Reg = 0xfffd;
/// Destination predicate `_`: what is written there is dropped.
pub const PRED_SINK: Reg = 0xfffc;
