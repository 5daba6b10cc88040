//! NVML as far as programs ask it which devices there are: names, identifiers, memory, versions.
//!
//! It is this library under the name libnvidia-ml.so.1. Boards have fans, clocks, temperatures and
//! errors; emulated ones have not, and the functions for those are not here. As with NVIDIA's, all
//! devices are listed, whatever CUDA_VISIBLE_DEVICES says.

use std::ffi::{CStr, c_char, c_int};
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};

use fathom_emulator::Preset;

use crate::abi::Handle;
use crate::api::put;
use crate::driver::{Driver, driver};
use crate::machine;

/// `nvmlReturn_t`.
type Return = c_int;
const SUCCESS: Return = 0;
const UNINITIALIZED: Return = 1;
const INVALID_ARGUMENT: Return = 2;
const NOT_SUPPORTED: Return = 3;
const NOT_FOUND: Return = 6;
const INSUFFICIENT_SIZE: Return = 7;
const UNKNOWN: Return = 999;

/// How often it was initialised and not yet shut down.
static USERS: AtomicU32 = AtomicU32::new(0);

type N<T = ()> = Result<T, Return>;

/// The driver, where NVML is initialised.
fn users_driver() -> N<&'static Driver> {
    if USERS.load(Relaxed) == 0 { Err(UNINITIALIZED) } else { Ok(driver()) }
}

/// Number of a device in the machine: handles are one more.
fn index(device: Handle) -> N<usize> {
    let count = users_driver()?.in_the_machine();
    device.checked_sub(1).filter(|index| *index < count).ok_or(INVALID_ARGUMENT)
}

fn preset(device: Handle) -> N<&'static Preset> {
    index(device)?;
    Ok(driver().devices[0].preset())
}

fn uuid(index: usize) -> String {
    machine::uuid_text(index as i32)
}

/// Domain, bus, device.
fn pci(index: usize) -> [u32; 3] {
    [0, machine::pci_bus(index as i32) as u32, 0]
}

/// NVIDIA's number as a vendor on the PCI bus; emulated devices have none of their own.
const VENDOR: u32 = 0x10de;

/// `nvmlPciInfo_t`.
#[repr(C)]
pub(crate) struct PciInfo {
    legacy: [u8; 16],
    at: [u32; 3],
    device_id: u32,
    subsystem_id: u32,
    bus_id: [u8; 32],
}

/// `nvmlPciInfoExt_v1_t`.
#[repr(C)]
pub(crate) struct PciInfoExt {
    version: u32,
    at: [u32; 3],
    device_id: u32,
    subsystem_id: u32,
    class: [u32; 2],
    bus_id: [u8; 32],
}

fn padded<const N: usize>(words: &str) -> [u8; N] {
    let mut padded = [0; N];
    let count = words.len().min(N - 1);
    padded[..count].copy_from_slice(&words.as_bytes()[..count]);
    padded
}

fn bus_id([domain, bus, device]: [u32; 3]) -> String {
    format!("{domain:08X}:{bus:02X}:{device:02X}.0")
}

/// A result where the client wants it.
///
/// # Safety
/// `to` is null or the client's.
unsafe fn give<T>(to: *mut T, value: T) -> N {
    // SAFETY: the caller's promise.
    unsafe { put(to, value) }.map_err(|_| INVALID_ARGUMENT)
}

/// # Safety
/// `to` has room for `room` bytes.
unsafe fn give_text(to: *mut c_char, room: u32, words: &str) -> N {
    if to.is_null() {
        return Err(INVALID_ARGUMENT);
    }
    if words.len() >= room as usize {
        return Err(INSUFFICIENT_SIZE);
    }
    // SAFETY: within the client's room.
    unsafe {
        std::ptr::copy_nonoverlapping(words.as_ptr(), to.cast(), words.len());
        to.add(words.len()).write(0);
    }
    Ok(())
}

/// # Safety
/// `text` is null or NUL-terminated.
unsafe fn asked<'a>(text: *const c_char) -> N<std::borrow::Cow<'a, str>> {
    if text.is_null() {
        return Err(INVALID_ARGUMENT);
    }
    // SAFETY: the caller's promise.
    Ok(unsafe { CStr::from_ptr(text) }.to_string_lossy())
}

fn begin() -> N {
    USERS.fetch_add(1, Relaxed);
    Ok(())
}

fn count(count: *mut u32) -> N {
    // SAFETY: the client's.
    unsafe { give(count, users_driver()?.in_the_machine() as u32) }
}

fn by_index(wanted: u32, device: *mut Handle) -> N {
    let handle = wanted as usize + 1;
    index(handle)?;
    // SAFETY: the client's.
    unsafe { give(device, handle) }
}

/// The device for which a text is right.
fn by(device: *mut Handle, is: impl Fn(usize) -> bool) -> N {
    let found = (0..users_driver()?.in_the_machine()).find(|index| is(*index)).ok_or(NOT_FOUND)?;
    // SAFETY: the client's.
    unsafe { give(device, found + 1) }
}

