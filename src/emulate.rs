//! `fathom emulate`: run any command on the emulated driver, or one launch file.

mod findings;
mod launch;
mod report;

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitStatus;

use fathom_libcuda::{Choices, MOST_DEVICES, OnFinding, Summary, prepare};
use fathom_reference::files;
use serde_json::json;

use crate::output::{self, Outcome};
use findings::Format;

/// Run any command with an emulated CUDA driver in place of NVIDIA's
#[derive(clap::Args)]
#[command(
    args_conflicts_with_subcommands = true,
    subcommand_negates_reqs = true,
    after_help = "Examples:
  fathom emulate -- python3 my_test.py
  fathom emulate --check memory,races,uninit,sync -- ./gemm_test
  fathom emulate --gpu h100 --profile --trace traces/ -- python3 my_test.py
  fathom emulate run kernels/axpy.json

Exit code: the command's own (128 and the signal where one ended it); 1 where that is 0 and there were
findings, or launches that could not run.

Nothing is installed: the library lies in a private folder for as long as the command runs."
)]
pub struct Args {
    #[command(subcommand)]
    one: Option<Command>,
    /// Device preset: h100, h800, h200, a100, rtx-pro-6000 or next
    #[arg(long, default_value = "h800")]
    gpu: String,
    /// Emulated devices, all peers of one another
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u8).range(1..=MOST_DEVICES.into()))]
    devices: u8,
    /// Sanitizers: memory, races, uninit, sync, or all
    #[arg(long, value_name = "LIST", default_value = "", hide_default_value = true)]
    check: String,
    /// Write a kernel trace (JSON Lines) into this folder
    #[arg(long, value_name = "DIR")]
    trace: Option<PathBuf>,
    /// Count memory transactions and bank conflicts, and print a table of kernels
    #[arg(long)]
    profile: bool,
    /// Permute the order in which warps and CTAs take turns
    #[arg(long, value_name = "N", default_value_t = 0)]
    schedule_seed: u64,
    /// After a finding that stops a kernel: `report` it and go on, lose the `context` as on
    /// hardware, or `abort` the process
    #[arg(long, value_name = "WHAT", default_value = "context",
          value_parser = OnFinding::ALL.map(|(word, _)| word))]
    on_finding: String,
    /// Write the summary as one JSON document to this file
    #[arg(long, value_name = "FILE")]
    summary: Option<PathBuf>,
    /// Write the findings to this file: FILE.json, FILE.sarif, or FILE.xml (JUnit)
    #[arg(long, value_name = "FILE")]
    findings: Option<PathBuf>,
    /// Write a page of the run: launches, time, work and findings by kernel, and whose bits are
    /// exact
    #[arg(long, value_name = "FILE.html")]
    report: Option<PathBuf>,
    /// The command and its arguments
    #[arg(required = true, last = true, value_name = "CMD")]
    command: Vec<OsString>,
}

#[derive(clap::Subcommand)]
enum Command {
    Run(launch::Args),
}

/// Runs the command.
pub fn run(args: &Args) -> output::Result {
    if let Some(Command::Run(args)) = &args.one {
        return launch::run(args);
    }
    let program = PathBuf::from(&args.command[0]);
    let written = [&args.summary, &args.trace, &args.findings, &args.report];
    files::keep_apart([&program], written.into_iter().flatten())?;
    let format = args.findings.as_deref().map(Format::of).transpose()?;
    fathom_emulator::Preset::named(&args.gpu)?;
    fathom_emulator::Checks::parse(&args.check)?;
    let choices = Choices {
        gpu: args.gpu.clone(),
        devices: args.devices.into(),
        check: args.check.clone(),
        trace: args.trace.as_ref().map(std::path::absolute).transpose()?,
        profile: args.profile,
        schedule_seed: args.schedule_seed,
        on_finding: OnFinding::named(&args.on_finding).expect("checked by its parser"),
        summary: None,
    };
    let prepared = prepare::prepare(choices)?;
    let mut command = prepared.command(&args.command[0]);
    let status = command
        .args(&args.command[1..])
        .status()
        .map_err(|e| format!("{}: {e}", args.command[0].to_string_lossy()))?;
    let summary = prepared.summary()?;
    print_summary(&summary, args.profile);
    if let Some(path) = &args.summary {
        let text = serde_json::to_vec_pretty(&json!({
            "exit_code": status.code(),
            "summary": summary,
        }))?;
        fathom_conformance::write_atomically(path, &text)
            .map_err(|e| format!("{}: {e}", path.display()))?;
    }
    if let (Some(path), Some(format)) = (&args.findings, format) {
        output::write_file(path, format.document(&summary).as_bytes())?;
    }
    if let Some(path) = &args.report {
        let words: Vec<_> = args.command.iter().map(|w| w.to_string_lossy()).collect();
        let page = report::page(&summary, &words.join(" "), &args.gpu, &args.check);
        output::write_file(path, page.as_bytes())?;
    }
    if !status.success() {
        errln!("fathom: {} ended with {status}", args.command[0].to_string_lossy());
    }
    let clean = summary.findings.is_empty() && summary.errors.is_empty();
    Ok(match code(status) {
        0 if clean => Outcome::Holds,
        0 => Outcome::Fails,
        other => Outcome::Ended(other),
    })
}

