//! Running kernels: launches, what they found, and what the run's summary says of them.

use std::path::PathBuf;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use fathom_emulator::{
    CLUSTER, COOPERATIVE_GRID, Error, Finding, Function, Joining, KernelRecord, Launch,
    LaunchConfig, LaunchReport, More, Ub, check_launch, launch_joining, launch_together,
};
use fathom_trace::jsonl;

use super::{Driver, driver};
use crate::abi::*;
use crate::choices::OnFinding;
use crate::queue::{Joined, Mark, Queue, Work};
use crate::say::{self, say};

/// Emulated nanoseconds from one kernel of a stream to the next.
const LAUNCH_NS: u64 = 2000;

/// How often the summary of a run is saved.
const SAVE_EVERY: Duration = Duration::from_millis(50);

impl Driver {
    /// Refuses a launch that cannot run.
    pub(crate) fn can_launch(&self, function: &Function, config: &LaunchConfig) -> R {
        check_launch(&Launch { function, config }).map_err(|error| self.cannot_run(&error))
    }

    /// Tells why a launch cannot run, and gives cuda.h's number for it.
    fn cannot_run(&self, error: &Error) -> CuResult {
        say!("{error}");
        self.summary.lock().expect("no panic holds this lock").errors.push(error.to_string());
        self.save_summary();
        match error {
            Error::Unsupported(_) => ERROR_NOT_SUPPORTED,
            Error::Launch { what: COOPERATIVE_GRID, .. } => ERROR_COOPERATIVE_LAUNCH_TOO_LARGE,
            Error::Launch { what: CLUSTER, .. } => ERROR_INVALID_CLUSTER_SIZE,
            Error::Launch { .. } => ERROR_INVALID_VALUE,
            _ => ERROR_LAUNCH_FAILED,
        }
    }

    /// Notes that a module cannot run here, which was told: a run whose program goes on without it
    /// is not a clean one.
    pub(crate) fn noted<T>(&self, module: R<T>) -> R<T> {
        if let Err(ERROR_NO_BINARY_FOR_GPU) = module {
            let mut summary = self.summary.lock().expect("no panic holds this lock");
            summary.errors.push("a module has no PTX that this device may run".to_owned());
            drop(summary);
            self.save_summary();
        }
        module
    }

    /// Runs launches together.
    pub(crate) fn run(&self, launches: &[(Function, LaunchConfig)]) -> R {
        let together: Vec<Launch<'_>> =
            launches.iter().map(|(function, config)| Launch { function, config }).collect();
        let began = Instant::now();
        let reports = launch_together(&together).map_err(|error| self.cannot_run(&error))?;
        let seconds = began.elapsed().as_secs_f64() / reports.len() as f64;
        for ((function, _), report) in launches.iter().zip(reports) {
            self.ended(function, report, seconds);
        }
        launches.iter().try_for_each(|(function, _)| self.run_children(function))
    }

    fn ended(&self, function: &Function, report: LaunchReport, seconds: f64) {
        let device = function.module().device();
        let index = device.index() as usize;
        crate::say::print(&report.printed);
        let cycles_ns = report.cycles * 1_000_000 / u64::from(device.preset().clock_khz);
        self.advance(index, LAUNCH_NS + cycles_ns);
        // A defect is told once, however many launches have it; the summary counts it.
        let known = |f: &&Finding| self.summary.lock().expect("no panic holds it").knows(f);
        for finding in report.findings.iter().filter(|finding| !known(finding)) {
            say::finding(finding);
        }
        let fatal = report.fatal().map(code_of);
        self.account(report.record, &report.findings, seconds);
        match (fatal, self.choices.on_finding) {
            (None, _) | (_, OnFinding::Report) => {}
            // As on hardware: this call succeeds, the next ones report it.
            (Some(error), OnFinding::Context) => self.sticky.store(error, Relaxed),
            (Some(_), OnFinding::Abort) => std::process::abort(),
        }
    }

    fn account(&self, mut record: KernelRecord, findings: &[Finding], seconds: f64) {
        let mut summary = self.summary.lock().expect("no panic holds this lock");
        record.seq = summary.launches;
        summary.add(&record, findings, seconds);
        drop(summary);
        if let Some(folder) = &self.choices.trace
            && let Err(error) = self.write_trace(folder, &record)
        {
            say!("{}: {error}", folder.display());
        }
        match findings {
            [] => self.save_summary_soon(),
            _ => self.save_summary(),
        }
    }

