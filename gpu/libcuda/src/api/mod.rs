//! The entry points of cuda.h, a file a subject, and the table by which clients look them up.
//!
//! An entry point is a few lines in [`entry_points!`]: its name, its arguments as cuda.h has them,
//! a
//! body that gives `R`. The macro exports it, catches panics at the border, and puts it into the
//! file's table.

mod context;
mod device;
mod graph;
mod launch;
mod memory;
mod module;
mod stream;
mod tensor_map;

use std::ffi::{CStr, c_char, c_void};
use std::sync::Mutex;

use crate::abi::*;
use crate::state::{R, driver};

/// An entry point's name and address.
pub(crate) struct Entry(pub &'static str, pub *const c_void);

// SAFETY: the address is that of a function.
unsafe impl Sync for Entry {}

macro_rules! entry_points {
    ($($(#[$note:meta])* fn $name:ident($($arg:ident: $type:ty),* $(,)?) $body:block)*) => {
        $(
            $(#[$note])*
            #[unsafe(no_mangle)]
            #[allow(non_snake_case, unused_unsafe, clippy::too_many_arguments)]
            unsafe extern "C" fn $name($($arg: $type),*) -> $crate::abi::CuResult {
                $crate::api::border(stringify!($name), || {
                    // SAFETY: pointers are the client's, valid as cuda.h documents them.
                    unsafe { $body }
                })
            }
        )*
        pub(super) const TABLE: &[$crate::api::Entry] =
            &[$($crate::api::Entry(stringify!($name), $name as *const std::ffi::c_void)),*];
    };
}
pub(crate) use entry_points;

/// Runs an entry point's body; a panic becomes an error, as it must not cross into C.
pub(crate) fn border(name: &str, body: impl FnOnce() -> R) -> CuResult {
    match std::panic::catch_unwind(std::panic::AssertUnwindSafe(body)) {
        Ok(Ok(())) => SUCCESS,
        Ok(Err(code)) => code,
        Err(_) => {
            eprintln!("fathom: {name} failed inside the emulated driver");
            ERROR_UNKNOWN
        }
    }
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

fn tables() -> impl Iterator<Item = &'static Entry> {
    [
        TABLE,
        context::TABLE,
        device::TABLE,
        graph::TABLE,
        launch::TABLE,
        memory::TABLE,
        module::TABLE,
        stream::TABLE,
        tensor_map::TABLE,
    ]
    .into_iter()
    .flatten()
}

/// The entry point for a name as clients spell it: the newest version, whatever the default stream.
fn find(name: &str) -> Option<*const c_void> {
    let plain = name.trim_end_matches("_ptsz").trim_end_matches("_ptds");
    let candidates = ["_v3", "_v2", ""].map(|suffix| format!("{plain}{suffix}"));
    candidates.iter().find_map(|c| tables().find(|e| e.0 == c).map(|e| e.1))
}

/// Names for which a client was given a stub; the stub's number is the position.
static STUBS: Mutex<Vec<String>> = Mutex::new(Vec::new());

/// Answers for an entry point that is not there: names itself once, changes nothing.
extern "C" fn stub<const N: usize>() -> CuResult {
    let name = STUBS.lock().map(|s| s.get(N).cloned()).unwrap_or_default();
    driver().name_unsupported(&name.unwrap_or_default());
    ERROR_NOT_SUPPORTED
}

/// Stubs `$high * 32 + 0..32` for each `$high`.
macro_rules! stubs {
    ($($high:literal)*) => { [$(stubs!(row $high: 0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18
        19 20 21 22 23 24 25 26 27 28 29 30 31)),*] };
    (row $high:literal: $($low:literal)*) => { [$(stub::<{ $high * 32 + $low }> as Stub),*] };
}

type Stub = extern "C" fn() -> CuResult;

/// More than cuda.h has entry points.
static ALL_STUBS: [[Stub; 32]; 32] = stubs!(0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21
    22 23 24 25 26 27 28 29 30 31);

fn stub_for(name: &str) -> *const c_void {
    let all = ALL_STUBS.as_flattened();
    let mut names = STUBS.lock().expect("no panic holds this lock");
    let position = names.iter().position(|n| n == name).unwrap_or_else(|| {
        names.push(name.to_owned());
        names.len() - 1
    });
    // Where a client asks for more than there are, the last one answers for all the others.
    all[position.min(all.len() - 1)] as *const c_void
}

entry_points! {
    fn cuGetProcAddress_v2(
        symbol: *const c_char,
        function: *mut *const c_void,
        version: i32,
        flags: u64,
        status: *mut u32,
    ) {
        let _ = (version, flags);
        let name = text(symbol)?;
        let found = find(&name);
        if !status.is_null() {
            put(status, 0)?;
        }
        put(function, found.unwrap_or_else(|| stub_for(&name)))
    }

    fn cuGetProcAddress(
        symbol: *const c_char,
        function: *mut *const c_void,
        version: i32,
        flags: u64,
    ) {
        let code = cuGetProcAddress_v2(symbol, function, version, flags, std::ptr::null_mut());
        if code == SUCCESS { Ok(()) } else { Err(code) }
    }

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

    fn cuGetExportTable(table: *mut *const c_void, id: *const c_void) {
        let _ = id;
        put(table, std::ptr::null())?;
        driver().name_unsupported("cuGetExportTable");
        Err(ERROR_NOT_SUPPORTED)
    }

    fn cuProfilerStart() { Ok(()) }

    fn cuProfilerStop() { Ok(()) }
}
