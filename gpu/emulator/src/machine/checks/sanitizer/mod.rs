//! The sanitizer of shared memory: who wrote and read each byte, and what orders them.
//!
//! It finds races by happens-before, with vector clocks. Each warp counts its own steps from one
//! release to the next, and holds the latest step that it knows of every other thread. A release
//! (arriving at a barrier or an mbarrier) joins the warp's clock into the object and begins a new
//! step; an acquire (leaving, waiting) joins the object's clock into the warp's. An access comes
//! after an earlier one where the warp's clock has reached the earlier one's step.
//!
//! As in FastTrack (Flanagan and Freund, "FastTrack: Efficient and Precise Dynamic Race Detection",
//! PLDI 2009) a byte does not hold a clock for each access but an epoch, thread and step, of the
//! last write: writes that are no race are totally ordered, so who comes after the last comes after
//! all. Reads may be concurrent. FastTrack then keeps a clock of them; here a byte keeps two reads,
//! so a write that races with a third reader only is not seen: a report names two accesses that
//! nothing orders, and no report is no proof.
//!
//! Three things have no counterpart there. A second clock of each warp says what the asynchronous
//! proxy may see: `fence.proxy.async` brings it up to date. Asynchronous copies write on behalf of
//! a thread of their own: TMA's is that of the mbarrier on which they complete, so that only who
//! waited for that one comes after them; cp.async writes stay pending, after which nobody comes,
//! until they are waited for. And wgmma reads on behalf of its warpgroup, by groups: who waited for
//! a group knows of the reads of all four warps.
//!
//! Here stand accesses, what a byte remembers of them, and what is wrong between two; beside it the
//! bytes ([`cells`]), the clocks ([`clock`]), what joins them ([`orders`]), asynchronous copies
//! ([`copies`]) and wgmma ([`products`]).

mod cells;
mod clock;
mod copies;
mod orders;
mod products;

use std::collections::{BTreeSet, HashMap};

use rustc_hash::FxHashSet;

use self::cells::Cells;
use self::clock::{Clock, Order, Seen, at, join};
pub use self::clock::{Far, PREVIOUS_LAUNCH, join_far};
pub use self::products::Flight;
use super::lanes::{Lanes, mask_of};
use crate::error::Ub;

/// Not yet waited for.
const PENDING: u32 = u32::MAX;

/// One access that a byte remembers; clock 0 stands for none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Access {
    thread: u32,
    clock: u32,
    line: u32,
    /// Made by the asynchronous proxy.
    proxy: bool,
    /// Made by cp.async.
    copy: bool,
    /// The lanes of a warp's access, as a mask.
    lanes: u32,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Cell {
    write: Access,
    reads: [Access; 2],
    /// Swizzle mode of the tensor copy that wrote it, plus one.
    layout: u8,
}

/// On whose behalf bytes are read, and until when.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reader {
    /// The warp itself, now.
    Warp,
    /// The warp's bulk copy, until it is waited for.
    Pending,
    /// A wgmma of the warp's open group, until a warp of the warpgroup has waited for that group
    /// and says so.
    Product,
}

/// Bytes of shared memory: CTA, first, count.
pub type Range = (usize, usize, usize);

/// Who accesses, and how.
#[derive(Clone, Copy, Debug)]
pub struct Who {
    pub warp: u32,
    /// [`WARP`](super::lanes::WARP): the warp as a whole.
    pub lane: usize,
    pub line: u32,
    /// By the asynchronous proxy (TMA, wgmma).
    pub proxy: bool,
}

/// A finding's kind and sentence.
pub type Problem = (Ub, String);

/// The sentence on two lanes of a warp.
pub fn unordered_lanes(now: &str, what: &str, lane: usize, line: u32) -> String {
    format!(
        "{now} is not ordered after the {what} by lane {lane} of the same warp at line {line}: no \
         bar.warp.sync (__syncwarp) or barrier of both lanes comes between"
    )
}