fn by_bus(id: *const c_char, device: *mut Handle) -> N {
    // SAFETY: the client's.
    let id = unsafe { asked(id) }?;
    let number = |text: &str| u32::from_str_radix(text, 16).ok();
    let parts: Vec<Option<u32>> = id.split([':', '.']).map(number).collect();
    by(device, |index| {
        let [domain, bus, own] = pci(index).map(Some);
        match parts[..] {
            [a, b, c, _] => [a, b, c] == [domain, bus, own],
            [b, c, _] => [b, c] == [bus, own],
            _ => false,
        }
    })
}

fn pci_info(device: Handle, info: *mut PciInfo) -> N {
    let at = pci(index(device)?);
    let id = bus_id(at);
    // SAFETY: the client's.
    unsafe {
        give(
            info,
            PciInfo {
                legacy: padded(&id[4..]),
                at,
                device_id: VENDOR,
                subsystem_id: 0,
                bus_id: padded(&id),
            },
        )
    }
}

/// Total, free and used bytes.
fn memory(device: Handle) -> N<[u64; 3]> {
    let total = preset(device)?.memory_bytes;
    let own = driver().visible.iter().position(|v| *v as usize + 1 == device);
    let used = own.map_or(0, |own| driver().devices[own].memory().usage(own as u32).0);
    Ok([total, total.saturating_sub(used), used])
}

/// The CUDA version; `nvmlSystemGetCudaDriverVersion` has it twice.
fn cuda_version(version: *mut c_int) -> N {
    users_driver()?;
    // SAFETY: the client's.
    unsafe { give(version, machine::CUDA_VERSION) }
}

/// The version of this driver: Fathom's.
const OWN_VERSION: &str = env!("CARGO_PKG_VERSION");

macro_rules! functions {
    ($(fn $name:ident($($arg:ident: $type:ty),* $(,)?) $body:block)*) => {
        $(
            #[unsafe(no_mangle)]
            #[allow(non_snake_case, unused_unsafe)]
            pub(crate) unsafe extern "C" fn $name($($arg: $type),*) -> Return {
                // SAFETY: pointers are the client's, valid as nvml.h documents them.
                let body = || -> N { unsafe { $body } };
                match std::panic::catch_unwind(std::panic::AssertUnwindSafe(body)) {
                    Ok(result) => result.err().unwrap_or(SUCCESS),
                    Err(_) => UNKNOWN,
                }
            }
        )*
    };
}

