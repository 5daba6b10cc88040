//! `fathom replay`: run a recording on a backend and compare bits.

use std::path::PathBuf;

use fathom_conformance::check::{FileReport, Status};
use fathom_conformance::replay::{self, OpSummary};
use fathom_gpu::CudaEngine;
use fathom_reference::Engine;
use fathom_reference::op::ReferenceEngine;
use serde_json::json;

use crate::backend::{BackendArgs, Chosen};
use crate::output::{self, Outcome};

/// Run recorded op calls on a backend and compare every bit
#[derive(clap::Args)]
#[command(after_help = "Examples:
  fathom eval --model DIR --tokens ids.json --record run/   record
  fathom replay run/                                        replay on the reference
  fathom replay run/ --backend emulated                     our CUDA kernels, without a GPU
  fathom replay run/ --op gemm_fp8,quantize_tile --json     chosen ops, as JSON")]
pub struct Args {
    /// Folder that a run recorded into with --record
    #[arg(value_name = "DIR")]
    folder: PathBuf,
    #[command(flatten)]
    backend: BackendArgs,
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
    let targets = replay::cases(&args.folder)?;
    let engine: Box<dyn Engine> = match args.backend.open()? {
        Chosen::Reference => Box::new(ReferenceEngine),
        Chosen::Device(gpu) => Box::new(CudaEngine::new(*gpu)),
    };
    let bar = output::progress(targets.len(), "replay");
    let mut reports = Vec::new();
    for target in &targets {
        bar.set_message(target.relative.display().to_string());
        reports.extend(replay::replay(target, &*engine, &args.op));
        bar.inc(1);
    }
    bar.finish_and_clear();
    if reports.is_empty() {
        return Err(format!("{}: no case of {}", args.folder.display(), args.op.join(", ")).into());
    }
    let ops = replay::by_op(&reports);
    let good = |r: &&FileReport| !matches!(r.status, Status::Pass | Status::Unsupported);
    let bad: Vec<&FileReport> = reports.iter().filter(good).collect();
    if args.json {
        output::print_json(&json!({ "backend": engine.name(), "ops": ops, "failing": bad }))?;
    } else {
        print_table(&engine.name(), &ops, &reports);
    }
    for error in bad.iter().filter_map(|r| r.error.as_ref()).take(SHOWN) {
        output::error(error);
    }
    Ok(match () {
        () if ops.iter().any(|op| op.error > 0) => Outcome::BadInput,
        () if ops.iter().any(|op| op.fail > 0) => Outcome::Fails,
        () if ops.iter().all(|op| op.pass == 0) => {
            return Err(format!("{} has a kernel for none of the cases", engine.name()).into());
        }
        () => Outcome::Holds,
    })
}

fn print_table(backend: &str, ops: &[OpSummary], reports: &[FileReport]) {
    let row = |op: &OpSummary| {
        let name = if op.op.is_empty() { "(unreadable)" } else { &op.op };
        let counts = [op.cases, op.pass, op.fail, op.unsupported, op.error].map(|n| n.to_string());
        let mut row = vec![name.to_owned()];
        row.extend(counts);
        row.extend([op.elements.to_string(), op.mismatches.to_string()]);
        row
    };
    let header = ["op", "cases", "pass", "fail", "no kernel", "error", "elements", "mismatches"];
    let right: Vec<usize> = (1..header.len()).collect();
    outln!("{}", output::table(&header, &right, ops.iter().map(row).collect()));
    for report in reports.iter().filter(|r| r.status == Status::Fail).take(SHOWN) {
        for d in &report.tensors {
            if let Some(first) = &d.first {
                outln!(
                    "{}: {} differs in {} of {} elements, first at {first}",
                    report.file,
                    d.name,
                    d.mismatches,
                    d.elements
                );
            }
        }
    }
    let pass: usize = ops.iter().map(|op| op.pass).sum();
    outln!("{pass} of {} cases agree in every bit on {backend}", reports.len());
}
