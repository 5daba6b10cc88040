//! The time of one iteration of a pool: parts of layers and exchanges, overlapped as two
//! micro-batches allow.
//!
//! Decoding (deepseek-ai/profile-data, decode): while one micro-batch is dispatched the other's
//! shared expert (of its own) and projections run; while one is combined the other attends; the
//! experts run alone:
//!
//! ```text
//! compute   shared(0) before(1) | experts(0) | attention(1) after(1) | shared(1) before(0) | ...
//! network   dispatch(0)         |            | combine(0)            | dispatch(1)         | ...
//! ```
//!
//! Prefill (the same, prefill): the exchanges hold SMs all the time:
//!
//! ```text
//! compute   attention(1) shared(0) | attention(0) | experts(1)  | experts(0) shared(1)
//! network   combine(0)             | dispatch(1)  | dispatch(0) | combine(1)
//! ```

use fathom_config::{ModelConfig, MoeConfig};
use serde::Serialize;

use super::kernels::{Cores, PartTable, Parts};
use crate::config::WhatIf;
use crate::hardware::cluster::Cluster;
use crate::kernel_time::Constants;
use crate::network::alltoall::{AllToAll, AllToAllModel, Exchange, largest_of};
use crate::network::low_latency::low_latency_s;

/// Which kernels exchange tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ExchangeKind {
    /// A token crosses to a node once and is forwarded by SMs: for many tokens.
    Normal,
    /// Every copy goes straight to its expert, without SMs: for few tokens.
    LowLatency,
}

/// What the ranks of a unit do in one iteration: that of the rank that takes longest, and what the
/// experts get.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Batch {
    /// Tokens that it decodes, drafts counted.
    pub decode_tokens: f64,
    /// Tokens that a request decodes at once.
    pub tokens_a_request: f64,
    /// Cached keys that its decoding meets.
    pub keys: f64,
    /// Tokens of prompts that it reads.
    pub prompt_tokens: f64,
    /// Keys that the prompts' queries meet, summed over queries.
    pub pairs: f64,
    /// Cached tokens before the prompts' chunks.
    pub context: f64,
    /// Tokens of a rank, mean: what the experts get.
    pub mean_tokens: f64,
    /// Tokens of the rank that has most: what leaves first and last.
    pub most_tokens: f64,
    /// Load of the busiest expert rank relative to the mean.
    pub load: f64,
}

impl Batch {
    /// The same on every rank: `requests` that decode `tokens_a_request` each over caches of `keys`
    /// tokens.
    pub fn decoding(requests: f64, tokens_a_request: f64, keys: f64, load: f64) -> Batch {
        let tokens = requests * tokens_a_request;
        Batch {
            decode_tokens: tokens,
            tokens_a_request,
            keys: requests * keys,
            mean_tokens: tokens,
            most_tokens: tokens,
            load,
            ..Batch::default()
        }
    }

    /// The same on every rank: `tokens` of prompts of `length` each, none cached.
    pub fn reading(tokens: f64, length: f64, load: f64) -> Batch {
        Batch {
            prompt_tokens: tokens,
            pairs: tokens * (length + 1.0) / 2.0,
            mean_tokens: tokens,
            most_tokens: tokens,
            load,
            ..Batch::default()
        }
    }

    /// Tokens of the rank.
    pub fn tokens(&self) -> f64 {
        self.decode_tokens + self.prompt_tokens
    }

    /// The rank with most tokens over the mean.
    pub fn skew(&self) -> f64 {
        if self.mean_tokens > 0.0 { self.most_tokens / self.mean_tokens } else { 1.0 }
    }
}

/// Where an iteration's time goes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub struct IterationTime {
    /// Seconds from its start to the next one's.
    pub seconds: f64,
    /// Seconds of the attention itself.
    pub attention_s: f64,
    /// Seconds of projections, norms, router.
    pub projections_s: f64,
    /// Seconds of shared experts and dense layers.
    pub shared_s: f64,
    /// Seconds of routed experts.
    pub experts_s: f64,
    /// Seconds of embedding, head and prediction modules.
    pub head_s: f64,
    /// Seconds of dispatch on the network.
    pub dispatch_s: f64,
    /// Seconds of combine on the network.
    pub combine_s: f64,
    /// Seconds in which the GPU waits for the network.
    pub exposed_s: f64,
    /// Seconds of the host before the next iteration.
    pub host_s: f64,
}

