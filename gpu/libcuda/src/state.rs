//! What the driver knows: devices, handles, streams, the emulated clock, and what the run did.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, OnceLock};

use fathom_emulator::{
    COOPERATIVE_GRID, Checks, Device, Error, Finding, Function, KernelRecord, Launch, LaunchConfig,
    LaunchReport, Preset, Ub, launch_together,
};
use fathom_trace::jsonl;

use crate::abi::*;
use crate::private::{self, Summary};
use crate::program::{Callable, Kernel, Library, Loaded};
use crate::say::say;

pub(crate) type R<T = ()> = Result<T, CuResult>;

/// What a client wants called when a context goes that it has stored something in: with the
/// context, the key and the value.
pub(crate) type Destructor = unsafe extern "C" fn(Handle, usize, usize);

/// A value that a client has stored under a key in a context.
pub(crate) type Stored = (usize, Option<Destructor>);

/// Objects behind handles of one kind.
pub(crate) struct Handles<T>(Mutex<BTreeMap<Handle, T>>);

/// Handles are spread like pointers, since clients print and compare them as such.
static NEXT_HANDLE: AtomicU64 = AtomicU64::new(0x1000);

impl<T: Clone> Handles<T> {
    const fn new() -> Self {
        Handles(Mutex::new(BTreeMap::new()))
    }

    pub(crate) fn insert(&self, value: T) -> Handle {
        let handle = NEXT_HANDLE.fetch_add(0x40, Relaxed) as Handle;
        self.lock().insert(handle, value);
        handle
    }

    pub(crate) fn get(&self, handle: Handle) -> R<T> {
        self.lock().get(&handle).cloned().ok_or(ERROR_INVALID_HANDLE)
    }

    pub(crate) fn remove(&self, handle: Handle) -> R<T> {
        self.lock().remove(&handle).ok_or(ERROR_INVALID_HANDLE)
    }

    /// Handles of the objects that a condition holds for.
    pub(crate) fn which(&self, holds: impl Fn(&T) -> bool) -> Vec<Handle> {
        self.lock().iter().filter(|(_, value)| holds(value)).map(|(handle, _)| *handle).collect()
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, BTreeMap<Handle, T>> {
        self.0.lock().expect("no panic holds this lock")
    }
}

/// A unit of work of a stream, kept for graphs.
pub(crate) type Work = Arc<dyn Fn() -> R + Send + Sync>;

/// What streams capture together, until the one that began ends it: then `None`.
pub(crate) type Capture = Arc<Mutex<Option<Vec<Work>>>>;

/// An event: when it was last recorded, and in which capture.
pub(crate) struct Event {
    /// Emulated nanoseconds.
    pub at: AtomicU64,
    pub timed: bool,
    pub capture: Mutex<Option<Capture>>,
}

/// A stream: where it runs, and what it captures.
#[derive(Clone)]
pub(crate) struct Stream {
    pub device: usize,
    pub capture: Arc<Mutex<Option<Capture>>>,
    pub flags: u32,
    pub priority: i32,
}

/// The driver of this process.
pub(crate) struct Driver {
    pub devices: Vec<Device>,
    /// Emulated nanoseconds that each device has worked.
    clocks: Vec<AtomicU64>,
    /// The error that a broken kernel left; every later call returns it, as on hardware.
    sticky: AtomicI32,
    pub contexts: Handles<usize>,
    pub primary: Vec<OnceLock<Handle>>,
    pub retained: Vec<AtomicU64>,
    pub modules: Handles<Arc<Loaded>>,
    pub storage: Mutex<BTreeMap<(Handle, usize), Stored>>,
    pub libraries: Handles<Arc<Library>>,
    pub functions: Handles<Arc<Callable>>,
    pub kernels: Handles<Kernel>,
    pub streams: Handles<Stream>,
    pub events: Handles<Arc<Event>>,
    pub graphs: Handles<Arc<Vec<Work>>>,
    pub links: Handles<Arc<Mutex<Vec<String>>>>,
    pub host: Mutex<BTreeMap<usize, std::alloc::Layout>>,
    /// The context of each allocation of device memory.
    pub owners: Mutex<BTreeMap<DevicePtr, Handle>>,
    default_streams: Vec<Stream>,
    summary: Mutex<Summary>,
    choices: private::Choices,
    /// Launches that have not run yet, where there are several devices.
    kept: Mutex<Vec<Kept>>,
    unsupported: Mutex<Vec<String>>,
    trace: Mutex<Option<jsonl::Writer<KernelRecord, std::fs::File>>>,
}

static DRIVER: OnceLock<Driver> = OnceLock::new();
static INITIALISED: AtomicBool = AtomicBool::new(false);

thread_local! {
    static CONTEXTS: RefCell<Vec<Handle>> = const { RefCell::new(Vec::new()) };
}

/// A launch that waits for the host to wait for it.
pub(crate) struct Kept {
    stream: Handle,
    function: Function,
    config: LaunchConfig,
}

/// Launches kept before some run in any case.
const MOST_KEPT: usize = 256;

/// Emulated nanoseconds from one kernel of a stream to the next.
const LAUNCH_NS: u64 = 2000;

/// The driver; made at the first call from the choices in the environment.
pub(crate) fn driver() -> &'static Driver {
    DRIVER.get_or_init(|| {
        Driver::new(private::Choices::from_environment()).unwrap_or_else(|error| {
            say!("{error}; emulating an h800");
            Driver::new(private::Choices::default()).expect("the default preset exists")
        })
    })
}

