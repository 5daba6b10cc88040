//! `fathom conform`: our kernels against the reference on drawn cases, on a GPU or without one.

mod report;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use fathom_conformance::conform::model::{self, ModelError, ModelReport};
use fathom_conformance::conform::{self, ConformError, OpReport, Options, SIMPLIFICATIONS, Suite};
use fathom_conformance::github::Annotation;
use fathom_conformance::junit::{self, TestCase};
use fathom_conformance::lockstep::OpTimes;
use fathom_emulator::{Checks, Preset};
use fathom_gpu::driver::{self, Driver};
use fathom_gpu::{Cuda, CudaEngine, DeviceKind, Gpu};
use fathom_libcuda::{Choices, prepare};
use fathom_reference::Engine;
use fathom_reference::op::ReferenceEngine;
use serde_json::json;

use crate::output::{self, Outcome};
use report::{Head, OpRow};

/// Hold our CUDA kernels to the reference's bits, on a GPU or on the emulated one
#[derive(clap::Args)]
#[command(after_help = "Examples:
  fathom conform                                   every kernel, on the GPU if there is one
  fathom conform --only gemm_fp8 --cases 100 --seed 7
  fathom conform --device emulated --check races,uninit,sync
  fathom conform --model                           whole training runs: fp8, bf16, fp32
  fathom conform --model run.toml --steps 2 --only all --report conform.html
  fathom conform --junit junit.xml --github        for continuous integration: docs/ci.md

A disagreement is simplified and written as a case file; `fathom diagnose FILE` says which
arithmetic it betrays. How to add a kernel: docs/kernels.md.")]
pub struct Args {
    /// Ops, separated by commas; default: all that have a kernel
    #[arg(long, value_name = "OPS", value_delimiter = ',')]
    only: Vec<String>,
    /// Whole training runs of this configuration (default: a built-in one) in modes fp8, bf16 and
    /// fp32, with and without recomputation: the first step op by op, then every step's report and
    /// the checkpoint. Ops then only where --only names them; `--only all` names all
    #[arg(long, value_name = "RUN.toml", num_args = 0..=1)]
    model: Option<Option<PathBuf>>,
    /// Steps of such a run
    #[arg(long, value_name = "N", default_value_t = 10, requires = "model",
          value_parser = clap::value_parser!(u64).range(1..))]
    steps: u64,
    /// Say what each op took in such a run's second step, one op after the other, on the reference
    /// and on the device
    #[arg(long, requires = "model")]
    times: bool,
    /// Where to run: `cuda` or `emulated`; default: a GPU where there is one
    #[arg(long, value_name = "DEVICE", value_parser = device)]
    device: Option<DeviceKind>,
    /// Preset of the emulated device: h100, h800 or h200
    #[arg(long, default_value = "h800")]
    gpu: String,
    /// Cases of each op; case 24 has 20,000 rows where an op works row by row
    #[arg(long, value_name = "N", default_value_t = 25)]
    cases: usize,
    /// The case of this number only
    #[arg(long, value_name = "I", conflicts_with = "cases")]
    case: Option<usize>,
    /// Seed of shapes and values
    #[arg(long, value_name = "S", default_value_t = 0)]
    seed: u64,
    /// Launch as on a device of so many SMs; no result depends on it
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(2..))]
    sms: Option<u32>,
    /// Permute the order in which the emulated device's warps and CTAs take turns; no result
    /// depends on it
    #[arg(long, value_name = "N", default_value_t = 0)]
    schedule_seed: u64,
    /// Sanitizers of the emulated device: memory, races, uninit, sync, or all
    #[arg(long, value_name = "LIST", default_value = "", hide_default_value = true)]
    check: String,
    /// Folder for the case file of a disagreement
    #[arg(long, value_name = "DIR", default_value = "fathom-conform")]
    save: PathBuf,
    /// Print one JSON document instead of a table
    #[arg(long)]
    json: bool,
    /// Write the verdicts as JUnit XML, a test an op
    #[arg(long, value_name = "FILE")]
    junit: Option<PathBuf>,
    /// Write a page: op by op, with what its kernels did, and training runs
    #[arg(long, value_name = "FILE.html")]
    report: Option<PathBuf>,
    /// Print an annotation for GitHub Actions on stderr for every op that disagrees
    #[arg(long)]
    github: bool,
}

