//! No text makes the simulator's readers panic: scenarios, routing traces, profiler traces,
//! measured tables; and a
//! scenario that reads is simulated or refused, never more.
#![no_main]

use fathom_simulator::calibrate::{KinetoTrace, parse_table};
use fathom_simulator::config::{Scenario, Source};
use fathom_simulator::kernel_time::KernelTimes;
use fathom_simulator::load::RoutingTrace;
use fathom_simulator::parallel::check;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: (u8, &str)| {
    let (reader, text) = data;
    match reader % 6 {
        0 => {
            // Behind a preset, so that the fuzzer reaches values instead of missing keys.
            let text = format!("preset = \"deepseek-v3-h800-2048\"\n{text}");
            let source = Source { file: "fuzz.toml", text: &text, folder: None };
            if let Ok(scenario) = Scenario::from_toml(&source, &[]) {
                let _ = check(&scenario);
            }
        }
        1 => drop(RoutingTrace::parse("fuzz.jsonl", text)),
        2 => drop(KinetoTrace::from_bytes("fuzz.json", text.as_bytes())),
        3 => drop(KernelTimes::from_csv("fuzz.csv", text)),
        4 => drop(KernelTimes::from_json("fuzz.json", text)),
        _ => drop(parse_table("fuzz.csv", text)),
    }
});
