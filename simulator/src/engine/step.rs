//! A training step from a scenario: place, cost, schedule, play, and say what it means.

use fathom_schedule::Schedule;
use std::time::Instant;

use serde::Serialize;

use crate::bound::Bound;
use crate::config::Scenario;
use crate::cost::{Allowed, Cost, allowed, cost, kilowatts_per_gpu};
use crate::error::SimError;
use crate::events::chunk::under_load;
use crate::events::{AllToAll, Breakdown, Detail, StepOutcome, play_in_order};
use crate::exposure;
use crate::interval::{self, Interval};
use crate::load::{self, LoadSums, RoutingTrace};
use crate::memory::{Memory, memory};
use crate::parallel::{CostModel, LayerTable, PlacedLayer, Placement, check, placements, schedule};
use crate::reliability::{Goodput, goodput};
use crate::times::{LayerKind, StepTimes};

/// The numbers of a step, with the keys of `--json`.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct StepReport {
    /// Name of the scenario.
    pub name: String,
    /// Seconds of one training step.
    pub step_time_s: f64,
    /// Seconds between which it lies in eight of ten cases.
    pub interval: Interval,
    /// Tokens per second per GPU.
    pub tokens_per_s_per_gpu: f64,
    /// Tokens per day of the whole cluster, failures not counted.
    pub tokens_per_day: f64,
    /// GPU-hours for a trillion tokens, failures not counted.
    pub gpu_hours_per_trillion_tokens: f64,
    /// Model FLOPs utilisation: FLOPs of the model with causal attention over the BF16 peak.
    pub mfu_causal: f64,
    /// Model FLOPs utilisation with attention's FLOPs counted over the full square.
    pub mfu_noncausal: f64,
    /// Where the step goes, means over ranks, seconds.
    pub breakdown_s: Breakdown,
    /// The all-to-alls, means over ranks.
    pub all_to_all: AllToAll,
    /// Transformer layers and prediction modules of each pipeline stage.
    pub stage_layers: Vec<usize>,
    /// Peak memory of each pipeline rank, 1e9 bytes.
    pub memory_peak_gb: Vec<f64>,
    /// Memory per GPU that may be filled, 1e9 bytes.
    pub memory_capacity_gb: f64,
    /// What the fullest rank has in its host's memory, 1e9 bytes; absent where nothing is.
    #[serde(skip_serializing_if = "is_zero")]
    pub host_memory_gb: f64,
    /// `does not fit: ...`, where it does not; see [`Memory::complaint`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub memory_complaint: Option<String>,
    /// What training costs, in dollars.
    pub cost: Cost,
    /// What failures leave of the time.
    pub reliability: Goodput,
    /// Parts, sends and tail operations played.
    pub events: u64,
    /// Wall time of this simulation, seconds.
    pub wall_s: f64,
}

fn is_zero(value: &f64) -> bool {
    *value == 0.0
}

/// A step with everything behind its numbers.
#[derive(Debug, Clone, PartialEq)]
pub struct Simulation {
    /// The scenario that was asked for.
    pub scenario: Scenario,
    /// The layers of each pipeline stage.
    pub placement: Placement,
    /// The instruction stream of each rank.
    pub schedule: Schedule,
    /// Seconds of every part of every layer.
    pub times: StepTimes,
    /// The step as it was played.
    pub outcome: StepOutcome,
    /// Memory of each rank over the step.
    pub memory: Memory,
    /// The numbers of the step.
    pub report: StepReport,
}

/// Simulates a step of `scenario` with the times of `model`. An illegal layout, a file that cannot
/// be read, and times out of all proportion are a [`SimError`].
pub fn simulate(
    scenario: &Scenario,
    model: &dyn CostModel,
    detail: Detail,
) -> Result<Simulation, SimError> {
    let start = Instant::now();
    check(scenario)?;
    let schedule = schedule(scenario)?;
    let Split { placement, times, outcome } = fastest_split(scenario, model, &schedule, detail)?;
    let memory = memory(scenario, &placement, &schedule, &outcome);
    let mut report = report(scenario, &outcome, &memory);
    report.stage_layers = stage_layers(&placement);
    report.wall_s = start.elapsed().as_secs_f64();
    Ok(Simulation {
        scenario: scenario.clone(),
        placement,
        schedule,
        times,
        outcome,
        memory,
        report,
    })
}

/// A split of layers into stages, its times, and its step.
struct Split {
    placement: Placement,
    times: StepTimes,
    outcome: StepOutcome,
}

/// What makes one split better than another: first that it fits into memory (`false`), then the
/// seconds of its step.
type Rank = (bool, f64);