/// The sanitizer of one cluster.
pub struct Sanitizer {
    /// What shared memory remembers, by CTA of the cluster.
    cells: Vec<Cells>,
    /// By thread: warps, then mbarriers.
    seen: Vec<Seen>,
    /// What orders the lanes of each warp.
    lanes: Vec<Lanes>,
    /// Those that execute now, as a mask: who waits for something, learns for these.
    pub executing: u32,
    /// Number in the launch of the first warp.
    base: u32,
    warps: u32,
    threads: u32,
    barriers: HashMap<(usize, u32), Order>,
    mbarriers: HashMap<u64, Order>,
    cluster: Order,
    atomics: Order,
    /// cp.async of each warp: groups of ranges, the last one open.
    copies: Vec<Vec<Vec<Range>>>,
    /// Bulk stores that still read shared memory.
    bulk: Vec<Vec<Vec<Range>>>,
    /// Threads that stand for the wgmma reads of each warpgroup that has read, by its first warp.
    products: Vec<Option<u32>>,
    /// Registers of wgmmas in flight: their group, and what they are.
    registers: Vec<Vec<(usize, u32, Flight)>>,
    groups: Vec<usize>,
    /// Registers written since the warp's last wgmma.fence.
    unfenced: Vec<FxHashSet<u32>>,
    /// Whether a warp has executed wgmma.fence at all.
    has_fenced: Vec<bool>,
    /// mbarriers that were initialised and not invalidated: CTA, offset.
    live: BTreeSet<(usize, usize)>,
    pub uninit: bool,
    pub races: bool,
}

impl Sanitizer {
    /// For `ctas` CTAs of `warps` warps with `bytes` of shared memory; `base` is the number in the
    /// launch of the first warp.
    pub fn new(ctas: usize, warps: usize, bytes: usize, base: u32) -> Sanitizer {
        let threads = ctas * warps;
        let blank = Seen { clock: vec![0; threads], visible: vec![0; threads], ..Seen::default() };
        let mut seen = vec![blank; threads];
        for (i, seen) in seen.iter_mut().enumerate() {
            seen.clock[i] = 1;
        }
        Sanitizer {
            cells: (0..ctas).map(|_| Cells::new(bytes)).collect(),
            seen,
            lanes: vec![Lanes::default(); threads],
            executing: !0,
            base,
            warps: warps as u32,
            threads: threads as u32,
            barriers: HashMap::new(),
            mbarriers: HashMap::new(),
            cluster: Order::default(),
            atomics: Order::default(),
            copies: vec![vec![Vec::new()]; threads],
            bulk: vec![vec![Vec::new()]; threads],
            products: vec![None; threads],
            registers: vec![Vec::new(); threads],
            groups: vec![0; threads],
            unfenced: vec![FxHashSet::default(); threads],
            has_fenced: vec![false; threads],
            live: BTreeSet::new(),
            uninit: false,
            races: false,
        }
    }

    /// With these checks on.
    pub fn checking(self, races: bool, uninit: bool) -> Sanitizer {
        Sanitizer { races, uninit, ..self }
    }

    /// Number of a warp.
    pub fn warp(&self, cta: usize, warp: u32) -> u32 {
        cta as u32 * self.warps + warp
    }

    fn name(&self, thread: u32) -> String {
        match thread < self.threads {
            true => format!("warp {} of CTA rank {}", thread % self.warps, thread / self.warps),
            false if self.products.contains(&Some(thread)) => "a wgmma".into(),
            false => "an asynchronous copy".into(),
        }
    }

    fn tick(&mut self, warp: u32) {
        self.seen[warp as usize].clock[warp as usize] += 1;
    }

    /// The warp's own clock.
    fn now(&self, warp: u32) -> u32 {
        self.seen[warp as usize].clock[warp as usize]
    }

    /// Number of a warp in the launch.
    pub fn number(&self, warp: u32) -> u32 {
        self.base + warp
    }

    /// Whether a warp of the launch is one of this cluster's.
    fn own(&self, number: u32) -> bool {
        number >= self.base && number - self.base < self.threads
    }

    /// The clock that marks what a warp does now.
    pub fn clock(&self, warp: u32) -> u32 {
        self.now(warp)
    }

    /// Whether a warp comes after what another of the launch did at a clock.
    pub fn knows(&self, warp: u32, number: u32, clock: u32) -> bool {
        let seen = &self.seen[warp as usize];
        if self.own(number) {
            return at(&seen.clock, number - self.base) >= clock;
        }
        seen.far.as_ref().and_then(|far| far.get(&number)).is_some_and(|&known| known >= clock)
    }

    /// Whether `who` comes after an access, a write or a read.
    fn ordered(&self, who: Who, access: Access, wrote: bool) -> bool {
        let known = || match access.thread == who.warp {
            true => self.unordered_lane(who, access, wrote).is_none(),
            false => at(&self.seen[who.warp as usize].clock, access.thread) >= access.clock,
        };
        access.clock == 0 || access.clock != PENDING && known()
    }

