//! Which layers a pipeline stage holds, and which layouts are legal.

use fathom_schedule::{Geometry, Schedule, ScheduleShape, Shape};

use crate::config::{Scenario, StageSplit, limits};
use crate::error::SimError;
use crate::times::{LayerKind, LayerTimes, StageTimes, StepTimes};
use fathom_config::AttentionConfig;

/// A layer as placed: its kind, and its index among the transformer layers (0 for embedding and
/// head).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct PlacedLayer {
    /// Whether its second half is dense or has experts.
    pub kind: LayerKind,
    /// Index of the transformer layer, from 0; prediction modules count on after the last layer.
    pub index: u64,
}

/// The layers of every pipeline stage, shallow to deep.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Placement {
    /// By stage, then in order. Stage 0 opens with the embedding; the last ends with MTP and the
    /// head.
    pub stages: Vec<Vec<PlacedLayer>>,
    /// Ranks of the pipeline.
    pub ranks: usize,
}

/// The cost side: seconds of every part of a step.
pub trait CostModel: Sync {
    /// A layer by itself and beside the other half of an overlapped pair. What it takes depends on
    /// the model, the
    /// cluster, tp, cp, ep, `comm_sms`, `what_if` and the training's shapes; never on pp, dp, zero
    /// or the schedule.
    fn layer_times(&self, s: &Scenario, layer: PlacedLayer) -> Result<[LayerTimes; 2], SimError>;

    /// Everything but the layers: sends, tails, overhead; `stages` and `expert_load` are left
    /// empty.
    fn frame(&self, s: &Scenario, placement: &Placement) -> StepTimes;
}

/// Times of every kind of layer of a model; layers of one kind are alike.
#[derive(Debug, Clone, PartialEq)]
pub struct LayerTable {
    rows: Vec<(LayerKind, [LayerTimes; 2])>,
    /// Mean work for placement.
    pub weights: LayerWeights,
}

impl LayerTable {
    /// Times one layer of every kind that the model has.
    pub fn new(s: &Scenario, model: &dyn CostModel) -> Result<Self, SimError> {
        let m = &s.model;
        let dense = m.moe.map_or(m.layers, |moe| moe.first_dense.min(m.layers));
        let kinds = [
            (LayerKind::Embedding, 0, 1),
            (LayerKind::Dense, 0, dense),
            (LayerKind::Moe, dense, m.layers - dense),
            (LayerKind::Mtp, m.layers, m.mtp_depth),
            (LayerKind::Head, 0, 1),
        ];
        let mut rows = Vec::new();
        let (mut layers, mut weights) =
            (0.0, LayerWeights { layer: 0.0, mtp: 0.0, head: 0.0, spared: 0.0 });
        for (kind, index, count) in kinds.into_iter().filter(|k| k.2 > 0) {
            let times = model.layer_times(s, PlacedLayer { kind, index: index as u64 })?;
            let phases = [times[1].forward, times[1].backward, times[1].weight];
            let work: f64 = phases.iter().map(|p| p.attention_s + p.mlp_s).sum();
            match kind {
                LayerKind::Dense | LayerKind::Moe => layers += work * count as f64,
                LayerKind::Mtp => weights.mtp = work,
                LayerKind::Head => weights.head = work,
                LayerKind::Embedding => {}
            }
            rows.push((kind, times));
        }
        weights.layer = layers / m.layers as f64;
        Ok(LayerTable { rows, weights })
    }

    /// A layer of `kind`, by itself and beside the other half of a pair.
    pub fn of(&self, kind: LayerKind) -> &[LayerTimes; 2] {
        let row = self.rows.iter().find(|(k, _)| *k == kind);
        &row.expect("a placed layer is of a kind that the model has").1
    }

    /// Every kind of layer, to be changed in place.
    pub(crate) fn layers_mut(&mut self) -> impl Iterator<Item = &mut [LayerTimes; 2]> {
        self.rows.iter_mut().map(|(_, times)| times)
    }

