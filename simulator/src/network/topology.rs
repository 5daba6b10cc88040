//! Switches, links and cost of a network by topology.
//!
//! The largest network of each kind that a switch with `ports` ports builds, as in table 3 of arXiv
//! 2505.09343. Links are those between switches; a NIC's own cable belongs to the NIC.

use serde::{Deserialize, Serialize};

use crate::hardware::cluster::TopologyKind;

/// How large a network is, in parts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetworkSize {
    /// NICs that can be attached.
    pub endpoints: u64,
    /// Switches of all layers.
    pub switches: u64,
    /// Links between switches, without the NICs' own cables.
    pub links: u64,
}

/// Prices of the parts of a network.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct NetworkPrices {
    /// Price of a switch, dollars.
    pub switch_usd: f64,
    /// Price of a link between switches with its two transceivers, dollars.
    pub link_usd: f64,
}

impl NetworkPrices {
    /// Solved from two rows of the published cost table (multi-plane and three-layer fat tree); the
    /// dragonfly's row tests it.
    pub const PUBLISHED: NetworkPrices = NetworkPrices { switch_usd: 83_000.0, link_usd: 504.0 };

    /// Dollars for the switches and links of a network.
    pub fn cost_usd(&self, size: NetworkSize) -> f64 {
        self.switch_usd * size.switches as f64 + self.link_usd * size.links as f64
    }
}

/// The largest network of `kind` from switches of `ports` ports and `planes` planes.
pub fn largest(kind: TopologyKind, ports: u64, planes: u64) -> NetworkSize {
    let two_layer = NetworkSize {
        endpoints: ports * ports / 2,
        switches: ports + ports / 2,
        links: ports * ports / 2,
    };
    match kind {
        TopologyKind::Mpft => NetworkSize {
            endpoints: planes * two_layer.endpoints,
            switches: planes * two_layer.switches,
            links: planes * two_layer.links,
        },
        // Rails and NVL72 racks hang on one two-layer tree.
        TopologyKind::FatTree2 | TopologyKind::Rail | TopologyKind::Nvl => two_layer,
        TopologyKind::FatTree3 => NetworkSize {
            endpoints: ports.pow(3) / 4,
            switches: 5 * ports * ports / 4,
            links: ports.pow(3) / 2,
        },
        TopologyKind::Dragonfly => {
            // Balanced: terminals p = global links h = ports / 4, routers per group a = ports / 2;
            // two groups fewer than the a h + 1 that full use of the global ports would allow, as
            // published.
            let (p, a, h) = (ports / 4, ports / 2, ports / 4);
            let groups = (a * h).saturating_sub(1);
            NetworkSize {
                endpoints: groups * a * p,
                switches: groups * a,
                links: groups * (a * (a - 1) / 2) + groups * a * h / 2,
            }
        }
    }
}

/// The network of `kind` for `nics` NICs: the largest network's counts scaled to the NICs attached.
pub fn for_nics(kind: TopologyKind, ports: u64, planes: u64, nics: u64) -> NetworkSize {
    let full = largest(kind, ports, planes);
    let scale = |x: u64| (x * nics).div_ceil(full.endpoints);
    NetworkSize { endpoints: nics, switches: scale(full.switches), links: scale(full.links) }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Table 3 of arXiv 2505.09343 (switches of 64 ports).
    #[test]
    fn published_sizes() {
        let size = |kind, planes| {
            let s = largest(kind, 64, planes);
            (s.endpoints, s.switches, s.links)
        };
        assert_eq!(size(TopologyKind::FatTree2, 1), (2048, 96, 2048));
        assert_eq!(size(TopologyKind::Mpft, 8), (16384, 768, 16384));
        assert_eq!(size(TopologyKind::FatTree3, 1), (65536, 5120, 131_072));
        assert_eq!(size(TopologyKind::Dragonfly, 1), (261_632, 16_352, 384_272));
    }
}
