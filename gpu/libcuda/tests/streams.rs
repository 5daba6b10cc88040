//! Streams as hardware has them: kernels run while the host goes on, wait for what it writes and
//! for one another; graphs are built by hand, read back and changed.

mod client;

use std::sync::atomic::{AtomicU32, Ordering::SeqCst};
use std::time::{Duration, Instant};

use client::{call, download, function, launch, start, upload};

const PTX: &str = "
.version 8.0
.target sm_90
.address_size 64
.visible .entry answer(.param .u64 question, .param .u64 answer)
{
    .reg .u64 %q, %a; .reg .u32 %v; .reg .pred %p;
    ld.param.u64 %q, [question];
    ld.param.u64 %a, [answer];
LOOP:
    ld.acquire.sys.global.u32 %v, [%q];
    setp.eq.u32 %p, %v, 0;
    @%p bra LOOP;
    add.u32 %v, %v, 1;
    st.release.sys.global.u32 [%a], %v;
    ret;
}
.visible .entry append(.param .u64 list, .param .u64 value)
{
    .reg .u64 %l, %o; .reg .u32 %n, %v;
    ld.param.u64 %l, [list];
    ld.param.u32 %v, [value];
    ld.global.u32 %n, [%l];
    add.u32 %n, %n, 1;
    st.global.u32 [%l], %n;
    mul.wide.u32 %o, %n, 4;
    add.u64 %l, %l, %o;
    st.global.u32 [%l], %v;
    ret;
}
";

/// A stream; `flags` 1 is one that does not wait for the default stream.
fn stream(flags: u32) -> usize {
    let mut stream = 0;
    assert_eq!(call!("cuStreamCreate", (*mut usize, u32), (&mut stream, flags)), 0);
    stream
}

fn synchronise(stream: usize) -> i32 {
    call!("cuStreamSynchronize", (usize), (stream))
}

/// Words of pinned memory, zeroed.
fn pinned(count: usize) -> &'static [AtomicU32] {
    let mut at = std::ptr::null::<AtomicU32>();
    let alloc = call!("cuMemAllocHost", (*mut *const AtomicU32, usize), (&mut at, 4 * count));
    assert_eq!(alloc, 0);
    // SAFETY: memory of the library, which no test frees.
    unsafe { std::slice::from_raw_parts(at, count) }
}

fn address_of(word: &AtomicU32) -> u64 {
    word.as_ptr() as u64
}

/// Waits for a word in memory, with no call of the driver.
fn poll(word: &AtomicU32) -> u32 {
    let end = Instant::now() + Duration::from_secs(30);
    while word.load(SeqCst) == 0 {
        assert!(Instant::now() < end, "nobody wrote the word");
        std::thread::yield_now();
    }
    word.load(SeqCst)
}

/// One test, since the driver is the process's.
#[test]
fn streams_go_on_beside_the_host() {
    start();
    let answer = function(PTX, "answer");
    let append = function(PTX, "append");
    the_host_answers_a_kernel(answer);
    streams_wait_for_values(append);
    order_follows_events_and_the_default_stream(append);
    a_graph_is_built_read_and_changed(append);
    threads_share_a_stream(append);
}

fn the_host_answers_a_kernel(answer: usize) {
    let words = pinned(4);
    let (a, b) = (stream(1), stream(1));
    // Kernels of two streams, each of which waits for the host; the second is answered first.
    let launched = |on, i: usize| {
        let params = [address_of(&words[i]), address_of(&words[i + 1])];
        assert_eq!(launch(answer, on, 1, &params), 0);
    };
    launched(a, 0);
    launched(b, 2);
    assert_eq!(call!("cuStreamQuery", (usize), (a)), 600);
    words[2].store(7, SeqCst);
    assert_eq!(poll(&words[3]), 8);
    assert_eq!((synchronise(b), call!("cuStreamQuery", (usize), (a))), (0, 600));
    words[0].store(1, SeqCst);
    assert_eq!(poll(&words[1]), 2);
    assert_eq!(synchronise(a), 0);
}

