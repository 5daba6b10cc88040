//! Where NVRTC is, NVIDIA's run-time compiler: beside the program's cache or on the system.
//!
//! It is needed to compile kernels, never to run the rest of the program, and is not shipped:
//! [`fetch`] downloads its Python wheel once with pip.

use std::path::{Path, PathBuf};

use crate::wheel::Wheel;
pub use crate::wheel::{FetchError, cache_dir};

/// The PyPI package that carries NVRTC, and the version that is fetched.
pub const PACKAGE: &str = "nvidia-cuda-nvrtc==13.0.*";

/// The two libraries of one NVRTC.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Nvrtc {
    /// `libnvrtc-builtins`, to be loaded first by its absolute path.
    pub builtins: PathBuf,
    /// `libnvrtc` itself.
    pub library: PathBuf,
}

/// Finds NVRTC: in the folder `FATHOM_NVRTC`, in the cache, in the usual CUDA folders; `None` where
/// it is in none of them.
pub fn find() -> Option<Nvrtc> {
    let named = std::env::var_os("FATHOM_NVRTC").map(PathBuf::from);
    let cached = cache_dir().map(|d| d.join("nvrtc"));
    let system =
        ["/usr/local/cuda/lib64", "/usr/lib/x86_64-linux-gnu", "/usr/lib/aarch64-linux-gnu"];
    let folders = named.into_iter().chain(cached).chain(system.map(PathBuf::from));
    folders.filter_map(|folder| find_below(&folder)).next()
}

/// Finds NVRTC in a folder or the folders of a wheel below it.
fn find_below(folder: &Path) -> Option<Nvrtc> {
    let mut folders = vec![(folder.to_owned(), 0)];
    while let Some((folder, depth)) = folders.pop() {
        let Ok(entries) = std::fs::read_dir(&folder) else { continue };
        let mut paths: Vec<PathBuf> = entries.flatten().map(|e| e.path()).collect();
        paths.sort();
        let named = |prefix: &str| {
            let starts = |p: &&PathBuf| {
                p.file_name().is_some_and(|n| n.to_string_lossy().starts_with(prefix))
            };
            // The wheel also carries an `.alt` build; the plain one sorts last of the versions.
            paths.iter().filter(starts).rfind(|p| !p.to_string_lossy().contains(".alt.")).cloned()
        };
        if let (Some(builtins), Some(library)) =
            (named("libnvrtc-builtins.so"), named("libnvrtc.so"))
        {
            return Some(Nvrtc { builtins, library });
        }
        // A wheel unpacks to nvidia/<package>/lib.
        if depth < 3 {
            folders.extend(paths.into_iter().filter(|p| p.is_dir()).map(|p| (p, depth + 1)));
        }
    }
    None
}

/// The wheel that carries NVRTC's two libraries.
const WHEEL: Wheel<Nvrtc> = Wheel {
    package: PACKAGE,
    folder: "nvrtc",
    expected: "libnvrtc and libnvrtc-builtins",
    find_below,
};

/// Downloads NVRTC's wheel with pip into the cache, unless it is there; says where it is.
///
/// # Errors
/// [`FetchError`]; the cache is then as it was before.
pub fn fetch() -> Result<Nvrtc, FetchError> {
    WHEEL.fetch()
}

/// For tests: NVRTC where it is, else fetched; where that fails, says loudly what is skipped.
pub fn find_or_fetch_for_tests() -> Option<Nvrtc> {
    if let Some(found) = find() {
        return Some(found);
    }
    match fetch() {
        Ok(found) => Some(found),
        Err(error) => {
            let why = format!("CUDA kernels are not compiled: {error} (or set FATHOM_NVRTC)");
            fathom_trace::shared::skipped(&why);
            None
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wheel_s_folder_is_searched_and_half_a_wheel_refused() {
        let root = tempfile::tempdir().unwrap();
        let lib = root.path().join("nvidia/cu13/lib");
        std::fs::create_dir_all(&lib).unwrap();
        let touch = |name: &str| std::fs::write(lib.join(name), b"").unwrap();
        touch("libnvrtc.so.13");
        assert_eq!(find_below(root.path()), None);
        touch("libnvrtc-builtins.so.13.0");
        touch("libnvrtc.alt.so.13");
        touch("libnvrtc-builtins.alt.so.13.0");
        let found = find_below(root.path()).unwrap();
        assert_eq!(found.library, lib.join("libnvrtc.so.13"));
        assert_eq!(found.builtins, lib.join("libnvrtc-builtins.so.13.0"));
    }
}
