//! A serving scenario from its pools' layouts to the report.

use std::time::Instant;

use serde::Serialize;

use super::balance::{ExpertBalance, balance};
use super::config::{Pool, ServeScenario};
use super::engine::{Engine, ReadyPool};
use super::layout::{Layout, Role, iteration_model};
use super::memory::{PoolMemory, memory};
use super::metrics::{Latency, Meter, PoolMeter, Sample};
use super::ops::InferenceOps;
use super::requests::Requests;
use crate::error::SimError;
use crate::kernel_time::Constants;

/// Published throughput over ours, least and most of the large deployments that nothing was fitted
/// on (`fathom simulate validate`, sections 'Serving'; a test holds it to them).
pub const REACHED: [f64; 2] = [0.87, 0.98];

/// One pool in the report.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct PoolReport {
    /// `prefill`, `decode` or `unified`.
    pub role: &'static str,
    /// GPUs of all its units.
    pub gpus: u64,
    /// How many units the pool has.
    pub units: u64,
    /// GPUs of a unit, tensor-parallel, data-parallel and expert-parallel ranks.
    pub layout: [u64; 4],
    /// What a GPU holds.
    pub memory: PoolMemory,
    /// Balance of the experts, where they lie on several ranks.
    pub experts: Option<ExpertBalance>,
    /// Share of the window in which units iterate.
    pub busy: f64,
    /// Tokens a second of a GPU: prompts with what caches held for a pool that reads, else answers.
    pub tokens_per_s_per_gpu: f64,
    /// The same of a node.
    pub tokens_per_s_per_node: f64,
    /// What was measured of it.
    pub measured: PoolMeter,
    /// Dollars an hour.
    pub usd_per_hour: f64,
}

/// The report of a run.
#[derive(Debug, Clone, Serialize)]
pub struct ServeReport {
    /// The scenario's name.
    pub name: String,
    /// Why a pool cannot hold the model or a request; then nothing ran.
    pub complaints: Vec<String>,
    /// What each pool did, by its number.
    pub pools: Vec<PoolReport>,
    /// Seconds that figures are of.
    pub window_s: f64,
    /// Requests a second that arrived, that ended.
    pub requests_per_s: [f64; 2],
    /// Tokens of prompts a second, with what caches held.
    pub input_tokens_per_s: f64,
    /// Share of them that caches held.
    pub cache_hit_rate: f64,
    /// Tokens of answers a second.
    pub output_tokens_per_s: f64,
    /// Tokens a second that a user sees: 1 over the mean time a token.
    pub tokens_per_s_per_user: f64,
    /// Requests in the system, mean.
    pub in_system: f64,
    /// Requests that arrived, ended, were refused, are under way at the end, were taken off a rank.
    pub requests: RequestCounts,
    /// Time to the first token.
    pub ttft: Latency,
    /// Time a token after it, mean of a request.
    pub tpot: Latency,
    /// Time between tokens.
    pub itl: Latency,
    /// Time from arrival to the end.
    pub end_to_end: Latency,
    /// Time that a cache takes between the pools.
    pub kv_transfer: Latency,
    /// Share of the requests within the service level, where one is promised.
    pub within_sla: Option<f64>,
    /// Share of such throughputs that published deployments reach, least and most: [`REACHED`].
    pub reached_share: [f64; 2],
    /// Dollars a million tokens read (with what caches held), and a million emitted.
    pub usd_per_million: [f64; 2],
    /// Seconds that the simulation took.
    pub wall_s: f64,
    /// Samples of the run for pictures.
    #[serde(skip)]
    pub samples: Vec<Sample>,
}

/// Counts of requests over the whole run.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct RequestCounts {
    /// Requests that arrived.
    pub arrived: u64,
    /// Requests that were answered to their end.
    pub ended: u64,
    /// Refused: no rank's pages hold them.
    pub refused: u64,
    /// Under way at the end.
    pub under_way: u64,
    /// Times that a request was taken off a rank whose pages ran out.
    pub retracted: u64,
}

/// The pools of a scenario by role, in the order in which requests visit them.
pub fn pools(s: &ServeScenario) -> Vec<(Role, &Pool)> {
    let prefill = s.prefill.as_ref().map(|p| (Role::Prefill, p));
    let decode = s.decode.as_ref().map(|p| (Role::Decode, p));
    let unified = s.unified.as_ref().map(|p| (Role::Unified, p));
    prefill.into_iter().chain(decode).chain(unified).collect()
}

/// A scenario whose layouts are checked and whose iterations are timed.
pub struct Ready {
    /// The pools, ready to run.
    pub pools: Vec<ReadyPool>,
    /// Their reports, still without measures.
    pub reports: Vec<PoolReport>,
    /// Why one cannot hold the model or a request.
    pub complaints: Vec<String>,
}

