//! What is measured while the events run, and what is made of it.

use serde::Serialize;

use super::config::ServeScenario;
use super::iteration::{Batch, IterationTime};
use super::requests::Request;
use super::unit::Unit;

/// What is known of a request under way.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Spans {
    /// When its first token came.
    pub first_s: f64,
    /// When its last token so far came.
    pub last_s: f64,
    /// Tokens that it has emitted.
    pub emitted: u64,
    /// Tokens of its prompt that a cache held.
    pub cached: u64,
    /// Whether it was refused: no cache is long enough.
    pub rejected: bool,
    /// Whether it began before the run did: its latencies mean nothing.
    pub partial: bool,
    /// Whether it has ended.
    pub done: bool,
}

/// Percentiles of a time.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub struct Latency {
    /// Values that it is of.
    pub count: u64,
    /// Mean in seconds.
    pub mean_s: f64,
    /// Median in seconds.
    pub p50_s: f64,
    /// 90th percentile, seconds.
    pub p90_s: f64,
    /// 95th percentile, seconds.
    pub p95_s: f64,
    /// 99th percentile, seconds.
    pub p99_s: f64,
    /// Largest in seconds.
    pub max_s: f64,
}

impl Latency {
    /// Of a list of seconds (nearest rank).
    pub fn of(mut list: Vec<f64>) -> Latency {
        list.sort_by(f64::total_cmp);
        let n = list.len();
        let at = |q: f64| match n {
            0 => 0.0,
            _ => list[((q * n as f64).ceil() as usize).clamp(1, n) - 1],
        };
        let mean_s = if n > 0 { list.iter().sum::<f64>() / n as f64 } else { 0.0 };
        Latency {
            count: n as u64,
            mean_s,
            p50_s: at(0.5),
            p90_s: at(0.9),
            p95_s: at(0.95),
            p99_s: at(0.99),
            max_s: at(1.0),
        }
    }
}

/// Counts of times in bins a hundredth wide, from a microsecond up.
#[derive(Debug, Clone)]
struct Histogram {
    bins: Vec<u64>,
    sum: f64,
    max: f64,
}

const BIN: f64 = 1.01;
const LEAST_S: f64 = 1e-6;

impl Histogram {
    fn add(&mut self, seconds: f64) {
        let bin = ((seconds / LEAST_S).max(1.0).ln() / BIN.ln()) as usize;
        if bin >= self.bins.len() {
            self.bins.resize(bin + 1, 0);
        }
        self.bins[bin] += 1;
        self.sum += seconds;
        self.max = self.max.max(seconds);
    }

    fn latency(&self) -> Latency {
        let count: u64 = self.bins.iter().sum();
        let at = |q: f64| {
            let wanted = (q * count as f64).ceil() as u64;
            let mut seen = 0;
            let bin = self.bins.iter().position(|&n| {
                seen += n;
                seen >= wanted.max(1)
            });
            bin.map_or(0.0, |b| (LEAST_S * BIN.powf(b as f64 + 0.5)).min(self.max))
        };
        Latency {
            count,
            mean_s: if count > 0 { self.sum / count as f64 } else { 0.0 },
            p50_s: at(0.5),
            p90_s: at(0.9),
            p95_s: at(0.95),
            p99_s: at(0.99),
            max_s: self.max,
        }
    }
}

/// One pool over the window: means weighted by the iterations' seconds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub struct PoolMeter {
    /// Iterations of all units.
    pub iterations: u64,
    /// Seconds in which units iterate, summed over units.
    pub busy_s: f64,
    /// Where they go, summed likewise.
    pub time: IterationTime,
    /// Requests that decode on a rank, mean.
    pub batch: f64,
    /// Prompt tokens of a rank and iteration, mean.
    pub prompt_tokens: f64,
    /// Busiest rank's tokens over the mean.
    pub skew: f64,
    /// Busiest expert GPU's load over the mean.
    pub expert_load: f64,
    /// Share of the pages in use, mean over ranks.
    pub kv_occupancy: f64,
    /// The largest share of any rank at the start of an iteration.
    pub kv_peak: f64,
    /// Prompts that wait or are half read, mean of a unit.
    pub queue: f64,
    /// Requests whose cache has arrived and that no rank has room for, mean of a unit.
    pub waiting: f64,
}

/// A sample of the run for pictures: at `at_s`, of one pool.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Sample {
    /// Seconds from the start.
    pub at_s: f64,
    /// Number of the pool to which it belongs.
    pub pool: u8,
    /// Requests that decode on a rank.
    pub batch: f64,
    /// Requests that wait at the unit.
    pub queue: f64,
    /// Share of the pages in use.
    pub kv: f64,
    /// Seconds of the iteration.
    pub iteration_s: f64,
}

