//! The discrete events: requests arrive, units iterate, caches travel.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use super::config::{Pool, ServeScenario};
use super::draws::Draws;
use super::iteration::IterationModel;
use super::metrics::{Meter, Spans};
use super::requests::{BlockCache, Request, Requests, drawn};
use super::unit::{Rank, Running, Unit};

/// A pool that is ready to run.
#[derive(Debug, Clone)]
pub struct ReadyPool {
    /// Times of its iterations.
    pub model: IterationModel,
    /// The pool's keys.
    pub pool: Pool,
    /// Pages of a rank.
    pub pages: u64,
    /// Busiest expert GPU over the mean, as they are placed.
    pub imbalance: f64,
    /// Bytes of keys and values a token.
    pub bytes_per_token: f64,
}

/// Stream of draws: how many drafts hold.
const ACCEPTED: u64 = 4;
/// Stream of draws: how far the first requests of a closed loop are.
const PROGRESS: u64 = 5;

/// What happens at a point in simulated time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Event {
    Arrives(u32),
    /// What a prefix cache held has been loaded.
    Loaded(u32, u32),
    /// An iteration of a pool's unit ends.
    Ends(u8, u32),
    /// A request's cache is at the pool that decodes.
    CacheArrives(u32),
}

/// Time in nanoseconds: ordered, and as fine as any hardware's clock.
fn nanoseconds(seconds: f64) -> u64 {
    (seconds * 1e9).round() as u64
}

/// A simulation under way.
pub struct Engine<'a> {
    s: &'a ServeScenario,
    pools: Vec<ReadyPool>,
    units: Vec<Vec<Unit>>,
    /// Which pool reads prompts, and which decodes.
    reads: Option<usize>,
    decodes: Option<usize>,
    requests: Vec<Request>,
    spans: Vec<Spans>,
    events: BinaryHeap<Reverse<(u64, u64, Event)>>,
    order: u64,
    now: f64,
    /// When the link that leaves a rank of the reading pool is free.
    links: Vec<f64>,
    cache: BlockCache,
    draws: Draws,
    closed: bool,
    meter: Meter,
}

