//! Collectives and point-to-point: ring, tree and hierarchical algorithms over a group of GPUs.
//!
//! A group is `local` GPUs on each of `nodes` nodes. `bytes` is always the size of the full buffer
//! (what an all-reduce reduces, what an all-gather ends with).

use serde::{Deserialize, Serialize};

use crate::hardware::cluster::Cluster;

/// The collective operations.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Collective {
    /// Every rank ends with the sum.
    AllReduce,
    /// Every rank ends with its part of the sum.
    ReduceScatter,
    /// Every rank ends with all parts.
    AllGather,
}

/// The algorithms of a collective.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Algorithm {
    /// One ring over all ranks.
    Ring,
    /// A binary tree over the nodes (all-reduce only; else as `Hierarchical`).
    Tree,
    /// Inside the nodes first, then every rail by itself between them.
    Hierarchical,
}

/// How the ranks of a group lie on nodes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct GroupShape {
    /// Ranks on each node.
    pub local: u64,
    /// Nodes over which the group lies.
    pub nodes: u64,
}

impl GroupShape {
    /// A group of `size` ranks that lie `stride` GPUs apart on nodes of `per_node` GPUs.
    pub fn strided(size: u64, stride: u64, per_node: u64) -> GroupShape {
        let local = (per_node / stride.max(1)).clamp(1, size.max(1));
        GroupShape { local, nodes: size.div_ceil(local) }
    }

    /// Ranks of the group.
    pub fn size(&self) -> u64 {
        self.local * self.nodes
    }
}

/// Seconds of `collective` on `bytes` by `algorithm`; `sharing` groups use the node's NICs at the
/// same time (ranks of other groups on the same node have NICs of their own, so it is 1 unless a
/// NIC is shared).
pub fn time_s(
    cluster: &Cluster,
    collective: Collective,
    algorithm: Algorithm,
    group: GroupShape,
    bytes: f64,
) -> f64 {
    if group.size() <= 1 || bytes <= 0.0 {
        return 0.0;
    }
    let up = cluster.gpu.collective_bytes_per_s();
    let nic = cluster.scale_out_bytes_per_s(group.nodes);
    let (up_latency, out_latency) =
        (cluster.network.scale_up_latency_s, cluster.network.cross_leaf_latency_s);
    let passes = if collective == Collective::AllReduce { 2.0 } else { 1.0 };
    let (local, nodes) = (group.local as f64, group.nodes as f64);
    let ring =
        |n: f64, bytes: f64, rate: f64, latency: f64| (n - 1.0) * (bytes / n / rate + latency);
    match algorithm {
        Algorithm::Ring if group.nodes > 1 => {
            // One ring for every local rank, entering and leaving the node over a NIC of its own.
            let n = local * nodes;
            let rate = (nic * local).min(up);
            passes
                * (n - 1.0)
                * (bytes / n / rate + (out_latency + (local - 1.0) * up_latency) / local)
        }
        Algorithm::Tree if collective == Collective::AllReduce && group.nodes > 1 => {
            let inside = 2.0 * ring(local, bytes, up, up_latency);
            let depth = nodes.log2().ceil();
            // Up and down the tree, pipelined: every byte passes a NIC twice.
            inside + 2.0 * (bytes / local / nic + depth * out_latency)
        }
        _ => {
            let inside = ring(local, bytes, up, up_latency);
            let between = ring(nodes, bytes / local, nic, out_latency);
            passes * (inside + between)
        }
    }
}

/// Seconds for `bytes` from one GPU to another, on the same node (`same_node`) or over the network.
pub fn p2p_s(cluster: &Cluster, bytes: f64, same_node: bool) -> f64 {
    if bytes <= 0.0 {
        return 0.0;
    }
    if same_node {
        bytes / cluster.gpu.scale_up_usable_bytes_per_s() + cluster.network.scale_up_latency_s
    } else {
        // The far end may lie anywhere.
        let nodes = cluster.gpus / cluster.gpus_per_node;
        bytes / cluster.scale_out_bytes_per_s(nodes) + cluster.network.cross_leaf_latency_s
    }
}

/// Decode time of one layer's all-to-all when nothing but the raw link counts (arXiv 2505.09343,
/// section 2.3.2): every token goes to `copies` experts as FP8 and comes back as BF16.
pub fn decode_all_to_all_s(tokens: u64, copies: u64, hidden: u64, bytes_per_s: f64) -> f64 {
    (3 * tokens * copies * hidden) as f64 / bytes_per_s
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hardware;
    use proptest::prelude::*;

    /// 32 tokens to 8 routed and the shared expert, hidden counted as 7000, 50 GB/s: 120.96 us; 61
    /// layers of two micro-batches 14.76 ms.
    #[test]
    fn published_decode_bound() {
        let t = decode_all_to_all_s(32, 9, 7000, 50e9);
        assert_eq!(format!("{:.2}", t * 1e6), "120.96");
        assert_eq!(format!("{:.2}", 61.0 * 2.0 * t * 1e3), "14.76");
    }

    #[test]
    fn groups_by_stride() {
        assert_eq!(GroupShape::strided(8, 1, 8), GroupShape { local: 8, nodes: 1 });
        assert_eq!(GroupShape::strided(16, 1, 8), GroupShape { local: 8, nodes: 2 });
        assert_eq!(GroupShape::strided(4, 8, 8), GroupShape { local: 1, nodes: 4 });
    }

    proptest! {
        #[test]
        fn more_bandwidth_is_never_slower_and_an_all_reduce_is_both_halves(
            local in 1u64..9, nodes in 1u64..64, bytes in 1e3f64..1e10, algorithm in 0usize..3,
        ) {
            let mut cluster = hardware::cluster("h800-2048").unwrap();
            let group = GroupShape { local, nodes };
            let algorithm = [Algorithm::Ring, Algorithm::Tree, Algorithm::Hierarchical][algorithm];
            let all: Vec<f64> = [Collective::AllReduce, Collective::ReduceScatter, Collective::AllGather]
                .map(|c| time_s(&cluster, c, algorithm, group, bytes)).to_vec();
            if algorithm != Algorithm::Tree {
                prop_assert!((all[0] - all[1] - all[2]).abs() <= 1e-12 + 1e-9 * all[0]);
            }
            cluster.network.nic_bytes_per_s *= 1.5;
            cluster.gpu.scale_up_bytes_per_s *= 1.5;
            let faster = time_s(&cluster, Collective::AllReduce, algorithm, group, bytes);
            prop_assert!(faster <= all[0]);
        }
    }
}
