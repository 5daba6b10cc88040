//! The driver: devices, tables of handles, the emulated clock, and what it does with them.
//!
//! - [`contexts`]: the context stack of a thread
//! - [`submit`]: giving streams work and waiting for it; `execute`: doing it
//! - [`launch`]: kernels, their findings, the summary; `children`: what kernels launch
//! - `graphs`, `programs`, `memory`, [`user_objects`]: what is done with each

mod children;
pub(crate) mod contexts;
mod execute;
mod graphs;
mod launch;
mod memory;
pub(crate) mod programs;
mod submit;
pub(crate) mod user_objects;

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Instant;

use fathom_emulator::{Checks, Device, Error, KernelRecord, Preset, Tell};
use fathom_trace::jsonl;

use self::contexts::{Stored, current_context};
use crate::abi::*;
use crate::choices::Choices;
use crate::link::Link;
use crate::machine::{Advice, HostKind, visible};
use crate::objects::array::{Array, Mipmap, Object};
use crate::objects::event::Event;
use crate::objects::graph::{Condition, Exec, SharedGraph};
use crate::objects::green::Green;
use crate::objects::handles::Handles;
use crate::objects::pool::{Pool, PoolMemory};
use crate::objects::program::{Callable, Kernel, Library, Loaded};
use crate::objects::stream::Stream;
use crate::objects::user_object::UserObject;
use crate::objects::virtual_memory::{Multicast, Physical, Ranges, Shared};
use crate::queue::{Queue, Run};
use crate::say::{self, say};
use crate::summary::Summary;

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
    pub graphs: Handles<SharedGraph>,
    /// The graph of each node.
    pub nodes: Handles<Handle>,
    pub execs: Handles<Arc<Exec>>,
    pub user_objects: Handles<Arc<UserObject>>,
    /// The conditions of graphs, by the words that hold their values.
    pub conditions: Mutex<BTreeMap<DevicePtr, Condition>>,
    /// What was advised of managed memory, by allocation.
    pub advice: Mutex<BTreeMap<DevicePtr, Advice>>,
    pub queue: Queue,
    pub pools: Handles<Arc<Pool>>,
    /// The default pool of each device, and the one that it allocates from.
    pub default_pools: Vec<Handle>,
    pub current_pools: Mutex<Vec<Handle>>,
    /// The default pools of the host's memory and of managed memory, made when they are asked for.
    pub host_pools: Mutex<Vec<(PoolMemory, Handle)>>,
    /// The pool that the graphs of each device allocate from.
    pub graph_pools: Vec<Handle>,
    /// The pool of each allocation from one, and its length.
    pub pooled: Mutex<BTreeMap<DevicePtr, (Handle, u64)>>,
    pub physical: Handles<Arc<Physical>>,
    pub multicasts: Handles<Arc<Multicast>>,
    pub ranges: Ranges,
    pub shared: Shared,
    pub links: Handles<Arc<Link>>,
    /// Green contexts, and SMs by the descriptions that they are made of.
    pub greens: Handles<Green>,
    pub descriptions: Handles<u32>,
    pub arrays: Handles<Arc<Array>>,
    pub mipmaps: Handles<Arc<Mipmap>>,
    /// Texture and surface objects.
    pub objects: Handles<Object>,
    /// Allocations that the client wants synchronous copies of.
    pub synchronous: Mutex<BTreeSet<DevicePtr>>,
    /// Host memory of the driver: pinned and managed.
    pub host: Mutex<BTreeMap<usize, (std::alloc::Layout, HostKind)>>,
    /// The context of each allocation of device memory.
    pub owners: Mutex<BTreeMap<DevicePtr, Handle>>,
    default_streams: Vec<Stream>,
    summary: Mutex<Summary>,
    /// When it was last saved after a launch.
    saved: Mutex<Option<Instant>>,
    /// Whether it has changed since.
    unsaved: AtomicBool,
    choices: Choices,
    unsupported: Mutex<Vec<String>>,
    trace: Mutex<Option<jsonl::Writer<KernelRecord, std::fs::File>>>,
}

