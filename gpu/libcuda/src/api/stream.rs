//! Streams, events with emulated time, host callbacks.

use std::ffi::c_void;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use super::{entry_points, put};
use crate::abi::*;
use crate::state::{R, Stream, initialised};

/// An event that was never recorded.
const NEVER: u64 = u64::MAX;

fn create(stream: *mut Handle, flags: u32, priority: i32) -> R {
    let driver = initialised()?;
    let device = driver.current()?;
    let new = Stream { device, capture: Arc::default(), flags, priority };
    // SAFETY: the client's pointer.
    unsafe { put(stream, driver.streams.insert(new)) }
}

fn record(event: Handle, stream: Handle) -> R {
    let driver = initialised()?;
    let event = driver.events.get(event)?;
    let device = driver.stream(stream)?.device;
    driver.enqueue(stream, move || {
        event.store(driver.now_ns(device), Relaxed);
        Ok(())
    })
}

entry_points! {
    fn cuStreamCreate(stream: *mut Handle, flags: u32) { create(stream, flags, 0) }

    fn cuStreamCreateWithPriority(stream: *mut Handle, flags: u32, priority: i32) {
        create(stream, flags, priority)
    }

    fn cuStreamDestroy_v2(stream: Handle) { initialised()?.streams.remove(stream).map(|_| ()) }

    fn cuStreamSynchronize(stream: Handle) {
        let driver = initialised()?;
        driver.stream(stream)?;
        driver.healthy()
    }

    fn cuStreamQuery(stream: Handle) {
        let driver = initialised()?;
        driver.stream(stream)?;
        driver.healthy()
    }

    fn cuStreamWaitEvent(stream: Handle, event: Handle, flags: u32) {
        // Work runs when it is enqueued: what the event stands for has already run.
        let _ = flags;
        let driver = initialised()?;
        driver.stream(stream)?;
        driver.events.get(event).map(|_| ())
    }

    fn cuStreamGetFlags(stream: Handle, flags: *mut u32) {
        put(flags, initialised()?.stream(stream)?.flags)
    }

    fn cuStreamGetPriority(stream: Handle, priority: *mut i32) {
        put(priority, initialised()?.stream(stream)?.priority)
    }

    fn cuStreamGetCtx(stream: Handle, context: *mut Handle) {
        let driver = initialised()?;
        put(context, driver.primary_context(driver.stream(stream)?.device))
    }

    fn cuStreamGetDevice(stream: Handle, device: *mut i32) {
        put(device, initialised()?.stream(stream)?.device as i32)
    }

    fn cuStreamGetId(stream: Handle, id: *mut u64) { put(id, stream as u64) }

    fn cuStreamAddCallback(
        stream: Handle,
        callback: unsafe extern "C" fn(Handle, CuResult, *mut c_void),
        data: usize,
        flags: u32,
    ) {
        let _ = flags;
        initialised()?.enqueue(stream, move || {
            // SAFETY: the client's function with the client's data.
            unsafe { callback(stream, SUCCESS, data as *mut c_void) };
            Ok(())
        })
    }

    fn cuLaunchHostFunc(stream: Handle, function: HostFn, data: usize) {
        initialised()?.enqueue(stream, move || {
            // SAFETY: the client's function with the client's data.
            unsafe { function(data as *mut c_void) };
            Ok(())
        })
    }

    fn cuEventCreate(event: *mut Handle, flags: u32) {
        let _ = flags;
        put(event, initialised()?.events.insert(Arc::new(AtomicU64::new(NEVER))))
    }

    fn cuEventDestroy_v2(event: Handle) { initialised()?.events.remove(event).map(|_| ()) }

    fn cuEventRecord(event: Handle, stream: Handle) { record(event, stream) }

    fn cuEventRecordWithFlags(event: Handle, stream: Handle, flags: u32) {
        let _ = flags;
        record(event, stream)
    }

    fn cuEventQuery(event: Handle) {
        let driver = initialised()?;
        driver.events.get(event)?;
        driver.healthy()
    }

    fn cuEventSynchronize(event: Handle) {
        let driver = initialised()?;
        driver.events.get(event)?;
        driver.healthy()
    }

    fn cuEventElapsedTime(milliseconds: *mut f32, start: Handle, end: Handle) {
        let driver = initialised()?;
        let at = |event| driver.events.get(event).map(|e| e.load(Relaxed));
        let (start, end) = (at(start)?, at(end)?);
        if start == NEVER || end == NEVER {
            return Err(ERROR_INVALID_HANDLE);
        }
        put(milliseconds, (end as f64 - start as f64) as f32 / 1e6)
    }

    fn cuEventElapsedTime_v2(milliseconds: *mut f32, start: Handle, end: Handle) {
        let code = cuEventElapsedTime(milliseconds, start, end);
        if code == SUCCESS { Ok(()) } else { Err(code) }
    }
}
