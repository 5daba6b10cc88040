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
        let blocked =
            if nodes > self.nodes_of_a_leaf() { self.network.oversubscription } else { 1.0 };
        self.nic_bytes_per_s_per_gpu() / blocked
    }

    /// Scale-out bytes/s per GPU, one direction: its share of the node's NICs.
    pub fn nic_bytes_per_s_per_gpu(&self) -> f64 {
        self.network.nic_bytes_per_s * self.network.nics_per_node as f64 / self.gpus_per_node as f64
    }
}
