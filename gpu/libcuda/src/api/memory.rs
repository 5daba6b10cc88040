//! Memory: allocation, pools, pinned and managed host memory, copies and fills.

use std::alloc::Layout;
use std::ffi::c_void;

use super::{entry_points, put};
use crate::abi::*;
use crate::state::{Driver, R, current_context, driver, initialised};

/// One end of a copy.
#[derive(Clone, Copy)]
enum Place {
    /// An address of this process.
    Host(usize),
    /// An address of emulated memory.
    Device(DevicePtr),
}

use Place::{Device, Host};

impl Place {
    fn add(self, bytes: usize) -> Place {
        match self {
            Host(at) => Host(at + bytes),
            Device(at) => Device(at + bytes as u64),
        }
    }
}

/// Which end a unified address is: emulated memory where the emulator knows it.
fn place_of(address: u64) -> Place {
    let memory = driver().devices[0].memory();
    match memory.view().find(address) {
        Some(allocation) if *allocation.kind() != fathom_emulator::memory::Kind::Host => {
            Device(address)
        }
        _ => Host(address as usize),
    }
}

/// Copies bytes between any two places.
fn copy(to: Place, from: Place, bytes: usize) -> R {
    if bytes == 0 {
        return Ok(());
    }
    let memory = driver().devices[0].memory();
    let bad = |_| ERROR_INVALID_VALUE;
    match (to, from) {
        (Host(to), Host(from)) => {
            if to == 0 || from == 0 {
                return Err(ERROR_INVALID_VALUE);
            }
            // SAFETY: both ranges are the client's.
            unsafe { std::ptr::copy(from as *const u8, to as *mut u8, bytes) };
            Ok(())
        }
        (Host(to), Device(from)) => {
            if to == 0 {
                return Err(ERROR_INVALID_VALUE);
            }
            // SAFETY: the range is the client's; it may be uninitialised, and is only written.
            let out = unsafe { std::slice::from_raw_parts_mut(to as *mut u8, bytes) };
            memory.read(from, out).map_err(bad)
        }
        (Device(to), Host(from)) => {
            if from == 0 {
                return Err(ERROR_INVALID_VALUE);
            }
            // SAFETY: the range is the client's.
            let data = unsafe { std::slice::from_raw_parts(from as *const u8, bytes) };
            memory.write(to, data).map_err(bad)
        }
        (Device(to), Device(from)) => memory.copy(to, from, bytes as u64).map_err(bad),
    }
}

/// Nanoseconds a copy takes on the emulated clock: PCIe towards the host, else device memory.
fn copy_ns(to: Place, from: Place, bytes: usize) -> u64 {
    let bytes_per_ns = match (to, from) {
        (Device(_), Device(_)) => 2000,
        _ => 50,
    };
    bytes as u64 / bytes_per_ns + 1000
}

fn copy_on(stream: Handle, to: Place, from: Place, bytes: usize) -> R {
    let driver = initialised()?;
    let device = driver.current()?;
    driver.enqueue(stream, move || {
        driver.devices[device].order_launches();
        driver.advance(device, copy_ns(to, from, bytes));
        copy(to, from, bytes)
    })
}

fn fill_on(stream: Handle, at: DevicePtr, pattern: &[u8], count: usize) -> R {
    let driver = initialised()?;
    let pattern = pattern.to_vec();
    driver.enqueue(stream, move || match place_of(at) {
        Device(at) => {
            let memory = driver.devices[0].memory();
            memory.fill(at, &pattern, count as u64).map_err(|_| ERROR_INVALID_VALUE)
        }
        Host(at) => {
            for i in 0..count {
                // SAFETY: pinned or managed memory of the client.
                unsafe {
                    let to = (at + i * pattern.len()) as *mut u8;
                    std::ptr::copy_nonoverlapping(pattern.as_ptr(), to, pattern.len());
                }
            }
            Ok(())
        }
    })
}

