//! All-to-all of expert parallelism with node-limited routing (DeepEP's scheme).
//!
//! Dispatch: a token crosses the scale-out network once for every node that holds one of its
//! experts, to the GPU of the same rail, which fans it out over NVLink to the GPUs that want it.
//! Combine is the same backwards. The tokens are dealt to channels of two SMs, and a channel hands
//! them from one stage to the other in chunks, each the message of one NIC write: the second stage
//! starts with the first whole chunk and ends one chunk after the first stage. An operation takes
//! as long as its slower stage and one chunk of the other.

use std::collections::BTreeMap;
use std::sync::Mutex;

use serde::{Deserialize, Serialize};

use super::Fabric;
use super::flows::{Flow, drain};
use crate::config::WhatIf;
use crate::hardware::cluster::Cluster;
use crate::kernel_time::Constants;
use crate::workload::visit_probability;
use fathom_config::MoeConfig;

/// Bytes of routing that travel with a token: source, expert indices and weights for its activated
/// experts.
const META_BYTES: f64 = 8.0;
const META_BYTES_PER_EXPERT: f64 = 12.0;

/// Tokens of a chunk between two nodes by ranks of the group: what DeepEP sets for a dispatch when
/// nothing else is asked for (`get_dispatch_config` of its `deep_ep/buffer.py`, fourth number), as
/// of commit 3b1045d of April 2025, which published the rates that validation compares with.
const DISPATCH_CHUNK: [(u64, u64); 7] =
    [(16, 20), (24, 32), (32, 32), (64, 28), (128, 32), (144, 12), (160, 12)];
/// The same for a combine (`get_combine_config`).
const COMBINE_CHUNK: [(u64, u64); 7] =
    [(16, 28), (24, 20), (32, 20), (64, 20), (128, 12), (144, 8), (160, 8)];

/// Which of the two exchanges; the backward of a dispatch is a combine and the other way round.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Exchange {
    /// Tokens to their experts: NICs first, then NVLink.
    Dispatch,
    /// The experts' outputs back: summed over NVLink first, then over the NICs.
    Combine,
}

impl Exchange {
    /// Tokens that go from one stage to the other together in a group of `ep` ranks: of the
    /// smallest listed size that holds it, of the largest beyond.
    fn chunk_tokens(self, ep: u64) -> f64 {
        let table = match self {
            Exchange::Dispatch => DISPATCH_CHUNK,
            Exchange::Combine => COMBINE_CHUNK,
        };
        let held = table.iter().find(|(ranks, _)| *ranks >= ep);
        held.unwrap_or(&table[table.len() - 1]).1 as f64
    }
}

/// Bytes of a combine that are left where the network packs BF16 into LogFMT of ten bits.
const PACKED_SHARE: f64 = 10.0 / 16.0;

/// SMs with which the forwarding efficiency was fitted; fewer forward proportionally less.
const FITTED_SMS: f64 = 20.0;

/// What a traffic pattern depends on: the group, the shape of the network, the rates of its links.
#[derive(PartialEq, Eq, PartialOrd, Ord)]
struct PatternKey {
    nodes: u64,
    per_node: u64,
    topology: u8,
    switch_ports: u64,
    planes: u64,
    nics_per_node: u64,
    rates: [u64; 3],
    latencies: [u64; 3],
}

impl PatternKey {
    fn of(cluster: &Cluster, nodes: u64, per_node: u64, capacity: &[f64]) -> PatternKey {
        let net = &cluster.network;
        PatternKey {
            nodes,
            per_node,
            topology: net.topology as u8,
            switch_ports: net.switch_ports,
            planes: net.planes,
            nics_per_node: net.nics_per_node,
            // Scale-up, NIC and leaf links, by their bits.
            rates: [capacity[0], capacity[2], capacity[capacity.len() - 1]].map(f64::to_bits),
            latencies: [net.scale_up_latency_s, net.same_leaf_latency_s, net.cross_leaf_latency_s]
                .map(f64::to_bits),
        }
    }
}

/// Seconds per byte of both stages, and the latency, by pattern.
static PATTERNS: Mutex<BTreeMap<PatternKey, (f64, f64, f64)>> = Mutex::new(BTreeMap::new());