/// What is known of a split, each a lower bound of what comes after it.
enum Known {
    /// What every rank does: [`Bound`].
    Bound,
    /// Its step with the least loads of its experts.
    Least(StepTimes),
    /// Its step with all that it is made of.
    Played(StepTimes, StepOutcome),
}

/// Times every kind of layer and gives, of the splits of layers into stages that may be the fastest
/// ([`placements`]), the fastest that fits into memory; the fastest of all where none fits. The one
/// that looks best is looked at more closely, until the best is one that was played: the others
/// cannot be faster than what is known of them.
fn fastest_split(
    s: &Scenario,
    model: &dyn CostModel,
    schedule: &Schedule,
    detail: Detail,
) -> Result<Split, SimError> {
    let table = exposure::layer_table(s, model)?;
    let order = fathom_schedule::check::check(schedule)
        .expect("the project's schedules are executable")
        .order;
    let splits = placements(s)?;
    let single = splits.len() == 1;
    // The splits hold the same layers in the same order.
    let load = expert_load(s, &splits[0])?;
    let sums = LoadSums::new(&load);
    let bound = Bound::new(s, &table, &sums, &splits[0], schedule);
    let least_load = sums.least(schedule.micro_batches);
    let bounded = |placement: Placement| {
        let bound_s = if single { 0.0 } else { bound.step_s(&placement, schedule, &[]) };
        ((false, bound_s), placement, Known::Bound)
    };
    let mut open: Vec<(Rank, Placement, Known)> = splits.into_iter().map(bounded).collect();
    // Parts are kept of the one that is taken, not of all that are tried.
    let tried = if single || detail != Detail::Parts { detail } else { Detail::Totals };
    let play = |placement: &Placement, times: StepTimes| {
        let none = StepOutcome::default();
        let full = !single && !memory(s, placement, schedule, &none).fits();
        let outcome = play_in_order(schedule, &order, &times, tried);
        ((full, outcome.step_time_s), Known::Played(times, outcome))
    };
    loop {
        let best = (1..open.len()).fold(0, |a, b| if open[b].0 < open[a].0 { b } else { a });
        let (_, placement, known) = &mut open[best];
        let (rank, closer) = match std::mem::replace(known, Known::Bound) {
            Known::Bound => {
                let times = step_times(s, model, &table, placement);
                check_times(&times)?;
                if load.is_empty() || !times.expert_load.is_empty() {
                    play(placement, times)
                } else if single {
                    ((false, 0.0), Known::Least(times))
                } else {
                    let least = under_loads(&times, &least_load);
                    let least = play_in_order(schedule, &order, &least, Detail::Totals);
                    ((false, least.step_time_s), Known::Least(times))
                }
            }
            Known::Least(mut times) => {
                times.expert_load.clone_from(&load);
                check_times(&times)?;
                play(placement, times)
            }
            Known::Played(times, outcome) => {
                let (_, placement, _) = open.swap_remove(best);
                let again = || play_in_order(schedule, &order, &times, detail);
                let outcome = if tried == detail { outcome } else { again() };
                return Ok(Split { placement, times, outcome });
            }
        };
        (open[best].0, open[best].2) = (rank, closer);
    }
}

/// The same times with one load of each layer for all micro-batches. With the least of each, no
/// step with all of them is shorter, and equal instructions take equal times.
pub(crate) fn under_loads(times: &StepTimes, loads: &[f32]) -> StepTimes {
    let mut least = times.clone();
    let mut loads = loads.iter();
    for stage in &mut least.stages {
        for (alone, overlapped) in stage.alone.iter_mut().zip(&mut stage.overlapped) {
            let load = *loads.next().expect("a load a layer");
            for layer in [alone, overlapped] {
                for phase in [&mut layer.forward, &mut layer.backward, &mut layer.weight] {
                    *phase = under_load(*phase, layer.routed_share, f64::from(load));
                }
            }
        }
    }
    least
}

/// The times of a placed step: its layers, its frame, and what of the data-parallel traffic the
/// computation does not hide.
pub(crate) fn step_times(
    s: &Scenario,
    model: &dyn CostModel,
    table: &LayerTable,
    placement: &Placement,
) -> StepTimes {
    let mut times = StepTimes { stages: table.stages(placement), ..model.frame(s, placement) };
    exposure::settle(s, &mut times);
    times
}

