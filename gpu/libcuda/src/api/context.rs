//! Contexts: one primary context a device, and a stack of current ones a thread.

use std::ffi::c_void;

use super::{entry_points, put};
use crate::abi::*;
use crate::driver::contexts::{current_context, pop_context, push_context, set_context, within};
use crate::driver::initialised;
use std::sync::atomic::Ordering::Relaxed;

/// Checks a context's handle; 0 stands for none.
fn known(context: Handle) -> R {
    let driver = initialised()?;
    if context == 0 { Ok(()) } else { driver.contexts.get(context).map(|_| ()) }
}

/// The context that a client means: the current one where it names none.
pub(super) fn of_client(context: Handle) -> R<Handle> {
    let context = if context == 0 { current_context() } else { context };
    initialised()?.contexts.get(context).map(|_| context).map_err(|_| ERROR_INVALID_CONTEXT)
}

/// Makes a context and puts it on the calling thread's stack.
///
/// # Safety
/// `context` is the client's.
unsafe fn create(context: *mut Handle, flags: u32, device: i32) -> R {
    let driver = initialised()?;
    driver.device(device)?;
    if context.is_null() || flags & !CONTEXT_FLAGS != 0 {
        return Err(ERROR_INVALID_VALUE);
    }
    let handle = driver.contexts.insert(device as usize);
    push_context(handle);
    // SAFETY: the client's pointer.
    unsafe { put(context, handle) }
}

/// `CUctx_flags` that there are.
const CONTEXT_FLAGS: u32 = 0xff;

/// `CUctxCreateParams`.
#[repr(C)]
pub(crate) struct CtxCreateParams {
    affinities: *const c_void,
    affinity_count: i32,
    cig: *const c_void,
}

/// Drops what clients have stored in a context, and tells them.
fn forget(context: Handle) -> R {
    let gone = {
        let mut storage = initialised()?.storage.lock().expect("no panic holds this lock");
        let gone: Vec<_> =
            storage.range((context, 0)..=(context, usize::MAX)).map(|(k, v)| (*k, *v)).collect();
        gone.iter().for_each(|(key, _)| {
            storage.remove(key);
        });
        gone
    };
    for ((context, key), (value, destructor)) in gone {
        if let Some(destructor) = destructor {
            // SAFETY: the client's function, with what it stored.
            unsafe { destructor(context, key, value) };
        }
    }
    Ok(())
}

