//! Serving against closed forms (queues, Little's law), conservation, and what iterations must do.

#[path = "../../conformance/src/inference.rs"]
mod model_code;

use std::path::Path;

use fathom_simulator::kernel_time::Constants;
use fathom_simulator::serve::config::ServeScenario;
use fathom_simulator::serve::engine::Engine;
use fathom_simulator::serve::iteration::Batch;
use fathom_simulator::serve::metrics::Meter;
use fathom_simulator::serve::read::SERVING;
use fathom_simulator::serve::requests::{Request, Requests};
use fathom_simulator::serve::run::{prepare, serve};
use model_code::InferenceCode;
use proptest::prelude::*;

fn scenario(preset: &str, set: &[&str]) -> ServeScenario {
    let set: Vec<String> = set.iter().map(|s| s.to_string()).collect();
    ServeScenario::preset(preset, &set).unwrap_or_else(|e| panic!("{e}"))
}

fn play(s: &ServeScenario, drain: bool) -> Meter {
    let ready = prepare(s, &InferenceCode, Constants::FITTED).unwrap();
    assert_eq!(ready.complaints, Vec::<String>::new());
    Engine::new(s, ready.pools, Requests::of(s).unwrap()).run(drain)
}

/// One rank that reads one prompt an iteration, whatever waits: a queue with one server and a fixed
/// time of service.
const ONE_SERVER: [&str; 8] = [
    "unified.gpus=1",
    "unified.tp=1",
    "model.preset=\"small\"",
    "unified.chunk_tokens=512",
    "workload.prompt={mean=512}",
    "workload.output={mean=1}",
    "memory.page_tokens=16",
    "warmup_s=0.0",
];

/// Pollaczek and Khinchine: with service D and utilisation r, a request waits r D / (2 (1 - r)).
#[test]
fn a_single_server_waits_as_m_d_1_says() {
    let base = scenario("llama-3.1-70b-unified-h100-8", &ONE_SERVER);
    let ready = prepare(&base, &InferenceCode, Constants::FITTED).unwrap();
    let service = ready.pools[0].model.time(&Batch::reading(512.0, 512.0, 1.0)).seconds;
    for utilisation in [0.3, 0.6, 0.8] {
        let mut s = base.clone();
        s.workload.rate_per_s = Some(utilisation / service);
        s.duration_s = 60_000.0 * service / utilisation;
        let m = play(&s, true);
        let waits = m.ttft().mean_s - service;
        let expected = utilisation * service / (2.0 * (1.0 - utilisation));
        // Of 60,000 correlated waits the mean is known to some 3 % at 0.8; measured: below 2 %.
        assert!(
            (waits / expected - 1.0).abs() < 0.06,
            "{utilisation}: {waits} against {expected}, service {service}"
        );
        let busy = m.pools[0].busy_s / m.window_s();
        assert!((busy / utilisation - 1.0).abs() < 0.02, "{busy}");
    }
}

/// Requests in the system are arrivals a second times their mean time in it (Little 1961), for any
/// discipline: here with everything on.
#[test]
fn the_law_of_little_holds() {
    for (preset, set) in [
        ("llama-3.1-70b-unified-h100-8", vec!["duration_s=600", "warmup_s=0"]),
        (
            "deepseek-v3-online-h800",
            vec![
                "decode.gpus=16",
                "decode.expert_slots=18",
                "prefill.units=1",
                "workload.rate_per_s=18",
                "duration_s=900",
                "warmup_s=0",
                "mtp.drafts=1",
                "mtp.acceptance=0.8",
            ],
        ),
    ] {
        let s = scenario(preset, &set);
        let m = play(&s, true);
        let per_s = m.counts[0] as f64 / m.window_s();
        let expected = per_s * m.whole().mean_s;
        let in_system = m.mean_in_system();
        assert_eq!(m.counts[0], m.counts[1], "{preset}: all have ended");
        assert!((in_system / expected - 1.0).abs() < 1e-6, "{preset}: {in_system} {expected}");
    }
}

