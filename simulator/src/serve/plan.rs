//! GPUs for a load under a service level, and layouts against each other.
//!
//! The pools are sized apart, as they run: a unit that reads prompts takes the most requests a
//! second at which the promised share of first tokens comes in time; a unit that decodes holds the
//! most requests at once at which the promised share keeps its time a token. A unified unit is
//! asked for both.

use serde::Serialize;

use super::config::{Pool, ServeScenario, Sla};
use super::engine::Engine;
use super::layout::Role;
use super::metrics::Meter;
use super::ops::InferenceOps;
use super::requests::Requests;
use super::run::{Ready, prepare};
use crate::error::SimError;
use crate::kernel_time::Constants;

/// What a load needs of one pool.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct PoolPlan {
    /// `prefill`, `decode` or `unified`.
    pub role: &'static str,
    /// GPUs of a unit, tensor-parallel ranks, most requests of a rank.
    pub layout: [u64; 3],
    /// Requests a second that a unit takes within the service level.
    pub requests_per_s_a_unit: f64,
    /// Tokens a second of one of its GPUs at that load: read (with what caches held), or emitted.
    pub tokens_per_s_per_gpu: f64,
    /// Time a token that users see there, seconds; 0 where it only reads.
    pub tpot_s: f64,
    /// Time to the first token there, at the promised share, seconds; 0 where it only decodes.
    pub ttft_s: f64,
    /// Units for the load.
    pub units: u64,
    /// GPUs of these.
    pub gpus: u64,
}

/// What a load needs.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Plan {
    /// Requests a second.
    pub load_per_s: f64,
    /// What each pool of the load needs.
    pub pools: Vec<PoolPlan>,
    /// GPUs of all.
    pub gpus: u64,
    /// Dollars an hour of all.
    pub usd_per_hour: f64,
    /// Dollars a million tokens of prompts and answers together.
    pub usd_per_million: f64,
}

/// How near the largest load is found.
const NEAR: f64 = 0.02;
/// Share of the arriving requests that must end for a load to be carried.
const CARRIED: f64 = 0.97;

/// The plan for `load_per_s` requests a second with the layouts of `s`.
///
/// # Errors
/// [`SimError::Layout`] where the scenario has no distributions of lengths, a pool does not fit, or
/// no load keeps the service level.
pub fn plan(
    s: &ServeScenario,
    load_per_s: f64,
    source: &dyn InferenceOps,
    constants: Constants,
) -> Result<Plan, SimError> {
    let mut pools = Vec::new();
    for role in [Role::Prefill, Role::Decode, Role::Unified] {
        if let Some(alone) = alone(s, role)? {
            pools.push(sized(&alone, role, load_per_s, source, constants)?);
        }
    }
    Ok(total(s, load_per_s, pools))
}

fn total(s: &ServeScenario, load_per_s: f64, pools: Vec<PoolPlan>) -> Plan {
    let gpus: u64 = pools.iter().map(|p| p.gpus).sum();
    let usd_per_hour = gpus as f64 * s.cluster.usd_per_gpu_hour;
    let lengths = [s.workload.prompt, s.workload.output];
    let tokens: f64 = lengths.iter().flatten().map(|l| l.mean).sum();
    let usd_per_million = usd_per_hour / 3600.0 / (load_per_s * tokens) * 1e6;
    Plan { load_per_s, pools, gpus, usd_per_hour, usd_per_million }
}

/// The scenario with one unit of one pool, which gets what the pool gets; none where it has none.
fn alone(s: &ServeScenario, role: Role) -> Result<Option<ServeScenario>, SimError> {
    let mut one = s.clone();
    (one.prefill, one.decode, one.unified) = (None, None, None);
    let slot = |from: &Option<Pool>| from.clone().map(|p| Pool { units: 1, ..p });
    match role {
        Role::Prefill => one.prefill = slot(&s.prefill),
        Role::Decode => one.decode = slot(&s.decode),
        Role::Unified => one.unified = slot(&s.unified),
    }
    if one.prefill.is_none() && one.decode.is_none() && one.unified.is_none() {
        return Ok(None);
    }
    if s.workload.prompt.is_none() || s.workload.output.is_none() {
        return Err(SimError::Layout(
            "workload: a plan needs the lengths as distributions: expected prompt and output"
                .into(),
        ));
    }
    one.workload.trace = None;
    (one.workload.rate_per_s, one.workload.concurrency) = (Some(1.0), None);
    match role {
        Role::Prefill => one.sla = Sla { tpot_s: 0.0, ..s.sla },
        Role::Decode => one.sla = Sla { ttft_s: 0.0, ..s.sla },
        Role::Unified => {}
    }
    Ok(Some(one))
}

