//! The best layouts for a model, a cluster and a memory limit.
//!
//! All combinations of the [`crate::config::SearchSpace`] are considered. What is left out without
//! being simulated is left out soundly: because it is illegal, because what it must hold does not
//! fit, or because a layout already simulated is better in everything than the best this one could
//! be: no step is shorter than sums over its stages say (`engine/bound.rs`), nor than with the
//! least loads of its experts, under which equal instructions take equal times. The result is the
//! Pareto front of throughput, memory and cost, the same whether pruned or not and whatever the
//! number of threads.

use std::collections::BTreeMap;

use fathom_schedule::check::check as check_schedule;
use fathom_schedule::{Schedule, ScheduleKind, Shape};
use rayon::prelude::*;
use serde::Serialize;

use crate::bound::{Bound, ROUNDING};
use crate::config::{Parallel, Recompute, Scenario};
use crate::error::SimError;
use crate::events::{Detail, StepOutcome, play_in_order};
use crate::exposure;
use crate::load::{self, LoadSums, RoutingTrace};
use crate::memory::{memory, standing};
use crate::parallel::{
    CostModel, LayerTable, LayerWeights, Placement, check, place, schedule, schedule_shape,
};
use crate::step::{report, step_times, under_loads};
use crate::times::StepTimes;

/// A layout on the Pareto front: what it is, and what it reaches.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Layout {
    /// GPUs of the cluster.
    pub gpus: u64,
    /// Ranks along each dimension, and the ZeRO stage.
    pub parallel: Parallel,
    /// The pipeline schedule of the layout.
    pub schedule: ScheduleKind,
    /// Stages that a rank holds, for the interleaved schedule.
    pub interleave: u64,
    /// Sequences of a micro-batch.
    pub micro_batch: u64,
    /// What is recomputed in the backward.
    pub recompute: Recompute,
    /// Seconds of a step.
    pub step_time_s: f64,
    /// Tokens per day of the whole cluster, failures not counted.
    pub tokens_per_day: f64,
    /// Days of the whole run at that rate, failures and batch ramp not counted.
    pub days: f64,
    /// Model FLOPs utilisation (MFU), causal attention counted, over the BF16 peak.
    pub mfu_causal: f64,
    /// Peak memory of the fullest rank, 1e9 bytes.
    pub memory_gb: f64,
    /// Dollars per trillion tokens.
    pub usd_per_trillion_tokens: f64,
}

/// What a search found.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct SearchResult {
    /// Pareto front of throughput, memory and cost, the highest throughput first.
    pub front: Vec<Layout>,
    /// Legal layouts considered.
    pub considered: usize,
    /// Combinations that are illegal.
    pub illegal: usize,
    /// Layouts left out because they do not fit into memory.
    pub too_large: usize,
    /// Layouts left out because another is better in everything than they can be.
    pub dominated: usize,
    /// Layouts that were simulated.
    pub simulated: usize,
    /// Wall time of the search, seconds.
    pub wall_s: f64,
}

/// A legal layout with its bounds.
struct Candidate {
    scenario: Scenario,
    placement: Placement,
    table: usize,
    /// No step is shorter, seconds.
    step_bound_s: f64,
    /// No peak is smaller, bytes.
    memory_bound: f64,
}

/// Key of the layer times that a candidate shares with others.
type TableKey = (u64, u64, u64, u64, Recompute);

