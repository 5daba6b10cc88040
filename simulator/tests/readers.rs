//! Readers of configurations and traces on damaged input: an error or a scenario, never a panic.

#[path = "../../conformance/src/workload.rs"]
mod model_code;

use fathom_simulator::config::{SCENARIOS, Scenario, Source};
use fathom_simulator::events::Detail;
use fathom_simulator::first_principles::FirstPrinciples;
use fathom_simulator::kernel_time::KernelTimes;
use fathom_simulator::load::RoutingTrace;
use fathom_simulator::step::simulate;
use model_code::ModelCode;
use proptest::prelude::*;

/// Damages a text: cuts, doubles or replaces a piece.
fn damaged(text: &str, at: usize, len: usize, how: u8, with: &str) -> String {
    let chars: Vec<char> = text.chars().collect();
    let at = at % (chars.len() + 1);
    let end = (at + len).min(chars.len());
    let (head, middle, tail) = (&chars[..at], &chars[at..end], &chars[end..]);
    let piece: String = match how % 3 {
        0 => String::new(),
        1 => middle.iter().chain(middle).collect(),
        _ => with.to_string(),
    };
    head.iter().copied().chain(piece.chars()).chain(tail.iter().copied()).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn damaged_scenarios_are_read_or_refused(
        preset in 0..SCENARIOS.len(), at in 0usize..2000, len in 0usize..40, how in 0u8..3, with in "[a-z0-9=.\\[\\]\"\n-]{0,12}",
    ) {
        let text = damaged(SCENARIOS[preset].1, at, len, how, &with);
        let source = Source { file: "damaged.toml", text: &text, folder: None };
        match Scenario::from_toml(&source, &[]) {
            // What reads is simulated or refused with a reason; huge pipelines only cost time.
            Ok(s) if s.micro_batches() <= 4096 => {
                if let Err(e) = simulate(&s, &FirstPrinciples::new(ModelCode), Detail::Totals) {
                    prop_assert!(e.to_string().starts_with("illegal layout: "), "{e}");
                }
            }
            Ok(_) => {}
            Err(e) => prop_assert!(e.to_string().starts_with("damaged.toml:"), "{e}"),
        }
    }

    #[test]
    fn any_number_at_any_key_is_simulated_or_refused(
        key in prop::sample::select(vec![
            "parallel.tp", "parallel.cp", "parallel.pp", "parallel.dp", "parallel.ep", "parallel.zero", "cluster.gpus",
            "cluster.gpus_per_node", "cluster.gpu.sms", "cluster.gpu.fp8_flops", "cluster.gpu.memory_bytes_per_s",
            "cluster.network.nic_bytes_per_s", "cluster.network.planes", "cluster.network.switch_ports", "comm_sms",
            "training.seq_len", "training.micro_batch", "model.n_layers", "model.hidden", "model.vocab_size",
            "model.moe.n_routed_experts", "model.moe.n_activated_experts", "model.moe.n_expert_groups",
            "model.moe.n_dense_layers", "model.n_mtp_layers", "expert_load.deviation", "reliability.checkpoint_s",
            "interleave", "cluster.usd_per_gpu_hour",
        ]),
        value in prop::sample::select(vec![
            "0", "1", "2", "3", "7", "64", "255", "4096", "1000003", "9223372036854775807", "-1", "0.0", "-1e300", "1e300",
            "inf", "nan", "\"x\"", "true", "[]",
        ]),
    ) {
        let set = [format!("{key}={value}")];
        let Ok(s) = Scenario::preset("deepseek-v3-h800-2048", &set) else { return Ok(()) };
        if s.micro_batches() > 4096 {
            return Ok(());
        }
        match simulate(&s, &FirstPrinciples::new(ModelCode), Detail::Totals) {
            Ok(sim) => prop_assert!(sim.report.step_time_s.is_finite(), "{key}={value}"),
            Err(e) => prop_assert!(e.to_string().starts_with("illegal layout: "), "{e}"),
        }
    }

    #[test]
    fn damaged_routing_traces_are_read_or_refused(at in 0usize..200, len in 0usize..20, how in 0u8..3, with in ".{0,8}") {
        let text = "{\"layer\":3,\"micro_batch\":0,\"tokens\":[5,7,1,0]}\n{\"layer\":4,\"micro_batch\":0,\"tokens\":[5,7,1,2]}\n";
        let text = damaged(text, at, len, how, &with);
        if let Err(e) = RoutingTrace::parse("damaged.jsonl", &text) {
            prop_assert!(e.to_string().starts_with("damaged.jsonl: "), "{e}");
        }
    }

    #[test]
    fn damaged_tables_of_times_are_read_or_refused(at in 0usize..80, len in 0usize..20, how in 0u8..3, with in ".{0,8}") {
        let text = damaged("op,shape,mean_us\ngemm_fp8,4096x2112x7168,99.5\nrope,bf16 4096x24576,61\n", at, len, how, &with);
        for read in [KernelTimes::from_csv, KernelTimes::from_json] {
            if let Err(e) = read("damaged.csv", &text) {
                prop_assert!(e.to_string().starts_with("damaged.csv: "), "{e}");
            }
        }
    }
}
