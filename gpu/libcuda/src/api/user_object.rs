//! User objects: what of a client's a graph keeps alive.

use std::collections::BTreeMap;
use std::ffi::c_void;
use std::sync::{Arc, Mutex};

use super::{entry_points, put};
use crate::abi::*;
use crate::state::{R, initialised};

/// An object of the client, counted.
pub(crate) struct UserObject {
    data: usize,
    destroy: HostFn,
    count: Mutex<u64>,
}

fn release(object: Handle, by: u64) -> R {
    let driver = initialised()?;
    let found = driver.user_objects.get(object)?;
    let gone = {
        let mut count = found.count.lock().expect("no panic holds this lock");
        *count = count.checked_sub(by).filter(|_| by > 0).ok_or(ERROR_INVALID_VALUE)?;
        *count == 0
    };
    if gone {
        driver.user_objects.remove(object)?;
        // SAFETY: the client's function with the client's data.
        unsafe { (found.destroy)(found.data as *mut c_void) };
    }
    Ok(())
}

fn retain(object: Handle, by: u64) -> R {
    let found = initialised()?.user_objects.get(object)?;
    if by == 0 {
        return Err(ERROR_INVALID_VALUE);
    }
    *found.count.lock().expect("no panic holds this lock") += by;
    Ok(())
}

/// Retains what a graph holds for a copy of it.
pub(crate) fn retain_all(held: &BTreeMap<Handle, u64>) {
    for (object, count) in held {
        // What the client has released too often is gone.
        let _ = retain(*object, *count);
    }
}

/// Releases what a graph holds, as it goes.
pub(crate) fn release_all(held: &BTreeMap<Handle, u64>) {
    for (object, count) in held {
        // The client may have released more than it had.
        let _ = release(*object, *count);
    }
}

entry_points! {
    fn cuUserObjectCreate(
        object: *mut Handle,
        data: usize,
        destroy: HostFn,
        count: u32,
        flags: u32,
    ) {
        const NO_DESTRUCTOR_SYNC: u32 = 1;
        if count == 0 || flags != NO_DESTRUCTOR_SYNC {
            return Err(ERROR_INVALID_VALUE);
        }
        let new = UserObject { data, destroy, count: Mutex::new(count.into()) };
        put(object, initialised()?.user_objects.insert(Arc::new(new)))
    }

    fn cuUserObjectRetain(object: Handle, count: u32) { retain(object, count.into()) }

    fn cuUserObjectRelease(object: Handle, count: u32) { release(object, count.into()) }

    fn cuGraphRetainUserObject(graph: Handle, object: Handle, count: u32, flags: u32) {
        const MOVE: u32 = 1;
        let graph = initialised()?.graphs.get(graph)?;
        if flags & MOVE == 0 {
            retain(object, count.into())?;
        }
        let mut graph = graph.lock().expect("no panic holds this lock");
        *graph.user_objects.entry(object).or_default() += u64::from(count);
        Ok(())
    }

    fn cuGraphReleaseUserObject(graph: Handle, object: Handle, count: u32) {
        let graph = initialised()?.graphs.get(graph)?;
        {
            let mut graph = graph.lock().expect("no panic holds this lock");
            let held = graph.user_objects.get_mut(&object).ok_or(ERROR_INVALID_VALUE)?;
            *held = held.checked_sub(count.into()).ok_or(ERROR_INVALID_VALUE)?;
        }
        release(object, count.into())
    }
}
