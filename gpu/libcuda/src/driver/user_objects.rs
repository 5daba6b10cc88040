//! Counting the user objects that graphs hold.

use std::collections::BTreeMap;
use std::ffi::c_void;

use super::initialised;
use crate::abi::*;

/// Takes `by` from an object's count; at 0 the client's function is called.
pub(crate) fn release(object: Handle, by: u64) -> R {
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

/// Adds `by` to an object's count.
pub(crate) fn retain(object: Handle, by: u64) -> R {
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
