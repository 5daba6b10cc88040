//! The entry points of cuda.h, a file a subject, and the table by which clients look them up.
//!
//! An entry point is a few lines in [`entry_points!`]: its name, its arguments as cuda.h has them,
//! a body that gives `R`. The macro exports it and catches panics at the border; `build.rs` finds
//! it by its name and adds what is missing from cuda.h (see `lookup`).

pub(crate) mod array;
mod capture;
mod context;
mod device;
mod export_table;
mod function;
mod graph;
mod graph_node;
pub(crate) mod green;
mod launch;
mod library;
mod lookup;
mod managed;
mod memory;
mod module;
mod node_params;
mod pool;
mod stateful_launch;
mod stream;
mod tensor_map;
mod user_object;
mod virtual_memory;

use std::ffi::{CStr, c_char};
use std::sync::OnceLock;

use crate::abi::*;
use crate::driver::initialised;
use crate::say::say;

macro_rules! entry_points {
    ($($(#[$note:meta])* fn $name:ident($($arg:ident: $type:ty),* $(,)?) $body:block)*) => {
        $(
            $(#[$note])*
            #[unsafe(no_mangle)]
            #[allow(non_snake_case, unused_unsafe, clippy::too_many_arguments)]
            pub(crate) unsafe extern "C" fn $name($($arg: $type),*) -> $crate::abi::CuResult {
                $crate::api::border(stringify!($name), || {
                    // SAFETY: pointers are the client's, valid as cuda.h documents them.
                    unsafe { $body }
                })
            }
        )*
    };
}
pub(crate) use entry_points;

/// Runs an entry point's body; a panic becomes an error, as it must not cross into C.
pub(crate) fn border(name: &str, body: impl FnOnce() -> R) -> CuResult {
    let code = match std::panic::catch_unwind(std::panic::AssertUnwindSafe(body)) {
        Ok(Ok(())) => SUCCESS,
        Ok(Err(code)) => code,
        Err(_) => {
            say!("{name} failed inside the emulated driver");
            ERROR_UNKNOWN
        }
    };
    if calls_are_told() {
        say!("{name}: {code}");
    }
    code
}

/// Whether every call is told on stderr: FATHOM_EMULATE_CALLS is set.
fn calls_are_told() -> bool {
    static TOLD: OnceLock<bool> = OnceLock::new();
    *TOLD.get_or_init(|| std::env::var_os("FATHOM_EMULATE_CALLS").is_some())
}

/// Writes a result where the client wants it.
///
/// # Safety
/// `to` is null or valid for a write.
pub(crate) unsafe fn put<T>(to: *mut T, value: T) -> R {
    if to.is_null() {
        return Err(ERROR_INVALID_VALUE);
    }
    // SAFETY: not null, and the client's; clients do not always align their outputs.
    unsafe { to.write_unaligned(value) };
    Ok(())
}

/// A C string of the client.
///
/// # Safety
/// `text` is null or NUL-terminated.
pub(crate) unsafe fn text(text: *const c_char) -> R<String> {
    if text.is_null() {
        return Err(ERROR_INVALID_VALUE);
    }
    // SAFETY: not null and NUL-terminated by the caller's promise.
    Ok(unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned())
}

entry_points! {
    fn cuGetErrorName(error: CuResult, name: *mut *const c_char) {
        match RESULTS.iter().find(|r| r.0 == error) {
            Some(found) => put(name, found.1.as_ptr().cast()),
            None => {
                put(name, std::ptr::null())?;
                Err(ERROR_INVALID_VALUE)
            }
        }
    }

    fn cuGetErrorString(error: CuResult, words: *mut *const c_char) {
        match RESULTS.iter().find(|r| r.0 == error) {
            Some(found) => put(words, found.2.as_ptr().cast()),
            None => {
                put(words, std::ptr::null())?;
                Err(ERROR_INVALID_VALUE)
            }
        }
    }

    fn cuProfilerStart() { Ok(()) }

    // As a profiler does, what was seen so far is written out.
    fn cuProfilerStop() {
        initialised()?.save_rest();
        Ok(())
    }
}