/// As [`driver`], refusing before `cuInit`.
pub(crate) fn initialised() -> R<&'static Driver> {
    if INITIALISED.load(Relaxed) { Ok(driver()) } else { Err(ERROR_NOT_INITIALIZED) }
}

/// `cuInit`.
pub(crate) fn initialise() {
    driver();
    INITIALISED.store(true, Relaxed);
}

impl Driver {
    fn new(choices: private::Choices) -> Result<Driver, Error> {
        let preset = Preset::named(&choices.gpu)?;
        let devices = Device::peers(preset, choices.devices.max(1));
        for device in &devices {
            let checks = Checks::parse(&choices.check).unwrap_or(Checks::ALL);
            device.memory().track_written(checks.uninit);
            let schedule_seed = choices.schedule_seed;
            let profile = choices.profile || choices.trace.is_some();
            device.configure(fathom_emulator::Settings {
                checks,
                schedule_seed,
                profile,
                ..device.settings()
            });
        }
        let each = || 0..devices.len();
        let stream = |device| Stream { device, capture: Arc::default(), flags: 0, priority: 0 };
        Ok(Driver {
            clocks: each().map(|_| AtomicU64::new(0)).collect(),
            primary: each().map(|_| OnceLock::new()).collect(),
            retained: each().map(|_| AtomicU64::new(0)).collect(),
            default_streams: each().map(stream).collect(),
            devices,
            sticky: AtomicI32::new(SUCCESS),
            contexts: Handles::new(),
            modules: Handles::new(),
            storage: Mutex::default(),
            libraries: Handles::new(),
            functions: Handles::new(),
            kernels: Handles::new(),
            streams: Handles::new(),
            events: Handles::new(),
            graphs: Handles::new(),
            links: Handles::new(),
            host: Mutex::default(),
            owners: Mutex::default(),
            summary: Mutex::default(),
            choices,
            unsupported: Mutex::default(),
            kept: Mutex::default(),
            trace: Mutex::new(None),
        })
    }

    /// A device by its ordinal.
    pub(crate) fn device(&self, ordinal: i32) -> R<&Device> {
        let index = usize::try_from(ordinal).map_err(|_| ERROR_INVALID_DEVICE)?;
        self.devices.get(index).ok_or(ERROR_INVALID_DEVICE)
    }

    /// Compute capability of the devices, which are all of one kind.
    pub(crate) fn capability(&self) -> [u32; 2] {
        self.devices[0].preset().compute_capability
    }

