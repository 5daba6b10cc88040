//! Bad scenarios and traces of serving: an error that names file, line and key, never a panic.

#[path = "../../conformance/src/inference.rs"]
mod model_code;

use fathom_simulator::kernel_time::Constants;
use fathom_simulator::serve::config::ServeScenario;
use fathom_simulator::serve::read::SERVING;
use fathom_simulator::serve::requests::parse;
use fathom_simulator::serve::run::{prepare, serve};
use model_code::InferenceCode;
use proptest::prelude::*;

/// What follows `preset = "deepseek-v3-online-h800"` on line 1, and a part of the message.
const SCENARIOS: [(&str, &str); 33] = [
    ("[prefil]\ngpus = 32\n", "bad.toml:2: prefil: unknown field"),
    ("[prefill]\ngpu = 32\n", "bad.toml:3: prefill.gpu: unknown field `gpu`"),
    ("[prefill]\ngpus = 0\n", "bad.toml:3: prefill.gpus: expected 1 to 65536, found 0"),
    ("[prefill]\ngpus = -1\n", "bad.toml:3: prefill.gpus: invalid value"),
    ("[prefill]\ngpus = \"many\"\n", "bad.toml:3: prefill.gpus: invalid type"),
    ("[decode]\nunits = 5000\n", "bad.toml:3: decode.units: expected 1 to 4096, found 5000"),
    ("[decode]\nmicro_batches = 3\n", "bad.toml:3: decode.micro_batches: expected 1 to 2, found 3"),
    ("[decode]\nexchange = \"fast\"\n", "bad.toml:3: decode.exchange: unknown variant `fast`"),
    ("[decode]\nhost_s = -1.0\n", "bad.toml:3: decode.host_s: expected 0 to 10, found -1"),
    ("[unified]\ngpus = 8\n", "bad.toml:2: unified: expected this pool alone"),
    ("[experts]\npopularity = 9.0\n", "bad.toml:3: experts.popularity: expected 0 to 4"),
    ("[experts]\ndrift = 2.0\n", "bad.toml:3: experts.drift: expected 0 to 1, found 2"),
    ("[experts]\nbalanced = 1\n", "bad.toml:3: experts.balanced: invalid type"),
    ("[experts]\ninterval_s = 0.0\n", "bad.toml:3: experts.interval_s: expected 1 to"),
    ("[prefix_cache]\nhit_rate = 1.5\n", "bad.toml:3: prefix_cache.hit_rate: expected 0 to 0.999"),
    ("[mtp]\nacceptance = 1.1\n", "bad.toml:3: mtp.acceptance: expected 0 to 1, found 1.1"),
    ("[mtp]\ndrafts = 99\n", "bad.toml:3: mtp.drafts: expected 0 to 16, found 99"),
    (
        "[mtp]\ndrafts = 1\n[model]\nmtp_depth = 0\n",
        "bad.toml:3: mtp.drafts: the model has no prediction module",
    ),
    ("[memory]\npage_tokens = 0\n", "bad.toml:3: memory.page_tokens: expected 1 to 65536, found 0"),
    ("[memory]\nheadroom = 1.0\n", "bad.toml:3: memory.headroom: expected 0 to 0.9, found 1"),
    ("[sla]\nshare = 0.0\n", "bad.toml:3: sla.share: expected 0.01 to 1, found 0"),
    ("[sla]\nttft = 1.0\n", "did you mean `ttft_s`?"),
    (
        "[workload]\nrate_per_s = 1.0\nconcurrency = 3\n",
        "bad.toml:2: workload: expected one of rate_per_s",
    ),
    ("[workload]\nrate_per_s = 0.0\n", "bad.toml:3: workload.rate_per_s: expected"),
    ("[workload]\nconcurrency = 0\n", "bad.toml:3: workload.concurrency: expected 1 to"),
    ("[workload]\ntrace = \"no.csv\"\n", "bad.toml:3: workload.trace"),
    ("[workload]\nprompt = 100\n", "bad.toml:3: workload.prompt: invalid type"),
    ("[workload]\nprompt = { mean = 0.0 }\n", "workload.prompt.mean: expected 1 to"),
    ("[workload]\nprompt = { mean = nan }\n", "workload.prompt.mean: expected a finite number"),
    ("[cluster]\ngpus = 100\n", "bad.toml:3: cluster.gpus: expected at least the 272 of the pools"),
    ("[cluster]\npreset = \"h900\"\n", "bad.toml:3: cluster.preset: unknown name"),
    ("[cluster.network]\nnic_bytes_per_s = 0.0\n", "cluster.network.nic_bytes_per_s: expected"),
    ("seed = = 1\n", "bad.toml:2: TOML:"),
];

fn read(rest: &str) -> Result<ServeScenario, fathom_simulator::SimError> {
    let text = format!("preset = \"deepseek-v3-online-h800\"\n{rest}");
    ServeScenario::from_toml("bad.toml", &text, None, &[])
}