entry_points! {
    fn cuDevicePrimaryCtxRetain(context: *mut Handle, device: i32) {
        let driver = initialised()?;
        driver.device(device)?;
        driver.retained[device as usize].fetch_add(1, Relaxed);
        put(context, driver.primary_context(device as usize))
    }

    fn cuDevicePrimaryCtxRelease_v2(device: i32) {
        let driver = initialised()?;
        driver.device(device)?;
        let retained = &driver.retained[device as usize];
        let less = |n: u64| n.checked_sub(1);
        retained.fetch_update(Relaxed, Relaxed, less).map_err(|_| ERROR_INVALID_CONTEXT)?;
        Ok(())
    }

    fn cuDevicePrimaryCtxReset_v2(device: i32) {
        let driver = initialised()?;
        driver.device(device)?;
        // What it kept runs first; its error goes with it.
        let _ = driver.wait_for_all();
        let context = driver.primary_context(device as usize);
        forget(context)?;
        driver.clear(context);
        Ok(())
    }

    fn cuDevicePrimaryCtxSetFlags_v2(device: i32, flags: u32) {
        let _ = flags;
        initialised()?.device(device).map(|_| ())
    }

    fn cuDevicePrimaryCtxGetState(device: i32, flags: *mut u32, active: *mut i32) {
        let driver = initialised()?;
        driver.device(device)?;
        put(flags, 0)?;
        put(active, i32::from(driver.retained[device as usize].load(Relaxed) > 0))
    }

    fn cuCtxCreate_v2(context: *mut Handle, flags: u32, device: i32) {
        create(context, flags, device)
    }

    // Affinities divide a device between clients of MPS, which there is none of.
    fn cuCtxCreate_v3(
        context: *mut Handle,
        affinities: *const c_void,
        count: i32,
        flags: u32,
        device: i32,
    ) {
        if count != 0 || !affinities.is_null() {
            return Err(ERROR_UNSUPPORTED_EXEC_AFFINITY);
        }
        create(context, flags, device)
    }

    fn cuCtxCreate_v4(context: *mut Handle, params: *const CtxCreateParams, flags: u32, device: i32) {
        if !params.is_null() {
            let params = &*params;
            if params.affinity_count != 0 {
                return Err(ERROR_UNSUPPORTED_EXEC_AFFINITY);
            }
            if !params.cig.is_null() {
                return Err(ERROR_NOT_SUPPORTED);
            }
        }
        create(context, flags, device)
    }

    fn cuCtxAttach(context: *mut Handle, flags: u32) {
        let _ = flags;
        put(context, of_client(0)?)
    }

    fn cuCtxDetach(context: Handle) { of_client(context).map(|_| ()) }

    fn cuCtxDestroy_v2(context: Handle) {
        initialised()?.contexts.get(context).map_err(|_| ERROR_INVALID_CONTEXT)?;
        // What its streams were given is done first; an error of that goes with it.
        let _ = initialised()?.wait_for_all();
        forget(context)?;
        let driver = initialised()?;
        driver.clear(context);
        driver.contexts.remove(context).map_err(|_| ERROR_INVALID_CONTEXT)?;
        // The green context that it stood for goes with it.
        let _ = driver.greens.remove(driver.green_of(context));
        if current_context() == context {
            pop_context();
        }
        Ok(())
    }

    fn cuCtxSetCurrent(context: Handle) {
        known(context).map_err(|_| ERROR_INVALID_CONTEXT)?;
        set_context(context);
        Ok(())
    }

    fn cuCtxGetCurrent(context: *mut Handle) {
        initialised()?;
        put(context, current_context())
    }

    fn cuCtxPushCurrent_v2(context: Handle) {
        known(context).map_err(|_| ERROR_INVALID_CONTEXT)?;
        push_context(context);
        Ok(())
    }

    fn cuCtxPopCurrent_v2(context: *mut Handle) {
        initialised()?;
        let popped = pop_context().ok_or(ERROR_INVALID_CONTEXT)?;
        if context.is_null() { Ok(()) } else { put(context, popped) }
    }

    fn cuCtxGetDevice(device: *mut i32) { put(device, initialised()?.current()? as i32) }

    fn cuCtxGetDevice_v2(device: *mut i32, context: Handle) {
        let context = of_client(context)?;
        put(device, initialised()?.contexts.get(context)? as i32)
    }

    fn cuCtxGetFlags(flags: *mut u32) { put(flags, 0) }

    fn cuCtxGetId(context: Handle, id: *mut u64) {
        put(id, if context == 0 { current_context() } else { context } as u64)
    }

    fn cuCtxGetApiVersion(context: Handle, version: *mut u32) {
        known(context)?;
        put(version, 3020)
    }

    fn cuCtxSynchronize() {
        let driver = initialised()?;
        driver.current()?;
        driver.wait_for_all()
    }

    fn cuCtxSynchronize_v2(context: Handle) {
        of_client(context)?;
        initialised()?.wait_for_all()
    }

    fn cuCtxRecordEvent(context: Handle, event: Handle) {
        within(of_client(context)?, || super::stream::record(event, 0))
    }

    fn cuCtxWaitEvent(context: Handle, event: Handle) {
        of_client(context)?;
        initialised()?.events.get(event)?;
        Ok(())
    }

    fn cuCtxResetPersistingL2Cache() { of_client(0).map(|_| ()) }

    fn cuCtxGetStreamPriorityRange(least: *mut i32, greatest: *mut i32) {
        put(least, super::stream::PRIORITIES.0)?;
        put(greatest, super::stream::PRIORITIES.1)
    }

    fn cuCtxGetLimit(value: *mut usize, limit: u32) {
        let driver = initialised()?;
        let device = &driver.devices[driver.current()?];
        put(value, match limit {
            LIMIT_STACK => 1024,
            LIMIT_PRINTF => 1 << 20,
            LIMIT_HEAP => device.heap_bytes() as usize,
            _ => 0,
        })
    }

    // The stack grows as it must, and printf has no bounded buffer here.
    fn cuCtxSetLimit(limit: u32, value: usize) {
        let driver = initialised()?;
        let device = &driver.devices[driver.current()?];
        if limit == LIMIT_HEAP && !device.set_heap_bytes(value as u64) {
            return Err(ERROR_INVALID_VALUE);
        }
        Ok(())
    }

    fn cuCtxGetCacheConfig(config: *mut u32) { put(config, 0) }

    fn cuCtxSetCacheConfig(config: u32) {
        let _ = config;
        Ok(())
    }

    fn cuCtxGetSharedMemConfig(config: *mut u32) { put(config, 1) }

    fn cuCtxSetSharedMemConfig(config: u32) {
        let _ = config;
        of_client(0).map(|_| ())
    }

    fn cuCtxSetFlags(flags: u32) {
        let _ = flags;
        of_client(0).map(|_| ())
    }

    fn cuCtxEnablePeerAccess(peer: Handle, flags: u32) {
        let _ = flags;
        let driver = initialised()?;
        let own = &driver.devices[driver.current()?];
        let other = driver.contexts.get(peer).map_err(|_| ERROR_INVALID_CONTEXT)?;
        if own.is_peer(&driver.devices[other]) {
            Ok(())
        } else {
            Err(ERROR_PEER_ACCESS_UNSUPPORTED)
        }
    }

    fn cuCtxDisablePeerAccess(peer: Handle) { known(peer) }
}
