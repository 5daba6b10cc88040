//! Memory: allocation, pinned, managed and registered host memory, copies and fills.

use std::ffi::c_void;

use super::{entry_points, put};
use crate::abi::*;
use crate::driver::initialised;
use crate::machine::HostKind;
use crate::objects::operation::{Fill, Operation};

pub(super) fn copy_on(stream: Handle, copy: Memcpy3d) -> R {
    initialised()?.submit(stream, Operation::Copy(copy))
}

/// A copy that is done when the call returns.
pub(super) fn copy_now(copy: Memcpy3d) -> R {
    let driver = initialised()?;
    driver.current()?;
    // A capture forbids it, and what came before on the default stream goes first.
    driver.wait_for(0)?;
    copy_on(0, copy)?;
    driver.wait_for(0)
}

/// `CU_POINTER_ATTRIBUTE_SYNC_MEMOPS`.
const SYNC_MEMOPS: u32 = 6;

fn row(to: DevicePtr, from: DevicePtr, bytes: usize) -> Memcpy3d {
    Memcpy3d::row(to, from, bytes)
}

fn within_devices(to: DevicePtr, from: DevicePtr, bytes: usize) -> Memcpy3d {
    Memcpy3d { src_type: MEMORY_DEVICE, dst_type: MEMORY_DEVICE, ..row(to, from, bytes) }
}

fn to_host(to: usize, from: DevicePtr, bytes: usize) -> Memcpy3d {
    Memcpy3d { dst_type: MEMORY_HOST, dst_host: to, ..within_devices(0, from, bytes) }
}

fn from_host(to: DevicePtr, from: usize, bytes: usize) -> Memcpy3d {
    Memcpy3d { src_type: MEMORY_HOST, src_host: from, ..within_devices(to, 0, bytes) }
}

/// Fills one row of `count` elements.
fn fill_on(stream: Handle, at: DevicePtr, (value, element): (u32, usize), count: usize) -> R {
    fill_rows(stream, at, element * count, (value, element), (count, 1))
}

fn fill_rows(
    stream: Handle,
    at: DevicePtr,
    pitch: usize,
    (value, element): (u32, usize),
    (width, height): (usize, usize),
) -> R {
    let fill = Fill { at, pitch, value, element, width, height };
    initialised()?.submit(stream, Operation::Fill(fill))
}

/// A copy of rows as a copy of one slice.
///
/// # Safety
/// `p` is null or the client's description of a copy.
unsafe fn rows(p: *const Memcpy2d) -> R<Memcpy3d> {
    if p.is_null() {
        return Err(ERROR_INVALID_VALUE);
    }
    // SAFETY: not null, and the client's.
    let p = unsafe { *p };
    Ok(Memcpy3d {
        src_x: p.src_x,
        src_y: p.src_y,
        src_type: p.src_type,
        src_host: p.src_host,
        src_device: p.src_device,
        src_array: p.src_array,
        src_pitch: p.src_pitch,
        dst_x: p.dst_x,
        dst_y: p.dst_y,
        dst_type: p.dst_type,
        dst_host: p.dst_host,
        dst_device: p.dst_device,
        dst_array: p.dst_array,
        dst_pitch: p.dst_pitch,
        width: p.width,
        height: p.height,
        depth: 1,
        ..Memcpy3d::default()
    })
}