/// One byte between every two GPUs of a rail, and of a node. By symmetry of the group the flows of
/// the first node's GPUs to all others and from all others to them stand for all.
fn solve_pattern(fabric: &Fabric, nodes: usize, per_node: usize) -> (f64, f64, f64) {
    let (mut out, mut up, mut latency) = (Vec::new(), Vec::new(), 0.0f64);
    for slot in 0..per_node {
        for node in 1..nodes {
            for (a, b) in [(slot, node * per_node + slot), (node * per_node + slot, slot)] {
                let (links, l) = fabric.route(a, b);
                latency = latency.max(l);
                out.push(Flow { links, bytes: 1.0 });
            }
        }
        for other in (0..per_node).filter(|&o| o != slot) {
            let (links, l) = fabric.route(slot, other);
            latency = latency.max(l);
            up.push(Flow { links, bytes: 1.0 });
        }
    }
    (drain(fabric.capacity(), &out), drain(fabric.capacity(), &up), latency)
}

/// One all-to-all of an expert group.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct AllToAll {
    /// Whether tokens go to their experts, or outputs come back.
    pub exchange: Exchange,
    /// Ranks of the expert group, in consecutive GPUs.
    pub ep: u64,
    /// Tokens that each rank has before a dispatch.
    pub tokens: u64,
    /// Bytes of a token's payload, without its routing.
    pub token_bytes: f64,
    /// Load of the busiest rank relative to the mean.
    pub load: f64,
    /// SMs that run it; two make a channel, and the tokens are dealt to the channels beforehand.
    pub sms: u64,
}

/// Expected largest of `n` standard normal draws (Fisher-Tippett).
pub fn largest_of(n: f64) -> f64 {
    if n < 2.0 {
        return 0.0;
    }
    let a = (2.0 * n.ln()).sqrt();
    (a - (n.ln().ln() + (4.0 * std::f64::consts::PI).ln()) / (2.0 * a)).max(0.0)
}

/// Load of the slowest of `draws` channels relative to the mean when each of `tokens` visits with
/// probability `visit`.
fn straggler(tokens: f64, visit: f64, draws: f64) -> f64 {
    if tokens <= 0.0 || visit <= 0.0 {
        return 1.0;
    }
    1.0 + largest_of(draws) * ((1.0 - visit).max(0.0) / (tokens * visit)).sqrt()
}

/// What an all-to-all takes, and what moves in it.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct AllToAllTime {
    /// Seconds from the first byte to the last.
    pub seconds: f64,
    /// Seconds that the scale-out stage alone would take.
    pub scale_out_s: f64,
    /// Seconds that the forwarding stage alone would take.
    pub scale_up_s: f64,
    /// Mean number of distinct nodes that a token goes to, its own counted.
    pub nodes_per_token: f64,
    /// Mean number of distinct tokens that a rank receives.
    pub received: f64,
    /// Bytes/s as DeepEP counts them: over the scale-out network with the own node's copy, or
    /// NVLink within one node.
    pub logical_bytes_per_s: f64,
    /// Bytes/s of payload through one NIC, without the own node's copy.
    pub wire_bytes_per_s: f64,
}

/// The computation beside an all-to-all.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Beside {
    /// Seconds that the memory alone would take for what its kernels move.
    pub memory_s: f64,
    /// Seconds that it takes from one exchange to the next.
    pub compute_s: f64,
}

/// Times all-to-alls of one cluster, by [`AllToAllModel::alone`] or under computation.
#[derive(Debug, Clone)]
pub struct AllToAllModel<'a> {
    cluster: &'a Cluster,
    constants: Constants,
    wishes: WhatIf,
}

impl<'a> AllToAllModel<'a> {
    /// A model of `cluster` with some wishes granted.
    pub fn new(cluster: &'a Cluster, constants: Constants, wishes: WhatIf) -> Self {
        AllToAllModel { cluster, constants, wishes }
    }

