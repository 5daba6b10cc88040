//! GPUs for a load: what a plan promises, a run of the planned pools keeps; fronts are fronts.

#[path = "../../conformance/src/inference.rs"]
mod model_code;

use fathom_simulator::kernel_time::Constants;
use fathom_simulator::serve::config::ServeScenario;
use fathom_simulator::serve::page::page;
use fathom_simulator::serve::plan::{plan, search};
use fathom_simulator::serve::run::serve;
use model_code::InferenceCode;

fn scenario(preset: &str, set: &[&str]) -> ServeScenario {
    let set: Vec<String> = set.iter().map(|s| s.to_string()).collect();
    ServeScenario::preset(preset, &set).unwrap_or_else(|e| panic!("{e}"))
}

/// With the units of the plan the load is served within the level; with a unit of each pool less it
/// is not.
#[test]
fn the_planned_units_are_enough_and_needed() {
    let unified = scenario("llama-3.1-70b-unified-h100-8", &["duration_s=40", "sla.tpot_s=0.03"]);
    let made = plan(&unified, 200.0, &InferenceCode, Constants::FITTED).unwrap();
    let run = |units: u64| {
        let mut s = unified.clone();
        s.unified.as_mut().unwrap().units = units;
        s.workload.rate_per_s = Some(200.0);
        let r = serve(&s, &InferenceCode, Constants::FITTED).unwrap();
        let carried = r.requests_per_s[1] / r.requests_per_s[0];
        (r.within_sla.unwrap(), carried)
    };
    let units = made.pools[0].units;
    assert_eq!(made.gpus, 8 * units);
    let (within, carried) = run(units);
    // Answers that begin before the window and end behind it: a few in a hundred.
    assert!(within >= unified.sla.share - 0.02 && carried > 0.93, "{units}: {within} {carried}");
    let (within, _) = run(units * 3 / 4);
    assert!(within < unified.sla.share, "{units} is more than is needed: {within}");
}

/// The service of DeepSeek: requests by its published tokens, 20 tokens/s a user as published; its
/// 226.75 nodes on average within a tenth.
#[test]
fn the_published_service_needs_about_its_nodes() {
    let s = scenario("deepseek-v3-online-h800", &["duration_s=40", "warmup_s=10"]);
    let requests_per_s = 608e9 / 4405.0 / 86400.0;
    let made = plan(&s, requests_per_s, &InferenceCode, Constants::FITTED).unwrap();
    let nodes = made.gpus as f64 / 8.0;
    assert!((nodes / 226.75 - 1.0).abs() < 0.1, "{nodes}: {made:?}");
    assert_eq!(made.pools.iter().map(|p| p.role).collect::<Vec<_>>(), ["prefill", "decode"]);
    assert!(made.pools[1].tpot_s <= s.sla.tpot_s && made.pools[0].ttft_s <= s.sla.ttft_s);
}

#[test]
fn a_front_gets_faster_as_it_gets_dearer() {
    let set = [
        "search.decode_gpus=[8,16]",
        "search.tp=[1,2,4,8]",
        "search.max_batch=[16,64]",
        "duration_s=20",
        "warmup_s=5",
    ];
    let s = scenario("llama-3.1-70b-unified-h100-8", &set);
    let found = search(&s, 100.0, &InferenceCode, Constants::FITTED).unwrap();
    assert_eq!(found.tried, 16);
    // Below tp 2 the weights do not fit.
    assert!(found.refused >= 4, "{}", found.refused);
    for pair in found.front.windows(2) {
        assert!(pair[0].plan.gpus < pair[1].plan.gpus, "{pair:?}");
        assert!(pair[0].tokens_per_s_per_user < pair[1].tokens_per_s_per_user, "{pair:?}");
    }
    let alone = scenario("llama-3.1-70b-unified-h100-8", &["sla.ttft_s=0.001"]);
    let e = plan(&alone, 1.0, &InferenceCode, Constants::FITTED).unwrap_err().to_string();
    assert!(e.contains("unified: no load keeps the service level (ttft_s 0.001"), "{e}");
}

#[test]
fn the_page_holds_its_data_and_refers_to_nothing_outside() {
    let s = scenario("llama-3.1-70b-unified-h100-8", &["name=\"</script><b>\"", "duration_s=20"]);
    let report = serve(&s, &InferenceCode, Constants::FITTED).unwrap();
    let made = plan(&s, 50.0, &InferenceCode, Constants::FITTED).unwrap();
    let page = page(&s, &report, Some(&made));
    for outside in ["http://", "https://", "src=", "@import", "url("] {
        assert!(!page.contains(outside), "the page refers to {outside}");
    }
    let (_, rest) = page.split_once("const D = ").unwrap();
    let (json, _) = rest.split_once(";\nconst $").unwrap();
    let data: serde_json::Value = serde_json::from_str(json).unwrap();
    assert_eq!(data["report"]["name"], "</script><b>");
    assert_eq!(data["plan"]["pools"][0]["role"], "unified");
    assert!(data["curves"][0].as_array().unwrap().len() > 100 && !json.contains("</"));
}
