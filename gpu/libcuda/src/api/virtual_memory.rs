//! Virtual memory: physical memory, addresses, and the one mapped at the other; memory and events
//! that processes share.
//!
//! What may be shared lies in a file that both processes map: a temporary one without a name
//! whose descriptor travels (`cuMemExportToShareableHandle`), or one in the folder of the emulated
//! run whose number travels (`cuIpcGetMemHandle`).

use std::collections::BTreeMap;
use std::fs::File;
use std::os::fd::{AsRawFd, FromRawFd, IntoRawFd};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Condvar, Mutex};

use fathom_emulator::memory::Piece;
use memmap2::{MmapOptions, MmapRaw};

use super::{entry_points, put};
use crate::abi::*;
use crate::driver::{Driver, driver, initialised};
use crate::objects::event::{Event, SharedEvent};
use crate::objects::virtual_memory::{
    Bound, Mapped, Mapping, Multicast, Physical, Properties, Range, pieces,
};
use crate::say::say;

/// `CU_MEM_ALLOCATION_TYPE_PINNED`, `CU_MEM_LOCATION_TYPE_DEVICE`,
/// `CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR`.
const PINNED: u32 = 1;
const DEVICE: u32 = 1;
const FILE_DESCRIPTOR: u32 = 1;

fn no_memory(error: std::io::Error) -> CuResult {
    say!("mapping memory: {error}");
    ERROR_OUT_OF_MEMORY
}

/// Changes the reserved range that holds `at`, and tells the emulator.
fn with_range(at: DevicePtr, change: impl FnOnce(usize, &mut Range) -> R) -> R {
    let driver = initialised()?;
    driver.wait_for_all()?;
    let mut ranges = driver.ranges.lock().expect("no panic holds this lock");
    let (base, range) = ranges.range_mut(..=at).next_back().ok_or(ERROR_INVALID_VALUE)?;
    let offset = (at - base) as usize;
    if offset >= range.bytes {
        return Err(ERROR_INVALID_VALUE);
    }
    change(offset, range)?;
    range.publish(driver.devices[0].memory(), *base);
    Ok(())
}

/// A file that has no name.
fn nameless() -> std::io::Result<File> {
    let path = shared_path(u64::from(std::process::id()), NEXT_FILE.fetch_add(1, Relaxed));
    let file = File::options().read(true).write(true).create_new(true).open(&path)?;
    std::fs::remove_file(&path)?;
    Ok(file)
}

static NEXT_FILE: AtomicU64 = AtomicU64::new(1);

/// A file of the emulated run that all its processes reach.
fn shared_path(process: u64, number: u64) -> PathBuf {
    driver().shared_folder().join(format!("fathom-shared-{process}-{number}"))
}

/// The counters of an event that other processes may open.
pub(super) fn new_shared_event() -> R<SharedEvent> {
    let (process, number) = (u64::from(std::process::id()), NEXT_FILE.fetch_add(1, Relaxed));
    SharedEvent::open(&shared_path(process, number), (process, number), true)
}

/// What a handle of 64 bytes says: the process and number of a file, and a place in it.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct IpcHandle {
    magic: u64,
    process: u64,
    number: u64,
    bytes: u64,
    offset: u64,
    device: u64,
    rest: [u64; 2],
}

const IPC_MAGIC: u64 = 0x6d6f_6874_6166_0001;

/// Puts an allocation into a file, where it is not in one yet; the file's number.
fn share(driver: &Driver, base: DevicePtr, bytes: u64, device: u32) -> R<u64> {
    let mut shared = driver.shared.lock().expect("no panic holds this lock");
    if let Some(number) = shared.get(&base) {
        return Ok(*number);
    }
    driver.wait_for_all()?;
    let number = NEXT_FILE.fetch_add(1, Relaxed);
    let path = shared_path(u64::from(std::process::id()), number);
    let memory = driver.devices[0].memory();
    let move_there = || -> std::io::Result<Arc<MmapRaw>> {
        let file = File::options().read(true).write(true).create_new(true).open(&path)?;
        file.set_len(bytes.next_multiple_of(4))?;
        Ok(Arc::new(MmapOptions::new().map_raw(&file)?))
    };
    let map = move_there().map_err(no_memory)?;
    let mut part = vec![0; (1 << 20).min(bytes as usize)];
    for at in (0..bytes).step_by(part.len()) {
        let length = part.len().min((bytes - at) as usize);
        memory.read(base + at, &mut part[..length]).map_err(|_| ERROR_INVALID_VALUE)?;
        // SAFETY: within the mapping, which nobody else knows yet.
        let to = unsafe { map.as_mut_ptr().add(at as usize) };
        // SAFETY: as above.
        unsafe { std::ptr::copy_nonoverlapping(part.as_ptr(), to, length) };
    }
    memory.map(device, base, bytes, pieces(&map, 0, bytes.next_multiple_of(4) as usize));
    shared.insert(base, number);
    Ok(number)
}

