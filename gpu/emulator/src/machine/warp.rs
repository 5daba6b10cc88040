//! A warp: its registers, its groups of converged threads, and how they part and meet again.
//!
//! Threads that took different sides of a branch form groups, each with a program counter. A
//! [`Join`] is made where the sides meet (the branch's immediate post-dominator) and merges
//! groups as they arrive. Groups take turns, so a spinning one does not starve the others; lanes
//! that wait at a join for a group that spins on and on are let go, as Volta's independent thread
//! scheduling would.

use bytemuck::Zeroable;

use super::layout::FunctionInfo;
use super::meeting::Meeting;
use super::registers::{Slot, WideSlot};
use super::wgmma::Issued;

/// In place of the index of a [`Join`]: the group meets nobody before its lanes exit.
pub const NO_JOIN: u32 = u32::MAX;

/// A caller to come back to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Frame {
    pub return_pc: u32,
    pub base: u32,
    pub pred_base: u32,
    pub local_base: u32,
    pub join: u32,
}

/// What a group waits for; it tries again when its turn comes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Wait {
    /// Nothing: it runs.
    #[default]
    Ready,
    /// A named barrier's next generation; the group has arrived.
    Barrier { id: u32, generation: u64 },
    /// The lanes of this mask, at the same instruction.
    Lanes { mask: u32 },
    /// Members of a mask, at an instruction of the same kind.
    Members { missing: u32 },
    /// Warps of the warpgroup, as a mask, that have not come as far with their wgmmas.
    Warpgroup { missing: u32 },
    /// All threads of the cluster to arrive at its barrier.
    Cluster,
    /// The phase of this parity of the mbarrier at a shared address to complete.
    Mbarrier { address: u64, parity: u32 },
    /// Registers that other warpgroups have to give back.
    Registers { wanted: u32 },
}

/// Threads that execute together.
#[derive(Clone, Debug)]
pub struct Group {
    pub pc: u32,
    pub mask: u32,
    pub base: u32,
    pub pred_base: u32,
    pub local_base: u32,
    pub join: u32,
    pub frames: Vec<Frame>,
    pub wait: Wait,
    /// Instructions run since some group last arrived at a join.
    pub spun: u64,
}

/// A place where groups meet.
#[derive(Clone, Debug)]
pub struct Join {
    pub pc: u32,
    pub depth: u32,
    /// Lanes that shall meet here; 0 where the slot is free.
    pub expected: u32,
    pub parent: u32,
    /// Those that have arrived.
    pub parked: Option<Group>,
}

/// In how many places a warp remembers where its operations met global memory.
pub const PLACES: usize = 8;

/// A warp of a CTA.
pub struct Warp {
    /// Number in its CTA.
    pub index: u32,
    /// Lanes that exist and have not exited.
    pub live: u32,
    /// Its 32-bit registers, frame above frame.
    pub regs: Vec<Slot>,
    /// Its 64-bit registers; a frame starts at the same slot of both files.
    pub wide_regs: Vec<WideSlot>,
    /// Its predicates, a bit a lane.
    pub preds: Vec<u32>,
    /// The carry flag of `add.cc` and its kin, a bit a lane.
    pub carry: u32,
    /// Local memory: `local_words` a lane, word by word for all lanes.
    pub local: Vec<u32>,
    pub local_words: usize,
    pub groups: Vec<Group>,
    pub joins: Vec<Join>,
    /// Lanes that wait for other members of a mask.
    pub meetings: Vec<Meeting>,
    pub turn: usize,
    /// Whether lanes were let go from a join before the others came: that the warp is in parts is
    /// then the schedule's doing, not the program's.
    pub let_go: bool,
    /// Named barriers at which a part of the warp has arrived: (id, mask).
    pub partial_arrivals: Vec<(u32, u32)>,
    /// Generation of the cluster barrier at which the warp last arrived.
    pub cluster_generation: u64,
    /// Instructions run, for clocks and roles.
    pub clock: u64,
    pub barrier_waits: u64,
    /// How many `setmaxnreg` it has executed.
    pub register_changes: usize,
    /// The wgmmas of the group that is not yet committed.
    pub issued: Vec<Issued>,
    /// Numbers of the allocations that operations met last: where to look first.
    pub places: [u32; PLACES],
}

