//! How far a prediction may be off: the spread of the errors on the nearest validated runs.
//!
//! [`VALIDATED`] lists every public run that the simulator was compared with, by GPU, software and
//! kind of model, with measured over predicted time; a test keeps it what
//! [`validate`](crate::validate::validate) gives. A scenario takes the runs that are most like it
//! and, of their ratios, the range that holds eight of ten.

use std::sync::LazyLock;

use serde::Serialize;

use crate::config::Scenario;

/// `gpu,stack,family,ratio`: measured over predicted time of a step.
pub const VALIDATED: &str = include_str!("../../presets/published/validated.csv");

/// Fewest runs that say anything about a spread.
const FEWEST: usize = 6;

/// What a run is compared by.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Likeness {
    /// Name of the GPU.
    pub gpu: String,
    /// Name of the software.
    pub stack: String,
    /// `moe` or `dense`.
    pub family: String,
}

impl Likeness {
    /// Of a scenario.
    pub fn of(s: &Scenario) -> Likeness {
        let family = if s.model.moe.is_some() { "moe" } else { "dense" };
        let plain = |name: &str| name.replace(',', "");
        let (gpu, stack) = (plain(&s.cluster.gpu.name), plain(&s.stack.name));
        Likeness { gpu, stack, family: family.to_owned() }
    }
}

/// A validated run: what it is like, and measured over predicted time.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ValidatedRun {
    /// What it is compared by.
    pub like: Likeness,
    /// Measured over predicted time of a step.
    pub ratio: f64,
}

/// Seconds between which a step lies in eight of ten cases, and on what that rests.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Interval {
    /// Lower end, seconds.
    pub low_s: f64,
    /// Upper end, seconds.
    pub high_s: f64,
    /// Validated runs that it was made from.
    pub runs: usize,
    /// What these runs share with the scenario.
    pub basis: &'static str,
}

/// The runs of a table as [`VALIDATED`] is one.
///
/// # Panics
/// Where a line is malformed: the table is the program's own.
pub fn parse(text: &str) -> Vec<ValidatedRun> {
    let run = |line: &str| {
        let cell: Vec<&str> = line.split(',').collect();
        let [gpu, stack, family, ratio] = cell[..] else { panic!("four cells: {line}") };
        let (gpu, stack, family) = (gpu.to_owned(), stack.to_owned(), family.to_owned());
        let ratio = ratio.parse().expect("a number");
        ValidatedRun { like: Likeness { gpu, stack, family }, ratio }
    };
    text.lines().filter(|l| !l.starts_with('#')).skip(1).map(run).collect()
}

/// The interval around a step of `step_s` seconds of `s`.
pub fn around(s: &Scenario, step_s: f64) -> Interval {
    static RUNS: LazyLock<Vec<ValidatedRun>> = LazyLock::new(|| parse(VALIDATED));
    from_runs(&Likeness::of(s), step_s, &RUNS)
}

/// The interval for what is `like` this, from `runs`: the most alike that are enough.
pub fn from_runs(like: &Likeness, step_s: f64, runs: &[ValidatedRun]) -> Interval {
    type Same = fn(&Likeness, &Likeness) -> bool;
    let levels: [(&'static str, Same); 4] = [
        ("the same GPU, software and kind of model", |a, b| a == b),
        ("the same software and kind of model", |a, b| a.stack == b.stack && a.family == b.family),
        ("the same GPU and kind of model", |a, b| a.gpu == b.gpu && a.family == b.family),
        ("the same kind of model", |a, b| a.family == b.family),
    ];
    let of = |same: Same| -> Vec<f64> {
        runs.iter().filter(|r| same(&r.like, like)).map(|r| r.ratio).collect()
    };
    let nearest = levels.iter().map(|&(basis, same)| (basis, of(same)));
    let (basis, mut ratios) = nearest
        .into_iter()
        .find(|(_, ratios)| ratios.len() >= FEWEST)
        .unwrap_or_else(|| ("all validated runs", of(|_, _| true)));
    ratios.sort_by(f64::total_cmp);
    let (low_s, high_s) = (step_s * quantile(&ratios, 0.1), step_s * quantile(&ratios, 0.9));
    Interval { low_s, high_s, runs: ratios.len(), basis }
}

/// The `p`-quantile of sorted values by the expected place `p (n + 1)` among them.
fn quantile(sorted: &[f64], p: f64) -> f64 {
    let Some(last) = sorted.len().checked_sub(1) else { return 1.0 };
    let at = (p * (sorted.len() as f64 + 1.0) - 1.0).clamp(0.0, last as f64);
    let below = at.floor() as usize;
    let above = (below + 1).min(last);
    sorted[below] + (at - below as f64) * (sorted[above] - sorted[below])
}

/// Whether run `i` lies in the interval made from all the others.
pub fn held(runs: &[ValidatedRun], i: usize) -> bool {
    let mut others = runs.to_vec();
    let run = others.remove(i);
    let interval = from_runs(&run.like, 1.0, &others);
    (interval.low_s..=interval.high_s).contains(&run.ratio)
}

/// Share of `runs` that the interval made from all the others holds.
pub fn coverage(runs: &[ValidatedRun]) -> f64 {
    let held = (0..runs.len()).filter(|&i| held(runs, i)).count();
    held as f64 / runs.len().max(1) as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(gpu: &str, stack: &str, family: &str, ratio: f64) -> ValidatedRun {
        let (gpu, stack, family) = (gpu.into(), stack.into(), family.into());
        ValidatedRun { like: Likeness { gpu, stack, family }, ratio }
    }

    /// Nine runs at 0.9, 1.0, .., 1.7: the tenth and ninetieth percentile are the first and last.
    #[test]
    fn the_nearest_runs_that_are_enough_give_the_range() {
        let mut runs: Vec<_> = (0..9).map(|i| run("a", "x", "moe", 0.9 + 0.1 * i as f64)).collect();
        runs.push(run("b", "y", "dense", 5.0));
        let like = Likeness { gpu: "a".into(), stack: "x".into(), family: "moe".into() };
        let interval = from_runs(&like, 10.0, &runs);
        assert!((interval.low_s - 9.0).abs() < 1e-9 && (interval.high_s - 17.0).abs() < 1e-9);
        assert_eq!(
            (interval.runs, interval.basis),
            (9, "the same GPU, software and kind of model")
        );
        // One run of its kind is not enough: all are taken.
        let lonely = Likeness { gpu: "b".into(), stack: "y".into(), family: "dense".into() };
        assert_eq!(from_runs(&lonely, 1.0, &runs).basis, "all validated runs");
    }

    #[test]
    fn the_table_reads() {
        let runs = parse(VALIDATED);
        assert!(runs.len() > 40 && runs.iter().all(|r| r.ratio > 0.2 && r.ratio < 5.0));
    }
}
