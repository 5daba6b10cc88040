//! `cuGetProcAddress` against NVIDIA's own headers: every name in every version that
//! `cudaTypedefs.h` declares, and the symbol that `cuda.h` defines it to be.
//!
//! The headers are those of a toolkit beside the build (tests/emulate.rs fetches one) or of
//! `FATHOM_CUDA_INCLUDE`.

mod client;

use std::collections::BTreeMap;
use std::ffi::c_void;
use std::path::{Path, PathBuf};

use client::{library, search};

/// The newest version that the driver knows.
const NEWEST: i32 = 13050;

fn headers() -> Option<PathBuf> {
    if let Some(folder) = std::env::var_os("FATHOM_CUDA_INCLUDE").map(PathBuf::from) {
        assert!(folder.join("cuda.h").is_file(), "{}: no cuda.h", folder.display());
        return Some(folder);
    }
    let toolkit = Path::new(env!("CARGO_TARGET_TMPDIR")).join("cuda-toolkit/lib");
    let pythons = std::fs::read_dir(toolkit).ok()?.flatten();
    let mut places = pythons.map(|p| p.path().join("site-packages/nvidia/cu13/include"));
    places.find(|folder| folder.join("cuda.h").is_file())
}

/// The address of an exported symbol.
fn exported(symbol: &str) -> *const c_void {
    let name = format!("{symbol}\0");
    // SAFETY: the address alone is looked at.
    let found = unsafe { library().get::<unsafe extern "C" fn()>(name.as_bytes()) };
    found.map_or(std::ptr::null(), |function| *function as *const c_void)
}

/// Names and versions of the function types that a header declares: `PFN_NAME_vVERSION`, without
/// those of per-thread default streams.
fn declared(text: &str) -> BTreeMap<&str, Vec<i32>> {
    let mut found: BTreeMap<&str, Vec<i32>> = BTreeMap::new();
    for rest in text.split("*PFN_").skip(1) {
        let word = &rest[..rest.find(')').unwrap_or(0)];
        if let Some((name, version)) = word.rsplit_once("_v")
            && let Ok(version) = version.parse()
        {
            found.entry(name).or_default().push(version);
        }
    }
    found
}

#[test]
fn names_have_the_versions_of_nvidia_s_headers() {
    let Some(folder) = headers() else {
        return fathom_trace::shared::skipped(
            "no cuda.h: run `cargo test --test emulate` where pip can fetch a toolkit, or set \
             FATHOM_CUDA_INCLUDE",
        );
    };
    let read = |name: &str| std::fs::read_to_string(folder.join(name)).unwrap();
    let (typedefs, header) = (read("cudaTypedefs.h"), read("cuda.h"));
    let declared = declared(&typedefs);
    assert!(declared.len() > 400, "{} names", declared.len());
    for (name, versions) in &declared {
        let mut versions = versions.clone();
        versions.sort_unstable();
        for version in &versions {
            let (found, status) = search(name, *version);
            assert!(status == 0 && !found.is_null(), "{name} in {version}: status {status}");
        }
        // Before the first version there is nothing.
        assert_eq!(search(name, versions[0] - 1), (std::ptr::null(), 2), "{name}");
    }
    // A definition gives the symbol of the newest version; `__CUDA_API_PTSZ(x)` is `x` by default.
    let mut defined = 0;
    for line in header.lines().filter_map(|l| l.trim().strip_prefix("#define cu")) {
        let mut words = line.split_whitespace();
        let (Some(name), Some(symbol), None) = (words.next(), words.next(), words.next()) else {
            continue;
        };
        let symbol = symbol.rsplit('(').next().unwrap().trim_end_matches(')');
        let name = format!("cu{name}");
        // Later sections of the header take the names back to their oldest versions.
        if !declared.contains_key(&*name) || symbol == name || symbol.ends_with("_ptds") {
            continue;
        }
        // Most are the newest version; a few that later headers will take are ahead of it.
        let versions = declared[&*name].iter().chain([&NEWEST]);
        let mut found = versions.map(|version| search(&name, *version).0);
        if found.any(|address| address == exported(symbol)) {
            defined += 1;
        } else {
            assert!(symbol.ends_with("_ptsz"), "{name} is never {symbol}");
        }
    }
    assert!(defined > 60, "{defined} definitions");
}
