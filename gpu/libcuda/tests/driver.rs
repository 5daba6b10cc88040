//! A client's session with the shared library, from before `cuInit` to an error that stays.

mod client;

use std::ffi::{c_char, c_int};

use client::{call, download, search, start, upload};

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
    client::function(PTX, "twice")
}

fn launch(function: usize, stream: usize, at: u64, n: u32) -> c_int {
    client::launch(function, stream, 64, &[at, n.into()])
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
    assert_eq!(call!("cuStreamSynchronize", (usize), (0)), 0);
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
    assert_eq!(call!("cuEventSynchronize", (usize), (last)), 0);
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

    // A kernel that leaves its memory: the launch succeeds, everything from the next wait on
    // reports the error.
    assert_eq!(launch(function, 0, 0x10, 1), 0);
    assert_eq!(call!("cuCtxSynchronize", (usize), (0)), 700);
    let mut more = 0u64;
    assert_eq!(call!("cuMemAlloc", (*mut u64, usize), (&mut more, 16)), 700);
    assert_eq!(launch(function, 0, at, 1), 700);
}
