//! Dollars: rent by the GPU-hour, or capital and power.

use serde::{Deserialize, Serialize};

use crate::hardware::cluster::Cluster;

/// What a GPU-hour costs to own. Without capital the cluster's rent holds.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Pricing {
    /// Purchase price per GPU with its share of host and network, dollars; 0 rents at the cluster's
    /// `usd_per_gpu_hour`.
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
    let kilowatts = cluster.gpu.tdp_w / 1000.0 * (1.0 + pricing.host_power_share) * pricing.pue;
    pricing.capital_usd_per_gpu / working_hours + kilowatts * pricing.usd_per_kwh
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
        // 35,064 dollars over 4 years of 8766 hours: 1 dollar an hour; 0.7 kW * 2 * 1.0 * 0.1
        // dollars: 0.14.
        let own = Pricing {
            capital_usd_per_gpu: 35_064.0,
            utilization: 1.0,
            usd_per_kwh: 0.1,
            pue: 1.0,
            host_power_share: 1.0,
            ..Pricing::default()
        };
        assert!((usd_per_gpu_hour(&own, &cluster) - 1.14).abs() < 1e-9);
    }
}
