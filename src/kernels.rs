//! `fathom kernels`: what compiling CUDA kernels needs, and what they compute.

use fathom_conformance::coverage;
use fathom_gpu::nvrtc;

use crate::output::{self, Outcome};

/// Fetch NVRTC, the compiler that CUDA steps need; say what the kernels cover
#[derive(clap::Args)]
pub struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(clap::Subcommand)]
enum Command {
    /// Download NVIDIA's run-time compiler once, with pip, into the cache folder
    FetchNvrtc,
    /// Print which ops of which runs kernels compute, as Markdown: the tables of the documentation
    Coverage,
}

/// Runs the command.
pub fn run(args: &Args) -> output::Result {
    match args.command {
        Command::Coverage => {
            let coverage = coverage::coverage()?;
            outln!("{}\n{}", coverage.by_run(), coverage.by_op());
            Ok(Outcome::Holds)
        }
        Command::FetchNvrtc => {
            if nvrtc::find().is_none() {
                errln!("downloading {} with pip", nvrtc::PACKAGE);
            }
            let found = nvrtc::fetch()?;
            outln!("NVRTC is at {}", found.library.display());
            Ok(Outcome::Holds)
        }
    }
}
