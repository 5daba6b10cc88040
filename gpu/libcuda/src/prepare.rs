//! The folder in which the library is called libcuda, and running a command with it in front.
//!
//! The library is not called libcuda in the target folder, where a loader would find it by
//! accident:
//! [`prepare`] copies it into a private folder that [`Prepared::command`] puts in front of the
//! loader's path. Choices travel in the environment, the summary comes back in a file.

use std::convert::Infallible;
use std::ffi::OsStr;
use std::io;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus};
use std::sync::OnceLock;

use crate::choices::{Choices, PREFIX};
use crate::summary::Summary;

/// How the library file is called where it is built.
const LIBRARY: &str = "libfathom_libcuda.so";

/// Why the private folder could not be made.
#[derive(Debug, thiserror::Error)]
pub enum PrepareError {
    /// The library was not built, or was moved.
    #[error("{LIBRARY}: expected beside the program or in deps/ below it ({}), found none; build it \
             with `cargo build --release -p fathom-libcuda`, or set FATHOM_LIBCUDA to its path",
            folder.display())]
    NoLibrary {
        /// The program's folder.
        folder: PathBuf,
    },
    /// FATHOM_LIBCUDA names no file.
    #[error("FATHOM_LIBCUDA={}: expected the emulated driver's library, found no such file",
            path.display())]
    NotThere {
        /// What it names.
        path: PathBuf,
    },
    /// The file system refused.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
}

/// A private folder with the library under the driver's names; removed when dropped.
pub struct Prepared {
    folder: PathBuf,
    choices: Choices,
}

impl Drop for Prepared {
    fn drop(&mut self) {
        // A folder that cannot be removed is the system's to clean up.
        let _ = std::fs::remove_dir_all(&self.folder);
    }
}

static EMBEDDED: OnceLock<&'static [u8]> = OnceLock::new();

/// Tells of the library that the running program holds in itself; [`prepare`] then needs no file.
pub fn embed(library: &'static [u8]) {
    // Told twice, it is the same library.
    let _ = EMBEDDED.set(library);
}

/// Where the library comes from.
enum Library {
    File(PathBuf),
    Bytes(&'static [u8]),
}

/// The file that FATHOM_LIBCUDA names, else what the program holds in itself, else the newest one
/// beside it.
fn library(program: &Path) -> Result<Library, PrepareError> {
    if let Some(path) = std::env::var_os("FATHOM_LIBCUDA").map(PathBuf::from) {
        return if path.is_file() {
            Ok(Library::File(path))
        } else {
            Err(PrepareError::NotThere { path })
        };
    }
    if let Some(bytes) = EMBEDDED.get() {
        return Ok(Library::Bytes(bytes));
    }
    let beside = program.parent().unwrap_or(Path::new(".")).to_owned();
    // Test programs stand in deps/ themselves.
    let places = [beside.join(LIBRARY), beside.join("deps").join(LIBRARY)];
    let newest = |p: &PathBuf| std::fs::metadata(p).and_then(|m| m.modified()).ok();
    let found = places.into_iter().filter(|p| p.is_file()).max_by_key(newest);
    found.map(Library::File).ok_or(PrepareError::NoLibrary { folder: beside })
}

/// Makes the private folder, from the library that belongs to the running program.
///
/// # Errors
/// [`PrepareError`].
pub fn prepare(choices: Choices) -> Result<Prepared, PrepareError> {
    let io = |path: &Path| {
        let path = path.to_owned();
        move |source| PrepareError::Io { path, source }
    };
    let program = std::env::current_exe().map_err(io(Path::new("the running program")))?;
    let library = library(&program)?;
    let name = format!("fathom-emulate-{}", std::process::id());
    let folder = std::env::temp_dir().join(name);
    let _ = std::fs::remove_dir_all(&folder);
    let summary = folder.join("summary");
    std::fs::create_dir_all(&summary).map_err(io(&summary))?;
    let prepared =
        Prepared { folder: folder.clone(), choices: Choices { summary: Some(summary), ..choices } };
    let target = folder.join("libcuda.so.1");
    match library {
        Library::File(path) => std::fs::copy(&path, &target).map(|_| ()).map_err(io(&path))?,
        Library::Bytes(bytes) => std::fs::write(&target, bytes).map_err(io(&target))?,
    }
    #[cfg(unix)]
    {
        let link = |target: &Path, name: &str| {
            let path = folder.join(name);
            std::os::unix::fs::symlink(target, &path).map_err(io(&path))
        };
        link(Path::new("libcuda.so.1"), "libcuda.so")?;
        // The same library, which a loader that knows it by its file takes but once.
        link(Path::new("libcuda.so.1"), "libnvidia-ml.so.1")?;
        // Called under this name, the program packs PTX as Triton's assembler would machine code.
        link(&program, "ptxas")?;
    }
    Ok(prepared)
}

impl Prepared {
    /// A command with the emulated driver in front.
    pub fn command(&self, program: &OsStr) -> Command {
        let mut command = Command::new(program);
        let mut path = self.folder.clone().into_os_string();
        if let Some(old) = std::env::var_os("LD_LIBRARY_PATH").filter(|p| !p.is_empty()) {
            path.push(":");
            path.push(old);
        }
        command.env("LD_LIBRARY_PATH", path);
        // Before all others, so that it can stand in for what gives out machine code (`standins`).
        let mut preload = self.folder.join("libcuda.so.1").into_os_string();
        if let Some(old) = std::env::var_os("LD_PRELOAD").filter(|p| !p.is_empty()) {
            preload.push(":");
            preload.push(old);
        }
        command.env("LD_PRELOAD", preload);
        command.env("TRITON_PTXAS_PATH", self.folder.join("ptxas"));
        // Triton 3.9 asks for this one from sm_90 on.
        command.env("TRITON_PTXAS_BLACKWELL_PATH", self.folder.join("ptxas"));
        command.env("TRITON_LIBCUDA_PATH", &self.folder);
        // NVIDIA's switch: libraries that choose between machine code and PTX take PTX.
        command.env("CUDA_FORCE_PTX_JIT", "1");
        command.env("NUMBA_CUDA_DRIVER", self.folder.join("libcuda.so.1"));
        command.envs(self.choices.variables());
        command
    }