impl Warp {
    /// A warp of `mask` threads about to execute instruction 0, with room for the entry's frame.
    pub fn new(index: u32, mask: u32, entry: &FunctionInfo) -> Warp {
        let group = Group {
            pc: 0,
            mask,
            base: 0,
            pred_base: 0,
            local_base: 0,
            join: NO_JOIN,
            frames: Vec::new(),
            wait: Wait::Ready,
            spun: 0,
        };
        let mut warp = Warp {
            index,
            live: mask,
            regs: Vec::new(),
            wide_regs: Vec::new(),
            preds: Vec::new(),
            carry: 0,
            local: Vec::new(),
            local_words: 0,
            groups: vec![group],
            joins: Vec::new(),
            meetings: Vec::new(),
            turn: 0,
            let_go: false,
            partial_arrivals: Vec::new(),
            cluster_generation: 0,
            clock: 0,
            barrier_waits: 0,
            register_changes: 0,
            issued: Vec::new(),
            places: [0; PLACES],
        };
        warp.grow(0, 0, entry);
        warp
    }

    /// Makes room for the registers and predicates of a frame at `base` and `pred_base`.
    pub fn grow(&mut self, base: u32, pred_base: u32, function: &FunctionInfo) {
        fn room<T: Clone + Zeroable>(file: &mut Vec<T>, end: u32) {
            if file.len() < end as usize {
                file.resize(end as usize, T::zeroed());
            }
        }
        room(&mut self.regs, base + function.slots);
        room(&mut self.wide_regs, base + function.wide_slots);
        room(&mut self.preds, pred_base + function.predicates);
    }

    /// Makes room for local memory up to `bytes` a lane; lanes alternate word by word.
    pub fn grow_local(&mut self, bytes: u32) {
        self.local_words = self.local_words.max(bytes.div_ceil(4) as usize);
        let words = self.local_words * super::registers::LANES;
        if self.local.len() < words {
            self.local.resize(words, 0);
        }
    }

    /// Whether all its threads have exited.
    pub fn done(&self) -> bool {
        self.live == 0
    }

    /// Splits the group at `at`: lanes of `taken` go to `target`, the others to `next`; they meet
    /// at `meet` (`None`: nowhere before they exit).
    pub fn split(&mut self, at: usize, taken: u32, target: u32, next: u32, meet: Option<u32>) {
        let parent = self.groups[at].join;
        let depth = self.groups[at].frames.len() as u32;
        let mask = self.groups[at].mask;
        let join = match meet {
            None => parent,
            Some(pc) => {
                let known = self.joins.get(parent as usize);
                if known.is_some_and(|j| j.pc == pc && j.depth == depth) {
                    parent
                } else {
                    self.new_join(Join { pc, depth, expected: mask, parked: None, parent })
                }
            }
        };
        let mut other = self.groups[at].clone();
        let group = &mut self.groups[at];
        group.join = join;
        group.mask = mask & !taken;
        group.pc = next;
        other.join = join;
        other.mask = taken;
        other.pc = target;
        self.groups.push(other);
    }

    fn new_join(&mut self, join: Join) -> u32 {
        // Slots of joins that nobody expects any more are used again.
        if let Some(i) = self.joins.iter().position(|j| j.expected == 0) {
            self.joins[i] = join;
            return i as u32;
        }
        self.joins.push(join);
        self.joins.len() as u32 - 1
    }

    /// The group at `at` has come to its join: it waits there, or goes on merged with the others.
    pub fn arrive(&mut self, at: usize) {
        let mut group = self.groups.swap_remove(at);
        let id = group.join;
        for other in &mut self.groups {
            other.spun = 0;
        }
        group.spun = 0;
        group.wait = Wait::Ready;
        let join = &mut self.joins[id as usize];
        if let Some(parked) = &join.parked {
            group.mask |= parked.mask;
        }
        join.parked = Some(group);
        self.complete(id);
    }

    /// Lets the parked group of a join go on if all that are expected have arrived.
    fn complete(&mut self, id: u32) {
        let join = &mut self.joins[id as usize];
        let arrived = join.parked.as_ref().map_or(0, |g| g.mask);
        if arrived == join.expected {
            join.expected = 0;
            if let Some(mut group) = join.parked.take() {
                group.join = join.parent;
                self.groups.push(group);
            }
        }
    }

    /// No join waits for these lanes any longer, up to (not including) the join `until`.
    fn leave(&mut self, mask: u32, from: u32, until: u32) {
        let mut id = from;
        while id != NO_JOIN && id != until {
            let parent = self.joins[id as usize].parent;
            self.joins[id as usize].expected &= !mask;
            self.complete(id);
            id = parent;
        }
    }

    /// The lanes of `mask`, of the group at `at`, exit.
    pub fn exit(&mut self, at: usize, mask: u32) {
        self.live &= !mask;
        let from = self.groups[at].join;
        self.groups[at].mask &= !mask;
        if self.groups[at].mask == 0 {
            self.groups.swap_remove(at);
        }
        self.leave(mask, from, NO_JOIN);
    }