/// Searches around `base`. `prune` switches the bounds off for comparison; `progress` is told how
/// many candidates of how many are done.
pub fn search(
    base: &Scenario,
    model: &dyn CostModel,
    prune: bool,
    progress: &(dyn Fn(usize, usize) + Sync),
) -> Result<SearchResult, SimError> {
    let start = std::time::Instant::now();
    let (legal, illegal) = combinations(base);
    if legal.is_empty() {
        let reason = first_reason(base);
        return Err(SimError::Layout(format!(
            "none of the {illegal} combinations is legal; {reason}"
        )));
    }
    let routing = RoutingTrace::of(&base.expert_load)?;
    routing.check(base.model.moe.map_or(0, |m| m.n_routed_experts as u64))?;
    let (tables, keys) = tables(&legal, model)?;
    let loads = loads(&legal, &routing)?;
    let times = Times { tables: &tables, keys: &keys, model, loads: &loads };
    let limit = match base.search.memory_limit_gb {
        gb if gb > 0.0 => gb * 1e9,
        _ => base.usable_memory_bytes(),
    };
    let mut candidates: Vec<Candidate> = legal
        .into_par_iter()
        .map(|scenario| candidate(scenario, times, if prune { limit } else { f64::INFINITY }))
        .collect::<Result<_, _>>()?;
    let considered = candidates.len();
    // The most promising first: throughput by the bound; the order of enumeration decides between
    // equals.
    candidates.sort_by(|a, b| a.step_bound_s.total_cmp(&b.step_bound_s));
    let mut found = SearchResult {
        front: Vec::new(),
        considered,
        illegal,
        too_large: 0,
        dominated: 0,
        simulated: 0,
        wall_s: 0.0,
    };
    // Batches of a fixed size: what is pruned does not depend on the number of threads.
    for (batch, chunk) in candidates.chunks(BATCH).enumerate() {
        let front = &found.front;
        let judge = |c: &Candidate| judge(c, times, limit, prune.then_some(front.as_slice()));
        let verdicts: Vec<Verdict> = chunk.par_iter().map(judge).collect();
        for verdict in verdicts {
            match verdict {
                Verdict::TooLarge => found.too_large += 1,
                Verdict::Dominated => found.dominated += 1,
                Verdict::Simulated(layout) => {
                    found.simulated += 1;
                    insert(&mut found.front, layout);
                }
            }
        }
        progress((batch * BATCH + chunk.len()).min(considered), considered);
    }
    found.front.sort_by(|a, b| b.tokens_per_day.total_cmp(&a.tokens_per_day));
    found.wall_s = start.elapsed().as_secs_f64();
    Ok(found)
}

const BATCH: usize = 32;

/// What all candidates are timed with.
#[derive(Clone, Copy)]
struct Times<'a> {
    tables: &'a [LayerTable],
    keys: &'a BTreeMap<TableKey, usize>,
    model: &'a dyn CostModel,
    loads: &'a BTreeMap<u64, Loads>,
}

/// Loads of the busiest rank by `[layer][micro-batch]`, and their sums.
type Loads = (Vec<Vec<f32>>, LoadSums);

enum Verdict {
    TooLarge,
    Dominated,
    Simulated(Layout),
}

/// All combinations of the space that are legal, and how many are not.
fn combinations(base: &Scenario) -> (Vec<Scenario>, usize) {
    let space = &base.search.without_repetition();
    let gpus = if space.gpus.is_empty() { vec![base.cluster.gpus] } else { space.gpus.clone() };
    let ep = if base.model.moe.is_some() { space.ep.clone() } else { vec![1] };
    let (mut legal, mut illegal) = (Vec::new(), 0);
    let mut consider = |s: Scenario| {
        if is_legal(&s) { legal.push(s) } else { illegal += 1 }
    };
    for &gpus in &gpus {
        for (&tp, &cp, &pp) in triples(&space.tp, &space.cp, &space.pp) {
            let Some(dp) = gpus.checked_div(tp * cp * pp).filter(|dp| dp * tp * cp * pp == gpus)
            else {
                continue;
            };
            for (&ep, &zero, &micro_batch) in triples(&ep, &space.zero, &space.micro_batch) {
                for &kind in &space.schedule {
                    let looped = kind.shape() == Shape::Loop;
                    let interleave = if looped { &space.interleave[..] } else { &[2] };
                    for (&recompute, &interleave) in pairs(&space.recompute, interleave) {
                        let mut s = base.clone();
                        s.cluster.gpus = gpus;
                        s.parallel = Parallel { tp, cp, pp, dp, ep, zero };
                        (s.schedule, s.interleave, s.stage_layers) = (kind, interleave, None);
                        (s.training.micro_batch, s.training.recompute) = (micro_batch, recompute);
                        consider(s);
                    }
                }
            }
        }
    }
    (legal, illegal)
}

fn pairs<'a, A, B>(a: &'a [A], b: &'a [B]) -> impl Iterator<Item = (&'a A, &'a B)> {
    a.iter().flat_map(move |x| b.iter().map(move |y| (x, y)))
}

