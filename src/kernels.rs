//! `fathom kernels`: what compiling CUDA kernels needs, what they compute, and how good they are.

use std::cell::RefCell;
use std::process::Stdio;

use fathom_conformance::coverage;
use fathom_conformance::quality;
use fathom_gpu::compile::Compiler;
use fathom_gpu::{CudaEngine, DeviceKind, Gpu, device, nccl, nvdisasm, nvrtc};
use fathom_libcuda::{Choices, prepare};

use crate::output::{self, Outcome};

/// Fetch what CUDA kernels need to be compiled and looked at; say what they cover, how good they
/// are
#[derive(clap::Args)]
pub struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(clap::Subcommand)]
enum Command {
    /// Download NVIDIA's run-time compiler once, with pip, into the cache folder
    FetchNvrtc,
    /// Download NVIDIA's disassembler once, with pip, into the cache folder: only `quality` asks
    FetchNvdisasm,
    /// Download NCCL once, with pip, into the cache folder: only `train --transport nccl` asks
    FetchNccl,
    /// Print which ops of which runs kernels compute, as Markdown: the tables of the documentation
    Coverage,
    /// Print what is known of the kernels without a GPU, at DeepSeek-V3's shapes, as Markdown:
    /// registers, spills, the hot loop's instructions; bytes moved and bank conflicts as the
    /// emulated device counts them
    Quality {
        /// Print one JSON document instead
        #[arg(long)]
        json: bool,
    },
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
        Command::FetchNvdisasm => {
            if nvdisasm::find().is_none() {
                errln!("downloading {} with pip", nvdisasm::PACKAGE);
            }
            outln!("nvdisasm is at {}", nvdisasm::fetch()?.display());
            Ok(Outcome::Holds)
        }
        Command::FetchNccl => {
            outln!("NCCL is at {}", nccl::fetch()?.display());
            Ok(Outcome::Holds)
        }
        Command::Quality { json } => quality(json),
    }
}

/// The cases run in a process on the emulated driver; their kernels are assembled in this one.
///
/// Both compile for themselves, on one thread and into a folder that is removed: where several
/// threads compile, NVRTC 13.0 makes other PTX of the same source now and then (a load more, in 4
/// of 74 compilations), and the cache may hold that.
fn quality(json: bool) -> output::Result {
    if prepare::is_prepared() {
        return run_cases();
    }
    let nvdisasm = nvdisasm::find();
    if nvdisasm.is_none() {
        errln!(
            "nvdisasm was not found, so loops are not counted: `fathom kernels fetch-nvdisasm` \
             downloads it with pip, or set FATHOM_NVDISASM to its path"
        );
    }
    let (nvrtc, _) = device::compiler_ready()?;
    let cache = tempfile::tempdir()?;
    let compiler = Compiler::new(&nvrtc, &cache.path().join("kernels"))?;
    let prepared = prepare::prepare(Choices { profile: true, ..Choices::default() })?;
    let program = std::env::current_exe()?;
    let mut command = prepared.command(program.as_os_str());
    command.env("FATHOM_CACHE", cache.path());
    command.env("FATHOM_NVRTC", nvrtc.library.parent().expect("a library lies in a folder"));
    let child = command.args(["kernels", "quality"]).stdout(Stdio::piped()).spawn()?;
    let output = child.wait_with_output()?;
    if !output.status.success() {
        return Ok(Outcome::BadInput);
    }
    let found =
        quality::look(serde_json::from_slice(&output.stdout)?, &compiler, nvdisasm.as_deref())?;
    if json {
        output::print_json(&found)?;
    } else {
        outln!("{}", found.page());
    }
    Ok(Outcome::Holds)
}

/// Runs the cases on the emulated device with its counters on, and prints what came of them for
/// [`mod@quality`].
fn run_cases() -> output::Result {
    let engine = CudaEngine::new(Gpu::open(DeviceKind::Emulated)?);
    let before = RefCell::new(prepare::so_far()?);
    let counts = || {
        let done = prepare::so_far().map_err(|e| e.to_string())?;
        Ok(done.kernels_since(&before.replace(done.clone())))
    };
    let bar = output::progress(quality::cases::all().len(), "kernels");
    let progress = |op: &str| {
        bar.set_message(op.to_owned());
        bar.inc(1);
    };
    let ran = quality::run(&engine, &counts, &progress)?;
    bar.finish_and_clear();
    output::print_json(&ran)?;
    Ok(Outcome::Holds)
}
