//! `cuGetExportTable`: the tables of functions behind cuda.h that the CUDA runtime and libraries
//! ask the driver for.
//!
//! They are undocumented. What stands here was found by running the runtimes of CUDA 12 and 13,
//! with ZLUDA's public notes as the map. A slot that nobody knows names itself and refuses.

use std::ffi::c_void;
use std::sync::OnceLock;

use super::context::of_client;
use super::device::{VERSION, pci_bus, uuid};
use super::{border, entry_points, put};
use crate::abi::*;
use crate::driver::contexts::Destructor;
use crate::driver::initialised;
use crate::driver_check::{DeviceId, Question, answer};
use crate::say::say;

/// What a table is made of.
struct Layout {
    /// The identifier in hexadecimal digits.
    id: &'static str,
    /// Words of the table.
    words: usize,
    /// Whether the first word is the table's length in bytes.
    sized: bool,
    known: &'static [(usize, Slot)],
}

/// A function in a table.
struct Slot(*const c_void);

// SAFETY: the address is that of a function.
unsafe impl Sync for Slot {}

/// The runtime's own table, and that of its check of the driver.
const RUNTIME: &str = "6BD5FB6C5BF4E74A8987D93912FD9DF9";
const DRIVER_CHECK: &str = "D4082055BDE6704B8D34BA123C66E1F2";

static LAYOUTS: &[Layout] = &[
    Layout {
        id: "C693336E1121DF11A8C368F355D89593",
        words: 4,
        sized: false,
        known: &[
            (0, Slot(storage_put as *const c_void)),
            (1, Slot(storage_delete as *const c_void)),
            (2, Slot(storage_get as *const c_void)),
        ],
    },
    Layout {
        id: "42D85A8123F6CB478298F6E78A3AECDC",
        words: 4,
        sized: true,
        known: &[(2, Slot(super::context::cuCtxGetCurrent as *const c_void))],
    },
    Layout {
        id: "A094798C2E742E7493F20800200C0A66",
        words: 7,
        sized: true,
        known: &[
            (2, Slot(buffer_of_pointers as *const c_void)),
            (6, Slot(buffer_of_bytes as *const c_void)),
        ],
    },
    Layout {
        id: RUNTIME,
        words: 16,
        sized: true,
        known: &[
            (1, Slot(module_of_wrapper as *const c_void)),
            (2, Slot(primary_context as *const c_void)),
            (6, Slot(module_of_wrapper_ex as *const c_void)),
            (7, Slot(nothing as *const c_void)),
            (8, Slot(module_of_fatbinary as *const c_void)),
            (12, Slot(success as *const c_void)),
        ],
    },
    Layout {
        id: DRIVER_CHECK,
        words: 3,
        sized: true,
        known: &[(1, Slot(driver_check as *const c_void))],
    },
    Layout {
        id: "21318C60971432488CA641FF7324C8F2",
        words: 93,
        sized: true,
        known: &[
            (4, Slot(super::context::cuCtxGetId as *const c_void)),
            (39, Slot(stream_number as *const c_void)),
            (51, Slot(stream_of_handle as *const c_void)),
        ],
    },
    Layout {
        id: "263E88607CD2614392F6BBD5006DFA7E",
        words: 4,
        sized: true,
        known: &[(2, Slot(context_check as *const c_void)), (3, Slot(success as *const c_void))],
    },
];

/// Words of the longest table.
const MOST_WORDS: usize = 96;

/// A slot that nobody knows.
extern "C" fn unknown<const SLOT: usize>() -> CuResult {
    say!("slot {SLOT} of an export table is not supported");
    ERROR_NOT_SUPPORTED
}

/// Slots `16 * $high + 0..16` for each `$high`.
macro_rules! unknown_slots {
    ($($high:literal)*) => {
        [$(unknown_slots!(row $high: 0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15)),*]
    };
    (row $high:literal: $($low:literal)*) => {
        [$(unknown::<{ 16 * $high + $low }> as extern "C" fn() -> CuResult),*]
    };
}

static UNKNOWN: [[extern "C" fn() -> CuResult; 16]; MOST_WORDS / 16] = unknown_slots!(0 1 2 3 4 5);

extern "C" fn nothing() {}

unsafe extern "C" fn driver_check(version: u32, unix_seconds: u64, to: *mut [u64; 2]) -> CuResult {
    border("the runtime's check of the driver", || {
        let driver = initialised()?;
        let table = |id: &str| tables().iter().zip(LAYOUTS).find(|(_, l)| l.id == id);
        let address = |id| table(id).map_or(0, |(table, _)| table.as_ptr() as u64);
        let question = Question {
            driver_version: VERSION as u32,
            version,
            process: std::process::id(),
            // SAFETY: it has no preconditions.
            thread: unsafe { pthread_self() } as u32,
            addresses: [address(RUNTIME), address(DRIVER_CHECK), driver_check as *const () as u64],
            unix_seconds,
        };
        let devices: Vec<DeviceId> = (0..driver.devices.len() as i32)
            .map(|device| DeviceId { uuid: uuid(device), pci: [0, pci_bus(device), 0] })
            .collect();
        // SAFETY: the client's pointer.
        unsafe { put(to, answer(&question, &devices)) }
    })
}

unsafe extern "C" {
    fn pthread_self() -> usize;
}

extern "C" fn success() -> CuResult {
    SUCCESS
}

