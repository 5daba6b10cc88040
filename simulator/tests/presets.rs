//! The embedded scenarios: snapshots of their numbers (wall time redacted), and properties of the
//! whole simulator.

#[path = "../../conformance/src/model_code.rs"]
mod model_code;

use fathom_simulator::config::{SCENARIOS, Scenario};
use fathom_simulator::events::Detail;
use fathom_simulator::first_principles::FirstPrinciples;
use fathom_simulator::parallel::{PlacedLayer, Placement, placements};
use fathom_simulator::report::sensitivity::SLIDERS;
use fathom_simulator::step::simulate;
use fathom_simulator::times::LayerKind;
use model_code::ModelCode;
use proptest::prelude::*;
use serde_json::Value;

/// Six digits: what a reader compares, not the last bit of a mathematics library.
fn rounded(value: Value) -> Value {
    match value {
        Value::Number(n) if n.is_f64() => {
            let digits = format!("{:.5e}", n.as_f64().unwrap());
            serde_json::from_str(&digits).unwrap()
        }
        Value::Array(items) => Value::Array(items.into_iter().map(rounded).collect()),
        Value::Object(map) => {
            Value::Object(map.into_iter().map(|(k, v)| (k, rounded(v))).collect())
        }
        other => other,
    }
}

#[test]
fn numbers_of_the_presets() {
    for (name, _) in SCENARIOS {
        let scenario = Scenario::preset(name, &[]).unwrap();
        let sim = simulate(&scenario, &FirstPrinciples::new(ModelCode), Detail::Totals).unwrap();
        let mut report = serde_json::to_value(&sim.report).unwrap();
        report["wall_s"] = "redacted".into();
        insta::assert_json_snapshot!(format!("preset-{name}"), rounded(report));
    }
}

fn step_s(scenario: &Scenario) -> f64 {
    let model = FirstPrinciples::new(ModelCode);
    simulate(scenario, &model, Detail::Totals).unwrap().report.step_time_s
}

/// Rates are better when higher, latencies when lower.
fn improved(mut scenario: Scenario, slider: usize, factor: f64) -> Scenario {
    let (key, field) = SLIDERS[slider];
    *field(&mut scenario) *= if key.contains("latency") { 1.0 / factor } else { factor };
    scenario
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    /// More bandwidth, more FLOPS or less latency never makes a step slower, on any preset.
    #[test]
    fn better_hardware_is_never_slower(
        preset in 0..SCENARIOS.len(), slider in 0..SLIDERS.len(), start in 0.3f64..3.0, more in 1.0f64..4.0,
    ) {
        let base = Scenario::preset(SCENARIOS[preset].0, &[]).unwrap();
        let base = improved(base, slider, start);
        let better = improved(base.clone(), slider, more);
        prop_assert!(step_s(&better) <= step_s(&base) * (1.0 + 1e-9), "{}", SLIDERS[slider].0);
    }

    /// Nothing is lost on any preset, however fast its parts are: the parts of a step are the step,
    /// the stages hold every layer and prediction module once, the day's tokens are those of its
    /// steps.
    #[test]
    fn what_a_step_consists_of_adds_up(
        preset in 0..SCENARIOS.len(), slider in 0..SLIDERS.len(), factor in 0.1f64..10.0, batches in 1u64..4,
    ) {
        let mut s = improved(Scenario::preset(SCENARIOS[preset].0, &[]).unwrap(), slider, factor);
        s.training.global_batch *= batches;
        let r = simulate(&s, &FirstPrinciples::new(ModelCode), Detail::Totals).unwrap().report;
        prop_assert!((r.breakdown_s.total() / r.step_time_s - 1.0).abs() < 1e-9);
        let layers = s.model.layers + s.model.mtp_depth;
        prop_assert_eq!(r.stage_layers.iter().sum::<usize>(), layers);
        let tokens = (s.training.global_batch * s.training.seq_len) as f64;
        let steps = 86_400.0 / r.step_time_s;
        prop_assert!((r.tokens_per_day / (tokens * steps) - 1.0).abs() < 1e-9);
        let rate = r.tokens_per_s_per_gpu * s.cluster.gpus as f64;
        prop_assert!((rate * r.step_time_s / tokens - 1.0).abs() < 1e-9);
    }
}

/// A split that is not played is no faster: against all that may be the fastest, each played by
/// itself.
#[test]
fn the_split_that_is_taken_is_the_fastest_of_those_that_may_be() {
    for set in [
        &["parallel.dp=128"][..],
        &["schedule=\"1f1b\"", "cluster.gpu.memory_bytes=200000000000"],
        &["schedule=\"zb1p\"", "expert_load.deviation=0.0"],
        &["schedule=\"interleaved\"", "training.global_batch=16384", "expert_load.deviation=0.3"],
        &["schedule=\"dualpipev\"", "cluster.gpu.memory_bytes=60000000000"],
    ] {
        let set: Vec<String> = set.iter().map(|s| (*s).to_owned()).collect();
        let s = Scenario::preset("deepseek-v3-h800-2048", &set).unwrap();
        let run = |s: &Scenario| {
            let sim = simulate(s, &FirstPrinciples::new(ModelCode), Detail::Totals).unwrap();
            (!sim.memory.fits(), sim.report.step_time_s)
        };
        let taken = run(&s);
        let all = placements(&s).unwrap();
        assert!(all.len() > 5, "{set:?}: {} splits", all.len());
        let one = |placement: &Placement| {
            let inner = |l: &&PlacedLayer| matches!(l.kind, LayerKind::Dense | LayerKind::Moe);
            let count = |stage: &Vec<PlacedLayer>| stage.iter().filter(inner).count() as u64;
            let stage_layers = Some(placement.stages.iter().map(count).collect());
            run(&Scenario { stage_layers, ..s.clone() })
        };
        let best =
            all.iter().map(one).fold((true, f64::INFINITY), |a, b| if b < a { b } else { a });
        assert_eq!(taken, best, "{set:?}");
    }
}

