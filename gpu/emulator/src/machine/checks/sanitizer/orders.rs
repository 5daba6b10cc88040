//! What orders warps: barriers, mbarriers, atomics and fences release what a warp knows, and others
//! acquire it.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::Sanitizer;
use super::clock::{Far, PREVIOUS_LAUNCH, Seen, at, join, join_far};

impl Sanitizer {
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

    /// The thread that stands for the asynchronous writes which complete on an mbarrier.
    pub(super) fn thread_of(&mut self, mbarrier: u64) -> u32 {
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

    pub(super) fn count_of(&self, thread: u32) -> u32 {
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

    pub(super) fn acquire(&mut self, warp: u32, done: &Seen) {
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
}
