//! `fathom simulate`: a training step on a cluster, and the parts of the simulator by themselves.

mod alltoall;
mod calibrate;
mod chunk;
mod compare;
mod gemm;
pub mod parts;
mod schedule;
pub mod serve;
mod validate;

use std::fmt::Write;
use std::path::{Path, PathBuf};

use clap::Subcommand;
use fathom_conformance::run_scenario;
use fathom_reference::files;
use fathom_reference::train::TrainConfig;
use fathom_simulator::SimError;
use fathom_simulator::config::Scenario;
use fathom_simulator::events::Detail;
use fathom_simulator::first_principles::FirstPrinciples;
use fathom_simulator::perfetto;
use fathom_simulator::report::{html, sensitivity};
use fathom_simulator::step::{Simulation, StepReport, WholeRun, simulate, whole_run};
use fathom_trace::{OpRecord, jsonl};
use serde::Serialize;

use crate::output::{self, Outcome};

/// Time a training step on a cluster that need not exist
#[derive(clap::Args)]
#[command(
    args_conflicts_with_subcommands = true,
    after_help = "Examples:
  fathom simulate --preset deepseek-v3-h800-2048
  fathom simulate --preset deepseek-v3-h800-2048 --report step.html --trace step.json
  fathom simulate scenario.toml --json
  fathom simulate --from-run runs/a/run.toml --set cluster.preset=h100-16384
  fathom simulate --preset deepseek-v3-h800-2048 --set cluster.network.nic_bytes_per_s=100e9
  fathom simulate --preset deepseek-v3-h800-2048 --set what_if.comm_off_sms=true

Traces open in https://ui.perfetto.dev. All keys of a scenario: docs/simulator.md."
)]
pub struct Args {
    #[command(subcommand)]
    part: Option<Part>,
    /// Scenario (TOML)
    #[arg(value_name = "FILE.toml", required_unless_present_any = ["preset", "from_run"],
        conflicts_with = "preset")]
    file: Option<PathBuf>,
    /// Embedded scenario instead of a file; an unknown name lists all
    #[arg(long, value_name = "NAME")]
    preset: Option<String>,
    /// The scenario of a training run: its model, layout and sizes, on as many H800 as it has ranks
    /// unless --set names another cluster
    #[arg(long, value_name = "RUN.toml", conflicts_with_all = ["file", "preset"])]
    from_run: Option<PathBuf>,
    /// Write the scenario as a run that `fathom train --config` takes
    #[arg(long, value_name = "RUN.toml")]
    write_run: Option<PathBuf>,
    /// Override a key, for instance parallel.dp=256; may be repeated
    #[arg(long, value_name = "KEY=VALUE")]
    set: Vec<String>,
    /// Print one JSON document instead of the screen
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    cost: parts::CostArgs,
    /// Write the ops that the step is made of (JSON Lines)
    #[arg(long, value_name = "FILE.jsonl")]
    write_op_trace: Option<PathBuf>,
    /// Write every kernel with its time, a table that --kernel-times reads
    #[arg(long, value_name = "FILE.csv")]
    write_kernel_times: Option<PathBuf>,
    /// Write a trace of all ranks for Perfetto
    #[arg(long, value_name = "FILE.json")]
    trace: Option<PathBuf>,
    /// Write a self-contained HTML page
    #[arg(long, value_name = "FILE.html")]
    report: Option<PathBuf>,
}

#[derive(Subcommand)]
enum Part {
    Schedule(schedule::Args),
    Chunk(chunk::Args),
    Compare(compare::Args),
    Gemm(gemm::Args),
    Alltoall(alltoall::Args),
    Serve(serve::Args),
    Calibrate(calibrate::Args),
    Validate(validate::Args),
}

/// Runs the command.
pub fn run(args: &Args) -> output::Result {
    match &args.part {
        Some(Part::Schedule(args)) => schedule::run(args),
        Some(Part::Chunk(args)) => chunk::run(args),
        Some(Part::Compare(args)) => compare::run(args),
        Some(Part::Gemm(args)) => gemm::run(args),
        Some(Part::Alltoall(args)) => alltoall::run(args),
        Some(Part::Serve(args)) => serve::run(args),
        Some(Part::Calibrate(args)) => calibrate::run(args),
        Some(Part::Validate(args)) => validate::run(args),
        None => step(args),
    }
}

/// An error of the simulator, with the scenario's file or preset named where it is about the
/// scenario itself.
pub fn named(file: Option<&Path>, preset: Option<&str>, error: SimError) -> SimError {
    match (error, file, preset) {
        (SimError::Layout(reason), Some(file), _) => SimError::input(file.display(), reason),
        (SimError::Layout(reason), _, Some(name)) => {
            SimError::input(format!("preset {name}"), reason)
        }
        (other, ..) => other,
    }
}