fn streams_wait_for_values(append: usize) {
    let list = upload(&[0; 8]);
    let flag = pinned(1);
    let (first, second) = (stream(1), stream(1));
    let at = address_of(&flag[0]);
    // `second` appends once `first` has written the flag: at least 5, counting round.
    let wait = |on| call!("cuStreamWaitValue32", (usize, u64, u32, u32), (on, at, 5, 0));
    let write = |on| call!("cuStreamWriteValue32", (usize, u64, u32, u32), (on, at, 6, 0));
    assert_eq!((wait(second), launch(append, second, 1, &[list, 22])), (0, 0));
    assert_eq!(launch(append, first, 1, &[list, 11]), 0);
    assert_eq!((write(first), synchronise(second)), (0, 0));
    assert_eq!(download(list, 3), [2, 11, 22]);
    let misaligned = call!("cuStreamWriteValue32", (usize, u64, u32, u32), (first, at + 2, 0, 0));
    assert_eq!(misaligned, 1);
}

fn order_follows_events_and_the_default_stream(append: usize) {
    let list = upload(&[0; 8]);
    let (early, late) = (stream(1), stream(1));
    let mut event = 0usize;
    assert_eq!(call!("cuEventCreate", (*mut usize, u32), (&mut event, 2)), 0);
    assert_eq!(launch(append, early, 1, &[list, 1]), 0);
    assert_eq!(call!("cuEventRecord", (usize, usize), (event, early)), 0);
    assert_eq!(call!("cuStreamWaitEvent", (usize, usize, u32), (late, event, 0)), 0);
    assert_eq!(launch(append, late, 1, &[list, 2]), 0);
    // Waiting for the second is enough for both.
    assert_eq!(synchronise(late), 0);
    assert_eq!(call!("cuEventQuery", (usize), (event)), 0);
    // A blocking stream goes before what the default stream is given later, and after the rest.
    let blocking = stream(0);
    for (on, value) in [(blocking, 3), (0, 4), (blocking, 5)] {
        assert_eq!(launch(append, on, 1, &[list, value]), 0);
    }
    assert_eq!(synchronise(blocking), 0);
    assert_eq!(download(list, 6), [5, 1, 2, 3, 4, 5]);
}

/// `CUDA_KERNEL_NODE_PARAMS`.
#[repr(C)]
struct KernelParams {
    function: usize,
    grid: [u32; 3],
    block: [u32; 3],
    shared_bytes: u32,
    params: *const *const u64,
    /// `extra`, a kernel in the function's place, and a context: none.
    none: [usize; 3],
}

/// `CUDA_MEMSET_NODE_PARAMS`.
#[repr(C)]
struct FillParams {
    at: u64,
    pitch: usize,
    value: u32,
    element: u32,
    width: usize,
    height: usize,
}

