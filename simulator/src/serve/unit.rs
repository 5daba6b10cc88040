//! A unit of a pool: its ranks' queues, running requests and pages, and what an iteration does.

use std::collections::VecDeque;

use super::iteration::{Batch, IterationModel};

/// A request that decodes on a rank.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Running {
    /// Number of the request.
    pub id: u32,
    /// Tokens in its cache.
    pub cached: u32,
    /// Tokens that it has still to emit.
    pub left: u32,
}

/// A prompt that is read on a rank.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Reading {
    /// Number of the request.
    pub id: u32,
    /// Tokens that a prefix cache held.
    pub cached: u32,
    /// Tokens that are in the rank's cache, or will be loaded with the first chunk.
    pub done: u32,
    /// Tokens that are still to be read.
    pub left: u32,
    /// Whether a chunk of it has been read, so that its pages are the rank's.
    pub begun: bool,
}

/// A data-parallel rank.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Rank {
    /// Prompts that it reads.
    pub queue: Vec<Reading>,
    /// Requests that decode.
    pub running: Vec<Running>,
    /// Tokens in the caches of running requests.
    pub cached_tokens: u64,
    /// Pages in use.
    pub pages: u64,
    /// Prompts read since the iteration began: request and tokens.
    pub chunk: Vec<(u32, u32)>,
}

/// A group of GPUs that holds the model once, and the requests that it works on.
#[derive(Debug, Clone)]
pub struct Unit {
    /// Its data-parallel ranks, each with requests of its own.
    pub ranks: Vec<Rank>,
    /// Prompts that no rank has begun, in the order of their arrival.
    pub queue: VecDeque<Reading>,
    /// Tokens of all prompts that are still to be read.
    pub queued_tokens: u64,
    /// Requests whose caches have arrived and that no rank has room for yet.
    pub waiting: VecDeque<Running>,
    /// Whether an iteration is under way.
    pub busy: bool,
    /// When the last iteration ended.
    pub ended_s: f64,
    /// Pages of a rank.
    pub pages: u64,
    /// Tokens of a page.
    pub page_tokens: u64,
    /// Most requests of a rank.
    pub max_batch: usize,
    /// Most prompt tokens of a rank in an iteration.
    pub chunk_tokens: u64,
    /// Tokens that a running request may emit in an iteration.
    pub steps: u32,
    /// Whether the pages of a prompt are those of the decoding that follows.
    pub unified: bool,
}

impl Unit {
    /// Pages of a cache of `tokens`.
    pub fn pages_of(&self, tokens: u64) -> u64 {
        tokens.div_ceil(self.page_tokens)
    }

    /// Most tokens that a cache can have.
    pub fn longest(&self) -> u64 {
        self.pages * self.page_tokens
    }

    /// Tokens and requests that wait or run: what a router compares.
    pub fn load(&self) -> u64 {
        self.queued_tokens
            + self.decoding().0
            + self.waiting.iter().map(|w| u64::from(w.cached)).sum::<u64>()
    }

    /// Puts a prompt of which `done` tokens are cached behind the others.
    pub fn enqueue(&mut self, id: u32, done: u32, left: u32) {
        self.queue.push_back(Reading { id, cached: done, done, left, begun: false });
        self.queued_tokens += u64::from(left);
    }

    /// Gives waiting requests to the ranks with the fewest cached tokens that have room.
    pub fn admit(&mut self) {
        while let Some(&next) = self.waiting.front() {
            let pages = self.pages_of(u64::from(next.cached) + u64::from(self.steps));
            let open = |r: &usize| {
                let rank = &self.ranks[*r];
                rank.running.len() < self.max_batch && rank.pages + pages <= self.pages
            };
            // Both are to be even: cached tokens, which attention reads, and requests.
            let (keys, requests) = self.decoding();
            let key = |&r: &usize| {
                let rank = &self.ranks[r];
                rank.cached_tokens as f64 / keys.max(1) as f64
                    + rank.running.len() as f64 / requests.max(1) as f64
            };
            let ranks = (0..self.ranks.len()).filter(open);
            let best = ranks.min_by(|a, b| key(a).total_cmp(&key(b)));
            let Some(best) = best else { return };
            self.waiting.pop_front();
            let held = self.pages_of(u64::from(next.cached));
            let rank = &mut self.ranks[best];
            rank.running.push(next);
            rank.cached_tokens += u64::from(next.cached);
            rank.pages += held;
        }
    }

    /// Cached tokens and requests of all ranks.
    fn decoding(&self) -> (u64, usize) {
        let of = |(t, n): (u64, usize), r: &Rank| (t + r.cached_tokens, n + r.running.len());
        self.ranks.iter().fold((0, 0), of)
    }

