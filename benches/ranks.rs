//! Training on ranks against the same training in one process, in turns: tokens a second, what a
//! rank's bookkeeping costs, and how fast rows move. `docs/performance.md` has the figures.
//!
//! `cargo bench -p fathom-benches --bench ranks`

use std::sync::Arc;
use std::time::{Duration, Instant};

use fathom_reference::Tensor;
use fathom_reference::backend::Reference;
use fathom_reference::exchange::threads::{self, End};
use fathom_reference::exchange::{Communicator, Exchange, ExchangeError};
use fathom_reference::train::ranks::{RankTrainer, Shared};
use fathom_reference::train::{Runner, Setting, StepOutcome, TrainConfig, TrainError, Trainer};

/// As in the program.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

const ROUNDS: usize = 5;
const STEPS: usize = 3;

fn config(layout: &[&str]) -> TrainConfig {
    let run =
        ["model.layers=4", "grad_shards=2", "schedule.batch=16", "micro_batch=2", "steps=100"];
    let set: Vec<Setting> = [&run[..], layout].concat().into_iter().map(Setting::set).collect();
    TrainConfig::preset("tiny", &set).unwrap_or_else(|e| panic!("{layout:?}: {e}"))
}

/// CPU seconds that this process has used.
fn cpu_seconds() -> f64 {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
    let fields: Vec<&str> = stat.rsplit(')').next().unwrap_or("").split_whitespace().collect();
    let ticks = |i: usize| fields.get(i).and_then(|t| t.parse::<f64>().ok()).unwrap_or(0.0);
    (ticks(11) + ticks(12)) / 100.0
}

/// Clock and CPU seconds of a step, and the seconds that a rank waited in the pipeline; the first
/// step is not counted.
type Times = (f64, f64, f64);

fn done(outcome: StepOutcome) -> f64 {
    match outcome {
        StepOutcome::Done(log) => log.bubble_seconds.unwrap_or_default(),
        other => panic!("{other:?}"),
    }
}

fn one() -> Times {
    let mut trainer = Trainer::new(config(&[]), Reference).unwrap();
    done(trainer.step(&|| false).unwrap());
    let (begin, cpu) = (Instant::now(), cpu_seconds());
    (0..STEPS).for_each(|_| {
        done(trainer.step(&|| false).unwrap());
    });
    let a_step = |x: f64| x / STEPS as f64;
    (a_step(begin.elapsed().as_secs_f64()), a_step(cpu_seconds() - cpu), 0.0)
}

/// Ranks as threads, each with its share of this pool's threads; also a world of one, which is what
/// a rank's bookkeeping costs.
fn many(layout: &[&str]) -> Times {
    let shared = Shared::open(config(layout), None).unwrap();
    let world = shared.config.parallel.world();
    let main = move |exchange| {
        let mut trainer = RankTrainer::new(&shared, Reference, exchange)?;
        done(trainer.step(&|| false)?);
        let (begin, cpu) = (Instant::now(), cpu_seconds());
        let mut bubble = 0.0;
        for _ in 0..STEPS {
            bubble += done(trainer.step(&|| false)?);
        }
        let a_step = |x: f64| x / STEPS as f64;
        let times = (begin.elapsed().as_secs_f64(), cpu_seconds() - cpu);
        Ok::<Times, TrainError>((a_step(times.0), a_step(times.1), a_step(bubble)))
    };
    match threads::run(world, Duration::from_secs(600), main, &mut || ()).remove(0) {
        End::Returned(Ok(times)) => times,
        other => panic!("{other:?}"),
    }
}

fn median(mut of: Vec<f64>) -> f64 {
    of.sort_by(f64::total_cmp);
    of[of.len() / 2]
}

/// Bytes a second that two ranks exchange, each copying what it sends and reading what comes.
fn rows() -> f64 {
    let (rows, width, rounds) = (4096, 7168, 10);
    let main = move |exchange: Arc<dyn Exchange>| {
        let all = Communicator::new(&exchange, "rows", &[0, 1]);
        let own = vec![1.5f32; rows * width / 2];
        let (begin, mut sum) = (Instant::now(), 0u64);
        for _ in 0..rounds {
            let part = vec![Tensor::from_vec(&[rows, width / 2], own.clone())];
            let mut sent = vec![part, Vec::new()];
            sent.rotate_left(1 - all.index());
            for tensor in all.all_to_all("rows", sent)?.into_iter().flatten() {
                // A byte of every line of the cache, the one with the exponents.
                let read = tensor.bytes().iter().skip(3).step_by(64);
                sum += read.map(|&b| u64::from(b)).sum::<u64>();
            }
        }
        assert!(sum > 0);
        Ok::<_, ExchangeError>(begin.elapsed().as_secs_f64())
    };
    let ends = threads::run(2, Duration::from_secs(600), main, &mut || ());
    let seconds = ends.into_iter().map(|end| match end {
        End::Returned(Ok(seconds)) => seconds,
        other => panic!("{other:?}"),
    });
    let bytes = (rows * width / 2 * 4 * rounds) as f64;
    2.0 * bytes / seconds.fold(0.0, f64::max)
}

fn main() {
    // `cargo test --benches` runs this too, and measures nothing.
    if std::env::args().any(|arg| arg == "--test") {
        return;
    }
    let dp = ["parallel.dp=2"];
    let dual = ["parallel.pp=2", "parallel.schedule=\"dualpipe\""];
    let mut found: [Vec<Times>; 4] = Default::default();
    for _ in 0..ROUNDS {
        // As the program does: the step's loops then begin on a thread of the pool.
        found[0].push(rayon::scope(|_| one()));
        found[1].push(many(&[]));
        found[2].push(many(&dp));
        found[3].push(many(&dual));
    }
    let tokens = 16.0 * 128.0;
    let names = ["one process", "one rank", "dp 2", "pp 2, DualPipe"];
    println!("{:<16}{:>12}{:>10}{:>12}{:>10}", "", "tokens/s", "of one", "CPU s/step", "of one");
    for (i, name) in names.into_iter().enumerate() {
        let ratio = |of: fn(&Times) -> f64| {
            let pairs = found[0].iter().zip(&found[i]);
            median(pairs.map(|(one, this)| of(this) / of(one)).collect())
        };
        let clock = median(found[i].iter().map(|t| t.0).collect());
        let cpu = median(found[i].iter().map(|t| t.1).collect());
        let (speed, work) = (1.0 / ratio(|t| t.0), ratio(|t| t.1));
        let tokens = tokens / clock;
        println!("{name:<16}{tokens:>12.0}{speed:>10.3}{cpu:>12.3}{work:>10.3}");
    }
    let bubble = median(found[3].iter().map(|t| t.2 / t.0).collect());
    println!("DualPipe's bubble: {:.1} % of the step", 100.0 * bubble);
    println!("rows between two ranks: {:.1} GB/s", median((0..5).map(|_| rows()).collect()) / 1e9);
}