fn device(text: &str) -> Result<DeviceKind, String> {
    let kinds = [DeviceKind::Cuda, DeviceKind::Emulated];
    let found = kinds.into_iter().find(|k| k.name() == text);
    found.ok_or_else(|| format!("expected cuda or emulated, found '{text}'"))
}

/// The suites that are asked for.
fn suites(args: &Args) -> Result<Vec<&'static Suite>, ConformError> {
    match &args.only[..] {
        [] if args.model.is_some() => Ok(Vec::new()),
        [all] if all == "all" => conform::suites(&[]),
        only => conform::suites(only),
    }
}

/// Runs the command.
pub fn run(args: &Args) -> output::Result {
    let suites = suites(args)?;
    let (loaded_ours, loaded_any) = match driver::probe() {
        Driver::Present { emulated, .. } => (emulated, true),
        Driver::Absent { .. } | Driver::Unusable { .. } => (false, false),
    };
    let kind = args.device.unwrap_or(if loaded_any && !loaded_ours {
        DeviceKind::Cuda
    } else {
        DeviceKind::Emulated
    });
    if kind == DeviceKind::Emulated && !loaded_ours && !prepare::is_prepared() {
        return on_the_emulated_driver(args);
    }
    let mut gpu = Gpu::open(kind)?;
    if let Some(sms) = args.sms {
        gpu = gpu.with_sm_count(sms);
    }
    let gpu = Arc::new(gpu);
    let engine = CudaEngine::new(gpu.clone());
    let options = Options {
        cases: args.case.map_or(0..args.cases, |case| case..case + 1),
        seed: args.seed,
        simplifications: SIMPLIFICATIONS,
        save: args.save.clone(),
    };
    let bar = output::progress(suites.len() * options.cases.len(), "conform");
    let (mut rows, mut before) = (Vec::new(), prepare::so_far()?);
    for suite in suites {
        bar.set_message(suite.op);
        let report = conform::run(suite, &engine, &ReferenceEngine, &options, &|| bar.inc(1))?;
        gpu.write_records()?;
        let done = prepare::so_far()?;
        let kernels = done.kernels_since(&before);
        before = done;
        rows.push(OpRow { report, kernels });
    }
    bar.finish_and_clear();
    let models = match &args.model {
        Some(config) => {
            train_models(config.as_deref(), args.steps, &Cuda::new(gpu.clone()), args.times)?
        }
        None => Vec::new(),
    };
    if let Some(path) = &args.report {
        let head = Head {
            engine: &engine.name(),
            seed: args.seed,
            estimated: kind == DeviceKind::Emulated,
            registers: &gpu.registers()?,
        };
        output::write_file(path, report::page(&head, &rows, &models).as_bytes())?;
    }
    let reports: Vec<OpReport> = rows.into_iter().map(|row| row.report).collect();
    if let Some(path) = &args.junit {
        let suites = [conform::junit(&reports), model::junit(&models)];
        output::write_file(path, junit::document(&suites).as_bytes())?;
    }
    if args.github {
        let all = conform::annotations(&reports).into_iter().chain(model::annotations(&models));
        all.for_each(|annotation| errln!("{annotation}"));
    }
    if args.json {
        let mut document = json!({
            "device": kind.name(),
            "gpu": engine.gpu().description().name,
            "seed": args.seed,
            "ops": reports,
            "models": models,
        });
        if args.times {
            document["times"] = models.iter().map(times_json).collect();
        }
        output::print_json(&document)?;
    } else {
        outln!("{} against the reference, bit by bit", engine.name());
        print_ops(&reports);
        print_models(&models);
        models.iter().filter(|_| args.times).for_each(print_times);
    }
    let holds =
        reports.iter().all(|r| r.failure.is_none()) && models.iter().all(|m| m.failure.is_none());
    Ok(if holds { Outcome::Holds } else { Outcome::Fails })
}

