//! `fathom simulate serve`: requests on pools of GPUs.

use std::path::{Path, PathBuf};

use fathom_conformance::inference::InferenceCode;
use fathom_reference::files;
use fathom_simulator::SimError;
use fathom_simulator::kernel_time::Constants;
use fathom_simulator::serve::config::ServeScenario;
use fathom_simulator::serve::metrics::Latency;
use fathom_simulator::serve::page;
use fathom_simulator::serve::plan::{Plan, ServeSearchResult, plan, search};
use fathom_simulator::serve::run::{PoolReport, ServeReport, serve};
use serde::Serialize;

use crate::output::{self, Outcome};

/// Serve requests on pools of GPUs that need not exist: throughput, latencies, cost
#[derive(clap::Args)]
#[command(after_help = "Examples:
  fathom simulate serve --preset deepseek-v3-decode-h800-320
  fathom simulate serve --preset deepseek-v3-online-h800 --report serving.html
  fathom simulate serve run.toml --set workload.rate_per_s=50 --json
  fathom simulate serve run.toml --plan 400
  fathom simulate serve run.toml --search 400 --set search.decode_gpus=[72,144,320]

--plan: GPUs for so many requests a second within [sla]; --search: the layouts of [search] for them,
as the front of cost and speed for users. All keys of a scenario: docs/serving.md.")]
pub struct Args {
    /// Serving scenario (TOML)
    #[arg(value_name = "FILE.toml", required_unless_present = "preset", conflicts_with = "preset")]
    file: Option<PathBuf>,
    /// Embedded scenario instead of a file; an unknown name lists all
    #[arg(long, value_name = "NAME")]
    preset: Option<String>,
    /// Override a key, for instance decode.gpus=144; may be repeated
    #[arg(long, value_name = "KEY=VALUE")]
    set: Vec<String>,
    /// GPUs for so many requests a second within the service level
    #[arg(long, value_name = "REQUESTS_PER_S")]
    plan: Option<f64>,
    /// The layouts of [search] for so many requests a second
    #[arg(long, value_name = "REQUESTS_PER_S", conflicts_with_all = ["plan", "report"])]
    search: Option<f64>,
    /// Constants of the kernel times, as `calibrate --gemms --json` prints them
    #[arg(long, value_name = "FILE.json")]
    constants: Option<PathBuf>,
    /// Print one JSON document instead of the screen
    #[arg(long)]
    json: bool,
    /// Write a self-contained HTML page
    #[arg(long, value_name = "FILE.html")]
    report: Option<PathBuf>,
}

/// The document of `--json`.
#[derive(Serialize)]
struct Document<'a> {
    #[serde(flatten)]
    report: &'a ServeReport,
    #[serde(skip_serializing_if = "Option::is_none")]
    plan: Option<&'a Plan>,
}

/// Runs the command.
pub fn run(args: &Args) -> output::Result {
    for (flag, load) in [("--plan", args.plan), ("--search", args.search)] {
        if load.is_some_and(|l| !(1e-3..=1e6).contains(&l)) {
            return Err(format!("{flag}: expected 0.001 to 1e6 requests a second").into());
        }
    }
    let s = scenario(args.file.as_deref(), args.preset.as_deref(), &args.set)?;
    let trace = s.workload.trace.iter().map(PathBuf::from).collect::<Vec<_>>();
    let inputs = args.file.iter().chain(&args.constants).chain(&trace);
    files::keep_apart(inputs, args.report.iter())?;
    let constants = match &args.constants {
        Some(path) => Constants::read(path)?,
        None => Constants::FITTED,
    };
    let named = |e: SimError| super::named(args.file.as_deref(), args.preset.as_deref(), e);
    if let Some(load) = args.search {
        let found = search(&s, load, &InferenceCode, constants).map_err(named)?;
        return show(&found, load, args.json);
    }
    let report = serve(&s, &InferenceCode, constants).map_err(named)?;
    let fits = report.complaints.is_empty();
    let planned = match args.plan.filter(|_| fits) {
        Some(load) => Some(plan(&s, load, &InferenceCode, constants).map_err(named)?),
        None => None,
    };
    if let Some(path) = &args.report {
        output::write_file(path, page::page(&s, &report, planned.as_ref()).as_bytes())?;
    }
    if args.json {
        output::print_json(&Document { report: &report, plan: planned.as_ref() })?;
    } else {
        print(&report);
        planned.iter().for_each(print_plan);
    }
    Ok(if fits { Outcome::Holds } else { Outcome::Fails })
}