    /// Time of `op` by itself on an idle machine, with experts of `moe` dealt evenly to the ranks.
    pub fn alone(&self, moe: &MoeConfig, op: &AllToAll) -> AllToAllTime {
        let per_node = self.cluster.gpus_per_node.min(op.ep);
        let nodes = (op.ep / per_node).max(1);
        let experts = moe.n_routed_experts as u64;
        let visits = visit_probability(moe, experts * per_node / op.ep);
        let rank_visit = visit_probability(moe, (experts / op.ep).max(1));
        let tokens = op.tokens as f64;
        let meta = META_BYTES + META_BYTES_PER_EXPERT * moe.top_k as f64;
        let packed = self.wishes.compressed_combine && op.exchange == Exchange::Combine;
        let payload = op.token_bytes * if packed { PACKED_SHARE } else { 1.0 };
        let wire = payload + meta;
        let received = tokens * op.ep as f64 * rank_visit;
        // Tokens spread randomly over nodes and ranks; the operation ends with its slowest channel.
        let channels = (op.sms as f64 / 2.0).max(1.0);
        let draws = channels * op.ep as f64;
        let slow_out = straggler(tokens * (nodes - 1) as f64 / channels, visits, draws);
        let slow_up = straggler(tokens * op.ep as f64 / channels, rank_visit, draws);
        // Bytes between two ranks: over a rail, and from a forwarding GPU to one of its node.
        let per_rail = tokens * visits * wire * op.load * slow_out;
        let per_forward = received * wire * op.load * slow_up / per_node as f64;
        let sms = (op.sms as f64 / FITTED_SMS).min(1.0);
        let (scale_out_s, scale_up_s, latency) =
            self.solve(nodes, per_node, per_rail, per_forward / sms);
        // A chunk's share of what a channel moves between two nodes. One network has one stage.
        let chunk = op.exchange.chunk_tokens(op.ep) * channels / (tokens * visits);
        let fill = if self.wishes.unified_network { 0.0 } else { chunk.min(1.0) };
        // A request, its data and the acknowledgement of the last chunk.
        let seconds =
            scale_out_s.max(scale_up_s) + fill * scale_out_s.min(scale_up_s) + 3.0 * latency;
        // DeepEP counts the payload of a rank's tokens by distinct nodes; inside one node what a
        // rank receives.
        let logical = if nodes > 1 { tokens * visits * nodes as f64 } else { received };
        AllToAllTime {
            seconds,
            scale_out_s,
            scale_up_s,
            nodes_per_token: visits * nodes as f64,
            received,
            logical_bytes_per_s: logical * op.token_bytes / seconds,
            wire_bytes_per_s: tokens * visits * (nodes - 1) as f64 * op.token_bytes / seconds,
        }
    }

    /// Seconds of the scale-out stage, of the forwarding stage, and the latency. Every flow of a
    /// stage moves the same bytes, so a pattern is solved once for a byte and scaled.
    fn solve(&self, nodes: u64, per_node: u64, per_rail: f64, per_forward: f64) -> (f64, f64, f64) {
        let mut fabric = Fabric::new(self.cluster, nodes * per_node);
        if !self.wishes.unified_network {
            fabric.scale_up_by(self.constants.forwarding_efficiency);
        }
        let key = PatternKey::of(self.cluster, nodes, per_node, fabric.capacity());
        let known = PATTERNS.lock().expect("no holder panics").get(&key).copied();
        let (out, up, latency) = known.unwrap_or_else(|| {
            let solved = solve_pattern(&fabric, nodes as usize, per_node as usize);
            PATTERNS.lock().expect("no holder panics").insert(key, solved);
            solved
        });
        (out * per_rail, up * per_forward, latency)
    }

    /// Seconds of `op` with the meeting of its ranks before it, nothing running beside.
    pub fn met(&self, moe: &MoeConfig, op: &AllToAll) -> f64 {
        self.rendezvous_s(op.ep) + self.alone(moe, op).seconds
    }

    /// Seconds of `op` under computation, which slows it down and lets its ranks arrive one after
    /// the other.
    pub fn under_compute(&self, moe: &MoeConfig, op: &AllToAll, beside: Beside) -> f64 {
        let c = &self.constants;
        let free = self.wishes.unified_network || self.wishes.traffic_priority;
        let slowed = if free { 0.0 } else { c.comm_contention * beside.memory_s };
        self.met(moe, op) + slowed + self.wait_s(op.ep, beside.compute_s)
    }

    /// Seconds that a rank waits, on average, for the slowest of `ep` whose computation since the
    /// last exchange took `compute_s` and varies by [`Constants::imbalance`].
    fn wait_s(&self, ep: u64, compute_s: f64) -> f64 {
        self.constants.imbalance * largest_of(ep as f64) * compute_s
    }

    /// Seconds in which the ranks tell each other how much comes: a count to every peer and a
    /// barrier, each there and back.
    fn rendezvous_s(&self, ep: u64) -> f64 {
        if self.wishes.hardware_ordering {
            return 0.0;
        }
        let net = &self.cluster.network;
        let within = ep <= self.cluster.gpus_per_node;
        4.0 * if within { net.scale_up_latency_s } else { net.cross_leaf_latency_s }
    }
}