fn fill_rows(
    stream: Handle,
    at: DevicePtr,
    pitch: usize,
    pattern: &[u8],
    (width, height): (usize, usize),
) -> R {
    (0..height).try_for_each(|row| fill_on(stream, at + (row * pitch) as u64, pattern, width))
}

/// Pinned host memory, which kernels reach at its own address.
fn host_alloc(driver: &Driver, bytes: usize) -> R<usize> {
    let size = bytes.max(1).next_multiple_of(256);
    let layout = Layout::from_size_align(size, 4096).map_err(|_| ERROR_INVALID_VALUE)?;
    // SAFETY: the size is not zero.
    let pointer = unsafe { std::alloc::alloc_zeroed(layout) };
    if pointer.is_null() {
        return Err(ERROR_OUT_OF_MEMORY);
    }
    // SAFETY: fresh memory, which lives until `host_free` frees it here first.
    unsafe { driver.devices[0].register_host(pointer, size) };
    let at = pointer as usize;
    driver.host.lock().expect("no panic holds this lock").insert(at, layout);
    Ok(at)
}

/// Frees what [`host_alloc`] gave; false where it is not of there.
fn host_free(driver: &Driver, at: usize) -> R<bool> {
    let Some(layout) = driver.host.lock().expect("no panic holds this lock").remove(&at) else {
        return Ok(false);
    };
    driver.devices[0].free(at as u64).map_err(|_| ERROR_INVALID_VALUE)?;
    // SAFETY: allocated with this layout, and now unknown to the emulator.
    unsafe { std::alloc::dealloc(at as *mut u8, layout) };
    Ok(true)
}

fn alloc(device: usize, bytes: usize) -> R<DevicePtr> {
    if bytes == 0 {
        return Err(ERROR_INVALID_VALUE);
    }
    let driver = initialised()?;
    driver.error()?;
    let address = driver.devices[device].alloc(bytes as u64).map_err(|_| ERROR_OUT_OF_MEMORY)?;
    let owner = match driver.current() {
        Ok(own) if own == device => current_context(),
        _ => driver.primary_context(device),
    };
    driver.owners.lock().expect("no panic holds this lock").insert(address, owner);
    Ok(address)
}

fn free(driver: &Driver, address: DevicePtr) -> R {
    driver.owners.lock().expect("no panic holds this lock").remove(&address);
    driver.devices[0].free(address).map_err(|_| ERROR_INVALID_VALUE)
}

/// The source of a 2-D or 3-D copy, by its memory type.
fn end(kind: u32, host: usize, device: DevicePtr) -> R<Place> {
    match kind {
        MEMORY_HOST => Ok(Host(host)),
        MEMORY_ARRAY => {
            driver().name_unsupported("CUDA arrays");
            Err(ERROR_NOT_SUPPORTED)
        }
        _ => Ok(place_of(device)),
    }
}

/// # Safety
/// `p` is null or the client's description of a copy.
unsafe fn copy_2d(p: *const Memcpy2d, stream: Handle) -> R {
    if p.is_null() {
        return Err(ERROR_INVALID_VALUE);
    }
    // SAFETY: not null, and the client's.
    let p = unsafe { *p };
    let to = end(p.dst_type, p.dst_host, p.dst_device)?;
    let from = end(p.src_type, p.src_host, p.src_device)?;
    (0..p.height).try_for_each(|row| {
        let to = to.add((p.dst_y + row) * p.dst_pitch + p.dst_x);
        let from = from.add((p.src_y + row) * p.src_pitch + p.src_x);
        copy_on(stream, to, from, p.width)
    })
}

