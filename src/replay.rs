//! `fathom replay`: run a recording on a backend and compare bits.

use std::path::PathBuf;

use fathom_conformance::check::{FileReport, Status};
use fathom_conformance::replay::{self, OpSummary};
use serde_json::json;

use crate::output::{self, Outcome};

/// Run recorded op calls on a backend and compare every bit
#[derive(clap::Args)]
#[command(after_help = "Examples:
  fathom eval --model DIR --tokens ids.json --record run/   record
  fathom replay run/                                        replay on the reference
  fathom replay run/ --op gemm_fp8,quantize_tile --json     chosen ops, as JSON")]
pub struct Args {
    /// Folder that a run recorded into with --record
    #[arg(value_name = "DIR")]
    folder: PathBuf,
    /// Backend that computes
    #[arg(long, value_name = "NAME", default_value = "reference")]
    backend: String,
    /// Replay these ops only
    #[arg(long, value_name = "OP,...", value_delimiter = ',')]
    op: Vec<String>,
    /// Print one JSON document instead of a table
    #[arg(long)]
    json: bool,
}

/// Failing files that the table names; `--json` names all.
const SHOWN: usize = 10;

/// Runs the command.
pub fn run(args: &Args) -> output::Result {
    let engine = replay::engine(&args.backend)?;
    let targets = replay::cases(&args.folder)?;
    let bar = output::progress(targets.len(), "replay");
    let mut reports = Vec::new();
    for target in &targets {
        bar.set_message(target.relative.display().to_string());
        let report = replay::replay(target, &*engine, &args.op);
        reports.extend(report);
        bar.inc(1);
    }
    bar.finish_and_clear();
    if reports.is_empty() {
        return Err(format!("{}: no case of {}", args.folder.display(), args.op.join(", ")).into());
    }
    let ops = replay::by_op(&reports);
    if args.json {
        let bad: Vec<&FileReport> = reports.iter().filter(|r| r.status != Status::Pass).collect();
        output::print_json(&json!({ "backend": args.backend, "ops": ops, "failing": bad }))?;
    } else {
        print_table(&args.backend, &ops, &reports);
    }
    for error in reports.iter().filter_map(|r| r.error.as_ref()).take(SHOWN) {
        eprintln!("error: {error}");
    }
    Ok(match () {
        () if ops.iter().any(|op| op.error > 0) => Outcome::BadInput,
        () if ops.iter().any(|op| op.fail > 0) => Outcome::Fails,
        () => Outcome::Holds,
    })
}

fn print_table(backend: &str, ops: &[OpSummary], reports: &[FileReport]) {
    let row = |op: &OpSummary| {
        let name = if op.op.is_empty() { "(unreadable)" } else { &op.op };
        let counts = [op.cases, op.pass, op.fail, op.error].map(|n| n.to_string());
        let mut row = vec![name.to_owned()];
        row.extend(counts);
        row.extend([op.elements.to_string(), op.mismatches.to_string()]);
        row
    };
    let header = ["op", "cases", "pass", "fail", "error", "elements", "mismatches"];
    println!("{}", output::table(&header, &[1, 2, 3, 4, 5, 6], ops.iter().map(row).collect()));
    for report in reports.iter().filter(|r| r.status == Status::Fail).take(SHOWN) {
        for d in &report.tensors {
            if let Some(first) = &d.first {
                println!(
                    "{}: {} differs in {} of {} elements, first at {:?}: expected {} got {}",
                    report.file,
                    d.name,
                    d.mismatches,
                    d.elements,
                    first.index,
                    first.expected,
                    first.got
                );
            }
        }
    }
    let pass: usize = ops.iter().map(|op| op.pass).sum();
    println!("{pass} of {} cases agree in every bit on backend {backend}", reports.len());
}
