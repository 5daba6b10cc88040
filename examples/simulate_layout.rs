//! Simulates a training step of DeepSeek-V3 on 2048 H800, as trained and with another schedule, and
//! says where the time goes.
//!
//! `cargo run --release --example simulate_layout`

use fathom_conformance::model_code::ModelCode;
use fathom_simulator::config::Scenario;
use fathom_simulator::events::Detail;
use fathom_simulator::first_principles::FirstPrinciples;
use fathom_simulator::step::simulate;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    // The work of a step is what the model's own code does; the times are first principles'.
    let times = FirstPrinciples::new(ModelCode);
    for schedule in ["dualpipe", "zb1p", "1f1b"] {
        let set = [format!("schedule = \"{schedule}\"")];
        let scenario = Scenario::preset("deepseek-v3-h800-2048", &set)?;
        let report = simulate(&scenario, &times, Detail::Totals)?.report;
        println!(
            "{schedule:>9}: {:5.2} s a step, {:5.0} tokens/s/GPU, at most {:3.0} GB, bubble {:4.1} %",
            report.step_time_s,
            report.tokens_per_s_per_gpu,
            report.memory_peak_gb.iter().copied().fold(0.0, f64::max),
            100.0 * report.breakdown_s.bubble / report.step_time_s,
        );
    }
    Ok(())
}
