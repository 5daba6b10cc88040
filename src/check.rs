//! `fathom check`: recompute case files and compare bits.

use std::path::PathBuf;

use fathom_conformance::check::{self, FileReport, Status, Tolerance};
use fathom_reference::ops::ReferenceEngine;
use serde_json::json;

use crate::output::{self, Outcome};

/// Recompute case files and compare the outputs bit by bit
#[derive(clap::Args)]
#[command(after_help = "Examples:
  fathom check gemm.safetensors            one file
  fathom check cases/ --json               every *.safetensors below a folder, as JSON
  fathom check cases/ --save-outputs out/  keep what was computed
  fathom check cases/ --tolerance ulp=1    for kernels that promise less than every bit

How to write a case file from PyTorch: docs/case-files.md.")]
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
}

/// Runs the command.
pub fn run(args: &Args) -> output::Result {
    let targets = check::list(&args.paths)?;
    if args.save_outputs.is_some() {
        check::distinct_names(&targets)?;
    }
    let bar = output::progress(targets.len(), "check");
    let mut reports = Vec::new();
    for target in &targets {
        bar.set_message(target.relative.display().to_string());
        let save = args.save_outputs.as_deref();
        reports.push(check::check(target, &ReferenceEngine, args.tolerance, save));
        bar.inc(1);
    }
    bar.finish_and_clear();
    if args.json {
        output::print_json(&json!({ "files": reports }))?;
    } else {
        print_table(&reports);
    }
    for error in reports.iter().filter_map(|r| r.error.as_ref()) {
        eprintln!("error: {error}");
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
            let first = d.first.as_ref().map_or("-".to_owned(), |f| {
                format!("{:?} expected {} got {}", f.index, f.expected, f.got)
            });
            let max_ulp = match d.max_ulp {
                u64::MAX => "NaN".to_owned(),
                ulp => ulp.to_string(),
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
    }
    let header =
        ["file", "op", "status", "tensor", "elements", "mismatches", "max ulp", "first mismatch"];
    println!("{}", output::table(&header, &[4, 5, 6], rows));
    let count = |status| reports.iter().filter(|r| r.status == status).count();
    let mut words = format!("{} pass, {} fail", count(Status::Pass), count(Status::Fail));
    for (status, word) in [(Status::Computed, "computed"), (Status::Error, "in error")] {
        if count(status) > 0 {
            words += &format!(", {} {word}", count(status));
        }
    }
    println!("{words}");
}
