//! Readers of configurations and traces on damaged input: an error or a scenario, never a panic.

#[path = "../../conformance/src/model_code.rs"]
mod model_code;

use std::path::Path;

use fathom_simulator::config::{SCENARIOS, Scenario};
use fathom_simulator::events::Detail;
use fathom_simulator::first_principles::FirstPrinciples;
use fathom_simulator::kernel_time::KernelTimes;
use fathom_simulator::load::RoutingTrace;
use fathom_simulator::step::{simulate, whole_run};
use fathom_simulator::workload::OpTrace;
use fathom_trace::{OpRecord, jsonl};
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
        match Scenario::from_toml("damaged.toml", &text, None, &[]) {
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
            "training.seq_len", "training.micro_batch", "model.layers", "model.hidden_size", "model.vocab_size",
            "model.moe.n_routed_experts", "model.moe.top_k", "model.moe.n_group",
            "model.moe.first_dense", "model.mtp_depth", "expert_load.deviation", "reliability.checkpoint_s",
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

/// What could take any time or memory is refused before it does.
#[test]
fn huge_pipelines_are_refused() {
    let set = ["training.global_batch=134217728".to_string()];
    let s = Scenario::preset("deepseek-v3-h800-2048", &set).unwrap();
    let e = simulate(&s, &FirstPrinciples::new(ModelCode), Detail::Totals).unwrap_err().to_string();
    assert!(e.contains("stages times micro-batches are at most 2097152"), "{e}");
    let never = ["reliability.gpu_mtbf_hours=0.001".to_string()];
    let s = Scenario::preset("deepseek-v3-h800-2048", &never).unwrap();
    let model = FirstPrinciples::new(ModelCode);
    let step = simulate(&s, &model, Detail::Totals).unwrap().report;
    let e = whole_run(&s, &step, &model).unwrap_err().to_string();
    assert!(e.contains("the run would never end"), "{e}");
}

#[test]
fn files_too_large_or_not_text_are_refused() {
    let folder = std::env::temp_dir().join(format!("fathom-readers-{}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    let file = folder.join("run.toml");
    for (bytes, part) in [
        (b"= ".repeat(1 << 20), "expected at most 1048576 bytes, found 2097152"),
        (
            b"name = \"a\"\n\xff\xfe\n".to_vec(),
            "line 2: expected UTF-8 text, found byte 0xff at offset 11",
        ),
    ] {
        std::fs::write(&file, bytes).unwrap();
        let e = Scenario::read(&file, &[]).unwrap_err().to_string();
        assert!(e.contains("run.toml: ") && e.contains(part), "{e}");
    }
    std::fs::remove_dir_all(&folder).unwrap();
}

/// A record whose bytes do not add up in 64 bits, and one whose rows do not: refused at the record.
#[test]
fn op_traces_out_of_proportion_are_refused() {
    let s = Scenario::preset("deepseek-v3-h800-2048", &[]).unwrap();
    let records = FirstPrinciples::new(ModelCode).op_records(&s).unwrap();
    let read = |change: &dyn Fn(&mut OpRecord)| {
        let mut writer = jsonl::Writer::<OpRecord, _>::new(Vec::new()).unwrap();
        for (i, record) in records.iter().enumerate() {
            let mut record = record.clone();
            if i == 5 {
                change(&mut record);
            }
            writer.write(&record).unwrap();
        }
        let text = writer.finish().unwrap();
        OpTrace::parse(text.as_slice(), Path::new("ops.jsonl"))
    };
    assert!(read(&|_| ()).is_ok());
    type Change = fn(&mut OpRecord);
    let changes: [(Change, &str); 3] = [
        (|r| r.bytes_read = u64::MAX, "bytes_read is 18446744073709551615, expected at most"),
        (|r| r.inputs[0].shape[0] = usize::MAX, "expected sizes up to 16777216"),
        (|r| drop(r.params.insert("k".into(), u64::MAX.into())), "k has 18446744073709551615"),
    ];
    for (change, part) in changes {
        let e = read(&change).unwrap_err().to_string();
        assert!(e.starts_with("ops.jsonl: record 5 (") && e.contains(part), "{e}");
    }
}
