//! `fathom demo`: a walk through what the program can do, on built-in input.

use std::path::{Path, PathBuf};
use std::time::Instant;

use fathom_conformance::case_file::{self, CaseFile};
use fathom_conformance::check::{self, Status, Target, Tolerance};
use fathom_conformance::workload::ModelCode;
use fathom_conformance::{demo, diagnose};
use fathom_gpu::compile::Compiler;
use fathom_gpu::nvrtc;
use fathom_reference::backend::Reference;
use fathom_reference::data::Tokenizer;
use fathom_reference::eval::Evaluator;
use fathom_reference::generate::{Sampling, Settings, generate};
use fathom_reference::ops::ReferenceEngine;
use fathom_reference::precision::Mode;
use fathom_reference::train::run::{self, Event, Place};
use fathom_reference::train::{Setting, TrainConfig};
use fathom_simulator::config::Scenario;
use fathom_simulator::events::Detail;
use fathom_simulator::first_principles::FirstPrinciples;
use fathom_simulator::report::html;
use fathom_simulator::step::simulate;

use crate::output::{self, Outcome};

/// Walk through what the program can do, on built-in input, in under two minutes
#[derive(clap::Args)]
pub struct Args {
    /// Folder for the demonstration's files
    #[arg(long, value_name = "DIR", default_value = "fathom-demo")]
    dir: PathBuf,
}

/// A step: a title, the command that repeats it, and what it found.
fn step(number: usize, title: &str, command: &str) {
    let program = std::env::args_os().next().unwrap_or_else(|| "fathom".into());
    let program = program.display();
    outln!("\n{number}. {title}\n   $ {program} {command}\n");
}

/// Runs the command.
pub fn run(args: &Args) -> output::Result {
    let started = Instant::now();
    let mut holds = true;
    holds &= check_gemm(&args.dir)?;
    holds &= explain_planted(&args.dir)?;
    time_a_cluster(&args.dir)?;
    holds &= emulate_a_kernel()?;
    holds &= train_and_generate(&args.dir.join("run"))?;
    outln!("\nThe demonstration took {:.1} s.", started.elapsed().as_secs_f64());
    Ok(if holds { Outcome::Holds } else { Outcome::Fails })
}

fn save(dir: &Path, name: &str, file: &CaseFile) -> Result<PathBuf, case_file::CaseFileError> {
    let path = dir.join(name);
    case_file::write(&path, file)?;
    Ok(path)
}

fn check_gemm(dir: &Path) -> Result<bool, Box<dyn std::error::Error>> {
    let path = save(dir, "gemm.safetensors", &demo::gemm()?)?;
    let command = format!("check {}", path.display());
    step(1, "An FP8 GEMM, recomputed as Hopper's tensor cores do, every bit compared", &command);
    let target = Target { relative: PathBuf::from("gemm.safetensors"), path };
    let report = check::check(&target, &ReferenceEngine, Tolerance::Bits, None);
    for d in &report.tensors {
        outln!("   {}: {} elements, {} mismatches", d.name, d.elements, d.mismatches);
    }
    Ok(report.status == Status::Pass)
}

fn explain_planted(dir: &Path) -> Result<bool, Box<dyn std::error::Error>> {
    let path = save(dir, "planted.safetensors", &demo::planted()?)?;
    let command = format!("diagnose {}", path.display());
    step(2, "The same GEMM from a kernel with another arithmetic: which one was it?", &command);
    let diagnosis = diagnose::diagnose(&case_file::read(&path)?, &|_| ())?;
    outln!("   {} of {} elements differ;", diagnosis.mismatches, diagnosis.elements);
    outln!("   {}", diagnosis.verdict);
    Ok(diagnosis.explained && diagnosis.verdict.contains("promotion interval 64"))
}

/// A step of the published cluster, and its report as a page.
fn time_a_cluster(dir: &Path) -> Result<(), Box<dyn std::error::Error>> {
    let preset = "deepseek-v3-h800-2048";
    let path = dir.join("step.html");
    let command = format!("simulate --preset {preset} --report {}", path.display());
    step(
        3,
        "DeepSeek-V3's training step on 2048 H800s, which this machine need not have",
        &command,
    );
    let scenario = Scenario::preset(preset, &[])?;
    let model = FirstPrinciples::new(ModelCode);
    let sim = simulate(&scenario, &model, Detail::Instructions)?;
    output::write_file(&path, html::page(&sim, &model)?.as_bytes())?;
    let r = &sim.report;
    outln!(
        "   a step takes {:.2} s (published: 19.93 s): {:.1} B tokens a day, {:.0} K$ a trillion tokens",
        r.step_time_s,
        r.tokens_per_day / 1e9,
        r.cost.usd_per_trillion_tokens / 1e3
    );
    outln!("   {} events in {:.1} ms; the page: {}", r.events, r.wall_s * 1e3, path.display());
    Ok(())
}

