//! `fathom simulate alltoall`: one dispatch or combine of expert parallelism.

use std::path::PathBuf;

use fathom_config::MoeConfig;
use fathom_simulator::hardware;
use fathom_simulator::kernel_time::Constants;
use fathom_simulator::network::alltoall::{AllToAll, AllToAllModel, Beside, Exchange};
use serde_json::json;

use super::parts;
use crate::output::{self, Outcome};

/// Time an all-to-all of expert parallelism
#[derive(clap::Args)]
#[command(after_help = "Examples:
  fathom simulate alltoall --ep 64
  fathom simulate alltoall --ep 32 --groups 4 --limited-groups 4 --combine
  fathom simulate alltoall --cluster gb200-nvl72-1152 --ep 64 --json

--json: {seconds, scale_out_s, scale_up_s, nodes_per_token, received, logical_bytes_per_s,
wire_bytes_per_s, under_compute_s}.")]
pub struct Args {
    /// Model preset that routes
    #[arg(long, default_value = "deepseek-v3", conflicts_with = "config")]
    model: String,
    /// Hugging Face config.json of another model
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Cluster preset
    #[arg(long, default_value = "h800-2048")]
    cluster: String,
    /// Ranks of the expert group
    #[arg(long, value_parser = clap::value_parser!(u64).range(2..=65536))]
    ep: u64,
    /// Tokens of a rank
    #[arg(long, default_value_t = 4096, value_parser = clap::value_parser!(u64).range(1..=1 << 24))]
    tokens: u64,
    /// The way back: outputs of the experts are summed
    #[arg(long)]
    combine: bool,
    /// Bytes of a token [default: FP8 with scales as dispatched, BF16 as combined]
    #[arg(long)]
    token_bytes: Option<u64>,
    /// Groups of experts, instead of the model's
    #[arg(long)]
    groups: Option<u64>,
    /// Groups that a token may use, instead of the model's
    #[arg(long)]
    limited_groups: Option<u64>,
    /// Load of the busiest rank relative to the mean
    #[arg(long, default_value_t = 1.0)]
    load: f64,
    /// SMs that run it
    #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u64).range(2..=1024))]
    sms: u64,
    /// Share of the memory bandwidth that computation takes beside, for the time under computation
    #[arg(long, default_value_t = 0.25)]
    memory_share: f64,
    /// Hardware wishes to grant, by commas
    #[arg(long, value_name = "NAMES", value_delimiter = ',')]
    what_if: Vec<String>,
    /// Print one JSON document
    #[arg(long)]
    json: bool,
}

/// Runs the command.
pub fn run(args: &Args) -> output::Result {
    let model = parts::model(&args.model, args.config.as_deref())?;
    let moe = model.moe.ok_or_else(|| format!("{} has no routed experts", model.name))?;
    let groups = args.groups.unwrap_or(moe.n_group as u64);
    let limited = args.limited_groups.unwrap_or((moe.topk_group as u64).min(groups));
    let experts = moe.n_routed_experts as u64;
    if groups == 0 || !experts.is_multiple_of(groups) || !(1..=groups).contains(&limited) {
        return Err(
            format!("{experts} experts in {groups} groups, {limited} of them a token").into()
        );
    }
    if !experts.is_multiple_of(args.ep) {
        return Err(format!("--ep {} does not divide the {experts} routed experts", args.ep).into());
    }
    if !((1.0..=1e6).contains(&args.load) && (0.0..=1.0).contains(&args.memory_share)) {
        return Err("--load lies in 1 to 1e6, --memory-share in 0 to 1".into());
    }
    let moe = MoeConfig { n_group: groups as usize, topk_group: limited as usize, ..moe };
    let cluster = hardware::cluster(&args.cluster)?;
    let node = cluster.gpus_per_node;
    if args.ep > cluster.gpus || (args.ep > node && !args.ep.is_multiple_of(node)) {
        let gpus = cluster.gpus;
        return Err(format!("--ep {} on {gpus} GPUs in nodes of {node}", args.ep).into());
    }
    let fp8 = model.hidden_size + 4 * model.hidden_size.div_ceil(128);
    let (exchange, bytes) = match args.combine {
        false => (Exchange::Dispatch, fp8),
        true => (Exchange::Combine, 2 * model.hidden_size),
    };
    let op = AllToAll {
        exchange,
        ep: args.ep,
        tokens: args.tokens,
        token_bytes: args.token_bytes.unwrap_or(bytes as u64) as f64,
        load: args.load,
        sms: args.sms,
    };
    let wishes = parts::what_if(&args.what_if)?;
    let network = AllToAllModel::new(&cluster, Constants::FITTED, wishes);
    let t = network.alone(&moe, &op);
    // Computation as long as the exchange by itself, which takes its share of the memory.
    let beside = Beside { memory_s: args.memory_share * t.seconds, compute_s: t.seconds };
    let under = network.under_compute(&moe, &op, beside);
    if args.json {
        let mut value = serde_json::to_value(t)?;
        value["under_compute_s"] = json!(under);
        output::print_json(&value)?;
        return Ok(Outcome::Holds);
    }
    let us = |s: f64| format!("{:>10.1} us", s * 1e6);
    outln!("alone              {}", us(t.seconds));
    outln!("scale-out stage    {}", us(t.scale_out_s));
    outln!("forwarding stage   {}", us(t.scale_up_s));
    outln!("under computation  {}", us(under));
    outln!("nodes a token      {:>10.3}", t.nodes_per_token);
    outln!("tokens received    {:>10.0}", t.received);
    outln!("logical bandwidth  {:>10.1} GB/s", t.logical_bytes_per_s / 1e9);
    outln!("through a NIC      {:>10.1} GB/s", t.wire_bytes_per_s / 1e9);
    Ok(Outcome::Holds)
}
