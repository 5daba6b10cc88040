//! `fathom simulate`: a training step on a cluster, and the parts of the simulator by themselves.

mod schedule;

use clap::Subcommand;

use crate::output;

/// Time a training step on a cluster that need not exist
#[derive(clap::Args)]
#[command(args_conflicts_with_subcommands = true)]
pub struct Args {
    #[command(subcommand)]
    part: Part,
}

#[derive(Subcommand)]
enum Part {
    Schedule(schedule::Args),
}

/// Runs the command.
pub fn run(args: &Args) -> output::Result {
    match &args.part {
        Part::Schedule(args) => schedule::run(args),
    }
}
