//! `fathom diagnose`: which arithmetic produced a case file's output?

use std::path::PathBuf;

use fathom_conformance::diagnose::{Diagnosis, diagnose, grouped, page};
use fathom_conformance::{case_file, write_atomically};
use fathom_reference::files;

use crate::output::{self, Outcome};

/// Say which arithmetic produced a case file's output
#[derive(clap::Args)]
#[command(after_help = "Examples:
  fathom diagnose gemm.safetensors
  fathom diagnose gemm.safetensors --html diagnosis.html   a page with a map of the mismatches
  fathom diagnose gemm.safetensors --json

Exit codes: 0 the output is the contract's, 1 it is not (explained or unexplained), 2 bad input.")]
pub struct Args {
    /// A case file with at least one output (`out.<role>`)
    #[arg(value_name = "CASE")]
    case: PathBuf,
    /// Print one JSON document instead of text
    #[arg(long)]
    json: bool,
    /// Write a self-contained HTML page
    #[arg(long, value_name = "FILE")]
    html: Option<PathBuf>,
}

/// Runs the command.
pub fn run(args: &Args) -> output::Result {
    files::keep_apart([&args.case], &args.html)?;
    let file = case_file::read(&args.case)?;
    let bar = indicatif::ProgressBar::new_spinner();
    let progress = |tried| bar.set_message(format!("{tried} hypotheses"));
    let diagnosis =
        diagnose(&file, &progress).map_err(|e| format!("{}: {e}", args.case.display()))?;
    bar.finish_and_clear();
    if let Some(path) = &args.html {
        let title = args.case.file_name().unwrap_or(args.case.as_os_str()).to_string_lossy();
        write_atomically(path, page(&title, &diagnosis).as_bytes())
            .map_err(|e| format!("{}: {e}", path.display()))?;
    }
    if args.json {
        output::print_json(&diagnosis)?;
    } else {
        print(&diagnosis);
    }
    Ok(if diagnosis.mismatches == 0 { Outcome::Holds } else { Outcome::Fails })
}

/// The verdict, the hypotheses, and how far the file is from the contract.
fn print(d: &Diagnosis) {
    outln!("{}\n", d.verdict);
    if let Some(k) = &d.k_blocks {
        let off = k.off.iter().map(|&b| {
            let to = format!("{}..{}", b * k.block, (b + 1) * k.block);
            vec![b.to_string(), to, format!("{:+.4}", 1.0 + k.coefficients[b])]
        });
        let header = ["K block", "elements of K", "counts times"];
        outln!("{}\n", output::table(&header, &[0, 2], off.take(16).collect()));
    }
    let rows = d.hypotheses.iter().map(|h| {
        let chance = if h.deviations.is_empty() { String::new() } else { percent(h.chance) };
        vec![h.words(), grouped(h.agree), grouped(h.agree_of_mismatched), chance]
    });
    let header = ["hypothesis", "agree", "of the differing", "by chance"];
    outln!("{}", output::table(&header, &[1, 2, 3], rows.collect()));
    outln!(
        "{} of {} elements of the file examined, {} differ from the contract, {} hypotheses tried",
        grouped(d.examined),
        grouped(d.elements),
        grouped(d.mismatches),
        grouped(d.tried)
    );
}

/// A share of the differing elements.
fn percent(share: f64) -> String {
    format!("{:.1} %", 100.0 * share)
}