/// The measures of a run.
#[derive(Debug, Clone)]
pub struct Meter {
    from_s: f64,
    to_s: f64,
    /// Requests that arrived in the whole run, ended, and were refused.
    pub counts: [u64; 3],
    /// Requests in the system at the end of the run.
    pub in_flight: u64,
    /// Tokens of answers emitted in the whole run.
    pub all_emitted: u64,
    /// Tokens of the answers that ended in the whole run.
    pub all_ended: u64,
    /// Pages in use at the end of the run.
    pub held_pages: u64,
    /// Requests that were taken off a full rank.
    pub retracted: u64,
    /// In the window: requests that arrived, prompt tokens read, found in a cache, tokens emitted.
    pub arrived: u64,
    /// Prompt tokens that were computed in the window.
    pub read_tokens: u64,
    /// Prompt tokens that were found in a cache in the window.
    pub cached_tokens: u64,
    /// Tokens emitted in the window.
    pub emitted_tokens: u64,
    /// Requests that ended in the window.
    pub ended: u64,
    /// Requests that ended in the window within the service level.
    pub kept: u64,
    ttft: Vec<f64>,
    tpot: Vec<f64>,
    whole: Vec<f64>,
    transfer: Vec<f64>,
    itl: Histogram,
    /// What each pool did, by its number.
    pub pools: Vec<PoolMeter>,
    /// Samples for pictures.
    pub samples: Vec<Sample>,
    inside: i64,
    changed_s: f64,
    inside_seconds: f64,
    sla: [f64; 2],
}

impl Meter {
    pub(super) fn new(s: &ServeScenario, pools: usize) -> Meter {
        Meter {
            from_s: s.warmup_s,
            to_s: s.duration_s,
            counts: [0; 3],
            in_flight: 0,
            all_emitted: 0,
            all_ended: 0,
            held_pages: 0,
            retracted: 0,
            arrived: 0,
            read_tokens: 0,
            cached_tokens: 0,
            emitted_tokens: 0,
            ended: 0,
            kept: 0,
            ttft: Vec::new(),
            tpot: Vec::new(),
            whole: Vec::new(),
            transfer: Vec::new(),
            itl: Histogram { bins: Vec::new(), sum: 0.0, max: 0.0 },
            pools: vec![PoolMeter::default(); pools],
            samples: Vec::new(),
            inside: 0,
            changed_s: 0.0,
            inside_seconds: 0.0,
            sla: [s.sla.ttft_s, s.sla.tpot_s],
        }
    }

    fn counts_at(&self, now: f64) -> bool {
        now >= self.from_s
    }

    /// One request more or fewer is in the system from `now` on.
    fn change(&mut self, now: f64, by: i64) {
        let since = self.changed_s.max(self.from_s);
        if now > since {
            self.inside_seconds += self.inside as f64 * (now - since);
        }
        (self.changed_s, self.inside) = (now, self.inside + by);
    }

    pub(super) fn arrived(&mut self, now: f64) {
        self.change(now, 1);
        self.counts[0] += 1;
        self.arrived += u64::from(self.counts_at(now));
    }

    pub(super) fn rejected(&mut self, now: f64) {
        self.change(now, -1);
        self.counts[2] += 1;
    }

    pub(super) fn cached(&mut self, now: f64, tokens: u64) {
        self.cached_tokens += if self.counts_at(now) { tokens } else { 0 };
    }

    pub(super) fn read(&mut self, now: f64, tokens: u64) {
        self.read_tokens += if self.counts_at(now) { tokens } else { 0 };
    }

    pub(super) fn sent(&mut self, now: f64, seconds: f64) {
        if self.counts_at(now) {
            self.transfer.push(seconds);
        }
    }

    pub(super) fn emitted(&mut self, now: f64, tokens: u64, gap_s: f64, follows: bool) {
        self.all_emitted += tokens;
        if self.counts_at(now) {
            self.emitted_tokens += tokens;
            if follows {
                self.itl.add(gap_s);
            }
        }
    }

    pub(super) fn done(&mut self, now: f64, request: &Request, span: &mut Spans) {
        self.change(now, -1);
        self.counts[1] += 1;
        span.done = true;
        if !self.counts_at(now) {
            return;
        }
        self.ended += 1;
        if span.partial {
            return;
        }
        let ttft = span.first_s - request.arrival_s;
        let tpot = match request.output {
            0 | 1 => None,
            n => Some((span.last_s - span.first_s) / (n - 1) as f64),
        };
        let [most_ttft, most_tpot] = self.sla;
        let kept = (most_ttft == 0.0 || ttft <= most_ttft)
            && (most_tpot == 0.0 || tpot.is_none_or(|t| t <= most_tpot));
        self.kept += u64::from(kept);
        self.ttft.push(ttft);
        self.tpot.extend(tpot);
        self.whole.push(now - request.arrival_s);
    }

