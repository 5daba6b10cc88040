//! Streams, events with emulated time, host callbacks, and values in memory that streams write
//! and wait for.

use std::ffi::c_void;
use std::sync::Arc;
use std::sync::atomic::Ordering::SeqCst;

use super::virtual_memory::new_shared_event;
use super::{entry_points, put};
use crate::abi::*;
use crate::driver::contexts::current_context;
use crate::driver::initialised;
use crate::objects::event::Event;
use crate::objects::operation::{Comparison, Operation, Value};
use crate::objects::stream::Captured;
use crate::objects::stream::Stream;

/// Makes a stream of the current context.
pub(super) fn create_in(stream: *mut Handle, flags: u32, priority: i32) -> R {
    let driver = initialised()?;
    let device = driver.current()?;
    if flags & !STREAM_NON_BLOCKING != 0 {
        return Err(ERROR_INVALID_VALUE);
    }
    // Priorities outside of the range are brought into it.
    let priority = priority.clamp(PRIORITIES.1, PRIORITIES.0);
    let green = driver.green_of(current_context());
    let new = Stream { handle: 0, device, capture: Arc::default(), flags, priority, green };
    let handle = driver.streams.insert_with(|handle| Stream { handle, ..new });
    // SAFETY: the client's pointer.
    unsafe { put(stream, handle) }
}

/// Least and greatest priority of a stream.
pub(super) const PRIORITIES: (i32, i32) = (0, -5);

pub(super) fn record(event: Handle, stream: Handle) -> R {
    let driver = initialised()?;
    let found = driver.events.get(event)?;
    if let Some(captured) = driver.stream(stream)?.capturing() {
        // It stands for the place in the capture, and becomes no node.
        *found.captured.lock().expect("no panic holds this lock") = Some(captured);
        return Ok(());
    }
    driver.submit(stream, Operation::Record(event))
}

/// The comparison and width that the flags of a wait ask for.
fn comparison(flags: u32) -> R<Comparison> {
    // Flushing remote writes is nothing here.
    Ok(match flags & !(1 << 30) {
        0 => Comparison::AtLeast,
        1 => Comparison::Equal,
        2 => Comparison::And,
        3 => Comparison::Nor,
        _ => return Err(ERROR_INVALID_VALUE),
    })
}

/// `CUstreamBatchMemOpParams`: operation, address, value, flags, alias.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct BatchMemOp {
    operation: u32,
    at: DevicePtr,
    value: u64,
    flags: u32,
    alias: DevicePtr,
    rest: [u64; 1],
}

impl BatchMemOp {
    fn operation(&self) -> R<Operation> {
        let value = |bytes| Value { at: self.at, value: self.value, bytes };
        Ok(match self.operation {
            1 => Operation::WaitValue(value(4), comparison(self.flags)?),
            2 => Operation::Write(value(4)),
            4 => Operation::WaitValue(value(8), comparison(self.flags)?),
            5 => Operation::Write(value(8)),
            // Barriers and flushes: work of a stream is in order.
            3 | 6 => Operation::Nothing,
            _ => return Err(ERROR_NOT_SUPPORTED),
        })
    }
}

