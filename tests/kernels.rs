//! docs/kernels.md says of the kernels' machine code, bytes and bank conflicts what `fathom kernels
//! quality` finds; `FATHOM_BLESS=1` rewrites it. Skipped, aloud, where NVRTC or nvdisasm are not to
//! be had.

use std::path::Path;
use std::process::Command;

use fathom_gpu::{nvdisasm, nvrtc};

const BEGIN: &str = "<!-- Quality; `fathom kernels quality`, rewritten with FATHOM_BLESS=1 cargo test -p \
                     fathom --test kernels -->\n\n";
const END: &str = "\n<!-- End of: Quality -->\n";

#[test]
fn the_page_says_what_is_known_of_the_kernels_quality() {
    if nvrtc::find_or_fetch_for_tests().is_none() {
        return;
    }
    if let (None, Err(error)) = (nvdisasm::find(), nvdisasm::fetch()) {
        fathom_trace::shared::skipped(&format!("loops of kernels are not counted: {error}"));
        return;
    }
    let output =
        Command::new(env!("CARGO_BIN_EXE_fathom")).args(["kernels", "quality"]).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");
    let found = String::from_utf8(output.stdout).unwrap();
    let found = format!("{}\n", found.trim_end());
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/kernels.md");
    let page = std::fs::read_to_string(&path).unwrap();
    let (before, rest) = page.split_once(BEGIN).expect("the block's first line");
    let (written, after) = rest.split_once(END).expect("the block's last line");
    if std::env::var_os("FATHOM_BLESS").is_some() {
        std::fs::write(&path, format!("{before}{BEGIN}{found}{END}{after}")).unwrap();
        return;
    }
    let version = |text: &str| text.lines().next().map(str::to_owned);
    if version(written) != version(&found) {
        let versions = [written, &found].map(version);
        fathom_trace::shared::skipped(&format!("the page is of another NVRTC: {versions:?}"));
        return;
    }
    for (expected, found) in written.lines().zip(found.lines()) {
        assert_eq!(expected, found, "docs/kernels.md; FATHOM_BLESS=1 rewrites it");
    }
    assert_eq!(written.lines().count(), found.lines().count(), "{found}");
}