    /// The lane of its own warp that `who` does not come after.
    fn unordered_lane(&self, who: Who, access: Access, wrote: bool) -> Option<usize> {
        self.lanes[who.warp as usize].unordered(who.lane, access.lanes, access.clock, wrote)
    }

    /// Lanes of a warp have met at an instruction with a member mask; `memory`: at
    /// `bar.warp.sync`, which orders what they did.
    pub fn lanes_met(&mut self, warp: u32, lanes: u32, memory: bool) {
        let now = self.now(warp);
        self.lanes[warp as usize].meet(lanes, now, memory);
        self.tick(warp);
    }

    /// The lane of the warp whose access at a clock `lane` does not come after.
    pub fn lane_before(
        &self,
        (warp, lane): (u32, usize),
        (lanes, clock): (u32, u32),
        wrote: bool,
    ) -> Option<usize> {
        self.lanes[warp as usize].unordered(lane, lanes, clock, wrote)
    }

    /// What is wrong with an earlier access and this one.
    fn conflict(&self, who: Who, access: Access, what: &str, now: &str) -> Option<Problem> {
        if self.ordered(who, access, what == "write") {
            return None;
        }
        let kind = if access.clock == PENDING || access.thread >= self.threads {
            Ub::AsyncNotWaited
        } else {
            Ub::SharedRace
        };
        let line = access.line;
        if kind == Ub::SharedRace && access.thread == who.warp {
            let lane = self.unordered_lane(who, access, what == "write").unwrap_or(0);
            return Some((kind, unordered_lanes(now, what, lane, line)));
        }
        let other = self.name(access.thread);
        let message = format!("{now} is not ordered after the {what} by {other} at line {line}");
        Some((kind, message))
    }

    /// Whether the asynchronous proxy may see a write of the generic one. What cp.async brought
    /// wgmma may read without a fence: so do CUTLASS's mainloops with cp.async, FlashAttention-3
    /// and FlashMLA; the PTX ISA does not say.
    fn fenced(&self, who: Who, write: Access, reader: Reader) -> Option<Problem> {
        let crosses = who.proxy && !write.proxy && write.clock != 0 && write.clock != PENDING;
        let copied = write.copy && reader == Reader::Product;
        if !crosses
            || copied
            || at(&self.seen[who.warp as usize].visible, write.thread) >= write.clock
        {
            return None;
        }
        let message = format!(
            "the asynchronous proxy reads what {} wrote at line {} without fence.proxy.async",
            self.name(write.thread),
            write.line
        );
        Some((Ub::MissingProxyFence, message))
    }

    /// A read by a warp, or by `reader` on its behalf.
    pub fn read(&mut self, who: Who, (cta, first, n): Range, reader: Reader) -> Option<Problem> {
        let (thread, clock) = match reader {
            Reader::Warp => (who.warp, self.now(who.warp)),
            Reader::Pending => (who.warp, PENDING),
            Reader::Product => {
                (self.products_of(who.warp), self.groups[who.warp as usize] as u32 + 1)
            }
        };
        let lanes = mask_of(who.lane);
        let access = Access { thread, clock, line: who.line, proxy: who.proxy, copy: false, lanes };
        let mut problem = None;
        // Neighbours mostly have the same history: what was fine for one is fine for the next.
        let mut fine = None;
        let mut cells = std::mem::take(&mut self.cells[cta]);
        cells.each(first, n, |cell| {
            if problem.is_none() && fine != Some(cell.write) {
                fine = Some(cell.write);
                if self.uninit && cell.write.clock == 0 {
                    let message = "shared memory that nobody wrote".to_owned();
                    problem = Some((Ub::Uninitialized, message));
                } else if self.races {
                    problem = self
                        .conflict(who, cell.write, "write", "this read")
                        .or_else(|| self.fenced(who, cell.write, reader));
                }
            }
            // A thread's later read takes the place of its earlier one: who comes after it comes
            // after both (of lanes that did not meet between the two, the later ones are kept).
            // Readers beyond the second take the second's place.
            let reads = &mut cell.reads;
            let slot = usize::from(reads[0].clock != 0 && reads[0].thread != thread);
            let same = reads[slot].thread == thread && reads[slot].clock == clock;
            let others = if same { reads[slot].lanes } else { 0 };
            reads[slot] = Access { lanes: lanes | others, ..access };
        });
        self.cells[cta] = cells;
        problem
    }

