//! Memory beyond `cuMemAlloc`: mapped by hand, from pools, and shared between processes.

mod client;

use std::ffi::c_int;
use std::process::Command;

use client::{call, download, start, upload};

/// Bytes of a page of mapped memory.
const PAGE: usize = 2 << 20;

/// Set for the second process of the test: the handle, in hexadecimal digits.
const HANDLE: &str = "FATHOM_TEST_IPC_HANDLE";

/// As `HANDLE`, of an event.
const EVENT: &str = "FATHOM_TEST_IPC_EVENT";

/// `CUipcMemHandle`, `CUipcEventHandle`.
#[repr(C)]
#[derive(Clone, Copy)]
struct IpcHandle([u64; 8]);

impl IpcHandle {
    fn digits(&self) -> String {
        self.0.iter().map(|word| format!("{word:016x}")).collect()
    }

    fn of(digits: &str) -> IpcHandle {
        let word = |i: usize| u64::from_str_radix(&digits[16 * i..16 * i + 16], 16).unwrap();
        IpcHandle(std::array::from_fn(word))
    }
}

#[test]
fn memory_is_mapped_pooled_and_shared() {
    start();
    if let Ok(event) = std::env::var(EVENT) {
        return wait_for_what_another_process_recorded(&std::env::var(HANDLE).unwrap(), &event);
    }
    if let Ok(handle) = std::env::var(HANDLE) {
        return write_what_another_process_has(&handle);
    }
    pages_are_mapped_side_by_side_and_twice();
    pools_count_what_they_gave();
    another_process_writes();
    another_process_waits_for_an_event();
}

fn pages_are_mapped_side_by_side_and_twice() {
    // A pinned allocation on device 0, and access from there.
    let properties: [u32; 8] = [1, 0, 1, 0, 0, 0, 0, 0];
    let access: [u32; 3] = [1, 0, 3];
    let (mut pages, mut at, mut alias) = ([0usize; 2], 0u64, 0u64);
    for page in &mut pages {
        let create = call!(
            "cuMemCreate",
            (*mut usize, usize, *const [u32; 8], u64),
            (page, PAGE, &properties, 0)
        );
        assert_eq!(create, 0);
    }
    for to in [&mut at, &mut alias] {
        let reserve = call!(
            "cuMemAddressReserve",
            (*mut u64, usize, usize, u64, u64),
            (to, 4 * PAGE, 0, 0, 0)
        );
        assert_eq!(reserve, 0);
    }
    let map = |at, page| call!("cuMemMap", (u64, usize, usize, usize, u64), (at, PAGE, 0, page, 0));
    let allow = |at, bytes| {
        call!("cuMemSetAccess", (u64, usize, *const [u32; 3], usize), (at, bytes, &access, 1))
    };
    let write = |at, values: &[u32]| {
        let from = values.as_ptr();
        call!("cuMemcpyHtoD", (u64, *const u32, usize), (at, from, size_of_val(values)))
    };
    let next = at + PAGE as u64;
    assert_eq!((map(at, pages[0]), map(next, pages[1])), (0, 0));
    assert_eq!(map(at, pages[1]), 1, "there is something already");
    assert_eq!(write(at, &[1]), 1, "nobody has access yet");
    assert_eq!(allow(at, 2 * PAGE), 0);
    // Across the border of both pages, which are the other way round at the other address.
    assert_eq!(write(next - 8, &[1, 2, 3, 4]), 0);
    assert_eq!((map(alias, pages[1]), map(alias + PAGE as u64, pages[0])), (0, 0));
    assert_eq!(allow(alias, 2 * PAGE), 0);
    assert_eq!(download(alias, 2), [3, 4]);
    assert_eq!(download(alias + 2 * PAGE as u64 - 8, 2), [1, 2]);
    // Unmapped, the addresses have nothing, and the memory stays for the other mapping.
    assert_eq!(call!("cuMemUnmap", (u64, usize), (at, 2 * PAGE)), 0);
    assert_eq!(write(at, &[1]), 1);
    for page in pages {
        assert_eq!(call!("cuMemRelease", (usize), (page)), 0);
    }
    assert_eq!(download(alias, 2), [3, 4]);
    assert_eq!(call!("cuMemAddressFree", (u64, usize), (at, 4 * PAGE)), 0);
    assert_eq!(call!("cuMemAddressFree", (u64, usize), (alias, 4 * PAGE)), 1, "still mapped");
}

fn pools_count_what_they_gave() {
    let (mut pool, mut at, mut used, mut high) = (0usize, 0u64, 9u64, 9u64);
    assert_eq!(call!("cuDeviceGetDefaultMemPool", (*mut usize, c_int), (&mut pool, 0)), 0);
    let alloc = call!("cuMemAllocAsync", (*mut u64, usize, usize), (&mut at, 1000, 0));
    assert_eq!(alloc, 0);
    let get = |which: u32, to: &mut u64| {
        call!("cuMemPoolGetAttribute", (usize, u32, *mut u64), (pool, which, to))
    };
    assert_eq!((get(7, &mut used), used), (0, 1000));
    assert_eq!(call!("cuMemFreeAsync", (u64, usize), (at, 0)), 0);
    assert_eq!(call!("cuStreamSynchronize", (usize), (0)), 0);
    assert_eq!((get(7, &mut used), used), (0, 0));
    assert_eq!((get(8, &mut high), high), (0, 1000));
}

