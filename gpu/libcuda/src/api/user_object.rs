//! User objects: what of a client's a graph keeps alive.

use std::sync::{Arc, Mutex};

use super::{entry_points, put};
use crate::abi::*;
use crate::driver::initialised;
use crate::driver::user_objects::{release, retain};
use crate::objects::user_object::UserObject;

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
