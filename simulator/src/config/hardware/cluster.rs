//! A cluster as data: GPU, node, network. Units are in the names; every preset file says where its
//! figures come from.

use fathom_config::Gpu;
use serde::{Deserialize, Serialize};

/// How the NICs are joined outside the node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TopologyKind {
    /// Multi-plane two-layer fat tree: NIC `i` of every node lies in plane `i`; planes meet only
    /// inside nodes.
    Mpft,
    /// Two-layer fat tree in one plane.
    FatTree2,
    /// Three-layer fat tree in one plane.
    FatTree3,
    /// Dragonfly: groups of fully joined routers, one global link between every two groups.
    Dragonfly,
    /// Rail-optimised leaf and spine: NIC `i` of a pod's nodes on leaf `i`, spines join all leaves.
    Rail,
    /// Large scale-up domains (NVL72) on a leaf-and-spine network.
    Nvl,
}

/// How leaf switches spread over their uplinks what crosses them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Routing {
    /// Packet by packet, to the emptiest: InfiniBand's adaptive routing, or RoCE's where it is on.
    #[default]
    Adaptive,
    /// Flow by flow, by a hash: where several meet on one uplink, others idle. RoCE's default,
    /// which DeepSeek advises against (arXiv 2505.09343, section 5.2).
    Ecmp,
}

/// The scale-out network: what joins the nodes' NICs.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Network {
    /// How switches and NICs are joined.
    pub topology: TopologyKind,
    /// Independent planes (1 except for multi-plane trees and rails).
    pub planes: u64,
    /// Ports of a switch, down and up together.
    pub switch_ports: u64,
    /// NICs of a node, shared evenly by its GPUs.
    pub nics_per_node: u64,
    /// Bandwidth of one NIC, one direction, raw bytes/s.
    pub nic_bytes_per_s: f64,
    /// Bandwidth below a leaf switch over that of its uplinks: 1 where it blocks nothing.
    #[serde(default = "nothing_blocked")]
    pub oversubscription: f64,
    /// How flows are spread over the uplinks.
    #[serde(default)]
    pub routing: Routing,
    /// End-to-end latency of a small message inside the node, seconds.
    pub scale_up_latency_s: f64,
    /// End-to-end latency of a small message below one leaf switch, seconds.
    pub same_leaf_latency_s: f64,
    /// End-to-end latency of a small message across the spine, seconds.
    pub cross_leaf_latency_s: f64,
}

fn nothing_blocked() -> f64 {
    1.0
}

impl Network {
    /// What flows that cross leaf switches at a time, so many from every NIC, find on the fullest
    /// uplink over what they would find if all had the same. Hashed flows fall on uplinks as
    /// independent draws, taken as Poisson's.
    pub fn collisions(&self, flows_a_nic: f64) -> f64 {
        let downlinks = (self.switch_ports / 2).max(1) as f64;
        let uplinks = (downlinks / self.oversubscription).round().max(1.0);
        let mean = flows_a_nic * downlinks / uplinks;
        match self.routing {
            Routing::Ecmp if mean > 0.0 => fullest_of(uplinks, mean) / mean,
            _ => 1.0,
        }
    }
}

/// Expected largest of `n` independent Poisson counts of this mean: the sum over k of the
/// probability that it is above k.
fn fullest_of(n: f64, mean: f64) -> f64 {
    let last = (mean + 12.0 * mean.sqrt() + 40.0) as u32;
    // Logarithms: a count of none is too rare for a float where the mean is large.
    let (mut log_term, mut below, mut sum) = (-mean, (-mean).exp(), 0.0);
    for k in 0..last {
        sum += 1.0 - below.min(1.0).powf(n);
        log_term += (mean / f64::from(k + 1)).ln();
        below += log_term.exp();
    }
    sum
}

/// A cluster of equal nodes.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Cluster {
    /// A name for reports.
    pub name: String,
    /// GPUs of the whole cluster.
    pub gpus: u64,
    /// GPUs that share one scale-up (NVLink) domain.
    pub gpus_per_node: u64,
    /// Rental price, dollars per GPU-hour.
    pub usd_per_gpu_hour: f64,
    /// The GPU; in a file its preset's name or a table.
    pub gpu: Gpu,
    /// The scale-out network between nodes.
    pub network: Network,
}

impl Cluster {
    /// Nodes below one leaf switch: of a plane or rail those that it joins, else as many as its
    /// ports hold all NICs of.
    pub fn nodes_of_a_leaf(&self) -> u64 {
        let net = &self.network;
        let down = (net.switch_ports / 2).max(1);
        match net.topology {
            TopologyKind::Mpft | TopologyKind::Rail => down,
            _ => (down / net.nics_per_node).max(1),
        }
    }

    /// Scale-out bytes/s per GPU, one direction, among `nodes` nodes in a row: uplinks bound it
    /// where they reach beyond a leaf.
    pub fn scale_out_bytes_per_s(&self, nodes: u64) -> f64 {
        // A ring has one flow from every NIC.
        let beyond = self.network.oversubscription * self.network.collisions(1.0);
        let blocked = if nodes > self.nodes_of_a_leaf() { beyond } else { 1.0 };
        self.nic_bytes_per_s_per_gpu() / blocked
    }

    /// Scale-out bytes/s per GPU, one direction: its share of the node's NICs.
    pub fn nic_bytes_per_s_per_gpu(&self) -> f64 {
        self.network.nic_bytes_per_s * self.network.nics_per_node as f64 / self.gpus_per_node as f64
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hardware;

    /// Flows thrown at uplinks by a generator of random numbers.
    #[test]
    fn hashed_flows_meet_as_often_as_thrown_ones() {
        let mut network = hardware::cluster("h800-2048").unwrap().network;
        assert_eq!(network.collisions(1.0), 1.0);
        network.routing = Routing::Ecmp;
        let mut state = 1u64;
        let mut draw = |below: usize| {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (state >> 33) as usize % below
        };
        for (oversubscription, flows) in [(1.0, 1), (1.0, 31), (2.0, 1), (4.0, 8)] {
            network.oversubscription = oversubscription;
            let down = network.switch_ports as usize / 2;
            let up = (down as f64 / oversubscription) as usize;
            let mut fullest = 0;
            for _ in 0..400 {
                let mut counts = vec![0; up];
                (0..down * flows).for_each(|_| counts[draw(up)] += 1);
                fullest += counts.iter().max().unwrap();
            }
            let expected = f64::from(fullest) / 400.0 / (down * flows) as f64 * up as f64;
            let found = network.collisions(flows as f64);
            assert!((found / expected - 1.0).abs() < 0.08, "{flows}: {found} for {expected}");
        }
    }
}
