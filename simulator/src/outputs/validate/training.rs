//! Training of DeepSeek-V3: the profiled chunk, the step, the whole run.

use fathom_schedule::ScheduleKind;

use super::{Role, Row};
use fathom_config::ModelConfig;

use crate::chunk::ChunkQuestion;
use crate::config::{Precision, Scenario, WhatIf};
use crate::error::SimError;
use crate::events::Detail;
use crate::first_principles::FirstPrinciples;
use crate::hardware;
use crate::step::{StepReport, simulate};

const CHUNK: &str = "Profiled chunk";
const STEP: &str = "DeepSeek-V3 step on 2048 H800";
const RUN: &str = "DeepSeek-V3's whole training";

/// Loads of rank 0 relative to the mean by layer, forward and backward chunk, in the order in which
/// the layers run: distinct tokens received over the 30,144 expected.
pub const PROFILE_LOADS: [(f64, f64); 4] = [
    (28984.0 / 30144.0, 32120.0 / 30144.0),
    (28856.0 / 30144.0, 30048.0 / 30144.0),
    (34144.0 / 30144.0, 30584.0 / 30144.0),
    (29128.0 / 30144.0, 26592.0 / 30144.0),
];

/// Means of the profile's ten phases over its four layers, milliseconds from a phase's first kernel
/// to its last one's end.
const PROFILE_PHASES_MS: [(&str, f64); 10] = [
    ("combine(B)", 5.784),
    ("attn(F)", 4.599),
    ("mlp(B)", 5.363),
    ("dispatch(F)", 6.737),
    ("dispatch(B)", 7.558),
    ("mlp(W)", 5.073),
    ("mlp(F)", 4.641),
    ("attn(B)", 9.540),
    ("attn(W)", 2.396),
    ("combine(F)", 8.696),
];

/// The question that the published profile answers.
pub fn profiled_chunk() -> Result<ChunkQuestion, SimError> {
    Ok(ChunkQuestion {
        model: ModelConfig::preset("deepseek-v3")?,
        cluster: hardware::cluster("h800-64")?,
        tokens: 4096,
        ep: 64,
        comm_sms: 20,
        precision: Precision::Fp8,
        what_if: WhatIf::default(),
        loads: PROFILE_LOADS.to_vec(),
    })
}

/// All rows of the training.
pub(super) fn rows(cost: &FirstPrinciples) -> Result<Vec<Row>, SimError> {
    let mut rows = chunk_rows(cost)?;
    let published = Scenario::preset("deepseek-v3-h800-2048", &[])?;
    let report = simulate(&published, cost, Detail::Totals)?.report;
    let mut steps = step_rows(&report, cost)?;
    steps[0] = steps[0].clone().of_run(&published, false);
    rows.extend(steps);
    rows.extend(run_rows(&published, &report, cost)?);
    Ok(rows)
}

fn chunk_rows(cost: &FirstPrinciples) -> Result<Vec<Row>, SimError> {
    let r = profiled_chunk()?.simulate(cost)?;
    let mut rows = vec![
        Row::new(CHUNK, "span", "ms", 129.0, r.span_s * 1e3).goal(Role::Tested, 0.05),
        Row::new(CHUNK, "compute busy", "ms", 124.3, r.compute_busy_s * 1e3),
        Row::new(CHUNK, "communication stream busy", "ms", 114.5, r.communication_s * 1e3).fitted(),
        Row::new(CHUNK, "communication hidden", "%", 96.3, r.hidden_fraction * 100.0)
            .points(Role::Tested, 2.0),
    ];
    for ((name, ms), phase) in PROFILE_PHASES_MS.into_iter().zip(&r.phases) {
        assert_eq!(name, phase.phase, "both lists are in the profile's order");
        let communicates = name.starts_with("combine") || name.starts_with("dispatch");
        let role = if communicates { Role::Fitted } else { Role::Tested };
        rows.push(Row::new(CHUNK, name, "ms", ms, phase.mean_s * 1e3).goal(role, 0.10));
    }
    Ok(rows)
}

