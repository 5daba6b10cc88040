//! Streams, events with emulated time, host callbacks.

use std::ffi::c_void;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex};

use super::{entry_points, put};
use crate::abi::*;
use crate::state::{Capture, Event, R, Stream, initialised};

/// An event that was never recorded.
const NEVER: u64 = u64::MAX;

fn create(stream: *mut Handle, flags: u32, priority: i32) -> R {
    let driver = initialised()?;
    let device = driver.current()?;
    let new = Stream { device, capture: Arc::default(), flags, priority };
    // SAFETY: the client's pointer.
    unsafe { put(stream, driver.streams.insert(new)) }
}

pub(super) fn record(event: Handle, stream: Handle) -> R {
    let driver = initialised()?;
    let event = driver.events.get(event)?;
    let (device, capture) = {
        let stream = driver.stream(stream)?;
        (stream.device, stream.capturing())
    };
    *event.capture.lock().expect("no panic holds this lock") = capture;
    driver.enqueue(stream, move || {
        event.at.store(driver.now_ns(device), Relaxed);
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
        // Work runs when it is enqueued: what the event stands for has already run, or is captured.
        let _ = flags;
        let driver = initialised()?;
        let stream = driver.stream(stream)?;
        let event = driver.events.get(event)?;
        let capture = event.capture.lock().expect("no panic holds this lock").clone();
        let lasts = |c: &Capture| c.lock().expect("no panic holds this lock").is_some();
        if let Some(capture) = capture.filter(lasts)
            && stream.capturing().is_none()
        {
            *stream.capture.lock().expect("no panic holds this lock") = Some(capture);
        }
        Ok(())
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
        let timed = flags & EVENT_DISABLE_TIMING == 0;
        let new = Event { at: AtomicU64::new(NEVER), timed, capture: Mutex::default() };
        put(event, initialised()?.events.insert(Arc::new(new)))
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

    fn cuEventElapsedTime_v2(milliseconds: *mut f32, start: Handle, end: Handle) {
        let driver = initialised()?;
        let at = |event| {
            let event = driver.events.get(event)?;
            let at = event.at.load(Relaxed);
            if at == NEVER || !event.timed { Err(ERROR_INVALID_HANDLE) } else { Ok(at) }
        };
        let (start, end) = (at(start)?, at(end)?);
        put(milliseconds, (end as f64 - start as f64) as f32 / 1e6)
    }
}