fn a_graph_is_built_read_and_changed(append: usize) {
    let list = upload(&[9; 8]);
    let (mut graph, mut exec) = (0usize, 0usize);
    assert_eq!(call!("cuGraphCreate", (*mut usize, u32), (&mut graph, 0)), 0);
    let mut nodes = [0usize; 3];
    let kernel = |values: &[u64; 2]| {
        let params = values.each_ref().map(|v| &raw const *v);
        let params: &'static [*const u64] = params.to_vec().leak();
        let (grid, block, params) = ([1; 3], [1; 3], params.as_ptr());
        KernelParams { function: append, grid, block, shared_bytes: 0, params, none: [0; 3] }
    };
    // The kernels are made first, and the fill that goes before them by an edge that comes later.
    let (eleven, twelve, thirteen) = ([list, 11], [list, 12], [list, 13]);
    for (i, values) in [&eleven, &twelve].into_iter().enumerate() {
        let (node, after) = (&raw mut nodes[i], nodes[0]);
        let added = call!(
            "cuGraphAddKernelNode",
            (*mut usize, usize, *const usize, usize, *const KernelParams),
            (node, graph, &after, i, &kernel(values))
        );
        assert_eq!(added, 0);
    }
    let fill = FillParams { at: list, pitch: 0, value: 0, element: 4, width: 8, height: 1 };
    let added = call!(
        "cuGraphAddMemsetNode",
        (*mut usize, usize, *const usize, usize, *const FillParams, usize),
        (&raw mut nodes[2], graph, std::ptr::null(), 0, &fill, 0)
    );
    assert_eq!(added, 0);
    let edge = |add: &str| match add {
        "add" => call!(
            "cuGraphAddDependencies",
            (usize, *const usize, *const usize, usize, usize),
            (graph, &nodes[2], &nodes[0], 0, 1)
        ),
        _ => call!(
            "cuGraphAddDependencies",
            (usize, *const usize, *const usize, usize, usize),
            (graph, &nodes[1], &nodes[2], 0, 1)
        ),
    };
    assert_eq!(edge("add"), 0);
    let instantiate = |exec: &mut usize| {
        call!("cuGraphInstantiateWithFlags", (*mut usize, usize, u64), (exec, graph, 0))
    };
    assert_eq!(instantiate(&mut exec), 0);
    let launch = |exec| call!("cuGraphLaunch", (usize, usize), (exec, 0));
    assert_eq!((launch(exec), launch(exec)), (0, 0));
    assert_eq!(download(list, 4), [2, 11, 12, 0]);

    // The executable graph is changed, the graph it came from is not.
    let set = call!(
        "cuGraphExecKernelNodeSetParams",
        (usize, usize, *const KernelParams),
        (exec, nodes[1], &kernel(&thirteen))
    );
    assert_eq!((set, launch(exec)), (0, 0));
    assert_eq!(download(list, 3), [2, 11, 13]);
    let (mut count, mut kind) = (0usize, 9u32);
    let edges = call!(
        "cuGraphGetEdges",
        (usize, usize, usize, usize, *mut usize),
        (graph, 0, 0, 0, &mut count)
    );
    assert_eq!((edges, count), (0, 2));
    assert_eq!(call!("cuGraphNodeGetType", (usize, *mut u32), (nodes[2], &mut kind)), 0);
    assert_eq!(kind, 2);
    // It takes the graph's parameters again.
    let mut result = [0usize; 3];
    let update =
        call!("cuGraphExecUpdate", (usize, usize, *mut usize), (exec, graph, result.as_mut_ptr()));
    assert_eq!((update, result[0], launch(exec)), (0, 0, 0));
    assert_eq!(download(list, 3), [2, 11, 12]);
    // Nodes that wait in a circle cannot be ordered.
    assert_eq!(edge("circle"), 0);
    assert_eq!(instantiate(&mut exec), 1);
}

/// What is copied from pageable memory has been read when the call returns, also where another
/// thread has just given the stream a kernel: the client may write there again.
fn threads_share_a_stream(append: usize) {
    let client = || {
        let (mut context, bytes) = (0usize, 64 * 4);
        let retained = call!("cuDevicePrimaryCtxRetain", (*mut usize, i32), (&mut context, 0));
        assert_eq!((retained, call!("cuCtxSetCurrent", (usize), (context))), (0, 0));
        let (copied, list) = (upload(&[0; 64]), upload(&[0; 256]));
        for round in 1..200u32 {
            assert_eq!(launch(append, 0, 1, &[list, u64::from(round)]), 0);
            let mut values = [round; 64];
            let copy = call!(
                "cuMemcpyHtoDAsync",
                (u64, *const u32, usize, usize),
                (copied, values.as_ptr(), bytes, 0)
            );
            values.fill(u32::MAX);
            assert_eq!(copy, 0);
            assert_eq!(std::hint::black_box(values)[0], u32::MAX);
            assert_eq!(download(copied, 64), [round; 64]);
        }
    };
    std::thread::scope(|scope| (0..4).for_each(|_| drop(scope.spawn(client))));
}
