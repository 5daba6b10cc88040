//! Dollars: rent by the GPU-hour, or capital and power.

use serde::{Deserialize, Serialize};

use crate::hardware::cluster::Cluster;
use crate::network::topology::{self, NetworkPrices};

/// What a GPU-hour costs to own. Without capital the cluster's rent holds.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Pricing {
    /// Purchase price per GPU with its share of the host, dollars; switches and links come on top,
    /// as many as the cluster's topology needs. 0 rents at the cluster's `usd_per_gpu_hour`.
    pub capital_usd_per_gpu: f64,
    /// Years over which the purchase is written off.
    pub lifetime_years: f64,
    /// Share of those years that the cluster works.
    pub utilization: f64,
    /// Electricity, dollars per kilowatt-hour.
    pub usd_per_kwh: f64,
    /// Power usage effectiveness: power of the facility over power of the machines.
    pub pue: f64,
    /// Power of a GPU's share of host and network relative to the GPU's own.
    pub host_power_share: f64,
    /// Dollars that may be spent on buying the cluster or, where it is rented, on the run; 0 sets
    /// no limit.
    pub budget_usd: f64,
    /// Power that the facility has, megawatts; 0 sets no limit.
    pub budget_mw: f64,
}

impl Default for Pricing {
    fn default() -> Self {
        Pricing {
            capital_usd_per_gpu: 0.0,
            lifetime_years: 4.0,
            utilization: 0.9,
            usd_per_kwh: 0.08,
            pue: 1.25,
            host_power_share: 0.6,
            budget_usd: 0.0,
            budget_mw: 0.0,
        }
    }
}

/// What training costs, failures not counted.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Cost {
    /// Dollars per GPU-hour: the rent, or capital and power.
    pub usd_per_gpu_hour: f64,
    /// Dollars per trillion tokens.
    pub usd_per_trillion_tokens: f64,
}

/// Dollars per hour of one of the cluster's GPUs.
pub fn usd_per_gpu_hour(pricing: &Pricing, cluster: &Cluster) -> f64 {
    if pricing.capital_usd_per_gpu == 0.0 {
        return cluster.usd_per_gpu_hour;
    }
    let working_hours = pricing.lifetime_years * 365.25 * 24.0 * pricing.utilization;
    let capital = pricing.capital_usd_per_gpu + network_usd_per_gpu(cluster);
    capital / working_hours + kilowatts_per_gpu(pricing, cluster) * pricing.usd_per_kwh
}

/// Kilowatts of the facility for one of the cluster's GPUs, at its power limit.
pub fn kilowatts_per_gpu(pricing: &Pricing, cluster: &Cluster) -> f64 {
    let limit = cluster.gpu.power_limit_w.unwrap_or(cluster.gpu.tdp_w);
    limit / 1000.0 * (1.0 + pricing.host_power_share) * pricing.pue
}

/// Dollars of switches and links for one of the cluster's GPUs.
pub fn network_usd_per_gpu(cluster: &Cluster) -> f64 {
    let net = &cluster.network;
    let nics = (cluster.gpus / cluster.gpus_per_node).max(1) * net.nics_per_node;
    let parts = topology::for_nics(net.topology, net.switch_ports, net.planes, nics);
    NetworkPrices::PUBLISHED.cost_usd(parts) / cluster.gpus as f64
}

/// What the budgets allow, given what the run costs without them.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Allowed {
    /// GPUs that money and power are enough for; the cluster's own where neither is limited.
    pub gpus: f64,
    /// Tokens that the money trains on the cluster's GPUs where these are rented.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tokens: Option<f64>,
}

/// What the budgets of `pricing` allow on `cluster`; `usd_per_token` is what a token costs,
/// failures counted. `None` where nothing is limited.
pub fn allowed(pricing: &Pricing, cluster: &Cluster, usd_per_token: f64) -> Option<Allowed> {
    let (usd, mw) = (pricing.budget_usd, pricing.budget_mw);
    if usd == 0.0 && mw == 0.0 {
        return None;
    }
    let mut gpus = f64::INFINITY;
    let mut tokens = None;
    if mw > 0.0 {
        gpus = gpus.min((mw * 1000.0 / kilowatts_per_gpu(pricing, cluster)).floor());
    }
    if usd > 0.0 && pricing.capital_usd_per_gpu > 0.0 {
        let price = pricing.capital_usd_per_gpu + network_usd_per_gpu(cluster);
        gpus = gpus.min((usd / price).floor());
    } else if usd > 0.0 {
        tokens = Some(usd / usd_per_token);
    }
    Some(Allowed { gpus: if gpus.is_finite() { gpus } else { cluster.gpus as f64 }, tokens })
}

/// What training costs at a throughput of `tokens_per_s_per_gpu` on `cluster`.
pub fn cost(pricing: &Pricing, cluster: &Cluster, tokens_per_s_per_gpu: f64) -> Cost {
    let usd_per_gpu_hour = usd_per_gpu_hour(pricing, cluster);
    let gpu_hours = 1e12 / tokens_per_s_per_gpu / 3600.0;
    Cost { usd_per_gpu_hour, usd_per_trillion_tokens: gpu_hours * usd_per_gpu_hour }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hardware as presets;

    #[test]
    fn rent_and_capital_by_hand() {
        let cluster = presets::cluster("h800-2048").unwrap();
        // The report: 180 K GPU-hours a trillion tokens at 2 dollars.
        let rent = cost(&Pricing::default(), &cluster, 1e12 / 180e3 / 3600.0);
        assert_eq!(rent.usd_per_gpu_hour, 2.0);
        assert!((rent.usd_per_trillion_tokens - 360e3).abs() < 1e-3);
        // 2048 NICs on an eighth of the largest tree: 96 switches and 2048 links, 4,394.5 dollars a
        // GPU. Both together 35,064 dollars over 4 years of 8766 hours: 1 dollar an hour; 0.7 kW
        // * 2 * 1.0 * 0.1 dollars: 0.14.
        let network = (96.0 * 83_000.0 + 2048.0 * 504.0) / 2048.0;
        assert!((network_usd_per_gpu(&cluster) - network).abs() < 1e-9);
        let own = Pricing {
            capital_usd_per_gpu: 35_064.0 - network,
            utilization: 1.0,
            usd_per_kwh: 0.1,
            pue: 1.0,
            host_power_share: 1.0,
            ..Pricing::default()
        };
        assert!((usd_per_gpu_hour(&own, &cluster) - 1.14).abs() < 1e-9);
        // 1.4 kW a GPU: 1 MW feeds 714; 10 M$ buy 285 GPUs at 35,064 dollars.
        let power = Pricing { budget_mw: 1.0, ..own };
        assert_eq!(allowed(&power, &cluster, 1e-6).unwrap().gpus, 714.0);
        let both = Pricing { budget_usd: 10e6, ..power };
        assert_eq!(allowed(&both, &cluster, 1e-6).unwrap().gpus, 285.0);
        let rented = Pricing { budget_usd: 10e6, ..Pricing::default() };
        let found = allowed(&rented, &cluster, 1e-6).unwrap();
        assert_eq!((found.gpus, found.tokens), (2048.0, Some(1e13)));
        assert_eq!(allowed(&own, &cluster, 1e-6), None);
    }
}