fn triples<'a, A, B, C>(
    a: &'a [A],
    b: &'a [B],
    c: &'a [C],
) -> impl Iterator<Item = (&'a A, &'a B, &'a C)> {
    a.iter().flat_map(move |x| pairs(b, c).map(move |(y, z)| (x, y, z)))
}

fn is_legal(s: &Scenario) -> bool {
    check(s).is_ok() && Schedule::empty(s.schedule, schedule_shape(s)).is_ok()
}

/// Why the first combination is refused.
fn first_reason(base: &Scenario) -> String {
    match check(base)
        .and_then(|()| Ok(Schedule::empty(base.schedule, schedule_shape(base)).map(|_| ())?))
    {
        Err(e) => format!("the scenario itself: {e}"),
        Ok(()) => "widen the lists of [search]".into(),
    }
}

fn table_key(s: &Scenario) -> TableKey {
    (s.parallel.tp, s.parallel.cp, s.parallel.ep, s.training.micro_batch, s.training.recompute)
}

/// Layer times, once for every key.
fn tables(
    legal: &[Scenario],
    model: &dyn CostModel,
) -> Result<(Vec<LayerTable>, BTreeMap<TableKey, usize>), SimError> {
    let mut keys = BTreeMap::new();
    let mut first: Vec<&Scenario> = Vec::new();
    for s in legal {
        keys.entry(table_key(s)).or_insert_with(|| {
            first.push(s);
            first.len() - 1
        });
    }
    let tables =
        first.par_iter().map(|s| exposure::layer_table(s, model)).collect::<Result<_, _>>()?;
    Ok((tables, keys))
}

/// Loads of the busiest rank by layer, of as many micro-batches as any layout has, once for every
/// size of expert group: they depend on nothing else.
fn loads(legal: &[Scenario], routing: &RoutingTrace) -> Result<BTreeMap<u64, Loads>, SimError> {
    let mut longest: BTreeMap<u64, &Scenario> = BTreeMap::new();
    for s in legal {
        let known = longest.entry(s.parallel.ep).or_insert(s);
        if s.micro_batches() > known.micro_batches() {
            *known = s;
        }
    }
    let rows = |(ep, s): (u64, &Scenario)| {
        let placement = place(s, LayerWeights::by_flops(s))?;
        let mbs = s.micro_batches() as usize;
        let rows = load::table(&s.expert_load, routing, &placement, ep as usize, mbs);
        let sums = LoadSums::new(&rows);
        Ok((ep, (rows, sums)))
    };
    longest.into_iter().map(rows).collect()
}

/// The bounds of a layout; of one that holds more than `limit` all the time, no step is asked for.
fn candidate(scenario: Scenario, with: Times<'_>, limit: f64) -> Result<Candidate, SimError> {
    let table = with.keys[&table_key(&scenario)];
    let layers = &with.tables[table];
    let placement = place(&scenario, layers.weights)?;
    let shell = Schedule::empty(scenario.schedule, schedule_shape(&scenario))?;
    let ranks = 0..shell.ranks.len();
    let memory_bound = ranks.map(|r| standing(&scenario, &placement, &shell, r).total());
    let memory_bound = memory_bound.fold(0.0, f64::max);
    if memory_bound > limit {
        let step_bound_s = f64::INFINITY;
        return Ok(Candidate { scenario, placement, table, step_bound_s, memory_bound });
    }
    let frame = step_times(&scenario, with.model, layers, &placement);
    let (_, loads) = &with.loads[&scenario.parallel.ep];
    let bound = Bound::new(&scenario, layers, loads, &placement, &shell);
    let busy = bound.step_s(&placement, &shell, &frame.tail);
    let tail = frame.tail.iter().map(|t| t.optimizer_s + t.param_gather_s).fold(0.0, f64::max);
    Ok(Candidate { scenario, placement, table, step_bound_s: busy + tail, memory_bound })
}

