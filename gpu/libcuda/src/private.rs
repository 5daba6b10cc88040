//! The folder in which the library is called libcuda, and running a command with it in front.
//!
//! The library is not called libcuda in the target folder, where a loader would find it by
//! accident:
//! [`prepare`] copies it into a private folder that [`Prepared::command`] puts in front of the
//! loader's path. Choices travel in the environment, the summary comes back in a file.

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus};
use std::sync::OnceLock;

use fathom_emulator::{Finding, KernelRecord};
use serde::{Deserialize, Serialize};

/// How the library file is called where it is built.
const LIBRARY: &str = "libfathom_libcuda.so";

/// What a user can choose about an emulated run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Choices {
    /// Device preset.
    pub gpu: String,
    /// Devices of that kind.
    pub devices: usize,
    /// Sanitizers, as `fathom_emulator::Checks::parse` reads them.
    pub check: String,
    /// Folder for kernel traces.
    pub trace: Option<PathBuf>,
    /// Whether kernel records count transactions and bank conflicts.
    pub profile: bool,
    /// Permutes the order of warps and CTAs.
    pub schedule_seed: u64,
    /// What follows a finding that stops a kernel.
    pub on_finding: OnFinding,
    /// Folder in which every process leaves its summary.
    pub summary: Option<PathBuf>,
}

/// What follows a finding that stops a kernel, such as an access out of bounds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OnFinding {
    /// It is reported, and the program goes on as if the kernel had ended there.
    Report,
    /// As on hardware: the context is lost, and every later call says so.
    #[default]
    Context,
    /// The process is aborted.
    Abort,
}

impl OnFinding {
    /// Every choice with the word for it.
    pub const ALL: [(&str, OnFinding); 3] = [
        ("report", OnFinding::Report),
        ("context", OnFinding::Context),
        ("abort", OnFinding::Abort),
    ];

    /// The choice that a word stands for.
    pub fn named(word: &str) -> Option<OnFinding> {
        Self::ALL.iter().find(|(name, _)| *name == word).map(|(_, choice)| *choice)
    }

    fn name(self) -> &'static str {
        Self::ALL.iter().find(|(_, choice)| *choice == self).expect("all are listed").0
    }
}

impl Default for Choices {
    fn default() -> Self {
        Choices {
            gpu: "h800".to_owned(),
            devices: 1,
            check: String::new(),
            trace: None,
            profile: false,
            schedule_seed: 0,
            on_finding: OnFinding::default(),
            summary: None,
        }
    }
}

const PREFIX: &str = "FATHOM_EMULATE_";

impl Choices {
    /// The choices that the environment carries; what is absent or unreadable is the default.
    pub fn from_environment() -> Choices {
        let text = |name: &str| std::env::var(format!("{PREFIX}{name}")).ok();
        let path = |name: &str| std::env::var_os(format!("{PREFIX}{name}")).map(PathBuf::from);
        let default = Choices::default();
        Choices {
            gpu: text("GPU").unwrap_or(default.gpu),
            devices: text("DEVICES").and_then(|t| t.parse().ok()).unwrap_or(default.devices),
            check: text("CHECK").unwrap_or_default(),
            trace: path("TRACE"),
            profile: text("PROFILE").is_some_and(|t| t == "1"),
            schedule_seed: text("SEED").and_then(|t| t.parse().ok()).unwrap_or(0),
            on_finding: text("ON_FINDING").and_then(|t| OnFinding::named(&t)).unwrap_or_default(),
            summary: path("SUMMARY"),
        }
    }

