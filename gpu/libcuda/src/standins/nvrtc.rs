//! NVRTC: PTX in the place of a program's cubin.

use std::ffi::c_int;

use super::call_real;
use crate::abi::Handle;

/// Bytes of a program's PTX with its NUL, where it has a cubin that PTX can stand for.
fn ptx_bytes(program: Handle) -> Option<usize> {
    let mut bytes = 0;
    let code = call_real!(c"nvrtcGetCUBINSize", (Handle, *mut usize), (program, &mut bytes));
    if code != 0 || bytes == 0 {
        return None;
    }
    let code = call_real!(c"nvrtcGetPTXSize", (Handle, *mut usize), (program, &mut bytes));
    // An empty text is its NUL.
    (code == 0 && bytes > 1).then_some(bytes)
}

/// `nvrtcGetCUBINSize`: the size of the PTX where there is a cubin.
#[unsafe(no_mangle)]
#[allow(non_snake_case)]
pub(super) unsafe extern "C" fn nvrtcGetCUBINSize(program: Handle, size: *mut usize) -> c_int {
    match ptx_bytes(program) {
        Some(bytes) if !size.is_null() => {
            // SAFETY: not null, and the client's.
            unsafe { size.write(bytes) };
            0
        }
        _ => call_real!(c"nvrtcGetCUBINSize", (Handle, *mut usize), (program, size)),
    }
}

/// `nvrtcGetCUBIN`: the PTX.
#[unsafe(no_mangle)]
#[allow(non_snake_case)]
pub(super) unsafe extern "C" fn nvrtcGetCUBIN(program: Handle, cubin: *mut u8) -> c_int {
    match ptx_bytes(program) {
        Some(_) => call_real!(c"nvrtcGetPTX", (Handle, *mut u8), (program, cubin)),
        None => call_real!(c"nvrtcGetCUBIN", (Handle, *mut u8), (program, cubin)),
    }
}
