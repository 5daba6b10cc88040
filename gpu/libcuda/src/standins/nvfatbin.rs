//! nvFatbin: the PTX that stands for a cubin goes into a fatbinary as PTX.

use std::ffi::{c_char, c_int};

use super::{call_real, is_text};
use crate::abi::Handle;

/// `nvFatbinAddCubin`.
#[unsafe(no_mangle)]
#[allow(non_snake_case)]
pub(super) unsafe extern "C" fn nvFatbinAddCubin(
    handle: Handle,
    code: *const u8,
    bytes: usize,
    arch: *const c_char,
    name: *const c_char,
) -> c_int {
    // SAFETY: null, or the client's data of this length.
    if !code.is_null() && is_text(unsafe { std::slice::from_raw_parts(code, bytes) }) {
        let options = c"".as_ptr();
        return call_real!(
            c"nvFatbinAddPTX",
            (Handle, *const u8, usize, *const c_char, *const c_char, *const c_char),
            (handle, code, bytes, arch, name, options)
        );
    }
    call_real!(
        c"nvFatbinAddCubin",
        (Handle, *const u8, usize, *const c_char, *const c_char),
        (handle, code, bytes, arch, name)
    )
}
