//! `fathom emulate run`: one launch file - PTX, arguments, expected outputs - on the emulator.

use std::path::PathBuf;

use fathom_emulator::run::{Outcome as Ran, run_file};
use fathom_emulator::{Checks, KernelRecord, Settings};
use serde_json::json;

use crate::output::{self, Outcome};

/// Run one launch file (PTX, arguments, expected outputs) and compare what it writes
#[derive(clap::Args)]
#[command(after_help = "Examples:
  fathom emulate run kernels/axpy.json
  fathom emulate run gemm.json --check all --profile --json

The format of launch files: docs/emulator.md. FATHOM_EXTRA_PTX=DIR makes the test suite run a
folder of them.")]
pub struct Args {
    /// The launch file; its PTX and its case file lie beside it
    #[arg(value_name = "LAUNCH.json")]
    file: PathBuf,
    /// Device preset: h100, h800, h200, a100, rtx-pro-6000 or next
    #[arg(long, default_value = "h800")]
    gpu: String,
    /// Sanitizers: memory, races, uninit, sync, or all
    #[arg(long, value_name = "LIST", default_value = "", hide_default_value = true)]
    check: String,
    /// Count memory transactions and bank conflicts, and print the kernel's table
    #[arg(long)]
    profile: bool,
    /// Permute the order in which warps and CTAs take turns
    #[arg(long, value_name = "N", default_value_t = 0)]
    schedule_seed: u64,
    /// Print one JSON document instead of text
    #[arg(long)]
    json: bool,
}

/// Runs the command.
pub fn run(args: &Args) -> output::Result {
    let settings = Settings {
        checks: Checks::parse(&args.check)?,
        schedule_seed: args.schedule_seed,
        profile: args.profile,
        ..Settings::default()
    };
    let ran = run_file(&args.file, &args.gpu, settings)?;
    if args.json {
        print_json(&ran)?;
    } else {
        print(&ran, args.profile);
    }
    Ok(if ran.holds() { Outcome::Holds } else { Outcome::Fails })
}

fn print_json(ran: &Ran) -> serde_json::Result<()> {
    let outputs = ran.compared.iter().map(|c| {
        let first = c.first.as_ref().map(|(index, expected, found)| {
            json!({ "index": index, "expected": expected, "found": found })
        });
        json!({
            "name": c.name,
            "elements": c.elements,
            "mismatches": c.differing,
            "first": first,
        })
    });
    output::print_json(&json!({
        "status": match ran.holds() {
            false => "fail",
            true if ran.compared.is_empty() => "computed",
            true => "pass",
        },
        "outputs": outputs.collect::<Vec<_>>(),
        "findings": ran.report.findings.iter().map(ToString::to_string).collect::<Vec<_>>(),
        "printed": ran.report.printed,
        "record": ran.report.record,
    }))
}

fn print(ran: &Ran, profile: bool) {
    out!("{}", ran.report.printed);
    let record = &ran.report.record;
    outln!(
        "{}: {} thread instructions, {:.3} tensor-core GFLOP",
        record.kernel,
        record.thread_instructions,
        record.tensor_core_flops as f64 / 1e9
    );
    for c in &ran.compared {
        outln!("{}: {} elements, {} mismatches", c.name, c.elements, c.differing);
        if let Some((index, expected, found)) = &c.first {
            outln!("  the first at {index}: expected {expected}, found {found}");
        }
    }
    if ran.compared.is_empty() {
        outln!("nothing was compared: the case file expects no output");
    }
    for (instruction, count) in &record.approximate {
        outln!("{count} x {instruction}: approximate, its bits are not guaranteed");
    }
    if profile {
        print_profile(record);
    }
    if !ran.report.findings.is_empty() {
        outln!("{} findings:", ran.report.findings.len());
        ran.report.findings.iter().for_each(|f| outln!("{f}"));
    }
}

/// Warp instructions by class, a column per role; then the memory counts.
fn print_profile(record: &KernelRecord) {
    let mut header = vec!["warp instructions".to_owned(), "all".to_owned()];
    let warps = |w: &[u32]| match w {
        [] => "no warp".to_owned(),
        [one] => format!("warp {one}"),
        [first, .., last] => format!("{} warps {first}..{last}", w.len()),
    };
    header.extend(record.roles.iter().map(|r| warps(&r.warps)));
    let rows = record.instructions.iter().map(|(class, count)| {
        let roles = record.roles.iter().map(|r| r.instructions.get(class).copied().unwrap_or(0));
        let counts = std::iter::once(*count).chain(roles).map(|n| n.to_string());
        std::iter::once(class.clone()).chain(counts).collect()
    });
    let header: Vec<&str> = header.iter().map(String::as_str).collect();
    let right: Vec<usize> = (1..header.len()).collect();
    outln!("{}", output::table(&header, &right, rows.collect()));
    let counts = [
        ("global bytes read", record.global_bytes_read),
        ("global bytes written", record.global_bytes_written),
        ("global transactions", record.global_transactions),
        ("global sectors", record.global_sectors),
        ("shared requests", record.shared_requests),
        ("bank conflicts", record.bank_conflicts),
        ("bytes read by TMA", record.tma_bytes_read),
        ("bytes written by TMA", record.tma_bytes_written),
        ("barrier waits", record.barrier_waits),
    ];
    let rows = counts.into_iter().chain(record.tensor_core.iter().map(|(n, c)| (n.as_str(), *c)));
    let rows = rows.map(|(name, count)| vec![name.to_owned(), count.to_string()]).collect();
    outln!("{}", output::table(&["memory, barriers, tensor cores", "count"], &[1], rows));
}