/// One micro-batch's share of a layer.
#[derive(Clone, Copy)]
struct Layer {
    parts: Parts,
    core_s: f64,
    dispatch_s: f64,
    combine_s: f64,
}

/// Times iterations of one pool.
#[derive(Debug, Clone)]
pub struct IterationModel {
    pub(super) model: ModelConfig,
    pub(super) cluster: Cluster,
    pub(super) constants: Constants,
    pub(super) table: PartTable,
    pub(super) cores: Cores,
    /// Ranks of the expert group, tensor-parallel ranks.
    pub(super) ep: u64,
    pub(super) tp: u64,
    /// Experts that a token is sent to.
    pub(super) choices: u64,
    /// Micro-batches that overlap: 1 or 2.
    pub(super) micro_batches: u64,
    pub(super) exchange: ExchangeKind,
    pub(super) comm_sms: u64,
    /// Bytes of a token as it is dispatched.
    pub(super) dispatch_bytes: f64,
    /// Neighbouring tokens of a prompt that choose their experts as one.
    pub(super) run_tokens: f64,
    /// Tokens a step that a prediction module drafts.
    pub(super) drafts: u64,
    /// Seconds of the host between iterations.
    pub(super) host_s: f64,
}

impl IterationModel {
    /// Seconds of an iteration that does `batch`.
    pub fn time(&self, batch: &Batch) -> IterationTime {
        let tokens = batch.tokens();
        if tokens <= 0.0 {
            return IterationTime::default();
        }
        let n = self.micro_batches as f64;
        let layer = self.layer(batch, n);
        let layers = self.model.layers as f64;
        let routed =
            self.model.moe.map_or(0.0, |m| layers - m.first_dense.min(self.model.layers) as f64);
        let dense = layers - routed;
        let Layer { parts: p, core_s, dispatch_s, combine_s } = layer;
        let compute = p.before_s + core_s + p.after_s + p.shared_s + p.experts_s;
        let whole = self.overlapped(&layer);
        // Head and modules take both micro-batches together.
        let all = self.table.at(tokens);
        let drafts = if batch.decode_tokens > 0.0 { self.drafts as f64 } else { 0.0 };
        let draft = all.draft_s + self.cores.decode_s(batch.keys, 1.0) + dispatch_s + combine_s;
        let head_s = all.head_s + drafts * draft;
        let shared_s = routed * n * p.shared_s + dense * n * p.dense_s;
        let attention_s = (routed + dense) * n * core_s;
        let seconds = routed * whole + dense * n * (p.dense_s + core_s) + head_s + self.host_s;
        IterationTime {
            seconds,
            attention_s,
            projections_s: routed * n * (p.before_s + p.after_s),
            shared_s,
            experts_s: routed * n * p.experts_s,
            head_s,
            dispatch_s: routed * n * dispatch_s,
            combine_s: routed * n * combine_s,
            exposed_s: routed * (whole - n * compute),
            host_s: self.host_s,
        }
    }

    fn layer(&self, batch: &Batch, n: f64) -> Layer {
        let mut parts = self.table.at(batch.tokens() / n);
        let received = batch.mean_tokens / n * batch.load.max(1.0);
        parts.experts_s = self.table.at(received).experts_s;
        let core_s = self.cores.decode_s(batch.keys / n, batch.tokens_a_request)
            + self.cores.prefill_s(batch.pairs / n, batch.context / n);
        let exchange = |e| match self.model.moe.filter(|_| self.ep > 1) {
            Some(moe) => self.exchange_s(&moe, e, batch, n * self.tp as f64),
            None => 0.0,
        };
        let (dispatch_s, combine_s) = (exchange(Exchange::Dispatch), exchange(Exchange::Combine));
        Layer { parts, core_s, dispatch_s, combine_s }
    }

    /// Seconds of a layer with experts over all micro-batches.
    fn overlapped(&self, layer: &Layer) -> f64 {
        let Layer { parts: p, core_s, dispatch_s, combine_s } = *layer;
        let attention = p.before_s + core_s + p.after_s;
        if self.micro_batches == 1 {
            return attention + dispatch_s.max(p.shared_s) + p.experts_s + combine_s;
        }
        match self.exchange {
            ExchangeKind::LowLatency => {
                let first = (p.shared_s + p.before_s).max(dispatch_s);
                2.0 * (first + p.experts_s + (core_s + p.after_s).max(combine_s))
            }
            ExchangeKind::Normal => {
                (attention + p.shared_s).max(combine_s)
                    + attention.max(dispatch_s)
                    + p.experts_s.max(dispatch_s)
                    + (p.experts_s + p.shared_s).max(combine_s)
            }
        }
    }

