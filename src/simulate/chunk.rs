//! `fathom simulate chunk`: one overlapped forward-backward pair by itself.

use std::path::PathBuf;

use fathom_simulator::chunk::{ChunkQuestion, ChunkReport};
use fathom_simulator::config::Precision;
use fathom_simulator::{hardware, validate};

use super::parts;
use crate::output::{self, Outcome};

/// Time one overlapped forward-backward pair of chunks, phase by phase
#[derive(clap::Args)]
#[command(after_help = "Examples:
  fathom simulate chunk
  fathom simulate chunk --cluster h100-16384 --layers 4 --what-if comm_off_sms,transposed_reads
  fathom simulate chunk --profile --json

--json: {span_s, compute_busy_s, gaps_s, communication_s, hidden_fraction, compute_sms, phases: [{phase, mean_s}]}.")]
pub struct Args {
    /// Model preset
    #[arg(long, default_value = "deepseek-v3", conflicts_with = "config")]
    model: String,
    /// Hugging Face config.json of another model
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Cluster preset
    #[arg(long, default_value = "h800-64")]
    cluster: String,
    /// Tokens of a micro-batch
    #[arg(long, default_value_t = 4096, value_parser = clap::value_parser!(u64).range(1..=1 << 24))]
    tokens: u64,
    /// Layers of a chunk, with balanced experts
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u64).range(1..=1024))]
    layers: u64,
    /// Ranks of the expert group
    #[arg(long, default_value_t = 64, value_parser = clap::value_parser!(u64).range(1..=65536))]
    ep: u64,
    /// SMs that communicate
    #[arg(long, default_value_t = 20)]
    comm_sms: u64,
    /// BF16 instead of FP8
    #[arg(long)]
    bf16: bool,
    /// The loads of the published profile instead of balanced experts
    #[arg(long, conflicts_with = "layers")]
    profile: bool,
    /// Hardware wishes to grant, by commas
    #[arg(long, value_name = "NAMES", value_delimiter = ',')]
    what_if: Vec<String>,
    #[command(flatten)]
    cost: parts::CostArgs,
    /// Print one JSON document
    #[arg(long)]
    json: bool,
}

/// Runs the command.
pub fn run(args: &Args) -> output::Result {
    let report = question(args)?.simulate(&args.cost.model()?)?;
    if args.json {
        output::print_json(&report)?;
    } else {
        print(&report);
    }
    Ok(Outcome::Holds)
}

fn question(args: &Args) -> Result<ChunkQuestion, Box<dyn std::error::Error>> {
    let loads = if args.profile {
        validate::PROFILE_LOADS.to_vec()
    } else {
        vec![(1.0, 1.0); args.layers as usize]
    };
    Ok(ChunkQuestion {
        model: parts::model(&args.model, args.config.as_deref())?,
        cluster: hardware::cluster(&args.cluster)?,
        tokens: args.tokens,
        ep: args.ep,
        comm_sms: args.comm_sms,
        precision: if args.bf16 { Precision::Bf16 } else { Precision::Fp8 },
        what_if: parts::what_if(&args.what_if)?,
        loads,
    })
}

fn print(r: &ChunkReport) {
    let ms = |s: f64| format!("{:.3}", s * 1e3);
    outln!("span                {:>9} ms", ms(r.span_s));
    outln!("compute busy        {:>9} ms on {} SMs", ms(r.compute_busy_s), r.compute_sms);
    outln!("gaps of kernels     {:>9} ms", ms(r.gaps_s));
    outln!("communication       {:>9} ms", ms(r.communication_s));
    outln!("hidden              {:>9} %\n", format!("{:.1}", r.hidden_fraction * 100.0));
    let rows = r.phases.iter().map(|p| vec![p.phase.clone(), ms(p.mean_s)]).collect();
    outln!("{}", output::table(&["phase", "mean ms a layer"], &[1], rows));
}
