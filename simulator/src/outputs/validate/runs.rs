//! Real runs on eight B200: predictions as they are, and with the machine's own GEMMs.
//!
//! Two constants rest on some of them ([`FITTED_MICRO_BATCHES`]); the mean error is that of the
//! others.

use fathom_schedule::ScheduleKind;

use super::{Role, Row};
use crate::calibrate::{MeasuredGemm, parse_table};
use crate::config::{Parallel, Precision, Recompute, Scenario, Stack, Training};
use crate::error::SimError;
use crate::events::Detail;
use crate::first_principles::FirstPrinciples;
use crate::hardware;
use crate::step::simulate;
use fathom_config::{Gpu, ModelConfig};

const AS_IS: &str = "Megatron-Core on 8 B200 (SimuMax 1.2, every second run)";
const CALIBRATED: &str = "The same runs, GEMMs of the machine measured";

/// Runs with their layouts, steps and peaks: SimuMax 1.2's release table, every second row.
/// Megatron in BF16, micro-batches of one sequence, no recomputation, ZeRO-1, 1F1B; the DeepSeek
/// models with one dense layer and no prediction module.
const RUNS: &str = include_str!("../../../presets/published/b200-runs.csv");

/// BF16 GEMMs of that machine: every second row of its public efficiency table.
pub const B200_GEMMS: &str = include_str!("../../../presets/measured/b200-gemms.csv");

/// The measured GEMMs of [`B200_GEMMS`].
///
/// # Errors
/// As [`parse_table`].
pub fn b200_gemms() -> Result<Vec<MeasuredGemm>, SimError> {
    parse_table("b200-gemms.csv", B200_GEMMS)
}

/// The runs of so many micro-batches of 4096 tokens, six of 22, were used: `elementwise_passes` of
/// Megatron-Core and `collective_usable` of B200 are the round figures that err least on them.
const FITTED_MICRO_BATCHES: u64 = 4;

struct Run {
    figure: String,
    scenario: Scenario,
    step_ms: f64,
    peak_gib: f64,
}

fn run(line: &str) -> Result<Run, SimError> {
    let cell: Vec<&str> = line.split(',').collect();
    let number = |i: usize| cell[i].parse::<u64>().expect("a whole number");
    let measured = |i: usize| cell[i].parse::<f64>().expect("a number");
    let name = match cell[0] {
        "llama3_70b" => "llama-3.1-70b",
        "llama3_405b" => "llama-3.1-405b",
        "deepseekv2" => "deepseek-v2",
        _ => "deepseek-v3",
    };
    let mut model = ModelConfig::preset(name)?;
    (model.layers, model.mtp_depth) = (number(1) as usize, 0);
    if let Some(moe) = &mut model.moe {
        moe.first_dense = 1;
    }
    let [seq_len, tp, pp, cp, ep, dp, micro_batches] = [2, 3, 4, 5, 6, 7, 8].map(number);
    let mut s = Scenario::preset("llama-3.1-405b-h100-16384", &[])?;
    s.name = format!("{name}, {} layers", model.layers);
    s.model = model;
    s.cluster = hardware::cluster("b200-2048")?;
    s.cluster.gpus = 8;
    s.parallel = Parallel { tp, cp, pp, dp, ep, zero: 1 };
    s.schedule = ScheduleKind::OneFOneB;
    s.training = Training {
        seq_len,
        micro_batch: 1,
        global_batch: micro_batches * dp,
        precision: Precision::Bf16,
        recompute: Recompute::None,
        total_tokens: 1e12,
    };
    s.stack = Stack::preset("megatron-core")?;
    let figure = format!(
        "{}, {seq_len} tokens, TP{tp} CP{cp} PP{pp} EP{ep}, {micro_batches} micro-batches",
        s.name
    );
    Ok(Run { figure, scenario: s, step_ms: measured(9), peak_gib: measured(10) })
}

/// The rows of this table: published, simulated, and how far apart.
pub(super) fn rows(cost: &FirstPrinciples) -> Result<Vec<Row>, SimError> {
    let runs = RUNS.lines().skip(1).map(run).collect::<Result<Vec<_>, _>>()?;
    let mut rows = compare(AS_IS, cost, &runs)?;
    let gpu = Gpu::preset("b200")?;
    rows.extend(compare(CALIBRATED, &cost.clone().with_gemms(&gpu, &b200_gemms()?)?, &runs)?);
    Ok(rows)
}

fn compare(
    section: &'static str,
    cost: &FirstPrinciples,
    runs: &[Run],
) -> Result<Vec<Row>, SimError> {
    let (mut rows, mut rest, mut peaks) = (Vec::new(), Vec::new(), Vec::new());
    for run in runs {
        let report = simulate(&run.scenario, cost, Detail::Totals)?.report;
        let ours = report.step_time_s * 1e3;
        let s = &run.scenario;
        let row = Row::new(section, run.figure.clone(), "ms a step", run.step_ms, ours);
        let fitted = s.micro_batches() == FITTED_MICRO_BATCHES && s.training.seq_len == 4096;
        let row = if fitted { row.fitted() } else { row };
        if !fitted {
            rest.push(row.error.abs());
        }
        // Intervals are of predictions without the machine at hand.
        rows.push(if section == AS_IS { row.of_run(s, false) } else { row });
        let peak = report.memory_peak_gb.iter().copied().fold(0.0, f64::max) * 1e9;
        peaks.push((peak / (1u64 << 30) as f64 / run.peak_gib - 1.0).abs());
    }
    let mean_of = |errors: &[f64]| 100.0 * errors.iter().sum::<f64>() / errors.len() as f64;
    let (mean, memory) = (mean_of(&rest), mean_of(&peaks));
    let goal = if section == AS_IS { 15.0 } else { 6.0 };
    let figure = "mean absolute error of the runs not used";
    rows.push(Row::new(section, figure, "%", 0.0, mean).points(Role::Tested, goal));
    rows.push(Row::new(section, "mean absolute error of the peak memory", "%", 0.0, memory));
    let memory = rows.last_mut().expect("just pushed");
    (memory.error, memory.goal_points) = (memory.predicted, true);
    Ok(rows)
}
