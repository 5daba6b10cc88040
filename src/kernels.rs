//! `fathom kernels`: what compiling CUDA kernels needs.

use fathom_gpu::nvrtc;

use crate::output::{self, Outcome};

/// Fetch NVRTC, the compiler that CUDA steps need
#[derive(clap::Args)]
pub struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(clap::Subcommand)]
enum Command {
    /// Download NVIDIA's run-time compiler once, with pip, into the cache folder
    FetchNvrtc,
}

/// Runs the command.
pub fn run(args: &Args) -> output::Result {
    match args.command {
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
