//! Where tests find the shared test data, which is not part of the repository, and how a test says
//! that it is skipped.
//!
//! What is said goes past the test harness, which keeps the output of passing tests to itself:
//! `SKIPPED:` where a test did nothing, `PARTLY:` where it ran on the project's own small cases
//! alone. `.ci/run` counts both.

use std::io::Write;
use std::path::{Path, PathBuf};

const HOW: &str = "the shared test data is absent: set FATHOM_SHARED to its folder";

/// Says that a test is skipped, why, and what would let it run.
pub fn skipped(why: &str) {
    say(&format!("SKIPPED: {why}\n"));
}

fn say(text: &str) {
    let _ = std::io::stderr().write_all(text.as_bytes());
}

fn find() -> Option<PathBuf> {
    if let Some(path) = std::env::var_os("FATHOM_SHARED").map(PathBuf::from) {
        assert!(path.is_dir(), "FATHOM_SHARED={} is not a folder", path.display());
        return Some(path);
    }
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared");
    root.is_dir().then_some(root)
}

/// The folder of shared test data, `$FATHOM_SHARED`, else `shared` beside the workspace root, for a
/// test that also has cases of its own. Without the folder it says that these run alone.
///
/// # Panics
/// Where `FATHOM_SHARED` is set but is no folder: a misspelt path must not skip tests silently.
pub fn dir() -> Option<PathBuf> {
    let found = find();
    if found.is_none() {
        say(&format!("PARTLY: the project's own small cases only ({HOW})\n"));
    }
    found
}

/// A file or folder of the shared test data, for a test that has nothing else to run on: without it
/// the test is skipped, and says so.
///
/// # Panics
/// As [`dir`], and where the folder is there but lacks `path`.
pub fn need(path: &str) -> Option<PathBuf> {
    let Some(found) = find() else {
        skipped(&format!("{path} ({HOW})"));
        return None;
    };
    let found = found.join(path);
    assert!(found.exists(), "{}: expected shared test data, found none", found.display());
    Some(found)
}
