//! What the driver knows: devices, handles, streams, the emulated clock, and what the run did.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::mem::ManuallyDrop;
use std::path::PathBuf;
use std::sync::atomic::{
    AtomicBool, AtomicI32, AtomicU64,
    Ordering::{Relaxed, SeqCst},
};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Instant;

use fathom_emulator::{
    CLUSTER, COOPERATIVE_GRID, Checks, Device, Error, Finding, Function, KernelRecord, Launch,
    LaunchConfig, LaunchReport, Preset, Tell, Ub, check_launch, launch_together,
};
use fathom_trace::jsonl;

use crate::abi::*;
use crate::api::pool::{self, Pool};
use crate::api::user_object::UserObject;
use crate::api::virtual_memory::{Physical, Ranges, Shared, SharedEvent};
use crate::graph::{self, Captured, EdgeData};
use crate::machine::{Advice, HostKind, visible};
use crate::operation::Operation;
use crate::private::{self, OnFinding, Summary};
use crate::program::{Callable, Kernel, Library, Loaded};
use crate::queue::{Mark, Queue, Work};
use crate::say::{self, say};

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
        self.insert_with(|_| value)
    }

    /// As [`Handles::insert`], of a value that knows its handle.
    pub(crate) fn insert_with(&self, make: impl FnOnce(Handle) -> T) -> Handle {
        let handle = NEXT_HANDLE.fetch_add(0x40, Relaxed) as Handle;
        self.lock().insert(handle, make(handle));
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

/// An event: when it was last recorded, where that stands in its stream, and in which capture.
pub(crate) struct Event {
    /// Emulated nanoseconds.
    at: AtomicU64,
    pub timed: bool,
    pub recorded: Mutex<Option<Mark>>,
    /// Of an event that processes share: how often it was recorded, and how often that is done.
    pub shared: OnceLock<SharedEvent>,
    pub captured: Mutex<Option<Captured>>,
}

/// An event's time before it is recorded.
const NEVER: u64 = u64::MAX;

impl Event {
    pub(crate) fn new(timed: bool) -> Event {
        let at = AtomicU64::new(NEVER);
        let (recorded, captured) = (Mutex::default(), Mutex::default());
        Event { at, timed, recorded, shared: OnceLock::new(), captured }
    }

    /// Takes its time; of a shared event that is one more record done.
    pub(crate) fn taken(&self, ns: u64) {
        self.at.store(ns, Relaxed);
        if let Some(shared) = self.shared.get() {
            shared.done().fetch_add(1, SeqCst);
        }
    }

    /// Whether so many records of a shared event are done, counting round.
    pub(crate) fn shared_reached(&self, wanted: u32) -> bool {
        let done = |shared: &SharedEvent| shared.done().load(SeqCst).wrapping_sub(wanted) as i32;
        self.shared.get().is_none_or(|shared| done(shared) >= 0)
    }

    /// Whether all records of a shared event are done; of others, true.
    pub(crate) fn shared_done(&self) -> bool {
        let recorded = |shared: &SharedEvent| shared.recorded().load(SeqCst);
        self.shared.get().is_none_or(|shared| self.shared_reached(recorded(shared)))
    }

    /// Its time, if it has one.
    pub(crate) fn at(&self) -> Option<u64> {
        Some(self.at.load(Relaxed)).filter(|at| *at != NEVER && self.timed)
    }
}

/// A stream: where it runs, and what it captures.
#[derive(Clone)]
pub(crate) struct Stream {
    pub handle: Handle,
    pub device: usize,
    pub capture: Arc<Mutex<Option<Captured>>>,
    pub flags: u32,
    pub priority: i32,
}

/// The driver of this process.
pub(crate) struct Driver {
    pub devices: Vec<Device>,
    /// Which of the machine's each is (CUDA_VISIBLE_DEVICES); where it is none, one is there that
    /// no client gets.
    pub visible: Vec<i32>,
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
    pub graphs: Handles<graph::Shared>,
    /// The graph of each node.
    pub nodes: Handles<Handle>,
    pub execs: Handles<Arc<graph::Exec>>,
    pub user_objects: Handles<Arc<UserObject>>,
    /// The conditions of graphs, by the words that hold their values.
    pub conditions: Mutex<BTreeMap<DevicePtr, graph::Condition>>,
    /// What was advised of managed memory, by allocation.
    pub advice: Mutex<BTreeMap<DevicePtr, Advice>>,
    pub queue: Queue,
    pub pools: Handles<Arc<Pool>>,
    /// The default pool of each device, and the one that it allocates from.
    pub default_pools: Vec<Handle>,
    pub current_pools: Mutex<Vec<Handle>>,
    /// The default pools of the host's memory and of managed memory, made when they are asked for.
    pub host_pools: Mutex<Vec<(pool::Place, Handle)>>,
    /// The pool that the graphs of each device allocate from.
    pub graph_pools: Vec<Handle>,
    /// The pool of each allocation from one, and its length.
    pub pooled: Mutex<BTreeMap<DevicePtr, (Handle, u64)>>,
    pub physical: Handles<Arc<Physical>>,
    pub ranges: Ranges,
    pub shared: Shared,
    pub links: Handles<Arc<Mutex<Vec<String>>>>,
    /// Host memory of the driver: pinned and managed.
    pub host: Mutex<BTreeMap<usize, (std::alloc::Layout, HostKind)>>,
    /// The context of each allocation of device memory.
    pub owners: Mutex<BTreeMap<DevicePtr, Handle>>,
    default_streams: Vec<Stream>,
    summary: Mutex<Summary>,
    choices: private::Choices,
    unsupported: Mutex<Vec<String>>,
    trace: Mutex<Option<jsonl::Writer<KernelRecord, std::fs::File>>>,
}

static DRIVER: OnceLock<Driver> = OnceLock::new();
static INITIALISED: AtomicBool = AtomicBool::new(false);

thread_local! {
    /// Never dropped: clients free what they have when their thread's other values are gone.
    static CONTEXTS: ManuallyDrop<RefCell<Vec<Handle>>> =
        const { ManuallyDrop::new(RefCell::new(Vec::new())) };
}

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
    let driver = driver();
    if !INITIALISED.swap(true, Relaxed) {
        driver.queue.attend();
        // SAFETY: a function of this library, which is never unloaded.
        unsafe { atexit(at_exit) };
    }
}

