//! The exchanges of decoding: every copy of a token goes to its expert on its own, over NVLink
//! inside the node and straight over the NICs else (DeepEP's low-latency kernels, IBGDA), both at
//! once; no SM works while the bytes are under way.

use crate::hardware::cluster::Cluster;

/// Share of a NIC's bandwidth that messages of one token reach: 40 of 50 GB/s, the effective
/// bandwidth with which arXiv 2505.09343, section 4.3, counts.
pub const SMALL_MESSAGES: f64 = 0.8;

/// Seconds until `copies` messages of `bytes` that each of `ep` ranks sends to ranks drawn evenly
/// have arrived.
pub fn low_latency_s(cluster: &Cluster, ep: u64, copies: f64, bytes: f64) -> f64 {
    if ep <= 1 || copies <= 0.0 {
        return 0.0;
    }
    let per_node = cluster.gpus_per_node.min(ep) as f64;
    let all = copies * bytes;
    let inside = all * (per_node - 1.0) / ep as f64;
    let outside = all * (ep as f64 - per_node) / ep as f64;
    let up = inside / cluster.gpu.scale_up_usable_bytes_per_s();
    let out = outside / (SMALL_MESSAGES * cluster.nic_bytes_per_s_per_gpu());
    // There and back; within a node it is nearly the same.
    up.max(out) + 2.0 * cluster.network.cross_leaf_latency_s
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hardware;

    /// By hand: 512 copies of 10 KB over 16 ranks, half of them beyond the node at 40 GB/s (64 us)
    /// and 7/16 within at 160 GB/s (14 us).
    #[test]
    fn the_slower_of_both_networks_sets_the_time() {
        let h800 = hardware::cluster("h800-2048").unwrap();
        let t = low_latency_s(&h800, 16, 512.0, 10_000.0);
        assert!((t - (64e-6 + 7.4e-6)).abs() < 1e-9, "{t}");
        assert_eq!(low_latency_s(&h800, 1, 512.0, 10_000.0), 0.0);
    }
}