fn sized(
    s: &ServeScenario,
    role: Role,
    load_per_s: f64,
    source: &dyn InferenceOps,
    constants: Constants,
) -> Result<PoolPlan, SimError> {
    let ready = prepare(s, source, constants)?;
    if let Some(complaint) = ready.complaints.first() {
        return Err(SimError::Layout(complaint.clone()));
    }
    let found = match role {
        Role::Decode => most_at_once(s, &ready)?,
        _ => most_a_second(s, &ready)?,
    };
    let Some((per_s, meter)) = found else {
        let sla = &s.sla;
        return Err(SimError::Layout(format!(
            "{}: no load keeps the service level (ttft_s {}, tpot_s {} for {} of the requests)",
            role.name(),
            sla.ttft_s,
            sla.tpot_s,
            sla.share
        )));
    };
    let pool = &ready.pools[0].pool;
    let tokens = match role {
        Role::Prefill => meter.read_tokens + meter.cached_tokens,
        _ => meter.emitted_tokens,
    };
    let units = (load_per_s / per_s - 1e-9).ceil().max(1.0) as u64;
    let ttft = meter.ttft_at(s.sla.share);
    Ok(PoolPlan {
        role: role.name(),
        layout: [pool.gpus, pool.tp, pool.max_batch],
        requests_per_s_a_unit: per_s,
        tokens_per_s_per_gpu: tokens as f64 / meter.window_s() / pool.gpus as f64,
        tpot_s: if role == Role::Prefill { 0.0 } else { meter.tpot().mean_s },
        ttft_s: if role == Role::Decode { 0.0 } else { ttft },
        units,
        gpus: units * pool.gpus,
    })
}

fn play(s: &ServeScenario, ready: &Ready) -> Result<Meter, SimError> {
    Ok(Engine::new(s, ready.pools.clone(), Requests::of(s)?).run(false))
}

/// Whether the promised share of the requests that ended kept the service level.
fn keeps(s: &ServeScenario, m: &Meter) -> bool {
    m.ended > 0 && m.kept_share() >= s.sla.share
}

/// The most requests a second within the service level, and the run at that rate.
fn most_a_second(s: &ServeScenario, ready: &Ready) -> Result<Option<(f64, Meter)>, SimError> {
    let run = |rate: f64| -> Result<Option<Meter>, SimError> {
        let mut at = s.clone();
        at.workload.rate_per_s = Some(rate);
        // A few thousand requests tell, few at a low rate as many at a high one.
        at.duration_s = s.duration_s.max(200.0 / rate).min(s.duration_s.max(4000.0 / rate));
        at.warmup_s = at.duration_s / 4.0;
        let m = play(&at, ready)?;
        let carried = m.ended as f64 >= CARRIED * m.arrived as f64;
        Ok(Some(m).filter(|m| carried && keeps(&at, m)))
    };
    let (mut best, mut low, mut high) = (None, 0.0, 1.0);
    // Doubles until it breaks or halves until it holds.
    while let Some(m) = run(high)? {
        (best, low) = (Some((high, m)), high);
        high *= 2.0;
        if high > 1e5 {
            return Ok(best);
        }
    }
    while best.is_none() && high > 1e-3 {
        match run(high / 2.0)? {
            Some(m) => (best, low) = (Some((high / 2.0, m)), high / 2.0),
            None => high /= 2.0,
        }
    }
    while best.is_some() && high - low > NEAR * high {
        let middle = (low + high) / 2.0;
        match run(middle)? {
            Some(m) => (best, low) = (Some((middle, m)), middle),
            None => high = middle,
        }
    }
    Ok(best)
}

/// The most requests at once of a unit that decodes within the service level: the rate at which
/// they end, and the run.
fn most_at_once(s: &ServeScenario, ready: &Ready) -> Result<Option<(f64, Meter)>, SimError> {
    let pool = &ready.pools[0].pool;
    let output = s.workload.output.map_or(1.0, |l| l.mean);
    let run = |n: u64| -> Result<Option<Meter>, SimError> {
        let m = decoding(s, ready, n)?;
        // Requests that wait for pages do not decode: more of them is no more load.
        let waits = m.pools[0].waiting > 0.02 * n as f64;
        Ok(Some(m).filter(|m| !waits && m.retracted == 0 && keeps_tpot(s, m)))
    };
    let (mut best, mut low, mut high) = (None, 0, pool.max_batch * pool.dp() + 1);
    while high - low > 1 + (high as f64 * NEAR) as u64 {
        let middle = (low + high) / 2;
        match run(middle)? {
            Some(m) => {
                let per_s = m.emitted_tokens as f64 / m.window_s() / output;
                (best, low) = (Some((per_s, m)), middle);
            }
            None => high = middle,
        }
    }
    Ok(best)
}

/// A unit that decodes `n` requests all the time: the first are somewhere in their answers.
fn decoding(s: &ServeScenario, ready: &Ready, n: u64) -> Result<Meter, SimError> {
    let mut at = s.clone();
    (at.workload.rate_per_s, at.workload.concurrency) = (None, Some(n));
    (at.duration_s, at.warmup_s) = (DECODE_S, DECODE_S / 3.0);
    play(&at, ready)
}

/// Seconds that tell how a full unit decodes.
const DECODE_S: f64 = 15.0;

