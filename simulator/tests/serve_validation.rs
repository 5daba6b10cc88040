//! What docs/serving.md prints of published figures is what the simulator says.

#[path = "../../conformance/src/inference.rs"]
mod model_code;

use std::path::Path;

use fathom_simulator::kernel_time::Constants;
use fathom_simulator::serve::run::REACHED;
use fathom_simulator::validate::{Role, Validation, serving};
use model_code::InferenceCode;

const BEGIN: &str = "<!-- begin: serving figures -->\n";
const END: &str = "<!-- end -->\n";

/// Every goal is met, and the share that is printed with every run is that of these rows.
#[test]
fn every_goal_is_met_within_the_printed_share() {
    let rows = serving(&InferenceCode, Constants::FITTED).unwrap();
    let tested: Vec<_> = rows.iter().filter(|r| r.role == Role::Tested).collect();
    assert_eq!(tested.len(), 12);
    let shares = tested.iter().map(|r| {
        assert!(r.met, "{r:?}");
        r.published / r.predicted
    });
    let (least, most) = shares.fold((1.0f64, 0.0f64), |(a, b), s| (a.min(s), b.max(s)));
    let hundredth = |x: f64| (x * 100.0).round() / 100.0;
    assert_eq!([hundredth(least), hundredth(most)], REACHED);
}

/// `FATHOM_BLESS=1` writes the block anew.
#[test]
fn the_documentation_is_what_validate_prints() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/serving.md");
    let ours = Validation::of(serving(&InferenceCode, Constants::FITTED).unwrap()).tables();
    println!("{ours}");
    let text = std::fs::read_to_string(&path).unwrap();
    let (before, rest) = text.split_once(BEGIN).expect("the block's first line");
    let (block, after) = rest.split_once(END).expect("the block's last line");
    if std::env::var_os("FATHOM_BLESS").is_some() {
        std::fs::write(&path, format!("{before}{BEGIN}{ours}{END}{after}")).unwrap();
        return;
    }
    assert!(block == ours, "docs/serving.md is out of date: run the test with FATHOM_BLESS=1");
}