fn another_process_writes() {
    let at = upload(&[10, 20, 30]);
    let mut handle = IpcHandle([0; 8]);
    assert_eq!(call!("cuIpcGetMemHandle", (*mut IpcHandle, u64), (&mut handle, at + 4)), 0);
    assert_eq!(download(at, 3), [10, 20, 30]);
    let program = std::env::current_exe().unwrap();
    let output = Command::new(program).env(HANDLE, handle.digits()).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
    assert_eq!(download(at, 3), [10, 21, 30]);
    let mut own = 0u64;
    let open = call!("cuIpcOpenMemHandle", (*mut u64, IpcHandle, u32), (&mut own, handle, 1));
    assert_eq!(open, 201, "a process does not open its own memory");
}

fn write_what_another_process_has(digits: &str) {
    let at = open_memory(digits);
    let before = download(at, 2);
    assert_eq!(before, [20, 30]);
    let after = [before[0] + 1];
    assert_eq!(call!("cuMemcpyHtoD", (u64, *const u32, usize), (at, after.as_ptr(), 4)), 0);
    assert_eq!(call!("cuIpcCloseMemHandle", (u64), (at)), 0);
}

fn open_memory(digits: &str) -> u64 {
    let mut at = 0u64;
    let handle = IpcHandle::of(digits);
    let open = call!("cuIpcOpenMemHandle", (*mut u64, IpcHandle, u32), (&mut at, handle, 1));
    assert_eq!(open, 0);
    at
}

fn event(flags: u32) -> (c_int, usize) {
    let mut event = 0usize;
    (call!("cuEventCreate", (*mut usize, u32), (&mut event, flags)), event)
}

fn stream_beside_others() -> usize {
    let mut stream = 0usize;
    assert_eq!(call!("cuStreamCreate", (*mut usize, u32), (&mut stream, 1)), 0);
    stream
}

fn write(at: u64, value: u32) {
    assert_eq!(call!("cuMemcpyHtoD", (u64, *const u32, usize), (at, &value, 4)), 0);
}

/// A record counts for all processes from its call on, also while its stream waits.
fn another_process_waits_for_an_event() {
    const NO_TIMING: u32 = 2;
    const BETWEEN_PROCESSES: u32 = 4;
    assert_eq!(event(BETWEEN_PROCESSES).0, 1, "such an event takes no time");
    let mut handle = IpcHandle([0; 8]);
    let plain = event(NO_TIMING).1;
    let get = call!("cuIpcGetEventHandle", (*mut IpcHandle, usize), (&mut handle, plain));
    assert_eq!(get, 400, "it was not made for other processes");
    let shared = event(BETWEEN_PROCESSES | NO_TIMING).1;
    // The first word is the other process's to say that it has come to wait.
    let (at, gate, stream) = (upload(&[0, 0]), upload(&[0]), stream_beside_others());
    let mut memory = IpcHandle([0; 8]);
    assert_eq!(call!("cuIpcGetMemHandle", (*mut IpcHandle, u64), (&mut memory, at)), 0);
    let wait = call!("cuStreamWaitValue32", (usize, u64, u32, u32), (stream, gate, 1, 0));
    assert_eq!(wait, 0);
    let set = call!("cuMemsetD32Async", (u64, u32, usize, usize), (at + 4, 7, 1, stream));
    assert_eq!(set, 0);
    assert_eq!(call!("cuEventRecord", (usize, usize), (shared, stream)), 0);
    let get = call!("cuIpcGetEventHandle", (*mut IpcHandle, usize), (&mut handle, shared));
    assert_eq!(get, 0);
    let program = std::env::current_exe().unwrap();
    let mut command = Command::new(program);
    command.env(HANDLE, memory.digits()).env(EVENT, handle.digits());
    let mut child = command.spawn().unwrap();
    while download(at, 1) == [0] {
        assert!(child.try_wait().unwrap().is_none(), "it ended before it waited");
    }
    write(gate, 1);
    assert!(child.wait().unwrap().success());
    assert_eq!(call!("cuEventSynchronize", (usize), (shared)), 0);
}

fn wait_for_what_another_process_recorded(memory: &str, event: &str) {
    const NOT_READY: c_int = 600;
    let (at, own, stream) = (open_memory(memory), upload(&[0]), stream_beside_others());
    let mut shared = 0usize;
    let handle = IpcHandle::of(event);
    let open = call!("cuIpcOpenEventHandle", (*mut usize, IpcHandle), (&mut shared, handle));
    assert_eq!(open, 0);
    assert_eq!(call!("cuEventQuery", (usize), (shared)), NOT_READY);
    let wait = call!("cuStreamWaitEvent", (usize, usize, u32), (stream, shared, 0));
    assert_eq!(wait, 0);
    let copy = call!("cuMemcpyDtoDAsync", (u64, u64, usize, usize), (own, at + 4, 4, stream));
    assert_eq!(copy, 0);
    write(at, 1);
    assert_eq!(call!("cuStreamSynchronize", (usize), (stream)), 0);
    assert_eq!(download(own, 1), [7]);
    assert_eq!(call!("cuEventQuery", (usize), (shared)), 0);
}