#[cfg(test)]
mod tests {
    use fathom_config::ModelConfig;

    use super::*;
    use crate::hardware;

    /// DeepEP's test: groups are nodes, at most four of them a token (FIGURES section 3).
    fn deep_ep(ep: u64, exchange: Exchange) -> f64 {
        let cluster = hardware::cluster("h800-2048").unwrap();
        let v3 = ModelConfig::preset("deepseek-v3").unwrap().moe.unwrap();
        let nodes = (ep / 8).max(1);
        let moe = MoeConfig { n_group: nodes as usize, topk_group: nodes.min(4) as usize, ..v3 };
        let token_bytes = if exchange == Exchange::Dispatch { 7392.0 } else { 14336.0 };
        let op = AllToAll { exchange, ep, tokens: 4096, token_bytes, load: 1.0, sms: 20 };
        let model = AllToAllModel::new(&cluster, Constants::FITTED, WhatIf::default());
        model.alone(&moe, &op).logical_bytes_per_s / 1e9
    }

    /// Fitted on EP16 alone.
    #[test]
    fn bandwidth_of_the_published_groups() {
        let (out, back) = (Exchange::Dispatch, Exchange::Combine);
        for (ep, exchange, published) in
            [(32, out, 58.0), (32, back, 57.0), (64, out, 51.0), (64, back, 50.0)]
        {
            let ours = deep_ep(ep, exchange);
            assert!((ours / published - 1.0f64).abs() < 0.10, "EP{ep} {exchange:?}: {ours:.1}");
        }
    }

    #[test]
    fn the_fitted_group_is_met() {
        for exchange in [Exchange::Dispatch, Exchange::Combine] {
            let ours = deep_ep(16, exchange);
            assert!((ours / 43.0 - 1.0).abs() < 0.02, "{ours:.1}");
        }
    }

    #[test]
    fn chunks_are_those_of_the_next_listed_group() {
        let chunk = |e: Exchange, ep| e.chunk_tokens(ep);
        assert_eq!([16, 17, 64, 72].map(|ep| chunk(Exchange::Dispatch, ep)), [20., 32., 28., 32.]);
        assert_eq!([8, 32, 160, 320].map(|ep| chunk(Exchange::Combine, ep)), [28., 20., 8., 8.]);
    }

    /// The published profile: 8.04 ms of computation from one exchange to the next on 64 ranks,
    /// and 3.1 ms of waits. Where computation takes no time nobody waits, and fewer wait less.
    #[test]
    fn waits_come_from_the_computation_and_the_peers() {
        let cluster = hardware::cluster("h800-64").unwrap();
        let model = AllToAllModel::new(&cluster, Constants::FITTED, WhatIf::default());
        assert!((model.wait_s(64, 8.04e-3) - 3.1e-3).abs() < 0.03e-3);
        assert_eq!(model.wait_s(64, 0.0), 0.0);
        assert_eq!(model.wait_s(1, 8.04e-3), 0.0);
        assert!(model.wait_s(8, 8.04e-3) < 0.6 * model.wait_s(64, 8.04e-3));
    }

    /// A single chunk a channel passes the stages one after the other; many overlap them.
    #[test]
    fn stages_overlap_but_for_a_chunk() {
        let cluster = hardware::cluster("h800-2048").unwrap();
        let moe = ModelConfig::preset("deepseek-v3").unwrap().moe.unwrap();
        let run = |tokens, unified| {
            let exchange = Exchange::Dispatch;
            let op = AllToAll { exchange, ep: 64, tokens, token_bytes: 7392.0, load: 1.0, sms: 20 };
            let wishes = WhatIf { unified_network: unified, ..WhatIf::default() };
            AllToAllModel::new(&cluster, Constants::FITTED, wishes).alone(&moe, &op)
        };
        let latency = |t: AllToAllTime| t.seconds - t.scale_out_s - t.scale_up_s;
        assert!((latency(run(64, false)) - 3.0 * 3.7e-6).abs() < 1e-5);
        let many = run(1 << 20, false);
        assert!(many.seconds < 1.001 * many.scale_out_s.max(many.scale_up_s));
        let one = run(64, true);
        assert!(one.seconds < one.scale_out_s.max(one.scale_up_s) + 2e-5);
    }
}