/// Our kernel on the emulated H800, and a broken version of it under the race check.
fn emulate_a_kernel() -> Result<bool, Box<dyn std::error::Error>> {
    let command = "conform --only gemm_fp8 --device emulated --check all";
    step(4, "Our FP8 GEMM kernel on an emulated H800, as this machine need not have one", command);
    let found = nvrtc::find().zip(nvrtc::cache_dir());
    let Some((nvrtc, cache)) = found else {
        outln!(
            "   skipped: NVRTC, NVIDIA's run-time compiler, is not here. `fathom kernels fetch-nvrtc`\n   \
             downloads it with pip, once. What a missing barrier looks like, on a kernel in PTX:"
        );
        return Ok(show_first(&demo::without_barrier()?));
    };
    let run = demo::kernel(&Compiler::new(&nvrtc, &cache.join("kernels"))?)?;
    let (m, n, k) = demo::KERNEL_SHAPE;
    outln!(
        "   {m} x {n} x {k}: {} elements, {} mismatches, {} findings, {:.1} M thread instructions",
        run.elements,
        run.mismatches,
        run.findings.len(),
        run.thread_instructions as f64 / 1e6
    );
    outln!("   without the barrier before its TMA store, the race check says:");
    let found = show_first(&run.without_barrier);
    Ok(found && run.mismatches == 0 && run.findings.is_empty())
}

/// Steps of the demonstration's training run.
const STEPS: usize = 50;

/// A DeepSeek-V3 of a million parameters trained in FP8, and what it has learned so far.
fn train_and_generate(out: &Path) -> Result<bool, Box<dyn std::error::Error>> {
    let command = format!("train --steps {STEPS} --out {}", out.display());
    step(
        5,
        "A small DeepSeek-V3, trained in FP8 as Hopper computes, on this project's text",
        &command,
    );
    // The folder is the demonstration's own, of an earlier one.
    if out.exists() {
        std::fs::remove_dir_all(out)?;
    }
    let set = [format!("steps={STEPS}"), "log.sample_every=0".to_owned()].map(|s| Setting::set(&s));
    let bar = output::progress(STEPS, "   train");
    let place = Place { out: out.to_owned(), resume: false };
    let mut losses = Vec::new();
    let config = TrainConfig::preset("tiny", &set)?;
    run::run(config, Reference, &place, &|| false, &mut |event| {
        if let Event::Step(log) = event {
            losses.push(log.loss);
            bar.inc(1);
        }
    })?;
    bar.finish_and_clear();
    let mean = |losses: &[f64]| losses.iter().sum::<f64>() / losses.len() as f64;
    let (first, last) = (mean(&losses[..5]), mean(&losses[STEPS - 5..]));
    outln!("   loss {first:.3} over the first five steps, {last:.3} over the last five of {STEPS}");
    let folder = out.join("model");
    let prompt = "The ";
    outln!("   $ fathom generate --model {} --prompt '{prompt}' --speculative", folder.display());
    let evaluator = Evaluator::open(&folder, Mode::Fp32)?;
    let tokenizer = Tokenizer::load(&folder.join("tokenizer.json"))?;
    let weights = evaluator.model.weights(&evaluator.backend, &evaluator.params)?;
    let ids = tokenizer.encode_prompt(prompt)?;
    let continued = |speculative: bool| {
        let sampling = Sampling { temperature: 0.0, top_p: 1.0, seed: 0 };
        let settings = Settings { tokens: 24, sampling, speculative, stop: Vec::new() };
        let (model, backend) = (&evaluator.model, &evaluator.backend);
        generate(model, backend, &weights, &ids, &settings, &mut |_| ())
    };
    let (plain, drafted) = (continued(false)?, continued(true)?);
    outln!("   {:?}", format!("{prompt}{}", tokenizer.decode(&drafted.tokens)));
    outln!(
        "   with the MTP module's drafts: {} of {} held, the same tokens as without: {}",
        drafted.accepted,
        drafted.drafted,
        plain.tokens == drafted.tokens
    );
    Ok(last < first && plain.tokens == drafted.tokens)
}

/// Prints the first finding; says whether there is one.
fn show_first(findings: &[String]) -> bool {
    match findings.first() {
        Some(first) => first.lines().for_each(|line| outln!("     {line}")),
        None => outln!("     nothing, though it should"),
    }
    !findings.is_empty()
}
