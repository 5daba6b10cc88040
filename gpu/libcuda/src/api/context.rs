//! Contexts: one primary context a device, and a stack of current ones a thread.

use super::{entry_points, put};
use crate::abi::*;
use crate::state::{current_context, initialised, pop_context, push_context, set_context};
use std::sync::atomic::Ordering::Relaxed;

/// Checks a context's handle; 0 stands for none.
fn known(context: Handle) -> crate::state::R {
    let driver = initialised()?;
    if context == 0 { Ok(()) } else { driver.contexts.get(context).map(|_| ()) }
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

    fn cuDevicePrimaryCtxReset_v2(device: i32) { initialised()?.device(device).map(|_| ()) }

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
        let _ = flags;
        let driver = initialised()?;
        driver.device(device)?;
        let handle = driver.contexts.insert(device as usize);
        push_context(handle);
        put(context, handle)
    }

    fn cuCtxDestroy_v2(context: Handle) {
        initialised()?.contexts.remove(context).map_err(|_| ERROR_INVALID_CONTEXT)?;
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
        driver.healthy()
    }

    fn cuCtxGetStreamPriorityRange(least: *mut i32, greatest: *mut i32) {
        put(least, 0)?;
        put(greatest, -5)
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