#[test]
fn a_bad_scenario_names_line_and_key() {
    for (rest, part) in SCENARIOS {
        let e = read(rest).map(|s| s.name).unwrap_err().to_string();
        assert!(e.contains(part), "{rest}\n{e}\nexpected {part}");
    }
    let e = ServeScenario::preset("deepseek", &[]).unwrap_err().to_string();
    assert!(e.contains("deepseek-v3-online-h800"), "{e}");
    let e = ServeScenario::from_toml("bad.toml", "", None, &[]).unwrap_err().to_string();
    assert!(e.starts_with("bad.toml") && e.contains("missing field"), "{e}");
    let window = "duration_s = 10\nwarmup_s = 10\n";
    assert!(
        read(window).unwrap_err().to_string().contains("warmup_s: expected less than duration_s")
    );
}

/// Layouts that no unit can have.
#[test]
fn an_impossible_layout_says_why() {
    for (set, part) in [
        ("prefill.tp=3", "prefill.tp: expected a divisor of the 32 gpus, found 3"),
        ("prefill.tp=16", "prefill.tp: expected a divisor of the 128 heads up to the 8 GPUs"),
        ("prefill.gpus=12", "prefill.gpus: expected whole nodes of 8, found 12"),
        ("decode.ep=8", "decode.ep: expected 1 or all 144 gpus of a unit, found 8"),
        (
            "decode.expert_slots=1",
            "decode.expert_slots: expected at least 2 for 256 experts on 144 ranks",
        ),
    ] {
        let s = ServeScenario::preset("deepseek-v3-online-h800", &[set.to_owned()]).unwrap();
        let e =
            serve(&s, &InferenceCode, Constants::FITTED).map(|r| r.name).unwrap_err().to_string();
        assert!(e.contains(part), "{set}: {e}");
    }
}

#[test]
fn a_bad_trace_names_its_line() {
    for (text, part) in [
        ("", "line 1: expected a column timestamp"),
        ("a,b\n", "line 1: expected a column timestamp or arrived_s or arrived_at, found 'a,b'"),
        ("timestamp,prompt\n", "expected a column generatedtokens"),
        ("timestamp,prompt,output\n", "no request"),
        ("timestamp,prompt,output\n1,2\n", "line 2: expected a number of tokens, found ''"),
        (
            "timestamp,prompt,output\nx,2,3\n",
            "line 2: expected seconds or a date and time, found 'x'",
        ),
        ("timestamp,prompt,output\n1,-2,3\n", "line 2: expected a number of tokens, found '-2'"),
        ("timestamp,prompt,output\n1,0,3\n", "line 2: expected 1 to 4000000 tokens, found 0 and 3"),
        ("timestamp,prompt,output\n1e300,1,3\n", "line 2: expected a time"),
        ("timestamp,prompt,output\n2023-99-01 1:1:1,1,3\n", "line 2: expected seconds or a date"),
        ("{\"timestamp\": 1}\n", "line 1: expected {\"timestamp\": ms"),
        (
            "{\"timestamp\": 1, \"input_length\": 1, \"output_length\": 1}\n{\n",
            "line 2: expected {",
        ),
    ] {
        let e = parse("t.csv", text).unwrap_err().to_string();
        assert!(e.starts_with("t.csv: ") && e.contains(part), "{text:?}: {e}");
    }
}

/// Damages a text: cuts, doubles or replaces a piece.
fn damaged(text: &str, at: usize, len: usize, how: u8, with: &str) -> String {
    let chars: Vec<char> = text.chars().collect();
    let at = at % (chars.len() + 1);
    let end = (at + len).min(chars.len());
    let piece: String = match how % 3 {
        0 => String::new(),
        1 => chars[at..end].iter().chain(&chars[at..end]).collect(),
        _ => with.to_owned(),
    };
    chars[..at].iter().copied().chain(piece.chars()).chain(chars[end..].iter().copied()).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn damaged_scenarios_are_prepared_or_refused(
        preset in 0..SERVING.len(), at in 0usize..2000, len in 0usize..40, how in 0u8..3,
        with in "[a-z0-9=.\\[\\]\"\n-]{0,12}",
    ) {
        let text = damaged(SERVING[preset].1, at, len, how, &with);
        match ServeScenario::from_toml("damaged.toml", &text, None, &[]) {
            Ok(s) => if let Err(e) = prepare(&s, &InferenceCode, Constants::FITTED) {
                prop_assert!(e.to_string().starts_with("illegal layout: "), "{e}");
            },
            Err(e) => prop_assert!(e.to_string().starts_with("damaged.toml"), "{e}"),
        }
    }

    #[test]
    fn damaged_traces_are_read_or_refused(
        at in 0usize..200, len in 0usize..20, how in 0u8..3, with in "[a-z0-9,.:\"{}\n-]{0,8}", json in any::<bool>(),
    ) {
        let text = match json {
            true => "{\"timestamp\": 0, \"input_length\": 6758, \"output_length\": 500, \"hash_ids\": [0, 1]}\n{\"timestamp\": 3000, \"input_length\": 7322, \"output_length\": 490, \"hash_ids\": [0, 14]}\n",
            false => "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:17:03.97,4808,10\n2023-11-16 18:17:04.03,3180,8\n",
        };
        if let Err(e) = parse("t", &damaged(text, at, len, how, &with)) {
            prop_assert!(e.to_string().starts_with("t: "), "{e}");
        }
    }
}
