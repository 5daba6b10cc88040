//! What a step takes at least, from sums over its stages: the way to leave a layout or a split of
//! layers out without playing it.
//!
//! An instruction takes as long as each of its streams is busy, and as long as the chain of its
//! layers' parts. Both are sums of parts, so that over all micro-batches of a stage they are the
//! parts times the sum of the loads; no micro-batch is gone through. In front of a rank's first
//! instruction stand the forwards of the stages before, behind its last gradient their backwards.

use fathom_schedule::{Chunk, Op, Schedule, ScheduleKind, Shape};

use crate::config::{ExpertOverlap, Scenario};
use crate::events::chunk::{Weights, under_load};
use crate::load::LoadSums;
use crate::parallel::{LayerTable, PlacedLayer, Placement};
use crate::times::{LayerTimes, PhaseTimes, TailTimes};

/// Sums of several hundred thousand parts in another order than the events': the bound stays below
/// the step by more than they round.
pub(crate) const ROUNDING: f64 = 1.0 - 1e-9;

/// Seconds of a layer's, or of several layers', forward, backward for the inputs and weight
/// gradients, over some micro-batches.
#[derive(Debug, Clone, Copy, Default)]
struct Work {
    /// Computation by phase: F, B, W.
    compute: [f64; 3],
    /// Exchanges of F and B.
    exchange: [f64; 2],
}

const F: usize = 0;
const B: usize = 1;
const W: usize = 2;

impl Work {
    /// Of a layer, its experts and exchanges under a load.
    fn of(layer: &LayerTimes, load: f64) -> Work {
        let phases = [layer.forward, layer.backward, layer.weight];
        let phases = phases.map(|p| under_load(p, layer.routed_share, load));
        let computes = |p: PhaseTimes| p.attention_s + p.mlp_s;
        let exchanges = |p: PhaseTimes| p.dispatch_s + p.combine_s;
        Work { compute: phases.map(computes), exchange: [F, B].map(|i| exchanges(phases[i])) }
    }

    /// The chain of the parts of a forward ([`F`]) or of a backward for the inputs ([`B`]).
    fn chain(&self, phase: usize) -> f64 {
        self.compute[phase] + self.exchange[phase]
    }

    /// Entry by entry.
    fn with(&self, other: &Work, of: impl Fn(f64, f64) -> f64) -> Work {
        Work {
            compute: std::array::from_fn(|i| of(self.compute[i], other.compute[i])),
            exchange: std::array::from_fn(|i| of(self.exchange[i], other.exchange[i])),
        }
    }
}

/// Bounds of the steps of one layout, whichever way its layers are split into stages.
pub(crate) struct Bound {
    weights: Weights,
    pairs: bool,
    /// Sums over the layers before each, and over all.
    before: Vec<Stage>,
}

/// Work of a stage: of one micro-batch under the least loads and under the greatest, then of all
/// micro-batches of each direction.
type Stage = [Work; 4];
const LEAST: usize = 0;
const MOST: usize = 1;
const DIRECTION: usize = 2;

impl Bound {
    /// Of a schedule, which may be without its instructions, and a model whose layers lie in the
    /// order of `placement`.
    pub(crate) fn new(
        s: &Scenario,
        table: &LayerTable,
        loads: &LoadSums,
        placement: &Placement,
        schedule: &Schedule,
    ) -> Bound {
        let pairs = schedule.kind.overlaps_pairs();
        let (all, one) = (schedule.micro_batches, schedule.micro_batches_per_dir());
        // In shapes with one direction every stage sees all micro-batches.
        let directions = [0..one, if one == all { 0..all } else { one..all }];
        let (least, most) = (loads.least(all), loads.most(all));
        let of = |list: &[f32], layer: usize| list.get(layer).map_or(1.0, |&l| f64::from(l));
        let mut sum = [Work::default(); 4];
        let mut before = vec![sum];
        for (index, layer) in placement.stages.iter().flatten().enumerate() {
            let [alone, paired] = table.of(layer.kind);
            // Where halves of pairs run otherwise than alone, the quicker counts.
            let work = |load: f64| {
                let alone = Work::of(alone, load);
                if pairs { alone.with(&Work::of(paired, load), f64::min) } else { alone }
            };
            let most = Work::of(alone, of(&most, index));
            sum[LEAST] = sum[LEAST].with(&work(of(&least, index)), |sum, one| sum + one);
            sum[MOST] = sum[MOST].with(&most, |sum, one| sum + one);
            for (sum, of) in sum[DIRECTION..].iter_mut().zip(&directions) {
                // Times are linear in the load.
                let n = of.len() as f64;
                let mean = work(loads.sum(index, of.clone()) / n.max(1.0));
                *sum = sum.with(&mean, |sum, one| sum + n * one);
            }
            before.push(sum);
        }
        let weights = Weights::of(s.stack.ep_overlap != ExpertOverlap::None);
        Bound { weights, pairs, before }
    }

