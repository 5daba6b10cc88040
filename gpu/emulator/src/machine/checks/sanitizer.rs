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

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

use super::lanes::{Lanes, mask_of};
use crate::error::Ub;
use crate::machine::layout::Touch;

/// A vector clock, by thread of the sanitizer: warps first, then mbarriers.
type Clock = Vec<u32>;

fn join(to: &mut Clock, from: &Clock) {
    if to.len() < from.len() {
        to.resize(from.len(), 0);
    }
    to.iter_mut().zip(from).for_each(|(a, b)| *a = (*a).max(*b));
}

fn at(clock: &Clock, i: u32) -> u32 {
    clock.get(i as usize).copied().unwrap_or(0)
}

/// What is known of the warps of other clusters, by their number in the launch.
pub type Far = Option<Arc<BTreeMap<u32, u32>>>;

/// In a [`Far`]: the launch that a programmatic one waits for has ended.
pub const PREVIOUS_LAUNCH: u32 = u32::MAX;

/// Adds to what is known of other clusters.
pub fn join_far(to: &mut Far, from: &Far) {
    match (to.as_mut(), from) {
        (_, None) => {}
        (None, Some(_)) => *to = from.clone(),
        (Some(known), Some(new)) => {
            let fresh = |(warp, clock): (&u32, &u32)| known.get(warp).is_none_or(|c| c < clock);
            if !Arc::ptr_eq(known, new) && new.iter().any(fresh) {
                let known = Arc::make_mut(known);
                for (&warp, &clock) in new.iter() {
                    let entry = known.entry(warp).or_default();
                    *entry = (*entry).max(clock);
                }
            }
        }
    }
}

/// What one warp knows of the others, or what was released somewhere.
#[derive(Clone, Debug, Default)]
struct Seen {
    clock: Clock,
    /// The part of it that the asynchronous proxy may see.
    visible: Clock,
    far: Far,
    /// What relaxed accesses have read, and a fence would make known.
    observed: Far,
    /// What came before a fence, which later relaxed writes release; barriers hand it on.
    fenced: Far,
}

impl Seen {
    fn join(&mut self, other: &Seen) {
        join(&mut self.clock, &other.clock);
        join(&mut self.visible, &other.visible);
        join_far(&mut self.far, &other.far);
        join_far(&mut self.observed, &other.observed);
        join_far(&mut self.fenced, &other.fenced);
    }
}

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
    /// The lanes of a warp's access, as a mask.
    lanes: u32,
}

#[derive(Clone, Copy, Debug, Default)]
struct Cell {
    write: Access,
    reads: [Access; 2],
    /// Swizzle mode of the tensor copy that wrote it, plus one.
    layout: u8,
}

/// What orders threads: what has been released into it, for the present phase and the last.
#[derive(Clone, Debug, Default)]
struct Order {
    pending: Seen,
    done: Seen,
    /// Thread number of an mbarrier's asynchronous writes.
    thread: Option<u32>,
}