    /// The primary context of a device.
    pub(crate) fn primary_context(&self, device: usize) -> Handle {
        *self.primary[device].get_or_init(|| self.contexts.insert(device))
    }

    /// The device of this thread's current context.
    pub(crate) fn current(&self) -> R<usize> {
        self.contexts.get(current_context()).map_err(|_| ERROR_INVALID_CONTEXT)
    }

    /// A stream by its handle; 0, 1 and 2 are the default streams.
    pub(crate) fn stream(&self, handle: Handle) -> R<Stream> {
        if handle <= 2 {
            return Ok(self.default_streams[self.current()?].clone());
        }
        self.streams.get(handle)
    }

    /// Runs work on a stream now, or keeps it where the stream captures.
    pub(crate) fn enqueue(
        &self,
        stream: Handle,
        work: impl Fn() -> R + Send + Sync + 'static,
    ) -> R {
        self.healthy()?;
        let stream = self.stream(stream)?;
        if let Some(capture) = stream.capturing()
            && let Some(works) = &mut *capture.lock().expect("no panic holds this lock")
        {
            works.push(Arc::new(work));
            return Ok(());
        }
        work()
    }

    /// Runs what is kept; the error that an earlier kernel left, if any.
    pub(crate) fn healthy(&self) -> R {
        self.run_kept()?;
        self.error()
    }

    /// The error that an earlier kernel left, if any.
    pub(crate) fn error(&self) -> R {
        match self.sticky.load(Relaxed) {
            SUCCESS => Ok(()),
            error => Err(error),
        }
    }

    /// Frees what belongs to a context, which goes or is reset: modules, device memory, and the
    /// error that a kernel left there.
    pub(crate) fn clear(&self, context: Handle) {
        for module in self.modules.which(|module| module.context == context) {
            // Another thread may have been faster.
            let _ = self.unload(module);
        }
        let device = self.contexts.get(context).unwrap_or(0);
        self.owners.lock().expect("no panic holds this lock").retain(|address, owner| {
            let stays = *owner != context;
            if !stays {
                let _ = self.devices[device].free(*address);
            }
            stays
        });
        self.sticky.store(SUCCESS, Relaxed);
    }

    /// Emulated time of a device in nanoseconds.
    pub(crate) fn now_ns(&self, device: usize) -> u64 {
        self.clocks[device].load(Relaxed)
    }

    /// Lets a device's emulated clock advance.
    pub(crate) fn advance(&self, device: usize, ns: u64) {
        self.clocks[device].fetch_add(ns, Relaxed);
    }

    /// Launches a kernel on a stream.
    pub(crate) fn launch(
        &'static self,
        stream: Handle,
        function: Function,
        config: LaunchConfig,
    ) -> R {
        let capturing = self.stream(stream)?.capturing().is_some();
        if self.devices.len() == 1 || capturing {
            return self.enqueue(stream, move || self.run(&[(function.clone(), config.clone())]));
        }
        self.error()?;
        let stream = if stream <= 2 { 0 } else { stream };
        let full = {
            let mut kept = self.kept.lock().expect("no panic holds this lock");
            kept.push(Kept { stream, function, config });
            kept.len() >= MOST_KEPT
        };
        if full { self.run_kept() } else { Ok(()) }
    }

    /// Runs the launches that are kept: the heads of all streams together, then the next ones.
    pub(crate) fn run_kept(&self) -> R {
        let mut left = std::mem::take(&mut *self.kept.lock().expect("no panic holds this lock"));
        while !left.is_empty() {
            let mut busy = Vec::new();
            let (mut heads, mut later) = (Vec::new(), Vec::new());
            for one in left {
                let place = (one.function.module().device().index(), one.stream);
                if busy.contains(&place) {
                    later.push(one);
                } else {
                    busy.push(place);
                    heads.push((one.function, one.config));
                }
            }
            left = later;
            self.error()?;
            self.run(&heads)?;
        }
        Ok(())
    }

