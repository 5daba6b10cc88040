//! A cluster as data: GPU, node, network. Units are in the names; every preset file says where its
//! figures come from.

use serde::{Deserialize, Serialize};

/// One GPU, data-sheet figures.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Gpu {
    /// Name for people.
    pub name: String,
    /// Architecture, `hopper` for instance; a label for reports.
    pub architecture: String,
    /// Streaming multiprocessors (compute units).
    pub sms: u64,
    /// Boost clock at which the data sheet counts its FLOPS, Hz.
    pub clock_hz: f64,
    /// Dense BF16 tensor-core peak of the whole chip, FLOP/s.
    pub bf16_flops: f64,
    /// Dense FP8 tensor-core peak of the whole chip, FLOP/s; 0 where the chip has none.
    pub fp8_flops: f64,
    /// FP32 vector peak, FLOP/s.
    pub fp32_flops: f64,
    /// Share of the BF16 peak that a large library GEMM sustains under the power limit (published
    /// measurements).
    pub bf16_achievable: f64,
    /// The same of FP8.
    pub fp8_achievable: f64,
    /// FP8 partial sums must be promoted to FP32 on the vector units (Hopper), for every 128 of K.
    pub fp8_promotion: bool,
    /// Device memory, bytes.
    pub memory_bytes: u64,
    /// Peak memory bandwidth, bytes/s.
    pub memory_bytes_per_s: f64,
    /// Last-level cache, bytes.
    pub l2_bytes: u64,
    /// Bandwidth of the last-level cache, bytes/s.
    pub l2_bytes_per_s: f64,
    /// Scale-up link (NVLink, Infinity Fabric) of one GPU, one direction, bytes/s.
    pub scale_up_bytes_per_s: f64,
    /// Share of it that large copies reach.
    pub scale_up_usable: f64,
    /// Board power, watts.
    pub tdp_w: f64,
}

impl Gpu {
    /// Bytes/s of the scale-up link that large copies reach, one direction.
    pub fn scale_up_usable_bytes_per_s(&self) -> f64 {
        self.scale_up_bytes_per_s * self.scale_up_usable
    }
}

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

/// The scale-out network.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Network {
    /// Topology.
    pub topology: TopologyKind,
    /// Independent planes (1 except for multi-plane trees and rails).
    pub planes: u64,
    /// Ports of a switch.
    pub switch_ports: u64,
    /// NICs of a node, shared evenly by its GPUs.
    pub nics_per_node: u64,
    /// One NIC, one direction, raw bytes/s.
    pub nic_bytes_per_s: f64,
    /// End-to-end latency of a small message inside the node, seconds.
    pub scale_up_latency_s: f64,
    /// End-to-end latency of a small message below one leaf switch, seconds.
    pub same_leaf_latency_s: f64,
    /// End-to-end latency of a small message across the spine, seconds.
    pub cross_leaf_latency_s: f64,
}

/// A cluster.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Cluster {
    /// Name for people.
    pub name: String,
    /// GPUs in all.
    pub gpus: u64,
    /// GPUs that share one NVLink domain.
    pub gpus_per_node: u64,
    /// Rental price, dollars a GPU-hour.
    pub usd_per_gpu_hour: f64,
    /// The GPU; in a file its preset's name or a table.
    pub gpu: Gpu,
    /// The scale-out network.
    pub network: Network,
}

impl Cluster {
    /// Scale-out bytes/s of one GPU, one direction: its share of the node's NICs.
    pub fn nic_bytes_per_s_per_gpu(&self) -> f64 {
        self.network.nic_bytes_per_s * self.network.nics_per_node as f64 / self.gpus_per_node as f64
    }
}
