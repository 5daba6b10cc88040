//! `fathom case`: the ops that a case file can hold, their tensors and parameters, an example of
//! each.

use std::path::PathBuf;

use fathom_conformance::case_file;
use fathom_conformance::catalog::{self, Entry, TensorEntry};
use fathom_reference::op::entry_of;

use crate::output::{self, Outcome};

/// List the ops of case files, show one, write an example of it
#[derive(clap::Args)]
#[command(after_help = "Examples:
  fathom case list                             every op with its inputs and outputs
  fathom case show gemm_fp8                    dtypes, shapes, parameters with types and defaults
  fathom case example gemm_fp8 --out a.safetensors
  fathom check a.safetensors                   which passes

What a case file is and how to write one from PyTorch: docs/case-files.md.")]
pub struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(clap::Subcommand)]
enum Command {
    /// Every op with the roles of its inputs and outputs
    #[command(after_help = "Examples:
  fathom case list
  fathom case list --json | jq '.ops[].op'")]
    List {
        /// Print one JSON document: all that `show` says, of every op
        #[arg(long)]
        json: bool,
    },
    /// One op: its tensors with dtypes and shapes, its parameters with types and defaults
    #[command(after_help = "Example:
  fathom case show attention

A shape is written in the op's parameters and in names of its own; the example's sizes stand
beside it.")]
    Show {
        /// The op
        op: String,
        /// Print one JSON document
        #[arg(long)]
        json: bool,
    },
    /// Write a small case file of an op, with the contract's outputs
    #[command(after_help = "Examples:
  fathom case example router                   writes router.safetensors
  fathom case example router --out a/b.safetensors

The file has the same bytes everywhere. `fathom check` passes on it; put a kernel's outputs in
place of its out. tensors to check the kernel.")]
    Example {
        /// The op
        op: String,
        /// The file; default: OP.safetensors in the current folder
        #[arg(long, value_name = "FILE")]
        out: Option<PathBuf>,
    },
}

/// Runs the command.
pub fn run(args: &Args) -> output::Result {
    match &args.command {
        Command::List { json: true } => {
            output::print_json(&serde_json::json!({ "ops": catalog::entries() }))?;
        }
        Command::List { json: false } => print_list(&catalog::entries()),
        Command::Show { op, json } => {
            let entry = catalog::entry(entry_of(op)?);
            if *json { output::print_json(&entry)? } else { print_entry(&entry) }
        }
        Command::Example { op, out } => {
            let file = catalog::example(entry_of(op)?)?;
            let path = out.clone().unwrap_or_else(|| format!("{op}.safetensors").into());
            case_file::write(&path, &file)?;
            outln!("{}: fathom check {0}", path.display());
        }
    }
    Ok(Outcome::Holds)
}

fn print_list(entries: &[Entry]) {
    let roles = |tensors: &[TensorEntry]| {
        let role =
            |t: &TensorEntry| if t.optional { format!("[{}]", t.role) } else { t.role.into() };
        tensors.iter().map(role).collect::<Vec<String>>().join(", ")
    };
    let row = |e: &Entry| vec![e.op.to_owned(), roles(&e.inputs), roles(&e.outputs)];
    let header = ["op", "inputs, [optional]", "outputs"];
    outln!("{}", output::table(&header, &[], entries.iter().map(row).collect()));
}

fn print_entry(entry: &Entry) {
    outln!("{}: {}\n", entry.op, entry.words);
    let row = |prefix: &str, t: &TensorEntry| {
        let optional = if t.optional { " (optional)" } else { "" };
        let role = format!("{prefix}{}{optional}", t.role);
        vec![role, t.dtype.clone(), t.shape.to_owned(), format!("{:?}", t.example)]
    };
    let inputs = entry.inputs.iter().map(|t| row("", t));
    let rows = inputs.chain(entry.outputs.iter().map(|t| row(case_file::OUT, t)));
    let header = ["tensor", "dtype", "shape", "example"];
    outln!("{}\n", output::table(&header, &[], rows.collect()));
    let rows = entry.params.iter().map(|p| {
        let default = p.default.as_ref().map_or("-".to_owned(), ToString::to_string);
        // The parts of a nested parameter have rows of their own.
        let kind = match (p.kind.starts_with('{'), p.kind.ends_with("null")) {
            (true, true) => "object or null".to_owned(),
            (true, false) => "object".to_owned(),
            (false, _) => p.kind.clone(),
        };
        vec![p.name.clone(), kind, default, p.words.clone()]
    });
    let header = ["parameter", "type", "default", ""];
    outln!("{}\n", output::table(&header, &[], rows.collect()));
    outln!("params of the example: {}", entry.example);
}