/// Refuses a scenario whose numbers are so extreme that a part of the step takes no finite time.
fn check_times(times: &StepTimes) -> Result<(), SimError> {
    let layers = times.stages.iter().flat_map(|s| s.alone.iter().chain(&s.overlapped));
    let parts = layers.flat_map(|l| [l.forward, l.backward, l.weight]);
    let parts = parts.flat_map(|p| [p.attention_s, p.dispatch_s, p.mlp_s, p.combine_s]);
    let tails = times.tail.iter().flat_map(|t| [t.grad_reduce_s, t.optimizer_s, t.param_gather_s]);
    let loads = times.expert_load.iter().flatten().map(|&load| f64::from(load));
    let sane = |t: f64| (0.0..=1e12).contains(&t);
    match parts.chain(tails).chain(times.p2p_s.iter().copied()).chain(loads).find(|&t| !sane(t)) {
        Some(t) => Err(SimError::Layout(format!(
            "a part of the step takes {t} s: a rate or size of the scenario is out of all proportion"
        ))),
        None => Ok(()),
    }
}

fn expert_load(s: &Scenario, p: &Placement) -> Result<Vec<Vec<f32>>, SimError> {
    let trace = RoutingTrace::of(&s.expert_load)?;
    trace.check(s.model.moe.map_or(0, |m| m.n_routed_experts as u64))?;
    let (ep, micro_batches) = (s.parallel.ep as usize, s.micro_batches() as usize);
    Ok(load::table(&s.expert_load, &trace, p, ep, micro_batches))
}

/// Transformer layers and prediction modules of each stage.
fn stage_layers(placement: &Placement) -> Vec<usize> {
    let inner = |l: &&PlacedLayer| !matches!(l.kind, LayerKind::Embedding | LayerKind::Head);
    placement.stages.iter().map(|stage| stage.iter().filter(inner).count()).collect()
}

/// The numbers of a step that was played; `wall_s` is left 0, `stage_layers` empty.
pub fn report(s: &Scenario, outcome: &StepOutcome, memory: &Memory) -> StepReport {
    let tokens_per_s = s.tokens_per_step() / outcome.step_time_s;
    let per_gpu = tokens_per_s / s.cluster.gpus as f64;
    let mfu = |causal: bool| {
        per_gpu * s.model.train_flops_per_token(s.training.seq_len, causal)
            / s.cluster.gpu.bf16_flops
    };
    StepReport {
        name: s.name.clone(),
        step_time_s: outcome.step_time_s,
        interval: interval::around(s, outcome.step_time_s),
        tokens_per_s_per_gpu: per_gpu,
        tokens_per_day: tokens_per_s * 86400.0,
        gpu_hours_per_trillion_tokens: 1e12 / per_gpu / 3600.0,
        mfu_causal: mfu(true),
        mfu_noncausal: mfu(false),
        breakdown_s: outcome.breakdown,
        all_to_all: outcome.all_to_all,
        stage_layers: Vec::new(),
        memory_peak_gb: memory.ranks.iter().map(|r| r.peak.total() / 1e9).collect(),
        memory_capacity_gb: memory.capacity_bytes / 1e9,
        host_memory_gb: memory.host_bytes() / 1e9,
        memory_complaint: memory.complaint(s),
        cost: cost(&s.pricing, &s.cluster, per_gpu),
        reliability: goodput(&s.reliability, &s.cluster),
        events: outcome.events,
        wall_s: 0.0,
    }
}

/// A whole training run, its batch ramp included.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct WholeRun {
    /// Tokens of the run.
    pub tokens: f64,
    /// GPU-hours without failures.
    pub gpu_hours: f64,
    /// GPU-hours of these that pass while the batch grows.
    pub ramp_gpu_hours: f64,
    /// Days without failures.
    pub days: f64,
    /// Days with the goodput of the scenario's failures.
    pub days_with_failures: f64,
    /// Dollars, for the time with failures.
    pub usd: f64,
    /// Energy of the facility for the time with failures, kilowatt-hours.
    pub kwh: f64,
    /// What the budgets allow, where there are any.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub allowed: Option<Allowed>,
    /// What was assumed where a batch is too small for the schedule.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub assumption: Option<String>,
}

/// Batches that stand for the ramp, each for an equal share of its tokens.
const RAMP_POINTS: u64 = 8;