    /// Pages that a rank's running requests may take in the next iteration.
    fn growth(&self, rank: &Rank) -> u64 {
        let grow = |r: &Running| {
            let [now, then] = [r.cached, r.cached + r.left.min(self.steps)].map(u64::from);
            self.pages_of(then) - self.pages_of(now)
        };
        rank.running.iter().map(grow).sum()
    }

    /// Takes the youngest work off ranks whose pages would not last the iteration, prompts that are
    /// half read before requests that decode; how many.
    pub fn retract(&mut self) -> u64 {
        let mut taken = 0;
        for i in 0..self.ranks.len() {
            while self.ranks[i].pages + self.growth(&self.ranks[i]) > self.pages {
                if !self.put_back(i) {
                    let rank = &mut self.ranks[i];
                    if rank.running.len() <= 1 {
                        break;
                    }
                    let last = rank.running.pop().expect("more than one");
                    rank.cached_tokens -= u64::from(last.cached);
                    rank.pages -= u64::from(last.cached).div_ceil(self.page_tokens);
                    self.waiting.push_front(last);
                }
                taken += 1;
            }
        }
        taken
    }

    /// Puts the youngest prompt that a rank reads back to the others; what was read of it is lost.
    fn put_back(&mut self, rank: usize) -> bool {
        let Some(reading) = self.ranks[rank].queue.pop() else { return false };
        let held = if reading.begun { self.pages_of(u64::from(reading.done)) } else { 0 };
        self.ranks[rank].pages -= held;
        let lost = reading.done - reading.cached;
        self.queued_tokens += u64::from(lost);
        let (done, left) = (reading.cached, reading.left + lost);
        self.queue.push_front(Reading { done, left, begun: false, ..reading });
        true
    }

    /// Chooses what the next iteration reads: every rank goes on with the prompts that it has
    /// begun; then the oldest prompts that fit the unit's budget are dealt out, the costliest
    /// first, each to the rank with the least to do, so that tokens and attention are even. `cost`
    /// is seconds of so many tokens and pairs of a query and a key.
    pub fn choose(&mut self, cost: &dyn Fn(f64, f64) -> f64) {
        let whole = |r: &Reading| cost(f64::from(r.left), pairs(r, u64::from(r.left)));
        let steps = u64::from(self.steps);
        let decoding = |r: &Rank| if self.unified { r.running.len() as u64 * steps } else { 0 };
        let budget = |r: &Rank| self.chunk_tokens.saturating_sub(decoding(r));
        let mut budget: Vec<u64> = self.ranks.iter().map(budget).collect();
        let begun = self.ranks.iter().flat_map(|r| &r.queue);
        let half_read: u64 = begun.clone().map(|r| u64::from(r.left)).sum();
        let mut total: f64 = begun.map(whole).sum();
        let mut room = budget.iter().sum::<u64>().saturating_sub(half_read);
        let mut fresh: Vec<Reading> = Vec::new();
        while let Some(&next) = self.queue.front().filter(|_| room > 0) {
            self.queue.pop_front();
            room = room.saturating_sub(u64::from(next.left));
            total += whole(&next);
            fresh.push(next);
        }
        // No rank reads for longer than the mean, or than a quarter of a full chunk takes: a long
        // prompt is cut.
        let ranks = self.ranks.len();
        let short = cost(self.chunk_tokens as f64 / 4.0, 0.0);
        let even = (total / ranks as f64).max(short);
        let mut work = vec![0.0; ranks];
        for i in 0..ranks {
            self.ranks[i].chunk.clear();
            let mut at = 0;
            while at < self.ranks[i].queue.len() {
                let reading = self.ranks[i].queue[at];
                let most = affordable(&reading, even - work[i], cost).min(budget[i]);
                let taken = self.take(i, &reading, most);
                work[i] += cost(taken as f64, pairs(&reading, taken));
                budget[i] -= taken;
                at += 1;
                // Several that hold pages which none can do without: the youngest gives way.
                let r = &self.ranks[i];
                let stuck = r.chunk.is_empty() && r.running.is_empty() && r.queue.len() > 1;
                if at == r.queue.len() && stuck {
                    self.put_back(i);
                    at = 0;
                }
            }
        }
        let mut order: Vec<usize> = (0..fresh.len()).collect();
        order.sort_by(|&a, &b| whole(&fresh[b]).total_cmp(&whole(&fresh[a])).then(a.cmp(&b)));
        let mut back = Vec::new();
        for at in order {
            let reading = fresh[at];
            let open = |&r: &usize| budget[r] > 0 && self.has_room(r, &reading, budget[r]);
            let best = (0..ranks).filter(open).min_by(|&a, &b| work[a].total_cmp(&work[b]));
            let Some(rank) = best else {
                back.push(at);
                continue;
            };
            self.ranks[rank].queue.push(reading);
            let most = affordable(&reading, even - work[rank], cost).min(budget[rank]);
            let taken = self.take(rank, &reading, most);
            budget[rank] -= taken;
            work[rank] += cost(taken as f64, pairs(&reading, taken));
        }
        back.sort_unstable();
        back.into_iter().rev().for_each(|at| self.queue.push_front(fresh[at]));
    }

