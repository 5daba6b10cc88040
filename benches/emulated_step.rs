//! A training step of the preset `tiny` on the emulated driver beside the same step on the
//! reference, in every precision mode and on one thread; the goal is at most 8 times its CPU time.
//! A step is half of what three steps cost beyond one, so that starting, the tokenizer and NVRTC
//! are not in it. Also checks that both write the same weights.
//!
//! `cargo bench -p fathom --bench emulated_step` (Linux; needs NVRTC)

use std::fs;
use std::path::Path;
use std::process::{Command, ExitCode};

/// CPU seconds, own and the system's, of the children that have ended so far, in
/// `/proc/self/stat`.
fn children_seconds() -> f64 {
    /// Clock ticks a second in `/proc`, on every Linux.
    const TICKS: f64 = 100.0;
    let text = fs::read_to_string("/proc/self/stat").expect("Linux");
    // The name in parentheses may hold spaces; the fields behind it begin with the third.
    let fields: Vec<&str> = text[text.rfind(')').expect("a name") + 2..].split(' ').collect();
    let ticks = |field: usize| fields[field - 3].parse::<f64>().expect("a number");
    (ticks(16) + ticks(17)) / TICKS
}

/// CPU seconds of a run of so many steps, in this folder.
fn train(folder: &Path, backend: &str, mode: &str, steps: u32) -> f64 {
    let before = children_seconds();
    let output = Command::new(env!("CARGO_BIN_EXE_fathom"))
        .args(["train", "--preset", "tiny", "--json", "--backend", backend, "--precision", mode])
        .args(["--steps", &steps.to_string(), "--out"])
        .arg(folder)
        .env("RAYON_NUM_THREADS", "1")
        .output()
        .expect("the program starts");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{backend}, {mode}: {}\n{said}", output.status);
    children_seconds() - before
}

fn weights(run: &Path) -> Vec<u8> {
    fs::read(run.join("model/model.safetensors")).expect("the run wrote its model")
}

fn main() -> ExitCode {
    if fathom_gpu::nvrtc::find().is_none() {
        eprintln!("SKIPPED: NVRTC is not here (`fathom kernels fetch-nvrtc`, or set FATHOM_NVRTC)");
        return ExitCode::SUCCESS;
    }
    let folder = tempfile::tempdir().expect("a folder for the runs");
    let run = |backend, steps| folder.path().join(format!("{backend}-{steps}"));
    println!("| mode | reference, s a step | emulated, s a step | ratio |\n|---|---:|---:|---:|");
    for mode in ["fp32", "bf16", "fp8"] {
        train(&run("compile", 1), "emulated", mode, 1);
        let step = |backend| {
            let seconds = [1, 3].map(|steps| train(&run(backend, steps), backend, mode, steps));
            (seconds[1] - seconds[0]) / 2.0
        };
        let (reference, emulated) = (step("reference"), step("emulated"));
        assert!(weights(&run("reference", 3)) == weights(&run("emulated", 3)), "{mode}: weights");
        println!("| `{mode}` | {reference:.2} | {emulated:.2} | {:.1} |", emulated / reference);
        for backend in ["reference", "emulated"] {
            for steps in [1, 3] {
                fs::remove_dir_all(run(backend, steps)).expect("the run's folder");
            }
        }
    }
    ExitCode::SUCCESS
}
