//! Graphs whose nodes choose, and what graphs keep alive; managed memory and pools of the host.

mod client;

use std::ffi::{c_int, c_void};
use std::sync::atomic::{AtomicU32, Ordering::SeqCst};

use client::{call, download, function, start, upload};

/// `append(p)` adds 1 to a word; `count_down(handle, p)` takes 1 from it and goes on while it is
/// not 0.
const PTX: &str = ".version 8.0
.target sm_90
.address_size 64
.extern .func cudaGraphSetConditional(.param .b64 handle, .param .b32 value);
.visible .entry append(.param .u64 p)
{
    .reg .u64 %p; .reg .u32 %v;
    ld.param.u64 %p, [p];
    ld.global.u32 %v, [%p];
    add.u32 %v, %v, 1;
    st.global.u32 [%p], %v;
    ret;
}
.visible .entry count_down(.param .u64 handle, .param .u64 p)
{
    .reg .u64 %p, %h; .reg .u32 %v;
    ld.param.u64 %h, [handle];
    ld.param.u64 %p, [p];
    ld.global.u32 %v, [%p];
    sub.u32 %v, %v, 1;
    st.global.u32 [%p], %v;
    { .param .b64 a; .param .b32 b; st.param.b64 [a], %h; st.param.b32 [b], %v;
      call cudaGraphSetConditional, (a, b); }
    ret;
}
";

const IF: u32 = 0;
const WHILE: u32 = 1;
const SWITCH: u32 = 2;

#[test]
fn nodes_choose_and_memory_is_where_it_was_asked_for() {
    start();
    conditions_choose();
    a_graph_that_was_given_need_not_be_told();
    an_executable_keeps_what_its_graph_kept();
    nothing_is_taken_from_a_graph_that_allocates();
    managed_memory_tells_what_was_advised();
    pools_have_a_place();
}

/// As cuda-samples' graphConditionalNodes ends its capture into a conditional node's body.
fn a_graph_that_was_given_need_not_be_told() {
    let append = function(PTX, "append");
    let (given, at, mut stream) = (graph(), upload(&[0]), 0usize);
    assert_eq!(call!("cuStreamCreate", (*mut usize, u32), (&mut stream, 1)), 0);
    let begin = call!(
        "cuStreamBeginCaptureToGraph",
        (usize, usize, usize, usize, usize, u32),
        (stream, given, 0, 0, 0, 0)
    );
    assert_eq!(begin, 0);
    assert_eq!(client::launch(append, stream, 1, &[at]), 0);
    assert_eq!(call!("cuStreamEndCapture", (usize, usize), (stream, 0)), 0);
    let mut nodes = 0usize;
    let counted = call!("cuGraphGetNodes", (usize, usize, *mut usize), (given, 0, &mut nodes));
    assert_eq!((counted, nodes), (0, 1));
    // Of a graph that the capture made itself the client has to be told.
    assert_eq!(call!("cuStreamBeginCapture", (usize, u32), (stream, 0)), 0);
    assert_eq!(call!("cuStreamEndCapture", (usize, usize), (stream, 0)), 1);
}

fn graph() -> usize {
    let mut graph = 0;
    assert_eq!(call!("cuGraphCreate", (*mut usize, u32), (&mut graph, 0)), 0);
    graph
}

fn condition(graph: usize, default: u32) -> u64 {
    let mut condition = 0;
    let create = call!(
        "cuGraphConditionalHandleCreate",
        (*mut u64, usize, usize, u32, u32),
        (&mut condition, graph, 0, default, 1)
    );
    assert_eq!(create, 0);
    condition
}

/// Adds a conditional node; its graphs.
fn conditional(graph: usize, condition: u64, kind: u32, count: u32) -> Result<Vec<usize>, c_int> {
    // The type, and the union: handle, type and size, where the graphs are told, the context.
    let mut params = [0u64; 32];
    params[0] = 13;
    params[2] = condition;
    params[3] = u64::from(kind) | u64::from(count) << 32;
    let mut node = 0usize;
    let code = call!(
        "cuGraphAddNode",
        (*mut usize, usize, *const usize, *const u64, usize, *mut u64),
        (&mut node, graph, std::ptr::null(), std::ptr::null(), 0, params.as_mut_ptr())
    );
    if code != 0 {
        return Err(code);
    }
    // SAFETY: the driver's list of so many graphs.
    Ok(unsafe { std::slice::from_raw_parts(params[4] as *const usize, count as usize) }.to_vec())
}

/// `CUDA_KERNEL_NODE_PARAMS`.
#[repr(C)]
struct KernelParams {
    function: usize,
    grid: [u32; 3],
    block: [u32; 3],
    shared_bytes: u32,
    params: *const *const u64,
    extra: usize,
}