/// Poisson arrivals: mean and variance of the counts of a second are the rate.
#[test]
fn arrivals_are_poisson() {
    let s = scenario(
        "llama-3.1-70b-unified-h100-8",
        &["workload.rate_per_s=25", "duration_s=4000", "warmup_s=0"],
    );
    let Requests::Listed(list) = Requests::of(&s).unwrap() else { panic!("an open loop") };
    let mut counts = vec![0f64; 4000];
    list.iter().for_each(|r| counts[r.arrival_s as usize] += 1.0);
    let mean = counts.iter().sum::<f64>() / 4000.0;
    let variance = counts.iter().map(|c| (c - mean).powi(2)).sum::<f64>() / 4000.0;
    // Five standard errors.
    assert!((mean / 25.0 - 1.0).abs() < 0.016, "{mean}");
    assert!((variance / 25.0 - 1.0).abs() < 0.12, "{variance}");
}

/// Drafts that hold with probability p, one after the other: (1 - p^(d+1)) / (1 - p) tokens a step.
#[test]
fn speculation_emits_as_many_tokens_as_the_series_says() {
    for (drafts, p) in [(1, 0.85f64), (3, 0.6)] {
        let s = scenario(
            "deepseek-v3-decode-h800-320",
            &[
                &format!("mtp.drafts={drafts}"),
                &format!("mtp.acceptance={p}"),
                "workload.concurrency=800",
                "duration_s=20",
                "warmup_s=5",
                "workload.output={mean=4000}",
            ],
        );
        let m = play(&s, false);
        let steps = m.itl().count as f64;
        let expected = (1.0 - p.powi(drafts + 1)) / (1.0 - p);
        let found = m.emitted_tokens as f64 / steps;
        assert!((found / expected - 1.0).abs() < 0.01, "{drafts}: {found} against {expected}");
    }
}

#[test]
fn every_preset_runs_and_serves_what_arrives() {
    for (name, _) in SERVING {
        let s = scenario(name, &["duration_s=30", "warmup_s=15"]);
        let r =
            serve(&s, &InferenceCode, Constants::FITTED).unwrap_or_else(|e| panic!("{name}: {e}"));
        assert!(r.complaints.is_empty(), "{name}: {:?}", r.complaints);
        assert!(r.output_tokens_per_s > 0.0 && r.requests.refused == 0, "{name}: {:?}", r.requests);
        for p in &r.pools {
            assert!((0.0..=1.0 + 1e-9).contains(&p.busy), "{name}: {}", p.busy);
            assert!(p.measured.kv_peak <= 1.0, "{name}");
        }
    }
}

/// A request alone: the prompt's iteration, then one iteration a token, over a growing cache.
#[test]
fn a_request_alone_takes_its_iterations() {
    let s = scenario(
        "llama-3.1-70b-unified-h100-8",
        &["warmup_s=0", "duration_s=100", "unified.chunk_tokens=256"],
    );
    let ready = prepare(&s, &InferenceCode, Constants::FITTED).unwrap();
    let model = ready.pools[0].model.clone();
    let request = Request { arrival_s: 1.0, prompt: 300, output: 5, blocks: Vec::new() };
    let m = Engine::new(&s, ready.pools, Requests::Listed(vec![request])).run(true);
    let chunk = |tokens: f64, done: f64| {
        let pairs = tokens * (done + (tokens + 1.0) / 2.0);
        model.time(&Batch { pairs, context: done, ..Batch::reading(tokens, 1.0, 1.0) }).seconds
    };
    let ttft = chunk(256.0, 0.0) + chunk(44.0, 256.0);
    let decode: f64 = (0..4)
        .map(|i| model.time(&Batch::decoding(1.0, 1.0, 300.0 + f64::from(i), 1.0)).seconds)
        .sum();
    // Times are kept in whole nanoseconds.
    assert!((m.ttft().mean_s - ttft).abs() < 1e-8, "{} {ttft}", m.ttft().mean_s);
    assert!((m.whole().mean_s - ttft - decode).abs() < 2e-8);
    assert!((m.tpot().mean_s - decode / 4.0).abs() < 1e-8);
}