/// Prunes or simulates one candidate; without a `front` only what does not fit is left out, after
/// the simulation.
fn judge(c: &Candidate, with: Times<'_>, limit: f64, front: Option<&[Layout]>) -> Verdict {
    let s = &c.scenario;
    let tokens_per_day = |s: &Scenario, step_s: f64| s.tokens_per_step() / step_s * 86400.0;
    let beaten = |best: &Objectives| front.is_some_and(|f| f.iter().any(|l| beats(l, best)));
    let bound = Objectives {
        tokens_per_day: tokens_per_day(s, c.step_bound_s),
        memory_gb: c.memory_bound / 1e9,
        gpus: s.cluster.gpus,
    };
    if front.is_some() && c.memory_bound > limit {
        return Verdict::TooLarge;
    }
    if beaten(&bound) {
        return Verdict::Dominated;
    }
    let schedule = schedule(s).expect("the candidate is legal");
    let none = StepOutcome::default();
    let peaks = memory(s, &c.placement, &schedule, &none);
    let (_, bytes) = peaks.fullest();
    if front.is_some() && bytes > limit {
        return Verdict::TooLarge;
    }
    let bound = Objectives { memory_gb: bytes / 1e9, ..bound };
    if beaten(&bound) {
        return Verdict::Dominated;
    }
    let order = check_schedule(&schedule).expect("the project's schedules are executable").order;
    let play = |times: &StepTimes| play_in_order(&schedule, &order, times, Detail::Totals);
    let mut times = step_times(s, with.model, &with.tables[c.table], &c.placement);
    let mbs = s.micro_batches() as usize;
    let (rows, sums) = &with.loads[&s.parallel.ep];
    if !rows.is_empty() && front.is_some() {
        let step_s = play(&under_loads(&times, &sums.least(mbs))).step_time_s * ROUNDING;
        if beaten(&Objectives { tokens_per_day: tokens_per_day(s, step_s), ..bound }) {
            return Verdict::Dominated;
        }
    }
    times.expert_load = rows.iter().map(|row| row[..mbs].to_vec()).collect();
    let outcome = play(&times);
    if bytes > limit {
        return Verdict::TooLarge;
    }
    let r = report(s, &outcome, &peaks);
    Verdict::Simulated(Layout {
        gpus: s.cluster.gpus,
        parallel: s.parallel,
        schedule: s.schedule,
        interleave: s.interleave,
        micro_batch: s.training.micro_batch,
        recompute: s.training.recompute,
        step_time_s: r.step_time_s,
        tokens_per_day: r.tokens_per_day,
        days: s.training.total_tokens / r.tokens_per_day,
        mfu_causal: r.mfu_causal,
        memory_gb: bytes / 1e9,
        usd_per_trillion_tokens: r.cost.usd_per_trillion_tokens,
    })
}

/// What a candidate can reach at best. Its cost follows: GPUs over throughput.
struct Objectives {
    tokens_per_day: f64,
    memory_gb: f64,
    gpus: u64,
}

/// Whether a layout is strictly faster and cheaper than a candidate can be, with no more memory.
fn beats(layout: &Layout, best: &Objectives) -> bool {
    layout.tokens_per_day > best.tokens_per_day
        && layout.memory_gb <= best.memory_gb
        && layout.gpus as f64 / layout.tokens_per_day < best.gpus as f64 / best.tokens_per_day
}

/// Whether `a` is at least as good as `b` in everything and better in something.
fn dominates(a: &Layout, b: &Layout) -> bool {
    let no_worse = a.tokens_per_day >= b.tokens_per_day
        && a.memory_gb <= b.memory_gb
        && a.usd_per_trillion_tokens <= b.usd_per_trillion_tokens;
    let better = a.tokens_per_day > b.tokens_per_day
        || a.memory_gb < b.memory_gb
        || a.usd_per_trillion_tokens < b.usd_per_trillion_tokens;
    no_worse && better
}

