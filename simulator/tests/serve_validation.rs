//! What docs/serving.md prints of published figures is what the simulator says.

#[path = "../../conformance/src/inference.rs"]
mod model_code;

use std::path::Path;

use fathom_simulator::kernel_time::Constants;
use fathom_simulator::validate::{Validation, serving};
use model_code::InferenceCode;

const BEGIN: &str = "<!-- begin: serving figures -->\n";
const END: &str = "<!-- end -->\n";

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
