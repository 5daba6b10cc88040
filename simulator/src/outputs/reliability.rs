//! Failures: how often a cluster of this size stops, what checkpoints cost, and what share of the
//! time trains.

use serde::{Deserialize, Serialize};

use crate::hardware::cluster::Cluster;

/// Failures and checkpoints. The defaults are Llama 3's published interruptions (arXiv 2407.21783,
/// table 5: 419 in 54 days on 16,384 GPUs; 246 of GPUs and their memory, 35 of the network, the
/// other 138 counted to the hosts).
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Reliability {
    /// Mean time between failures of one GPU with its memory, hours.
    pub gpu_mtbf_hours: f64,
    /// Mean time between failures of one host, its software included, hours.
    pub node_mtbf_hours: f64,
    /// Mean time between failures of one NIC with its share of cables and switches, hours.
    pub nic_mtbf_hours: f64,
    /// Seconds for which training stops to write a checkpoint.
    pub checkpoint_s: f64,
    /// Seconds of training between checkpoints; 0 takes the interval of the best goodput.
    pub checkpoint_interval_s: f64,
    /// Seconds from a failure to the first new step: noticing, replacing, restarting, loading.
    pub restart_s: f64,
}

impl Default for Reliability {
    fn default() -> Self {
        Reliability {
            gpu_mtbf_hours: 86_300.0,
            node_mtbf_hours: 19_200.0,
            nic_mtbf_hours: 606_700.0,
            checkpoint_s: 10.0,
            checkpoint_interval_s: 0.0,
            restart_s: 600.0,
        }
    }
}

/// What failures leave of the time of a run.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Goodput {
    /// Failures per day of the whole cluster.
    pub failures_per_day: f64,
    /// Mean time between failures of the whole cluster, hours.
    pub mtbf_hours: f64,
    /// Seconds of training between checkpoints, as asked for or the best.
    pub checkpoint_interval_s: f64,
    /// Share of the wall time that advances the training.
    pub goodput: f64,
}

/// Goodput of `cluster`: failures arrive as a Poisson process, also during checkpoints and
/// restarts, and cost the work since the last checkpoint. The expected time of one interval is
/// Daly's (2006, equation 13).
pub fn goodput(r: &Reliability, cluster: &Cluster) -> Goodput {
    let nodes = cluster.gpus as f64 / cluster.gpus_per_node as f64;
    let nics = nodes * cluster.network.nics_per_node as f64;
    let per_hour = cluster.gpus as f64 / r.gpu_mtbf_hours
        + nodes / r.node_mtbf_hours
        + nics / r.nic_mtbf_hours;
    let rate = per_hour / 3600.0;
    let interval = if r.checkpoint_interval_s > 0.0 {
        r.checkpoint_interval_s
    } else {
        best_interval(r, rate)
    };
    Goodput {
        failures_per_day: per_hour * 24.0,
        mtbf_hours: 1.0 / per_hour,
        checkpoint_interval_s: interval,
        goodput: interval / wall_per_interval(r, rate, interval),
    }
}

/// Expected wall time to train for `interval` seconds and write a checkpoint, failures at `rate` a
/// second.
fn wall_per_interval(r: &Reliability, rate: f64, interval: f64) -> f64 {
    (rate * r.restart_s).exp() / rate * (rate * (interval + r.checkpoint_s)).exp_m1()
}

/// The interval with the best goodput: golden-section search around Young's square root.
fn best_interval(r: &Reliability, rate: f64) -> f64 {
    let young = (2.0 * r.checkpoint_s / rate).sqrt().max(1e-3);
    let (mut low, mut high) = (young * 0.05, young * 3.0);
    let cost = |t: f64| wall_per_interval(r, rate, t) / t;
    let ratio = (5f64.sqrt() - 1.0) / 2.0;
    for _ in 0..80 {
        let (a, b) = (high - ratio * (high - low), low + ratio * (high - low));
        if cost(a) < cost(b) { high = b } else { low = a }
    }
    (low + high) / 2.0
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hardware as presets;

    /// Plays failures one by one, from a seed.
    fn played(r: &Reliability, rate: f64, interval: f64, intervals: usize) -> f64 {
        let mut state = 1u64;
        let mut failure = || {
            state = crate::load::mix(state);
            -(((state >> 11) as f64 + 0.5) / (1u64 << 53) as f64).ln() / rate
        };
        let (mut wall, mut next) = (0.0, failure());
        for _ in 0..intervals {
            loop {
                let span = interval + r.checkpoint_s;
                if next >= span {
                    (wall, next) = (wall + span, next - span);
                    break;
                }
                wall += next;
                next = failure();
                while next < r.restart_s {
                    wall += next;
                    next = failure();
                }
                (wall, next) = (wall + r.restart_s, next - r.restart_s);
            }
        }
        interval * intervals as f64 / wall
    }

    #[test]
    fn the_formula_agrees_with_played_failures() {
        let r = Reliability { checkpoint_s: 60.0, restart_s: 900.0, ..Reliability::default() };
        let (rate, interval) = (1.0 / 7200.0, 1500.0);
        let formula = interval / wall_per_interval(&r, rate, interval);
        let simulated = played(&r, rate, interval, 200_000);
        assert!((formula - simulated).abs() < 0.003, "formula {formula}, played {simulated}");
    }

    #[test]
    fn the_best_interval_is_a_minimum_and_near_young_for_cheap_checkpoints() {
        let r = Reliability { checkpoint_s: 1.0, restart_s: 0.0, ..Reliability::default() };
        let rate = 1e-5;
        let best = best_interval(&r, rate);
        assert!((best / (2.0f64 / rate).sqrt() - 1.0).abs() < 0.01, "{best}");
        for other in [0.8 * best, 1.25 * best] {
            assert!(
                wall_per_interval(&r, rate, other) / other
                    > wall_per_interval(&r, rate, best) / best
            );
        }
    }

    #[test]
    fn defaults_reproduce_the_published_interruptions() {
        let cluster = presets::cluster("h100-16384").unwrap();
        let g = goodput(&Reliability::default(), &cluster);
        assert!((g.failures_per_day * 54.0 - 419.0).abs() < 5.0, "{g:?}");
    }
}
