//! The simulator's speed: a full DeepSeek-V3 step, the same layout on 100,352 GPUs, a search, and
//! seconds of serving.
//!
//! `cargo bench -p fathom-benches --bench simulator`. The goals: a step in at most 20 ms on one
//! core, 100,352 GPUs in at
//! most 5 times that, 10,000 layouts in at most 10 s on two cores, a second of 320 GPUs that decode
//! in at most 100 ms.

use criterion::{BatchSize, Criterion, criterion_group, criterion_main};
use fathom_conformance::inference::InferenceCode;
use fathom_conformance::model_code::ModelCode;
use fathom_simulator::config::Scenario;
use fathom_simulator::events::Detail;
use fathom_simulator::first_principles::FirstPrinciples;
use fathom_simulator::kernel_time::Constants;
use fathom_simulator::search::search;
use fathom_simulator::serve::config::ServeScenario;
use fathom_simulator::serve::engine::Engine;
use fathom_simulator::serve::requests::Requests;
use fathom_simulator::serve::run::prepare;
use fathom_simulator::step::simulate;

fn v3() -> Scenario {
    Scenario::preset("deepseek-v3-h800-2048", &[]).expect("an embedded scenario")
}

fn steps(criterion: &mut Criterion) {
    let model = FirstPrinciples::new(ModelCode);
    let mut large = v3();
    large.cluster.gpus = 100_352;
    large.parallel.dp = 6_272;
    large.training.global_batch = 120 * 6_272;
    let mut group = criterion.benchmark_group("step");
    for (name, scenario) in [("2048 GPUs", v3()), ("100352 GPUs", large)] {
        let run = |detail| simulate(&scenario, &model, detail).expect("a legal layout");
        group.bench_function(name, |b| b.iter(|| run(Detail::Instructions)));
        group.bench_function(format!("{name}, every part kept"), |b| b.iter(|| run(Detail::Parts)));
    }
    group.finish();
}

fn searches(criterion: &mut Criterion) {
    let model = FirstPrinciples::new(ModelCode);
    let scenario = v3();
    let found = search(&scenario, &model, true, &|_, _| ()).expect("legal layouts");
    let name = format!("search of {} layouts, {} simulated", found.considered, found.simulated);
    let mut group = criterion.benchmark_group("search");
    group.sample_size(10);
    group.bench_function(name, |b| b.iter(|| search(&scenario, &model, true, &|_, _| ())));
    group.finish();
}

/// Ten seconds of a unit of 320 GPUs with 11,200 requests in their answers, the start included.
fn serving(criterion: &mut Criterion) {
    let set = ["duration_s=10".to_owned(), "warmup_s=0".to_owned()];
    let scenario = ServeScenario::preset("deepseek-v3-decode-h800-320", &set).expect("a preset");
    let ready = prepare(&scenario, &InferenceCode, Constants::FITTED).expect("a legal layout");
    let start = || {
        let requests = Requests::of(&scenario).expect("no trace");
        Engine::new(&scenario, ready.pools.clone(), requests)
    };
    let mut group = criterion.benchmark_group("serving");
    group.sample_size(20);
    group.bench_function("ten seconds of 320 GPUs", |b| {
        b.iter_batched(start, |engine| engine.run(false), BatchSize::LargeInput)
    });
    group.finish();
}

criterion_group!(benches, steps, searches, serving);
criterion_main!(benches);