    fn write_trace(&self, folder: &PathBuf, record: &KernelRecord) -> std::io::Result<()> {
        let mut trace = self.trace.lock().expect("no panic holds this lock");
        if trace.is_none() {
            std::fs::create_dir_all(folder)?;
            let name = format!("kernels-{}.jsonl", std::process::id());
            *trace = Some(jsonl::Writer::new(std::fs::File::create(folder.join(name))?)?);
        }
        trace.as_mut().expect("made above").write(record)
    }

    /// Saves the summary after a launch, unless it was saved a moment ago: then [`SAVE_EVERY`]
    /// later, or at the end. Who is killed in between loses launches, but no finding.
    fn save_summary_soon(&self) {
        let mut saved = self.saved.lock().expect("no panic holds this lock");
        if saved.is_some_and(|at| at.elapsed() < SAVE_EVERY) {
            self.unsaved.store(true, Relaxed);
            return;
        }
        *saved = Some(Instant::now());
        drop(saved);
        self.save_summary();
    }

    /// Saves the summary where launches are not in it yet.
    pub(crate) fn save_rest(&self) {
        if self.unsaved.load(Relaxed) {
            self.save_summary();
        }
    }

    /// The summary is kept in its file, so that it survives any end.
    fn save_summary(&self) {
        self.unsaved.store(false, Relaxed);
        if let Some(folder) = &self.choices.summary {
            let summary = self.summary.lock().expect("no panic holds this lock");
            if let Err(error) = summary.save(folder) {
                say!("{}: {error}", folder.display());
            }
        }
    }
}

/// The error by which hardware would report it.
fn code_of(finding: &Finding) -> CuResult {
    match finding.kind {
        Ub::OutOfBounds | Ub::UseAfterFree => ERROR_ILLEGAL_ADDRESS,
        Ub::Misaligned => ERROR_MISALIGNED_ADDRESS,
        // A bare `trap` is an unspecified failure on hardware.
        Ub::Trap if finding.message.starts_with("assertion") => ERROR_ASSERT,
        Ub::Deadlock => ERROR_LAUNCH_TIMEOUT,
        Ub::NotEmulated => ERROR_NOT_SUPPORTED,
        _ => ERROR_LAUNCH_FAILED,
    }
}

/// Does what is guarded against panics of the emulator; what goes wrong is left for the next call.
fn guarded(call: impl FnOnce() -> R) {
    let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(call));
    let code = result.unwrap_or_else(|_| {
        say!("a kernel failed inside the emulator");
        Err(ERROR_UNKNOWN)
    });
    if let Err(code) = code {
        driver().sticky.store(code, Relaxed);
    }
}

/// Does one thing of the queue. After an error nothing is done, as on hardware.
pub(super) fn run_one(work: Work) {
    let driver = driver();
    if driver.error().is_ok() {
        guarded(|| match work {
            Work::Launch(function, config) => driver.run(&[(function, config)]),
            Work::Now(call) | Work::Later(call) => call(),
            Work::Wait(_) => Ok(()),
        });
    }
}

/// Runs launches of the queue together, as they join.
pub(super) fn run_together(queue: &'static Queue) {
    let mut turns = Turns { queue, running: Vec::new(), over: false };
    while !turns.over {
        guarded(|| {
            launch_joining(&mut turns);
            Ok(())
        });
        // Where the emulator panicked, these have no report.
        let left: Vec<Mark> = turns.running.drain(..).flatten().map(|(mark, ..)| mark).collect();
        queue.ended(&left);
    }
}

/// The launches that run together, as the emulator asks for them.
struct Turns {
    queue: &'static Queue,
    /// Those that were given since the emulator began, until they end.
    running: Vec<Option<(Mark, Function, Instant)>>,
    /// Whether there were none any more.
    over: bool,
}

impl Joining for Turns {
    fn more(&mut self, none_left: bool) -> More {
        let Joined { launches, progress } = self.queue.join(none_left);
        self.over = none_left && launches.is_empty();
        let mut more = More { launches: Vec::new(), progress };
        for (mark, function, config) in launches {
            if driver().error().is_err() {
                self.queue.ended(&[mark]);
                continue;
            }
            self.running.push(Some((mark, function.clone(), Instant::now())));
            more.launches.push((function, config));
        }
        more
    }

    fn ended(&mut self, launch: usize, report: Result<LaunchReport, Error>) {
        let Some((mark, function, began)) = self.running[launch].take() else { return };
        match report {
            Ok(report) => driver().ended(&function, report, began.elapsed().as_secs_f64()),
            Err(error) => driver().sticky.store(driver().cannot_run(&error), Relaxed),
        }
        self.queue.ended(&[mark]);
    }
}