    /// Pages that reading `tokens` more of a prompt takes; a cached beginning is loaded with the
    /// first chunk.
    fn pages_for(&self, reading: &Reading, tokens: u64) -> u64 {
        let held = if reading.begun { u64::from(reading.done) } else { 0 };
        self.pages_of(u64::from(reading.done) + tokens) - self.pages_of(held)
    }

    fn has_room(&self, rank: usize, reading: &Reading, budget: u64) -> bool {
        let r = &self.ranks[rank];
        let take = u64::from(reading.left).min(budget);
        let seats = !self.unified || r.running.len() + r.queue.len() < self.max_batch;
        seats && r.pages + self.growth(r) + self.pages_for(reading, take) <= self.pages
    }

    /// Lets a rank read a prompt of its queue up to `budget` tokens; how many it takes.
    fn take(&mut self, rank: usize, reading: &Reading, budget: u64) -> u64 {
        let take = u64::from(reading.left).min(budget);
        let (pages, growth) = (self.pages_for(reading, take), self.growth(&self.ranks[rank]));
        let r = &mut self.ranks[rank];
        if take == 0 || r.pages + growth + pages > self.pages {
            return 0;
        }
        r.pages += pages;
        r.chunk.push((reading.id, take as u32));
        take
    }

    /// What the chosen iteration asks of the rank that takes longest, and of the experts.
    pub fn batch(&self, model: &IterationModel, imbalance: f64, drafts: u64) -> Batch {
        let per = (drafts + 1) as f64;
        let mut longest = (Batch::default(), -1.0);
        let (mut decoded, mut read, mut most) = (0.0, 0.0, 0.0f64);
        for rank in &self.ranks {
            let mut b = Batch {
                decode_tokens: rank.running.len() as f64 * per,
                tokens_a_request: per,
                keys: rank.cached_tokens as f64,
                ..Batch::default()
            };
            for &(id, take) in &rank.chunk {
                let reading = rank.queue.iter().find(|q| q.id == id).expect("it is read here");
                b.prompt_tokens += f64::from(take);
                b.pairs += pairs(reading, u64::from(take));
                b.context += f64::from(reading.done);
            }
            (decoded, read) = (decoded + b.decode_tokens, read + b.prompt_tokens);
            most = most.max(b.tokens());
            let seconds = model.rank_cost_s(&b);
            if seconds > longest.1 {
                longest = (b, seconds);
            }
        }
        let ranks = self.ranks.len() as f64;
        let load = model.load(imbalance, decoded / ranks, read / ranks);
        Batch { mean_tokens: (decoded + read) / ranks, most_tokens: most, load, ..longest.0 }
    }

    /// Whether anything is chosen or runs.
    pub fn has_work(&self) -> bool {
        self.ranks.iter().any(|r| !r.chunk.is_empty() || !r.running.is_empty())
    }
}

/// Tokens of a prompt that can be read in so many seconds; at least a few, so that it ends.
fn affordable(reading: &Reading, seconds: f64, cost: &dyn Fn(f64, f64) -> f64) -> u64 {
    let fits = |tokens: u64| cost(tokens as f64, pairs(reading, tokens)) <= seconds;
    let (mut least, mut most) = (FEWEST, u64::from(reading.left));
    if most <= least || fits(most) {
        return most;
    }
    while most - least > FEWEST {
        let middle = (least + most) / 2;
        if fits(middle) { least = middle } else { most = middle }
    }
    least
}

/// Tokens of the smallest chunk.
const FEWEST: u64 = 64;

/// Pairs of a query and a key when a prompt's next `tokens` are read: those cached before, and the
/// causal half of their own square.
fn pairs(reading: &Reading, tokens: u64) -> f64 {
    let (done, take) = (f64::from(reading.done), tokens as f64);
    take * (done + (take + 1.0) / 2.0)
}