fn kernel(graph: usize, function: usize, values: &[u64]) {
    let pointers: Vec<*const u64> = values.iter().map(|v| &raw const *v).collect();
    let params = KernelParams {
        function,
        grid: [1; 3],
        block: [1; 3],
        shared_bytes: 0,
        params: pointers.as_ptr(),
        extra: 0,
    };
    let mut node = 0usize;
    let add = call!(
        "cuGraphAddKernelNode",
        (*mut usize, usize, *const usize, usize, *const KernelParams),
        (&mut node, graph, std::ptr::null(), 0, &params)
    );
    assert_eq!(add, 0);
}

fn instantiate(graph: usize) -> usize {
    let mut exec = 0;
    let made =
        call!("cuGraphInstantiateWithFlags", (*mut usize, usize, u64), (&mut exec, graph, 0));
    assert_eq!(made, 0);
    exec
}

fn run(exec: usize) {
    assert_eq!(call!("cuGraphLaunch", (usize, usize), (exec, 0)), 0);
    assert_eq!(call!("cuStreamSynchronize", (usize), (0)), 0);
}

fn conditions_choose() {
    let (append, count_down) = (function(PTX, "append"), function(PTX, "count_down"));
    // Which of two graphs runs, by the value that each launch begins with.
    for (kind, value, expected) in [
        (IF, 1, [1, 0]),
        (IF, 7, [1, 0]),
        (IF, 0, [0, 1]),
        (SWITCH, 0, [1, 0]),
        (SWITCH, 1, [0, 1]),
        (SWITCH, 2, [0, 0]),
    ] {
        let graph = graph();
        let counts = [upload(&[0]), upload(&[0])];
        let bodies = conditional(graph, condition(graph, value), kind, 2).unwrap();
        for (body, at) in bodies.into_iter().zip(counts) {
            kernel(body, append, &[at]);
        }
        let exec = instantiate(graph);
        run(exec);
        run(exec);
        let found = counts.map(|at| download(at, 1)[0]);
        assert_eq!(found, expected.map(|n| 2 * n), "type {kind}, value {value}");
    }
    // A kernel decides how often.
    let graph = graph();
    let [left, turns] = [upload(&[5]), upload(&[0])];
    let goes_on = condition(graph, 1);
    let body = conditional(graph, goes_on, WHILE, 1).unwrap()[0];
    kernel(body, append, &[turns]);
    kernel(body, count_down, &[goes_on, left]);
    run(instantiate(graph));
    assert_eq!((download(left, 1), download(turns, 1)), (vec![0], vec![5]));
    // No loop of two graphs, no condition that nobody made.
    assert_eq!(conditional(graph, goes_on, WHILE, 2), Err(1));
    assert_eq!(conditional(graph, 0x1234, IF, 1), Err(1));
}

static RELEASED: AtomicU32 = AtomicU32::new(0);

extern "C" fn release(by: *mut c_void) {
    RELEASED.fetch_add(by as u32, SeqCst);
}

/// A user object lives until the last graph, copy and executable that holds it is gone.
fn an_executable_keeps_what_its_graph_kept() {
    let (original, mut object, mut copy) = (graph(), 0usize, 0usize);
    let create = call!(
        "cuUserObjectCreate",
        (*mut usize, usize, extern "C" fn(*mut c_void), u32, u32),
        (&mut object, 3, release, 1, 1)
    );
    assert_eq!(create, 0);
    let give = call!("cuGraphRetainUserObject", (usize, usize, u32, u32), (original, object, 1, 1));
    assert_eq!(give, 0);
    assert_eq!(call!("cuGraphClone", (*mut usize, usize), (&mut copy, original)), 0);
    let exec = instantiate(copy);
    for (step, released) in [0, 0, 3].into_iter().enumerate() {
        let code = match step {
            0 => call!("cuGraphDestroy", (usize), (original)),
            1 => call!("cuGraphDestroy", (usize), (copy)),
            _ => call!("cuGraphExecDestroy", (usize), (exec)),
        };
        assert_eq!((code, RELEASED.load(SeqCst)), (0, released), "step {step}");
    }
}

