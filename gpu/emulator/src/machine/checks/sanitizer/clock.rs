//! Vector clocks: what a warp knows of the others, and what a barrier hands on.

use std::collections::BTreeMap;
use std::sync::Arc;

/// A vector clock, by thread of the sanitizer: warps first, then mbarriers.
pub(super) type Clock = Vec<u32>;

pub(super) fn join(to: &mut Clock, from: &Clock) {
    if to.len() < from.len() {
        to.resize(from.len(), 0);
    }
    to.iter_mut().zip(from).for_each(|(a, b)| *a = (*a).max(*b));
}

pub(super) fn at(clock: &Clock, i: u32) -> u32 {
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
pub(super) struct Seen {
    pub(super) clock: Clock,
    /// The part of it that the asynchronous proxy may see.
    pub(super) visible: Clock,
    pub(super) far: Far,
    /// What relaxed accesses have read, and a fence would make known.
    pub(super) observed: Far,
    /// What came before a fence, which later relaxed writes release; barriers hand it on.
    pub(super) fenced: Far,
}

impl Seen {
    pub(super) fn join(&mut self, other: &Seen) {
        join(&mut self.clock, &other.clock);
        join(&mut self.visible, &other.visible);
        join_far(&mut self.far, &other.far);
        join_far(&mut self.observed, &other.observed);
        join_far(&mut self.fenced, &other.fenced);
    }
}

/// What orders threads: what has been released into it, for the present phase and the last.
#[derive(Clone, Debug, Default)]
pub(super) struct Order {
    pub(super) pending: Seen,
    pub(super) done: Seen,
    /// Thread number of an mbarrier's asynchronous writes.
    pub(super) thread: Option<u32>,
}
