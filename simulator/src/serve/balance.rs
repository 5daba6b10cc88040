//! How evenly the experts of a unit are loaded, and what keeping them even costs.
//!
//! Every expert of every layer has a popularity: the exponential of a normal draw. The balancer
//! sees the popularity of the last interval; the present one has drifted from it. What every layer
//! waits for is its busiest GPU.

use serde::Serialize;

use super::config::{Pool, ServeScenario};
use super::draws::Draws;
use super::eplb::{Balance, Placement, place};
use super::layout::Layout;

/// The balance of one pool's experts.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ExpertBalance {
    /// Busiest GPU over the mean, mean over layers, as the experts are placed.
    pub imbalance: f64,
    /// The same in the worst layer.
    pub worst_layer: f64,
    /// The same, mean over layers, without copies and without the balancer.
    pub unbalanced: f64,
    /// Copies of experts beyond the first, a layer.
    pub redundant: u64,
    /// Bytes that a GPU receives at a new placement.
    pub moved_bytes: f64,
    /// Seconds that receiving them takes over the NICs, in the background of the iterations.
    pub move_s: f64,
    /// Share of the time that this is: an upper bound of what it costs.
    pub move_share: f64,
}

/// Streams of draws.
const POPULARITY: u64 = 11;
const DRIFT: u64 = 12;

/// The balance of `pool`, or none for a model without routed experts or one rank.
pub(super) fn balance(s: &ServeScenario, pool: &Pool, layout: &Layout) -> Option<ExpertBalance> {
    let moe = s.model.moe.filter(|_| layout.ep > 1)?;
    let (gpus, slots) = (layout.ep as usize, (layout.ep * layout.expert_slots) as usize);
    let experts = layout.experts as usize;
    let layers = (s.model.layers - moe.first_dense.min(s.model.layers)) as u64;
    let nodes = pool.gpus.div_ceil(s.cluster.gpus_per_node) as usize;
    let ask = Balance { slots, groups: moe.n_group.max(1), nodes, gpus };
    let draws = Draws::new(s.seed);
    let (mut sum, mut worst, mut plain, mut moved) = (0.0, 1.0f64, 0.0, 0);
    for layer in 0..layers {
        let loads = |epoch: u64| loads(s, experts, layer, epoch, &draws);
        let (then, now) = (loads(0), loads(1));
        let seen = if s.experts.dynamic { &now } else { &then };
        let placed =
            if s.experts.balanced { place(seen, ask) } else { Placement::in_order(experts, slots) };
        let imbalance = placed.imbalance(&now, gpus);
        sum += imbalance;
        worst = worst.max(imbalance);
        plain += unbalanced(&now, gpus);
        if s.experts.balanced {
            moved += place(&now, ask).moved_from(&placed, gpus);
        }
    }
    let element = s.precision.element_bytes();
    let expert = 3.0 * (s.model.hidden_size * moe.intermediate_size) as f64 * element;
    let moved_bytes = moved as f64 / gpus as f64 * expert;
    let move_s = moved_bytes / s.cluster.nic_bytes_per_s_per_gpu();
    Some(ExpertBalance {
        imbalance: sum / layers.max(1) as f64,
        worst_layer: worst,
        unbalanced: plain / layers.max(1) as f64,
        redundant: slots as u64 - layout.experts,
        moved_bytes,
        move_s,
        move_share: (move_s / s.experts.interval_s).min(1.0),
    })
}

/// Busiest GPU over the mean with every expert once, in order.
fn unbalanced(loads: &[f32], gpus: usize) -> f64 {
    let total: f64 = loads.iter().map(|&l| f64::from(l)).sum();
    let first = |g: usize| (g * loads.len()).div_ceil(gpus);
    let of = |g: usize| loads[first(g)..first(g + 1)].iter().map(|&l| f64::from(l)).sum::<f64>();
    (0..gpus).map(of).fold(0.0, f64::max) * gpus as f64 / total
}

/// Tokens of each expert in a layer, relative; the routed shared expert, last, gets every token.
fn loads(s: &ServeScenario, experts: usize, layer: u64, epoch: u64, draws: &Draws) -> Vec<f32> {
    let e = &s.experts;
    let routed = s.model.moe.map_or(experts, |m| m.n_routed_experts);
    let (keep, new) = ((1.0 - e.drift).sqrt(), e.drift.sqrt());
    let draw = |expert: u64| {
        let counter = layer * 65536 + expert;
        let old = draws.normal(POPULARITY, counter);
        let fresh = draws.normal(DRIFT + epoch, counter);
        (e.popularity * (keep * old + new * fresh)).exp()
    };
    let mut loads: Vec<f64> = (0..routed as u64).map(draw).collect();
    let (total, top_k) = (loads.iter().sum::<f64>(), s.model.moe.map_or(1, |m| m.top_k) as f64);
    loads.extend((routed..experts).map(|_| total / top_k));
    loads.into_iter().map(|l| l as f32).collect()
}