entry_points! {
    fn cuStreamCreate(stream: *mut Handle, flags: u32) { create_in(stream, flags, 0) }

    fn cuStreamCreateWithPriority(stream: *mut Handle, flags: u32, priority: i32) {
        create_in(stream, flags, priority)
    }

    fn cuStreamDestroy_v2(stream: Handle) {
        let driver = initialised()?;
        // What it was given is done first; an error of that is not this call's.
        let marks = driver.marks_of(stream).unwrap_or_default();
        driver.queue.wait(&marks);
        driver.streams.remove(stream).map(|_| ())
    }

    fn cuStreamSynchronize(stream: Handle) { initialised()?.wait_for(stream) }

    fn cuStreamQuery(stream: Handle) {
        let driver = initialised()?;
        let done = driver.queue.is_done_soon(&driver.marks_of(stream)?);
        driver.error()?;
        if done { Ok(()) } else { Err(ERROR_NOT_READY) }
    }

    fn cuStreamWaitEvent(stream: Handle, event: Handle, flags: u32) {
        let _ = flags;
        let driver = initialised()?;
        let waiting = driver.stream(stream)?;
        let event = driver.events.get(event)?;
        let captured = event.captured.lock().expect("no panic holds this lock").clone();
        if let Some(captured) = captured.filter(Captured::lasts) {
            // The stream joins the capture, or waits for one more of its nodes.
            let mut own = waiting.capturing().map_or_else(Vec::new, |own| own.after);
            own.extend(captured.after.iter().filter(|n| !own.contains(n)).copied().collect::<Vec<_>>());
            waiting.set_captured(Captured { after: own, ..captured });
            return Ok(());
        }
        if let Some(shared) = &event.shared {
            // The record may be another process's.
            let wanted = shared.recorded().load(SeqCst);
            return driver.submit(stream, Operation::WaitShared(event.clone(), wanted));
        }
        let recorded = *event.recorded.lock().expect("no panic holds this lock");
        match (recorded, waiting.capturing()) {
            (None, _) => Ok(()),
            (Some(_), Some(_)) => Err(ERROR_STREAM_CAPTURE_ISOLATION),
            (Some(mark), None) => driver.submit_after(stream, Operation::Nothing, vec![mark]),
        }
    }

    fn cuStreamGetFlags(stream: Handle, flags: *mut u32) {
        put(flags, initialised()?.stream(stream)?.flags)
    }

    fn cuStreamGetPriority(stream: Handle, priority: *mut i32) {
        put(priority, initialised()?.stream(stream)?.priority)
    }

    fn cuStreamGetCtx(stream: Handle, context: *mut Handle) {
        put(context, initialised()?.context_of(stream)?.0)
    }

    fn cuStreamGetDevice(stream: Handle, device: *mut i32) {
        put(device, initialised()?.stream(stream)?.device as i32)
    }

    fn cuStreamGetId(stream: Handle, id: *mut u64) { put(id, stream as u64) }

    fn cuStreamGetCtx_v2(stream: Handle, context: *mut Handle, green: *mut Handle) {
        let (own, own_green) = initialised()?.context_of(stream)?;
        put(context, own)?;
        if green.is_null() { Ok(()) } else { put(green, own_green) }
    }

    // Attributes of a stream are hints here: priorities, windows of the L2 cache, how to wait.
    fn cuStreamSetAttribute(stream: Handle, attribute: u32, value: *const c_void) {
        let _ = (attribute, value);
        initialised()?.stream(stream).map(|_| ())
    }

    fn cuStreamGetAttribute(stream: Handle, attribute: u32, value: *mut [u64; 8]) {
        let priority = initialised()?.stream(stream)?.priority;
        const PRIORITY: u32 = 8;
        let first = if attribute == PRIORITY { u64::from(priority as u32) } else { 0 };
        put(value, [first, 0, 0, 0, 0, 0, 0, 0])
    }

    fn cuStreamCopyAttributes(to: Handle, from: Handle) {
        initialised()?.stream(to)?;
        initialised()?.stream(from).map(|_| ())
    }

    fn cuStreamAddCallback(
        stream: Handle,
        callback: unsafe extern "C" fn(Handle, CuResult, *mut c_void),
        data: usize,
        flags: u32,
    ) {
        let _ = flags;
        let call = Operation::Callback(callback, stream, data);
        initialised()?.submit(stream, call)
    }

    fn cuLaunchHostFunc(stream: Handle, function: HostFn, data: usize) {
        initialised()?.submit(stream, Operation::Host(function, data))
    }

    fn cuLaunchHostFunc_v2(stream: Handle, function: HostFn, data: usize, mode: u32) {
        let _ = mode;
        initialised()?.submit(stream, Operation::Host(function, data))
    }

    fn cuStreamWriteValue32_v2(stream: Handle, at: DevicePtr, value: u32, flags: u32) {
        let _ = flags;
        let value = Value { at, value: value.into(), bytes: 4 };
        initialised()?.submit(stream, Operation::Write(value))
    }

    fn cuStreamWriteValue64_v2(stream: Handle, at: DevicePtr, value: u64, flags: u32) {
        let _ = flags;
        initialised()?.submit(stream, Operation::Write(Value { at, value, bytes: 8 }))
    }

    fn cuStreamWaitValue32_v2(stream: Handle, at: DevicePtr, value: u32, flags: u32) {
        let value = Value { at, value: value.into(), bytes: 4 };
        initialised()?.submit(stream, Operation::WaitValue(value, comparison(flags)?))
    }

    fn cuStreamWaitValue64_v2(stream: Handle, at: DevicePtr, value: u64, flags: u32) {
        let value = Value { at, value, bytes: 8 };
        initialised()?.submit(stream, Operation::WaitValue(value, comparison(flags)?))
    }

    fn cuStreamBatchMemOp_v2(stream: Handle, count: u32, list: *const BatchMemOp, flags: u32) {
        let _ = flags;
        for i in 0..count as usize {
            initialised()?.submit(stream, (*list.add(i)).operation()?)?;
        }
        Ok(())
    }

    fn cuEventCreate(event: *mut Handle, flags: u32) {
        let timed = flags & EVENT_DISABLE_TIMING == 0;
        let between_processes = flags & EVENT_INTERPROCESS != 0;
        // Timing and sharing exclude one another.
        if timed && between_processes {
            return Err(ERROR_INVALID_VALUE);
        }
        let driver = initialised()?;
        let shared = if between_processes { Some(new_shared_event()?) } else { None };
        put(event, driver.events.insert(Arc::new(Event::new(timed, shared))))
    }

    fn cuEventDestroy_v2(event: Handle) { initialised()?.events.remove(event).map(|_| ()) }

    fn cuEventRecord(event: Handle, stream: Handle) { record(event, stream) }

    fn cuEventRecordWithFlags(event: Handle, stream: Handle, flags: u32) {
        let _ = flags;
        record(event, stream)
    }

    fn cuEventQuery(event: Handle) {
        let driver = initialised()?;
        let recorded = *driver.events.get(event)?.recorded.lock().expect("no panic holds this lock");
        let done = driver.queue.is_done_soon(recorded.as_slice());
        driver.error()?;
        let shared = driver.events.get(event)?.shared_done();
        if done && shared { Ok(()) } else { Err(ERROR_NOT_READY) }
    }

    fn cuEventSynchronize(event: Handle) {
        let driver = initialised()?;
        let event = driver.events.get(event)?;
        let recorded = *event.recorded.lock().expect("no panic holds this lock");
        driver.queue.wait(recorded.as_slice());
        while !event.shared_done() {
            // Another process's streams go on by themselves.
            std::thread::sleep(std::time::Duration::from_micros(200));
        }
        driver.error()
    }

    fn cuEventElapsedTime_v2(milliseconds: *mut f32, start: Handle, end: Handle) {
        let driver = initialised()?;
        let at = |event| {
            let event = driver.events.get(event)?;
            let recorded = *event.recorded.lock().expect("no panic holds this lock");
            if recorded.is_none() || !event.timed {
                return Err(ERROR_INVALID_HANDLE);
            }
            if !driver.queue.is_done_soon(recorded.as_slice()) {
                return Err(ERROR_NOT_READY);
            }
            event.at().ok_or(ERROR_INVALID_HANDLE)
        };
        let (start, end) = (at(start)?, at(end)?);
        put(milliseconds, (end as f64 - start as f64) as f32 / 1e6)
    }
}