/// `CUmulticastObjectProp`.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct MulticastProperties {
    count: u32,
    bytes: usize,
    handle_types: u64,
    flags: u64,
}

/// The memory that was mapped by hand at an address.
fn mapped_at(address: DevicePtr, bytes: usize) -> R<Bound> {
    let ranges = initialised()?.ranges.lock().expect("no panic holds this lock");
    let (base, range) = ranges.range(..=address).next_back().ok_or(ERROR_INVALID_VALUE)?;
    let inside = (address - base) as usize;
    let mapped = range.mapped.range(..=inside).next_back();
    let (begin, mapping) = mapped.ok_or(ERROR_INVALID_VALUE)?;
    let Mapped::Memory(memory) = mapping.what.clone() else { return Err(ERROR_INVALID_VALUE) };
    if inside - begin + bytes > mapping.bytes {
        return Err(ERROR_INVALID_VALUE);
    }
    Ok(Bound { memory, offset: mapping.offset + inside - begin, bytes })
}

/// Lets memory of a device lie behind a multicast object.
fn bind(handle: Handle, asked: Option<i32>, at: usize, bound: Bound, flags: u64) -> R {
    let multicast = initialised()?.multicasts.get(handle)?;
    let device = bound.memory.properties.location[1];
    if flags != 0 || asked.is_some_and(|asked| asked != device as i32) {
        return Err(ERROR_INVALID_VALUE);
    }
    if !multicast.is_complete() {
        return Err(ERROR_ILLEGAL_STATE);
    }
    let mut team = multicast.team.lock().expect("no panic holds this lock");
    let whole =
        [at, bound.offset, bound.bytes].iter().all(|n| n.is_multiple_of(Piece::BYTES as usize));
    let fits = bound.bytes > 0
        && at + bound.bytes <= multicast.bytes
        && bound.offset + bound.bytes <= bound.memory.bytes;
    let mut others = team.bound.range((device, 0)..(device, at + bound.bytes));
    let overlaps = others.any(|((_, begin), other)| begin + other.bytes > at);
    if !whole || !fits || overlaps || !team.devices.contains(&device) {
        return Err(ERROR_INVALID_VALUE);
    }
    team.bound.insert((device, at), bound);
    drop(team);
    publish(&multicast)
}

/// Tells the emulator of the addresses that an object is mapped at.
fn publish(multicast: &Arc<Multicast>) -> R {
    let driver = initialised()?;
    driver.wait_for_all()?;
    let ranges = driver.ranges.lock().expect("no panic holds this lock");
    for (base, range) in ranges.iter() {
        let here = |mapping: &Mapping| matches!(&mapping.what, Mapped::Multicast(other) if Arc::ptr_eq(other, multicast));
        if range.mapped.values().any(here) {
            range.publish(driver.devices[0].memory(), *base);
        }
    }
    Ok(())
}

