//! `fathom conform`: our kernels against the reference on drawn cases, on a GPU or without one.

use std::path::{Path, PathBuf};
use std::time::Duration;

use fathom_conformance::conform::{self, OpReport, Options, SIMPLIFICATIONS};
use fathom_conformance::github::Annotation;
use fathom_conformance::junit::{self, Suite, TestCase};
use fathom_emulator::{Checks, Preset};
use fathom_gpu::driver::{self, Driver};
use fathom_gpu::{CudaEngine, DeviceKind, Gpu};
use fathom_libcuda::{Choices, prepare};
use fathom_reference::Engine;
use fathom_reference::op::ReferenceEngine;
use serde_json::json;

use crate::output::{self, Outcome};

/// Hold our CUDA kernels to the reference's bits, on a GPU or on the emulated one
#[derive(clap::Args)]
#[command(after_help = "Examples:
  fathom conform                                   every kernel, on the GPU if there is one
  fathom conform --only gemm_fp8 --cases 100 --seed 7
  fathom conform --device emulated --check races,uninit,sync
  fathom conform --junit junit.xml --github        for continuous integration: docs/ci.md

A disagreement is simplified and written as a case file; `fathom diagnose FILE` says which
arithmetic it betrays. How to add a kernel: docs/kernels.md.")]
pub struct Args {
    /// Ops, separated by commas; default: all that have a kernel
    #[arg(long, value_name = "OPS", value_delimiter = ',')]
    only: Vec<String>,
    /// Where to run: `cuda` or `emulated`; default: a GPU where there is one
    #[arg(long, value_name = "DEVICE", value_parser = device)]
    device: Option<DeviceKind>,
    /// Preset of the emulated device: h100, h800 or h200
    #[arg(long, default_value = "h800")]
    gpu: String,
    /// Cases of each op
    #[arg(long, value_name = "N", default_value_t = 24)]
    cases: usize,
    /// Seed of shapes and values
    #[arg(long, value_name = "S", default_value_t = 0)]
    seed: u64,
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
    /// Print an annotation for GitHub Actions on stderr for every op that disagrees
    #[arg(long)]
    github: bool,
}

fn device(text: &str) -> Result<DeviceKind, String> {
    let kinds = [DeviceKind::Cuda, DeviceKind::Emulated];
    let found = kinds.into_iter().find(|k| k.name() == text);
    found.ok_or_else(|| format!("expected cuda or emulated, found '{text}'"))
}

/// Runs the command.
pub fn run(args: &Args) -> output::Result {
    let suites = conform::suites(&args.only)?;
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
    let engine = CudaEngine::new(Gpu::open(kind)?);
    let options = Options {
        cases: args.cases,
        seed: args.seed,
        simplifications: SIMPLIFICATIONS,
        save: args.save.clone(),
    };
    let bar = output::progress(suites.len() * args.cases, "conform");
    let mut reports = Vec::new();
    for suite in suites {
        bar.set_message(suite.op);
        reports.push(conform::run(suite, &engine, &ReferenceEngine, &options, &|| bar.inc(1))?);
    }
    bar.finish_and_clear();
    if let Some(path) = &args.junit {
        output::write_file(path, junit::document(&[conform::junit(&reports)]).as_bytes())?;
    }
    if args.github {
        conform::annotations(&reports).iter().for_each(|annotation| errln!("{annotation}"));
    }
    if args.json {
        output::print_json(&json!({
            "device": kind.name(),
            "gpu": engine.gpu().description().name,
            "seed": args.seed,
            "ops": reports,
        }))?;
    } else {
        print(&engine.name(), &reports);
    }
    let holds = reports.iter().all(|r| r.failure.is_none());
    Ok(if holds { Outcome::Holds } else { Outcome::Fails })
}

/// The same command line once more, with the emulated libcuda in front.
fn on_the_emulated_driver(args: &Args) -> output::Result {
    Preset::named(&args.gpu)?;
    Checks::parse(&args.check)?;
    let choices =
        Choices { gpu: args.gpu.clone(), check: args.check.clone(), ..Choices::default() };
    // Verdicts of an earlier run are not this one's, should it end before it has any.
    if let Some(path) = args.junit.as_deref().filter(|path| path.is_file()) {
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
    let suite = Suite { name: "sanitizers".to_owned(), tests };
    // Where the run ended before its verdicts, the findings stand alone.
    let written = std::fs::read_to_string(path).unwrap_or_default();
    let text = junit::append(&written, &suite).unwrap_or_else(|| junit::document(&[suite]));
    output::write_file(path, text.as_bytes())
}

fn print(engine: &str, reports: &[OpReport]) {
    outln!("{engine} against the reference, bit by bit");
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
        let verdicts = Suite { name: "fathom conform".to_owned(), tests: Vec::new() };
        std::fs::write(&path, junit::document(&[verdicts])).unwrap();
        report_findings(Some(&path), false, &findings).unwrap();
        let both = std::fs::read_to_string(&path).unwrap();
        assert_eq!(both.matches("<testsuite ").count(), 2, "{both}");
        assert_eq!(both.matches("<failure ").count(), 2, "{both}");
    }
}
