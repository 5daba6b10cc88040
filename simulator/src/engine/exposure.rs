//! How much of the data-parallel traffic, and of the experts' exchanges, the computation hides.
//! What concerns a layer by itself is settled once for every kind of layer ([`layer_table`]), the
//! traffic once for every placement ([`settle`]).
//!
//! The cost model gives the whole traffic of one reduction of the gradients and one gathering of
//! the parameters. How often a step has them follows from the ZeRO stage, what runs beside them
//! from the stack; whatever does not fit beside is exposed, and so is one layer's part, which
//! nothing precedes or follows.

use crate::config::{ExpertOverlap, Scenario};
use crate::error::SimError;
use crate::memory::chunk_bytes;
use crate::parallel::{self, CostModel, LayerTable, PlacedLayer};
use crate::times::{LayerTimes, PhaseTimes, StepTimes};

/// Turns the whole traffic in `times` into what is exposed of it over the step.
pub fn settle(s: &Scenario, times: &mut StepTimes) {
    times.wgrad_under_exchanges = s.stack.ep_overlap != ExpertOverlap::None;
    let geometry = parallel::geometry(s);
    for rank in 0..geometry.ranks {
        let layers: Vec<&LayerTimes> =
            geometry.held(rank).iter().flat_map(|&stage| &times.stages[stage].alone).collect();
        let tail = &mut times.tail[rank];
        let traffic = Traffic { reduce_s: tail.grad_reduce_s, gather_s: tail.param_gather_s };
        let exposed = traffic.exposed(s, &layers);
        (tail.grad_reduce_s, tail.param_gather_s) = (exposed.reduce_s, exposed.gather_s);
    }
}

/// Seconds of one reduction of a rank's gradients and of one gathering of its parameters.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Traffic {
    reduce_s: f64,
    gather_s: f64,
}

fn sum(layers: &[&LayerTimes], phase: fn(&LayerTimes) -> PhaseTimes) -> f64 {
    let all = |p: PhaseTimes| p.attention_s + p.dispatch_s + p.mlp_s + p.combine_s;
    layers.iter().map(|l| all(phase(l))).sum()
}

impl Traffic {
    /// What of the step's traffic is waited for by a rank that holds `layers`.
    fn exposed(self, s: &Scenario, layers: &[&LayerTimes]) -> Traffic {
        let forward_s = sum(layers, |l| l.forward);
        let backward_s = sum(layers, |l| l.backward) + sum(layers, |l| l.weight);
        let parts = layers.len().max(1) as f64;
        let left = |traffic_s: f64, beside_s: f64, hides: bool| {
            if hides { (traffic_s - beside_s).max(traffic_s / parts) } else { traffic_s }
        };
        let micro_batches = s.micro_batches() as f64;
        let (prefetch, overlap) = (s.stack.fsdp_prefetch, s.stack.dp_overlap);
        match s.parallel.zero {
            // Once a step, after the last backward and before the next forward.
            0 | 1 => Traffic {
                reduce_s: left(self.reduce_s, backward_s, overlap),
                gather_s: left(self.gather_s, forward_s, overlap),
            },
            // Nobody keeps whole gradients: they are reduced with every micro-batch.
            2 => Traffic {
                reduce_s: micro_batches * left(self.reduce_s, backward_s, prefetch),
                gather_s: left(self.gather_s, forward_s, overlap),
            },
            // Nor whole parameters: gathered for every forward and again for every backward, whose
            // links the reduction shares.
            _ => {
                let both = left(self.gather_s + self.reduce_s, backward_s, prefetch);
                let reduce_s = both * self.reduce_s / (self.gather_s + self.reduce_s).max(1e-300);
                let gather_s = left(self.gather_s, forward_s, prefetch) + both - reduce_s;
                Traffic { reduce_s: micro_batches * reduce_s, gather_s: micro_batches * gather_s }
            }
        }
    }
}