entry_points! {
    fn cuIpcGetEventHandle(handle: *mut IpcHandle, event: Handle) {
        let event = initialised()?.events.get(event)?;
        let shared = event.shared.as_ref().ok_or(ERROR_INVALID_HANDLE)?;
        let (process, number) = (shared.process, shared.number);
        put(handle, IpcHandle {
            magic: IPC_MAGIC,
            process,
            number,
            bytes: 8,
            offset: 0,
            device: 0,
            rest: [0; 2],
        })
    }

    fn cuIpcOpenEventHandle(event: *mut Handle, handle: IpcHandle) {
        if handle.magic != IPC_MAGIC {
            return Err(ERROR_INVALID_VALUE);
        }
        let (process, number) = (handle.process, handle.number);
        let path = shared_path(process, number);
        let shared = SharedEvent::open(&path, (process, number), false)?;
        put(event, initialised()?.events.insert(Arc::new(Event::new(false, Some(shared)))))
    }

    fn cuMemGetAllocationGranularity(
        granularity: *mut usize,
        properties: *const Properties,
        option: u32,
    ) {
        let _ = (properties, option);
        put(granularity, Piece::BYTES as usize)
    }

    fn cuMemCreate(
        handle: *mut Handle,
        bytes: usize,
        properties: *const Properties,
        flags: u64,
    ) {
        let driver = initialised()?;
        let properties = *properties.as_ref().ok_or(ERROR_INVALID_VALUE)?;
        let whole = bytes > 0 && bytes.is_multiple_of(Piece::BYTES as usize);
        if properties.kind != PINNED || !whole || flags != 0 {
            return Err(ERROR_INVALID_VALUE);
        }
        if properties.location[0] != DEVICE || properties.handle_types & !FILE_DESCRIPTOR != 0 {
            driver.name_unsupported("cuMemCreate on the host, or for other processes by a fabric");
            return Err(ERROR_NOT_SUPPORTED);
        }
        driver.device(properties.location[1] as i32)?;
        let (map, file) = if properties.handle_types & FILE_DESCRIPTOR != 0 {
            let file = nameless().map_err(no_memory)?;
            file.set_len(bytes as u64).map_err(no_memory)?;
            (MmapOptions::new().map_raw(&file).map_err(no_memory)?, Some(file))
        } else {
            (MmapOptions::new().len(bytes).map_anon().map_err(no_memory)?.into(), None)
        };
        let physical = Physical { properties, bytes, map: Arc::new(map), file };
        put(handle, driver.physical.insert(Arc::new(physical)))
    }

    fn cuMemRelease(handle: Handle) {
        let driver = initialised()?;
        let multicast = driver.multicasts.remove(handle).map(|_| ());
        multicast.or_else(|_| driver.physical.remove(handle).map(|_| ()))
    }

    fn cuMemGetAllocationPropertiesFromHandle(properties: *mut Properties, handle: Handle) {
        put(properties, initialised()?.physical.get(handle)?.properties)
    }

    fn cuMemRetainAllocationHandle(handle: *mut Handle, at: DevicePtr) {
        let driver = initialised()?;
        let ranges = driver.ranges.lock().expect("no panic holds this lock");
        let (base, range) = ranges.range(..=at).next_back().ok_or(ERROR_INVALID_VALUE)?;
        let mapped = range.mapped.range(..=(at - base) as usize).next_back();
        let (_, mapping) = mapped.ok_or(ERROR_INVALID_VALUE)?;
        put(handle, match mapping.what.clone() {
            Mapped::Memory(physical) => driver.physical.insert(physical),
            Mapped::Multicast(multicast) => driver.multicasts.insert(multicast),
        })
    }

    fn cuMemAddressReserve(
        at: *mut DevicePtr,
        bytes: usize,
        align: usize,
        hint: DevicePtr,
        flags: u64,
    ) {
        let _ = hint;
        let driver = initialised()?;
        let aligned = align == 0 || align.is_power_of_two();
        if bytes == 0 || !bytes.is_multiple_of(Piece::BYTES as usize) || !aligned || flags != 0 {
            return Err(ERROR_INVALID_VALUE);
        }
        let base = driver.devices[0].memory().reserve(0, bytes as u64, align.max(1) as u64);
        let range = Range { device: 0, bytes, mapped: BTreeMap::new() };
        driver.ranges.lock().expect("no panic holds this lock").insert(base, range);
        put(at, base)
    }

    fn cuMemAddressFree(at: DevicePtr, bytes: usize) {
        let mut ranges = initialised()?.ranges.lock().expect("no panic holds this lock");
        match ranges.get(&at) {
            Some(range) if range.bytes == bytes && range.mapped.is_empty() => {
                ranges.remove(&at);
                Ok(())
            }
            _ => Err(ERROR_INVALID_VALUE),
        }
    }

    fn cuMemMap(at: DevicePtr, bytes: usize, offset: usize, handle: Handle, flags: u64) {
        let driver = initialised()?;
        let (what, room, device) = match driver.multicasts.get(handle) {
            Ok(multicast) => (Mapped::Multicast(multicast.clone()), multicast.bytes, None),
            Err(_) => {
                let physical = driver.physical.get(handle)?;
                let (room, device) = (physical.bytes, physical.properties.location[1]);
                (Mapped::Memory(physical), room, Some(device))
            }
        };
        let whole = [bytes, offset].iter().all(|n| n.is_multiple_of(Piece::BYTES as usize));
        if bytes == 0 || !whole || offset + bytes > room || flags != 0 {
            return Err(ERROR_INVALID_VALUE);
        }
        if let Mapped::Multicast(multicast) = &what
            && !multicast.is_complete()
        {
            return Err(ERROR_ILLEGAL_STATE);
        }
        with_range(at, |place, range| {
            let before = range.mapped.range(..place).next_back();
            let overlaps = before.is_some_and(|(begin, mapping)| begin + mapping.bytes > place)
                || range.mapped.range(place..place + bytes).next().is_some();
            if overlaps || place + bytes > range.bytes {
                return Err(ERROR_INVALID_VALUE);
            }
            range.device = device.unwrap_or(range.device);
            range.mapped.insert(place, Mapping { what, offset, bytes, accessible: false });
            Ok(())
        })
    }

    fn cuMemUnmap(at: DevicePtr, bytes: usize) {
        with_range(at, |place, range| {
            if !range.covers(place, bytes) {
                return Err(ERROR_INVALID_VALUE);
            }
            range.mapped.retain(|begin, _| !(place..place + bytes).contains(begin));
            Ok(())
        })
    }

    // Devices reach each other's memory: access is a matter of the range alone.
    fn cuMemSetAccess(at: DevicePtr, bytes: usize, access: *const [u32; 3], count: usize) {
        let any = (0..count).any(|i| (*access.add(i))[2] != 0);
        with_range(at, |place, range| {
            if !range.covers(place, bytes) {
                return Err(ERROR_INVALID_VALUE);
            }
            let mapped = range.mapped.range_mut(place..place + bytes);
            mapped.for_each(|(_, mapping)| mapping.accessible = any);
            Ok(())
        })
    }

    fn cuMemGetAccess(flags: *mut u64, location: *const [u32; 2], at: DevicePtr) {
        const READ_WRITE: u64 = 3;
        let _ = location;
        let mut accessible = false;
        with_range(at, |place, range| {
            let mapping = range.mapped.range(..=place).next_back().ok_or(ERROR_INVALID_VALUE)?;
            accessible = mapping.1.accessible;
            Ok(())
        })?;
        put(flags, if accessible { READ_WRITE } else { 0 })
    }

    fn cuMemExportToShareableHandle(
        to: *mut i32,
        handle: Handle,
        handle_type: u32,
        flags: u64,
    ) {
        let physical = initialised()?.physical.get(handle)?;
        let file = physical.file.as_ref().ok_or(ERROR_INVALID_VALUE)?;
        if handle_type != FILE_DESCRIPTOR || flags != 0 {
            return Err(ERROR_INVALID_VALUE);
        }
        // The descriptor is the client's, to send and to close.
        put(to, file.try_clone().map_err(|_| ERROR_OPERATING_SYSTEM)?.into_raw_fd())
    }

    fn cuMemImportFromShareableHandle(handle: *mut Handle, from: usize, handle_type: u32) {
        let driver = initialised()?;
        if handle_type != FILE_DESCRIPTOR {
            return Err(ERROR_INVALID_VALUE);
        }
        // SAFETY: the client's descriptor, which is only borrowed.
        let borrowed = std::mem::ManuallyDrop::new(unsafe { File::from_raw_fd(from as i32) });
        if borrowed.as_raw_fd() < 0 {
            return Err(ERROR_INVALID_VALUE);
        }
        let file = borrowed.try_clone().map_err(|_| ERROR_INVALID_VALUE)?;
        let bytes = file.metadata().map_err(|_| ERROR_INVALID_VALUE)?.len() as usize;
        let map = MmapOptions::new().map_raw(&file).map_err(no_memory)?;
        let properties = Properties {
            kind: PINNED,
            handle_types: FILE_DESCRIPTOR,
            location: [DEVICE, 0],
            rest: [0; 2],
        };
        let physical = Physical { properties, bytes, map: Arc::new(map), file: Some(file) };
        put(handle, driver.physical.insert(Arc::new(physical)))
    }

    fn cuMulticastGetGranularity(
        granularity: *mut usize,
        properties: *const MulticastProperties,
        option: u32,
    ) {
        let _ = (properties, option);
        put(granularity, Piece::BYTES as usize)
    }

    fn cuMulticastCreate(handle: *mut Handle, properties: *const MulticastProperties) {
        let driver = initialised()?;
        let &MulticastProperties { count, bytes, handle_types, flags } =
            properties.as_ref().ok_or(ERROR_INVALID_VALUE)?;
        let whole = bytes > 0 && bytes.is_multiple_of(Piece::BYTES as usize);
        if count == 0 || count as usize > driver.devices.len() || !whole || flags != 0 {
            return Err(ERROR_INVALID_VALUE);
        }
        if handle_types != 0 {
            driver.name_unsupported("multicast objects that processes share");
            return Err(ERROR_NOT_SUPPORTED);
        }
        let (count, team, added) = (count as usize, Mutex::default(), Condvar::new());
        put(handle, driver.multicasts.insert(Arc::new(Multicast { count, bytes, team, added })))
    }

    fn cuMulticastAddDevice(handle: Handle, device: i32) {
        let driver = initialised()?;
        let multicast = driver.multicasts.get(handle)?;
        driver.device(device)?;
        let mut team = multicast.team.lock().expect("no panic holds this lock");
        let known = team.devices.contains(&(device as u32));
        if known || team.devices.len() == multicast.count {
            return Err(ERROR_INVALID_VALUE);
        }
        team.devices.push(device as u32);
        team.devices.sort_unstable();
        multicast.added.notify_all();
        Ok(())
    }

    fn cuMulticastBindMem(
        handle: Handle,
        at: usize,
        memory: Handle,
        offset: usize,
        bytes: usize,
        flags: u64,
    ) {
        let memory = initialised()?.physical.get(memory)?;
        bind(handle, None, at, Bound { memory, offset, bytes }, flags)
    }

    fn cuMulticastBindMem_v2(
        handle: Handle,
        device: i32,
        at: usize,
        memory: Handle,
        offset: usize,
        bytes: usize,
        flags: u64,
    ) {
        let memory = initialised()?.physical.get(memory)?;
        bind(handle, Some(device), at, Bound { memory, offset, bytes }, flags)
    }

    fn cuMulticastBindAddr(
        handle: Handle,
        at: usize,
        address: DevicePtr,
        bytes: usize,
        flags: u64,
    ) {
        bind(handle, None, at, mapped_at(address, bytes)?, flags)
    }

    fn cuMulticastBindAddr_v2(
        handle: Handle,
        device: i32,
        at: usize,
        address: DevicePtr,
        bytes: usize,
        flags: u64,
    ) {
        bind(handle, Some(device), at, mapped_at(address, bytes)?, flags)
    }

    fn cuMulticastUnbind(handle: Handle, device: i32, at: usize, bytes: usize) {
        let multicast = initialised()?.multicasts.get(handle)?;
        let mut team = multicast.team.lock().expect("no panic holds this lock");
        let found = team.bound.remove(&(device as u32, at));
        let whole = found.as_ref().is_some_and(|bound| bound.bytes == bytes);
        if let (Some(bound), false) = (found, whole) {
            team.bound.insert((device as u32, at), bound);
        }
        drop(team);
        if !whole {
            return Err(ERROR_INVALID_VALUE);
        }
        publish(&multicast)
    }

    fn cuIpcGetMemHandle(handle: *mut IpcHandle, at: DevicePtr) {
        let driver = initialised()?;
        let view = driver.devices[0].memory().view();
        let found = view.locate(at, 1).ok_or(ERROR_INVALID_VALUE)?;
        if *found.kind() == fathom_emulator::memory::AllocationKind::Host {
            return Err(ERROR_INVALID_VALUE);
        }
        let (base, bytes, device) = (found.base(), found.bytes(), found.device());
        let number = share(driver, base, bytes, device)?;
        put(handle, IpcHandle {
            magic: IPC_MAGIC,
            process: std::process::id().into(),
            number,
            bytes,
            offset: at - base,
            device: device.into(),
            rest: [0; 2],
        })
    }

    fn cuIpcOpenMemHandle_v2(at: *mut DevicePtr, handle: IpcHandle, flags: u32) {
        let _ = flags;
        let driver = initialised()?;
        if handle.magic != IPC_MAGIC || handle.process == u64::from(std::process::id()) {
            // A process has its own memory already.
            return Err(ERROR_INVALID_CONTEXT);
        }
        let path = shared_path(handle.process, handle.number);
        let open = || -> std::io::Result<MmapRaw> {
            let file = File::options().read(true).write(true).open(&path)?;
            MmapOptions::new().map_raw(&file)
        };
        let map = Arc::new(open().map_err(|_| ERROR_MAP_FAILED)?);
        let device = driver.current()? as u32;
        let memory = driver.devices[0].memory();
        let base = memory.reserve(device, handle.bytes, 1);
        let length = handle.bytes.next_multiple_of(4) as usize;
        if map.len() < length {
            return Err(ERROR_INVALID_VALUE);
        }
        memory.map(device, base, handle.bytes, pieces(&map, 0, length));
        put(at, base + handle.offset)
    }

    fn cuIpcCloseMemHandle(at: DevicePtr) {
        let driver = initialised()?;
        driver.wait_for_all()?;
        let memory = driver.devices[0].memory();
        let found = memory.view().locate(at, 1).map(|a| (a.base(), a.bytes()));
        let (base, bytes) = found.ok_or(ERROR_INVALID_VALUE)?;
        memory.unmap(base, bytes);
        Ok(())
    }
}