impl<'a> Engine<'a> {
    /// A simulation of `s` on pools in the order prefill, decode, or a unified one alone.
    pub fn new(s: &'a ServeScenario, pools: Vec<ReadyPool>, requests: Requests) -> Engine<'a> {
        let unified = s.unified.is_some();
        let reads = (s.prefill.is_some() || unified).then_some(0);
        let decodes = s.decode.as_ref().map(|_| pools.len() - 1).or(unified.then_some(0));
        let unit = |(i, p): (usize, &ReadyPool)| {
            let decodes_here = decodes == Some(i);
            let unit = Unit {
                ranks: vec![Rank::default(); p.pool.dp() as usize],
                queue: Default::default(),
                queued_tokens: 0,
                waiting: Default::default(),
                busy: false,
                ended_s: 0.0,
                pages: p.pages,
                page_tokens: s.memory.page_tokens,
                max_batch: p.pool.max_batch as usize,
                chunk_tokens: p.pool.chunk_tokens,
                steps: if decodes_here { s.mtp.drafts as u32 + 1 } else { 1 },
                unified,
            };
            vec![unit; p.pool.units as usize]
        };
        let ranks = reads.map_or(0, |i| (pools[i].pool.dp() * pools[i].pool.units) as usize);
        let mut engine = Engine {
            s,
            units: pools.iter().enumerate().map(unit).collect(),
            meter: Meter::new(s, pools.len()),
            pools,
            reads,
            decodes,
            requests: Vec::new(),
            spans: Vec::new(),
            events: BinaryHeap::new(),
            order: 0,
            now: 0.0,
            links: vec![0.0; ranks],
            cache: BlockCache::new(s.prefix_cache.capacity_tokens),
            draws: Draws::new(s.seed),
            closed: matches!(requests, Requests::Closed(_)),
        };
        match requests {
            Requests::Listed(list) => list.into_iter().for_each(|r| engine.announce(r)),
            Requests::Closed(n) => (0..n).for_each(|_| {
                engine.draw(0.0);
                engine.begin_within();
            }),
        }
        engine
    }

    fn announce(&mut self, request: Request) {
        let id = self.requests.len() as u32;
        self.schedule(request.arrival_s, Event::Arrives(id));
        self.requests.push(request);
        self.spans.push(Spans::default());
    }

    /// A new request of a closed loop.
    fn draw(&mut self, at: f64) {
        let request = drawn(&self.s.workload, self.s.seed, self.requests.len(), at);
        self.announce(request);
    }

    /// Where nothing reads prompts, the first requests of a closed loop are somewhere in their
    /// answers.
    fn begin_within(&mut self) {
        if self.reads.is_none() {
            let id = self.requests.len() - 1;
            let share = self.draws.uniform(PROGRESS, id as u64);
            let span = &mut self.spans[id];
            span.emitted = (share * self.requests[id].output as f64) as u64;
            span.partial = true;
        }
    }

    fn schedule(&mut self, seconds: f64, event: Event) {
        self.order += 1;
        self.events.push(Reverse((nanoseconds(seconds), self.order, event)));
    }

    /// Plays all events until the end of the run, or until nothing is left to do when `drain`.
    pub fn run(mut self, drain: bool) -> Meter {
        let end = nanoseconds(self.s.duration_s);
        while let Some(Reverse((at, _, event))) = self.events.pop() {
            if at > end && !drain {
                break;
            }
            self.now = at as f64 / 1e9;
            match event {
                Event::Arrives(id) => self.arrives(id),
                Event::Loaded(id, cached) => self.read(id, cached),
                Event::Ends(pool, unit) => self.ends(pool as usize, unit as usize),
                Event::CacheArrives(id) => self.cache_arrives(id),
            }
        }
        let until = if drain { self.now } else { self.s.duration_s };
        self.meter.finish(until, &self.units, &self.requests, &self.spans);
        self.meter
    }

    fn arrives(&mut self, id: u32) {
        let request = &self.requests[id as usize];
        let tokens = request.prompt + request.output;
        let longest = self.units.iter().map(|u| u[0].longest()).min().unwrap_or(0);
        self.meter.arrived(self.now);
        if tokens > longest {
            self.meter.rejected(self.now);
            self.spans[id as usize].rejected = true;
            return;
        }
        if self.reads.is_none() {
            return self.cache_arrives(id);
        }
        let cached = if request.blocks.is_empty() {
            (request.prompt as f64 * self.s.prefix_cache.hit_rate) as u64
        } else {
            self.cache.found(request)
        };
        let cached = cached.min(request.prompt - 1) as u32;
        let rate = self.s.prefix_cache.load_bytes_per_s;
        let bytes = self.pools[0].bytes_per_token * f64::from(cached);
        if rate > 0.0 && cached > 0 {
            self.schedule(self.now + bytes / rate, Event::Loaded(id, cached));
        } else {
            self.read(id, cached);
        }
    }

    /// Puts a prompt into the shortest queue of the pool that reads.
    fn read(&mut self, id: u32, cached: u32) {
        let pool = self.reads.expect("only called where a pool reads");
        let left = self.requests[id as usize].prompt as u32 - cached;
        self.spans[id as usize].cached = u64::from(cached);
        let unit = lightest(&self.units[pool]);
        self.units[pool][unit].enqueue(id, cached, left);
        self.start(pool, unit);
    }

    fn cache_arrives(&mut self, id: u32) {
        let Some(pool) = self.decodes else { return };
        let request = &self.requests[id as usize];
        let emitted = self.spans[id as usize].emitted;
        let running = Running {
            id,
            // The newest token joins the cache when it is fed.
            cached: (request.prompt + emitted.saturating_sub(1)) as u32,
            left: (request.output - emitted) as u32,
        };
        let unit = lightest(&self.units[pool]);
        self.units[pool][unit].waiting.push_back(running);
        self.start(pool, unit);
    }

    /// Starts an iteration where a unit is idle and has something to do.
    fn start(&mut self, pool: usize, unit: usize) {
        let u = &mut self.units[pool][unit];
        if u.busy {
            return;
        }
        if self.decodes == Some(pool) {
            let retracted = u.retract();
            self.meter.retracted += retracted;
            if retracted == 0 {
                u.admit();
            }
        }
        let p = &self.pools[pool];
        if self.reads == Some(pool) {
            u.choose(&|tokens, pairs| p.model.prompt_cost_s(tokens, pairs));
        }
        if !u.has_work() {
            return;
        }
        let drafts = if self.decodes == Some(pool) { self.s.mtp.drafts } else { 0 };
        let batch = u.batch(&p.model, p.imbalance, drafts);
        let time = p.model.time(&batch);
        u.busy = true;
        self.meter.iteration(pool, self.now, &time, &batch, u);
        self.schedule(self.now + time.seconds, Event::Ends(pool as u8, unit as u32));
    }

    fn ends(&mut self, pool: usize, unit: usize) {
        self.units[pool][unit].busy = false;
        self.units[pool][unit].ended_s = self.now;
        for rank in 0..self.units[pool][unit].ranks.len() {
            self.emit(pool, unit, rank);
            self.read_chunk(pool, unit, rank);
        }
        self.start(pool, unit);
    }

    /// Running requests emit their tokens.
    fn emit(&mut self, pool: usize, unit: usize, rank: usize) {
        let u = &mut self.units[pool][unit];
        let page = u.page_tokens;
        let pages_of = |tokens: u32| u64::from(tokens).div_ceil(page);
        let r = &mut u.ranks[rank];
        let mut ended = 0;
        let (mut i, mut grown) = (0, 0u64);
        while i < r.running.len() {
            let mut one = r.running[i];
            let span = &mut self.spans[one.id as usize];
            let mut tokens = 1;
            while tokens <= self.s.mtp.drafts as u32 && tokens < one.left {
                let counter = u64::from(one.id) << 24 | u64::from(one.cached + tokens);
                if self.draws.uniform(ACCEPTED, counter) >= self.s.mtp.acceptance {
                    break;
                }
                tokens += 1;
            }
            self.meter.emitted(
                self.now,
                u64::from(tokens),
                self.now - span.last_s,
                span.emitted > 0,
            );
            if span.emitted == 0 {
                span.first_s = self.now;
            }
            span.last_s = self.now;
            span.emitted += u64::from(tokens);
            r.pages += pages_of(one.cached + tokens) - pages_of(one.cached);
            one.cached += tokens;
            one.left -= tokens;
            grown += u64::from(tokens);
            if one.left > 0 {
                r.running[i] = one;
                i += 1;
                continue;
            }
            r.pages -= pages_of(one.cached);
            r.cached_tokens -= u64::from(one.cached - tokens);
            grown -= u64::from(tokens);
            r.running.swap_remove(i);
            let request = &self.requests[one.id as usize];
            self.meter.done(self.now, request, span);
            ended += 1;
        }
        r.cached_tokens += grown;
        if self.closed {
            (0..ended).for_each(|_| self.draw(self.now));
        }
    }

    /// The prompts that a rank has read, or parts of them.
    fn read_chunk(&mut self, pool: usize, unit: usize, rank: usize) {
        let chunk = std::mem::take(&mut self.units[pool][unit].ranks[rank].chunk);
        for (id, tokens) in chunk {
            let u = &mut self.units[pool][unit];
            let page = u.page_tokens;
            let r = &u.ranks[rank];
            let at = r.queue.iter().position(|q| q.id == id).expect("it was chosen from there");
            u.queued_tokens -= u64::from(tokens);
            let r = &mut u.ranks[rank];
            let q = &mut r.queue[at];
            (q.done, q.left, q.begun) = (q.done + tokens, q.left - tokens, true);
            self.meter.read(self.now, u64::from(tokens));
            if q.left > 0 {
                continue;
            }
            r.queue.remove(at);
            let span = &mut self.spans[id as usize];
            (span.first_s, span.last_s, span.emitted) = (self.now, self.now, 1);
            self.meter.cached(self.now, span.cached);
            self.meter.emitted(self.now, 1, 0.0, false);
            let request = &self.requests[id as usize];
            let held = request.prompt.div_ceil(page);
            if request.output <= 1 || self.decodes.is_none() {
                // What only reads prompts hands the rest to nobody.
                r.pages -= held;
                self.meter.done(self.now, request, span);
                if self.closed {
                    self.draw(self.now);
                }
            } else if u.unified {
                let (cached, left) = (request.prompt as u32, request.output as u32 - 1);
                r.running.push(Running { id, cached, left });
                r.cached_tokens += u64::from(cached);
            } else {
                r.pages -= held;
                self.send(pool, unit, rank, id);
            }
        }
    }

    /// Sends a prompt's cache over the NICs of the rank that read it, one after the other.
    fn send(&mut self, pool: usize, unit: usize, rank: usize, id: u32) {
        let p = &self.pools[pool];
        let bytes = self.requests[id as usize].prompt as f64 * p.bytes_per_token;
        let network = &self.s.cluster.network;
        let seconds = bytes / (self.s.cluster.nic_bytes_per_s_per_gpu() * p.pool.tp as f64);
        let link = &mut self.links[unit * p.pool.dp() as usize + rank];
        let start = link.max(self.now);
        *link = start + seconds;
        let arrives = *link + network.cross_leaf_latency_s;
        self.meter.sent(self.now, arrives - self.now);
        self.schedule(arrives, Event::CacheArrives(id));
    }
}

/// The unit with the least to do; the first of equals.
fn lightest(units: &[Unit]) -> usize {
    (0..units.len()).min_by_key(|&u| units[u].load()).expect("a pool has units")
}