impl Driver {
    fn new(choices: private::Choices) -> Result<Driver, Error> {
        let preset = Preset::named(&choices.gpu)?;
        let chosen = std::env::var("CUDA_VISIBLE_DEVICES").ok();
        let visible = visible(choices.devices.max(1), chosen.as_deref());
        let devices = Device::peers(preset, visible.len().max(1));
        for device in &devices {
            let checks = Checks::parse(&choices.check).unwrap_or(Checks::ALL);
            device.memory().track_written(checks.uninit);
            let schedule_seed = choices.schedule_seed;
            let profile = choices.profile || choices.trace.is_some();
            device.configure(fathom_emulator::Settings {
                checks,
                schedule_seed,
                profile,
                tell: Some(Tell(say::finding)),
                ..device.settings()
            });
        }
        let each = || 0..devices.len();
        let pools = Handles::new();
        let make = |device| pools.insert(Arc::new(Pool::new(pool::Place::Device(device))));
        let pool_each = || each().map(make).collect();
        let (default_pools, graph_pools): (Vec<Handle>, Vec<Handle>) = (pool_each(), pool_each());
        let queue = Queue::new(devices.len() > 1, run_batch);
        let stream =
            |device| Stream { handle: 0, device, capture: Arc::default(), flags: 0, priority: 0 };
        Ok(Driver {
            clocks: each().map(|_| AtomicU64::new(0)).collect(),
            primary: each().map(|_| OnceLock::new()).collect(),
            retained: each().map(|_| AtomicU64::new(0)).collect(),
            default_streams: each().map(stream).collect(),
            devices,
            visible,
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
            nodes: Handles::new(),
            execs: Handles::new(),
            user_objects: Handles::new(),
            conditions: Mutex::default(),
            advice: Mutex::default(),
            queue,
            pools,
            current_pools: Mutex::new(default_pools.clone()),
            host_pools: Mutex::default(),
            default_pools,
            graph_pools,
            pooled: Mutex::default(),
            physical: Handles::new(),
            ranges: Mutex::default(),
            shared: Mutex::default(),
            links: Handles::new(),
            host: Mutex::default(),
            owners: Mutex::default(),
            summary: Mutex::default(),
            choices,
            unsupported: Mutex::default(),
            trace: Mutex::new(None),
        })
    }