/// More of anything that helps never makes an iteration longer.
#[test]
fn faster_machines_are_not_slower() {
    let base = scenario("deepseek-v3-online-h800", &[]);
    let times = |s: &ServeScenario| {
        let ready = prepare(s, &InferenceCode, Constants::FITTED).unwrap();
        let read = ready.pools[0].model.time(&Batch::reading(16384.0, 4096.0, 1.2)).seconds;
        [read, ready.pools[1].model.time(&Batch::decoding(88.0, 1.0, 4989.0, 1.2)).seconds]
    };
    let before = times(&base);
    for key in [
        "cluster.gpu.memory_bytes_per_s=6e12",
        "cluster.gpu.fp8_flops=4e15",
        "cluster.gpu.bf16_flops=2e15",
        "cluster.network.nic_bytes_per_s=100e9",
        "cluster.gpu.scale_up_bytes_per_s=450e9",
        "what_if.wide_accumulation=true",
    ] {
        let after = times(&scenario("deepseek-v3-online-h800", &[key]));
        assert!(after[0] <= before[0] && after[1] <= before[1], "{key}: {after:?} {before:?}");
    }
}

/// A tensor-parallel group sums behind its attention, when decoding too: a slower link is seen.
#[test]
fn tensor_parallel_decoding_pays_for_its_sums() {
    let time = |set: &[&str]| {
        let s = scenario("deepseek-v3-decode-h800-320", set);
        let ready = prepare(&s, &InferenceCode, Constants::FITTED).unwrap();
        ready.pools[0].model.time(&Batch::decoding(128.0, 1.0, 5000.0, 1.0))
    };
    let slow = "cluster.gpu.scale_up_bytes_per_s=20e9";
    let (fast, slow) = (time(&[]), time(&[slow]));
    // 128 rows of 14,336 bytes in BF16 over 16 instead of 160 GB/s, a ring of four, two passes:
    // 6/4 * 1.835 MB * (1/16e9 - 1/160e9) = 155 us a layer of both micro-batches.
    let expected = 61.0 * 1.5 * 128.0 * 14336.0 * (1.0 / 16e9 - 1.0 / 160e9);
    let found = slow.projections_s + slow.shared_s - fast.projections_s - fast.shared_s;
    assert!((found / expected - 1.0).abs() < 0.1, "{found} against {expected}");
}

/// Experts that are not spread are cut by the tensor-parallel group: each rank reads its part.
#[test]
fn experts_without_ep_are_cut_by_tp() {
    let experts = |tp: u64| {
        let s = scenario(
            "llama-3.1-70b-unified-h100-8",
            &["model.preset=\"qwen3-235b-a22b\"", "unified.ep=1", &format!("unified.tp={tp}")],
        );
        let ready = prepare(&s, &InferenceCode, Constants::FITTED).unwrap();
        ready.pools[0].model.time(&Batch::decoding(64.0, 1.0, 500.0, 1.0)).experts_s
    };
    // 94 layers of 128 experts of 18.9 MB at 2.78 TB/s: 82 ms by their bytes alone.
    let (one, four) = (experts(1), experts(4));
    assert!((0.080..0.095).contains(&one), "{one}");
    assert!((0.020..0.032).contains(&four), "{four}");
}

/// Copies of the experts pay where popularity differs, and never beyond the mean.
#[test]
fn the_balancer_helps() {
    let s = scenario("deepseek-v3-sglang-h100-96", &[]);
    let ready = prepare(&s, &InferenceCode, Constants::FITTED).unwrap();
    for r in &ready.reports {
        let e = r.experts.as_ref().unwrap();
        assert!(e.imbalance >= 1.0 && e.imbalance < 1.1 && e.unbalanced > 1.8, "{e:?}");
        assert_eq!(e.moved_bytes, 0.0, "nothing drifts");
    }
    let s = scenario("deepseek-v3-sglang-h100-96", &["experts.drift=0.1"]);
    let drifted = prepare(&s, &InferenceCode, Constants::FITTED).unwrap();
    let s = scenario("deepseek-v3-sglang-h100-96", &["experts.drift=0.1", "experts.dynamic=true"]);
    let dynamic = prepare(&s, &InferenceCode, Constants::FITTED).unwrap();
    let of = |r: &fathom_simulator::serve::run::Ready| r.reports[1].experts.clone().unwrap();
    assert!(of(&drifted).imbalance > of(&dynamic).imbalance);
    assert!(of(&drifted).moved_bytes > 0.0 && of(&drifted).move_share < 0.1);
}

#[test]
fn what_does_not_fit_says_so() {
    let s = scenario(
        "deepseek-v3-decode-h800-320",
        &["decode.gpus=8", "decode.tp=1", "workload.concurrency=8"],
    );
    let r = serve(&s, &InferenceCode, Constants::FITTED).unwrap();
    assert!(r.complaints[0].starts_with("decode does not fit: "), "{:?}", r.complaints);
    assert_eq!(r.requests.arrived, 0);
}