/// The same layout on 49 times the GPUs: only the gradient reduction grows.
#[test]
fn a_hundred_thousand_gpus_take_the_same_pipeline() {
    let small = Scenario::preset("deepseek-v3-h800-2048", &[]).unwrap();
    let mut large = small.clone();
    large.cluster.gpus = 100_352;
    large.parallel.dp = 6_272;
    large.training.global_batch = 120 * 6_272;
    let (a, b) = (step_s(&small), step_s(&large));
    assert!(b >= a && b < 1.05 * a, "{a} s on 2048, {b} s on 100352");
}

/// Every way to deal `layers` to `stages` one after the other; the last may have none.
fn splits(layers: u64, stages: usize) -> Vec<Vec<u64>> {
    if stages == 1 {
        return vec![vec![layers]];
    }
    let first = 1..=layers.saturating_sub(stages as u64 - 2);
    first
        .flat_map(|n| {
            splits(layers - n, stages - 1).into_iter().map(move |rest| [vec![n], rest].concat())
        })
        .collect()
}

/// Where splits are few, the one that is taken is the fastest of all there are, played one by one.
#[test]
fn of_few_splits_into_stages_the_fastest_is_taken() {
    for (preset, set) in [
        ("deepseek-v3-h800-2048", &["schedule=\"1f1b\"", "parallel.dp=512"][..]),
        ("deepseek-v3-h800-2048", &["schedule=\"dualpipe\"", "parallel.dp=512"][..]),
        ("deepseek-v3-b200-2048", &["schedule=\"zb1p\"", "parallel.dp=512"][..]),
        ("llama-3.1-405b-h100-16384", &["schedule=\"1f1b\"", "parallel.dp=512"][..]),
        ("qwen2.5-72b-a100-2048", &["schedule=\"1f1b\"", "parallel.tp=1", "parallel.dp=512"][..]),
    ] {
        let cut = ["parallel.pp=4", "model.layers=11", "training.global_batch=8192"];
        let read = |more: &[String]| {
            let set = set.iter().chain(&cut).map(|s| (*s).to_owned());
            Scenario::preset(preset, &set.chain(more.iter().cloned()).collect::<Vec<_>>()).unwrap()
        };
        let ours = step_s(&read(&[]));
        for split in splits(11, 4) {
            let theirs = step_s(&read(&[format!("stage_layers={split:?}")]));
            assert!(ours <= theirs, "{preset}: {ours} s, {split:?} {theirs} s");
        }
    }
}

/// Where they are many, no layer moved from one stage to another makes the step faster by two
/// hundredths, whatever is moved where; 1.4 of them is the most that is known, by DualPipe's.
#[test]
fn of_many_splits_no_neighbour_of_the_one_taken_is_faster_by_two_hundredths() {
    for (preset, set) in [
        ("deepseek-v3-h800-2048", &["expert_load.deviation=0.0"][..]),
        ("deepseek-v3-h800-2048", &["schedule=\"1f1b\"", "expert_load.deviation=0.0"]),
        ("llama-3.1-405b-h100-16384", &["schedule=\"1f1b\""]),
        ("qwen2.5-72b-a100-2048", &[]),
    ] {
        let set: Vec<String> = set.iter().map(|s| (*s).to_owned()).collect();
        let mut s = Scenario::preset(preset, &set).unwrap();
        let model = FirstPrinciples::new(ModelCode);
        let run = |s: &Scenario| simulate(s, &model, Detail::Totals).unwrap();
        let sim = run(&s);
        let inner = |l: &&PlacedLayer| matches!(l.kind, LayerKind::Dense | LayerKind::Moe);
        let stages = sim.placement.stages.iter();
        let taken: Vec<u64> =
            stages.map(|stage| stage.iter().filter(inner).count() as u64).collect();
        for from in 0..taken.len() {
            for to in (0..taken.len()).filter(|&to| to != from && taken[from] > 0) {
                let mut split = taken.clone();
                (split[from], split[to]) = (split[from] - 1, split[to] + 1);
                s.stage_layers = Some(split.clone());
                let step_s = run(&s).report.step_time_s;
                let ours = sim.report.step_time_s;
                assert!(ours <= step_s * 1.02, "{preset}: {ours} s, {split:?} {step_s} s");
            }
        }
    }
}