    /// The stages of a placement.
    pub fn stages(&self, placement: &Placement) -> Vec<StageTimes> {
        let stage = |layers: &Vec<PlacedLayer>| {
            let pick = |which: usize| layers.iter().map(|l| self.of(l.kind)[which]).collect();
            StageTimes { alone: pick(0), overlapped: pick(1) }
        };
        placement.stages.iter().map(stage).collect()
    }
}

/// Where a scenario's pipeline stages lie.
pub fn geometry(scenario: &Scenario) -> Geometry {
    let (ranks, interleave) = (scenario.parallel.pp as usize, scenario.interleave as usize);
    Geometry::of_ranks(scenario.schedule.shape(), ranks, interleave)
}

/// Pipeline stages of a scenario: its ranks, times the stages a rank holds.
pub fn stages(scenario: &Scenario) -> usize {
    geometry(scenario).stages
}

/// The pipeline's instruction streams; refuses what the schedule cannot run.
pub fn schedule(scenario: &Scenario) -> Result<Schedule, SimError> {
    Ok(Schedule::new(scenario.schedule, schedule_shape(scenario))?)
}

/// Stages and micro-batches of a scenario's pipeline.
pub fn schedule_shape(scenario: &Scenario) -> ScheduleShape {
    let micro_batches = scenario.micro_batches() as usize;
    ScheduleShape {
        stages: stages(scenario),
        micro_batches,
        interleave: scenario.interleave as usize,
    }
}

/// Refuses an illegal layout with the reason; the schedule's own rules are those of [`schedule`].
pub fn check(scenario: &Scenario) -> Result<(), SimError> {
    let (p, m, t, c) = (&scenario.parallel, &scenario.model, &scenario.training, &scenario.cluster);
    let refuse = |reason: String| Err(SimError::Layout(reason));
    let divides = |a: u64, b: u64| a > 0 && b.is_multiple_of(a);
    if let Some((key, message)) = limits::first_outside(scenario) {
        return refuse(format!("{key}: {message}"));
    }
    let ranks = [p.tp, p.cp, p.pp, p.dp].iter().map(|&d| u128::from(d)).product::<u128>();
    if ranks != u128::from(c.gpus) {
        let parts = format!("tp {} * cp {} * pp {} * dp {}", p.tp, p.cp, p.pp, p.dp);
        return refuse(format!("{parts} = {ranks} ranks, the cluster has {} GPUs", c.gpus));
    }
    if !divides(c.gpus_per_node, c.gpus) {
        return refuse(format!("{} GPUs are not whole nodes of {}", c.gpus, c.gpus_per_node));
    }
    if !divides(p.tp, m.heads as u64) {
        return refuse(format!("tp {} does not divide the {} attention heads", p.tp, m.heads));
    }
    if let AttentionConfig::Gqa { kv_heads, .. } = m.attention
        && !(divides(p.tp, kv_heads as u64) || divides(kv_heads as u64, p.tp))
    {
        return refuse(format!("tp {} and the {kv_heads} key-value heads do not divide", p.tp));
    }
    if p.tp > c.gpus_per_node {
        return refuse(format!("tp {} is wider than the {} GPUs of a node", p.tp, c.gpus_per_node));
    }
    if !divides(p.tp * p.cp, t.seq_len) {
        return refuse(format!(
            "tp * cp = {} does not divide the sequence of {}",
            p.tp * p.cp,
            t.seq_len
        ));
    }
    match &m.moe {
        Some(moe) => {
            if !divides(p.ep, moe.n_routed_experts as u64) {
                return refuse(format!(
                    "ep {} does not divide the {} routed experts",
                    p.ep, moe.n_routed_experts
                ));
            }
            if !divides(p.ep, p.tp * p.cp * p.dp) {
                let group = p.tp * p.cp * p.dp;
                return refuse(format!(
                    "ep {} does not divide the {group} ranks of tp * cp * dp",
                    p.ep
                ));
            }
        }
        None if p.ep != 1 => {
            return refuse(format!("ep {} on a model without routed experts, expected 1", p.ep));
        }
        None => {}
    }
    if p.zero >= 2 && p.pp > 1 {
        return refuse(format!(
            "zero {} with pp {}: sharded gradients would be reduced after every micro-batch; use zero 1",
            p.zero, p.pp
        ));
    }
    if !divides(p.dp * t.micro_batch, t.global_batch) {
        let share = p.dp * t.micro_batch;
        return refuse(format!(
            "dp * micro_batch = {share} does not divide the global batch of {}",
            t.global_batch
        ));
    }
    if let Some(message) = scenario.lora.as_ref().and_then(|lora| lora.refusal(m)) {
        return refuse(message);
    }
    if scenario.comm_sms >= c.gpu.sms {
        return refuse(format!(
            "comm_sms {} leaves none of the {} SMs",
            scenario.comm_sms, c.gpu.sms
        ));
    }
    if scenario.schedule.shape() == Shape::Loop && !(2..=255).contains(&scenario.interleave) {
        return refuse(format!("interleave is {}, expected 2 to 255", scenario.interleave));
    }
    if p.pp as usize > 4096 || stages(scenario) > 4096 {
        return refuse(format!("{} stages, at most 4096", stages(scenario)));
    }
    // An embedding by itself, and a loss by itself.
    if stages(scenario) > m.layers + 2 {
        return refuse(format!(
            "{} stages for {} layers, every stage but the first and the last needs one",
            stages(scenario),
            m.layers
        ));
    }
    Ok(())
}

