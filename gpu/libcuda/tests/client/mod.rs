//! The shared library as a client loads it: by name, through `cuGetProcAddress`, with plain C
//! calls.

#![allow(dead_code, unused_imports)] // No test needs all of it.

use std::ffi::{CString, c_char, c_int, c_void};
use std::path::PathBuf;
use std::sync::OnceLock;

use libloading::Library;

/// The library as it was built with this test, opened once.
pub fn library() -> &'static Library {
    static LIBRARY: OnceLock<Library> = OnceLock::new();
    LIBRARY.get_or_init(|| {
        let folder = std::env::current_exe().unwrap().parent().unwrap().to_owned();
        let candidates: Vec<PathBuf> = [folder.clone(), folder.parent().unwrap().to_owned()]
            .iter()
            .map(|f| f.join("libfathom_libcuda.so"))
            .filter(|p| p.is_file())
            .collect();
        assert!(!candidates.is_empty(), "libfathom_libcuda.so is built beside the tests");
        // SAFETY: our own library, whose initialisers do nothing.
        unsafe { Library::new(&candidates[0]).unwrap() }
    })
}

/// Calls an entry point found by `cuGetProcAddress`, as clients do.
macro_rules! call {
    ($name:literal, ($($type:ty),*), ($($arg:expr),* $(,)?)) => {{
        let f = $crate::client::address($name);
        // SAFETY: the types are those of cuda.h.
        let f: unsafe extern "C" fn($($type),*) -> std::ffi::c_int = unsafe { std::mem::transmute(f) };
        // SAFETY: pointers are to live locals.
        unsafe { f($($arg),*) }
    }};
}
pub(crate) use call;

/// The address of a name in the newest version, and cuda.h's status of the search.
pub fn search(name: &str, version: c_int) -> (*const c_void, u32) {
    type Get =
        unsafe extern "C" fn(*const c_char, *mut *const c_void, c_int, u64, *mut u32) -> c_int;
    // SAFETY: the type is that of cuda.h.
    let get = unsafe { library().get::<Get>(b"cuGetProcAddress_v2\0").unwrap() };
    let name = CString::new(name).unwrap();
    let (mut found, mut status) = (std::ptr::null(), 9);
    // SAFETY: pointers are to live locals.
    let code = unsafe { get(name.as_ptr(), &mut found, version, 0, &mut status) };
    assert_eq!(code, 0);
    (found, status)
}

pub fn address(name: &str) -> *const c_void {
    let (found, status) = search(name, 13050);
    assert_eq!(status, 0);
    found
}

pub fn start() {
    assert_eq!(call!("cuInit", (u32), (0)), 0);
    let mut context = 0usize;
    assert_eq!(call!("cuDevicePrimaryCtxRetain", (*mut usize, c_int), (&mut context, 0)), 0);
    assert_eq!(call!("cuCtxSetCurrent", (usize), (context)), 0);
}

/// A function of a module that is loaded from PTX text.
pub fn function(ptx: &str, name: &str) -> usize {
    let text = CString::new(ptx).unwrap();
    let (mut module, mut function) = (0usize, 0usize);
    let image = text.as_ptr();
    assert_eq!(call!("cuModuleLoadData", (*mut usize, *const c_char), (&mut module, image)), 0);
    let name = CString::new(name).unwrap();
    let get = call!(
        "cuModuleGetFunction",
        (*mut usize, usize, *const c_char),
        (&mut function, module, name.as_ptr())
    );
    assert_eq!(get, 0);
    function
}

/// Launches one CTA of `threads` with these parameters, all 8 bytes wide.
pub fn launch(function: usize, stream: usize, threads: u32, params: &[u64]) -> c_int {
    let params: Vec<*const u64> = params.iter().map(|p| &raw const *p).collect();
    call!(
        "cuLaunchKernel",
        (usize, u32, u32, u32, u32, u32, u32, u32, usize, *const *const u64, usize),
        (function, 1, 1, 1, threads, 1, 1, 0, stream, params.as_ptr(), 0)
    )
}

/// Device memory with these values.
pub fn upload(values: &[u32]) -> u64 {
    let mut at = 0u64;
    let bytes = size_of_val(values);
    assert_eq!(call!("cuMemAlloc", (*mut u64, usize), (&mut at, bytes)), 0);
    let from = values.as_ptr();
    assert_eq!(call!("cuMemcpyHtoD", (u64, *const u32, usize), (at, from, bytes)), 0);
    at
}

/// What device memory holds.
pub fn download(at: u64, count: usize) -> Vec<u32> {
    let mut values = vec![0u32; count];
    let to = values.as_mut_ptr();
    assert_eq!(call!("cuMemcpyDtoH", (*mut u32, u64, usize), (to, at, 4 * count)), 0);
    values
}
