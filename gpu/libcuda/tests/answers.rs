//! What the driver answers to questions that change nothing.

mod client;

use client::{call, function, start, upload};

const INVALID_VALUE: i32 = 1;

#[test]
fn questions_are_answered() {
    start();
    a_forked_child_has_no_driver();
    what_is_no_function_has_no_name();
    memory_is_registered_once();
    a_thread_has_a_capture_mode();
    graphs_and_nodes_are_numbered();
    a_choice_about_memory_is_kept();
    registers_are_limited_as_the_client_says();
    dynamic_shared_memory_keeps_to_what_a_launch_may_ask_for();
    logs_are_filled_and_say_how_much();
    a_library_is_no_input_that_must_be_ptx();
}

/// On hardware too: a child that was forked behind `cuInit` gets "initialization error" from every
/// call, `cuInit` among them (clients detect forks by it: Numba's `test_fork`, PyTorch's "Cannot
/// re-initialize CUDA in forked subprocess").
#[cfg(unix)]
fn a_forked_child_has_no_driver() {
    const NOT_INITIALIZED: i32 = 3;
    unsafe extern "C" {
        fn fork() -> i32;
        fn waitpid(child: i32, status: *mut i32, options: i32) -> i32;
        fn _exit(code: i32) -> !;
    }
    let ask = || {
        let (mut devices, mut context) = (0, 0usize);
        [
            call!("cuInit", (u32), (0)),
            call!("cuDeviceGetCount", (*mut i32), (&mut devices)),
            call!("cuCtxGetCurrent", (*mut usize), (&mut context)),
        ]
    };
    assert_eq!(ask(), [0; 3]);
    // SAFETY: the child does nothing but ask, and leaves without running handlers at exit.
    let child = unsafe {
        match fork() {
            0 => _exit((ask() == [NOT_INITIALIZED; 3]).into()),
            child => child,
        }
    };
    let mut status = 0;
    // SAFETY: the status is a live local.
    assert_eq!(unsafe { waitpid(child, &mut status, 0) }, child);
    // An exit's code stands in the second byte.
    assert_eq!(status, 1 << 8);
    assert_eq!(ask(), [0; 3]);
}

fn what_is_no_function_has_no_name() {
    let mut name = 0usize;
    for ask in ["cuFuncGetName", "cuKernelGetName"] {
        let code = match ask {
            "cuFuncGetName" => call!("cuFuncGetName", (*mut usize, usize), (&mut name, 0)),
            _ => call!("cuKernelGetName", (*mut usize, usize), (&mut name, 0)),
        };
        assert_eq!(code, INVALID_VALUE, "{ask}");
    }
}

fn memory_is_registered_once() {
    const ALREADY_REGISTERED: i32 = 712;
    let mut memory = vec![0u8; 4096];
    let mut at = |offset: usize| &raw mut memory[offset];
    let (first, second) = (at(0), at(1000));
    let register = |at, bytes| call!("cuMemHostRegister", (*mut u8, usize, u32), (at, bytes, 0));
    let unregister = |at| call!("cuMemHostUnregister", (*mut u8), (at));
    assert_eq!(register(first, 2000), 0);
    assert_eq!(register(second, 3000), ALREADY_REGISTERED);
    assert_eq!(unregister(second), INVALID_VALUE);
    assert_eq!(unregister(first), 0);
    assert_eq!(register(second, 3000), 0);
    assert_eq!(unregister(second), 0);
}

fn a_thread_has_a_capture_mode() {
    let exchange = |new: u32| {
        let mut mode = new;
        let code = call!("cuThreadExchangeStreamCaptureMode", (*mut u32), (&mut mode));
        (code, mode)
    };
    assert_eq!(exchange(2), (0, 0));
    assert_eq!(exchange(1), (0, 2));
    std::thread::scope(|s| s.spawn(|| assert_eq!(exchange(2), (0, 0))).join().unwrap());
    assert_eq!(exchange(0), (0, 1));
    assert_eq!(exchange(3).0, INVALID_VALUE);
}