/// Work of an average transformer layer, a prediction module and the head, in one unit.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LayerWeights {
    /// A transformer layer.
    pub layer: f64,
    /// A prediction module with its own pass of the head.
    pub mtp: f64,
    /// Output norm, head and loss.
    pub head: f64,
    /// What the first stage's layers are lighter by: those before the first with experts.
    pub spared: f64,
}

impl LayerWeights {
    /// Multiply-accumulates a token, those that run in FP8 counted half, in FP4 a quarter.
    pub fn by_flops(scenario: &Scenario) -> Self {
        let m = &scenario.model;
        let linear = scenario.training.precision.element_bytes() / 2.0;
        let (qk, v) = m.head_dims();
        let core = (m.heads * (qk + v)) as f64 * scenario.training.seq_len as f64 / 2.0;
        let ffn = |dense: bool| match (&m.moe, dense) {
            (Some(moe), false) => m.moe_ffn_params(moe, moe.top_k) as f64,
            _ => m.dense_ffn_params() as f64,
        };
        let layer = |dense: bool| linear * (m.attention_params() as f64 + ffn(dense)) + core;
        let n = m.layers as f64;
        let dense = m.moe.map_or(m.layers, |moe| moe.first_dense.min(m.layers)) as f64;
        let head = (m.hidden_size * m.vocab_size) as f64;
        let projection = linear * (2 * m.hidden_size * m.hidden_size) as f64;
        LayerWeights {
            layer: (layer(true) * dense + layer(false) * (n - dense)) / n,
            mtp: layer(false) + head + projection,
            head,
            spared: 0.0,
        }
    }
}