functions! {
    fn nvmlInit() { begin() }

    fn nvmlInit_v2() { begin() }

    fn nvmlInitWithFlags(flags: u32) {
        let _ = flags;
        begin()
    }

    fn nvmlShutdown() {
        let one_less = |users: u32| users.checked_sub(1);
        USERS.fetch_update(Relaxed, Relaxed, one_less).map(|_| ()).map_err(|_| UNINITIALIZED)
    }

    fn nvmlSystemGetDriverVersion(version: *mut c_char, room: u32) {
        users_driver()?;
        give_text(version, room, OWN_VERSION)
    }

    fn nvmlSystemGetNVMLVersion(version: *mut c_char, room: u32) {
        users_driver()?;
        give_text(version, room, &format!("{}.{OWN_VERSION}", machine::CUDA_VERSION / 1000))
    }

    // Drivers of boards have branches; a program that asks sees that this is none.
    fn nvmlSystemGetDriverBranch(branch: *mut c_char, room: u32) {
        let _ = (branch, room);
        users_driver()?;
        Err(NOT_SUPPORTED)
    }

    fn nvmlSystemGetCudaDriverVersion(version: *mut c_int) { cuda_version(version) }

    fn nvmlSystemGetCudaDriverVersion_v2(version: *mut c_int) { cuda_version(version) }

    fn nvmlDeviceGetCount(number: *mut u32) { count(number) }

    fn nvmlDeviceGetCount_v2(number: *mut u32) { count(number) }

    fn nvmlDeviceGetHandleByIndex(index: u32, device: *mut Handle) { by_index(index, device) }

    fn nvmlDeviceGetHandleByIndex_v2(index: u32, device: *mut Handle) { by_index(index, device) }

    fn nvmlDeviceGetHandleByUUID(text: *const c_char, device: *mut Handle) {
        let wanted = asked(text)?;
        by(device, |index| uuid(index) == wanted)
    }

    fn nvmlDeviceGetHandleByPciBusId(id: *const c_char, device: *mut Handle) { by_bus(id, device) }

    fn nvmlDeviceGetHandleByPciBusId_v2(id: *const c_char, device: *mut Handle) {
        by_bus(id, device)
    }

    fn nvmlDeviceGetIndex(device: Handle, number: *mut u32) { give(number, index(device)? as u32) }

    fn nvmlDeviceGetMinorNumber(device: Handle, number: *mut u32) {
        give(number, index(device)? as u32)
    }

    fn nvmlDeviceGetName(device: Handle, name: *mut c_char, room: u32) {
        give_text(name, room, &preset(device)?.name)
    }

    fn nvmlDeviceGetUUID(device: Handle, text: *mut c_char, room: u32) {
        give_text(text, room, &uuid(index(device)?))
    }

    fn nvmlDeviceGetPciInfo(device: Handle, info: *mut PciInfo) { pci_info(device, info) }

    fn nvmlDeviceGetPciInfo_v2(device: Handle, info: *mut PciInfo) { pci_info(device, info) }

    fn nvmlDeviceGetPciInfo_v3(device: Handle, info: *mut PciInfo) { pci_info(device, info) }

    fn nvmlDeviceGetPciInfoExt(device: Handle, info: *mut PciInfoExt) {
        const VERSION: u32 = 1 << 24 | size_of::<PciInfoExt>() as u32;
        let at = pci(index(device)?);
        if info.is_null() || (*info).version != VERSION {
            return Err(INVALID_ARGUMENT);
        }
        // A controller for 3D.
        let class = [3, 2];
        let bus_id = padded(&bus_id(at));
        give(info, PciInfoExt { version: VERSION, at, device_id: VENDOR, subsystem_id: 0, class, bus_id })
    }

    fn nvmlDeviceGetMemoryInfo(device: Handle, info: *mut [u64; 3]) {
        give(info, memory(device)?)
    }

    // Version, total, reserved, free, used.
    fn nvmlDeviceGetMemoryInfo_v2(device: Handle, info: *mut [u64; 5]) {
        const VERSION: u32 = 2 << 24 | size_of::<[u64; 5]>() as u32;
        let [total, free, used] = memory(device)?;
        if info.is_null() || (*info)[0] as u32 != VERSION {
            return Err(INVALID_ARGUMENT);
        }
        give(info, [u64::from(VERSION), total, 0, free, used])
    }

    fn nvmlDeviceGetCudaComputeCapability(device: Handle, major: *mut c_int, minor: *mut c_int) {
        let [a, b] = preset(device)?.compute_capability;
        give(major, a as c_int)?;
        give(minor, b as c_int)
    }

    // All devices are peers of one another, for reads, writes and atomics: `NVML_P2P_STATUS_OK`.
    fn nvmlDeviceGetP2PStatus(a: Handle, b: Handle, what: u32, status: *mut u32) {
        let _ = (index(a)?, index(b)?, what);
        give(status, 0)
    }

    // Boards since Hopper have PCIe 5.0, A100 4.0, all with 16 lanes.
    fn nvmlDeviceGetCurrPcieLinkGeneration(device: Handle, generation: *mut u32) {
        give(generation, if preset(device)?.compute_capability[0] >= 9 { 5 } else { 4 })
    }

    fn nvmlDeviceGetCurrPcieLinkWidth(device: Handle, lanes: *mut u32) {
        index(device)?;
        give(lanes, 16)
    }

    // `NVML_DEVICE_ARCH_*`: Ampere, Ada, Hopper, Blackwell.
    fn nvmlDeviceGetArchitecture(device: Handle, architecture: *mut u32) {
        give(architecture, match preset(device)?.compute_capability {
            [8, 9] => 8,
            [8, _] => 7,
            [9, _] => 9,
            _ => 10,
        })
    }
}

/// Functions that say of every device that it has no such thing; NCCL calls them without looking
/// whether they are there.
macro_rules! not_supported {
    ($($name:ident)*) => {
        $(
            #[unsafe(no_mangle)]
            #[allow(non_snake_case)]
            pub(crate) extern "C" fn $name() -> Return {
                NOT_SUPPORTED
            }
        )*
    };
}

not_supported! {
    nvmlDeviceGetFieldValues
    nvmlDeviceGetGpuFabricInfoV
    nvmlDeviceGetMemoryErrorCounter
    nvmlDeviceGetNvLinkCapability
    nvmlDeviceGetNvLinkRemoteDeviceType
    nvmlDeviceGetNvLinkRemotePciInfo
    nvmlDeviceGetNvLinkRemotePciInfo_v2
    nvmlDeviceGetNvLinkState
    nvmlDeviceGetPcieLinkMaxSpeed
    nvmlDeviceGetPlatformInfo
    nvmlSystemGetConfComputeSettings
    nvmlSystemGetConfComputeState
}

/// `nvmlErrorString`.
#[unsafe(no_mangle)]
#[allow(non_snake_case)]
pub(crate) extern "C" fn nvmlErrorString(code: Return) -> *const c_char {
    let words = match code {
        SUCCESS => c"success",
        UNINITIALIZED => c"NVML is not initialised",
        INVALID_ARGUMENT => c"an argument is invalid",
        NOT_SUPPORTED => c"not supported by the emulated driver",
        NOT_FOUND => c"not found",
        INSUFFICIENT_SIZE => c"the room is too small",
        _ => c"unknown error",
    };
    words.as_ptr()
}