static DRIVER: OnceLock<Driver> = OnceLock::new();
/// Whether this process has called `cuInit`.
static INITIALISED: AtomicBool = AtomicBool::new(false);
/// Whether it was forked from one that had.
static FORKED: AtomicBool = AtomicBool::new(false);

/// The driver; made at the first call from the choices in the environment.
pub(crate) fn driver() -> &'static Driver {
    DRIVER.get_or_init(|| {
        Driver::new(Choices::from_environment()).unwrap_or_else(|error| {
            say!("{error}; emulating an h800");
            Driver::new(Choices::default()).expect("the default preset exists")
        })
    })
}

/// As [`driver`], refusing before `cuInit`, and in a child that was forked behind it: as on
/// hardware a process must initialise the driver itself.
pub(crate) fn initialised() -> R<&'static Driver> {
    if INITIALISED.load(Relaxed) { Ok(driver()) } else { Err(ERROR_NOT_INITIALIZED) }
}

/// `cuInit`; refused in a child of a process that has called it, whose threads are not there.
pub(crate) fn initialise() -> R {
    if FORKED.load(Relaxed) {
        return Err(ERROR_NOT_INITIALIZED);
    }
    let driver = driver();
    if !INITIALISED.swap(true, Relaxed) {
        driver.queue.attend(|| self::driver().save_rest());
        // SAFETY: functions of this library, which is never unloaded; that in the child of a fork
        // only stores to atomics.
        unsafe {
            atexit(at_exit);
            pthread_atfork(None, None, Some(in_forked_child));
        }
    }
    Ok(())
}

extern "C" fn in_forked_child() {
    FORKED.store(true, Relaxed);
    INITIALISED.store(false, Relaxed);
}

impl Driver {
    fn new(choices: Choices) -> Result<Driver, Error> {
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
        let make = |device| pools.insert(Arc::new(Pool::new(PoolMemory::Device(device))));
        let pool_each = || each().map(make).collect();
        let (default_pools, graph_pools): (Vec<Handle>, Vec<Handle>) = (pool_each(), pool_each());
        let run = Run { one: launch::run_one, together: launch::run_together };
        let queue = Queue::new(devices.len() > 1, run);
        let stream = |device| Stream {
            handle: 0,
            device,
            capture: Arc::default(),
            flags: 0,
            priority: 0,
            green: 0,
        };
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
            multicasts: Handles::new(),
            ranges: Mutex::default(),
            shared: Mutex::default(),
            links: Handles::new(),
            greens: Handles::new(),
            descriptions: Handles::new(),
            arrays: Handles::new(),
            mipmaps: Handles::new(),
            objects: Handles::new(),
            synchronous: Mutex::default(),
            host: Mutex::default(),
            owners: Mutex::default(),
            summary: Mutex::default(),
            saved: Mutex::default(),
            unsaved: AtomicBool::new(false),
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

    /// How many devices the machine has.
    pub(crate) fn in_the_machine(&self) -> usize {
        self.choices.devices.max(1)
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

    /// The error that an earlier kernel left, if any.
    pub(crate) fn error(&self) -> R {
        match self.sticky.load(Relaxed) {
            SUCCESS => Ok(()),
            error => Err(error),
        }
    }

    /// Emulated time of a device in nanoseconds.
    pub(crate) fn now_ns(&self, device: usize) -> u64 {
        self.clocks[device].load(Relaxed)
    }

    /// Lets a device's emulated clock advance.
    pub(crate) fn advance(&self, device: usize, ns: u64) {
        self.clocks[device].fetch_add(ns, Relaxed);
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

/// Runs what is left when the process ends.
extern "C" fn at_exit() {
    let _ = std::panic::catch_unwind(|| {
        // Not in a forked child: the work is its parent's.
        let Ok(driver) = initialised() else { return };
        let _ = driver.wait_for_all();
        driver.save_rest();
    });
}

unsafe extern "C" {
    fn atexit(function: extern "C" fn()) -> i32;
    fn pthread_atfork(
        prepare: Option<extern "C" fn()>,
        parent: Option<extern "C" fn()>,
        child: Option<extern "C" fn()>,
    ) -> i32;
}