/// # Safety
/// `p` is null or the client's description of a copy.
unsafe fn copy_3d(p: *const Memcpy3d, stream: Handle) -> R {
    if p.is_null() {
        return Err(ERROR_INVALID_VALUE);
    }
    // SAFETY: not null, and the client's.
    let p = unsafe { *p };
    let to = end(p.dst_type, p.dst_host, p.dst_device)?;
    let from = end(p.src_type, p.src_host, p.src_device)?;
    for slice in 0..p.depth {
        for row in 0..p.height {
            let to_row = (p.dst_z + slice) * p.dst_height + p.dst_y + row;
            let from_row = (p.src_z + slice) * p.src_height + p.src_y + row;
            let to = to.add(to_row * p.dst_pitch + p.dst_x);
            let from = from.add(from_row * p.src_pitch + p.src_x);
            copy_on(stream, to, from, p.width)?;
        }
    }
    Ok(())
}

entry_points! {
    fn cuMemGetInfo_v2(free: *mut usize, total: *mut usize) {
        let driver = initialised()?;
        let device = &driver.devices[driver.current()?];
        let (used, limit) = device.memory().usage(device.index());
        put(free, limit.saturating_sub(used) as usize)?;
        put(total, limit as usize)
    }

    fn cuMemAlloc_v2(address: *mut DevicePtr, bytes: usize) {
        put(address, alloc(initialised()?.current()?, bytes)?)
    }

    fn cuMemAllocPitch_v2(
        address: *mut DevicePtr,
        pitch: *mut usize,
        width: usize,
        height: usize,
        element: u32,
    ) {
        let _ = element;
        let row = width.next_multiple_of(512);
        put(address, alloc(initialised()?.current()?, row * height)?)?;
        put(pitch, row)
    }

    fn cuMemAllocAsync(address: *mut DevicePtr, bytes: usize, stream: Handle) {
        let device = initialised()?.stream(stream)?.device;
        put(address, alloc(device, bytes)?)
    }

    fn cuMemAllocFromPoolAsync(
        address: *mut DevicePtr,
        bytes: usize,
        pool: Handle,
        stream: Handle,
    ) {
        let _ = pool;
        let device = initialised()?.stream(stream)?.device;
        put(address, alloc(device, bytes)?)
    }

    fn cuMemFree_v2(address: DevicePtr) {
        let driver = initialised()?;
        driver.healthy()?;
        if address == 0 || host_free(driver, address as usize)? {
            return Ok(());
        }
        free(driver, address)
    }

    fn cuMemFreeAsync(address: DevicePtr, stream: Handle) {
        let driver = initialised()?;
        driver.enqueue(stream, move || free(driver, address))
    }

    fn cuMemAllocManaged(address: *mut DevicePtr, bytes: usize, flags: u32) {
        let _ = flags;
        put(address, host_alloc(initialised()?, bytes)? as DevicePtr)
    }

    fn cuMemAllocHost_v2(pointer: *mut usize, bytes: usize) {
        put(pointer, host_alloc(initialised()?, bytes)?)
    }

    fn cuMemHostAlloc(pointer: *mut usize, bytes: usize, flags: u32) {
        let _ = flags;
        put(pointer, host_alloc(initialised()?, bytes)?)
    }

    fn cuMemFreeHost(pointer: usize) {
        let driver = initialised()?;
        driver.run_kept()?;
        if pointer == 0 || host_free(driver, pointer)? {
            Ok(())
        } else {
            Err(ERROR_INVALID_VALUE)
        }
    }

    fn cuMemHostRegister_v2(pointer: *mut u8, bytes: usize, flags: u32) {
        let _ = flags;
        let driver = initialised()?;
        // Whole words around the range; the client's pages hold them.
        let begin = pointer as usize & !3;
        let end = (pointer as usize + bytes).next_multiple_of(4);
        driver.devices[0].register_host(begin as *mut u8, end - begin);
        Ok(())
    }

    fn cuMemHostUnregister(pointer: usize) {
        let at = (pointer & !3) as u64;
        initialised()?.run_kept()?;
        initialised()?.devices[0].free(at).map_err(|_| ERROR_INVALID_VALUE)
    }

    fn cuMemHostGetDevicePointer_v2(address: *mut DevicePtr, pointer: usize, flags: u32) {
        let _ = flags;
        put(address, pointer as DevicePtr)
    }

    fn cuMemHostGetFlags(flags: *mut u32, pointer: usize) {
        let _ = pointer;
        put(flags, 0)
    }

    fn cuMemGetAddressRange_v2(base: *mut DevicePtr, bytes: *mut usize, address: DevicePtr) {
        let view = initialised()?.devices[0].memory().view();
        let allocation = view.find(address).ok_or(ERROR_NOT_FOUND)?;
        if !base.is_null() {
            put(base, allocation.base())?;
        }
        if bytes.is_null() { Ok(()) } else { put(bytes, allocation.bytes() as usize) }
    }

    fn cuPointerGetAttribute(data: *mut c_void, attribute: u32, address: DevicePtr) {
        let driver = initialised()?;
        let view = driver.devices[0].memory().view();
        let allocation = view.find(address).ok_or(ERROR_INVALID_VALUE)?;
        let host = *allocation.kind() == fathom_emulator::memory::Kind::Host;
        match attribute {
            1 => put(data.cast(), driver.primary_context(allocation.device() as usize)),
            2 => put(data.cast(), if host { MEMORY_HOST } else { 2u32 }),
            3 | 4 => put(data.cast(), address),
            8 => put(data.cast(), 0u32),
            9 => put(data.cast(), allocation.device() as i32),
            11 => put(data.cast(), allocation.base()),
            12 => put(data.cast(), allocation.bytes() as usize),
            _ => Err(ERROR_NOT_SUPPORTED),
        }
    }

    fn cuPointerGetAttributes(
        count: u32,
        attributes: *const u32,
        data: *const *mut c_void,
        address: DevicePtr,
    ) {
        for i in 0..count as usize {
            let (attribute, data) = (*attributes.add(i), *data.add(i));
            // An address that is not the driver's has attributes of zero.
            if cuPointerGetAttribute(data, attribute, address) != SUCCESS {
                put(data.cast::<u32>(), 0)?;
            }
        }
        Ok(())
    }

    fn cuPointerSetAttribute(value: *const c_void, attribute: u32, address: DevicePtr) {
        let _ = (value, attribute, address);
        Ok(())
    }

    fn cuMemcpy(to: DevicePtr, from: DevicePtr, bytes: usize) {
        copy_on(0, place_of(to), place_of(from), bytes)
    }

    fn cuMemcpyAsync(to: DevicePtr, from: DevicePtr, bytes: usize, stream: Handle) {
        copy_on(stream, place_of(to), place_of(from), bytes)
    }

    fn cuMemcpyHtoD_v2(to: DevicePtr, from: usize, bytes: usize) {
        copy_on(0, place_of(to), Host(from), bytes)
    }

    fn cuMemcpyHtoDAsync_v2(to: DevicePtr, from: usize, bytes: usize, stream: Handle) {
        copy_on(stream, place_of(to), Host(from), bytes)
    }

    fn cuMemcpyDtoH_v2(to: usize, from: DevicePtr, bytes: usize) {
        copy_on(0, Host(to), place_of(from), bytes)
    }

    fn cuMemcpyDtoHAsync_v2(to: usize, from: DevicePtr, bytes: usize, stream: Handle) {
        copy_on(stream, Host(to), place_of(from), bytes)
    }

    fn cuMemcpyDtoD_v2(to: DevicePtr, from: DevicePtr, bytes: usize) {
        copy_on(0, place_of(to), place_of(from), bytes)
    }

    fn cuMemcpyDtoDAsync_v2(to: DevicePtr, from: DevicePtr, bytes: usize, stream: Handle) {
        copy_on(stream, place_of(to), place_of(from), bytes)
    }

    fn cuMemcpyPeer(
        to: DevicePtr,
        to_context: Handle,
        from: DevicePtr,
        from_context: Handle,
        bytes: usize,
    ) {
        let _ = (to_context, from_context);
        copy_on(0, place_of(to), place_of(from), bytes)
    }

    fn cuMemcpyPeerAsync(
        to: DevicePtr,
        to_context: Handle,
        from: DevicePtr,
        from_context: Handle,
        bytes: usize,
        stream: Handle,
    ) {
        let _ = (to_context, from_context);
        copy_on(stream, place_of(to), place_of(from), bytes)
    }

    fn cuMemcpy2D_v2(p: *const Memcpy2d) { copy_2d(p, 0) }

    fn cuMemcpy2DUnaligned_v2(p: *const Memcpy2d) { copy_2d(p, 0) }

    fn cuMemcpy2DAsync_v2(p: *const Memcpy2d, stream: Handle) { copy_2d(p, stream) }

    fn cuMemcpy3D_v2(p: *const Memcpy3d) { copy_3d(p, 0) }

    fn cuMemcpy3DAsync_v2(p: *const Memcpy3d, stream: Handle) { copy_3d(p, stream) }

    fn cuMemsetD8_v2(at: DevicePtr, value: u8, count: usize) { fill_on(0, at, &[value], count) }

    fn cuMemsetD16_v2(at: DevicePtr, value: u16, count: usize) {
        fill_on(0, at, &value.to_le_bytes(), count)
    }

    fn cuMemsetD32_v2(at: DevicePtr, value: u32, count: usize) {
        fill_on(0, at, &value.to_le_bytes(), count)
    }

    fn cuMemsetD8Async(at: DevicePtr, value: u8, count: usize, stream: Handle) {
        fill_on(stream, at, &[value], count)
    }

    fn cuMemsetD16Async(at: DevicePtr, value: u16, count: usize, stream: Handle) {
        fill_on(stream, at, &value.to_le_bytes(), count)
    }

    fn cuMemsetD32Async(at: DevicePtr, value: u32, count: usize, stream: Handle) {
        fill_on(stream, at, &value.to_le_bytes(), count)
    }

    fn cuMemsetD2D8_v2(at: DevicePtr, pitch: usize, value: u8, width: usize, height: usize) {
        fill_rows(0, at, pitch, &[value], (width, height))
    }

    fn cuMemsetD2D16_v2(at: DevicePtr, pitch: usize, value: u16, width: usize, height: usize) {
        fill_rows(0, at, pitch, &value.to_le_bytes(), (width, height))
    }

    fn cuMemsetD2D32_v2(at: DevicePtr, pitch: usize, value: u32, width: usize, height: usize) {
        fill_rows(0, at, pitch, &value.to_le_bytes(), (width, height))
    }

    fn cuMemAdvise_v2(at: DevicePtr, bytes: usize, advice: u32, location: u64) {
        let _ = (at, bytes, advice, location);
        Ok(())
    }

    fn cuMemPrefetchAsync(at: DevicePtr, bytes: usize, device: i32, stream: Handle) {
        let _ = (at, bytes, device, stream);
        Ok(())
    }

    fn cuMemPoolCreate(pool: *mut Handle, properties: *const c_void) {
        let _ = properties;
        put(pool, 0x100)
    }

    fn cuMemPoolDestroy(pool: Handle) {
        let _ = pool;
        Ok(())
    }

    fn cuMemPoolTrimTo(pool: Handle, bytes: usize) {
        let _ = (pool, bytes);
        Ok(())
    }

    fn cuMemPoolSetAttribute(pool: Handle, attribute: u32, value: *const c_void) {
        let _ = (pool, attribute, value);
        Ok(())
    }

    fn cuMemPoolGetAttribute(pool: Handle, attribute: u32, value: *mut u64) {
        let _ = (pool, attribute);
        put(value, 0)
    }

    fn cuMemPoolSetAccess(pool: Handle, access: *const c_void, count: usize) {
        let _ = (pool, access, count);
        Ok(())
    }
}
