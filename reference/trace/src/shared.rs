//! Where tests find the shared test data, which is not part of the repository.

use std::io::Write;
use std::path::{Path, PathBuf};

/// The folder of shared test data: `$FATHOM_SHARED`, else `shared` beside the workspace root.
///
/// Where neither exists this says so on stderr and returns `None`; a test then runs on the small
/// cases of the project's own alone.
///
/// # Panics
/// Where `FATHOM_SHARED` is set but is no folder: a misspelt path must not skip tests silently.
pub fn dir() -> Option<PathBuf> {
    if let Some(path) = std::env::var_os("FATHOM_SHARED").map(PathBuf::from) {
        assert!(path.is_dir(), "FATHOM_SHARED={} is not a folder", path.display());
        return Some(path);
    }
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared");
    if root.is_dir() {
        return Some(root);
    }
    // Written past `eprintln!`, which the test harness would keep to itself.
    let said = b"SKIPPED: the shared test data is absent (set FATHOM_SHARED to its folder)\n";
    let _ = std::io::stderr().write_all(said);
    None
}