/// Times one layer of every kind, as far as its stack and the link with the host expose them.
///
/// # Errors
/// Those of the cost model.
pub fn layer_table(s: &Scenario, model: &dyn CostModel) -> Result<LayerTable, SimError> {
    let mut table = LayerTable::new(s, model)?;
    for [alone, overlapped] in table.layers_mut() {
        if s.stack.ep_overlap == ExpertOverlap::Batch {
            hide_exchanges(s, alone);
        }
        move_activations(s, alone);
        move_activations(s, overlapped);
    }
    Ok(table)
}

/// Leaves of the exchanges of a layer by itself what does not run beside the computation of the
/// other micro-batch.
fn hide_exchanges(s: &Scenario, layer: &mut LayerTimes) {
    let exchanges = |p: PhaseTimes| p.dispatch_s + p.combine_s;
    let computation = |p: PhaseTimes| p.attention_s + p.mlp_s;
    let (f, b, w) = (layer.forward, layer.backward, layer.weight);
    let moved = exchanges(f) + exchanges(b);
    if moved == 0.0 {
        return;
    }
    let beside = computation(f) + computation(b) + computation(w);
    // One of the four exchanges of the last layer of a chunk has nothing beside it.
    let exposed = (1.0 - beside / moved).max(0.25 / s.model.layers as f64);
    for phase in [&mut layer.forward, &mut layer.backward] {
        phase.dispatch_s *= exposed;
        phase.combine_s *= exposed;
    }
}

/// Adds to a layer what its activations need on the link with the host beyond its computation: out
/// under the forward, in under the backward.
fn move_activations(s: &Scenario, layer: &mut LayerTimes) {
    if s.offload.activations == 0.0 {
        return;
    }
    let placed = PlacedLayer { kind: layer.kind, index: 0 };
    let moved_s = s.offload.activations * chunk_bytes(s, &[placed]) / s.offload.link_bytes_per_s;
    let computes = |p: PhaseTimes| p.attention_s + p.mlp_s;
    let backward_s = computes(layer.backward) + computes(layer.weight);
    layer.forward.mlp_s += (moved_s - computes(layer.forward)).max(0.0);
    layer.backward.mlp_s += (moved_s - backward_s).max(0.0);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::times::LayerKind;

    fn layer(f: f64, b: f64, w: f64) -> LayerTimes {
        let phase = |mlp_s| PhaseTimes { mlp_s, ..PhaseTimes::default() };
        let (kind, routed_share) = (LayerKind::Dense, 0.0);
        LayerTimes { kind, forward: phase(f), backward: phase(b), weight: phase(w), routed_share }
    }

    /// Two layers of 1 s forward and 2 s backward, 8 micro-batches; by hand.
    #[test]
    fn traffic_is_booked_as_often_as_the_stage_of_zero_asks() {
        let mut s = Scenario::preset("llama-3.1-70b-mi300x-1024", &[]).unwrap();
        s.training.global_batch = 8 * s.parallel.dp * s.training.micro_batch;
        let layers = [&layer(1.0, 1.0, 1.0), &layer(1.0, 1.0, 1.0)];
        let traffic = Traffic { reduce_s: 6.0, gather_s: 3.0 };
        let mut exposed = |zero: u8, hides: bool| {
            s.parallel.zero = zero;
            (s.stack.fsdp_prefetch, s.stack.dp_overlap) = (hides, hides);
            let t = traffic.exposed(&s, &layers);
            (t.reduce_s, t.gather_s)
        };
        assert_eq!(exposed(1, false), (6.0, 3.0));
        // Half of the traffic is a layer's: it stays although 2 and 4 s run beside.
        assert_eq!(exposed(1, true), (3.0, 1.5));
        assert_eq!(exposed(2, false), (48.0, 3.0));
        assert_eq!(exposed(3, false), (48.0, 48.0));
        // Backward: 9 s beside 4 leave 5, two thirds of them the reduction's; forward: 1.5.
        let (reduce_s, gather_s) = exposed(3, true);
        assert!((reduce_s - 8.0 * 5.0 * 2.0 / 3.0).abs() < 1e-9);
        assert!((gather_s - 8.0 * (1.5 + 5.0 / 3.0)).abs() < 1e-9);
    }
}
