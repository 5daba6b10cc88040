//! What a simulation of serving is asked: model, cluster, pools, requests, service level.

use fathom_config::ModelConfig;
use serde::{Deserialize, Serialize};

use super::iteration::ExchangeKind;
use crate::config::{Precision, WhatIf};
use crate::hardware::cluster::Cluster;

/// Requests on pools of GPUs: the keys of a file of `fathom simulate serve`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ServeScenario {
    /// A name for reports.
    pub name: String,
    /// The model that answers.
    pub model: ModelConfig,
    /// The GPUs and their network; `gpus` is at least what the pools take.
    pub cluster: Cluster,
    /// Arithmetic of the GEMMs.
    #[serde(default = "fp8")]
    pub precision: Precision,
    /// The pool that reads prompts; absent where all requests come with their caches.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub prefill: Option<Pool>,
    /// The pool that decodes; absent where only prompts are read.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub decode: Option<Pool>,
    /// One pool that does both, instead of the other two.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub unified: Option<Pool>,
    /// Requests and how they arrive.
    pub workload: Workload,
    /// How unevenly tokens fall on experts, and what balances them.
    #[serde(default)]
    pub experts: Experts,
    /// Prompts' beginnings that are found in a cache.
    #[serde(default)]
    pub prefix_cache: PrefixCache,
    /// Speculative decoding by prediction modules.
    #[serde(default)]
    pub mtp: Mtp,
    /// Memory of KV caches.
    #[serde(default)]
    pub memory: KvMemory,
    /// What is promised to users.
    #[serde(default)]
    pub sla: Sla,
    /// Layouts that `fathom search` tries.
    #[serde(default)]
    pub search: ServeSearch,
    /// Wishes of the report granted to the hardware.
    #[serde(default)]
    pub what_if: WhatIf,
    /// Seconds of requests' arrivals that are simulated.
    #[serde(default = "sixty")]
    pub duration_s: f64,
    /// Seconds at the beginning that figures leave out.
    #[serde(default)]
    pub warmup_s: f64,
    /// Seed of all draws.
    #[serde(default = "one")]
    pub seed: u64,
}

fn fp8() -> Precision {
    Precision::Fp8
}

fn sixty() -> f64 {
    60.0
}

fn one() -> u64 {
    1
}

/// A pool: units that each hold the whole model and run in lock step.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Pool {
    /// GPUs of a unit: tensor-parallel groups, data-parallel to each other.
    pub gpus: u64,
    /// How many units (groups of GPUs that hold the model once) the pool has.
    #[serde(default = "one")]
    pub units: u64,
    /// Tensor-parallel ranks of the attention, with sequence parallelism.
    #[serde(default = "one")]
    pub tp: u64,
    /// Ranks over which the experts lie: all GPUs of a unit, or 1, where experts are cut by `tp`.
    /// All of them where it is absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ep: Option<u64>,
    /// Experts that a GPU holds, copies counted; as few as hold them all where it is absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expert_slots: Option<u64>,
    /// Micro-batches that overlap computation and exchanges: 1 or 2.
    #[serde(default = "two")]
    pub micro_batches: u64,
    /// The exchange's kernels; low latency for decoding, else normal, where it is absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exchange: Option<ExchangeKind>,
    /// SMs that normal exchanges hold.
    #[serde(default = "comm_sms")]
    pub comm_sms: u64,
    /// Most requests that a data-parallel rank decodes at once.
    #[serde(default = "max_batch")]
    pub max_batch: u64,
    /// Most tokens of prompts that a data-parallel rank reads in an iteration; longer prompts are
    /// read in chunks.
    #[serde(default = "chunk_tokens")]
    pub chunk_tokens: u64,
    /// Seconds of the host between two iterations that the GPU waits.
    #[serde(default)]
    pub host_s: f64,
}

fn two() -> u64 {
    2
}

fn comm_sms() -> u64 {
    24
}

fn max_batch() -> u64 {
    128
}

fn chunk_tokens() -> u64 {
    16384
}

impl Pool {
    /// Data-parallel ranks of a unit.
    pub fn dp(&self) -> u64 {
        self.gpus / self.tp
    }
}

