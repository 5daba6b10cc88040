//! `fathom doctor`: what this machine offers.

use fathom_gpu::driver::{self, Driver};
use fathom_gpu::{DeviceKind, device, nvrtc};
use fathom_libcuda::{Choices, prepare};
use serde_json::json;

use crate::output::{self, Outcome};

/// Say what this machine offers: CPU features in use, threads, NVIDIA driver and GPUs, NVRTC, and
/// which backends can run
#[derive(clap::Args)]
pub struct Args {
    /// Print one JSON document instead of text
    #[arg(long)]
    json: bool,
}

/// Runs the command.
pub fn run(args: &Args) -> output::Result {
    let threads = rayon::current_num_threads();
    let isa = fathom_numerics::gemm::Isa::best().name();
    let driver = driver::probe();
    let nvrtc = nvrtc::find().map(|n| n.library.display().to_string());
    let backends = backends(&driver);
    if args.json {
        output::print_json(&json!({
            "threads": threads,
            "exact_gemm_isa": isa,
            "driver": driver_json(&driver),
            "nvrtc": nvrtc,
            "backends": backends_json(&backends),
        }))?;
        return Ok(Outcome::Holds);
    }
    outln!("threads     {threads}");
    outln!("exact GEMM  {isa}");
    match &driver {
        Driver::Absent { reason } => outln!("GPU driver  none ({reason}); use the emulated one"),
        Driver::Unusable { reason, .. } => outln!("GPU driver  unusable: {reason}"),
        Driver::Present { version, devices, emulated } => {
            let whose = if *emulated { "emulated" } else { "NVIDIA" };
            outln!("GPU driver  {whose}, CUDA {}.{}", version / 1000, version % 1000 / 10);
            for d in devices {
                outln!(
                    "            {}, sm_{}{}, {} SMs, {:.1} GB",
                    d.name,
                    d.compute_capability.0,
                    d.compute_capability.1,
                    d.sm_count,
                    d.memory_bytes as f64 / 1e9
                );
            }
        }
    }
    match nvrtc {
        Some(path) => outln!("NVRTC       {path}"),
        None => {
            outln!("NVRTC       not found; `fathom kernels fetch-nvrtc` downloads it with pip")
        }
    }
    for (place, (name, missing)) in backends.iter().enumerate() {
        let title = if place == 0 { "backends" } else { "" };
        let verdict = missing.as_ref().map_or("can run".to_owned(), |why| format!("cannot: {why}"));
        outln!("{title:<12}{name:<10}  {verdict}");
    }
    Ok(Outcome::Holds)
}

/// The backends, each with what it lacks.
fn backends(driver: &Driver) -> [(&'static str, Option<String>); 3] {
    let cuda = device::ready(DeviceKind::Cuda, driver.clone(), 0).err().map(|e| e.to_string());
    let emulated = match driver {
        Driver::Present { emulated: true, .. } => {
            device::ready(DeviceKind::Emulated, driver.clone(), 0).err().map(|e| e.to_string())
        }
        _ => {
            let library = || prepare::prepare(Choices::default()).err().map(|e| e.to_string());
            device::compiler_ready().err().map(|e| e.to_string()).or_else(library)
        }
    };
    [("reference", None), ("cuda", cuda), ("emulated", emulated)]
}

fn backends_json(backends: &[(&str, Option<String>)]) -> serde_json::Value {
    let one = |(name, missing): &(&str, Option<String>)| {
        ((*name).to_owned(), json!({ "can_run": missing.is_none(), "missing": missing }))
    };
    backends.iter().map(one).collect::<serde_json::Map<_, _>>().into()
}

fn driver_json(driver: &Driver) -> serde_json::Value {
    match driver {
        Driver::Absent { reason } => json!({ "found": false, "reason": reason }),
        Driver::Unusable { reason, emulated } => {
            json!({ "found": true, "emulated": emulated, "reason": reason, "devices": [] })
        }
        Driver::Present { version, devices, emulated } => {
            let devices = devices.iter().map(|d| {
                json!({
                    "name": d.name,
                    "compute_capability": [d.compute_capability.0, d.compute_capability.1],
                    "sm_count": d.sm_count,
                    "memory_bytes": d.memory_bytes,
                })
            });
            json!({
                "found": true,
                "emulated": emulated,
                "cuda_version": version,
                "devices": devices.collect::<Vec<_>>(),
            })
        }
    }
}