/// What a register is to a wgmma in flight.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flight {
    /// Nobody else may read or write it.
    Accumulator,
    /// Nobody may write it.
    Input,
    /// A move of an accumulator: nobody may read it.
    Copy,
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
    cells: Vec<Vec<Cell>>,
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
    /// Threads that stand for the wgmma reads of each warpgroup, by its first warp.
    products: BTreeMap<u32, u32>,
    /// Registers of wgmmas in flight: their group, and what they are.
    registers: Vec<Vec<(usize, u32, Flight)>>,
    groups: Vec<usize>,
    /// Registers written since the warp's last wgmma.fence.
    unfenced: Vec<BTreeSet<u32>>,
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
            cells: vec![vec![Cell::default(); bytes]; ctas],
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
            products: BTreeMap::new(),
            registers: vec![Vec::new(); threads],
            groups: vec![0; threads],
            unfenced: vec![BTreeSet::new(); threads],
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
            false if self.products.values().any(|&t| t == thread) => "a wgmma".into(),
            false => "an asynchronous copy".into(),
        }
    }

    /// The thread that stands for the wgmma reads of a warp's warpgroup. Its clock counts groups.
    fn products_of(&mut self, warp: u32) -> u32 {
        let first = warp - warp % self.warps % 4;
        let next = self.seen.len() as u32;
        let thread = *self.products.entry(first).or_insert(next);
        if thread == next {
            self.seen.push(Seen::default());
        }
        thread
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

    /// All that a warp knows, for warps of other clusters; later work of the warp is not in it.
    pub fn publish(&mut self, warp: u32) -> Far {
        let seen = &self.seen[warp as usize];
        let mut far = seen.far.as_deref().cloned().unwrap_or_default();
        for (i, &clock) in seen.clock.iter().take(self.threads as usize).enumerate() {
            if clock > 0 {
                far.insert(self.base + i as u32, clock);
            }
        }
        self.tick(warp);
        Some(Arc::new(far))
    }

    /// A warp learns what others have published.
    pub fn learn(&mut self, warp: u32, far: &Far) {
        let Some(list) = far else { return };
        let (base, threads) = (self.base, self.threads);
        let seen = &mut self.seen[warp as usize];
        let inside = base..base.saturating_add(threads);
        for (&number, &clock) in list.range(inside) {
            let known = &mut seen.clock[(number - base) as usize];
            *known = (*known).max(clock);
        }
        join_far(&mut seen.far, far);
        if let Some(&step) = list.get(&self.number(warp)) {
            self.lanes[warp as usize].acquire(self.executing, step);
        }
    }

    /// A warp has read what others have published, and has not fenced it.
    pub fn observe(&mut self, warp: u32, far: &Far) {
        join_far(&mut self.seen[warp as usize].observed, far);
    }

    /// A fence wider than the CTA: what was observed is known, what was done may be released.
    pub fn fence_far(&mut self, warp: u32) {
        let observed = std::mem::take(&mut self.seen[warp as usize].observed);
        self.learn(warp, &observed);
        self.seen[warp as usize].fenced = self.publish(warp);
    }

    /// What a relaxed write of a warp releases.
    pub fn fenced_far(&self, warp: u32) -> Far {
        self.seen[warp as usize].fenced.clone()
    }

    /// A warp knows that the launch before this one has ended.
    pub fn previous_ended(&mut self, warp: u32) {
        let ended = Some(Arc::new(BTreeMap::from([(PREVIOUS_LAUNCH, 1)])));
        join_far(&mut self.seen[warp as usize].far, &ended);
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

    /// Whether the asynchronous proxy may see a write of the generic one.
    fn fenced(&self, who: Who, write: Access) -> Option<Problem> {
        let crosses = who.proxy && !write.proxy && write.clock != 0 && write.clock != PENDING;
        if !crosses || at(&self.seen[who.warp as usize].visible, write.thread) >= write.clock {
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
        let access = Access { thread, clock, line: who.line, proxy: who.proxy, lanes };
        let mut problem = None;
        // Neighbours mostly have the same history: what was fine for one is fine for the next.
        let mut fine = None;
        for i in first..(first + n).min(self.cells[cta].len()) {
            let cell = self.cells[cta][i];
            if problem.is_none() && fine != Some(cell.write) {
                fine = Some(cell.write);
                if self.uninit && cell.write.clock == 0 {
                    let message = "shared memory that nobody wrote".to_owned();
                    problem = Some((Ub::Uninitialized, message));
                } else if self.races {
                    problem = self
                        .conflict(who, cell.write, "write", "this read")
                        .or_else(|| self.fenced(who, cell.write));
                }
            }
            // A thread's later read takes the place of its earlier one: who comes after it comes
            // after both (of lanes that did not meet between the two, the later ones are kept).
            // Readers beyond the second take the second's place.
            let reads = &mut self.cells[cta][i].reads;
            let slot = usize::from(reads[0].clock != 0 && reads[0].thread != thread);
            let same = reads[slot].thread == thread && reads[slot].clock == clock;
            let others = if same { reads[slot].lanes } else { 0 };
            reads[slot] = Access { lanes: lanes | others, ..access };
        }
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
        let access = Access { thread, clock, line: who.line, proxy, lanes };
        // Lanes that write one place by one instruction: which value stays is anyone's.
        let together = |write: Access| {
            write.thread == thread && write.clock == clock && write.line == who.line
        };
        let (mut problem, mut fine) = (None, None);
        for i in first..(first + n).min(self.cells[cta].len()) {
            let cell = self.cells[cta][i];
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
            self.cells[cta][i] = Cell { write, ..Cell::default() };
        }
        problem
    }

    fn thread_of(&mut self, mbarrier: u64) -> u32 {
        let next = self.seen.len() as u32;
        let order = self.mbarriers.entry(mbarrier).or_default();
        if let Some(thread) = order.thread {
            return thread;
        }
        order.thread = Some(next);
        let clock = vec![0; next as usize + 1];
        self.seen.push(Seen { clock, ..Seen::default() });
        next
    }

    fn count_of(&self, thread: u32) -> u32 {
        at(&self.seen[thread as usize].clock, thread)
    }

    /// Bytes written on behalf of an mbarrier have been counted there.
    pub fn completed(&mut self, address: u64) {
        let thread = self.thread_of(address);
        let count = &mut self.seen[thread as usize].clock[thread as usize];
        *count += 1;
        let mut released = vec![0; thread as usize + 1];
        released[thread as usize] = *count;
        let order = self.mbarriers.entry(address).or_default();
        join(&mut order.pending.clock, &released);
    }

    fn acquire(&mut self, warp: u32, done: &Seen) {
        self.seen[warp as usize].join(done);
        self.lanes[warp as usize].acquire(self.executing, at(&done.clock, warp));
    }

    /// A warp arrives at an mbarrier.
    pub fn arrive(&mut self, warp: u32, address: u64) {
        let order = self.mbarriers.entry(address).or_default();
        order.pending.join(&self.seen[warp as usize]);
        self.tick(warp);
    }

    /// An mbarrier's phase completes.
    pub fn flip(&mut self, address: u64) {
        let order = self.mbarriers.entry(address).or_default();
        let pending = std::mem::take(&mut order.pending);
        order.done.join(&pending);
    }

    /// A warp has seen an mbarrier's last phase complete.
    pub fn waited(&mut self, warp: u32, address: u64) {
        if let Some(done) = self.mbarriers.get(&address).map(|o| o.done.clone()) {
            self.acquire(warp, &done);
        }
    }

    /// A warp arrives at a named barrier; `done`: it is the last.
    pub fn barrier_arrive(&mut self, warp: u32, cta: usize, id: u32, done: bool) {
        let order = self.barriers.entry((cta, id)).or_default();
        order.pending.join(&self.seen[warp as usize]);
        if done {
            order.done = std::mem::take(&mut order.pending);
        }
        self.tick(warp);
    }

    /// A warp leaves a named barrier.
    pub fn barrier_leave(&mut self, warp: u32, cta: usize, id: u32) {
        if let Some(done) = self.barriers.get(&(cta, id)).map(|o| o.done.clone()) {
            self.acquire(warp, &done);
        }
    }

    /// A warp arrives at the cluster barrier; `done`: it is the last.
    pub fn cluster_arrive(&mut self, warp: u32, done: bool) {
        self.cluster.pending.join(&self.seen[warp as usize]);
        if done {
            self.cluster.done = std::mem::take(&mut self.cluster.pending);
        }
        self.tick(warp);
    }

    /// A warp leaves the cluster barrier.
    pub fn cluster_leave(&mut self, warp: u32) {
        let done = self.cluster.done.clone();
        self.acquire(warp, &done);
    }

    /// An atomic or a strong global access: taken to order everything before it.
    pub fn atomic(&mut self, warp: u32) {
        self.atomics.pending.join(&self.seen[warp as usize]);
        let all = self.atomics.pending.clone();
        self.acquire(warp, &all);
        self.tick(warp);
    }

    /// fence.proxy.async: what the warp has seen becomes visible to the asynchronous proxy.
    pub fn fence(&mut self, warp: u32) {
        let seen = &mut self.seen[warp as usize];
        seen.visible.clone_from(&seen.clock);
        self.tick(warp);
    }

    /// A cp.async of a warp is under way to a range.
    pub fn copy_begins(&mut self, warp: u32, range: Range) {
        self.copies[warp as usize].last_mut().expect("an open group").push(range);
    }

    /// cp.async.commit_group: the copies that a warp has begun become a group to wait for.
    pub fn copy_commit(&mut self, warp: u32) {
        self.copies[warp as usize].push(Vec::new());
    }

    /// All but the last `left` groups have arrived (with `all`, the open one too).
    pub fn copy_wait(&mut self, warp: u32, left: usize, all: bool) {
        let groups = &mut self.copies[warp as usize];
        let committed = groups.len() - 1;
        let count = if all { groups.len() } else { committed.saturating_sub(left) };
        let arrived: Vec<Range> = groups.drain(..count).flatten().collect();
        if groups.is_empty() {
            groups.push(Vec::new());
        }
        let clock = self.now(warp);
        for (cta, first, n) in arrived {
            for cell in &mut self.cells[cta][first..first + n] {
                if cell.write.clock == PENDING && cell.write.thread == warp {
                    cell.write.clock = clock;
                }
            }
        }
    }

    /// wgmma uses these registers until it is waited for.
    pub fn product_registers(&mut self, warp: u32, registers: &[u32], flight: Flight) {
        let group = self.groups[warp as usize];
        self.registers[warp as usize].extend(registers.iter().map(|&r| (group, r, flight)));
    }

    /// What is wrong with an operation on registers while wgmmas are in flight. ptxas renames what
    /// is only moved, and says so where it has to wait or to serialise.
    pub fn registers_touched(&mut self, warp: u32, touch: &Touch) -> Option<&'static str> {
        let flying = &mut self.registers[warp as usize];
        if flying.is_empty() {
            return None;
        }
        let written = |r: u32| touch.written.contains(&r);
        let overwritten = flying.iter().find(|(_, r, how)| *how != Flight::Copy && written(*r));
        let read =
            |(_, r, how): &&(usize, u32, Flight)| *how != Flight::Input && touch.read.contains(r);
        let source = flying.iter().filter(read).map(|(group, ..)| *group).max();
        let problem = match (overwritten, source) {
            (Some((_, _, Flight::Input)), _) => Some(
                "a register that a wgmma still reads is written before it was waited for \
                 (ptxas serialises the wgmmas: C7513)",
            ),
            (Some(_), _) => Some(
                "an accumulator of a wgmma is written before it was waited for (ptxas \
                 serialises the wgmmas: C7515)",
            ),
            (None, Some(_)) if !touch.copies => Some(
                "an accumulator of a wgmma is read before it was waited for (ptxas injects \
                 wgmma.wait_group here: C7517)",
            ),
            _ => None,
        };
        flying.retain(|(_, r, how)| *how != Flight::Copy || !written(*r));
        if let (Some(group), true) = (source, touch.copies) {
            flying.extend(touch.written.iter().map(|&r| (group, r, Flight::Copy)));
        }
        problem
    }

    /// A warp writes registers outside of wgmma. Compilers sink moves, of constants above all,
    /// below the fence, and ptxas puts them back: behind a first fence they only pass on what
    /// their source is.
    pub fn registers_written(&mut self, warp: u32, touch: &Touch) {
        let moved = touch.copies && self.has_fenced[warp as usize];
        let unfenced = &mut self.unfenced[warp as usize];
        if moved && touch.read.iter().all(|r| !unfenced.contains(r)) {
            for register in &touch.written {
                unfenced.remove(register);
            }
        } else {
            unfenced.extend(&touch.written);
        }
    }

    /// wgmma.fence: registers written before it may be used by the products after it.
    pub fn product_fence(&mut self, warp: u32) {
        self.has_fenced[warp as usize] = true;
        self.unfenced[warp as usize].clear();
    }

    /// The register of these that was written after the last wgmma.fence.
    pub fn unfenced_register(&self, warp: u32, registers: &[u32]) -> Option<u32> {
        registers.iter().copied().find(|r| self.unfenced[warp as usize].contains(r))
    }

    /// wgmma.commit_group: products that a warp issues from now on are of its next group.
    pub fn product_commit(&mut self, warp: u32) {
        self.groups[warp as usize] += 1;
    }

    /// wgmma.wait_group: all four warps have read the operands of the groups before the last
    /// `left`.
    pub fn product_wait(&mut self, warp: u32, left: usize) {
        let group = self.groups[warp as usize];
        self.registers[warp as usize].retain(|(g, ..)| *g + left >= group);
        let thread = self.products_of(warp) as usize;
        let clock = &mut self.seen[warp as usize].clock;
        clock.resize(clock.len().max(thread + 1), 0);
        clock[thread] = clock[thread].max(group.saturating_sub(left) as u32);
    }

    /// A tensor copy wrote this range with a swizzle mode.
    pub fn set_layout(&mut self, (cta, first, n): Range, swizzle: u32) {
        let end = (first + n).min(self.cells[cta].len());
        self.cells[cta][first..end].iter_mut().for_each(|c| c.layout = swizzle as u8 + 1);
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
        for (offset, cell) in self.cells[cta].iter().enumerate() {
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

    /// A bulk store of a warp reads a range until its group is waited for.
    pub fn bulk_reads(&mut self, warp: u32, range: Range) {
        self.bulk[warp as usize].last_mut().expect("an open group").push(range);
    }

    /// cp.async.bulk.commit_group: the stores that a warp has begun become a group.
    pub fn bulk_commit(&mut self, warp: u32) {
        self.bulk[warp as usize].push(Vec::new());
    }

    /// cp.async.bulk.wait_group: all but the last `left` groups have been read, so that their
    /// source may be written.
    pub fn bulk_wait(&mut self, warp: u32, left: usize) {
        let groups = &mut self.bulk[warp as usize];
        let count = (groups.len() - 1).saturating_sub(left);
        let ended: Vec<Range> = groups.drain(..count).flatten().collect();
        self.reads_end(warp, ended);
    }

    fn reads_end(&mut self, warp: u32, ranges: Vec<Range>) {
        let clock = self.now(warp);
        for (cta, first, n) in ranges {
            for cell in &mut self.cells[cta][first..first + n] {
                for read in &mut cell.reads {
                    if read.clock == PENDING && read.thread == warp {
                        read.clock = clock;
                    }
                }
            }
        }
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
    use super::super::lanes::WARP;
    use super::*;

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
