//! Proves a schedule executable: every chunk once, weight gradients first in first out, no
//! deadlock; and counts how many activations a rank keeps alive.

use std::collections::VecDeque;

use crate::{Chunk, Op, Schedule};

/// Why a schedule cannot be executed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Fault {
    /// A chunk is run a wrong number of times.
    #[error("rank {rank}: {part} of dir {} mb {} runs {count} times, expected once", chunk.dir, chunk.mb)]
    Count {
        /// The rank whose stream is at fault.
        rank: usize,
        /// `forward`, `backward` or `weight gradient`.
        part: &'static str,
        /// The chunk, by direction and micro-batch.
        chunk: Chunk,
        /// How often it runs; 1 for a chunk outside the schedule's directions or micro-batches.
        count: usize,
    },
    /// A weight gradient is not the oldest in the queue.
    #[error(
        "rank {rank}: op {index} pops the weight gradient of {popped:?}, the oldest queued is {oldest:?}"
    )]
    Queue {
        /// The rank whose stream is at fault.
        rank: usize,
        /// The op's place in the rank's stream, from 0.
        index: usize,
        /// The chunk whose weight gradient the op computes.
        popped: Chunk,
        /// The chunk that has waited longest, whose turn it is; `None` where none waits.
        oldest: Option<Chunk>,
    },
    /// Ranks wait for each other.
    #[error("deadlock: {}", waits.join("; "))]
    Deadlock {
        /// One sentence a blocked rank: its op and what it waits for.
        waits: Vec<String>,
    },
}

/// What a checked schedule is known to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Checked {
    /// An order of all ops, as `(rank, place in its stream)`, in which every op comes after what it
    /// depends on.
    pub order: Vec<(u32, u32)>,
    /// By rank: most chunks whose activations are alive at once. A chunk lives from the start of
    /// its forward to the end of its weight gradient.
    pub activations_peak: Vec<usize>,
}

/// Proves that `schedule` can be executed: on every rank each chunk has exactly one forward, one
/// input-backward and one weight gradient, queued weight gradients run in the order in which they
/// were queued, and no ranks wait for each other.
///
/// # Errors
/// The first [`Fault`] found.
pub fn check(schedule: &Schedule) -> Result<Checked, Fault> {
    for rank in 0..schedule.ranks.len() {
        check_counts(schedule, rank)?;
        check_queue(schedule, rank)?;
    }
    let order = order(schedule)?;
    Ok(Checked { order, activations_peak: schedule.ranks.iter().map(|r| peak_alive(r)).collect() })
}

/// The chunk of which an op runs one part.
type PartOf = fn(Op) -> Option<Chunk>;

