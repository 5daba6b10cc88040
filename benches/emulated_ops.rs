//! Every op's kernels on the emulated driver beside the op of the reference, on the cases on which
//! docs/kernels.md measures bytes, all checks off and on one thread, best of three. The goal is at
//! most twice the reference's time for attention and products. Prints the table of
//! docs/performance.md; also checks the bits.
//!
//! `cargo bench -p fathom-benches --bench emulated_ops [-- OP ..]` (Linux; needs NVRTC)

use std::process::ExitCode;

use fathom_benches::process_seconds;
use fathom_conformance::quality::cases;
use fathom_gpu::{CudaEngine, DeviceKind, Gpu};
use fathom_libcuda::{Choices, prepare};
use fathom_reference::op::ReferenceEngine;
use fathom_reference::{Case, Engine, Outputs};

/// Runs of which the fastest counts; the emulated driver has one more before, which compiles.
const RUNS: usize = 3;

fn fastest(engine: &dyn Engine, case: &Case) -> (f64, Outputs) {
    let run = || {
        let before = process_seconds();
        let outputs = engine.run(case).unwrap_or_else(|e| panic!("{}: {e}", case.op.name()));
        (process_seconds() - before, outputs)
    };
    run();
    (0..RUNS).map(|_| run()).min_by(|a, b| a.0.total_cmp(&b.0)).expect("some runs")
}

fn main() -> ExitCode {
    if fathom_gpu::nvrtc::find().is_none() {
        eprintln!("SKIPPED: NVRTC is not here (`fathom kernels fetch-nvrtc`, or set FATHOM_NVRTC)");
        return ExitCode::SUCCESS;
    }
    let one = std::env::var("RAYON_NUM_THREADS").is_ok_and(|n| n == "1");
    if !one || !prepare::is_prepared() {
        // SAFETY: nobody else is running yet.
        unsafe { std::env::set_var("RAYON_NUM_THREADS", "1") };
        match prepare::run_in_place(Choices::default()) {
            Err(error) => panic!("{error}"),
            Ok(never) => match never {},
        }
    }
    let gpu = Gpu::open(DeviceKind::Emulated).expect("the emulated driver");
    prepare::loaded();
    let emulated = CudaEngine::new(gpu);
    let wanted: Vec<String> = std::env::args().skip(1).filter(|a| !a.starts_with('-')).collect();
    println!("| op | largest inputs | reference, ms | emulated, ms | ratio |");
    println!("|---|---|---:|---:|---:|");
    for measured in cases::all() {
        let name = measured.case.op.name();
        if !wanted.is_empty() && !wanted.iter().any(|op| op == name) {
            continue;
        }
        let (reference, expected) = fastest(&ReferenceEngine, &measured.case);
        let (found, outputs) = fastest(&emulated, &measured.case);
        for (role, tensor) in &expected {
            assert!(tensor.bytes() == outputs[role].bytes(), "{name}: {role}");
        }
        println!(
            "| `{name}` | {} | {:.1} | {:.1} | {:.1} |",
            measured.shape,
            reference * 1e3,
            found * 1e3,
            found / reference
        );
    }
    ExitCode::SUCCESS
}
