//! What instructions tell the sanitizer of shared memory, and how its answers become findings.
//!
//! Execution is in order and asynchronous work is done at once, so none of this changes a value.

use fathom_ptx::table::Opcode;

use crate::error::Ub;
use crate::machine::access::Words;
use crate::machine::checks::global::Strength;
use crate::machine::checks::lanes::WARP;
use crate::machine::checks::sanitizer::{Flight, Problem, Range, Reader, Sanitizer, Who, Writer};
use crate::machine::cx::Cx;
use crate::machine::op::Step;
use crate::machine::registers::LANES;

impl Cx<'_> {
    /// A warp has arrived at a named barrier; `done`: it was the last.
    pub fn barrier_crossed(&mut self, id: u32, waits: bool, done: bool) {
        let cta = self.cta;
        self.with_sanitizer(|s, who| {
            s.barrier_arrive(who.warp, cta, id, done);
            if done && waits {
                s.barrier_leave(who.warp, cta, id);
            }
        });
    }

    /// A warp goes on after a named barrier.
    pub fn barrier_left(&mut self, id: u32) {
        let cta = self.cta;
        self.with_sanitizer(|s, who| s.barrier_leave(who.warp, cta, id));
    }

    /// Calls `f` where a sanitizer runs.
    pub fn with_sanitizer(&mut self, f: impl FnOnce(&mut Sanitizer, Who)) {
        if let Some(s) = &mut self.cluster.sanitizer {
            let line = self.grid.code.ops[self.pc as usize].line;
            let warp = s.warp(self.cta, self.w.index);
            s.executing = self.mask;
            f(s, Who { warp, lane: WARP, line, proxy: false });
        }
    }

    fn tell(&mut self, lane: Option<usize>, address: u64, problem: Option<Problem>) {
        if let Some((kind, message)) = problem {
            self.report(kind, lane, Some(address), message);
        }
    }

    fn range(address: u64, bytes: u64) -> Range {
        ((address >> 24) as usize, (address & 0xff_ffff) as usize, bytes as usize)
    }

    fn inside(&self, address: u64) -> bool {
        let offset = (address & 0xff_ffff) as u32;
        let reserved = self.grid.preset.shared_bytes_reserved;
        ((address >> 24) as usize) < self.cluster.ctas.len()
            && (reserved..self.grid.shared_end).contains(&offset)
    }

    /// Shared access of the executing lanes.
    pub fn sanitize_shared(
        &mut self,
        addresses: &[u64; LANES],
        bytes: u64,
        written: Option<&Words>,
    ) -> Result<(), Step> {
        let write = written.is_some();
        if self.cluster.sanitizer.is_none() {
            return Ok(());
        }
        let pending = std::mem::take(&mut self.copying);
        let strong = self.strength != Strength::Weak;
        for lane in self.lanes() {
            let address = addresses[lane];
            if !self.inside(address) {
                continue;
            }
            if write {
                self.spare_mbarrier(lane, address, bytes);
            }
            self.owner_lives(lane, address);
            let again = written.is_some_and(|values| self.holds(address, bytes, lane, values));
            let writer = if again { Writer::Again } else { Writer::Warp };
            let mut problem = None;
            self.with_sanitizer(|s, who| {
                let (range, who) = (Self::range(address, bytes), Who { lane, ..who });
                let races = s.races;
                if strong {
                    // A volatile, relaxed, acquire or release access: taken to order everything.
                    s.atomic(who.warp);
                    s.races = false;
                }
                problem = match (write, pending) {
                    (false, _) => s.read(who, range, Reader::Warp),
                    (true, false) => s.write(who, range, writer),
                    (true, true) => {
                        s.copy_begins(who.warp, range);
                        s.write(who, range, Writer::Pending)
                    }
                };
                s.races = races;
            });
            self.tell(Some(lane), address, problem);
        }
        Ok(())
    }

    /// Reports an access to the shared memory of a CTA that has exited.
    fn owner_lives(&mut self, lane: usize, address: u64) {
        let owner = (address >> 24) as usize;
        if owner == self.cta || self.cluster.ctas[owner].live_threads > 0 {
            return;
        }
        let message = format!("shared memory of the CTA of rank {owner}, which has exited");
        self.report(Ub::UseAfterFree, Some(lane), Some(address), message);
    }

    /// Whether shared memory holds these bytes of a lane already.
    fn holds(&self, address: u64, bytes: u64, lane: usize, values: &Words) -> bool {
        let (cta, offset) = ((address >> 24) as usize, (address & 0xff_ffff) as usize);
        let held = |k: usize| self.cluster.ctas[cta].shared.get(offset / 4 + k).copied();
        if bytes >= 4 {
            return (0..(bytes / 4) as usize).all(|k| held(k) == Some(values[k][lane]));
        }
        let keep = (1u32 << (8 * bytes)) - 1;
        held(0).is_some_and(|word| (word >> (8 * (offset % 4)) ^ values[0][lane]) & keep == 0)
    }

    /// Lanes of the warp have met at an instruction with a member mask.
    pub fn lanes_met(&mut self, lanes: u32, memory: bool) {
        self.with_sanitizer(|s, who| s.lanes_met(who.warp, lanes, memory));
    }

    /// The executing lanes copy to shared memory asynchronously: the coming store is theirs.
    pub fn begin_copy(&mut self, _addresses: &[u64; LANES], _bytes: u64) {
        self.copying = true;
    }

    /// The copies of the executing lanes so far become a group.
    pub fn commit_copies(&mut self) {
        self.with_sanitizer(|s, who| s.copy_commit(who.warp));
    }

    /// All but the last `left` groups of the executing lanes have arrived.
    pub fn wait_copies(&mut self, left: usize, all: bool) {
        self.with_sanitizer(|s, who| s.copy_wait(who.warp, left, all));
    }

    /// The copies of the executing lanes so far will have arrived when the mbarrier completes.
    pub fn copies_arrive(&mut self) {
        self.with_sanitizer(|s, who| s.copy_wait(who.warp, 0, true));
    }

    /// The bulk stores of the executing lanes so far become a group.
    pub fn commit_bulk(&mut self) {
        self.with_sanitizer(|s, who| s.bulk_commit(who.warp));
    }

    /// All but the last `left` bulk groups have been read.
    pub fn wait_bulk(&mut self, left: usize) {
        self.with_sanitizer(|s, who| s.bulk_wait(who.warp, left));
    }

    /// An asynchronous copy writes shared memory and completes on an mbarrier.
    pub fn async_writes_shared(
        &mut self,
        lane: usize,
        address: u64,
        bytes: u64,
        mbarrier: Option<u64>,
    ) {
        let mut problem = None;
        self.spare_mbarrier(lane, address, bytes);
        self.with_sanitizer(|s, who| {
            let writer = mbarrier.map_or(Writer::Warp, Writer::Mbarrier);
            let who = Who { lane, proxy: true, ..who };
            problem = s.write(who, Self::range(address, bytes), writer);
        });
        self.tell(Some(lane), address, problem);
    }

    /// A tensor copy wrote a range with a swizzle mode.
    pub fn wrote_swizzled(&mut self, address: u64, bytes: u64, swizzle: u32) {
        self.with_sanitizer(|s, _| s.set_layout(Self::range(address, bytes), swizzle));
    }

    /// An asynchronous copy reads shared memory; with `group` until its bulk group is waited for.
    pub fn async_reads_shared(&mut self, lane: usize, address: u64, bytes: u64, group: bool) {
        let mut problem = None;
        self.with_sanitizer(|s, who| {
            let who = Who { lane, proxy: true, ..who };
            let reader = if group { Reader::Pending } else { Reader::Warp };
            problem = s.read(who, Self::range(address, bytes), reader);
            if group {
                s.bulk_reads(who.warp, Self::range(address, bytes));
            }
        });
        self.tell(Some(lane), address, problem);
    }

    /// An mbarrier came into being.
    pub fn mbarrier_initialised(&mut self, lane: usize, address: u64) {
        let mut problem = None;
        let sync = self.grid.settings.checks.sync;
        self.with_sanitizer(|s, who| {
            let range = Self::range(address, 8);
            problem = s.write(Who { lane, ..who }, range, Writer::Warp);
            if s.mbarrier_begins(range.0, range.1) && sync {
                let message = "an mbarrier is initialised again without mbarrier.inval";
                problem = Some((Ub::MbarrierMisuse, message.to_owned()));
            }
        });
        self.tell(Some(lane), address, problem);
    }

    /// mbarrier.inval: the eight bytes may hold anything again.
    pub fn mbarrier_ended(&mut self, address: u64) {
        let (cta, offset, _) = Self::range(address, 8);
        self.with_sanitizer(|s, _| s.mbarrier_ends(cta, offset));
    }

    /// An mbarrier is about to be used.
    pub fn mbarrier_used(&mut self, lane: usize, address: u64) {
        let mut problem = None;
        self.with_sanitizer(|s, who| {
            problem = s.mbarrier_used(Who { lane, ..who }, Self::range(address, 8));
        });
        self.tell(Some(lane), address, problem);
    }

    /// A plain store, or a copy, must not hit an mbarrier.
    fn spare_mbarrier(&mut self, lane: usize, address: u64, bytes: u64) {
        if !self.grid.settings.checks.sync {
            return;
        }
        let mut hit = None;
        self.with_sanitizer(|s, _| hit = s.mbarrier_in(Self::range(address, bytes)));
        if let Some(offset) = hit {
            let message = format!("{bytes} bytes are written over the mbarrier at {offset:#x}");
            self.report(Ub::MbarrierMisuse, Some(lane), Some(address), message);
        }
    }

    /// A thread arrives at an mbarrier.
    pub fn mbarrier_arrived(&mut self, _lane: usize, address: u64) {
        self.with_sanitizer(|s, who| s.arrive(who.warp, address));
    }

    /// A thread has seen a phase of an mbarrier complete.
    pub fn mbarrier_waited(&mut self, _lane: usize, address: u64) {
        self.with_sanitizer(|s, who| s.waited(who.warp, address));
    }

    /// wgmma.fence, commit_group or wait_group.
    pub fn wgmma_sync(&mut self, op: Opcode, left: usize) {
        self.with_sanitizer(|s, who| match op {
            Opcode::WgmmaCommitGroup => s.product_commit(who.warp),
            Opcode::WgmmaWaitGroup => s.product_wait(who.warp, left),
            _ => s.product_fence(who.warp),
        });
    }

    /// wgmma reads A from these registers until it is waited for.
    pub fn wgmma_reads(&mut self, regs: &[u32]) {
        self.with_sanitizer(|s, who| s.product_registers(who.warp, regs, Flight::Input));
    }

    /// wgmma is about to read these registers; what else wrote them must be fenced.
    pub fn wgmma_needs_fence(&mut self, regs: &[u32]) {
        let mut found = None;
        self.with_sanitizer(|s, who| found = s.needs_product_fence(who.warp, regs));
        if let Some(message) = found {
            self.report(Ub::AsyncNotWaited, None, None, message.to_owned());
        }
    }

    /// wgmma reads 16 bytes of shared memory, laid out with a swizzle mode.
    pub fn wgmma_reads_shared(&mut self, address: u64, swizzle: u32) {
        let address = address | (self.cta as u64) << 24;
        let mut problem = None;
        self.with_sanitizer(|s, who| {
            let who = Who { proxy: true, ..who };
            let range = Self::range(address, 16);
            problem = s.read(who, range, Reader::Product).or_else(|| {
                let (other, line) = s.other_layout(range, swizzle)?;
                let name = |mode: u32| match mode {
                    0 => "no swizzle".to_owned(),
                    m => format!("a {}-byte swizzle", 16 << m),
                };
                let message = format!(
                    "the matrix descriptor says {}; the tensor copy at line {line} wrote with {}",
                    name(swizzle),
                    name(other)
                );
                Some((Ub::BadDescriptor, message))
            });
        });
        self.tell(None, address, problem);
    }

    /// wgmma accumulates into these registers.
    pub fn wgmma_accumulates(&mut self, regs: &[u32]) {
        self.with_sanitizer(|s, who| s.product_registers(who.warp, regs, Flight::Accumulator));
    }

    /// Shared atomic of one lane, or a strong access: taken as ordering.
    pub fn sanitize_atomic(&mut self, _lane: usize, address: u64, bytes: u64) {
        let mut problem = None;
        self.with_sanitizer(|s, who| {
            s.atomic(who.warp);
            if s.uninit {
                let races = std::mem::replace(&mut s.races, false);
                problem = s.read(who, Self::range(address, bytes), Reader::Warp);
                s.races = races;
            }
        });
        self.tell(None, address, problem);
    }
}