fn step_rows(r: &StepReport, cost: &FirstPrinciples) -> Result<Vec<Row>, SimError> {
    let b = &r.breakdown_s;
    let recalled = "published row recalled; how ranks were counted is unpublished";
    let balanced =
        Scenario::preset("deepseek-v3-h800-2048", &["expert_load.deviation=0.0".to_string()])?;
    let balanced = simulate(&balanced, cost, Detail::Totals)?.report.step_time_s;
    let spread = format!(
        "loads spread as in the profile, every all-to-all waits for the busiest rank; {balanced:.2} s where experts are balanced"
    );
    let tflops = |mfu: f64| mfu * 989.5;
    Ok(vec![
        Row::new(STEP, "time a step", "s", 19.926, r.step_time_s)
            .goal(Role::Tested, 0.03)
            .note(spread),
        Row::new(STEP, "tokens a day", "1e9", 272.80, r.tokens_per_day / 1e9)
            .goal(Role::Tested, 0.03),
        Row::new(STEP, "forward-backward pairs", "s", 13.95, b.forward_backward)
            .goal(Role::Tested, 0.10)
            .note(recalled),
        Row::new(STEP, "forward alone", "s", 1.13, b.forward).note(recalled),
        Row::new(STEP, "backward alone", "s", 1.99, b.backward).note(recalled),
        Row::new(STEP, "weight gradient alone", "s", 0.48, b.weight).note(recalled),
        Row::new(STEP, "bubble", "s", 2.06, b.bubble).note(recalled),
        Row::new(STEP, "optimizer, with reduction and gathering", "s", 0.29, b.optimizer + b.other)
            .note(recalled),
        Row::new(STEP, "TFLOPS a GPU, causal", "", 385.0, tflops(r.mfu_causal)).note(recalled),
        Row::new(STEP, "TFLOPS a GPU, non-causal", "", 432.0, tflops(r.mfu_noncausal))
            .note(recalled),
        Row::new(STEP, "MFU, causal", "%", 38.94, r.mfu_causal * 100.0),
        Row::new(STEP, "MFU, non-causal", "%", 43.73, r.mfu_noncausal * 100.0),
    ])
}

/// Tokens over which the batch grows from 3072 to 15360 sequences.
const RAMP_TOKENS: f64 = 469e9;

/// Seconds per token of the cluster with a smaller batch. DualPipe needs two micro-batches per
/// stage; below that ZB1P is assumed to have run.
fn seconds_per_token(base: &Scenario, batch: u64, cost: &FirstPrinciples) -> Result<f64, SimError> {
    let mut s = base.clone();
    s.training.global_batch = batch;
    if s.micro_batches() < 2 * s.parallel.pp {
        s.schedule = ScheduleKind::Zb1p;
    }
    let step = simulate(&s, cost, Detail::Totals)?.report.step_time_s;
    Ok(step / s.tokens_per_step())
}

/// GPU-hours of the pre-training with its batch ramp, at batches of 3072 sequences and its
/// multiples, linear between them.
pub fn pretraining_gpu_hours(base: &Scenario, cost: &FirstPrinciples) -> Result<f64, SimError> {
    let batches = [3072, 6144, 9216, 12288, 15360];
    let mut rates = Vec::new();
    for batch in batches {
        rates.push(seconds_per_token(base, batch, cost)?);
    }
    let ramp = rates.windows(2).map(|w| (w[0] + w[1]) / 2.0).sum::<f64>() / 4.0;
    let full = rates[4];
    let seconds = RAMP_TOKENS * ramp + (base.training.total_tokens - RAMP_TOKENS) * full;
    Ok(seconds * base.cluster.gpus as f64 / 3600.0)
}

fn run_rows(base: &Scenario, r: &StepReport, cost: &FirstPrinciples) -> Result<Vec<Row>, SimError> {
    let hours = pretraining_gpu_hours(base, cost)?;
    let trillion = r.gpu_hours_per_trillion_tokens;
    let days = trillion / base.cluster.gpus as f64 / 24.0;
    // What the published total adds to the pre-training at the published price.
    let rest_hours = 119e3 + 5e3;
    let usd = (hours + rest_hours) * base.cluster.usd_per_gpu_hour / 1e6;
    Ok(vec![
        Row::new(RUN, "GPU-hours a trillion tokens", "1e3", 180.0, trillion / 1e3).goal(Role::Tested, 0.03),
        Row::new(RUN, "days a trillion tokens on 2048", "", 3.7, days),
        Row::new(RUN, "GPU-hours of the pre-training, 14.8e12 tokens", "1e3", 2664.0, hours / 1e3)
            .goal(Role::Tested, 0.03)
            .note("batch ramp included; ZB1P assumed where a pipeline gets fewer than 32 micro-batches"),
        Row::new(RUN, "cost of the whole training at 2 $ a GPU-hour", "M$", 5.576, usd)
            .note("context extension and post-training as published"),
    ])
}
