//! `fathom check`: recompute case files and compare bits.

use std::path::PathBuf;

use fathom_conformance::check::{self, FileReport, Status, Tolerance};
use fathom_conformance::junit;
use fathom_reference::files;
use fathom_reference::op::ReferenceEngine;
use serde_json::json;

use crate::output::{self, Outcome};

/// Recompute case files and compare the outputs bit by bit
#[derive(clap::Args)]
#[command(after_help = "Examples:
  fathom check gemm.safetensors            one file
  fathom check cases/ --json               every *.safetensors below a folder, as JSON
  fathom check cases/ --save-outputs out/  keep what was computed
  fathom check cases/ --tolerance ulp=1    for kernels that promise less than every bit
  fathom check cases/ --junit junit.xml --github
                                           for continuous integration: docs/ci.md

In the table, `file` is what the case file holds, `contract` what was computed. A case file to
start from: fathom case example OP. How to write one from PyTorch: docs/case-files.md.")]
pub struct Args {
    /// Case files, or folders that are walked recursively
    #[arg(required = true, value_name = "PATH")]
    paths: Vec<PathBuf>,
    /// Print one JSON document instead of a table
    #[arg(long)]
    json: bool,
    /// Write the computed outputs (`out.<role>`) below this folder, matched or not
    #[arg(long, value_name = "DIR")]
    save_outputs: Option<PathBuf>,
    /// Accept a distance: `ulp=N` an element, or `rel=X` (2-norm) a tensor; default: every bit
    #[arg(long, value_name = "ulp=N|rel=X", default_value = "ulp=0", hide_default_value = true)]
    tolerance: Tolerance,
    /// Write the verdicts as JUnit XML, a test a file
    #[arg(long, value_name = "FILE")]
    junit: Option<PathBuf>,
    /// Print an annotation for GitHub Actions on stderr for every file that does not pass
    #[arg(long)]
    github: bool,
}

/// Runs the command.
pub fn run(args: &Args) -> output::Result {
    let targets = check::list(&args.paths)?;
    let mut written: Vec<PathBuf> = args.junit.iter().cloned().collect();
    if let Some(folder) = &args.save_outputs {
        check::distinct_names(&targets)?;
        written.extend(targets.iter().map(|t| folder.join(&t.relative)));
    }
    files::keep_apart(targets.iter().map(|t| &t.path), &written)?;
    let bar = output::progress(targets.len(), "check");
    let mut reports = Vec::new();
    for target in &targets {
        bar.set_message(target.relative.display().to_string());
        let save = args.save_outputs.as_deref();
        reports.push(check::check(target, &ReferenceEngine, args.tolerance, save));
        bar.inc(1);
    }
    bar.finish_and_clear();
    if let Some(path) = &args.junit {
        output::write_file(path, junit::document(&[check::junit(&reports)]).as_bytes())?;
    }
    if args.github {
        check::annotations(&reports).iter().for_each(|annotation| errln!("{annotation}"));
    }
    if args.json {
        output::print_json(&json!({ "files": reports }))?;
    } else {
        print_table(&reports);
    }
    for error in reports.iter().filter_map(|r| r.error.as_ref()) {
        output::error(error);
    }
    Ok(match () {
        () if reports.iter().any(|r| matches!(r.status, Status::Error | Status::Unsupported)) => {
            Outcome::BadInput
        }
        () if reports.iter().any(|r| r.status == Status::Fail) => Outcome::Fails,
        () => Outcome::Holds,
    })
}

fn print_table(reports: &[FileReport]) {
    let mut rows = Vec::new();
    for report in reports {
        let op = report.op.clone().unwrap_or_else(|| "-".to_owned());
        let status = format!("{:?}", report.status).to_lowercase();
        if report.tensors.is_empty() {
            let mut row = vec![report.file.clone(), op.clone(), status.clone()];
            row.resize(8, "-".to_owned());
            rows.push(row);
        }
        for d in &report.tensors {
            let first = d.first.as_ref().map_or("-".to_owned(), ToString::to_string);
            let max_ulp = match d.nan_mismatches {
                0 => d.max_ulp.to_string(),
                _ => "NaN".to_owned(),
            };
            rows.push(vec![
                report.file.clone(),
                op.clone(),
                status.clone(),
                d.name.clone(),
                d.elements.to_string(),
                d.mismatches.to_string(),
                max_ulp,
                first,
            ]);
        }
        for name in &report.not_compared {
            let mut row = vec![report.file.clone(), op.clone(), status.clone(), name.clone()];
            row.resize(7, "-".to_owned());
            row.push("not in the file, not compared".to_owned());
            rows.push(row);
        }
    }
    let header =
        ["file", "op", "status", "tensor", "elements", "mismatches", "max ulp", "first mismatch"];
    outln!("{}", output::table(&header, &[4, 5, 6], rows));
    let count = |status| reports.iter().filter(|r| r.status == status).count();
    let mut words = format!("{} pass, {} fail", count(Status::Pass), count(Status::Fail));
    for (status, word) in [(Status::Computed, "computed"), (Status::Error, "in error")] {
        if count(status) > 0 {
            words += &format!(", {} {word}", count(status));
        }
    }
    match reports.iter().filter(|r| r.compares_nothing()).count() {
        0 => {}
        n => words += &format!("; {n} of those that pass hold no element"),
    }
    outln!("{words}");
}
