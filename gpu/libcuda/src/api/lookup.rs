//! `cuGetProcAddress`: every symbol of cuda.h by name and version.
//!
//! Clients ask for a name without suffix and the CUDA version whose signature they were compiled
//! for; they get the newest symbol that this version knows. What is not implemented has a function
//! all the same, which names itself once and changes nothing.

use std::collections::HashMap;
use std::ffi::{c_char, c_void};
use std::sync::OnceLock;

use super::device::VERSION;
use super::{entry_points, put, text};
use crate::abi::*;

/// A symbol, the CUDA version that brought it, its address, and the address of its variant with
/// the per-thread default stream (its own where there is none).
struct Symbol(&'static str, i32, *const c_void, *const c_void);

// SAFETY: the addresses are those of functions.
unsafe impl Sync for Symbol {}

/// What `src/entry_points.txt` asks for beside this folder's own entry points.
#[allow(non_snake_case)]
mod generated {
    use std::ffi::c_void;

    use super::Symbol;
    use crate::abi::CuResult;

    fn missing(name: &str) -> CuResult {
        crate::driver::driver().name_unsupported(name);
        crate::abi::ERROR_NOT_SUPPORTED
    }

    include!(concat!(env!("OUT_DIR"), "/entry_points.rs"));
}

/// `CU_GET_PROC_ADDRESS_PER_THREAD_DEFAULT_STREAM`.
const PER_THREAD: u64 = 2;

/// `CUdriverProcAddressQueryResult`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Status {
    Success = 0,
    SymbolNotFound = 1,
    VersionNotSufficient = 2,
}

/// The symbols of each name without its version suffix, oldest first.
fn names() -> &'static HashMap<&'static str, Vec<&'static Symbol>> {
    static NAMES: OnceLock<HashMap<&'static str, Vec<&'static Symbol>>> = OnceLock::new();
    NAMES.get_or_init(|| {
        let mut names: HashMap<_, Vec<&Symbol>> = HashMap::new();
        for symbol in generated::SYMBOLS {
            let (name, suffix) = symbol.0.rsplit_once("_v").unwrap_or((symbol.0, ""));
            let numbered = !suffix.is_empty() && suffix.bytes().all(|b| b.is_ascii_digit());
            names.entry(if numbered { name } else { symbol.0 }).or_default().push(symbol);
        }
        names.values_mut().for_each(|symbols| symbols.sort_by_key(|s| s.1));
        names
    })
}

/// The newest symbol of a name that a CUDA version knows.
fn find(name: &str, version: i32, flags: u64) -> Result<*const c_void, Status> {
    let symbols = names().get(name).ok_or(Status::SymbolNotFound)?;
    let newest = symbols.iter().rev().find(|s| s.1 <= version);
    let newest = newest.ok_or(Status::VersionNotSufficient)?;
    Ok(if flags & PER_THREAD != 0 { newest.3 } else { newest.2 })
}

entry_points! {
    fn cuGetProcAddress_v2(
        symbol: *const c_char,
        function: *mut *const c_void,
        version: i32,
        flags: u64,
        status: *mut u32,
    ) {
        let name = text(symbol)?;
        if version > VERSION || flags > PER_THREAD {
            return Err(ERROR_INVALID_VALUE);
        }
        let found = find(&name, version, flags);
        if !status.is_null() {
            put(status, found.err().unwrap_or(Status::Success) as u32)?;
        }
        put(function, found.unwrap_or(std::ptr::null()))
    }

    fn cuGetProcAddress(
        symbol: *const c_char,
        function: *mut *const c_void,
        version: i32,
        flags: u64,
    ) {
        put(function, std::ptr::null())?;
        let name = text(symbol)?;
        if version > VERSION || flags > PER_THREAD {
            return Err(ERROR_INVALID_VALUE);
        }
        put(function, find(&name, version, flags).map_err(|_| ERROR_NOT_FOUND)?)
    }
}