unsafe extern "C" fn storage_put(
    context: Handle,
    key: usize,
    value: usize,
    destructor: Option<Destructor>,
) -> CuResult {
    border("context-local storage", || {
        let context = of_client(context)?;
        let mut storage = initialised()?.storage.lock().expect("no panic holds this lock");
        storage.insert((context, key), (value, destructor));
        Ok(())
    })
}

unsafe extern "C" fn storage_delete(context: Handle, key: usize) -> CuResult {
    border("context-local storage", || {
        let context = of_client(context)?;
        let mut storage = initialised()?.storage.lock().expect("no panic holds this lock");
        storage.remove(&(context, key)).map(|_| ()).ok_or(ERROR_INVALID_HANDLE)
    })
}

unsafe extern "C" fn storage_get(value: *mut usize, context: Handle, key: usize) -> CuResult {
    border("context-local storage", || {
        let context = of_client(context)?;
        let storage = initialised()?.storage.lock().expect("no panic holds this lock");
        let found = storage.get(&(context, key)).ok_or(ERROR_INVALID_HANDLE)?.0;
        // SAFETY: the client's pointer.
        unsafe { put(value, found) }
    })
}

/// Memory that the runtime keeps flags of its tools in.
#[repr(align(16))]
struct Room<const N: usize>(std::cell::UnsafeCell<[usize; N]>);

// SAFETY: only the client touches it.
unsafe impl<const N: usize> Sync for Room<N> {}

static POINTERS: Room<1024> = Room(std::cell::UnsafeCell::new([0; 1024]));
static BYTES: Room<14> = Room(std::cell::UnsafeCell::new([0; 14]));

unsafe extern "C" fn buffer_of_pointers(to: *mut *mut c_void, words: *mut usize) {
    // SAFETY: the client's pointers.
    let _ = unsafe { put(to, POINTERS.0.get().cast()).and(put(words, 1024)) };
}

unsafe extern "C" fn buffer_of_bytes(to: *mut *mut c_void, words: *mut usize) {
    // SAFETY: the client's pointers.
    let _ = unsafe { put(to, BYTES.0.get().cast()).and(put(words, 14)) };
}

unsafe extern "C" fn module_of_wrapper(module: *mut Handle, image: *const u8) -> CuResult {
    // SAFETY: the client's pointers.
    unsafe { super::module::cuModuleLoadData(module, image) }
}

unsafe extern "C" fn module_of_wrapper_ex(
    module: *mut Handle,
    image: *const u8,
    options: *const c_void,
    values: *const c_void,
    count: u32,
) -> CuResult {
    let _ = (options, values, count);
    // SAFETY: the client's pointers.
    unsafe { super::module::cuModuleLoadData(module, image) }
}

unsafe extern "C" fn module_of_fatbinary(
    image: *const u8,
    module: *mut Handle,
    options: *const c_void,
    values: *const c_void,
    count: u32,
) -> CuResult {
    let _ = (options, values, count);
    // SAFETY: the client's pointers.
    unsafe { super::module::cuModuleLoadData(module, image) }
}

unsafe extern "C" fn primary_context(context: *mut Handle, device: i32) -> CuResult {
    border("primary context", || {
        let driver = initialised()?;
        driver.device(device)?;
        // SAFETY: the client's pointer.
        unsafe { put(context, driver.primary_context(device as usize)) }
    })
}

unsafe extern "C" fn context_check(
    context: Handle,
    flags: *mut u32,
    data: *mut *const c_void,
) -> CuResult {
    let _ = (context, data);
    // SAFETY: the client's pointer.
    border("context check", || unsafe { put(flags, 0) })
}

/// cuBLAS keeps what it has of a stream by the stream and its number.
unsafe extern "C" fn stream_of_handle(
    context: Handle,
    stream: Handle,
    found: *mut Handle,
    per_thread: u32,
) -> CuResult {
    let _ = (context, per_thread);
    // SAFETY: the client's pointer.
    border("stream of a handle", || unsafe { put(found, stream) })
}

unsafe extern "C" fn stream_number(context: Handle, stream: Handle, number: *mut u64) -> CuResult {
    let _ = context;
    // SAFETY: the client's pointer.
    unsafe { super::stream::cuStreamGetId(stream, number) }
}

/// The tables, in the order of their layouts.
fn tables() -> &'static [Vec<usize>] {
    static TABLES: OnceLock<Vec<Vec<usize>>> = OnceLock::new();
    TABLES.get_or_init(|| {
        let table = |layout: &Layout| {
            let mut table: Vec<usize> =
                UNKNOWN.as_flattened()[..layout.words].iter().map(|f| *f as usize).collect();
            if layout.sized {
                table[0] = size_of_val(&table[..]);
            }
            layout.known.iter().for_each(|(at, slot)| table[*at] = slot.0 as usize);
            table
        };
        LAYOUTS.iter().map(table).collect()
    })
}

entry_points! {
    fn cuGetExportTable(table: *mut *const c_void, id: *const [u8; 16]) {
        if id.is_null() {
            return Err(ERROR_INVALID_VALUE);
        }
        let id: String = (*id).iter().map(|byte| format!("{byte:02X}")).collect();
        match LAYOUTS.iter().position(|layout| layout.id == id) {
            Some(at) => put(table, tables()[at].as_ptr().cast()),
            None => {
                put(table, std::ptr::null())?;
                Err(ERROR_INVALID_VALUE)
            }
        }
    }
}