    /// A write by a warp, or by `writer` on its behalf.
    pub fn write(&mut self, who: Who, (cta, first, n): Range, writer: Writer) -> Option<Problem> {
        let (thread, clock, proxy) = match writer {
            Writer::Warp | Writer::Again => (who.warp, self.now(who.warp), who.proxy),
            Writer::Pending => (who.warp, PENDING, false),
            Writer::Mbarrier(address) => {
                // Of the step that ends when the copy's bytes are counted.
                let thread = self.thread_of(address);
                (thread, self.count_of(thread) + 1, true)
            }
        };
        let lanes = mask_of(who.lane);
        let copy = matches!(writer, Writer::Pending);
        let access = Access { thread, clock, line: who.line, proxy, copy, lanes };
        // Lanes that write one place by one instruction: which value stays is anyone's.
        let together = |write: Access| {
            write.thread == thread && write.clock == clock && write.line == who.line
        };
        let (mut problem, mut fine) = (None, None);
        let mut cells = std::mem::take(&mut self.cells[cta]);
        cells.each(first, n, |cell| {
            let history = Some((cell.write, cell.reads));
            if problem.is_none() && self.races && fine != history {
                fine = history;
                let same = matches!(writer, Writer::Again)
                    && !cell.write.proxy
                    && cell.write.clock != PENDING;
                let over = match same || together(cell.write) {
                    true => None,
                    false => self.conflict(who, cell.write, "write", "this write"),
                };
                problem = over.or_else(|| {
                    let mut reads = cell.reads.iter();
                    reads.find_map(|&read| self.conflict(who, read, "read", "this write"))
                });
            }
            // The reads are forgotten: who comes after this write comes after them, or they were
            // reported just now.
            let others = if together(cell.write) { cell.write.lanes } else { 0 };
            let write = Access { lanes: lanes | others, ..access };
            *cell = Cell { write, ..Cell::default() };
        });
        self.cells[cta] = cells;
        problem
    }

    /// A tensor copy wrote this range with a swizzle mode.
    pub fn set_layout(&mut self, (cta, first, n): Range, swizzle: u32) {
        self.cells[cta].each(first, n, |cell| cell.layout = swizzle as u8 + 1);
    }

    /// The other swizzle mode, and the line of the tensor copy, that wrote these bytes.
    pub fn other_layout(&self, (cta, first, _): Range, swizzle: u32) -> Option<(u32, u32)> {
        let cell = self.cells[cta].get(first)?;
        let mode = u32::from(cell.layout).checked_sub(1)?;
        (mode != swizzle).then_some((mode, cell.write.line))
    }

    /// An mbarrier came into being; whether there was one already.
    pub fn mbarrier_begins(&mut self, cta: usize, offset: usize) -> bool {
        !self.live.insert((cta, offset))
    }

    /// mbarrier.inval: the eight bytes may hold anything again.
    pub fn mbarrier_ends(&mut self, cta: usize, offset: usize) {
        self.live.remove(&(cta, offset));
    }

    /// The mbarrier that a range touches.
    pub fn mbarrier_in(&self, (cta, first, n): Range) -> Option<usize> {
        let from = (cta, first.saturating_sub(7));
        self.live.range(from..(cta, first + n)).next().map(|&(_, offset)| offset)
    }

    /// An mbarrier is used: its initialisation must come before.
    pub fn mbarrier_used(&self, who: Who, (cta, first, _): Range) -> Option<Problem> {
        let write = self.cells[cta].get(first)?.write;
        if !self.races || write.proxy || self.ordered(who, write, true) {
            return None;
        }
        let other = match self.unordered_lane(who, write, true) {
            Some(lane) if write.thread == who.warp => format!("lane {lane} of the same warp"),
            _ => self.name(write.thread),
        };
        let message = format!(
            "this use of an mbarrier is not ordered after its initialisation by {other} at line {}",
            write.line
        );
        Some((Ub::SharedRace, message))
    }

