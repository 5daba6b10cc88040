//! The case-file reader takes any bytes without a panic.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let _ = fathom_conformance::case_file::parse(bytes, std::path::Path::new("fuzzed"));
});
