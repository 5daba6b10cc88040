//! What the lanes of one warp know of one another.
//!
//! Lanes are not ordered by standing in one warp, also where they execute together (since Volta;
//! CUDA C++ Programming Guide, "Independent Thread Scheduling"). `bar.warp.sync` orders what its
//! members did before it. The other instructions with a member mask order no memory, but whoever
//! comes past one knows that the others have executed what comes before it: their reads are over,
//! their writes need not be visible.
//!
//! Steps are those of the warp's own clock. Whatever orders the warp (a barrier of the CTA, an
//! mbarrier, an atomic) is taken to have been reached by all of its lanes: who waits for it knows
//! them all up to there. That forgives rather than accuses.

use super::super::registers::LANES;

/// The lane of an access that the warp makes as a whole.
pub const WARP: usize = LANES;

/// What the lanes of a warp know.
#[derive(Clone, Debug, Default)]
pub struct Lanes {
    /// Of each other's writes, and of reads.
    writes: Known,
    reads: Known,
}

/// For each lane the last step of each lane that it knows.
#[derive(Clone, Debug)]
struct Known {
    /// The step up to which it knows all lanes.
    all: [u32; LANES],
    of: Box<[[u32; LANES]; LANES]>,
}

impl Default for Known {
    fn default() -> Self {
        Known { all: [0; LANES], of: Box::new([[0; LANES]; LANES]) }
    }
}

/// The lanes of a mask.
fn each(mask: u32) -> impl Iterator<Item = usize> {
    (0..LANES).filter(move |lane| mask >> lane & 1 != 0)
}

impl Known {
    /// The lanes of a mask tell each other what they know, and of themselves up to `now`.
    fn meet(&mut self, mask: u32, now: u32) {
        if mask == !0 {
            self.all = [now; LANES];
            return;
        }
        let all = each(mask).map(|lane| self.all[lane]).max().unwrap_or(0);
        let mut of = [0; LANES];
        for lane in each(mask) {
            of.iter_mut().zip(&self.of[lane]).for_each(|(a, b)| *a = (*a).max(*b));
        }
        each(mask).for_each(|lane| of[lane] = now);
        for lane in each(mask) {
            self.all[lane] = all;
            self.of[lane] = of;
        }
    }

    fn acquire(&mut self, mask: u32, step: u32) {
        each(mask).for_each(|lane| self.all[lane] = self.all[lane].max(step));
    }

    /// The first of some lanes of whose step a lane does not know.
    fn unknown(&self, lane: usize, others: u32, step: u32) -> Option<usize> {
        if self.all[lane] >= step {
            return None;
        }
        each(others & !(1 << lane)).find(|&other| self.of[lane][other] < step)
    }
}

impl Lanes {
    /// The lanes of a mask have met at step `now`; `memory`: at `bar.warp.sync`.
    pub fn meet(&mut self, mask: u32, now: u32, memory: bool) {
        self.reads.meet(mask, now);
        if memory {
            self.writes.meet(mask, now);
        }
    }

    /// Lanes come after all that the warp did up to a step.
    pub fn acquire(&mut self, mask: u32, step: u32) {
        self.reads.acquire(mask, step);
        self.writes.acquire(mask, step);
    }

    /// The lane among those of an access at a step, a write or a read, that `lane` does not come
    /// after. What several lanes wrote at once is each one's own.
    pub fn unordered(&self, lane: usize, others: u32, step: u32, wrote: bool) -> Option<usize> {
        if lane == WARP || wrote && others >> lane & 1 != 0 {
            return None;
        }
        let known = if wrote { &self.writes } else { &self.reads };
        known.unknown(lane, others, step)
    }
}

/// The lanes of an access, as a mask.
pub fn mask_of(lane: usize) -> u32 {
    if lane == WARP { !0 } else { 1 << lane }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_met_knows_writes_and_what_the_others_knew() {
        let mut lanes = Lanes::default();
        assert_eq!(lanes.unordered(1, 1, 5, true), Some(0));
        lanes.meet(0b011, 5, true);
        lanes.meet(0b110, 6, true);
        // Lane 2 knows lane 0 by way of lane 1, and not what lane 0 did afterwards.
        assert_eq!(lanes.unordered(2, 1, 5, true), None);
        assert_eq!(lanes.unordered(2, 1, 6, true), Some(0));
        assert_eq!(lanes.unordered(0, 4, 6, true), Some(2));
    }

    #[test]
    fn an_exchange_ends_reads_and_orders_no_writes() {
        let mut lanes = Lanes::default();
        lanes.meet(!0, 3, false);
        assert_eq!(lanes.unordered(7, 1, 3, false), None);
        assert_eq!(lanes.unordered(7, 1, 3, true), Some(0));
    }

    #[test]
    fn the_warp_as_a_whole_and_a_common_write_are_in_order() {
        let lanes = Lanes::default();
        assert_eq!(lanes.unordered(WARP, !0, 9, true), None);
        assert_eq!(lanes.unordered(4, 0xff, 9, true), None);
        assert_eq!(lanes.unordered(4, 0xff, 9, false), Some(0));
    }
}
