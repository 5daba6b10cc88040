//! A cluster as data: GPU, node, network.

use serde::{Deserialize, Serialize};

/// One GPU, data-sheet figures.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Gpu {
    /// Name for people.
    pub name: String,
    /// Streaming multiprocessors (compute units).
    pub sms: u64,
    /// Device memory, bytes.
    pub memory_bytes: u64,
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
    /// The GPU.
    pub gpu: Gpu,
}
