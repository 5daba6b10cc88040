//! The shared library as a client loads it: by name, through `cuGetProcAddress`, with plain C
//! calls.

use std::ffi::{CString, c_char, c_int, c_void};
use std::path::PathBuf;
use std::sync::OnceLock;

use libloading::Library;

/// The library as it was built with this test, opened once.
fn library() -> &'static Library {
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
        let f = address($name);
        // SAFETY: the types are those of cuda.h.
        let f: unsafe extern "C" fn($($type),*) -> c_int = unsafe { std::mem::transmute(f) };
        // SAFETY: pointers are to live locals.
        unsafe { f($($arg),*) }
    }};
}

/// The address of a name in the newest version, and cuda.h's status of the search.
fn search(name: &str, version: c_int) -> (*const c_void, u32) {
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

fn address(name: &str) -> *const c_void {
    let (found, status) = search(name, 13000);
    assert_eq!(status, 0);
    found
}

fn start() {
    assert_eq!(call!("cuInit", (u32), (0)), 0);
    let mut context = 0usize;
    assert_eq!(call!("cuDevicePrimaryCtxRetain", (*mut usize, c_int), (&mut context, 0)), 0);
    assert_eq!(call!("cuCtxSetCurrent", (usize), (context)), 0);
}

const PTX: &str = "
.version 8.0
.target sm_90
.address_size 64
.visible .entry twice(.param .u64 p, .param .u32 n)
{
    .reg .u64 %rd<3>;
    .reg .u32 %r<3>;
    .reg .pred %p;
    ld.param.u64 %rd0, [p];
    ld.param.u32 %r0, [n];
    mov.u32 %r1, %tid.x;
    setp.ge.u32 %p, %r1, %r0;
    @%p ret;
    mul.wide.u32 %rd1, %r1, 4;
    add.u64 %rd2, %rd0, %rd1;
    ld.global.u32 %r2, [%rd2];
    shl.b32 %r2, %r2, 1;
    st.global.u32 [%rd2], %r2;
    ret;
}
";

fn twice() -> usize {
    let text = CString::new(PTX).unwrap();
    let (mut module, mut function) = (0usize, 0usize);
    let image = text.as_ptr();
    assert_eq!(call!("cuModuleLoadData", (*mut usize, *const c_char), (&mut module, image)), 0);
    let name = c"twice".as_ptr();
    let get = call!(
        "cuModuleGetFunction",
        (*mut usize, usize, *const c_char),
        (&mut function, module, name)
    );
    assert_eq!(get, 0);
    function
}

fn launch(function: usize, stream: usize, mut at: u64, mut n: u32) -> c_int {
    let params: [*mut c_void; 2] = [(&raw mut at).cast(), (&raw mut n).cast()];
    call!(
        "cuLaunchKernel",
        (usize, u32, u32, u32, u32, u32, u32, u32, usize, *const *mut c_void, usize),
        (function, 1, 1, 1, 64, 1, 1, 0, stream, params.as_ptr(), 0)
    )
}

fn upload(values: &[u32]) -> u64 {
    let mut at = 0u64;
    let bytes = size_of_val(values);
    assert_eq!(call!("cuMemAlloc", (*mut u64, usize), (&mut at, bytes)), 0);
    let from = values.as_ptr();
    assert_eq!(call!("cuMemcpyHtoD", (u64, *const u32, usize), (at, from, bytes)), 0);
    at
}

fn download(at: u64, count: usize) -> Vec<u32> {
    let mut values = vec![0u32; count];
    let to = values.as_mut_ptr();
    assert_eq!(call!("cuMemcpyDtoH", (*mut u32, u64, usize), (to, at, 4 * count)), 0);
    values
}

/// One test, since the driver and its sticky errors are the process's.
#[test]
fn a_client_s_session() {
    assert_eq!(call!("cuCtxSynchronize", (usize), (0)), 3, "before cuInit");
    start();

    let mut count = 0;
    assert_eq!(call!("cuDeviceGetCount", (*mut c_int), (&mut count)), 0);
    assert_eq!(count, 1);
    let mut sms = 0;
    let attribute = (&mut sms as *mut c_int, 16, 0);
    assert_eq!(
        call!(
            "cuDeviceGetAttribute",
            (*mut c_int, c_int, c_int),
            (attribute.0, attribute.1, attribute.2)
        ),
        0
    );
    assert_eq!(sms, 132, "an H800");

    // A launch through the array of parameters.
    let function = twice();
    let values: Vec<u32> = (0..50).collect();
    let at = upload(&values);
    assert_eq!(launch(function, 0, at, 50), 0);
    assert_eq!(download(at, 50), values.iter().map(|v| 2 * v).collect::<Vec<_>>());

    // Captured work does not run until the graph is launched, then as often as it is.
    let (mut stream, mut graph, mut exec) = (0usize, 0usize, 0usize);
    assert_eq!(call!("cuStreamCreate", (*mut usize, u32), (&mut stream, 0)), 0);
    assert_eq!(call!("cuStreamBeginCapture", (usize, u32), (stream, 0)), 0);
    assert_eq!(launch(function, stream, at, 50), 0);
    assert_eq!(call!("cuStreamEndCapture", (usize, *mut usize), (stream, &mut graph)), 0);
    assert_eq!(download(at, 2), [0, 2]);
    let instantiate =
        call!("cuGraphInstantiateWithFlags", (*mut usize, usize, u64), (&mut exec, graph, 0));
    assert_eq!(instantiate, 0);
    for _ in 0..2 {
        assert_eq!(call!("cuGraphLaunch", (usize, usize), (exec, stream)), 0);
    }
    assert_eq!(download(at, 3), [0, 8, 16]);

    // A second stream joins the capture by an event, and the first waits for it.
    let (mut side, mut fork, mut join) = (0usize, 0usize, 0usize);
    assert_eq!(call!("cuStreamCreate", (*mut usize, u32), (&mut side, 0)), 0);
    for event in [&mut fork, &mut join] {
        assert_eq!(call!("cuEventCreate", (*mut usize, u32), (event, 2)), 0);
    }
    let record = |event, on| call!("cuEventRecord", (usize, usize), (event, on));
    let wait = |on, event| call!("cuStreamWaitEvent", (usize, usize, u32), (on, event, 0));
    assert_eq!(call!("cuStreamBeginCapture", (usize, u32), (stream, 0)), 0);
    assert_eq!((record(fork, stream), wait(side, fork)), (0, 0));
    assert_eq!(launch(function, side, at, 50), 0);
    assert_eq!((record(join, side), wait(stream, join)), (0, 0));
    assert_eq!(call!("cuStreamEndCapture", (usize, *mut usize), (stream, &mut graph)), 0);
    assert_eq!(download(at, 3), [0, 8, 16]);
    let instantiate =
        call!("cuGraphInstantiateWithFlags", (*mut usize, usize, u64), (&mut exec, graph, 0));
    assert_eq!(instantiate, 0);
    assert_eq!(call!("cuGraphLaunch", (usize, usize), (exec, stream)), 0);
    assert_eq!(download(at, 3), [0, 16, 32]);
    // The capture has ended for both.
    assert_eq!(launch(function, side, at, 50), 0);
    assert_eq!(download(at, 3), [0, 32, 64]);

    // Pinned memory is reached by kernels at its own address.
    let mut pinned = std::ptr::null_mut::<u32>();
    assert_eq!(call!("cuMemHostAlloc", (*mut *mut u32, usize, u32), (&mut pinned, 64, 0)), 0);
    // SAFETY: 64 bytes of pinned memory.
    unsafe { pinned.write(21) };
    assert_eq!(launch(function, 0, pinned as u64, 1), 0);
    // SAFETY: as above.
    assert_eq!(unsafe { pinned.read() }, 42);
    assert_eq!(call!("cuMemFreeHost", (*mut u32), (pinned)), 0);

    // Events measure emulated time, which kernels let pass.
    let (mut first, mut last, mut ms) = (0usize, 0usize, 0f32);
    for event in [&mut first, &mut last] {
        assert_eq!(call!("cuEventCreate", (*mut usize, u32), (event, 0)), 0);
    }
    assert_eq!(call!("cuEventRecord", (usize, usize), (first, 0)), 0);
    assert_eq!(launch(function, 0, at, 50), 0);
    assert_eq!(call!("cuEventRecord", (usize, usize), (last, 0)), 0);
    let elapsed = call!("cuEventElapsedTime", (*mut f32, usize, usize), (&mut ms, first, last));
    assert_eq!(elapsed, 0);
    assert!(ms > 0.0);

    // What is refused: broken PTX, machine code, a wrong handle, an unknown entry point.
    let mut module = 0usize;
    let broken = c".version 8.0\n.target sm_90\n.address_size 64\nnonsense".as_ptr();
    assert_eq!(call!("cuModuleLoadData", (*mut usize, *const c_char), (&mut module, broken)), 218);
    let cubin = c"\x7fELF\x02\x01\x01".as_ptr();
    assert_eq!(call!("cuModuleLoadData", (*mut usize, *const c_char), (&mut module, cubin)), 209);
    assert_eq!(launch(12345, 0, at, 1), 400);
    // A name that cuda.h does not have, one that a version does not have yet, and one that is not
    // implemented.
    assert_eq!(search("cuNoSuchThing", 13000), (std::ptr::null(), 1));
    assert_eq!(search("cuGraphCreate", 9000), (std::ptr::null(), 2));
    assert_eq!(call!("cuEGLStreamConsumerConnect", (usize, usize), (0, 0)), 801);

    // The heap of `malloc` in kernels has the size that was asked for.
    let mut bytes = 0usize;
    assert_eq!(call!("cuCtxSetLimit", (u32, usize), (2, 1 << 20)), 0);
    assert_eq!(call!("cuCtxGetLimit", (*mut usize, u32), (&mut bytes, 2)), 0);
    assert_eq!(bytes, 1 << 20);
    let mut words = std::ptr::null();
    assert_eq!(call!("cuGetErrorName", (c_int, *mut *const c_char), (700, &mut words)), 0);
    // SAFETY: a constant of the library.
    let words = unsafe { std::ffi::CStr::from_ptr(words) };
    assert_eq!(words.to_str().unwrap(), "CUDA_ERROR_ILLEGAL_ADDRESS");

    // A kernel that leaves its memory: the launch succeeds, everything after it reports the error.
    assert_eq!(launch(function, 0, 0x10, 1), 0);
    let mut more = 0u64;
    assert_eq!(call!("cuMemAlloc", (*mut u64, usize), (&mut more, 16)), 700);
    assert_eq!(call!("cuCtxSynchronize", (usize), (0)), 700);
    assert_eq!(launch(function, 0, at, 1), 700);
}