/// Transformer layers of every stage: as the scenario says, else one after the other to the stage
/// whose rank, then which itself, has the least work; every stage but the last gets at least one.
fn stage_layers(scenario: &Scenario, w: LayerWeights) -> Result<Vec<u64>, SimError> {
    let n = stages(scenario);
    let total = scenario.model.layers as u64;
    if let Some(given) = &scenario.stage_layers {
        if given.len() != n || given.iter().sum::<u64>() != total {
            return Err(SimError::Layout(format!(
                "stage_layers has {} entries with {} layers, expected {n} entries with {total} layers",
                given.len(),
                given.iter().sum::<u64>()
            )));
        }
        return Ok(given.clone());
    }
    if n as u64 > total {
        let mut layers = vec![1; n];
        layers[n - 1] = 0;
        if n as u64 == total + 2 {
            layers[0] = 0;
        }
        return Ok(layers);
    }
    if scenario.stack.stages == StageSplit::Even {
        // The first stages take what is left over.
        let (each, rest) = (total / n as u64, total % n as u64);
        return Ok((0..n as u64).map(|stage| each + u64::from(stage < rest)).collect());
    }
    let geometry = geometry(scenario);
    let mut layers = vec![1u64; n];
    let mut work = vec![w.layer; n];
    work[n - 1] += w.head + w.mtp * scenario.model.mtp_depth as f64;
    work[0] -= w.spared;
    if n > 1 {
        layers[n - 1] = 0;
        work[n - 1] -= w.layer;
    }
    let partners: Vec<Vec<usize>> = (0..n).map(|stage| geometry.partners(stage)).collect();
    let mut rank_work: Vec<f64> =
        partners.iter().map(|held| held.iter().map(|&q| work[q]).sum()).collect();
    for _ in 0..total - layers.iter().sum::<u64>() {
        let lighter = |a: usize, b: usize| {
            let (a, b) = ((rank_work[a], work[a]), (rank_work[b], work[b]));
            a < b
        };
        let best = (1..n).fold(0, |best, s| if lighter(s, best) { s } else { best });
        layers[best] += 1;
        work[best] += w.layer;
        for &q in &partners[best] {
            rank_work[q] += w.layer;
        }
    }
    Ok(layers)
}

/// Places the scenario's layers on its stages, balanced by `weights`. `scenario` must have passed
/// [`check`].
pub fn place(scenario: &Scenario, weights: LayerWeights) -> Result<Placement, SimError> {
    Ok(placed(scenario, stage_layers(scenario, weights)?))
}

/// The layers on stages that hold so many transformer layers each, the embedding before them,
/// prediction modules and head behind.
fn placed(scenario: &Scenario, layers: Vec<u64>) -> Placement {
    let m = &scenario.model;
    let mut next = 0u64;
    let mut stages = Vec::with_capacity(layers.len());
    for count in layers {
        let kind = |i: u64| if m.is_moe(i as usize) { LayerKind::Moe } else { LayerKind::Dense };
        stages.push(
            (next..next + count)
                .map(|index| PlacedLayer { kind: kind(index), index })
                .collect::<Vec<_>>(),
        );
        next += count;
    }
    stages[0].insert(0, PlacedLayer { kind: LayerKind::Embedding, index: 0 });
    let last = stages.last_mut().expect("at least one stage");
    last.extend(
        (m.layers..m.layers + m.mtp_depth)
            .map(|i| PlacedLayer { kind: LayerKind::Mtp, index: i as u64 }),
    );
    last.push(PlacedLayer { kind: LayerKind::Head, index: 0 });
    Placement { stages, ranks: scenario.parallel.pp as usize }
}

/// Most layers that what follows the last transformer layer may count for.
const HEAVIEST_END: u64 = 8;

/// Most splits of which every one is tried.
const FEW: usize = 256;

/// Every way to deal `layers` to `stages` one after the other where there are at most [`FEW`]: each
/// stage but the last gets one at least. None where there are more.
fn every_split(layers: u64, stages: usize) -> Option<Vec<Vec<u64>>> {
    if stages == 1 {
        return Some(vec![vec![layers]]);
    }
    let mut all = Vec::new();
    for first in 1..=layers.saturating_sub(stages as u64 - 2) {
        for mut rest in every_split(layers - first, stages - 1)? {
            rest.insert(0, first);
            all.push(rest);
        }
        if all.len() > FEW {
            return None;
        }
    }
    Some(all)
}

