//! Public training runs with their whole set-up, as rows of data: the columns of
//! `presets/published/public-runs.csv` are keys of scenario files.
//!
//! `role` says what a row was to the model: `fitted` (a constant rests on it), `seen` (in view
//! while the model was made), `blind` (written down before the model was asked). Where each source
//! is found, and what its recipes say beside the tables, stands at [`SOURCES`].

use fathom_schedule::ScheduleKind;

use crate::config::{Precision, Scenario};
use crate::error::SimError;
use crate::events::Detail;
use crate::first_principles::FirstPrinciples;
use crate::interval::{self, ValidatedRun};
use crate::step::simulate;

use super::{Role, Row};

const RUNS: &str = include_str!("../../../presets/published/public-runs.csv");

/// Columns before the keys: source, release, name, unit, value, role.
const LEADING: usize = 6;

/// Where the rows of each source are found, and what of their set-up stands beside the tables.
pub const SOURCES: [(&str, &str); 7] = [
    (
        "NVIDIA Megatron Bridge",
        "docs/performance-summary.md and its archive in NVIDIA-NeMo/Megatron-Bridge; graphs, overlap and kernels of exchanges and \
         recomputation from the recipes of the release's branch (scripts/performance/configs, src/megatron/bridge/perf_recipes); \
         the playbook is its skill on MoE hardware configurations",
    ),
    (
        "NVIDIA NeMo",
        "docs.nvidia.com/nemo-framework/user-guide/24.12, performance summary: FP8, no recomputation stated",
    ),
    (
        "MosaicML LLM Foundry",
        "scripts/train/benchmarking in mosaicml/llm-foundry: MPT in BF16 with FSDP, eager; its two feed-forward matrices of four widths \
         stand as three of eight thirds; NICs of 200 (A100) and 400 Gb/s (H100) a GPU",
    ),
    (
        "TorchTitan",
        "benchmarks/ in pytorch/torchtitan: H100 with 96 GB of HBM2e at 2.4 TB/s, limited to 500 W; micro-batches of a pipeline as \
         many as ranks, the default of its code then",
    ),
    (
        "NVIDIA NeMo AutoModel",
        "docs/performance-summary.mdx in NVIDIA-NeMo/Automodel; checkpointing from examples/llm_benchmark",
    ),
    (
        "MLPerf Training",
        "mlcommons/training_results_v5.1, NVIDIA, Llama 3.1 405B: configurations and the logs' training steps; vocabulary of 32,000",
    ),
    (
        "AMD Primus",
        "AMD's performance results as its projection's validation quotes them (docs_deprecated/tech_blogs in AMD-AGI/Primus), batches \
         and recomputation from examples/megatron/configs; MI325X is MI300X with 256 GB at 6 TB/s",
    ),
];

struct Run {
    source: &'static str,
    figure: String,
    unit: &'static str,
    value: f64,
    role: &'static str,
    scenario: Scenario,
}

/// `KEY=VALUE` as `--set` takes it.
fn assignment(key: &str, value: &str) -> String {
    match value.parse::<f64>() {
        Ok(_) => format!("{key}={value}"),
        Err(_) => format!("{key}=\"{value}\""),
    }
}

fn run(keys: &[&str], line: &'static str) -> Result<Run, SimError> {
    let cell: Vec<&'static str> = line.split(',').collect();
    let mut set = Vec::new();
    for (key, value) in keys.iter().zip(&cell).skip(LEADING).filter(|(_, value)| !value.is_empty())
    {
        match *key {
            "set" => set.extend(value.split(' ').map(str::to_owned)),
            // Every GPU has a NIC of its own.
            "gpus_per_node" => {
                set.push(assignment("cluster.gpus_per_node", value));
                set.push(assignment("cluster.network.nics_per_node", value));
            }
            key => set.push(assignment(key, value)),
        }
    }
    let [source, release, name, unit, value, role] = cell[..LEADING] else {
        unreachable!("a row has more columns than leading ones")
    };
    let text = format!("name = \"{name}\"\n");
    let scenario = Scenario::from_toml("public-runs.csv", &text, None, &set)?;
    let (p, t) = (&scenario.parallel, &scenario.training);
    let arithmetic = match t.precision {
        Precision::Bf16 => "BF16",
        Precision::Fp8 => "FP8",
        Precision::Fp8Tensor => "FP8 per tensor",
        Precision::Mxfp8 => "MXFP8",
        Precision::Nvfp4 => "NVFP4",
        Precision::Mxfp4 => "MXFP4",
    };
    let interleaved = scenario.schedule == ScheduleKind::Interleaved;
    let vp = if interleaved { format!(" VP{}", scenario.interleave) } else { String::new() };
    let figure = format!(
        "{release}: {name}, {arithmetic}, TP{} CP{} PP{}{vp} EP{} ZeRO{}, {} tokens, batch {} by {}",
        p.tp, p.cp, p.pp, p.ep, p.zero, t.seq_len, t.global_batch, t.micro_batch
    );
    let value = value.parse().expect("a number");
    Ok(Run { source, figure, unit, value, role, scenario })
}