    /// What all processes of the command did together.
    ///
    /// # Errors
    /// [`PrepareError::Io`].
    pub fn summary(&self) -> Result<Summary, PrepareError> {
        let folder = self.choices.summary.as_ref().expect("set when prepared");
        let io = |source| PrepareError::Io { path: folder.clone(), source };
        let mut total = Summary::default();
        let mut files: Vec<_> =
            std::fs::read_dir(folder).map_err(io)?.flatten().map(|e| e.path()).collect();
        files.sort();
        for file in files.iter().filter(|f| f.extension().is_some_and(|e| e == "json")) {
            let text = std::fs::read_to_string(file).map_err(io)?;
            // A process that was killed between two launches leaves its last whole summary.
            if let Ok(one) = serde_json::from_str::<Summary>(&text) {
                total.merge(one);
            }
        }
        Ok(total)
    }
}

/// Whether this process was started by [`Prepared::command`] or [`run_in_place`].
pub fn is_prepared() -> bool {
    ["SUMMARY", "FOLDER"].iter().any(|name| std::env::var_os(format!("{PREFIX}{name}")).is_some())
}

/// Runs the program that is running anew on the emulated driver, in the same process: signals
/// reach it, its exit code is its own, and where it is killed nobody is left behind. There is no
/// summary. The process that takes over calls [`loaded`].
///
/// # Errors
/// [`PrepareError`]; where there is none it does not return.
pub fn run_in_place(choices: Choices) -> Result<Infallible, PrepareError> {
    let mut prepared = prepare(choices)?;
    prepared.choices.summary = None;
    let io = |source| PrepareError::Io { path: "the running program".into(), source };
    let program = std::env::current_exe().map_err(io)?;
    let mut command = prepared.command(program.as_os_str());
    command.env(format!("{PREFIX}FOLDER"), &prepared.folder);
    Err(io(command.args(std::env::args_os().skip(1)).exec()))
}

/// For the process that [`run_in_place`] made, once it has loaded the driver: removes the folder,
/// of which a loaded library needs nothing, so that no end of the process can leave it behind.
pub fn loaded() {
    if let Some(folder) = std::env::var_os(format!("{PREFIX}FOLDER")) {
        // A folder that cannot be removed is the system's to clean up.
        let _ = std::fs::remove_dir_all(folder);
    }
}

/// Runs the program that is running once more, with the same arguments, on the emulated driver.
///
/// # Errors
/// [`PrepareError`].
pub fn run_again(choices: Choices) -> Result<(ExitStatus, Summary), PrepareError> {
    let prepared = prepare(choices)?;
    let io = |source| PrepareError::Io { path: "the running program".into(), source };
    let program = std::env::current_exe().map_err(io)?;
    let mut command = prepared.command(program.as_os_str());
    let status = command.args(std::env::args_os().skip(1)).status().map_err(io)?;
    Ok((status, prepared.summary()?))
}

/// What this process has done on the emulated driver, up to its last call of `cuProfilerStop` or a
/// little later; nothing where it was not started by [`Prepared::command`]. Findings are there at
/// once.
///
/// # Errors
/// [`PrepareError::Io`].
pub fn so_far() -> Result<Summary, PrepareError> {
    let Some(folder) = Choices::from_environment().summary else { return Ok(Summary::default()) };
    let path = folder.join(format!("{}.json", std::process::id()));
    match std::fs::read(&path) {
        Ok(text) => Ok(serde_json::from_slice(&text).expect("it was written by this process")),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Summary::default()),
        Err(source) => Err(PrepareError::Io { path, source }),
    }
}
