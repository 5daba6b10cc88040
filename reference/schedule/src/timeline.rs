//! Plays a schedule with one duration an op: when every chunk runs, and how long the ranks idle.

use crate::check::{Checked, Fault, check};
use crate::{Op, Schedule, ScheduleError};

/// Durations of a chunk in any one unit of time.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ChunkDurations {
    /// Forward of one stage on one micro-batch.
    pub f: f64,
    /// Full backward; the input part alone takes `b - w`.
    pub b: f64,
    /// Weight part of the backward.
    pub w: f64,
    /// Overlapped forward and backward.
    pub fb: f64,
}

impl ChunkDurations {
    /// Whether a schedule can be played with these durations.
    ///
    /// # Errors
    /// [`ScheduleError`] for a duration that is not a positive finite number, and for a weight part
    /// that is not shorter than its backward.
    pub fn validate(&self) -> Result<(), ScheduleError> {
        let named = [("f", self.f), ("b", self.b), ("w", self.w), ("fb", self.fb)];
        for (name, value) in named {
            if !(value.is_finite() && value > 0.0) {
                return Err(ScheduleError(format!(
                    "duration {name} must be positive, found {value}"
                )));
            }
        }
        if self.w >= self.b {
            let (w, b) = (self.w, self.b);
            return Err(ScheduleError(format!(
                "w is a part of b and must be smaller: w {w}, b {b}"
            )));
        }
        Ok(())
    }

    /// Duration of one op.
    pub fn of(&self, op: Op) -> f64 {
        match op {
            Op::F(_) => self.f,
            Op::B(_) => self.b,
            Op::Bi(_) => self.b - self.w,
            Op::W(_) => self.w,
            Op::FB { .. } => self.fb,
        }
    }
}

/// A schedule on the clock.
#[derive(Debug, Clone, PartialEq)]
pub struct Timeline {
    /// `spans[rank][i]`: start and end of the rank's i-th op, in the unit of the durations.
    pub spans: Vec<Vec<(f64, f64)>>,
    /// End of the last op; the first begins at 0.
    pub makespan: f64,
    /// By rank: time without an op, from 0 to the makespan.
    pub bubble: Vec<f64>,
    /// By rank: most chunks alive at once; see [`Checked::activations_peak`].
    pub activations_peak: Vec<usize>,
}

impl Timeline {
    /// Mean idle time over ranks.
    pub fn mean_bubble(&self) -> f64 {
        self.bubble.iter().sum::<f64>() / self.bubble.len() as f64
    }
}

/// Checks `schedule` and plays it: an op starts when its rank is free and its inputs are there.
/// Sending takes no time.
///
/// # Errors
/// [`Fault`], as [`check`].
pub fn play(schedule: &Schedule, durations: ChunkDurations) -> Result<Timeline, Fault> {
    let Checked { order, activations_peak } = check(schedule)?;
    let (ranks, dirs, mbs) =
        (schedule.ranks.len(), schedule.geometry.dirs(), schedule.micro_batches_per_dir());
    let slot = |(rank, dir): (usize, u8), mb: u32| (rank * dirs + dir as usize) * mbs + mb as usize;
    let mut forward_end = vec![0.0f64; ranks * dirs * mbs];
    let mut backward_end = forward_end.clone();
    let mut free = vec![0.0f64; ranks];
    let mut spans: Vec<Vec<(f64, f64)>> =
        schedule.ranks.iter().map(|ops| vec![(0.0, 0.0); ops.len()]).collect();
    for (rank, index) in order {
        let (rank, index) = (rank as usize, index as usize);
        let op = schedule.ranks[rank][index];
        let mut start = free[rank];
        if let Some(f) = op.forward()
            && let Some(from) = schedule.geometry.shallower(rank, f.dir)
        {
            start = start.max(forward_end[slot(from, f.mb)]);
        }
        if let Some(b) = op.backward()
            && let Some(from) = schedule.geometry.deeper(rank, b.dir)
        {
            start = start.max(backward_end[slot(from, b.mb)]);
        }
        let end = start + durations.of(op);
        if let Some(f) = op.forward() {
            forward_end[slot((rank, f.dir), f.mb)] = end;
        }
        if let Some(b) = op.backward() {
            backward_end[slot((rank, b.dir), b.mb)] = end;
        }
        spans[rank][index] = (start, end);
        free[rank] = end;
    }
    let makespan = free.iter().copied().fold(0.0, f64::max);
    let busy = |ops: &[Op]| ops.iter().map(|&op| durations.of(op)).sum::<f64>();
    let bubble = schedule.ranks.iter().map(|ops| makespan - busy(ops)).collect();
    Ok(Timeline { spans, makespan, bubble, activations_peak })
}