/// One row a run.
pub(super) fn rows(cost: &FirstPrinciples) -> Result<Vec<Row>, SimError> {
    let (header, lines) = RUNS.split_once('\n').expect("a header");
    let keys: Vec<&str> = header.split(',').collect();
    let mut rows = Vec::new();
    for line in lines.lines() {
        let run = run(&keys, line)?;
        let report = simulate(&run.scenario, cost, Detail::Totals)?.report;
        let rate = run.unit.starts_with("tokens");
        let ours = if rate { report.tokens_per_s_per_gpu } else { report.step_time_s };
        let row = Row::new(run.source, run.figure, run.unit, run.value, ours);
        let row = row.of_run(&run.scenario, rate).note(run.role);
        rows.push(if run.role == "fitted" { row.fitted() } else { row });
    }
    Ok(rows)
}

const NEVER: &str = "Never fitted";

/// The runs that no constant rests on, by software and kind of model: mean absolute error in time,
/// and how many lie within the 80 % interval that all the other runs give.
pub(super) fn never_fitted(rows: &[Row]) -> Vec<Row> {
    let runs: Vec<(&Row, &ValidatedRun)> =
        rows.iter().filter_map(|r| Some((r, r.run.as_ref()?))).collect();
    let all: Vec<ValidatedRun> = runs.iter().map(|(_, run)| (*run).clone()).collect();
    let never: Vec<usize> = (0..runs.len()).filter(|&i| runs[i].0.role != Role::Fitted).collect();
    let mut kinds: Vec<(&str, &str)> = Vec::new();
    for &i in &never {
        let like = &runs[i].1.like;
        let kind = (like.stack.as_str(), like.family.as_str());
        if !kinds.contains(&kind) {
            kinds.push(kind);
        }
    }
    let mut found: Vec<Row> = Vec::new();
    let mut add = |figure: String, of: Vec<usize>| {
        let error = |&i: &usize| (1.0 / runs[i].1.ratio - 1.0).abs();
        let mean = 100.0 * of.iter().map(error).sum::<f64>() / of.len() as f64;
        let signed =
            100.0 * of.iter().map(|&i| 1.0 / runs[i].1.ratio - 1.0).sum::<f64>() / of.len() as f64;
        let held = of.iter().filter(|&&i| interval::held(&all, i)).count();
        let blind = of.iter().filter(|&&i| runs[i].0.note == "blind").count();
        let note = format!(
            "{} runs, {blind} of them blind; mean {signed:+.1} %; {held} within their 80 % interval",
            of.len()
        );
        let mut row = Row::new(NEVER, figure, "%", 0.0, mean).note(note);
        (row.error, row.goal_points) = (mean, true);
        found.push(row);
    };
    for (stack, family) in kinds {
        let of = |&&i: &&usize| {
            let like = &runs[i].1.like;
            like.stack == stack && like.family == family
        };
        let kind = if family == "moe" { "with experts" } else { "dense" };
        add(
            format!("{stack}, {kind}: mean absolute error in time"),
            never.iter().filter(of).copied().collect(),
        );
    }
    add("all: mean absolute error in time".to_owned(), never.clone());
    let blind = |i: &usize| runs[*i].0.note == "blind";
    add(
        "all blind ones: mean absolute error in time".to_owned(),
        never.into_iter().filter(blind).collect(),
    );
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_row_reads_and_names_a_source() {
        let (header, lines) = RUNS.split_once('\n').unwrap();
        let keys: Vec<&str> = header.split(',').collect();
        for line in lines.lines() {
            assert_eq!(line.split(',').count(), keys.len(), "{line}");
            let run = run(&keys, line).unwrap_or_else(|e| panic!("{line}: {e}"));
            assert!(SOURCES.iter().any(|(source, _)| *source == run.source), "{}", run.source);
            assert!(["fitted", "seen", "blind"].contains(&run.role), "{line}");
        }
    }
}