    /// All threads of a CTA have exited: what other CTAs do with its shared memory must be over.
    pub fn cta_ends(&self, cta: usize) -> Option<(usize, String)> {
        let mut known = Clock::new();
        let first = cta as u32 * self.warps;
        for warp in first..first + self.warps {
            join(&mut known, &self.seen[warp as usize].clock);
        }
        let foreign = |a: &Access| {
            a.clock != 0
                && a.thread < self.threads
                && a.thread / self.warps != cta as u32
                && at(&known, a.thread) < a.clock
        };
        for (offset, cell) in self.cells[cta].iter() {
            let mut all = std::iter::once(&cell.write).chain(&cell.reads);
            if let Some(access) = all.find(|a| foreign(a)) {
                let message = format!(
                    "the CTA exits while {} may still use its shared memory (line {})",
                    self.name(access.thread),
                    access.line
                );
                return Some((offset, message));
            }
        }
        None
    }
}

/// On whose behalf bytes are written.
#[derive(Clone, Copy, Debug)]
pub enum Writer {
    /// The warp itself, now.
    Warp,
    /// The warp itself, now, of the bytes that are there: whichever of two such writes comes last
    /// is the same, so it is no race with another write.
    Again,
    /// The warp's cp.async, when it is waited for.
    Pending,
    /// An asynchronous copy that completes on this mbarrier.
    Mbarrier(u64),
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine::checks::lanes::WARP;

    fn who(warp: u32, line: u32) -> Who {
        Who { warp, lane: WARP, line, proxy: false }
    }

    fn kind(p: Option<Problem>) -> Option<Ub> {
        p.map(|p| p.0)
    }

    #[test]
    fn a_barrier_orders_a_write_and_a_read() {
        for barrier in [false, true] {
            let mut s = Sanitizer::new(1, 2, 64, 0).checking(true, true);
            assert_eq!(kind(s.write(who(0, 1), (0, 0, 4), Writer::Warp)), None);
            if barrier {
                s.barrier_arrive(0, 0, 0, false);
                s.barrier_arrive(1, 0, 0, true);
                s.barrier_leave(0, 0, 0);
                s.barrier_leave(1, 0, 0);
            }
            let expected = if barrier { None } else { Some(Ub::SharedRace) };
            assert_eq!(kind(s.read(who(1, 2), (0, 0, 4), Reader::Warp)), expected);
        }
    }

    #[test]
    fn what_nobody_wrote_is_uninitialised() {
        let mut s = Sanitizer::new(1, 1, 64, 0).checking(false, true);
        assert_eq!(kind(s.read(who(0, 1), (0, 8, 4), Reader::Warp)), Some(Ub::Uninitialized));
    }

    #[test]
    fn the_asynchronous_proxy_needs_its_fence() {
        for fence in [false, true] {
            let mut s = Sanitizer::new(1, 1, 64, 0).checking(true, false);
            s.write(who(0, 1), (0, 0, 16), Writer::Warp);
            if fence {
                s.fence(0);
            }
            let expected = if fence { None } else { Some(Ub::MissingProxyFence) };
            let tma = Who { proxy: true, ..who(0, 2) };
            assert_eq!(kind(s.read(tma, (0, 0, 16), Reader::Warp)), expected);
        }
    }

    #[test]
    fn tma_data_is_there_for_who_waited_for_its_mbarrier() {
        let mut s = Sanitizer::new(1, 2, 64, 0).checking(true, true);
        let tma = Who { proxy: true, ..who(0, 2) };
        s.write(tma, (0, 0, 16), Writer::Mbarrier(40));
        s.completed(40);
        s.flip(40);
        assert_eq!(kind(s.read(who(1, 3), (0, 0, 16), Reader::Warp)), Some(Ub::AsyncNotWaited));
        s.waited(1, 40);
        assert_eq!(kind(s.read(who(1, 3), (0, 0, 16), Reader::Warp)), None);
        s.waited(0, 40);
        // Overwriting it before the reader says that it is done is a race.
        assert_eq!(kind(s.write(tma, (0, 0, 16), Writer::Mbarrier(40))), Some(Ub::SharedRace));
    }

    #[test]
    fn cp_async_is_there_after_its_wait() {
        let mut s = Sanitizer::new(1, 1, 64, 0).checking(true, true);
        s.write(who(0, 1), (0, 0, 16), Writer::Pending);
        s.copy_begins(0, (0, 0, 16));
        s.copy_commit(0);
        assert_eq!(kind(s.read(who(0, 2), (0, 0, 4), Reader::Warp)), Some(Ub::AsyncNotWaited));
        s.copy_wait(0, 0, false);
        assert_eq!(kind(s.read(who(0, 2), (0, 0, 4), Reader::Warp)), None);
    }
}