/// The run of `scenario.training.total_tokens`, its batch ramp included. `full` is the step with
/// the whole batch.
pub fn whole_run(
    s: &Scenario,
    full: &StepReport,
    model: &dyn CostModel,
) -> Result<WholeRun, SimError> {
    let tokens = s.training.total_tokens;
    let hours = |tokens: f64, per_s: f64| tokens / per_s / 3600.0;
    let ramp_tokens = s.ramp.map_or(0.0, |r| r.tokens.clamp(0.0, tokens));
    let mut run = WholeRun {
        tokens,
        gpu_hours: hours(tokens - ramp_tokens, full.tokens_per_s_per_gpu),
        ramp_gpu_hours: 0.0,
        days: 0.0,
        days_with_failures: 0.0,
        usd: 0.0,
        kwh: 0.0,
        allowed: None,
        assumption: None,
    };
    if let Some(ramp) = s.ramp {
        // Both directions of a schedule want the same number of micro-batches.
        let unit = 2 * s.parallel.dp * s.training.micro_batch;
        for point in 0..RAMP_POINTS {
            let share = (point as f64 + 0.5) / RAMP_POINTS as f64;
            let (first, last) = (ramp.start_batch as f64, s.training.global_batch as f64);
            let batch = first + share * (last - first);
            let mut small = s.clone();
            small.training.global_batch = ((batch / unit as f64).round() as u64).max(1) * unit;
            if schedule(&small).is_err() {
                small.schedule = ramp.fallback_schedule;
                run.assumption = Some(format!(
                    "batches too small for {} run with {}",
                    s.schedule.name(),
                    ramp.fallback_schedule.name()
                ));
            }
            let step = simulate(&small, model, Detail::Totals)?.report;
            run.ramp_gpu_hours +=
                hours(ramp_tokens / RAMP_POINTS as f64, step.tokens_per_s_per_gpu);
        }
    }
    run.gpu_hours += run.ramp_gpu_hours;
    run.days = run.gpu_hours / s.cluster.gpus as f64 / 24.0;
    run.days_with_failures = run.days / full.reliability.goodput;
    if !run.days_with_failures.is_finite() || run.days_with_failures > 1e12 {
        return Err(SimError::Layout(format!(
            "reliability: {:.3e} failures a day with restarts of {} s and checkpoints of {} s: the \
             run would never end",
            full.reliability.failures_per_day, s.reliability.restart_s, s.reliability.checkpoint_s
        )));
    }
    let paid_hours = run.gpu_hours / full.reliability.goodput;
    run.usd = paid_hours * full.cost.usd_per_gpu_hour;
    run.kwh = paid_hours * kilowatts_per_gpu(&s.pricing, &s.cluster);
    run.allowed = allowed(&s.pricing, &s.cluster, run.usd / tokens.max(1.0));
    Ok(run)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::first_principles::FirstPrinciples;
    use crate::model_code::ModelCode;

    fn run(name: &str, set: &[&str]) -> Simulation {
        let set: Vec<String> = set.iter().map(|s| s.to_string()).collect();
        let scenario = Scenario::preset(name, &set).unwrap();
        simulate(&scenario, &FirstPrinciples::new(ModelCode), Detail::Instructions).unwrap()
    }

    #[test]
    fn the_numbers_of_a_step_agree_with_each_other() {
        let sim = run("deepseek-v3-h800-2048", &[]);
        let r = &sim.report;
        assert!((r.breakdown_s.total() - r.step_time_s).abs() < 1e-9 * r.step_time_s);
        let tokens = 15360.0 * 4096.0;
        assert!((r.tokens_per_day * r.step_time_s / 86400.0 - tokens).abs() < 1.0);
        assert!((r.tokens_per_s_per_gpu * 2048.0 * r.step_time_s - tokens).abs() < 1.0);
        let dollars = r.gpu_hours_per_trillion_tokens * 2.0;
        assert!((r.cost.usd_per_trillion_tokens - dollars).abs() < 1e-6 * dollars);
        assert_eq!(r.memory_peak_gb.len(), 16);
    }

    #[test]
    fn a_run_without_a_ramp_is_steps_and_a_ramp_costs_more() {
        let model = FirstPrinciples::new(ModelCode);
        let mut sim = run("deepseek-v3-h800-2048", &[]);
        let with = whole_run(&sim.scenario, &sim.report, &model).unwrap();
        assert!(with.assumption.as_ref().unwrap().contains("zb1p"), "{with:?}");
        sim.scenario.ramp = None;
        let without = whole_run(&sim.scenario, &sim.report, &model).unwrap();
        let steps = 14.8 * sim.report.gpu_hours_per_trillion_tokens;
        assert!((without.gpu_hours / steps - 1.0).abs() < 1e-9);
        assert!(with.gpu_hours > without.gpu_hours && with.gpu_hours < 1.05 * without.gpu_hours);
        assert!(with.days_with_failures > with.days);
    }

    #[test]
    fn every_preset_runs() {
        for (name, _) in crate::config::SCENARIOS {
            let r = run(name, &[]).report;
            assert!(r.mfu_causal > 0.1 && r.mfu_causal < 0.8, "{name}: {}", r.mfu_causal);
        }
    }
}