fn check_counts(schedule: &Schedule, rank: usize) -> Result<(), Fault> {
    let mbs = schedule.micro_batches_per_dir();
    let parts: [(&'static str, PartOf); 3] =
        [("forward", Op::forward), ("backward", Op::backward), ("weight gradient", Op::weight)];
    for (part, of) in parts {
        let mut counts = vec![0usize; schedule.geometry.dirs() * mbs];
        for chunk in schedule.ranks[rank].iter().filter_map(|&op| of(op)) {
            match counts.get_mut(chunk.dir as usize * mbs + chunk.mb as usize) {
                Some(count) if (chunk.mb as usize) < mbs => *count += 1,
                _ => return Err(Fault::Count { rank, part, chunk, count: 1 }),
            }
        }
        if let Some(i) = counts.iter().position(|&count| count != 1) {
            let chunk = Chunk { dir: (i / mbs) as u8, mb: (i % mbs) as u32 };
            return Err(Fault::Count { rank, part, chunk, count: counts[i] });
        }
    }
    Ok(())
}

fn check_queue(schedule: &Schedule, rank: usize) -> Result<(), Fault> {
    let mut queue = VecDeque::new();
    for (index, &op) in schedule.ranks[rank].iter().enumerate() {
        match op {
            Op::Bi(chunk) => queue.push_back(chunk),
            Op::W(popped) => {
                let oldest = queue.pop_front();
                if oldest != Some(popped) {
                    return Err(Fault::Queue { rank, index, popped, oldest });
                }
            }
            _ => {}
        }
    }
    Ok(())
}

/// Chunks done so far, by rank, direction and micro-batch.
struct Done {
    mbs: usize,
    dirs: usize,
    forward: Vec<bool>,
    backward: Vec<bool>,
}

impl Done {
    fn slot(&self, rank: usize, chunk: Chunk) -> usize {
        (rank * self.dirs + chunk.dir as usize) * self.mbs + chunk.mb as usize
    }

    /// What `op` still waits for, if anything: `(rank, part, chunk)`.
    fn blocker(&self, s: &Schedule, rank: usize, op: Op) -> Option<(usize, &'static str, Chunk)> {
        if let Some(f) = op.forward()
            && let Some((from, dir)) = s.geometry.shallower(rank, f.dir)
        {
            let needed = Chunk { dir, mb: f.mb };
            if !self.forward[self.slot(from, needed)] {
                return Some((from, "F", needed));
            }
        }
        let b = op.backward()?;
        if !self.forward[self.slot(rank, b)] {
            return Some((rank, "F", b));
        }
        let (from, dir) = s.geometry.deeper(rank, b.dir)?;
        let needed = Chunk { dir, mb: b.mb };
        (!self.backward[self.slot(from, needed)]).then_some((from, "B", needed))
    }
}

/// Executes the streams without a clock: each rank runs on until an op lacks an input.
fn order(s: &Schedule) -> Result<Vec<(u32, u32)>, Fault> {
    let (ranks, dirs, mbs) = (s.ranks.len(), s.geometry.dirs(), s.micro_batches_per_dir());
    let slots = ranks * dirs * mbs;
    let mut done = Done { mbs, dirs, forward: vec![false; slots], backward: vec![false; slots] };
    let mut next = vec![0usize; ranks];
    let mut order = Vec::with_capacity(s.ranks.iter().map(Vec::len).sum());
    let mut ready: VecDeque<usize> = (0..ranks).collect();
    let mut waiting = vec![true; ranks];
    while let Some(rank) = ready.pop_front() {
        waiting[rank] = false;
        while let Some(&op) = s.ranks[rank].get(next[rank]) {
            if done.blocker(s, rank, op).is_some() {
                break;
            }
            let mut wake = |place: Option<(usize, u8)>| {
                if let Some((r, _)) = place
                    && r != rank
                    && !std::mem::replace(&mut waiting[r], true)
                {
                    ready.push_back(r);
                }
            };
            if let Some(f) = op.forward() {
                let slot = done.slot(rank, f);
                done.forward[slot] = true;
                wake(s.geometry.deeper(rank, f.dir));
            }
            if let Some(b) = op.backward() {
                let slot = done.slot(rank, b);
                done.backward[slot] = true;
                wake(s.geometry.shallower(rank, b.dir));
            }
            order.push((rank as u32, next[rank] as u32));
            next[rank] += 1;
        }
    }
    let blocked = |rank: usize| {
        let op = *s.ranks[rank].get(next[rank])?;
        let (from, part, chunk) = done.blocker(s, rank, op)?;
        Some(format!(
            "rank {rank} at op {} ({op:?}) waits for {part} of {chunk:?} on rank {from}",
            next[rank]
        ))
    };
    let waits: Vec<String> = (0..ranks).filter_map(blocked).collect();
    if waits.is_empty() { Ok(order) } else { Err(Fault::Deadlock { waits }) }
}

/// Most chunks alive at once in one rank's stream.
fn peak_alive(ops: &[Op]) -> usize {
    let (mut alive, mut peak) = (0usize, 0usize);
    for op in ops {
        alive += usize::from(op.forward().is_some());
        peak = peak.max(alive);
        alive -= usize::from(op.weight().is_some());
    }
    peak
}