/// Compares training runs; the folders of one that disagrees are kept, and said.
fn train_models(
    config: Option<&Path>,
    steps: u64,
    device: &Cuda,
    timed: bool,
) -> Result<Vec<ModelReport>, ModelError> {
    let scratch = model::scratch()?;
    let runs = model::runs(config, steps, scratch.path())?;
    let bar = output::progress(runs.len() * (1 + 2 * steps as usize), "train");
    let mut reports = Vec::new();
    for run in &runs {
        bar.set_message(run.name.clone());
        reports.push(model::check(run, device, timed, scratch.path(), &|| bar.inc(1))?);
    }
    bar.finish_and_clear();
    if reports.iter().any(|report| report.failure.is_some()) {
        errln!("kept: {}", scratch.keep().display());
    }
    Ok(reports)
}

/// The same command line once more, with the emulated libcuda in front.
fn on_the_emulated_driver(args: &Args) -> output::Result {
    Preset::named(&args.gpu)?;
    Checks::parse(&args.check)?;
    let choices = Choices {
        gpu: args.gpu.clone(),
        check: args.check.clone(),
        schedule_seed: args.schedule_seed,
        profile: args.report.is_some(),
        ..Choices::default()
    };
    // Verdicts of an earlier run are not this one's, should it end before it has any.
    for path in args.junit.iter().chain(&args.report).filter(|path| path.is_file()) {
        std::fs::remove_file(path).map_err(|e| format!("{}: {e}", path.display()))?;
    }
    let (status, summary) = prepare::run_again(choices)?;
    if !summary.findings.is_empty() {
        errln!("fathom: {} findings of the emulated device:", summary.findings.len());
        summary.findings.iter().for_each(|f| errln!("{f}"));
        let findings: Vec<String> = summary.findings.iter().map(ToString::to_string).collect();
        report_findings(args.junit.as_deref(), args.github, &findings)?;
    }
    Ok(match status.code() {
        Some(0) if summary.findings.is_empty() => Outcome::Holds,
        Some(0 | 1) => Outcome::Fails,
        _ => Outcome::BadInput,
    })
}

/// Adds what the emulated device found to the reports that the run itself has written.
fn report_findings(junit: Option<&Path>, github: bool, findings: &[String]) -> Result<(), String> {
    if github {
        for message in findings.iter().cloned() {
            let title = "a finding of the emulated device".to_owned();
            errln!("{}", Annotation { file: None, title, message });
        }
    }
    let Some(path) = junit else { return Ok(()) };
    let test = |(number, finding): (usize, &String)| TestCase {
        class: "emulated device".to_owned(),
        name: format!("finding {}", number + 1),
        file: None,
        time: Duration::ZERO,
        outcome: junit::Outcome::Failure(finding.clone()),
    };
    let tests = findings.iter().enumerate().map(test).collect();
    let suite = junit::Suite { name: "sanitizers".to_owned(), tests };
    // Where the run ended before its verdicts, the findings stand alone.
    let written = std::fs::read_to_string(path).unwrap_or_default();
    let text = junit::append(&written, &suite).unwrap_or_else(|| junit::document(&[suite]));
    output::write_file(path, text.as_bytes())
}