fn scenario(
    file: Option<&Path>,
    preset: Option<&str>,
    set: &[String],
) -> Result<ServeScenario, SimError> {
    match file {
        Some(file) => ServeScenario::read(file, set),
        None => ServeScenario::preset(preset.unwrap_or_default(), set),
    }
}

/// Searches the layouts of a serving scenario for its own rate: `fathom search`.
pub fn layouts(
    file: Option<&Path>,
    preset: Option<&str>,
    set: &[String],
    json: bool,
) -> output::Result {
    let s = scenario(file, preset, set)?;
    let load = s.workload.rate_per_s.ok_or(
        "a search of serving layouts is for a rate: expected workload.rate_per_s, or `fathom simulate serve --search RATE`",
    )?;
    let found = search(&s, load, &InferenceCode, Constants::FITTED)
        .map_err(|e| super::named(file, preset, e))?;
    show(&found, load, json)
}

fn show(found: &ServeSearchResult, load: f64, json: bool) -> output::Result {
    if json {
        output::print_json(found)?
    } else {
        print_search(found, load)
    }
    Ok(Outcome::Holds)
}

fn line(name: &str, value: String) {
    outln!("  {name:<34}{value}");
}

fn time(seconds: f64) -> String {
    match seconds {
        s if s >= 1.0 => format!("{s:.2} s"),
        s => format!("{:.1} ms", s * 1e3),
    }
}

fn print(r: &ServeReport) {
    outln!("{}\n", r.name);
    if !r.complaints.is_empty() {
        r.complaints.iter().for_each(|c| outln!("{c}"));
        r.pools.iter().for_each(print_memory);
        return;
    }
    if r.input_tokens_per_s > 0.0 {
        let hits = 100.0 * r.cache_hit_rate;
        line("prompts", format!("{:.0} tokens/s, {hits:.1} % cached", r.input_tokens_per_s));
    }
    line("answers", format!("{:.0} tokens/s", r.output_tokens_per_s));
    let [arrived, ended] = r.requests_per_s;
    line(
        "requests",
        format!("{arrived:.2} a second arrive, {ended:.2} end; {:.0} in the system", r.in_system),
    );
    let q = &r.requests;
    if q.refused + q.retracted > 0 {
        line(
            "",
            format!(
                "{} refused (no cache is long enough), {} retracted (pages ran out)",
                q.refused, q.retracted
            ),
        );
    }
    if r.tokens_per_s_per_user > 0.0 {
        line("a user sees", format!("{:.1} tokens/s", r.tokens_per_s_per_user));
    }
    let [input, output] = r.usd_per_million;
    if input > 0.0 {
        line("a million tokens in", format!("{input:.3} $"));
    }
    if output > 0.0 {
        line("a million tokens out", format!("{output:.3} $"));
    }
    if let Some(share) = r.within_sla {
        line("within the service level", format!("{:.1} % of the requests", 100.0 * share));
    }
    outln!("\n  {:<26}{:>10}{:>10}{:>10}{:>10}{:>10}", "", "mean", "50 %", "90 %", "95 %", "99 %");
    let rows: [(&str, &Latency); 5] = [
        ("first token", &r.ttft),
        ("a token after it", &r.tpot),
        ("between tokens", &r.itl),
        ("whole answer", &r.end_to_end),
        ("cache between pools", &r.kv_transfer),
    ];
    for (name, l) in rows.into_iter().filter(|(_, l)| l.count > 0) {
        let [mean, p50, p90, p95, p99] = [l.mean_s, l.p50_s, l.p90_s, l.p95_s, l.p99_s].map(time);
        outln!("  {name:<26}{mean:>10}{p50:>10}{p90:>10}{p95:>10}{p99:>10}");
    }
    r.pools.iter().for_each(print_pool);
    let [least, most] = r.reached_share.map(|s| 100.0 * s);
    outln!(
        "\npublished deployments reach {least:.0} to {most:.0} % of such throughputs (docs/serving.md)"
    );
    outln!("{} requests in {:.0} ms", q.arrived, r.wall_s * 1e3);
}

