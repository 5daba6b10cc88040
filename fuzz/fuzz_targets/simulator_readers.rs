//! No text makes the simulator's readers panic: scenarios, model configurations, routing traces,
//! profiler traces, op traces, measured tables, constants; and a scenario or an op trace that reads
//! is simulated with finite numbers or refused.
#![no_main]

use std::path::Path;

use fathom_config::ModelConfig;
use fathom_conformance::model_code::ModelCode;
use fathom_simulator::calibrate::parse_table;
use fathom_simulator::kineto::KinetoTrace;
use fathom_simulator::config::Scenario;
use fathom_simulator::events::Detail;
use fathom_simulator::first_principles::FirstPrinciples;
use fathom_simulator::kernel_time::{Constants, KernelTimes};
use fathom_simulator::load::RoutingTrace;
use fathom_simulator::step::simulate;
use fathom_simulator::workload::OpTrace;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: (u8, &str)| {
    let (reader, text) = data;
    match reader % 9 {
        0 => {
            // Behind a preset, so that the fuzzer reaches values instead of missing keys.
            let text = format!("preset = \"deepseek-v3-h800-2048\"\n{text}");
            if let Ok(scenario) = Scenario::from_toml("fuzz.toml", &text, None, &[]) {
                play(&scenario, &FirstPrinciples::new(ModelCode));
            }
        }
        1 => drop(RoutingTrace::parse("fuzz.jsonl", text)),
        2 => drop(KinetoTrace::from_bytes("fuzz.json", text.as_bytes()).map(|t| t.summary())),
        3 => drop(KernelTimes::from_csv("fuzz.csv", text)),
        4 => drop(KernelTimes::from_json("fuzz.json", text)),
        5 => drop(parse_table("fuzz.csv", text)),
        6 => drop(Constants::parse("fuzz.json", text)),
        7 => {
            let json = serde_json::from_str(text).unwrap_or_default();
            if let Ok(model) = ModelConfig::shape_from_hf(&json, Path::new("config.json")) {
                let mut s = Scenario::preset("deepseek-v3-h800-2048", &[]).expect("a preset");
                s.parallel.ep = if model.moe.is_some() { 8 } else { 1 };
                s.model = model;
                play(&s, &FirstPrinciples::new(ModelCode));
            }
        }
        _ => {
            if let Ok(trace) = OpTrace::parse(text.as_bytes(), Path::new("fuzz.jsonl")) {
                let s = Scenario::preset("deepseek-v3-h800-2048", &[]).expect("a preset");
                play(&s, &FirstPrinciples::new(trace));
            }
        }
    }
});

/// Simulates what is not so large that it only costs time.
fn play(scenario: &Scenario, model: &FirstPrinciples) {
    if scenario.micro_batches() > 1024 || scenario.model.layers > 256 {
        return;
    }
    if let Ok(sim) = simulate(scenario, model, Detail::Totals) {
        assert!(sim.report.step_time_s.is_finite() && sim.report.mfu_causal.is_finite());
    }
}