    /// A device by its ordinal.
    pub(crate) fn device(&self, ordinal: i32) -> R<&Device> {
        let index = usize::try_from(ordinal).map_err(|_| ERROR_INVALID_DEVICE)?;
        self.devices.get(index).ok_or(ERROR_INVALID_DEVICE)
    }

    /// Which of the machine's devices one is.
    pub(crate) fn physical(&self, device: i32) -> i32 {
        self.visible.get(device as usize).copied().unwrap_or(device)
    }

    /// The folder that all processes of an emulated run share.
    pub(crate) fn shared_folder(&self) -> PathBuf {
        let folder = self.choices.summary.as_ref().and_then(|summary| summary.parent());
        folder.map_or_else(std::env::temp_dir, PathBuf::from)
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

    /// What a stream must wait for beside itself: a blocking stream for the legacy default stream,
    /// and that one for all blocking streams of its device.
    fn before(&self, stream: &Stream) -> Vec<Mark> {
        if stream.flags & STREAM_NON_BLOCKING != 0 {
            return Vec::new();
        }
        if stream.handle != 0 {
            return vec![self.queue.mark((stream.device, 0))];
        }
        let nonblocking = self.streams.which(|s| s.flags & STREAM_NON_BLOCKING != 0);
        self.queue.marks(|(device, handle)| {
            device == stream.device && handle != 0 && !nonblocking.contains(&handle)
        })
    }

    /// Gives a stream something to do, or its graph a node where it captures. `after` is what the
    /// work waits for beside the stream's order.
    pub(crate) fn submit(&self, stream: Handle, operation: Operation) -> R {
        self.submit_after(stream, operation, Vec::new())
    }

    /// As [`Driver::submit`], after further places in the streams' order.
    pub(crate) fn submit_after(
        &self,
        stream: Handle,
        operation: Operation,
        mut after: Vec<Mark>,
    ) -> R {
        self.error()?;
        let at_once = operation.check()?;
        let stream = self.stream(stream)?;
        if let Some(captured) = stream.capturing() {
            let edges = captured.after.iter().map(|node| (*node, EdgeData::default())).collect();
            let node = self.add_node(captured.capture.graph, edges, operation)?;
            stream.set_captured(Captured { after: vec![node], ..captured });
            return Ok(());
        }
        after.extend(self.before(&stream));
        let key = (stream.device, stream.handle);
        if at_once {
            after.push(self.queue.mark(key));
            self.queue.wait(&after);
            self.error()?;
        }
        let (mut recorded, mut awaited) = (Vec::new(), Vec::new());
        operation.events(&mut recorded, &mut awaited);
        for event in awaited {
            after.extend(*self.events.get(event)?.recorded.lock().expect("no panic holds it"));
        }
        let recorded: Vec<_> =
            recorded.into_iter().map(|e| self.events.get(e)).collect::<R<_>>()?;
        let result = self.queue.give(key, after, operation.work(stream.device));
        for event in recorded {
            *event.captured.lock().expect("no panic holds this lock") = None;
            *event.recorded.lock().expect("no panic holds this lock") = Some(self.queue.mark(key));
        }
        result
    }

    /// Waits for a stream; the error that a kernel left, if any.
    pub(crate) fn wait_for(&self, stream: Handle) -> R {
        self.queue.wait(&self.marks_of(stream)?);
        self.error()
    }

    /// What a stream has been given, and what that waits for.
    pub(crate) fn marks_of(&self, stream: Handle) -> R<Vec<Mark>> {
        let stream = self.stream(stream)?;
        if stream.capturing().is_some() {
            return Err(ERROR_STREAM_CAPTURE_UNSUPPORTED);
        }
        let mut marks = self.before(&stream);
        marks.push(self.queue.mark((stream.device, stream.handle)));
        Ok(marks)
    }

    /// Waits for all streams of all devices; the error that a kernel left, if any.
    pub(crate) fn wait_for_all(&self) -> R {
        self.queue.wait(&self.queue.marks(|_| true));
        self.error()
    }

    /// Refuses a launch that cannot run.
    pub(crate) fn can_launch(&self, function: &Function, config: &LaunchConfig) -> R {
        check_launch(&Launch { function, config }).map_err(|error| self.cannot_run(&error))
    }

    /// Frees memory, of a device or of the host.
    pub(crate) fn free(&self, address: DevicePtr) -> R {
        if self.host_free(address as usize)? {
            self.left_pool(address);
            self.advice.lock().expect("no panic holds this lock").remove(&address);
            return Ok(());
        }
        self.shared.lock().expect("no panic holds this lock").remove(&address);
        self.left_pool(address);
        self.owners.lock().expect("no panic holds this lock").remove(&address);
        self.devices[0].free(address).map_err(|_| ERROR_INVALID_VALUE)
    }

    /// Frees host memory of the driver's; false where the address is not of such memory.
    pub(crate) fn host_free(&self, at: usize) -> R<bool> {
        let Some((layout, _)) = self.host.lock().expect("no panic holds this lock").remove(&at)
        else {
            return Ok(false);
        };
        self.devices[0].free(at as u64).map_err(|_| ERROR_INVALID_VALUE)?;
        // SAFETY: allocated with this layout, and now unknown to the emulator.
        unsafe { std::alloc::dealloc(at as *mut u8, layout) };
        Ok(true)
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
        Ok(())
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

/// Runs a batch of the queue: what goes wrong is left for the next call.
fn run_batch(works: Vec<Work>) {
    let driver = driver();
    let (mut launches, mut others) = (Vec::new(), Vec::new());
    for work in works {
        match work {
            Work::Launch(function, config) => launches.push((function, config)),
            Work::Now(call) | Work::Later(call) => others.push(call),
            Work::Wait(_) => {}
        }
    }
    // After an error nothing runs, as on hardware.
    if driver.error().is_err() {
        return;
    }
    let mut all = || -> R {
        if !launches.is_empty() {
            driver.run(&launches)?;
        }
        others.drain(..).try_for_each(|call| call())
    };
    let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(&mut all));
    let code = result.unwrap_or_else(|_| {
        say!("a kernel failed inside the emulator");
        Err(ERROR_UNKNOWN)
    });
    if let Err(code) = code {
        driver.sticky.store(code, Relaxed);
    }
}

/// Runs what is left when the process ends.
extern "C" fn at_exit() {
    let _ = std::panic::catch_unwind(|| driver().wait_for_all());
}

unsafe extern "C" {
    fn atexit(function: extern "C" fn()) -> i32;
}

impl Stream {
    /// What this stream captures, while it does.
    pub(crate) fn capturing(&self) -> Option<Captured> {
        let mut own = self.capture.lock().expect("no panic holds this lock");
        if !own.as_ref().is_some_and(Captured::lasts) {
            *own = None;
        }
        own.clone()
    }

    pub(crate) fn set_captured(&self, captured: Captured) {
        *self.capture.lock().expect("no panic holds this lock") = Some(captured);
    }
}

/// This thread's current context; 0 where there is none.
pub(crate) fn current_context() -> Handle {
    CONTEXTS.with(|stack| stack.borrow().last().copied().unwrap_or(0))
}

/// Replaces the top of this thread's context stack.
pub(crate) fn set_context(context: Handle) {
    CONTEXTS.with(|stack| {
        let mut stack = stack.borrow_mut();
        stack.pop();
        if context != 0 {
            stack.push(context);
        }
    });
}

/// Pushes onto this thread's context stack.
pub(crate) fn push_context(context: Handle) {
    CONTEXTS.with(|stack| stack.borrow_mut().push(context));
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
    CONTEXTS.with(|stack| stack.borrow_mut().pop())
}