/// Requests that last longer than the run have not ended: the time between tokens stands for
/// theirs.
fn keeps_tpot(s: &ServeScenario, m: &Meter) -> bool {
    s.sla.tpot_s == 0.0 || m.gap_per_token_s() <= s.sla.tpot_s
}

/// One layout of a search: what it costs and what users see.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Candidate {
    /// The plan for the load.
    pub plan: Plan,
    /// Tokens a second that a user sees.
    pub tokens_per_s_per_user: f64,
    /// GPUs that read prompts over those that decode; 0 where one pool does both.
    pub prefill_to_decode: f64,
}

/// What a search found.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ServeSearchResult {
    /// Layouts of pools that were tried.
    pub tried: usize,
    /// How many of them cannot be, do not fit or keep no service level.
    pub refused: usize,
    /// The front: no other is cheaper and faster for users; cheapest first.
    pub front: Vec<Candidate>,
}

/// Tries the layouts of `[search]` for `load_per_s` requests a second.
///
/// # Errors
/// [`SimError::Layout`] where no layout is left.
pub fn search(
    s: &ServeScenario,
    load_per_s: f64,
    source: &dyn InferenceOps,
    constants: Constants,
) -> Result<ServeSearchResult, SimError> {
    let (mut tried, mut refused, mut last) = (0, 0, None);
    let mut all: Vec<(Role, Vec<PoolPlan>)> = Vec::new();
    for role in [Role::Prefill, Role::Decode, Role::Unified] {
        let Some(base) = alone(s, role)? else { continue };
        let mut found = Vec::new();
        for layout in layouts(s, &base, role) {
            tried += 1;
            match sized(&layout, role, load_per_s, source, constants) {
                Ok(plan) => found.push(plan),
                Err(SimError::Layout(why)) => (refused, last) = (refused + 1, Some(why)),
                Err(other) => return Err(other),
            }
        }
        if found.is_empty() {
            let why = last.unwrap_or_else(|| "the lists of [search] are empty".into());
            return Err(SimError::Layout(format!("no layout of {} is left: {why}", role.name())));
        }
        all.push((role, found));
    }
    // Of pools that read, the one with the fewest GPUs for the load serves every decoding one.
    let reads = all.iter().find(|(role, _)| *role == Role::Prefill);
    let reads = reads.and_then(|(_, plans)| plans.iter().min_by_key(|p| p.gpus).cloned());
    let rest = all.iter().filter(|(role, _)| *role != Role::Prefill).flat_map(|(_, p)| p);
    let mut candidates: Vec<Candidate> = rest
        .map(|decode| {
            let pools: Vec<PoolPlan> = reads.iter().chain([decode]).cloned().collect();
            let to = reads.as_ref().map_or(0.0, |p| p.gpus as f64 / decode.gpus as f64);
            let per_user = if decode.tpot_s > 0.0 { 1.0 / decode.tpot_s } else { 0.0 };
            Candidate {
                plan: total(s, load_per_s, pools),
                tokens_per_s_per_user: per_user,
                prefill_to_decode: to,
            }
        })
        .collect();
    candidates.sort_by(|a, b| {
        let fast = b.tokens_per_s_per_user.total_cmp(&a.tokens_per_s_per_user);
        a.plan.gpus.cmp(&b.plan.gpus).then(fast)
    });
    let mut front: Vec<Candidate> = Vec::new();
    for c in candidates {
        let faster = |f: &Candidate| c.tokens_per_s_per_user > f.tokens_per_s_per_user;
        if front.last().is_none_or(faster) {
            front.push(c);
        }
    }
    Ok(ServeSearchResult { tried, refused, front })
}

/// The layouts of one pool that `[search]` lists; what it does not list stays.
fn layouts(s: &ServeScenario, base: &ServeScenario, role: Role) -> Vec<ServeScenario> {
    let slot = |x: &ServeScenario| match role {
        Role::Prefill => x.prefill.clone(),
        Role::Decode => x.decode.clone(),
        Role::Unified => x.unified.clone(),
    };
    let Some(pool) = slot(base) else { return Vec::new() };
    let or = |list: &[u64], own: u64| if list.is_empty() { vec![own] } else { list.to_vec() };
    let gpus = if role == Role::Prefill { &s.search.prefill_gpus } else { &s.search.decode_gpus };
    let batches = match role {
        Role::Prefill => vec![pool.max_batch],
        _ => or(&s.search.max_batch, pool.max_batch),
    };
    let mut list = Vec::new();
    for gpus in or(gpus, pool.gpus) {
        for tp in or(&s.search.tp, pool.tp) {
            for &max_batch in &batches {
                // Copies of experts are kept only where the unit keeps its size.
                let expert_slots = pool.expert_slots.filter(|_| gpus == pool.gpus);
                let pool = Pool { gpus, tp, max_batch, expert_slots, ..pool.clone() };
                let mut one = base.clone();
                match role {
                    Role::Prefill => one.prefill = Some(pool),
                    Role::Decode => one.decode = Some(pool),
                    Role::Unified => one.unified = Some(pool),
                }
                list.push(one);
            }
        }
    }
    list
}