/// Checks and times the pools of `s`.
///
/// # Errors
/// [`SimError::Layout`] for a layout that cannot be.
pub fn prepare(
    s: &ServeScenario,
    source: &dyn InferenceOps,
    constants: Constants,
) -> Result<Ready, SimError> {
    let mut ready = Ready { pools: Vec::new(), reports: Vec::new(), complaints: Vec::new() };
    let lengths = [s.workload.prompt, s.workload.output];
    let request: f64 = lengths.iter().flatten().map(|l| l.mean).sum();
    for (role, pool) in pools(s) {
        let layout = Layout::of(s, pool, role)?;
        let memory = memory(s, pool, &layout, role != Role::Prefill);
        ready.complaints.extend(memory.complaint(role.name(), s.memory.page_tokens, request));
        let experts = balance(s, pool, &layout);
        let imbalance = experts.as_ref().map_or(1.0, |e| e.imbalance);
        let gpus = pool.gpus * pool.units;
        ready.reports.push(PoolReport {
            role: role.name(),
            gpus,
            units: pool.units,
            layout: [pool.gpus, pool.tp, pool.dp(), layout.ep],
            memory,
            experts,
            busy: 0.0,
            tokens_per_s_per_gpu: 0.0,
            tokens_per_s_per_node: 0.0,
            measured: PoolMeter::default(),
            usd_per_hour: gpus as f64 * s.cluster.usd_per_gpu_hour,
        });
        ready.pools.push(ReadyPool {
            model: iteration_model(s, pool, role, source, constants)?,
            pool: pool.clone(),
            pages: memory.pages,
            imbalance,
            bytes_per_token: memory.bytes_per_token,
        });
    }
    Ok(ready)
}

/// Simulates a scenario.
///
/// # Errors
/// Those of its layouts and of its trace.
pub fn serve(
    s: &ServeScenario,
    source: &dyn InferenceOps,
    constants: Constants,
) -> Result<ServeReport, SimError> {
    let ready = prepare(s, source, constants)?;
    report(s, ready)
}

/// Simulates a scenario that is prepared.
///
/// # Errors
/// Those of its trace.
pub fn report(s: &ServeScenario, ready: Ready) -> Result<ServeReport, SimError> {
    let started = Instant::now();
    let Ready { pools, mut reports, complaints } = ready;
    let meter = if complaints.is_empty() {
        Engine::new(s, pools, Requests::of(s)?).run(false)
    } else {
        Meter::new(s, reports.len())
    };
    let window = meter.window_s();
    let input = (meter.read_tokens + meter.cached_tokens) as f64 / window;
    let output = meter.emitted_tokens as f64 / window;
    let per_node = s.cluster.gpus_per_node as f64;
    for (r, &measured) in reports.iter_mut().zip(&meter.pools) {
        let tokens = if r.role == "prefill" { input } else { output };
        r.measured = measured;
        r.busy = measured.busy_s / window / r.units as f64;
        r.tokens_per_s_per_gpu = tokens / r.gpus as f64;
        r.tokens_per_s_per_node = r.tokens_per_s_per_gpu * per_node;
    }
    let promised = s.sla.ttft_s > 0.0 || s.sla.tpot_s > 0.0;
    let tpot = meter.tpot();
    Ok(ServeReport {
        name: s.name.clone(),
        reached_share: REACHED,
        usd_per_million: usd_per_million(&reports, input, output),
        complaints,
        pools: reports,
        window_s: window,
        requests_per_s: [meter.arrived, meter.ended].map(|n| n as f64 / window),
        input_tokens_per_s: input,
        cache_hit_rate: if input > 0.0 { meter.cached_tokens as f64 / window / input } else { 0.0 },
        output_tokens_per_s: output,
        tokens_per_s_per_user: if tpot.mean_s > 0.0 { 1.0 / tpot.mean_s } else { 0.0 },
        in_system: meter.mean_in_system(),
        requests: RequestCounts {
            arrived: meter.counts[0],
            ended: meter.counts[1],
            refused: meter.counts[2],
            under_way: meter.in_flight,
            retracted: meter.retracted,
        },
        ttft: meter.ttft(),
        tpot,
        itl: meter.itl(),
        end_to_end: meter.whole(),
        kv_transfer: meter.transfer(),
        within_sla: promised.then(|| meter.kept_share()),
        wall_s: started.elapsed().as_secs_f64(),
        samples: meter.samples,
    })
}

/// A pool that reads pays for input, one that decodes for output; a unified pool's dollars are
/// shared by the seconds of its prompts' and its answers' tokens, each token alike.
fn usd_per_million(pools: &[PoolReport], input: f64, output: f64) -> [f64; 2] {
    let mut usd = [0.0; 2];
    for p in pools {
        let per_s = p.usd_per_hour / 3600.0;
        let (reads, emits) = match p.role {
            "prefill" => (1.0, 0.0),
            "decode" => (0.0, 1.0),
            _ => (input / (input + output).max(1e-300), output / (input + output).max(1e-300)),
        };
        usd[0] += per_s * reads;
        usd[1] += per_s * emits;
    }
    let a_million = |usd: f64, tokens: f64| if tokens > 0.0 { usd / tokens * 1e6 } else { 0.0 };
    [a_million(usd[0], input), a_million(usd[1], output)]
}