    /// Seconds than which no step with the stages of `p` is shorter up to its last gradient,
    /// reduction by `tail` included, which may be empty.
    pub(crate) fn step_s(&self, p: &Placement, schedule: &Schedule, tail: &[TailTimes]) -> f64 {
        let mut end = 0;
        let stage = |layers: &Vec<PlacedLayer>| {
            let a = &self.before[end];
            end += layers.len();
            let b = &self.before[end];
            std::array::from_fn(|i| b[i].with(&a[i], |b, a| b - a))
        };
        let stages: Vec<Stage> = p.stages.iter().map(stage).collect();
        // One phase of one micro-batch on the stages before each.
        let chains = |phase: usize| -> Vec<f64> {
            let add = |sum: &mut f64, stage: &Stage| {
                Some(std::mem::replace(sum, *sum + stage[LEAST].chain(phase)))
            };
            stages.iter().scan(0.0, add).collect()
        };
        let (forward, backward) = (chains(F), chains(B));
        let reduce_s = |rank: usize| tail.get(rank).map_or(0.0, |t| t.grad_reduce_s);
        let least_reduce_s = (0..tail.len()).map(reduce_s).fold(f64::INFINITY, f64::min);
        let geometry = &schedule.geometry;
        let rank_s = |(rank, ops): (usize, &Vec<Op>)| {
            let dirs = 0..geometry.dirs() as u8;
            let at = |dir: u8| geometry.stage(rank, dir);
            let held = dirs.clone().map(|dir| {
                let direction = if geometry.shape == Shape::TwoWay { dir as usize } else { 0 };
                &stages[at(dir)][DIRECTION + direction]
            });
            let nearest =
                |chain: &[f64]| dirs.clone().map(|d| chain[at(d)]).fold(f64::MAX, f64::min);
            let (fill_s, drain_s) = match (ops.first(), ops.last()) {
                (Some(first), Some(_)) => {
                    let fill = first.forward().map_or(0.0, |c| forward[at(c.dir)]);
                    let left_s = |c: Chunk| stages[at(c.dir)][MOST].compute[W];
                    (fill, drain_s(ops, |c| backward[at(c.dir)], left_s))
                }
                // Weight gradients that are left may fill the drain.
                _ if splits_backward(schedule.kind) => (nearest(&forward), 0.0),
                _ => (nearest(&forward), nearest(&backward)),
            };
            let behind_s = reduce_s(rank).max(drain_s + least_reduce_s.min(1e300));
            fill_s + self.busy_s(held) + if tail.is_empty() { drain_s } else { behind_s }
        };
        schedule.ranks.iter().enumerate().map(rank_s).fold(0.0, f64::max) * ROUNDING
    }

    /// How long a rank is busy with all micro-batches of its stages.
    fn busy_s<'w>(&self, held: impl Iterator<Item = &'w Work>) -> f64 {
        if self.pairs {
            let busy = held.fold([0.0; 2], |[compute, exchange]: [f64; 2], w| {
                [compute + w.compute.iter().sum::<f64>(), exchange + w.exchange.iter().sum::<f64>()]
            });
            return busy[0].max(busy[1]);
        }
        let chunks = held.map(|w| {
            let backward = match self.weights {
                Weights::Beside => w.chain(B).max(w.compute[B] + w.compute[W]),
                Weights::Before | Weights::Later => w.chain(B) + w.compute[W],
            };
            w.chain(F) + backward
        });
        chunks.sum()
    }
}

/// Whether weight gradients may run later than the input's gradient.
fn splits_backward(kind: ScheduleKind) -> bool {
    match kind {
        ScheduleKind::Zb1p
        | ScheduleKind::ZbV
        | ScheduleKind::DualPipe
        | ScheduleKind::DualPipeV => true,
        ScheduleKind::GPipe
        | ScheduleKind::OneFOneB
        | ScheduleKind::Interleaved
        | ScheduleKind::Chimera => false,
    }
}

/// How long others go on with a rank's last gradient after its last instruction: `behind_s` of its
/// chunk, of which the rank's weight gradients that are left take a part, `left_s` each.
fn drain_s(ops: &[Op], behind_s: impl Fn(Chunk) -> f64, left_s: impl Fn(Chunk) -> f64) -> f64 {
    let own = |op: &Op| op.weight().filter(|_| op.backward().is_none());
    let left_s: f64 = ops.iter().rev().map_while(own).map(left_s).sum();
    let last = ops.iter().rev().find_map(|op| op.backward());
    last.map_or(0.0, |chunk| (behind_s(chunk) - left_s).max(0.0))
}