/// The exit code of a command as a shell gives it: 128 and the signal's number where one ended it.
fn code(status: ExitStatus) -> u8 {
    #[cfg(unix)]
    if let Some(signal) = std::os::unix::process::ExitStatusExt::signal(&status) {
        return 128u8.saturating_add(signal as u8);
    }
    status.code().map_or(1, |code| code as u8)
}

/// Under the name `ptxas` the program stands in for NVIDIA's assembler: the PTX itself, with a NUL
/// after it, is the 'cubin' that the emulated driver loads.
pub fn as_ptxas() -> Option<u8> {
    let mut args = std::env::args_os();
    let program = PathBuf::from(args.next()?);
    if program.file_stem()? != "ptxas" {
        return None;
    }
    let args: Vec<OsString> = args.collect();
    if args.iter().any(|a| a == "--version") {
        outln!("ptxas: stand-in of the emulated driver");
        outln!("Cuda compilation tools, release 13.0, V13.0.0");
        return Some(0);
    }
    let output = args.iter().position(|a| a == "-o").and_then(|i| args.get(i + 1));
    let input = args.iter().find(|a| PathBuf::from(a).extension().is_some_and(|e| e == "ptx"));
    let (Some(input), Some(output)) = (input, output) else {
        errln!("ptxas: expected FILE.ptx and -o FILE");
        return Some(2);
    };
    let packed = files::read(input.as_ref(), files::TEXT_BYTES).map(|mut text| {
        text.push(0);
        text
    });
    match packed.and_then(|packed| std::fs::write(output, packed)) {
        Ok(()) => Some(0),
        Err(error) => {
            errln!("ptxas: {}: {error}", input.to_string_lossy());
            Some(2)
        }
    }
}

/// The summary goes to stderr: stdout is the command's.
fn print_summary(summary: &Summary, profile: bool) {
    errln!(
        "fathom: {} launches of {} kernels, {} thread instructions, {:.3} tensor-core GFLOP",
        summary.launches,
        summary.kernels.len(),
        summary.thread_instructions,
        summary.tensor_core_flops as f64 / 1e9
    );
    if profile && !summary.kernels.is_empty() {
        let rows = summary.kernels.iter().map(|(name, t)| {
            vec![
                name.clone(),
                t.launches.to_string(),
                t.thread_instructions.to_string(),
                format!("{:.3}", t.tensor_core_flops as f64 / 1e9),
                t.global_bytes_read.to_string(),
                t.global_bytes_written.to_string(),
                t.global_sectors.to_string(),
                t.bank_conflicts.to_string(),
                t.barrier_waits.to_string(),
            ]
        });
        let header = [
            "kernel",
            "launches",
            "thread instr.",
            "TC GFLOP",
            "bytes read",
            "bytes written",
            "sectors",
            "bank conflicts",
            "barrier waits",
        ];
        errln!("{}", output::table(&header, &[1, 2, 3, 4, 5, 6, 7, 8], rows.collect()));
    }
    if !summary.approximate.is_empty() {
        let list: Vec<_> = summary.approximate.iter().map(|(m, n)| format!("{m} ({n})")).collect();
        errln!(
            "fathom: approximate instructions, whose bits hardware does not promise: {}",
            list.join(", ")
        );
    }
    if !summary.findings.is_empty() {
        errln!("fathom: {} findings:", summary.findings.len());
        summary.findings.iter().for_each(|f| errln!("{f}"));
    }
    if !summary.errors.is_empty() {
        errln!("fathom: {} launches or modules could not run (see above)", summary.errors.len());
    }
}