    fn run(&self, launches: &[(Function, LaunchConfig)]) -> R {
        let together: Vec<Launch<'_>> =
            launches.iter().map(|(function, config)| Launch { function, config }).collect();
        let reports = launch_together(&together).map_err(|error| {
            say!("{error}");
            self.summary.lock().expect("no panic holds this lock").errors.push(error.to_string());
            self.save_summary();
            match error {
                Error::Unsupported(_) => ERROR_NOT_SUPPORTED,
                Error::Launch { what: COOPERATIVE_GRID, .. } => ERROR_COOPERATIVE_LAUNCH_TOO_LARGE,
                Error::Launch { .. } => ERROR_INVALID_VALUE,
                _ => ERROR_LAUNCH_FAILED,
            }
        })?;
        for ((function, _), report) in launches.iter().zip(reports) {
            self.ended(function, report);
        }
        Ok(())
    }

    fn ended(&self, function: &Function, report: LaunchReport) {
        let device = function.module().device();
        let index = device.index() as usize;
        crate::say::print(&report.printed);
        let cycles_ns = report.cycles * 1_000_000 / u64::from(device.preset().clock_khz);
        self.advance(index, LAUNCH_NS + cycles_ns);
        for finding in &report.findings {
            say!("{finding}");
        }
        let fatal = report.fatal().map(code_of);
        self.account(report.record, &report.findings);
        if let Some(error) = fatal {
            // As on hardware: this call succeeds, the next ones report it.
            self.sticky.store(error, Relaxed);
        }
    }

    fn account(&self, mut record: KernelRecord, findings: &[Finding]) {
        let mut summary = self.summary.lock().expect("no panic holds this lock");
        record.seq = summary.launches;
        summary.add(&record, findings);
        drop(summary);
        if let Some(folder) = &self.choices.trace
            && let Err(error) = self.write_trace(folder, &record)
        {
            say!("{}: {error}", folder.display());
        }
        self.save_summary();
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

    /// The summary is kept in its file after every launch, so that it survives any end.
    fn save_summary(&self) {
        if let Some(folder) = &self.choices.summary {
            let summary = self.summary.lock().expect("no panic holds this lock");
            if let Err(error) = summary.save(folder) {
                say!("{}: {error}", folder.display());
            }
        }
    }

    /// Names an entry point that does not exist here, once.
    pub(crate) fn name_unsupported(&self, name: &str) {
        let mut named = self.unsupported.lock().expect("no panic holds this lock");
        if !named.iter().any(|n| n == name) {
            named.push(name.to_owned());
            say!("the emulated driver does not support {name}");
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
        _ => ERROR_LAUNCH_FAILED,
    }
}

impl Stream {
    /// The capture that this stream is part of, while it lasts.
    pub(crate) fn capturing(&self) -> Option<Capture> {
        let mut own = self.capture.lock().expect("no panic holds this lock");
        let lasts = |c: &Capture| c.lock().expect("no panic holds this lock").is_some();
        if !own.as_ref().is_some_and(lasts) {
            *own = None;
        }
        own.clone()
    }
}

/// This thread's current context; 0 where there is none.
pub(crate) fn current_context() -> Handle {
    CONTEXTS.with_borrow(|stack| stack.last().copied().unwrap_or(0))
}

/// Replaces the top of this thread's context stack.
pub(crate) fn set_context(context: Handle) {
    CONTEXTS.with_borrow_mut(|stack| {
        stack.pop();
        if context != 0 {
            stack.push(context);
        }
    });
}

/// Pushes onto this thread's context stack.
pub(crate) fn push_context(context: Handle) {
    CONTEXTS.with_borrow_mut(|stack| stack.push(context));
}

/// Runs a call with another context on top of this thread's stack.
pub(crate) fn within<T>(context: Handle, call: impl FnOnce() -> R<T>) -> R<T> {
    push_context(context);
    let result = call();
    pop_context();
    result
}

/// Pops this thread's context stack.
pub(crate) fn pop_context() -> Option<Handle> {
    CONTEXTS.with_borrow_mut(Vec::pop)
}