/// A distribution of lengths: log-normal with this mean and deviation, or one length.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Length {
    /// Mean length in tokens.
    pub mean: f64,
    /// Standard deviation over the mean; 0 makes all lengths alike.
    #[serde(default)]
    pub cv: f64,
    /// Longest; longer draws are cut to it.
    #[serde(default = "longest")]
    pub max: u64,
}

fn longest() -> u64 {
    131_072
}

/// Requests: exactly one of `rate_per_s`, `concurrency` and `trace`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Workload {
    /// Requests a second, arriving at random (Poisson).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rate_per_s: Option<f64>,
    /// Requests that are in the system all the time: a new one comes when one ends.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub concurrency: Option<u64>,
    /// File of requests (CSV or JSON Lines) beside the scenario's file.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub trace: Option<String>,
    /// Factor on the trace's arrival rate.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub trace_speed: Option<f64>,
    /// Tokens of a prompt.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prompt: Option<Length>,
    /// Tokens of an answer.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub output: Option<Length>,
}

/// How tokens fall on experts, and how copies are placed.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Experts {
    /// Spread of the experts' popularity: standard deviation of its logarithm.
    pub popularity: f64,
    /// Of that spread, how much of an expert's popularity is new since the statistics were taken: 0
    /// they tell the present, 1 they tell nothing.
    pub drift: f64,
    /// Neighbouring tokens of a prompt that choose their experts as one draw; 1 where each chooses
    /// by itself.
    pub run_tokens: f64,
    /// Whether copies are placed by the load balancer; else expert `i` is at rank `i / slots`.
    pub balanced: bool,
    /// Seconds between two placements.
    pub interval_s: f64,
    /// Every step chooses its copies by its own loads (dynamic redundancy).
    pub dynamic: bool,
    /// The shared expert is routed as one more choice that every token makes.
    pub shared_is_routed: bool,
}

impl Default for Experts {
    fn default() -> Self {
        Experts {
            popularity: 0.0,
            drift: 0.0,
            run_tokens: 1.0,
            balanced: true,
            interval_s: 600.0,
            dynamic: false,
            shared_is_routed: false,
        }
    }
}

/// Prompts' beginnings whose keys and values are stored.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct PrefixCache {
    /// Share of the prompts' tokens that is found, where the requests do not tell their blocks.
    pub hit_rate: f64,
    /// Tokens that the cache holds, least recently used first out, where the requests of a trace
    /// tell their blocks (`hash_ids`); 0 holds none.
    pub capacity_tokens: u64,
    /// Bytes/s at which a rank loads what is found; 0 takes no time (it lies in the GPU).
    pub load_bytes_per_s: f64,
}

/// Speculative decoding by the model's MTP modules.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Mtp {
    /// Tokens that are drafted a step; 0 decodes plainly.
    pub drafts: u64,
    /// Probability that a draft is accepted, given that those before it were.
    pub acceptance: f64,
}

/// Memory of KV caches.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct KvMemory {
    /// Tokens of a page.
    pub page_tokens: u64,
    /// Bytes of an element.
    pub element_bytes: f64,
    /// Share of the GPU's memory that stays free.
    pub headroom: f64,
}

impl Default for KvMemory {
    fn default() -> Self {
        KvMemory { page_tokens: 64, element_bytes: 2.0, headroom: 0.05 }
    }
}

/// What is promised; 0 promises nothing.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Sla {
    /// Time to the first token, seconds.
    pub ttft_s: f64,
    /// Time a token after it, mean of a request, seconds.
    pub tpot_s: f64,
    /// Share of the requests that must keep them.
    pub share: f64,
}

impl Default for Sla {
    fn default() -> Self {
        Sla { ttft_s: 0.0, tpot_s: 0.0, share: 0.9 }
    }
}

/// Layouts of units that `fathom search` tries for a serving scenario; empty lists keep the
/// scenario's.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ServeSearch {
    /// GPUs of a unit that prefills.
    pub prefill_gpus: Vec<u64>,
    /// GPUs of a unit that decodes.
    pub decode_gpus: Vec<u64>,
    /// Numbers of tensor-parallel ranks to try.
    pub tp: Vec<u64>,
    /// Most requests of a rank.
    pub max_batch: Vec<u64>,
}