    /// Seconds of an exchange of one of `parts` parts of a batch: until the rank that sends most,
    /// or the one whose experts get most, is done.
    fn exchange_s(&self, moe: &MoeConfig, exchange: Exchange, batch: &Batch, parts: f64) -> f64 {
        let bytes = match exchange {
            Exchange::Dispatch => self.dispatch_bytes,
            Exchange::Combine => 2.0 * self.model.hidden_size as f64,
        };
        let received = batch.mean_tokens * batch.load.max(1.0);
        let tokens = received.max(batch.most_tokens) / parts;
        match self.exchange {
            ExchangeKind::LowLatency => {
                low_latency_s(&self.cluster, self.ep, tokens * self.choices as f64, bytes)
            }
            ExchangeKind::Normal => {
                let net = AllToAllModel::new(&self.cluster, self.constants, WhatIf::default());
                let op = AllToAll {
                    exchange,
                    ep: self.ep,
                    tokens: (tokens.round() as u64).max(1),
                    token_bytes: bytes,
                    load: 1.0,
                    sms: self.comm_sms.max(2),
                };
                // A rendezvous before it, as in a step of training.
                let latency_s = self.cluster.network.cross_leaf_latency_s;
                net.alone(moe, &op).seconds + 4.0 * latency_s
            }
        }
    }
}

impl IterationModel {
    /// Load of the busiest expert rank over the mean, where the placement's is `imbalance` and a
    /// rank has so many tokens on average: beside the placement, the tokens of a step fall at
    /// random, those of a prompt in runs that choose alike. The two are independent: their squares
    /// add.
    pub fn load(&self, imbalance: f64, decoded: f64, read: f64) -> f64 {
        if self.ep <= 1 || decoded + read <= 0.0 {
            return 1.0;
        }
        let of = 1.0 / (self.tp * self.micro_batches) as f64 * self.choices as f64;
        let (single, runs) = (decoded * of, read * of);
        let variance = (single + runs * self.run_tokens) / (single + runs).powi(2);
        let noise = largest_of(self.ep as f64) * variance.min(1.0).sqrt();
        1.0 + ((imbalance - 1.0).powi(2) + noise * noise).sqrt()
    }

    /// Seconds of computation of one rank, as far as ranks differ in them.
    pub fn rank_cost_s(&self, b: &Batch) -> f64 {
        let layers = self.model.layers as f64;
        let caches =
            self.cores.decode_s(b.keys, b.tokens_a_request) + b.context * self.cores.context_s;
        self.prompt_cost_s(b.tokens(), b.pairs) + layers * caches
    }

    /// Seconds of computation that so many tokens of a prompt and pairs of a query and a key add to
    /// an iteration.
    pub fn prompt_cost_s(&self, tokens: f64, pairs: f64) -> f64 {
        let p = self.table.at(4096.0);
        // The experts' rows come from all ranks.
        let layer = match self.model.moe.filter(|_| self.ep > 1) {
            Some(_) => p.before_s + p.after_s + p.shared_s,
            None => p.before_s + p.after_s + p.shared_s + p.experts_s + p.dense_s,
        };
        let layers = self.model.layers as f64;
        layers * (tokens * layer / 4096.0 + pairs * self.cores.query_key_s)
    }
}

impl IterationTime {
    /// Adds `share` of another iteration's seconds.
    pub(super) fn add(&mut self, other: &IterationTime, share: f64) {
        for (sum, value) in [
            (&mut self.seconds, other.seconds),
            (&mut self.attention_s, other.attention_s),
            (&mut self.projections_s, other.projections_s),
            (&mut self.shared_s, other.shared_s),
            (&mut self.experts_s, other.experts_s),
            (&mut self.head_s, other.head_s),
            (&mut self.dispatch_s, other.dispatch_s),
            (&mut self.combine_s, other.combine_s),
            (&mut self.exposed_s, other.exposed_s),
            (&mut self.host_s, other.host_s),
        ] {
            *sum += share * value;
        }
    }
}