/// The scenario of a file or a preset, with overrides `key.path=value`.
pub fn scenario(
    file: Option<&Path>,
    preset: Option<&str>,
    set: &[String],
) -> Result<Scenario, Box<dyn std::error::Error>> {
    match (file, preset) {
        (Some(file), _) => Ok(Scenario::read(file, set)?),
        (None, Some(name)) => Ok(Scenario::preset(name, set)?),
        (None, None) => Err("expected FILE.toml or --preset NAME".into()),
    }
}

fn step(args: &Args) -> output::Result {
    let file = args.from_run.as_deref().or(args.file.as_deref());
    let scenario = match &args.from_run {
        Some(path) => {
            let config = TrainConfig::read(path, &[])?;
            run_scenario::scenario(&path.display().to_string(), &config, &args.set)?
        }
        None => scenario(file, args.preset.as_deref(), &args.set)?,
    };
    let loads = scenario.expert_load.trace.iter().map(PathBuf::from).collect::<Vec<_>>();
    let inputs = args.file.iter().chain(&args.from_run).chain(args.cost.files()).chain(&loads);
    let outputs = [
        &args.write_run,
        &args.write_op_trace,
        &args.write_kernel_times,
        &args.trace,
        &args.report,
    ];
    files::keep_apart(inputs, outputs.into_iter().flatten())?;
    let detail = if args.trace.is_some() { Detail::Parts } else { Detail::Instructions };
    let model = args.cost.model()?;
    let named = |e| named(file, args.preset.as_deref(), e);
    let sim = simulate(&scenario, &model, detail).map_err(named)?;
    args.cost.warn_of_unused(&model, &scenario)?;
    if let Some(path) = &args.write_run {
        output::write_file(path, run_scenario::run(&scenario)?.as_bytes())?;
    }
    if let Some(path) = &args.write_op_trace {
        let mut writer = jsonl::Writer::<OpRecord, _>::new(Vec::new())?;
        model.op_records(&scenario)?.iter().try_for_each(|r| writer.write(r))?;
        output::write_file(path, &writer.finish()?)?;
    }
    if let Some(path) = &args.write_kernel_times {
        output::write_file(path, kernel_table(&model, &scenario)?.as_bytes())?;
    }
    if let Some(path) = &args.trace {
        let mut bytes = Vec::new();
        perfetto::write(&sim, &mut bytes)?;
        output::write_file(path, &bytes)?;
    }
    let run = whole_run(&scenario, &sim.report, &model)?;
    if let Some(path) = &args.report {
        output::write_file(path, html::page(&sim, &run, &model)?.as_bytes())?;
    }
    if args.json {
        let network = html::topology_of(&scenario.cluster);
        let sensitivity = sensitivity::sensitivity(&scenario, &model)?;
        let (report, whole_run) = (&sim.report, &run);
        output::print_json(&Document { report, whole_run, network, sensitivity })?;
    } else {
        print(&sim, &run);
    }
    Ok(if sim.memory.fits() { Outcome::Holds } else { Outcome::Fails })
}

/// Every kernel once by op and shape, with where it runs first and how often a layer launches it.
fn kernel_table(
    model: &FirstPrinciples,
    scenario: &Scenario,
) -> Result<String, Box<dyn std::error::Error>> {
    let mut rows: Vec<(String, String, f64, usize)> = Vec::new();
    for (kind, kernel, seconds) in model.kernel_times(scenario)? {
        let place = format!("{kind:?},{:?},{:?}", kernel.component, kernel.phase);
        let name = format!("{},{}", kernel.op, kernel.shape);
        match rows.iter_mut().find(|r| r.0 == name) {
            Some(row) => row.3 += 1,
            None => rows.push((name, place.to_lowercase(), seconds, 1)),
        }
    }
    let mut text = "op,shape,layer,component,phase,count,mean_us\n".to_owned();
    for (name, place, seconds, count) in rows {
        writeln!(text, "{name},{place},{count},{:.3}", seconds * 1e6)?;
    }
    Ok(text)
}

/// The document of `--json`.
#[derive(Serialize)]
struct Document<'a> {
    #[serde(flatten)]
    report: &'a StepReport,
    whole_run: &'a WholeRun,
    network: html::Topology,
    sensitivity: sensitivity::Sensitivity,
}