/// Adds `layout` to the front unless it is dominated; of layouts with equal objectives all stay.
fn insert(front: &mut Vec<Layout>, layout: Layout) {
    if front.iter().any(|l| dominates(l, &layout)) {
        return;
    }
    front.retain(|l| !dominates(&layout, l));
    front.push(layout);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::SearchSpace;
    use crate::first_principles::FirstPrinciples;
    use crate::model_code::ModelCode;

    fn small(set: &[&str]) -> Scenario {
        let set: Vec<String> = set.iter().map(|s| s.to_string()).collect();
        let mut s = Scenario::preset("deepseek-v3-h800-2048", &set).unwrap();
        s.training.global_batch = 1024;
        s.expert_load.deviation = 0.0;
        s.search = SearchSpace {
            tp: vec![1, 2],
            cp: vec![1],
            pp: vec![4, 8, 16],
            ep: vec![16, 64],
            interleave: vec![2],
            micro_batch: vec![1, 2],
            ..SearchSpace::default()
        };
        s
    }

    #[test]
    fn pruning_loses_nothing() {
        let model = FirstPrinciples::new(ModelCode);
        let mut uneven = small(&[]);
        (uneven.expert_load.deviation, uneven.search.pp) = (0.1, vec![8]);
        for base in [small(&[]), small(&["cluster.gpu.memory_bytes=141000000000"]), uneven] {
            let pruned = search(&base, &model, true, &|_, _| ()).unwrap();
            let brute = search(&base, &model, false, &|_, _| ()).unwrap();
            assert_eq!(pruned.front, brute.front);
            assert!(!pruned.front.is_empty());
            assert_eq!(brute.dominated, 0);
            assert!(
                pruned.dominated > 0 && pruned.simulated < brute.simulated,
                "nothing was pruned"
            );
            assert_eq!(pruned.simulated + pruned.dominated + pruned.too_large, pruned.considered);
        }
    }

    #[test]
    fn no_step_is_shorter_than_its_bound() {
        let model = FirstPrinciples::new(ModelCode);
        for (deviation, overlap, step) in
            [(0.0, "wgrad", 7), (0.2, "wgrad", 13), (0.2, "none", 17), (0.2, "batch", 19)]
        {
            let mut base = small(&[&format!("stack.ep_overlap=\"{overlap}\"")]);
            base.expert_load.deviation = deviation;
            let (legal, _) = combinations(&base);
            let (tables, keys) = tables(&legal, &model).unwrap();
            let loads = loads(&legal, &RoutingTrace::default()).unwrap();
            let times = Times { tables: &tables, keys: &keys, model: &model, loads: &loads };
            for s in legal.into_iter().step_by(step) {
                let c = candidate(s, times, f64::INFINITY).unwrap();
                let Verdict::Simulated(layout) = judge(&c, times, f64::INFINITY, None) else {
                    panic!()
                };
                assert!(layout.step_time_s >= c.step_bound_s, "{overlap}: {layout:?}");
                assert!(layout.memory_gb * 1e9 >= c.memory_bound);
            }
        }
    }

    #[test]
    fn the_front_holds_no_dominated_layout() {
        let model = FirstPrinciples::new(ModelCode);
        let found = search(&small(&[]), &model, true, &|_, _| ()).unwrap();
        for a in &found.front {
            assert!(!found.front.iter().any(|b| dominates(b, a)));
        }
    }

    #[test]
    fn a_value_given_twice_counts_once() {
        let once = small(&[]);
        let mut twice = once.clone();
        twice.search.pp = vec![4, 8, 4, 16, 16];
        twice.search.recompute = [Recompute::Full; 3].to_vec();
        let mut expected = once.clone();
        expected.search.recompute = vec![Recompute::Full];
        assert_eq!(combinations(&twice).0.len(), combinations(&expected).0.len());
    }

    #[test]
    fn headroom_is_respected_and_days_follow() {
        let model = FirstPrinciples::new(ModelCode);
        let found = search(&small(&["memory_headroom=0.2"]), &model, true, &|_, _| ()).unwrap();
        for l in &found.front {
            assert!(l.memory_gb <= 0.8 * 80.0, "{l:?}");
            assert!((l.days * l.tokens_per_day / 14.8e12 - 1.0).abs() < 1e-12, "{l:?}");
        }
        let all = search(&small(&[]), &model, true, &|_, _| ()).unwrap();
        assert!(all.too_large < found.too_large);
    }

    #[test]
    fn an_empty_space_says_why() {
        let mut s = small(&[]);
        s.search.ep = vec![48];
        let e =
            search(&s, &FirstPrinciples::new(ModelCode), true, &|_, _| ()).unwrap_err().to_string();
        assert!(e.contains("none of the") && e.contains("is legal"), "{e}");
    }
}
