//! `fathom model trace`: what a training step consists of on one rank of a layout.

use std::path::PathBuf;
use std::time::Instant;

use fathom_reference::backend::Load;
use fathom_reference::files;
use fathom_reference::model::workload::{self, Workload};
use fathom_reference::parallel::Parallel;
use fathom_reference::precision::{Mode, Recipe};
use fathom_trace::OpRecord;
use fathom_trace::jsonl::Writer;
use serde_json::json;

use crate::output::{self, Outcome};

/// Record a training step of one rank of a layout, without weights
#[derive(clap::Args)]
#[command(after_help = "Example:
  fathom model trace deepseek-v3 --pp 16 --ep 64 --dp 128 --rank 700 --op-trace ops.jsonl

Experts' load is even. Ranks are numbered tensor parallel first, then context, data,
pipeline.")]
pub struct Args {
    /// A preset's name, a config.json, or a folder in Hugging Face's layout
    #[arg(value_name = "MODEL")]
    model: PathBuf,
    /// Tensor-parallel ranks
    #[arg(long, value_name = "N", default_value_t = 1)]
    tp: usize,
    /// Pipeline stages
    #[arg(long, value_name = "N", default_value_t = 1)]
    pp: usize,
    /// Expert-parallel ranks, of those of a pipeline stage
    #[arg(long, value_name = "N", default_value_t = 1)]
    ep: usize,
    /// Data-parallel ranks
    #[arg(long, value_name = "N", default_value_t = 1)]
    dp: usize,
    /// Context-parallel ranks, which share a sequence in equal parts
    #[arg(long, value_name = "N", default_value_t = 1)]
    cp: usize,
    /// The rank, counted from 0
    #[arg(long, value_name = "N", default_value_t = 0)]
    rank: usize,
    /// Tokens of a sequence
    #[arg(long, value_name = "N", default_value_t = 4096)]
    sequence: usize,
    /// Sequences of a micro-batch on this rank
    #[arg(long, value_name = "N", default_value_t = 1)]
    micro_batch: usize,
    /// Micro-batches of the step
    #[arg(long, value_name = "N", default_value_t = 1)]
    micro_batches: usize,
    /// Leave MTP modules out, whatever the configuration announces
    #[arg(long)]
    without_mtp: bool,
    /// Precision mode
    #[arg(long, value_name = "MODE", default_value = "fp8", value_parser = crate::eval::mode)]
    precision: Mode,
    /// Write the op trace (JSON Lines) to this file
    #[arg(long, value_name = "FILE")]
    op_trace: Option<PathBuf>,
    /// Print one JSON document
    #[arg(long)]
    json: bool,
}

/// Runs the command.
pub fn run(args: &Args) -> output::Result {
    files::keep_apart([&args.model], &args.op_trace)?;
    let config = super::read(&args.model, args.without_mtp)?;
    let Args { tp, pp, ep, dp, cp, rank, sequence, .. } = *args;
    let parallel = Parallel { tp, pp, ep, dp, cp };
    if cp == 0 || !sequence.is_multiple_of(cp) || sequence == 0 {
        return Err(format!("--sequence {sequence} cannot be split over --cp {cp}").into());
    }
    let workload = Workload {
        sequences: args.micro_batch.max(1),
        sequence_length: sequence / cp,
        micro_batches: args.micro_batches.max(1),
        load: Load::Balanced,
    };
    let begin = Instant::now();
    let recipe = Recipe::new(args.precision);
    let records = workload::record(&config, &recipe, parallel, rank, &workload)?;
    let seconds = begin.elapsed().as_secs_f64();
    if let Some(path) = &args.op_trace {
        let mut writer = Writer::<OpRecord, _>::new(Vec::new())?;
        for record in &records {
            writer.write(record)?;
        }
        output::write_file(path, &writer.finish()?)?;
    }
    let shares = workload::by_component(&records);
    if args.json {
        let document = json!({ "ops": records.len(), "components": shares, "seconds": seconds });
        output::print_json(&document)?;
        return Ok(Outcome::Holds);
    }
    let row = |share: &workload::Share| {
        let name = format!("{:?}", share.component).to_lowercase();
        let giga = |n: u64| format!("{:.3}", n as f64 / 1e9);
        let numbers = [share.flops, share.bytes, share.bytes_sent].map(giga);
        let mut row = vec![name, share.ops.to_string()];
        row.extend(numbers);
        row
    };
    let header = ["component", "ops", "GFLOP", "GB moved", "GB sent"];
    outln!("{}", output::table(&header, &[1, 2, 3, 4], shares.iter().map(row).collect()));
    outln!("{} ops of rank {rank}, recorded in {seconds:.3} s", records.len());
    Ok(Outcome::Holds)
}
