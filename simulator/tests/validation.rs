//! The validation's goals, and that the pages print what the simulator says.

#[path = "../../conformance/src/model_code.rs"]
mod model_code;

use std::path::Path;

use fathom_simulator::first_principles::FirstPrinciples;
use fathom_simulator::kineto::KinetoTrace;
use fathom_simulator::validate::{Role, validate};
use model_code::ModelCode;

const END: &str = "<!-- end -->\n";

#[test]
fn every_goal_is_met() {
    let v = validate(&FirstPrinciples::new(ModelCode)).unwrap();
    for row in &v.rows {
        assert!(row.met, "{row:?}");
    }
    let find = |figure: &str| v.rows.iter().find(|r| r.figure == figure).unwrap();
    assert!(find("time a step").met && find("span").met && find("mean absolute error").met);
    assert_eq!(find("time a step").role, Role::Tested);
    assert_eq!((v.goals, v.met), (52, 52));
}

/// Compares the block of a page between `begin` and [`END`] with `ours`; `FATHOM_BLESS=1` writes it
/// anew.
fn check_block(page: &str, begin: &str, ours: &str) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs").join(page);
    let text = std::fs::read_to_string(&path).unwrap();
    let (before, rest) = text.split_once(begin).expect("the block's first line");
    let (block, after) = rest.split_once(END).expect("the block's last line");
    if std::env::var_os("FATHOM_BLESS").is_some() {
        std::fs::write(&path, format!("{before}{begin}{ours}{END}{after}")).unwrap();
        return;
    }
    assert!(block == ours, "docs/{page} is out of date: run the test with FATHOM_BLESS=1");
}

/// All figures in docs/validation.md; the errors by software in docs/simulator.md too.
#[test]
fn the_documentation_is_what_validate_prints() {
    let v = validate(&FirstPrinciples::new(ModelCode)).unwrap();
    check_block(
        "validation.md",
        "<!-- begin: fathom simulate validate --markdown -->\n",
        &v.markdown(),
    );
    let mut table = "| software and kind of model | error | of |\n|---|---:|---|\n".to_string();
    for row in v.rows.iter().filter(|r| r.section == "Never fitted") {
        let software = row.figure.strip_suffix(": mean absolute error in time").unwrap();
        table += &format!("| {software} | {:.1} % | {} |\n", row.predicted, row.note);
    }
    check_block("simulator.md", "<!-- begin: never fitted -->\n", &table);
}

/// `FATHOM_BLESS=1` writes the table anew; intervals are made from it.
#[test]
fn the_validated_runs_are_what_validate_gives() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("presets/published/validated.csv");
    let ours = validate(&FirstPrinciples::new(ModelCode)).unwrap().runs_csv();
    if std::env::var_os("FATHOM_BLESS").is_some() {
        std::fs::write(&path, ours).unwrap();
        return;
    }
    let text = std::fs::read_to_string(&path).unwrap();
    assert!(text == ours, "validated.csv is out of date: run the test with FATHOM_BLESS=1");
}

/// The phases that are validated against are the trace's own, where it is at hand.
#[test]
fn the_validated_phases_are_those_of_the_profile() {
    let profile = "traces/deepseek-v3-h800-dualpipe-chunk.json.gz";
    let Some(trace) = fathom_trace::shared::need(profile) else { return };
    let summary = KinetoTrace::read(&trace).unwrap().summary();
    let v = validate(&FirstPrinciples::new(ModelCode)).unwrap();
    for phase in summary.phases.iter().filter(|p| p.name.contains('(')) {
        let row = v.rows.iter().find(|r| r.figure == phase.name).unwrap();
        assert!((row.published - phase.mean_s * 1e3).abs() < 1e-3, "{row:?}");
    }
    // GEMMs of the other half by their place in the trace.
    for (figure, phase, place) in [
        ("kv_down fwd 4096x576x7168", "attn(F)", 1),
        ("kv_up fwd 4096x32768x512", "attn(F)", 3),
        ("shared_w2 dgrad 4096x2048x7168", "mlp(B)", 0),
        ("shared_w13 fwd 4096x4096x7168", "mlp(F)", 0),
        ("shared_w2 wgrad 7168x2048x4096", "mlp(W)", 0),
        ("kv_up wgrad 32768x512x4096", "attn(W)", 1),
        ("kv_down wgrad 576x7168x4096", "attn(W)", 3),
    ] {
        let gemm = summary.gemms.iter().find(|g| g.phase == phase && g.place == place).unwrap();
        let row = v.rows.iter().find(|r| r.figure == figure).unwrap();
        assert!((row.published - gemm.mean_us).abs() < 0.01, "{row:?} {gemm:?}");
    }
}