fn print_pool(p: &PoolReport) {
    let (m, t) = (&p.measured, &p.measured.time);
    let [gpus, tp, dp, ep] = p.layout;
    outln!("\n{}: {} x {gpus} GPUs (tp {tp}, dp {dp}, ep {ep})\n", p.role, p.units);
    line(
        "throughput",
        format!(
            "{:.0} tokens/s a GPU, {:.0} a node",
            p.tokens_per_s_per_gpu, p.tokens_per_s_per_node
        ),
    );
    line("busy", format!("{:.1} % of the time", 100.0 * p.busy));
    let n = m.iterations.max(1) as f64;
    line(
        "an iteration",
        format!(
            "{}: {:.1} requests, {:.0} prompt tokens a rank",
            time(t.seconds / n),
            m.batch,
            m.prompt_tokens
        ),
    );
    for (name, seconds) in [
        ("attention", t.attention_s),
        ("projections, norms, router", t.projections_s),
        ("shared experts, dense layers", t.shared_s),
        ("routed experts", t.experts_s),
        ("embedding, head, drafts", t.head_s),
        ("waiting for the network", t.exposed_s.max(0.0)),
        ("host", t.host_s),
    ] {
        let share = seconds / t.seconds.max(f64::MIN_POSITIVE);
        let bar = "#".repeat((share * 50.0).round().clamp(0.0, 100.0) as usize);
        outln!("    {name:<32}{:>10} {:>5.1} %  {bar}", time(seconds / n), 100.0 * share);
    }
    if t.dispatch_s > 0.0 {
        let [out, back] = [t.dispatch_s / n, t.combine_s / n].map(time);
        line("on the network beside it", format!("dispatch {out}, combine {back}"));
    }
    line("busiest rank over the mean", format!("{:.3}", m.skew));
    if let Some(e) = &p.experts {
        line(
            "busiest expert GPU over the mean",
            format!(
                "{:.3} (placement {:.3}, without copies {:.2}; {} copies a layer)",
                m.expert_load, e.imbalance, e.unbalanced, e.redundant
            ),
        );
        line(
            "a new placement",
            format!(
                "{:.2} GB a GPU, {} on its NIC, {:.2} % of the interval",
                e.moved_bytes / 1e9,
                time(e.move_s),
                100.0 * e.move_share
            ),
        );
    }
    line("waiting", format!("{:.1} prompts, {:.1} caches a unit", m.queue, m.waiting));
    line(
        "KV pages in use",
        format!("{:.1} %, at most {:.1} %", 100.0 * m.kv_occupancy, 100.0 * m.kv_peak),
    );
    print_memory(p);
}

fn print_memory(p: &PoolReport) {
    let m = &p.memory;
    let gb = |b: f64| b / 1e9;
    line(
        "memory of a GPU",
        format!(
            "{:.1} GB weights, {:.1} experts, {:.1} buffers, {:.1} runtime; {} pages ({:.1} GB) of {:.0} GB",
            gb(m.weights),
            gb(m.experts),
            gb(m.buffers),
            gb(m.runtime),
            m.pages,
            gb(m.pages_bytes.max(0.0)),
            gb(m.capacity)
        ),
    );
}

fn print_plan(p: &Plan) {
    outln!(
        "\n{} requests a second within the service level: {} GPUs, {:.0} $ an hour, {:.3} $ a million tokens\n",
        p.load_per_s,
        p.gpus,
        p.usd_per_hour,
        p.usd_per_million
    );
    for pool in &p.pools {
        let [gpus, tp, _] = pool.layout;
        line(
            pool.role,
            format!(
                "{} x {gpus} GPUs (tp {tp}): {:.2} requests/s a unit, {:.0} tokens/s a GPU",
                pool.units, pool.requests_per_s_a_unit, pool.tokens_per_s_per_gpu
            ),
        );
    }
}

fn print_search(found: &ServeSearchResult, load: f64) {
    outln!(
        "{} layouts of pools tried, {} refused; the front for {load} requests a second\n",
        found.tried,
        found.refused
    );
    let row = |c: &fathom_simulator::serve::plan::Candidate| {
        let pool = |role: &str| {
            let found = c.plan.pools.iter().find(|p| p.role == role);
            found
                .map_or("-".into(), |p| format!("{} x {} tp {}", p.units, p.layout[0], p.layout[1]))
        };
        let decode = c.plan.pools.last().map_or(0, |p| p.layout[2]);
        let second =
            if c.plan.pools.iter().any(|p| p.role == "decode") { "decode" } else { "unified" };
        vec![
            pool("prefill"),
            pool(second),
            decode.to_string(),
            format!("{:.2}", c.prefill_to_decode),
            c.plan.gpus.to_string(),
            format!("{:.0}", c.plan.usd_per_hour),
            format!("{:.3}", c.plan.usd_per_million),
            format!("{:.1}", c.tokens_per_s_per_user),
        ]
    };
    let head =
        ["prefill", "decode", "batch", "P:D", "GPUs", "$/h", "$/M tokens", "tokens/s a user"];
    outln!("{}", output::table(&head, &[2, 3, 4, 5, 6, 7], found.front.iter().map(row).collect()));
}
