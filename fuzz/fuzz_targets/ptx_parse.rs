//! No text makes the PTX parser panic or hang, and what it accepts it prints and reads again.
#![no_main]

use fathom_ptx::{Options, parse_with};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: (bool, &str)| {
    let (keep_unknown, text) = data;
    let options = Options { keep_unknown };
    if let Ok(module) = parse_with(text, options) {
        let printed = module.to_string();
        let again = parse_with(&printed, options).expect("printed text parses");
        assert!(module.without_positions() == again.without_positions(), "{printed}");
    }
});