fn graphs_and_nodes_are_numbered() {
    let mut ids = std::collections::BTreeSet::new();
    for _ in 0..2 {
        let (mut graph, mut node, mut id) = (0usize, 0usize, 0u32);
        assert_eq!(call!("cuGraphCreate", (*mut usize, u32), (&mut graph, 0)), 0);
        let add = call!(
            "cuGraphAddEmptyNode",
            (*mut usize, usize, usize, usize),
            (&mut node, graph, 0, 0)
        );
        assert_eq!(add, 0);
        assert_eq!(call!("cuGraphGetId", (usize, *mut u32), (graph, &mut id)), 0);
        assert!(ids.insert(id));
        assert_eq!(call!("cuGraphNodeGetLocalId", (usize, *mut u32), (node, &mut id)), 0);
        assert!(ids.insert(id));
        assert_eq!(call!("cuGraphDestroy", (usize), (graph)), 0);
        assert_ne!(call!("cuGraphGetId", (usize, *mut u32), (graph, &mut id)), 0);
    }
}

fn a_choice_about_memory_is_kept() {
    const SYNC_MEMOPS: u32 = 6;
    let at = upload(&[0; 4]);
    let get = || {
        let mut chosen = 9u32;
        let code =
            call!("cuPointerGetAttribute", (*mut u32, u32, u64), (&mut chosen, SYNC_MEMOPS, at));
        (code, chosen)
    };
    let set = |value: u32| {
        call!("cuPointerSetAttribute", (*const u32, u32, u64), (&value, SYNC_MEMOPS, at))
    };
    assert_eq!(get(), (0, 0));
    assert_eq!((set(1), get()), (0, (0, 1)));
    assert_eq!((set(0), get()), (0, (0, 0)));
}

/// A kernel with many registers that are live at once.
fn hungry() -> String {
    let body: String =
        (0..100).map(|i| format!("ld.global.u32 %r{i}, [%rd0+{}];\n", 4 * i)).collect();
    let sums: String = (1..100).map(|i| format!("add.u32 %r0, %r0, %r{i};\n")).collect();
    format!(
        ".version 8.5\n.target sm_90\n.address_size 64\n.visible .entry k(.param .u64 p)\n{{\n\
         .reg .b32 %r<100>;\n.reg .b64 %rd<1>;\nld.param.u64 %rd0, [p];\n{body}{sums}\
         st.global.u32 [%rd0], %r0;\nret;\n}}\n"
    )
}

fn registers_of(function: usize) -> i32 {
    const NUM_REGS: i32 = 4;
    let mut registers = 0;
    let ask =
        call!("cuFuncGetAttribute", (*mut i32, i32, usize), (&mut registers, NUM_REGS, function));
    assert_eq!(ask, 0);
    registers
}

fn registers_are_limited_as_the_client_says() {
    const MAX_REGISTERS: u32 = 0;
    let ptx = std::ffi::CString::new(hungry()).unwrap();
    assert!(registers_of(function(ptx.to_str().unwrap(), "k")) > 90);
    let (mut module, mut limited, options, values) = (0usize, 0usize, [MAX_REGISTERS], [40usize]);
    let load = call!(
        "cuModuleLoadDataEx",
        (*mut usize, *const i8, u32, *const u32, *const usize),
        (&mut module, ptx.as_ptr(), 1, options.as_ptr(), values.as_ptr())
    );
    assert_eq!(load, 0);
    let name = c"k".as_ptr();
    let get =
        call!("cuModuleGetFunction", (*mut usize, usize, *const i8), (&mut limited, module, name));
    assert_eq!(get, 0);
    assert_eq!(registers_of(limited), 40);
}

