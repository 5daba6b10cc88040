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
    /// End-to-end latency of a small message inside the node, seconds.
    pub scale_up_latency_s: f64,
    /// End-to-end latency of a small message below one leaf switch, seconds.
    pub same_leaf_latency_s: f64,
    /// End-to-end latency of a small message across the spine, seconds.
    pub cross_leaf_latency_s: f64,
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
    /// Scale-out bytes/s per GPU, one direction: its share of the node's NICs.
    pub fn nic_bytes_per_s_per_gpu(&self) -> f64 {
        self.network.nic_bytes_per_s * self.network.nics_per_node as f64 / self.gpus_per_node as f64
    }
}
