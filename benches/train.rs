//! Forward and backward of one micro-batch by the reference backend, in tokens a second: the models
//! of `models/` in every precision mode. `pytorch.py` measures PyTorch on the same files.

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use fathom_config::ModelConfig;
use fathom_numerics::philox::Philox;
use fathom_reference::backend::Reference;
use fathom_reference::model::{Batch, Model, StepSettings};
use fathom_reference::precision::{Mode, Recipe};
use fathom_trace::Parallel;

/// As in the program.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

const MODELS: [&str; 2] = ["v3-1m", "v3-8m"];
const SEQUENCES: usize = 8;
const LENGTH: usize = 128;

fn config(name: &str) -> ModelConfig {
    let path = format!("{}/models/{name}/config.json", env!("CARGO_MANIFEST_DIR"));
    ModelConfig::from_hf_file(path.as_ref()).unwrap()
}

fn batch(vocab: usize) -> Batch {
    let random = Philox::new(7, 0);
    let mut words = vec![0u32; SEQUENCES * LENGTH];
    random.words(0, &mut words);
    let tokens: Vec<u32> = words.iter().map(|w| w % vocab as u32).collect();
    Batch::from_sequences(&tokens.chunks(LENGTH).map(<[u32]>::to_vec).collect::<Vec<_>>())
}

fn steps(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("train_step");
    group.throughput(Throughput::Elements((SEQUENCES * LENGTH) as u64)).sample_size(10);
    for name in MODELS {
        let config = config(name);
        let batch = batch(config.vocab_size);
        for mode in [Mode::Fp32, Mode::Bf16, Mode::Fp8] {
            let model = Model::new(&config, Recipe::new(mode), Parallel::default(), 0).unwrap();
            let params = model.init(&Reference, 1).unwrap();
            let settings = StepSettings::of(&batch, 0, 0.0);
            group.bench_function(BenchmarkId::new(name, mode.name()), |b| {
                b.iter(|| {
                    let weights = model.weights(&Reference, &params).unwrap();
                    let device = model.batch(&Reference, &batch).unwrap();
                    let mut grads = model.zero_gradients(&Reference).unwrap();
                    model.step(&Reference, &weights, &device, &settings, &mut grads).unwrap();
                    model.finish_gradients(&Reference, grads).unwrap()
                });
            });
        }
    }
    group.finish();
}

criterion_group!(benches, steps);
criterion_main!(benches);