/// A trace in Mooncake's manner: the second prompt finds the first one's two blocks, the third none
/// of those that were driven out.
#[test]
fn a_trace_of_blocks_is_cached_as_its_blocks_say() {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR"));
    let line = |ms: u64, tokens: u64, blocks: &str| {
        format!(
            "{{\"timestamp\": {ms}, \"input_length\": {tokens}, \"output_length\": 5, \"hash_ids\": [{blocks}]}}\n"
        )
    };
    let text = [
        line(0, 1024, "1, 2"),
        line(2000, 1500, "1, 2, 3"),
        line(4000, 600, "4, 5"),
        line(6000, 1024, "1, 2"),
    ];
    std::fs::write(folder.join("serve-trace.jsonl"), text.concat()).unwrap();
    let scenario = "preset = \"llama-3.1-70b-unified-h100-8\"\nwarmup_s = 0\nduration_s = 20\n[workload]\ntrace = \"serve-trace.jsonl\"\n[prefix_cache]\ncapacity_tokens = 1536\n";
    let s = ServeScenario::from_toml("t.toml", scenario, Some(folder), &[]).unwrap();
    let m = play(&s, true);
    // Found: 0, 1024, 0, and of the last prompt nothing: its blocks are the oldest.
    assert_eq!((m.cached_tokens, m.read_tokens), (1024, 1024 + 476 + 600 + 1024));
    assert_eq!(m.counts, [4, 4, 0]);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    /// Requests and tokens are neither lost nor made, and pages come back, whatever the pools, the
    /// lengths and the memory; pages that run out only delay.
    #[test]
    fn requests_tokens_and_pages_are_conserved(
        seed in 0u64..1_000_000, rate in 1.0f64..60.0, prompt in 1u64..3000, output in 1u64..400,
        cv in 0.0f64..2.0, chunk in 1u64..4096, batch in 1u64..64, page in 1u64..256, drafts in 0u64..3,
        pages in 200u64..4000, hit in 0.0f64..0.9, split in any::<bool>(),
    ) {
        let mut s = scenario("deepseek-v3-online-h800", &["decode.gpus=16", "decode.expert_slots=18", "prefill.units=1"]);
        s.workload.rate_per_s = Some(rate);
        s.workload.prompt = Some(fathom_simulator::serve::config::Length { mean: prompt as f64, cv, max: 20_000 });
        s.workload.output = Some(fathom_simulator::serve::config::Length { mean: output as f64, cv, max: 2_000 });
        (s.seed, s.duration_s, s.warmup_s) = (seed, 5.0, 0.0);
        (s.memory.page_tokens, s.mtp.drafts, s.mtp.acceptance) = (page, drafts, 0.7);
        s.prefix_cache.hit_rate = hit;
        if split {
            (s.prefill.as_mut().unwrap().chunk_tokens, s.decode.as_mut().unwrap().max_batch) = (chunk, batch);
        } else {
            s.unified = s.prefill.take();
            s.decode = None;
            let pool = s.unified.as_mut().unwrap();
            (pool.chunk_tokens, pool.max_batch) = (chunk, batch);
        }
        let mut ready = prepare(&s, &InferenceCode, Constants::FITTED).unwrap();
        ready.pools.iter_mut().for_each(|p| p.pages = pages);
        let requests = Requests::of(&s).unwrap();
        let Requests::Listed(list) = &requests else { panic!("an open loop") };
        let longest = pages * page;
        let fits = |r: &&Request| r.prompt + r.output <= longest;
        let [all, kept] = [list.len(), list.iter().filter(fits).count()];
        let tokens: u64 = list.iter().filter(fits).map(|r| r.output).sum();
        let m = Engine::new(&s, ready.pools, requests).run(true);
        prop_assert_eq!(m.counts, [all as u64, kept as u64, (all - kept) as u64]);
        prop_assert_eq!(m.all_emitted, tokens);
        prop_assert_eq!(m.all_ended, tokens);
        prop_assert_eq!((m.held_pages, m.in_flight), (0, 0));
        for p in &m.pools {
            prop_assert!(p.kv_peak <= 1.0 && p.busy_s.is_finite());
        }
    }
}