fn nothing_is_taken_from_a_graph_that_allocates() {
    let (graph, mut nodes, mut at) = (graph(), [0usize; 2], 0u64);
    for node in &mut nodes {
        let add = call!(
            "cuGraphAddEmptyNode",
            (*mut usize, usize, *const usize, usize),
            (node, graph, std::ptr::null(), 0)
        );
        assert_eq!(add, 0);
    }
    assert_eq!(call!("cuGraphDestroyNode", (usize), (nodes[0])), 0);
    assert_eq!(call!("cuMemAlloc", (*mut u64, usize), (&mut at, 64)), 0);
    let mut free = 0usize;
    let mut add = |at| {
        call!(
            "cuGraphAddMemFreeNode",
            (*mut usize, usize, *const usize, usize, u64),
            (&mut free, graph, std::ptr::null(), 0, at)
        )
    };
    assert_eq!((add(0), add(at)), (1, 0));
    assert_eq!(call!("cuGraphDestroyNode", (usize), (nodes[1])), 801);
    assert_eq!(call!("cuGraphDestroy", (usize), (graph)), 0);
}

/// `CUmemLocation`s: device 0, the host.
const DEVICE: [i32; 2] = [1, 0];
const HOST: [i32; 2] = [2, 0];

fn packed([on, device]: [i32; 2]) -> u64 {
    u64::from(on as u32) | u64::from(device as u32) << 32
}

fn managed_memory_tells_what_was_advised() {
    let mut at = 0u64;
    assert_eq!(call!("cuMemAllocManaged", (*mut u64, usize, u32), (&mut at, 4096, 1)), 0);
    let attribute = |which: u32| {
        let mut value = [9i32; 2];
        let code = call!(
            "cuMemRangeGetAttribute",
            (*mut i32, usize, u32, u64, usize),
            (value.as_mut_ptr(), 8, which, at, 4096)
        );
        assert_eq!(code, 0);
        value[0]
    };
    let advise = |at: u64, advice, location| {
        call!("cuMemAdvise", (u64, usize, u32, u64), (at, 4096, advice, packed(location)))
    };
    // Read-mostly, preferred location, accessed by, last prefetched: -2 is nowhere, -1 the host.
    assert_eq!([1, 2, 3, 4].map(attribute), [0, -2, -2, -2]);
    for advice in [1, 3, 5] {
        assert_eq!(advise(at, advice, DEVICE), 0);
    }
    let prefetch = |location| {
        call!(
            "cuMemPrefetchAsync",
            (u64, usize, u64, u32, usize),
            (at, 4096, packed(location), 0, 0)
        )
    };
    assert_eq!(prefetch(HOST), 0);
    assert_eq!([1, 2, 3, 4].map(attribute), [1, 0, 0, -1]);
    for advice in [2, 4, 6] {
        assert_eq!(advise(at, advice, DEVICE), 0);
    }
    assert_eq!(prefetch(DEVICE), 0);
    assert_eq!([1, 2, 3, 4].map(attribute), [0, -2, -2, 0]);
    // Memory that is not managed, a device that is not there.
    assert_eq!(advise(upload(&[0; 1024]), 1, DEVICE), 1);
    assert_eq!(prefetch([1, 7]), 101);
    let mut managed = 0u32;
    let code = call!("cuPointerGetAttribute", (*mut u32, u32, u64), (&mut managed, 8, at));
    assert_eq!((code, managed), (0, 1));
    assert_eq!(call!("cuMemFree", (u64), (at)), 0);
}

fn pools_have_a_place() {
    const PINNED: u32 = 1;
    const MANAGED: u32 = 2;
    for (kind, location) in [(PINNED, HOST), (MANAGED, DEVICE), (MANAGED, [0, 0])] {
        let mut pool = 0usize;
        let code = call!(
            "cuMemGetDefaultMemPool",
            (*mut usize, *const [i32; 2], u32),
            (&mut pool, &location, kind)
        );
        assert_eq!(code, 0);
        let mut at = 0u64;
        let from = |at: &mut u64, bytes| {
            call!("cuMemAllocFromPoolAsync", (*mut u64, usize, usize, usize), (at, bytes, pool, 0))
        };
        assert_eq!(from(&mut at, 64), 0);
        // The host writes it as its own.
        // SAFETY: memory of the host, of 64 bytes.
        unsafe { (at as *mut u32).write(77) };
        assert_eq!(download(at, 1), [77]);
        assert_eq!(call!("cuMemFreeAsync", (u64, usize), (at, 0)), 0);
        assert_eq!(call!("cuStreamSynchronize", (usize), (0)), 0);
        // No byte is no memory, and may be freed.
        assert_eq!((from(&mut at, 0), at), (0, 0));
        assert_eq!(call!("cuMemFreeAsync", (u64, usize), (at, 0)), 0);
        assert_eq!(call!("cuStreamSynchronize", (usize), (0)), 0);
        assert_eq!(call!("cuMemPoolDestroy", (usize), (pool)), 1);
    }
}