fn print_ops(reports: &[OpReport]) {
    if reports.is_empty() {
        return;
    }
    let rows = reports.iter().map(|r| {
        let [cases, passed] = [r.cases, r.passed].map(|n| n.to_string());
        vec![r.op.to_owned(), cases, passed, r.elements.to_string()]
    });
    let header = ["op", "cases", "agree", "elements"];
    outln!("{}", output::table(&header, &[1, 2, 3], rows.collect()));
    for report in reports {
        if let Some(complaint) = report.complaint() {
            outln!("{} disagrees: {}", report.op, complaint.replace('\n', "\n  "));
        }
    }
}

fn print_models(reports: &[ModelReport]) {
    if reports.is_empty() {
        return;
    }
    let rows = reports.iter().map(|r| {
        let ModelReport { run, calls, elements, steps, files, bytes, .. } = r;
        let verdict = if r.failure.is_none() { "every bit" } else { "no" };
        let numbers = [*calls as u64, *elements as u64, *steps, *files as u64, *bytes];
        let mut row = vec![run.clone()];
        row.extend(numbers.map(|n| n.to_string()));
        row.push(verdict.to_owned());
        row
    });
    let header = ["run", "op calls", "elements", "steps", "files", "bytes", "agrees"];
    outln!("{}", output::table(&header, &[1, 2, 3, 4, 5], rows.collect()));
    for report in reports {
        if let Some(failure) = &report.failure {
            outln!("{} disagrees: {}", report.run, failure.replace('\n', "\n  "));
        }
    }
}

/// The same for machines, in seconds.
fn times_json(report: &ModelReport) -> serde_json::Value {
    let times = |t: &OpTimes| {
        json!({
            "calls": t.calls,
            "reference": t.contract.as_secs_f64(),
            "device": t.held.as_secs_f64(),
        })
    };
    let ops: BTreeMap<&str, _> = report.ops.iter().map(|(op, t)| (*op, times(t))).collect();
    json!({ "run": report.run, "seconds": ops })
}

/// The ops of a run's second step, those that took longest on the device first.
fn print_times(report: &ModelReport) {
    let mut ops: Vec<(&str, OpTimes)> = report.ops.iter().map(|(op, t)| (*op, *t)).collect();
    ops.sort_by_key(|(_, times)| std::cmp::Reverse(times.held));
    let sum = ops.iter().fold(OpTimes::default(), |sum, (_, t)| OpTimes {
        calls: sum.calls + t.calls,
        contract: sum.contract + t.contract,
        held: sum.held + t.held,
    });
    ops.push(("all", sum));
    let rows = ops.into_iter().map(|(op, OpTimes { calls, contract, held })| {
        let [reference, device] = [contract, held].map(|t| t.as_secs_f64() * 1e3);
        let ratio = format!("{:.1}", device / reference);
        vec![
            op.to_owned(),
            calls.to_string(),
            format!("{reference:.1}"),
            format!("{device:.1}"),
            ratio,
        ]
    });
    let header = ["op", "calls", "reference ms", "device ms", "ratio"];
    outln!(
        "{}, the second step:\n{}",
        report.run,
        output::table(&header, &[1, 2, 3, 4], rows.collect())
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn findings_follow_the_verdicts_or_stand_alone() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("junit.xml");
        let findings = ["race at <a>".to_owned(), "read of memory nobody wrote".to_owned()];
        report_findings(Some(&path), false, &findings).unwrap();
        let alone = std::fs::read_to_string(&path).unwrap();
        assert_eq!(alone.matches("<testsuite ").count(), 1, "{alone}");
        assert!(alone.contains(r#"tests="2" failures="2""#) && alone.contains("race at &lt;a&gt;"));
        let verdicts = junit::Suite { name: "fathom conform".to_owned(), tests: Vec::new() };
        std::fs::write(&path, junit::document(&[verdicts])).unwrap();
        report_findings(Some(&path), false, &findings).unwrap();
        let both = std::fs::read_to_string(&path).unwrap();
        assert_eq!(both.matches("<testsuite ").count(), 2, "{both}");
        assert_eq!(both.matches("<failure ").count(), 2, "{both}");
    }
}