    fn variables(&self) -> Vec<(String, OsString)> {
        let mut all = vec![
            ("GPU", OsString::from(&self.gpu)),
            ("DEVICES", self.devices.to_string().into()),
            ("CHECK", OsString::from(&self.check)),
            ("SEED", self.schedule_seed.to_string().into()),
            ("PROFILE", u8::from(self.profile).to_string().into()),
            ("ON_FINDING", self.on_finding.name().into()),
        ];
        all.extend(self.trace.as_ref().map(|p| ("TRACE", p.clone().into_os_string())));
        all.extend(self.summary.as_ref().map(|p| ("SUMMARY", p.clone().into_os_string())));
        all.into_iter().map(|(name, value)| (format!("{PREFIX}{name}"), value)).collect()
    }
}

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
        return match path.is_file() {
            true => Ok(Library::File(path)),
            false => Err(PrepareError::NotThere { path }),
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

/// Whether this process was started by [`Prepared::command`].
pub fn is_prepared() -> bool {
    std::env::var_os(format!("{PREFIX}SUMMARY")).is_some()
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

/// What a run did, over all its launches.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Summary {
    /// Kernel launches.
    pub launches: u64,
    /// Thread instructions.
    pub thread_instructions: u64,
    /// Warp instructions.
    pub warp_instructions: u64,
    /// Floating-point operations of tensor-core instructions.
    pub tensor_core_flops: u64,
    /// Tensor-core instructions by shape and types.
    pub tensor_core: BTreeMap<String, u64>,
    /// Approximate instructions by mnemonic; their bits are not guaranteed.
    pub approximate: BTreeMap<String, u64>,
    /// Kernels by name.
    pub kernels: BTreeMap<String, Totals>,
    /// Findings of the sanitizers, each defect once.
    pub findings: Vec<Finding>,
    /// Launches that could not run, as printed.
    pub errors: Vec<String>,
}

/// What the launches of one kernel did.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Totals {
    /// Launches.
    pub launches: u64,
    /// Thread instructions.
    pub thread_instructions: u64,
    /// Floating-point operations of tensor-core instructions.
    pub tensor_core_flops: u64,
    /// Bytes read from global memory (with profiling).
    pub global_bytes_read: u64,
    /// Bytes written to global memory (with profiling).
    pub global_bytes_written: u64,
    /// 32-byte sectors touched (with profiling).
    pub global_sectors: u64,
    /// Extra wavefronts of shared memory (with profiling).
    pub bank_conflicts: u64,
    /// Failed waits on barriers.
    pub barrier_waits: u64,
    /// Seconds that the host took for them.
    pub host_seconds: f64,
    /// Approximate instructions by mnemonic; where there are none, the kernel's bits are exact.
    pub approximate: BTreeMap<String, u64>,
}

impl Totals {
    fn merge(&mut self, other: &Totals) {
        self.launches += other.launches;
        self.thread_instructions += other.thread_instructions;
        self.tensor_core_flops += other.tensor_core_flops;
        self.global_bytes_read += other.global_bytes_read;
        self.global_bytes_written += other.global_bytes_written;
        self.global_sectors += other.global_sectors;
        self.bank_conflicts += other.bank_conflicts;
        self.barrier_waits += other.barrier_waits;
        self.host_seconds += other.host_seconds;
        add_all(&mut self.approximate, &other.approximate);
    }
}

fn add_all(to: &mut BTreeMap<String, u64>, from: &BTreeMap<String, u64>) {
    for (name, count) in from {
        *to.entry(name.clone()).or_default() += count;
    }
}

impl Summary {
    /// Whether a finding's defect is known.
    pub(crate) fn knows(&self, finding: &Finding) -> bool {
        self.findings.iter().any(|known| known.is_same(finding))
    }

    fn find(&mut self, finding: &Finding) {
        match self.findings.iter_mut().find(|known| known.is_same(finding)) {
            Some(known) => known.count += finding.count,
            None => self.findings.push(finding.clone()),
        }
    }

    pub(crate) fn add(&mut self, record: &KernelRecord, findings: &[Finding], host_seconds: f64) {
        self.launches += 1;
        self.thread_instructions += record.thread_instructions;
        self.warp_instructions += record.warp_instructions;
        self.tensor_core_flops += record.tensor_core_flops;
        add_all(&mut self.tensor_core, &record.tensor_core);
        add_all(&mut self.approximate, &record.approximate);
        self.kernels.entry(record.kernel.clone()).or_default().merge(&Totals {
            launches: 1,
            thread_instructions: record.thread_instructions,
            tensor_core_flops: record.tensor_core_flops,
            global_bytes_read: record.global_bytes_read,
            global_bytes_written: record.global_bytes_written,
            global_sectors: record.global_sectors,
            bank_conflicts: record.bank_conflicts,
            barrier_waits: record.barrier_waits,
            host_seconds,
            approximate: record.approximate.clone(),
        });
        findings.iter().for_each(|finding| self.find(finding));
    }

    fn merge(&mut self, other: Summary) {
        self.launches += other.launches;
        self.thread_instructions += other.thread_instructions;
        self.warp_instructions += other.warp_instructions;
        self.tensor_core_flops += other.tensor_core_flops;
        add_all(&mut self.tensor_core, &other.tensor_core);
        add_all(&mut self.approximate, &other.approximate);
        for (name, totals) in &other.kernels {
            self.kernels.entry(name.clone()).or_default().merge(totals);
        }
        other.findings.iter().for_each(|finding| self.find(finding));
        self.errors.extend(other.errors);
    }

    pub(crate) fn save(&self, folder: &Path) -> io::Result<()> {
        let name = format!("{}.json", std::process::id());
        let beside = folder.join(format!("{name}.part"));
        std::fs::write(&beside, serde_json::to_vec(self)?)?;
        std::fs::rename(beside, folder.join(name))
    }
}
