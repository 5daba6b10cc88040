//! `fathom search`: the best layouts for a model, a cluster and a memory limit.

use std::path::PathBuf;

use fathom_schedule::Shape;
use fathom_simulator::error::read_text;
use fathom_simulator::search::{Layout, SearchResult, search};
use fathom_simulator::serve::read::asks_for_serving;

use crate::output::{self, Outcome};
use crate::simulate::{self, parts, serve};

/// Find the best layouts for a model, a cluster and a memory limit
#[derive(clap::Args)]
#[command(after_help = "Examples:
  fathom search run.toml
  fathom search --preset deepseek-v3-h800-2048 --set search.memory_limit_gb=64
  fathom search run.toml --set search.gpus=[1024,2048] --json

FILE.toml is a scenario; its table [search] lists what is varied (tp, cp, pp, ep, zero, schedule,
interleave, micro_batch, recompute, gpus) and memory_limit_gb. The result is the Pareto front of
throughput, memory and cost. A scenario of serving is searched as `simulate serve --search` does, for
its own rate of requests.")]
pub struct Args {
    /// Scenario (TOML)
    #[arg(value_name = "FILE.toml", required_unless_present = "preset", conflicts_with = "preset")]
    file: Option<PathBuf>,
    /// Embedded scenario instead of a file
    #[arg(long, value_name = "NAME")]
    preset: Option<String>,
    /// Override a key; may be repeated
    #[arg(long, value_name = "KEY=VALUE")]
    set: Vec<String>,
    #[command(flatten)]
    cost: parts::CostArgs,
    /// Print one JSON document instead of a table
    #[arg(long)]
    json: bool,
    /// Rows of the table
    #[arg(long, value_name = "N", default_value_t = 20)]
    rows: usize,
    /// Simulate every legal layout, bounds unused
    #[arg(long)]
    no_prune: bool,
}

/// Whether the scenario is one of serving.
fn serves(args: &Args) -> bool {
    let text = args.file.as_ref().and_then(|file| read_text(file).ok());
    let preset = args.preset.as_ref().map(|name| format!("preset = \"{}\"", name.escape_default()));
    text.or(preset).is_some_and(|text| asks_for_serving(&text))
}

/// Runs the command.
pub fn run(args: &Args) -> output::Result {
    if serves(args) {
        return serve::layouts(args.file.as_deref(), args.preset.as_deref(), &args.set, args.json);
    }
    let scenario = simulate::scenario(args.file.as_deref(), args.preset.as_deref(), &args.set)?;
    let bar = output::progress(0, "search");
    let progress = |done: usize, all: usize| {
        bar.set_length(all as u64);
        bar.set_position(done as u64);
    };
    let named = |e| simulate::named(args.file.as_deref(), args.preset.as_deref(), e);
    let model = args.cost.model()?;
    let found = search(&scenario, &model, !args.no_prune, &progress).map_err(named)?;
    bar.finish_and_clear();
    if args.json {
        output::print_json(&found)?;
    } else {
        print(&found, args.rows);
    }
    Ok(if found.front.is_empty() { Outcome::Fails } else { Outcome::Holds })
}

fn print(found: &SearchResult, rows: usize) {
    if found.front.is_empty() {
        outln!("No legal layout fits in memory: all {} are too large.", found.considered);
    } else {
        let header = [
            "B tokens/day",
            "days",
            "step s",
            "MFU %",
            "GB",
            "K$/T tokens",
            "GPUs",
            "schedule",
            "pp",
            "tp",
            "cp",
            "ep",
            "dp",
            "zero",
            "mb",
            "recompute",
        ];
        let cells = found.front.iter().take(rows).map(row).collect();
        outln!(
            "{}",
            output::table(&header, &[0, 1, 2, 3, 4, 5, 6, 8, 9, 10, 11, 12, 13, 14], cells)
        );
        let hidden = found.front.len().saturating_sub(rows);
        if hidden > 0 {
            outln!("and {hidden} more on the front (--rows, --json)");
        }
    }
    outln!(
        "\n{} layouts considered ({} more combinations are illegal): {} simulated, {} pruned as \
         dominated, {} do not fit; {:.2} s",
        found.considered,
        found.illegal,
        found.simulated,
        found.dominated,
        found.too_large,
        found.wall_s
    );
}

fn row(l: &Layout) -> Vec<String> {
    let p = &l.parallel;
    let schedule = match l.schedule.shape() {
        Shape::Loop => format!("{} x{}", l.schedule.name(), l.interleave),
        _ => l.schedule.name().to_owned(),
    };
    vec![
        format!("{:.2}", l.tokens_per_day / 1e9),
        format!("{:.1}", l.days),
        format!("{:.3}", l.step_time_s),
        format!("{:.2}", 100.0 * l.mfu_causal),
        format!("{:.1}", l.memory_gb),
        format!("{:.0}", l.usd_per_trillion_tokens / 1e3),
        l.gpus.to_string(),
        schedule,
        p.pp.to_string(),
        p.tp.to_string(),
        p.cp.to_string(),
        p.ep.to_string(),
        p.dp.to_string(),
        p.zero.to_string(),
        l.micro_batch.to_string(),
        format!("{:?}", l.recompute).to_lowercase(),
    ]
}
