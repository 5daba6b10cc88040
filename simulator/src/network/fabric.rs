//! The links of a cluster as far as a group of GPUs uses them, and the routes between these GPUs.

use crate::hardware::cluster::{Cluster, TopologyKind};

/// Share of a NIC's raw rate that is payload: packets of 4096 bytes with the headers of an RDMA
/// write (LRH 8, BTH 12, ICRC 4, VCRC 2 bytes; InfiniBand architecture specification, volume 1).
const PAYLOAD_SHARE: f64 = 4096.0 / (4096.0 + 26.0);

/// Links and routes of a cluster. GPUs are numbered node by node; NIC `g` belongs to GPU `g`.
#[derive(Debug, Clone)]
pub struct Fabric {
    gpus_per_node: usize,
    /// GPUs in all.
    gpus: usize,
    /// Bytes/s of every link: per GPU scale-up out and in, NIC out and in; then per leaf up and
    /// down.
    capacity: Vec<f64>,
    /// Leaf switch of every GPU's NIC.
    leaf: Vec<usize>,
    same_leaf_latency_s: f64,
    cross_leaf_latency_s: f64,
    scale_up_latency_s: f64,
}

impl Fabric {
    /// The first `gpus` GPUs of `cluster`, with scale-up links at their usable rate.
    pub fn new(cluster: &Cluster, gpus: u64) -> Fabric {
        let n = gpus as usize;
        let per_node = cluster.gpus_per_node as usize;
        let net = &cluster.network;
        let nic = cluster.nic_bytes_per_s_per_gpu() * PAYLOAD_SHARE;
        let up = cluster.gpu.scale_up_usable_bytes_per_s();
        let leaf: Vec<usize> = (0..n).map(|g| leaf_of(cluster, g)).collect();
        let leaves = leaf.iter().max().map_or(0, |l| l + 1);
        let mut capacity = Vec::with_capacity(4 * n + 2 * leaves);
        for _ in 0..n {
            capacity.extend([up, up, nic, nic]);
        }
        // A leaf's uplinks are one pool, as wide as its downlinks (no oversubscription) and as fast
        // as its fullest where every NIC sends to those of all other nodes, except for dragonfly,
        // where a router has half as many global links as terminals' share would ask for.
        let share = if net.topology == TopologyKind::Dragonfly { 1.0 / 2.0 } else { 1.0 };
        let downlinks = (net.switch_ports / 2) as f64;
        let flows = (n / per_node.max(1)).saturating_sub(1) as f64;
        let share = share / net.oversubscription / net.collisions(flows);
        let uplink = downlinks * net.nic_bytes_per_s * PAYLOAD_SHARE * share;
        capacity.extend(std::iter::repeat_n(uplink, 2 * leaves));
        Fabric {
            gpus_per_node: per_node,
            gpus: n,
            capacity,
            leaf,
            same_leaf_latency_s: net.same_leaf_latency_s,
            cross_leaf_latency_s: net.cross_leaf_latency_s,
            scale_up_latency_s: net.scale_up_latency_s,
        }
    }

    /// GPUs that the fabric joins.
    pub fn gpus(&self) -> usize {
        self.gpus
    }

    /// GPUs of a node.
    pub fn gpus_per_node(&self) -> usize {
        self.gpus_per_node
    }

    /// Bytes/s of every link, by its index.
    pub fn capacity(&self) -> &[f64] {
        &self.capacity
    }

    /// Multiplies the rate of the scale-up links, where an operation reaches less than a plain
    /// copy.
    pub fn scale_up_by(&mut self, factor: f64) {
        for g in 0..self.gpus {
            self.capacity[4 * g] *= factor;
            self.capacity[4 * g + 1] *= factor;
        }
    }

    /// The links, by index, from GPU `from` to GPU `to`, and the latency of the way in seconds.
    pub fn route(&self, from: usize, to: usize) -> (Vec<u32>, f64) {
        if from == to {
            return (Vec::new(), 0.0);
        }
        if from / self.gpus_per_node == to / self.gpus_per_node {
            return (vec![4 * from as u32, 4 * to as u32 + 1], self.scale_up_latency_s);
        }
        let (out, into) = (4 * from as u32 + 2, 4 * to as u32 + 3);
        let (a, b) = (self.leaf[from], self.leaf[to]);
        if a == b {
            return (vec![out, into], self.same_leaf_latency_s);
        }
        let base = 4 * self.gpus;
        let (up, down) = ((base + 2 * a) as u32, (base + 2 * b + 1) as u32);
        (vec![out, up, down, into], self.cross_leaf_latency_s)
    }
}

/// The leaf switch that the NIC of GPU `g` hangs on.
fn leaf_of(cluster: &Cluster, g: usize) -> usize {
    let net = &cluster.network;
    let per_node = cluster.gpus_per_node as usize;
    let (node, slot) = (g / per_node, g % per_node);
    let down = (net.switch_ports as usize / 2).max(1);
    match net.topology {
        // One leaf takes the same NIC of `down` nodes; planes (rails) are numbered inside.
        TopologyKind::Mpft | TopologyKind::Rail => {
            let planes = net.planes.max(1) as usize;
            (node / down) * planes + slot % planes
        }
        // One leaf takes all NICs of a few nodes.
        TopologyKind::FatTree2 | TopologyKind::FatTree3 | TopologyKind::Nvl => {
            (node * net.nics_per_node as usize + slot * net.nics_per_node as usize / per_node)
                / down
        }
        TopologyKind::Dragonfly => {
            let terminals = (net.switch_ports as usize / 4).max(1);
            (node * net.nics_per_node as usize + slot * net.nics_per_node as usize / per_node)
                / terminals
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hardware;

    #[test]
    fn a_plane_joins_the_same_nic_of_all_nodes_below_one_leaf() {
        let cluster = hardware::cluster("h800-2048").unwrap();
        let f = Fabric::new(&cluster, 2048);
        let (links, latency) = f.route(0, 8);
        assert_eq!((links.len(), latency), (2, 2.8e-6));
        // Node 32 hangs on the next leaf of the plane.
        let (links, latency) = f.route(0, 256);
        assert_eq!((links.len(), latency), (4, 3.7e-6));
        assert_eq!(f.route(0, 7), (vec![0, 29], 3.33e-6));
    }

    #[test]
    fn every_route_uses_links_that_exist() {
        for (name, _) in hardware::CLUSTERS {
            let cluster = hardware::cluster(name).unwrap();
            let f = Fabric::new(&cluster, cluster.gpus);
            for to in (0..f.gpus()).step_by(7) {
                for l in f.route(3, to).0 {
                    assert!((l as usize) < f.capacity().len(), "{name}");
                }
            }
        }
    }
}
