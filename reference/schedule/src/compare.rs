//! The DualPipe paper's table as data: bubbles and memory of all schedules with the same number of
//! stages.

use serde::Serialize;

use crate::timeline::{ChunkDurations, play};
use crate::{Schedule, ScheduleError, ScheduleKind, ScheduleShape};

/// One schedule's row.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ScheduleRow {
    /// [`ScheduleKind::name`].
    pub kind: &'static str,
    /// Ranks (devices) that the stages need.
    pub ranks: usize,
    /// Stages whose weights a rank holds.
    pub parameters: usize,
    /// Most chunks of activations alive on any rank.
    pub activations: usize,
    /// Idle time of a rank, mean over ranks, in the unit of the durations.
    pub bubble: f64,
    /// Idle time of a rank by [`bubble_formula`], in the same unit.
    pub bubble_formula: Option<f64>,
    /// The formula in words, `(P-1)(F+B)` for instance: P stages, n ranks, and the durations F, B,
    /// W and FB of [`ChunkDurations`].
    pub formula: Option<&'static str>,
    /// End of the last op, in the same unit.
    pub makespan: f64,
    /// Idle share of the ranks' time, 0 to 1.
    pub bubble_fraction: f64,
    /// Why the schedule cannot be built for these sizes; then all numbers are 0 and there is no
    /// formula.
    pub refused: Option<String>,
}

/// The published bubble of `kind` with `p` stages on that many ranks: the formula's text, and the
/// idle time of a rank in the unit of the durations.
///
/// 1F1B, ZB1P, DualPipe, DualPipeV as in the DualPipe repository's table (B is the full backward);
/// GPipe as 1F1B; interleaved 1F1B from Narayanan et al. 2021 with the durations of one chunk.
/// Exact for any F and B in GPipe, 1F1B and interleaved; for F = input backward = W in ZB1P; for
/// F = B in Chimera; for F = input backward >= W and F&B = F + B in DualPipe and DualPipeV. ZB-V's
/// zero holds for F = input backward = W and counts only what lies between a rank's first and last
/// op.
pub fn bubble_formula(
    kind: ScheduleKind,
    p: usize,
    ranks: usize,
    d: ChunkDurations,
) -> (&'static str, f64) {
    let (stages, n) = (p as f64, ranks as f64);
    match kind {
        ScheduleKind::GPipe | ScheduleKind::OneFOneB => {
            ("(P-1)(F+B)", (stages - 1.0) * (d.f + d.b))
        }
        ScheduleKind::Interleaved => ("(n-1)(F+B)", (n - 1.0) * (d.f + d.b)),
        ScheduleKind::Zb1p => ("(P-1)(F+B-2W)", (stages - 1.0) * (d.f + d.b - 2.0 * d.w)),
        ScheduleKind::ZbV => ("0", 0.0),
        ScheduleKind::Chimera => ("(P/2-1)(F+B)", (stages / 2.0 - 1.0) * (d.f + d.b)),
        ScheduleKind::DualPipe | ScheduleKind::DualPipeV => {
            ("(P/2-1)(FB+B-3W)", (stages / 2.0 - 1.0) * (d.fb + d.b - 3.0 * d.w))
        }
    }
}

/// The row of one kind; sizes that are illegal for it give a row with [`ScheduleRow::refused`].
pub fn row(kind: ScheduleKind, shape: ScheduleShape, durations: ChunkDurations) -> ScheduleRow {
    let schedule = match Schedule::new(kind, shape) {
        Ok(schedule) => schedule,
        Err(ScheduleError(reason)) => return refused(kind, reason),
    };
    let timeline = play(&schedule, durations).expect("the project's schedules are executable");
    let ranks = schedule.ranks.len();
    let (formula, value) = bubble_formula(kind, shape.stages, ranks, durations);
    ScheduleRow {
        kind: kind.name(),
        ranks,
        parameters: schedule.geometry.held(0).len(),
        activations: timeline.activations_peak.iter().copied().max().unwrap_or(0),
        bubble: timeline.mean_bubble(),
        bubble_formula: Some(value),
        formula: Some(formula),
        makespan: timeline.makespan,
        bubble_fraction: timeline.mean_bubble() / timeline.makespan,
        refused: None,
    }
}

fn refused(kind: ScheduleKind, reason: String) -> ScheduleRow {
    ScheduleRow {
        kind: kind.name(),
        ranks: 0,
        parameters: 0,
        activations: 0,
        bubble: 0.0,
        bubble_formula: None,
        formula: None,
        makespan: 0.0,
        bubble_fraction: 0.0,
        refused: Some(reason),
    }
}

/// A [`row`] for each of [`ScheduleKind::ALL`], in that order.
pub fn table(shape: ScheduleShape, durations: ChunkDurations) -> Vec<ScheduleRow> {
    ScheduleKind::ALL.into_iter().map(|kind| row(kind, shape, durations)).collect()
}