fn print(sim: &Simulation, run: &WholeRun) {
    let (r, s) = (&sim.report, &sim.scenario);
    let p = &s.parallel;
    outln!("{}", r.name);
    outln!(
        "{} x {}; pp {} tp {} cp {} ep {} dp {} zero {}; {} with {} micro-batches\n",
        s.cluster.gpus,
        s.cluster.gpu.name,
        p.pp,
        p.tp,
        p.cp,
        p.ep,
        p.dp,
        p.zero,
        s.schedule.name(),
        s.micro_batches(),
    );
    let line = |name: &str, value: String| outln!("  {name:<34}{value}");
    line("step", format!("{:.3} s", r.step_time_s));
    let i = &r.interval;
    line("eight of ten cases", format!("{:.3} to {:.3} s", i.low_s, i.high_s));
    line("", format!("by {} validated runs of {}", i.runs, i.basis));
    line("throughput", format!("{:.1} tokens/s a GPU", r.tokens_per_s_per_gpu));
    line("tokens a day", format!("{:.2} B", r.tokens_per_day / 1e9));
    line("GPU-hours a trillion tokens", format!("{:.1} K", r.gpu_hours_per_trillion_tokens / 1e3));
    line(
        "MFU, causal / non-causal",
        format!("{:.2} % / {:.2} %", 100.0 * r.mfu_causal, 100.0 * r.mfu_noncausal),
    );
    let a = &r.all_to_all;
    line(
        "all-to-all",
        format!("{:.1} % hidden, {:.3} s exposed", 100.0 * a.hidden_fraction, a.exposed_s),
    );
    let c = &r.cost;
    line(
        "cost",
        format!(
            "{:.0} K$ a trillion tokens at {:.2} $ a GPU-hour",
            c.usd_per_trillion_tokens / 1e3,
            c.usd_per_gpu_hour
        ),
    );
    let g = &r.reliability;
    line(
        "goodput",
        format!(
            "{:.1} % with {:.1} failures a day, a checkpoint every {:.0} s",
            100.0 * g.goodput,
            g.failures_per_day,
            g.checkpoint_interval_s
        ),
    );
    line(
        "the whole run",
        format!(
            "{:.2} T tokens, {:.0} K GPU-hours, {:.1} days ({:.1} with failures: {:.2} M$, {:.2} GWh)",
            run.tokens / 1e12,
            run.gpu_hours / 1e3,
            run.days,
            run.days_with_failures,
            run.usd / 1e6,
            run.kwh / 1e6
        ),
    );
    if let Some(allowed) = &run.allowed {
        let tokens = allowed.tokens.map(|t| format!(", {:.3} T tokens", t / 1e12));
        line("the budget", format!("{:.0} GPUs{}", allowed.gpus, tokens.unwrap_or_default()));
    }
    let layers: Vec<String> = r.stage_layers.iter().map(usize::to_string).collect();
    line("layers of the stages", layers.join(" "));
    if let Some(assumption) = &run.assumption {
        line("", format!("assumed: {assumption}"));
    }
    outln!("\nwhere the step goes, mean over ranks:\n");
    let b = &r.breakdown_s;
    let parts = [
        ("forward", b.forward),
        ("backward", b.backward),
        ("weight", b.weight),
        ("forward and backward overlapped", b.forward_backward),
        ("optimizer, gradient reduction", b.optimizer),
        ("other", b.other),
        ("bubble", b.bubble),
    ];
    for (name, seconds) in parts {
        let share = seconds / r.step_time_s;
        let bar = bar(share);
        outln!("  {name:<34}{seconds:>8.3} s {:>5.1} %  {bar}", 100.0 * share);
    }
    let (rank, bytes) = sim.memory.fullest();
    let peak = &sim.memory.ranks[rank].peak;
    outln!(
        "\nmemory, fullest rank ({rank}): {:.1} of {:.0} GB\n",
        bytes / 1e9,
        r.memory_capacity_gb
    );
    for (name, bytes) in peak.named() {
        let bar = bar(bytes / sim.memory.capacity_bytes);
        outln!("  {name:<34}{:>8.2} GB  {bar}", bytes / 1e9);
    }
    if r.host_memory_gb > 0.0 {
        let capacity = sim.memory.host_capacity_bytes / 1e9;
        outln!("  {:<34}{:>8.2} GB of {capacity:.0}", "in the host", r.host_memory_gb);
    }
    if let Some(complaint) = &r.memory_complaint {
        outln!("\n{complaint}");
    }
    outln!("\n{} events in {:.1} ms", r.events, r.wall_s * 1e3);
}

/// Characters of a bar that stands for the whole.
const BAR: f64 = 50.0;

/// A bar for a share of the whole; what is more than all of it ends in an arrow.
fn bar(share: f64) -> String {
    let full = "#".repeat((share.clamp(0.0, 1.0) * BAR).round() as usize);
    if share > 1.0 { full + ">" } else { full }
}
