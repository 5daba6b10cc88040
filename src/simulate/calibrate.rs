//! `fathom simulate calibrate`: what a profiler trace says, and constants fitted on measured GEMMs.

use std::path::PathBuf;

use fathom_config::Gpu;
use fathom_simulator::calibrate::{fit_gemms, parse_table};
use fathom_simulator::config::WhatIf;
use fathom_simulator::error::read_table;
use fathom_simulator::kernel_time::{Constants, KernelModel};
use fathom_simulator::kineto::{KinetoTrace, TraceSummary};
use fathom_trace::KernelRecord;
use serde_json::json;

use crate::output::{self, Outcome};

/// Read a profiler trace, or fit the GEMM constants on measured times
#[derive(clap::Args)]
#[command(after_help = "Examples:
  fathom simulate calibrate trace.json.gz
  fathom simulate calibrate trace.json.gz --json
  fathom simulate calibrate --gemms measured.csv --gpu h800 --sms 112 --json > constants.json
  fathom simulate calibrate --kernels kernels.jsonl --gpu h100

TRACE is what torch.profiler exports, plain or gzipped. The table's header is
name,kind,m,n,k,mean_us,min_us; kinds are fp8_one_two, fp8_one_one, bf16 and bf16_accumulate.")]
pub struct Args {
    /// Trace of torch.profiler
    #[arg(required_unless_present_any = ["gemms", "kernels"])]
    trace: Option<PathBuf>,
    /// Table of measured GEMMs to fit on
    #[arg(long, value_name = "FILE", conflicts_with = "trace")]
    gemms: Option<PathBuf>,
    /// Kernel records of the emulator to time
    #[arg(long, value_name = "FILE", conflicts_with_all = ["trace", "gemms"])]
    kernels: Option<PathBuf>,
    /// GPU preset that they were measured on
    #[arg(long, default_value = "h800")]
    gpu: String,
    /// SMs that they ran on; all where absent
    #[arg(long)]
    sms: Option<u64>,
    /// Print one JSON document
    #[arg(long)]
    json: bool,
}

/// Runs the command.
pub fn run(args: &Args) -> output::Result {
    match (&args.trace, &args.gemms, &args.kernels) {
        (Some(path), ..) => {
            let summary = KinetoTrace::read(path)?.summary();
            if args.json {
                output::print_json(&summary)?;
            } else {
                print(&summary);
            }
        }
        (None, Some(path), _) => fit(args, path)?,
        (None, None, Some(path)) => kernels(args, path)?,
        (None, None, None) => return Err("expected a trace, --gemms FILE or --kernels FILE".into()),
    }
    Ok(Outcome::Holds)
}

fn fit(args: &Args, path: &std::path::Path) -> Result<(), Box<dyn std::error::Error>> {
    let file = path.display().to_string();
    let text = read_table(path)?;
    let table = parse_table(&file, &text)?;
    let gpu = Gpu::preset(&args.gpu)?;
    let sms = args.sms.unwrap_or(gpu.sms);
    if sms == 0 || sms > gpu.sms {
        return Err(format!("--sms {sms}: {} has 1 to {}", gpu.name, gpu.sms).into());
    }
    let fitted = fit_gemms(&gpu, sms, &table, Constants::FITTED)?;
    if args.json {
        output::print_json(&json!({"gemms": table.len(), "constants": fitted}))?;
        return Ok(());
    }
    outln!("fitted on {} GEMMs on {sms} SMs of {}", table.len(), gpu.name);
    outln!("mma_efficiency    {:>9.3}", fitted.mma_efficiency);
    outln!("promotion_cycles  {:>9.3}", fitted.promotion_cycles);
    outln!("tile_cycles       {:>9.1}", fitted.tile_cycles);
    outln!("contention        {:>9.3}", fitted.contention);
    Ok(())
}

fn kernels(args: &Args, path: &std::path::Path) -> Result<(), Box<dyn std::error::Error>> {
    let records: Vec<KernelRecord> = fathom_trace::jsonl::read_file(path)?;
    let gpu = Gpu::preset(&args.gpu)?;
    let model = KernelModel::alone(&gpu, Constants::FITTED, &WhatIf::default());
    let times: Vec<(String, f64)> =
        records.iter().map(|r| (r.kernel.clone(), model.kernel_record(r))).collect();
    if args.json {
        let list: Vec<_> =
            times.iter().map(|(name, s)| json!({"kernel": name, "seconds": s})).collect();
        output::print_json(&json!({"gpu": gpu.name, "kernels": list}))?;
        return Ok(());
    }
    let rows = times.iter().map(|(name, s)| vec![name.clone(), format!("{:.2}", s * 1e6)]);
    outln!("{}", output::table(&["kernel", "us"], &[1], rows.collect()));
    Ok(())
}

fn print(s: &TraceSummary) {
    let ms = |x: f64| format!("{:.3}", x * 1e3);
    outln!("{}, {} SMs: {} kernels", s.device, s.sms, s.kernels);
    outln!("span           {:>10} ms", ms(s.span_s));
    outln!("compute busy   {:>10} ms", ms(s.compute_busy_s));
    outln!("communication  {:>10} ms", ms(s.communication_s));
    outln!("  payload      {:>10} ms", ms(s.payload_s));
    outln!("  rendezvous   {:>10} ms", ms(s.rendezvous_s));
    outln!("hidden         {:>10} %\n", format!("{:.1}", s.hidden_fraction * 100.0));
    let streams = s.streams.iter().map(|x| {
        let kind = if x.communicates { "communication" } else { "compute" };
        vec![x.stream.to_string(), kind.to_string(), x.kernels.to_string(), ms(x.busy_s)]
    });
    outln!("{}\n", output::table(&["stream", "", "kernels", "ms"], &[2, 3], streams.collect()));
    let phases = s
        .phases
        .iter()
        .map(|p| vec![p.name.clone(), p.count.to_string(), ms(p.mean_s), ms(p.mean_busy_s)]);
    let header = ["annotation", "count", "mean ms", "busy ms"];
    outln!("{}\n", output::table(&header, &[1, 2, 3], phases.collect()));
    let gemms = s.gemms.iter().map(|g| {
        let us = |x: f64| format!("{x:.1}");
        vec![
            g.phase.clone(),
            g.place.to_string(),
            g.count.to_string(),
            g.ctas.to_string(),
            us(g.mean_us),
            us(g.min_us),
        ]
    });
    let header = ["GEMM under", "place", "count", "CTAs", "mean us", "min us"];
    outln!("{}", output::table(&header, &[1, 2, 3, 4, 5], gemms.collect()));
}
