//! Where NVRTC is, NVIDIA's run-time compiler: beside the program's cache or on the system.
//!
//! It is needed to compile kernels, never to run the rest of the program, and is not shipped:
//! [`fetch`] downloads its Python wheel once with pip.

use std::path::{Path, PathBuf};
use std::process::Command;

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

/// Why NVRTC could not be fetched.
#[derive(Debug, thiserror::Error)]
pub enum FetchError {
    /// There is no home or cache folder to put it into.
    #[error("no cache folder: expected XDG_CACHE_HOME or HOME to be set, or FATHOM_CACHE")]
    NoCache,
    /// The file system refused.
    #[error("{}: {source}", path.display())]
    Io {
        /// The folder that could not be made or filled.
        path: PathBuf,
        /// The system's answer.
        source: std::io::Error,
    },
    /// `pip` could not install the package that carries NVRTC.
    #[error("python3 -m pip could not install {PACKAGE}: {message}")]
    Pip {
        /// The last of what it said.
        message: String,
    },
    /// The wheel does not hold what it should.
    #[error("{}: expected libnvrtc and libnvrtc-builtins in the wheel, found none", path.display())]
    Incomplete {
        /// The folder it was unpacked to.
        path: PathBuf,
    },
}

/// The program's cache folder: `FATHOM_CACHE`, else `fathom` in the user's cache folder.
pub fn cache_dir() -> Option<PathBuf> {
    let set = |name| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
    set("FATHOM_CACHE")
        .or_else(|| set("XDG_CACHE_HOME").map(|d| d.join("fathom")))
        .or_else(|| set("HOME").map(|d| d.join(".cache/fathom")))
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

/// Downloads NVRTC's wheel with pip into the cache, unless it is there; says where it is.
///
/// # Errors
/// [`FetchError`]; the cache is then as it was before.
pub fn fetch() -> Result<Nvrtc, FetchError> {
    let cache = cache_dir().ok_or(FetchError::NoCache)?;
    let target = cache.join("nvrtc");
    if let Some(found) = find_below(&target) {
        return Ok(found);
    }
    let io = |path: &Path| {
        let path = path.to_owned();
        move |source| FetchError::Io { path, source }
    };
    std::fs::create_dir_all(&cache).map_err(io(&cache))?;
    let mut builder = tempfile::Builder::new();
    // What the umask leaves of it: others may share the cache.
    #[cfg(unix)]
    builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o777));
    let beside = builder.tempdir_in(&cache).map_err(io(&cache))?;
    let output = Command::new("python3")
        .args(["-m", "pip", "install", "--quiet", "--no-deps", "--disable-pip-version-check"])
        .args(["--only-binary=:all:", "--no-compile", "--target"])
        .arg(beside.path())
        .arg(PACKAGE)
        .output()
        .map_err(|e| FetchError::Pip { message: e.to_string() })?;
    if !output.status.success() {
        let text = String::from_utf8_lossy(&output.stderr);
        let message = text.trim().lines().last().unwrap_or("no message").to_owned();
        return Err(FetchError::Pip { message });
    }
    if find_below(beside.path()).is_none() {
        return Err(FetchError::Incomplete { path: beside.path().to_owned() });
    }
    // Another process may have been first; what it put there is as good.
    let renamed = std::fs::rename(beside.path(), &target);
    match (find_below(&target), renamed) {
        (Some(found), _) => Ok(found),
        (None, Err(source)) => Err(FetchError::Io { path: target, source }),
        (None, Ok(())) => Err(FetchError::Incomplete { path: target }),
    }
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
