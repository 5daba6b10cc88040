//! The memory of a real training step, as Linux counts it, beside what `inspect` predicts:
//! `cargo run --release -p fathom-benches --example peak_memory`, each mode in a process of its
//! own, with the program's allocator and its settings. The goal is a ratio of 1.2.

use std::process::Command;

use fathom_config::ModelConfig;
use fathom_reference::backend::Reference;
use fathom_reference::inspect::{self, Policy};
use fathom_reference::model::{Batch, Model, StepSettings};
use fathom_reference::optim::{OptimConfig, Optimizer};
use fathom_reference::precision::{Mode, Recipe};
use fathom_trace::Parallel;

/// As in the program.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// As in the program, which sets them before `main`.
const OPTIONS: [(&str, &str); 2] =
    [("MIMALLOC_ARENA_EAGER_COMMIT", "0"), ("MIMALLOC_PURGE_DELAY", "50")];

const MODES: [Mode; 3] = [Mode::Fp8, Mode::Bf16, Mode::Fp32];

/// Some ten million parameters: large beside the program and the allocator's slack.
fn config() -> ModelConfig {
    let mut config = ModelConfig::preset("small").unwrap();
    (config.layers, config.vocab_size, config.hidden_size) = (3, 4096, 384);
    config.intermediate_size = 1536;
    config.moe.as_mut().unwrap().intermediate_size = 256;
    config
}

/// The most memory that the process ever had, since the last call; Linux's proc(5).
fn peak_bytes() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|l| l.starts_with("VmHWM:")).unwrap();
    let kilobytes: u64 = line.split_whitespace().nth(1).unwrap().parse().unwrap();
    std::fs::write("/proc/self/clear_refs", "5").unwrap();
    1024 * kilobytes
}

fn train_one_step(mode: Mode, batch: &Batch) {
    let config = config();
    let model = Model::new(&config, Recipe::new(mode), Parallel::default(), 0).unwrap();
    let backend = Reference;
    let mut params = model.init(&backend, 1).unwrap();
    let mut optimizer = Optimizer::new(&OptimConfig::default(), &model, &backend).unwrap();
    let weights = model.weights(&backend, &params).unwrap();
    let device = model.batch(&backend, batch).unwrap();
    let settings = StepSettings::of(batch, config.mtp_depth, 0.3);
    let mut gradients = model.zero_gradients(&backend).unwrap();
    peak_bytes();
    model.step(&backend, &weights, &device, &settings, &mut gradients).unwrap();
    drop(weights);
    let gradients = model.finish_gradients(&backend, gradients).unwrap();
    let clip = optimizer.clip(&model, &backend, &gradients).unwrap();
    optimizer.update(&model, &backend, &mut params, gradients, (&clip, 1e-3)).unwrap();
}

fn main() {
    let asked = std::env::args().nth(1);
    let Some(mode) = MODES.iter().find(|mode| Some(mode.name()) == asked.as_deref()) else {
        for mode in MODES {
            let mut own = Command::new(std::env::current_exe().unwrap());
            for (name, value) in OPTIONS {
                if std::env::var_os(name).is_none() {
                    own.env(name, value);
                }
            }
            assert!(own.arg(mode.name()).status().unwrap().success());
        }
        return;
    };
    let (sequences, length) = (4, 256);
    let sequence: Vec<u32> = (0..length as u32).map(|i| i * 37 % 4096).collect();
    let batch = Batch::from_sequences(&vec![sequence; sequences]);
    train_one_step(*mode, &batch);
    let peak = peak_bytes();
    let policies = inspect::by_policy(&config(), *mode, sequences, length).unwrap();
    let Policy { training_bytes, .. } = policies[0];
    let ratio = peak as f64 / training_bytes as f64;
    println!("{}: peak {peak} bytes, predicted {training_bytes}, ratio {ratio:.3}", mode.name());
}