    /// Lets lanes go from joins that others wait for at an instruction with a member mask: those
    /// cannot come before. Returns whether there were any.
    pub fn release_members(&mut self) -> bool {
        let live = self.live;
        let missing = self.meetings.iter().fold(0, |m, meeting| m | meeting.missing(live));
        missing != 0 && self.release_parked(missing)
    }

    /// Lets lanes that wait at a join, some of `lanes` among them, go on alone; returns whether
    /// there were any.
    pub fn release_parked(&mut self, lanes: u32) -> bool {
        for id in 0..self.joins.len() {
            let join = &mut self.joins[id];
            if let Some(mut group) = join.parked.take_if(|parked| parked.mask & lanes != 0) {
                join.expected &= !group.mask;
                group.join = join.parent;
                self.groups.push(group);
                self.let_go = true;
                return true;
            }
        }
        false
    }

    /// Merges with the group at `at` every other group of these lanes that stands at the same
    /// instruction in the same call; returns the merged mask.
    pub fn gather(&mut self, at: usize, lanes: u32) -> u32 {
        let mut at = at;
        let mut i = 0;
        while i < self.groups.len() {
            let (a, b) = (&self.groups[at], &self.groups[i]);
            let together = i != at && a.pc == b.pc && a.frames == b.frames && a.base == b.base;
            if !together || b.mask & !lanes != 0 {
                i += 1;
                continue;
            }
            let common = self.common_join(a.join, b.join);
            let (mask_a, mask_b, join_a, join_b) = (a.mask, b.mask, a.join, b.join);
            self.groups[at].mask |= mask_b;
            self.groups[at].join = common;
            self.groups.swap_remove(i);
            if at == self.groups.len() {
                at = i;
            }
            self.leave(mask_a, join_a, common);
            self.leave(mask_b, join_b, common);
            i = 0;
        }
        self.groups[at].mask
    }

    fn common_join(&self, a: u32, b: u32) -> u32 {
        let parent = |id: u32| self.joins[id as usize].parent;
        let mut x = a;
        while x != NO_JOIN {
            let mut y = b;
            while y != NO_JOIN {
                if x == y {
                    return x;
                }
                y = parent(y);
            }
            x = parent(x);
        }
        NO_JOIN
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_sides_meet_at_the_join() {
        let mut warp = Warp::new(0, !0, &FunctionInfo::default());
        warp.split(0, 0xff, 10, 5, Some(20));
        assert_eq!(warp.groups.len(), 2);
        warp.groups[0].pc = 20;
        warp.arrive(0);
        assert_eq!(warp.groups.len(), 1);
        warp.groups[0].pc = 20;
        warp.arrive(0);
        assert_eq!((warp.groups[0].mask, warp.groups[0].join), (!0, NO_JOIN));
    }

    #[test]
    fn lanes_that_exit_are_no_longer_waited_for() {
        let mut warp = Warp::new(0, !0, &FunctionInfo::default());
        warp.split(0, 0xff, 10, 20, Some(20));
        warp.arrive(0);
        assert_eq!(warp.groups.len(), 1);
        warp.exit(0, 0xff);
        assert_eq!(warp.groups[0].mask, !0xff);
        assert_eq!(warp.live, !0xff);
    }

    #[test]
    fn a_loop_that_lanes_leave_one_by_one_keeps_one_join() {
        let mut warp = Warp::new(0, !0, &FunctionInfo::default());
        for lane in 0..31 {
            let at = warp.groups.iter().position(|g| g.pc == 0).unwrap();
            warp.split(at, 1 << lane, 9, 0, Some(9));
            let at = warp.groups.iter().position(|g| g.pc == 9).unwrap();
            warp.arrive(at);
        }
        assert_eq!(warp.joins.len(), 1);
        warp.groups[0].pc = 9;
        warp.arrive(0);
        assert_eq!(warp.groups[0].mask, !0);
    }

    #[test]
    fn released_lanes_gather_again() {
        let mut warp = Warp::new(0, !0, &FunctionInfo::default());
        warp.split(0, 0xff, 10, 20, Some(20));
        let at = warp.groups.iter().position(|g| g.pc == 20).unwrap();
        warp.arrive(at);
        assert!(warp.release_parked(!0));
        assert_eq!(warp.groups.len(), 2);
        for group in &mut warp.groups {
            group.pc = 30;
        }
        assert_eq!(warp.gather(1, !0), !0);
        assert_eq!(warp.groups.len(), 1);
        assert_eq!(warp.groups[0].join, NO_JOIN);
    }
}
