//! `fathom diagnose`: which arithmetic produced a case file's output?

use std::path::PathBuf;

use fathom_conformance::diagnose::{diagnose, page};
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
    /// A case file with at least one expected output (`out.<role>`)
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
        outln!("{}\n", diagnosis.verdict);
        let rows = diagnosis
            .hypotheses
            .iter()
            .map(|h| vec![h.words(), h.agree.to_string(), h.agree_of_mismatched.to_string()]);
        let header = ["hypothesis", "agree", "of the differing"];
        outln!("{}", output::table(&header, &[1, 2], rows.collect()));
        outln!(
            "{} of {} elements examined, {} differ from the contract, {} hypotheses tried",
            diagnosis.examined,
            diagnosis.elements,
            diagnosis.mismatches,
            diagnosis.tried
        );
    }
    Ok(if diagnosis.mismatches == 0 { Outcome::Holds } else { Outcome::Fails })
}