/// # Safety
/// `p` is null or the client's description of a copy.
unsafe fn slices(p: *const Memcpy3d) -> R<Memcpy3d> {
    // SAFETY: the caller's promise.
    unsafe { p.as_ref() }.copied().ok_or(ERROR_INVALID_VALUE)
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
        put(address, initialised()?.alloc_current(bytes)?)
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
        put(address, initialised()?.alloc_current(row * height)?)?;
        put(pitch, row)
    }

    fn cuMemFree_v2(address: DevicePtr) {
        let driver = initialised()?;
        driver.wait_for_all()?;
        if address == 0 { Ok(()) } else { driver.free(address) }
    }

    fn cuMemAllocManaged(address: *mut DevicePtr, bytes: usize, flags: u32) {
        let _ = flags;
        if bytes == 0 {
            return Err(ERROR_INVALID_VALUE);
        }
        put(address, initialised()?.host_alloc(bytes, HostKind::Managed)? as DevicePtr)
    }

    fn cuMemAllocHost_v2(pointer: *mut usize, bytes: usize) {
        put(pointer, initialised()?.host_alloc(bytes, HostKind::Pinned)?)
    }

    fn cuMemHostAlloc(pointer: *mut usize, bytes: usize, flags: u32) {
        let _ = flags;
        put(pointer, initialised()?.host_alloc(bytes, HostKind::Pinned)?)
    }

    fn cuMemFreeHost(pointer: usize) {
        let driver = initialised()?;
        driver.wait_for_all()?;
        if pointer == 0 || driver.host_free(pointer)? { Ok(()) } else { Err(ERROR_INVALID_VALUE) }
    }

    fn cuMemHostRegister_v2(pointer: *mut u8, bytes: usize, flags: u32) {
        let _ = flags;
        let driver = initialised()?;
        // Whole words around the range; the client's pages hold them.
        let begin = pointer as usize & !3;
        let end = (pointer as usize + bytes).next_multiple_of(4);
        let view = driver.devices[0].memory().view();
        let last = (pointer as usize + bytes.max(1) - 1) as u64;
        if [pointer as u64, last].iter().any(|at| view.locate(*at, 1).is_some()) {
            return Err(ERROR_HOST_MEMORY_ALREADY_REGISTERED);
        }
        driver.devices[0].register_host(begin as *mut u8, end - begin);
        Ok(())
    }

    fn cuMemHostUnregister(pointer: usize) {
        let at = (pointer & !3) as u64;
        initialised()?.wait_for_all()?;
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
        let host = *allocation.kind() == fathom_emulator::memory::AllocationKind::Host;
        match attribute {
            1 => put(data.cast(), driver.primary_context(allocation.device() as usize)),
            2 => put(data.cast(), if host { MEMORY_HOST } else { 2u32 }),
            3 | 4 => put(data.cast(), address),
            SYNC_MEMOPS => {
                let chosen = driver.synchronous.lock().expect("no panic holds this lock");
                put(data.cast(), u32::from(chosen.contains(&allocation.base())))
            }
            // No handles of allocations are given out, and no other device on the bus reaches them.
            10 | 14 | 15 => put(data.cast(), 0u32),
            7 => put(data.cast(), allocation.base()),
            8 => {
                let hosted = driver.host.lock().expect("no panic holds this lock");
                let kind = hosted.get(&(allocation.base() as usize)).map(|(_, kind)| *kind);
                put(data.cast(), u32::from(kind == Some(HostKind::Managed)))
            }
            13 => put(data.cast(), 1u32),
            // To be read and written.
            16 => put(data.cast(), 3u32),
            17 => {
                let pooled = driver.pooled.lock().expect("no panic holds this lock");
                put(data.cast(), pooled.get(&allocation.base()).map_or(0, |(pool, _)| *pool))
            }
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
        let driver = initialised()?;
        let view = driver.devices[0].memory().view();
        let base = view.find(address).ok_or(ERROR_INVALID_VALUE)?.base();
        if attribute != SYNC_MEMOPS || value.is_null() {
            return Err(ERROR_INVALID_VALUE);
        }
        // Copies wait for what came before as it is: the choice is kept to be told again.
        let mut chosen = driver.synchronous.lock().expect("no panic holds this lock");
        match *value.cast::<u32>() {
            0 => chosen.remove(&base),
            _ => chosen.insert(base),
        };
        Ok(())
    }

    fn cuMemcpy(to: DevicePtr, from: DevicePtr, bytes: usize) { copy_now(row(to, from, bytes)) }

    fn cuMemcpyAsync(to: DevicePtr, from: DevicePtr, bytes: usize, stream: Handle) {
        copy_on(stream, row(to, from, bytes))
    }

    fn cuMemcpyHtoD_v2(to: DevicePtr, from: usize, bytes: usize) {
        copy_now(from_host(to, from, bytes))
    }

    fn cuMemcpyHtoDAsync_v2(to: DevicePtr, from: usize, bytes: usize, stream: Handle) {
        copy_on(stream, from_host(to, from, bytes))
    }

    fn cuMemcpyDtoH_v2(to: usize, from: DevicePtr, bytes: usize) {
        copy_now(to_host(to, from, bytes))
    }

    fn cuMemcpyDtoHAsync_v2(to: usize, from: DevicePtr, bytes: usize, stream: Handle) {
        copy_on(stream, to_host(to, from, bytes))
    }

    fn cuMemcpyDtoD_v2(to: DevicePtr, from: DevicePtr, bytes: usize) {
        copy_now(within_devices(to, from, bytes))
    }

    fn cuMemcpyDtoDAsync_v2(to: DevicePtr, from: DevicePtr, bytes: usize, stream: Handle) {
        copy_on(stream, within_devices(to, from, bytes))
    }

    fn cuMemcpyPeer(
        to: DevicePtr,
        to_context: Handle,
        from: DevicePtr,
        from_context: Handle,
        bytes: usize,
    ) {
        let _ = (to_context, from_context);
        initialised()?.wait_for_all()?;
        copy_now(row(to, from, bytes))
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
        copy_on(stream, row(to, from, bytes))
    }

    fn cuMemcpy2D_v2(p: *const Memcpy2d) { copy_now(rows(p)?) }

    fn cuMemcpy2DUnaligned_v2(p: *const Memcpy2d) { copy_now(rows(p)?) }

    fn cuMemcpy2DAsync_v2(p: *const Memcpy2d, stream: Handle) { copy_on(stream, rows(p)?) }

    fn cuMemcpy3D_v2(p: *const Memcpy3d) { copy_now(slices(p)?) }

    fn cuMemcpy3DAsync_v2(p: *const Memcpy3d, stream: Handle) { copy_on(stream, slices(p)?) }

    // `CUDA_MEMCPY3D_PEER` is laid out like `CUDA_MEMCPY3D`, with contexts in reserved places.
    fn cuMemcpy3DPeer(p: *const Memcpy3d) {
        initialised()?.wait_for_all()?;
        copy_now(slices(p)?)
    }

    fn cuMemcpy3DPeerAsync(p: *const Memcpy3d, stream: Handle) { copy_on(stream, slices(p)?) }

    fn cuMemsetD8_v2(at: DevicePtr, value: u8, count: usize) {
        fill_on(0, at, (value.into(), 1), count)
    }

    fn cuMemsetD8Async(at: DevicePtr, value: u8, count: usize, stream: Handle) {
        fill_on(stream, at, (value.into(), 1), count)
    }

    fn cuMemsetD2D8_v2(at: DevicePtr, pitch: usize, value: u8, width: usize, height: usize) {
        fill_rows(0, at, pitch, (value.into(), 1), (width, height))
    }

    fn cuMemsetD2D8Async(
        at: DevicePtr,
        pitch: usize,
        value: u8,
        width: usize,
        height: usize,
        stream: Handle,
    ) {
        fill_rows(stream, at, pitch, (value.into(), 1), (width, height))
    }

    fn cuMemsetD16_v2(at: DevicePtr, value: u16, count: usize) {
        fill_on(0, at, (value.into(), 2), count)
    }

    fn cuMemsetD16Async(at: DevicePtr, value: u16, count: usize, stream: Handle) {
        fill_on(stream, at, (value.into(), 2), count)
    }

    fn cuMemsetD2D16_v2(at: DevicePtr, pitch: usize, value: u16, width: usize, height: usize) {
        fill_rows(0, at, pitch, (value.into(), 2), (width, height))
    }

    fn cuMemsetD2D16Async(
        at: DevicePtr,
        pitch: usize,
        value: u16,
        width: usize,
        height: usize,
        stream: Handle,
    ) {
        fill_rows(stream, at, pitch, (value.into(), 2), (width, height))
    }

    fn cuMemsetD32_v2(at: DevicePtr, value: u32, count: usize) {
        fill_on(0, at, (value, 4), count)
    }

    fn cuMemsetD32Async(at: DevicePtr, value: u32, count: usize, stream: Handle) {
        fill_on(stream, at, (value, 4), count)
    }

    fn cuMemsetD2D32_v2(at: DevicePtr, pitch: usize, value: u32, width: usize, height: usize) {
        fill_rows(0, at, pitch, (value, 4), (width, height))
    }

    fn cuMemsetD2D32Async(
        at: DevicePtr,
        pitch: usize,
        value: u32,
        width: usize,
        height: usize,
        stream: Handle,
    ) {
        fill_rows(stream, at, pitch, (value, 4), (width, height))
    }

    fn cuStreamAttachMemAsync(stream: Handle, at: DevicePtr, bytes: usize, flags: u32) {
        let _ = (at, bytes, flags);
        initialised()?.stream(stream).map(|_| ())
    }
}
