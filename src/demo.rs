//! `fathom demo`: a walk through what the program can do, on built-in input.

use std::io::{self, BufRead, IsTerminal};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use fathom_conformance::case_file::{self, CaseFile};
use fathom_conformance::check::{self, Status, Target, Tolerance};
use fathom_conformance::conform::model::{self, Same};
use fathom_conformance::model_code::ModelCode;
use fathom_conformance::ships_log::ships_log;
use fathom_conformance::{demo, diagnose};
use fathom_gpu::compile::Compiler;
use fathom_gpu::nvrtc;
use fathom_reference::backend::Reference;
use fathom_reference::checkpoint::training;
use fathom_reference::data::Tokenizer;
use fathom_reference::eval::Evaluator;
use fathom_reference::generate::{Sampling, Settings, generate};
use fathom_reference::op::ReferenceEngine;
use fathom_reference::precision::Mode;
use fathom_reference::train::{Event, RunFolder, Setting, TrainConfig, ranks, run};
use fathom_simulator::config::Scenario;
use fathom_simulator::events::Detail;
use fathom_simulator::first_principles::FirstPrinciples;
use fathom_simulator::report::html;
use fathom_simulator::step::{simulate, whole_run};

use crate::output::{self, Outcome};

/// Walk through what the program can do, on built-in input, in under two minutes
#[derive(clap::Args)]
pub struct Args {
    /// Folder for the demonstration's files
    #[arg(long, value_name = "DIR", default_value = "fathom-demo")]
    dir: PathBuf,
    /// Fetch NVRTC where it is not here, without asking
    #[arg(long)]
    yes: bool,
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
    holds &= emulate_a_kernel(args.yes)?;
    holds &= train_and_generate(&args.dir)?;
    holds &= train_on_the_emulated_gpu(&args.dir)?;
    holds &= train_on_ranks(&args.dir)?;
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
    let run = whole_run(&sim.scenario, &sim.report, &model)?;
    output::write_file(&path, html::page(&sim, &run, &model)?.as_bytes())?;
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

/// NVRTC and the cache folder. Where it is not here it is fetched: with `yes`, or if the person at
/// the terminal agrees.
fn nvrtc_or_ask(yes: bool) -> Option<(nvrtc::Nvrtc, PathBuf)> {
    let cache = nvrtc::cache_dir()?;
    if let Some(found) = nvrtc::find() {
        return Some((found, cache));
    }
    let terminal = io::stdin().is_terminal() && io::stderr().is_terminal();
    let agreed = yes
        || terminal
            && {
                errln!(
                    "   This step needs {}, NVIDIA's run-time compiler. pip downloads it once (220 MB on the disk)\n   \
             into {}. Fetch it now? [Y/n]",
                    nvrtc::PACKAGE,
                    cache.display()
                );
                let mut answer = String::new();
                let read = io::stdin().lock().read_line(&mut answer);
                read.is_ok_and(|bytes| bytes > 0) && !answer.trim().to_lowercase().starts_with('n')
            };
    if !agreed {
        return None;
    }
    match nvrtc::fetch() {
        Ok(found) => Some((found, cache)),
        Err(error) => {
            errln!("   {error}");
            None
        }
    }
}

/// Our kernel on the emulated H800, and a broken version of it under the race check.
fn emulate_a_kernel(yes: bool) -> Result<bool, Box<dyn std::error::Error>> {
    let command = "conform --only gemm_fp8 --device emulated --check all";
    step(4, "Our FP8 GEMM kernel on an emulated H800, as this machine need not have one", command);
    let Some((nvrtc, cache)) = nvrtc_or_ask(yes) else {
        outln!(
            "   skipped: NVRTC, NVIDIA's run-time compiler, is not here. `fathom demo --yes` downloads it\n   \
             with pip, once. What a missing barrier looks like, on a kernel in PTX:"
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
const STEPS: usize = 200;
/// Entries of the log that it is trained on.
const ENTRIES: usize = 2000;

/// A DeepSeek-V3 of a million parameters trained in FP8 on a ship's log, and what it then writes.
fn train_and_generate(dir: &Path) -> Result<bool, Box<dyn std::error::Error>> {
    let (out, log) = (dir.join("run"), dir.join("ships-log.txt"));
    let set = [
        format!("steps={STEPS}"),
        "data.fim_rate=0".to_owned(),
        "model.vocab_size=512".to_owned(),
        "data.tokenizer.vocab_size=512".to_owned(),
        "log.sample_every=0".to_owned(),
    ];
    let command = format!(
        "train --data {} --set {} --out {}",
        log.display(),
        set[..4].join(" --set "),
        out.display()
    );
    step(5, "A small DeepSeek-V3, trained in FP8 as Hopper computes, on a ship's log", &command);
    // Beside the log lies the run of an earlier demonstration; any other is left alone and refused.
    if log.exists() && out.exists() {
        std::fs::remove_dir_all(&out)?;
    }
    output::write_file(&log, ships_log(ENTRIES).as_bytes())?;
    let config = TrainConfig::preset("tiny", &set.map(|s| Setting::set(&s)))?
        .with_files(std::slice::from_ref(&log))?;
    let bar = output::progress(STEPS, "   train");
    let folder = RunFolder { out: out.clone(), resume: false };
    let mut losses = Vec::new();
    run::run(config, Reference, &folder, &|| false, &mut |event| {
        if let Event::Step(log) = event {
            losses.push(log.loss);
            bar.inc(1);
        }
    })?;
    bar.finish_and_clear();
    let mean = |losses: &[f64]| losses.iter().sum::<f64>() / losses.len() as f64;
    let (first, last) = (mean(&losses[..5]), mean(&losses[STEPS - 5..]));
    outln!(
        "   loss {first:.3} over the first five steps, {last:.3} over the last five of {STEPS}\n"
    );
    let holds = write_on(&out.join("model"))?;
    Ok(last < first && holds)
}

/// Two steps of a small run in our kernels on the emulated GPU and on the reference: same files.
fn train_on_the_emulated_gpu(dir: &Path) -> Result<bool, Box<dyn std::error::Error>> {
    let set = ["seq_len=32", "micro_batch=2", "schedule.batch=2", "data.tokenizer.vocab_size=512"];
    let [reference, emulated] = ["two-steps-reference", "two-steps-emulated"].map(|n| dir.join(n));
    let arguments = |out: &Path, backend: &str| -> Vec<String> {
        let mut arguments: Vec<String> = ["train", "--steps", "2"].map(str::to_owned).into();
        arguments.extend(set.iter().flat_map(|s| ["--set".to_owned(), (*s).to_owned()]));
        let out = out.display().to_string();
        arguments.extend(["--backend", backend, "--out", &out].map(str::to_owned));
        arguments
    };
    let command = arguments(&emulated, "emulated").join(" ");
    step(6, "Two steps of training in our CUDA kernels on the emulated H800", &command);
    if nvrtc::find().is_none() {
        outln!("   skipped: NVRTC, NVIDIA's run-time compiler, is not here");
        return Ok(true);
    }
    for (out, backend) in [(&reference, "reference"), (&emulated, "emulated")] {
        // What an earlier demonstration wrote.
        if out.join("run.toml").exists() {
            std::fs::remove_dir_all(out)?;
        }
        let program = std::env::current_exe()?;
        let output = Command::new(&program).args(arguments(out, backend)).output();
        let output = output.map_err(|e| format!("{} does not start: {e}", program.display()))?;
        if !output.status.success() {
            let said = String::from_utf8_lossy(&output.stderr).into_owned();
            return Err(format!("training on {backend} failed:\n{said}").into());
        }
    }
    match model::same_checkpoints(&reference, &emulated)? {
        Ok(Same { files, bytes }) => {
            outln!(
                "   weights, moments and average after two steps: {files} files of {bytes} bytes, the \
                 reference's to the last bit"
            );
            Ok(true)
        }
        Err(difference) => {
            outln!("   {difference}");
            Ok(false)
        }
    }
}

/// The same three steps on four ranks, in DualPipe's two directions, and on one: every bit of what
/// the checkpoints hold.
fn train_on_ranks(dir: &Path) -> Result<bool, Box<dyn std::error::Error>> {
    let run = ["steps=3", "seq_len=32", "micro_batch=1", "grad_shards=2", "model.layers=4"];
    let small = ["schedule.batch=16", "data.tokenizer.train_bytes=100000", "log.sample_every=0"];
    let layout = ["parallel.pp=4", "parallel.schedule=\"dualpipe\""];
    let folders = [dir.join("ranks-4"), dir.join("ranks-1")];
    let quoted = [layout[0], "'parallel.schedule=\"dualpipe\"'"];
    let command = format!(
        "train --ranks 4 --set {} --set {} --out {}",
        [run.join(" --set "), small.join(" --set ")].join(" --set "),
        quoted.join(" --set "),
        folders[0].display()
    );
    step(7, "Three steps on four ranks, a pipeline run from both ends, against one rank", &command);
    let mut saved = Vec::new();
    for (out, layout) in folders.iter().zip([&layout[..], &[]]) {
        // Beside it lies the log of an earlier demonstration; any other folder is refused.
        if dir.join("ships-log.txt").exists() && out.exists() {
            std::fs::remove_dir_all(out)?;
        }
        let set: Vec<Setting> =
            [&run[..], &small, layout].concat().into_iter().map(Setting::set).collect();
        let config = TrainConfig::preset("tiny", &set)?;
        let folder = RunFolder { out: out.clone(), resume: false };
        let begin = Instant::now();
        let tell = &mut |_: &Event| ();
        let timeline = ranks::Timeline::default();
        let calls: ranks::run::Calls<'_> = (&|| false, tell);
        let summary = ranks::run::run(config, |_| Reference, &folder, &timeline, calls)?;
        let ranks = if layout.is_empty() { "one rank" } else { "four ranks" };
        let (loss, seconds) =
            (summary.last_loss.unwrap_or(f64::NAN), begin.elapsed().as_secs_f64());
        outln!("   {ranks:<10} mean loss {loss:.6}, {seconds:.1} s");
        saved
            .push(training::read(&summary.checkpoint.ok_or("a run leaves a checkpoint")?)?.tensors);
    }
    saved.iter_mut().for_each(|tensors| tensors.sort_by(|(a, _), (b, _)| a.cmp(b)));
    let (many, one) = (&saved[0], &saved[1]);
    let equal = many.iter().zip(one).filter(|(a, b)| a == b).count();
    let elements: usize = one.iter().map(|(_, t)| t.len()).sum();
    outln!(
        "   of {} tensors (weights and moments, {:.1} M elements) {equal} are equal to the bit",
        one.len(),
        elements as f64 / 1e6
    );
    Ok(many.len() == one.len() && equal == one.len())
}

/// An entry by the model, drawn; and whether its own drafts change a token of greedy text.
fn write_on(folder: &Path) -> Result<bool, Box<dyn std::error::Error>> {
    let prompt = "Day 2001.";
    outln!(
        "   $ fathom generate --model {} --prompt '{prompt}' --temperature 0.6",
        folder.display()
    );
    let evaluator = Evaluator::open(folder, Mode::Fp32)?;
    let tokenizer = Tokenizer::load(&folder.join("tokenizer.json"))?;
    let weights = evaluator.model.weights(&evaluator.backend, &evaluator.params)?;
    let ids = tokenizer.encode_prompt(prompt)?;
    let continued = |temperature: f64, speculative: bool| {
        let sampling = Sampling { temperature, top_p: 0.95, seed: 1 };
        let stop = vec![tokenizer.eos()];
        let settings = Settings { tokens: 96, sampling, speculative, stop };
        let (model, backend) = (&evaluator.model, &evaluator.backend);
        generate(model, backend, &weights, &ids, &settings, &mut |_| ())
    };
    let text = tokenizer.decode(&continued(0.6, false)?.tokens);
    let entries: Vec<String> = format!("{prompt}{text}").split("\n\n").map(str::to_owned).collect();
    // The last entry is cut off, unless it is the only one.
    let whole = &entries[..entries.len().saturating_sub(1).max(1)];
    whole.iter().filter(|e| !e.is_empty()).for_each(|entry| outln!("     {entry}"));
    let (plain, drafted) = (continued(0.0, false)?, continued(0.0, true)?);
    let same = plain.tokens == drafted.tokens;
    outln!(
        "   --speculative, with the MTP module's drafts: {} of {} held, the same tokens as without: {same}",
        drafted.accepted,
        drafted.drafted,
    );
    Ok(same)
}

/// Prints the first finding; says whether there is one.
fn show_first(findings: &[String]) -> bool {
    match findings.first() {
        Some(first) => first.lines().for_each(|line| outln!("     {line}")),
        None => outln!("     nothing, though it should"),
    }
    !findings.is_empty()
}