fn dynamic_shared_memory_keeps_to_what_a_launch_may_ask_for() {
    const DYNAMIC_SHARED: i32 = 8;
    let k = function(&hungry(), "k");
    let room = |blocks: i32| {
        let mut bytes = 0usize;
        let ask = call!(
            "cuOccupancyAvailableDynamicSMemPerBlock",
            (*mut usize, usize, i32, i32),
            (&mut bytes, k, blocks, 128)
        );
        assert_eq!(ask, 0);
        bytes
    };
    assert_eq!(room(1), 48 << 10);
    assert!(room(8) < 48 << 10);
    let opt_in = 200 << 10;
    let set = call!("cuFuncSetAttribute", (usize, i32, i32), (k, DYNAMIC_SHARED, opt_in as i32));
    assert_eq!((set, room(1)), (0, opt_in));
}

const HEADER: &str = ".version 8.5\n.target sm_90\n.address_size 64\n";

/// cuda.h: "on output, amount of the buffer filled with messages". Clients take so much of it.
fn logs_are_filled_and_say_how_much() {
    let (info, error) = (vec![7u8; 64], vec![7u8; 32]);
    let options = [3u32, 4, 5, 6];
    let sizes = [info.as_ptr() as usize, 64, error.as_ptr() as usize, 32];
    let text = |log: &Vec<u8>| log.split(|b| *b == 0).next().unwrap().to_vec();
    let load = |ptx: &str| {
        let (image, mut values, mut module) = (format!("{ptx}\0"), sizes, 0usize);
        let code = call!(
            "cuModuleLoadDataEx",
            (*mut usize, *const u8, u32, *const u32, *mut usize),
            (&mut module, image.as_ptr(), 4, options.as_ptr(), values.as_mut_ptr())
        );
        (code, values[1], values[3])
    };
    assert_eq!(load(HEADER), (0, 0, 0));
    assert_eq!((text(&info), text(&error)), (vec![], vec![]));
    let (code, said, filled) = load(&format!("{HEADER}.visible .entry k("));
    // As much as there is room for, with a NUL.
    assert_eq!((code, said, filled), (218, 0, 31));
    assert_eq!(text(&error).len(), 31);

    let (mut values, mut link) = (sizes, 0usize);
    let create = call!(
        "cuLinkCreate",
        (u32, *const u32, *mut usize, *mut usize),
        (4, options.as_ptr(), values.as_mut_ptr(), &mut link)
    );
    assert_eq!((create, values[1], values[3]), (0, 0, 0));
    let twice = format!("{HEADER}.visible .func f() {{ ret; }}\0");
    for _ in 0..2 {
        let (at, bytes) = (twice.as_ptr(), twice.len());
        let code = call!(
            "cuLinkAddData",
            (usize, u32, *const u8, usize, usize, u32, usize, usize),
            (link, 1, at, bytes, 0, 0, 0, 0)
        );
        assert_eq!(code, 0);
    }
    let (mut image, mut bytes) = (0usize, 0usize);
    let complete =
        call!("cuLinkComplete", (usize, *mut usize, *mut usize), (link, &mut image, &mut bytes));
    assert_eq!((complete, values[1]), (218, 0));
    assert!(values[3] > 0 && values[3] == text(&error).len(), "{values:?}");
    assert_eq!(call!("cuLinkDestroy", (usize), (link)), 0);
}

/// As PyCUDA hands over the device runtime: it is machine code, and a program may need nothing of
/// it.
fn a_library_is_no_input_that_must_be_ptx() {
    const LIBRARY: u32 = 4;
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("libsome.a");
    std::fs::write(&path, "!<arch>\n").unwrap();
    let mut link = 0usize;
    let create = call!("cuLinkCreate", (u32, usize, usize, *mut usize), (0, 0, 0, &mut link));
    assert_eq!(create, 0);
    let add = |path: &std::path::Path| {
        let path = std::ffi::CString::new(path.to_str().unwrap()).unwrap();
        call!(
            "cuLinkAddFile",
            (usize, u32, *const std::ffi::c_char, u32, usize, usize),
            (link, LIBRARY, path.as_ptr(), 0, 0, 0)
        )
    };
    assert_eq!((add(&path), add(&folder.path().join("none.a"))), (0, 301));
    assert_eq!(call!("cuLinkDestroy", (usize), (link)), 0);
}