/// The splits of layers into stages that may be the fastest: all, where they are few; else for
/// every weight of prediction module and head, from none to eight layers by quarters, with the
/// dense layers before the experts as heavy as the others or half as heavy, the one whose busiest
/// rank has the least work. They do not depend on the hardware, so that the best of them is no
/// slower on a faster one. One where the
/// scenario or its stack says how layers are split. `scenario` must have passed [`check`].
pub fn placements(scenario: &Scenario) -> Result<Vec<Placement>, SimError> {
    let m = &scenario.model;
    let given = scenario.stage_layers.is_some() || scenario.stack.stages == StageSplit::Even;
    let all = || every_split(m.layers as u64, stages(scenario));
    if let Some(all) = (!given && stages(scenario) <= m.layers).then(all).flatten() {
        return Ok(all.into_iter().map(|layers| placed(scenario, layers)).collect());
    }
    let dense = m.moe.map_or(0, |moe| moe.first_dense.min(m.layers)) as f64;
    let light: &[f64] = if dense > 0.0 { &[0.0, 0.5] } else { &[0.0] };
    let mut found = Vec::new();
    for spared in light.iter().map(|share| share * dense) {
        for quarters in 0..=4 * HEAVIEST_END {
            let end = quarters as f64 / 4.0;
            let mtp = end / 2.0 / m.mtp_depth.max(1) as f64;
            let head = if m.mtp_depth > 0 { end / 2.0 } else { end };
            let layers = stage_layers(scenario, LayerWeights { layer: 1.0, mtp, head, spared })?;
            if !found.contains(&layers) {
                found.push(layers);
            }
        }
    }
    Ok(found.into_iter().map(|layers| placed(scenario, layers)).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// MTP and head together weigh 3.3 layers.
    const WEIGHTS: LayerWeights = LayerWeights { layer: 1.0, mtp: 2.2, head: 1.1, spared: 0.0 };

    fn v3() -> Scenario {
        Scenario::preset("deepseek-v3-h800-2048", &[]).unwrap()
    }

    fn counts(placement: &Placement) -> Vec<usize> {
        let layer = |l: &&PlacedLayer| matches!(l.kind, LayerKind::Dense | LayerKind::Moe);
        placement.stages.iter().map(|s| s.iter().filter(layer).count()).collect()
    }

    #[test]
    fn v3_pairs_the_heavy_last_stage_with_a_light_first_rank() {
        let s = v3();
        check(&s).unwrap();
        let placement = place(&s, WEIGHTS).unwrap();
        let n = counts(&placement);
        assert_eq!(n.iter().sum::<usize>(), 61);
        // Its rank holds 5 other layers, all other ranks 8.
        for r in 1..8 {
            assert_eq!(n[r] + n[15 - r], 8, "{n:?}");
        }
        assert_eq!(n[0] + n[15], 5, "{n:?}");
        assert_eq!(placement.stages[0][0].kind, LayerKind::Embedding);
        assert_eq!(placement.stages[0][1].kind, LayerKind::Dense);
        let last: Vec<LayerKind> =
            placement.stages[15].iter().rev().take(2).map(|l| l.kind).collect();
        assert_eq!(last, [LayerKind::Head, LayerKind::Mtp]);
    }

    #[test]
    fn layers_of_a_stage_can_be_given() {
        let mut s = v3();
        s.stage_layers = Some([vec![4; 15], vec![1]].concat());
        assert_eq!(counts(&place(&s, WEIGHTS).unwrap()), [vec![4; 15], vec![1]].concat());
        s.stage_layers = Some(vec![4; 16]);
        assert!(
            place(&s, WEIGHTS)
                .unwrap_err()
                .to_string()
                .contains("64 layers, expected 16 entries with 61")
        );
    }

    #[test]
    fn embedding_and_loss_may_have_stages_of_their_own() {
        let mut s = v3();
        (s.model.layers, s.model.mtp_depth) = (14, 0);
        let n = counts(&place(&s, WEIGHTS).unwrap());
        assert_eq!(n, [vec![0], vec![1; 14], vec![0]].concat());
        let stages = place(&s, WEIGHTS).unwrap().stages;
        let kinds = |stage: usize| stages[stage].iter().map(|l| l.kind).collect::<Vec<_>>();
        assert_eq!((kinds(0), kinds(15)), (vec![LayerKind::Embedding], vec![LayerKind::Head]));
        s.model.layers = 15;
        assert_eq!(counts(&place(&s, WEIGHTS).unwrap()), [vec![1; 15], vec![0]].concat());
        s.model.layers = 13;
        assert!(check(&s).unwrap_err().to_string().contains("16 stages for 13 layers"));
    }

    /// 7 layers on 3 stages, the last with a head of two layers: by all splits of 7 into three.
    #[test]
    fn the_busiest_rank_is_as_light_as_any_split_makes_it() {
        let mut s = Scenario::preset("llama-3.1-405b-h100-16384", &[]).unwrap();
        s.schedule = fathom_schedule::ScheduleKind::OneFOneB;
        for (layers, pp, head) in [(7, 3, 2.0), (12, 5, 0.5), (9, 4, 3.3), (20, 6, 1.7)] {
            (s.model.layers, s.parallel.pp) = (layers, pp as u64);
            let weights = LayerWeights { layer: 1.0, mtp: 0.0, head, spared: 0.0 };
            let work = |n: &[usize]| {
                let last = *n.last().unwrap() as f64 + head;
                n[..n.len() - 1].iter().map(|&k| k as f64).fold(last, f64::max)
            };
            let ours = work(&counts(&place(&s, weights).unwrap()));
            // The last stage may hold the head alone.
            let without = |n: Vec<usize>| [n, vec![0]].concat();
            let all = compositions(layers, pp)
                .into_iter()
                .chain(compositions(layers, pp - 1).into_iter().map(without));
            let best = all.map(|n| work(&n)).fold(f64::INFINITY, f64::min);
            assert!((ours - best).abs() < 1e-9, "{layers} on {pp}: {ours} against {best}");
        }
    }

    /// Every way to write `sum` as `parts` positive numbers in order.
    fn compositions(sum: usize, parts: usize) -> Vec<Vec<usize>> {
        if parts == 1 {
            return if sum > 0 { vec![vec![sum]] } else { Vec::new() };
        }
        let longer = |first: usize| {
            compositions(sum - first, parts - 1)
                .into_iter()
                .map(move |rest| [vec![first], rest].concat())
        };
        (1..sum).flat_map(longer).collect()
    }

    #[test]
    fn illegal_layouts_are_refused_with_the_reason() {
        type Change = fn(&mut Scenario);
        let cases: [(Change, &str); 11] = [
            (|s| s.parallel.dp = 64, "= 1024 ranks, the cluster has 2048 GPUs"),
            (|s| s.parallel.ep = 48, "ep 48 does not divide the 256 routed experts"),
            (|s| s.parallel.ep = 256, "ep 256 does not divide the 128 ranks"),
            (|s| (s.parallel.tp, s.parallel.dp) = (16, 8), "wider than the 8 GPUs of a node"),
            (|s| s.parallel.zero = 2, "use zero 1"),
            (|s| s.parallel.zero = 4, "parallel.zero: expected 0 to 3, found 4"),
            (|s| s.training.global_batch = 15000, "does not divide the global batch"),
            (|s| s.comm_sms = 132, "leaves none of the 132 SMs"),
            (
                |s| (s.parallel.pp, s.parallel.dp, s.parallel.ep) = (64, 32, 32),
                "64 stages for 61 layers",
            ),
            (|s| s.parallel.pp = 0, "parallel.pp: expected 1 to 4096, found 0"),
            (|s| s.training.seq_len = 0, "training.seq_len: expected 1 to 16777216"),
        ];
        for (change, reason) in cases {
            let mut s = v3();
            change(&mut s);
            let e = check(&s).unwrap_err().to_string();
            assert!(e.contains(reason), "expected '{reason}', found '{e}'");
        }
    }

    #[test]
    fn a_batch_too_small_for_dualpipe_is_refused() {
        let mut s = v3();
        s.training.global_batch = 3072;
        assert!(schedule(&s).unwrap_err().to_string().contains("at least 2P = 32"));
    }
}