    pub(super) fn iteration(
        &mut self,
        pool: usize,
        now: f64,
        time: &IterationTime,
        batch: &Batch,
        unit: &Unit,
    ) {
        let inside = (now + time.seconds).min(self.to_s) - now.max(self.from_s);
        let ranks = unit.ranks.len() as f64;
        let mean =
            |f: &dyn Fn(&super::unit::Rank) -> f64| unit.ranks.iter().map(f).sum::<f64>() / ranks;
        let running = mean(&|r| r.running.len() as f64);
        let kv = mean(&|r| r.pages as f64) / unit.pages.max(1) as f64;
        let queue = unit.queue.len() as f64 + ranks * mean(&|r| r.queue.len() as f64);
        let waiting = unit.waiting.len() as f64;
        if self.samples.len() < SAMPLES {
            let (batch, queue) = (running, queue + waiting);
            let iteration_s = time.seconds;
            self.samples.push(Sample {
                at_s: now,
                pool: pool as u8,
                batch,
                queue,
                kv,
                iteration_s,
            });
        }
        if inside <= 0.0 {
            return;
        }
        let m = &mut self.pools[pool];
        let share = inside / time.seconds;
        m.iterations += 1;
        m.busy_s += inside;
        m.time.add(time, share);
        let peak = unit.ranks.iter().map(|r| r.pages).max().unwrap_or(0);
        m.kv_peak = m.kv_peak.max(peak as f64 / unit.pages.max(1) as f64);
        for (sum, value) in [
            (&mut m.batch, running),
            (&mut m.prompt_tokens, batch.mean_tokens - running * batch.tokens_a_request),
            (&mut m.skew, batch.skew()),
            (&mut m.expert_load, batch.load),
            (&mut m.kv_occupancy, kv),
            (&mut m.queue, queue),
            (&mut m.waiting, waiting),
        ] {
            *sum += value * inside;
        }
    }

    pub(super) fn finish(
        &mut self,
        until: f64,
        units: &[Vec<Unit>],
        requests: &[Request],
        spans: &[Spans],
    ) {
        self.change(until, 0);
        self.to_s = until;
        let arrived = requests.iter().filter(|r| r.arrival_s <= until).count() as u64;
        self.in_flight = arrived.min(self.counts[0]) - self.counts[1] - self.counts[2];
        self.held_pages = units.iter().flatten().flat_map(|u| &u.ranks).map(|r| r.pages).sum();
        self.all_ended = spans.iter().filter(|s| s.done).map(|s| s.emitted).sum();
        for m in &mut self.pools {
            let busy = m.busy_s.max(f64::MIN_POSITIVE);
            for sum in [
                &mut m.batch,
                &mut m.prompt_tokens,
                &mut m.skew,
                &mut m.expert_load,
                &mut m.kv_occupancy,
                &mut m.queue,
                &mut m.waiting,
            ] {
                *sum /= busy;
            }
        }
    }

    /// Seconds of the window.
    pub fn window_s(&self) -> f64 {
        (self.to_s - self.from_s).max(f64::MIN_POSITIVE)
    }

    /// Requests in the system, mean over the window.
    pub fn mean_in_system(&self) -> f64 {
        self.inside_seconds / self.window_s()
    }

    /// Time to the first token.
    pub fn ttft(&self) -> Latency {
        Latency::of(self.ttft.clone())
    }

    /// Time a token after the first, mean of a request; where no whole request ended in the window,
    /// the mean time between tokens of those under way.
    pub fn tpot(&self) -> Latency {
        if self.tpot.is_empty() && self.emitted_tokens > 0 {
            return Latency { mean_s: self.gap_per_token_s(), ..Latency::default() };
        }
        Latency::of(self.tpot.clone())
    }

    /// Time from arrival to the last token.
    pub fn whole(&self) -> Latency {
        Latency::of(self.whole.clone())
    }

    /// Time from the end of a prompt's reading to its cache's arrival.
    pub fn transfer(&self) -> Latency {
        Latency::of(self.transfer.clone())
    }

    /// Time between two arrivals of tokens of a request (percentiles to a hundredth).
    pub fn itl(&self) -> Latency {
        self.itl.latency()
    }

    /// Time to the first token that `share` of the requests keep.
    pub fn ttft_at(&self, share: f64) -> f64 {
        let mut list = self.ttft.clone();
        list.sort_by(f64::total_cmp);
        let at = ((share * list.len() as f64).ceil() as usize).clamp(1, list.len().max(1));
        list.get(at - 1).copied().unwrap_or(0.0)
    }

    /// Mean time between tokens of a request, by the tokens emitted: also of requests under way.
    pub fn gap_per_token_s(&self) -> f64 {
        let gaps = self.itl.latency();
        gaps.mean_s * gaps.count as f64 / self.emitted_tokens.max(1) as f64
    }

    /// Share of the requests that ended within the service level.
    pub fn kept_share(&self) -> f64 {
        let n = self.ttft.len();
        if n > 0 { self.kept as f64 / n as f64 } else { 1.0 }
    }
}

/// Most samples of a run.
const SAMPLES: usize = 200_000;
