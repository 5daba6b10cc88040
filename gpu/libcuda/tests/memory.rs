//! Memory beyond `cuMemAlloc`: mapped by hand, from pools, and shared between processes.

mod client;

use std::ffi::c_int;
use std::process::Command;

use client::{call, download, start, upload};

/// Bytes of a page of mapped memory.
const PAGE: usize = 2 << 20;

/// Set for the second process of the test: the handle, in hexadecimal digits.
const HANDLE: &str = "FATHOM_TEST_IPC_HANDLE";

/// `CUipcMemHandle`.
#[repr(C)]
#[derive(Clone, Copy)]
struct IpcHandle([u64; 8]);

#[test]
fn memory_is_mapped_pooled_and_shared() {
    start();
    if let Ok(handle) = std::env::var(HANDLE) {
        return write_what_another_process_has(&handle);
    }
    pages_are_mapped_side_by_side_and_twice();
    pools_count_what_they_gave();
    another_process_writes();
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
    let digits: String = handle.0.iter().map(|word| format!("{word:016x}")).collect();
    let program = std::env::current_exe().unwrap();
    let output = Command::new(program).env(HANDLE, digits).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
    assert_eq!(download(at, 3), [10, 21, 30]);
    let mut own = 0u64;
    let open = call!("cuIpcOpenMemHandle", (*mut u64, IpcHandle, u32), (&mut own, handle, 1));
    assert_eq!(open, 201, "a process does not open its own memory");
}

fn write_what_another_process_has(digits: &str) {
    let word = |i: usize| u64::from_str_radix(&digits[16 * i..16 * i + 16], 16).unwrap();
    let handle = IpcHandle(std::array::from_fn(word));
    let mut at = 0u64;
    let open = call!("cuIpcOpenMemHandle", (*mut u64, IpcHandle, u32), (&mut at, handle, 1));
    assert_eq!(open, 0);
    let before = download(at, 2);
    assert_eq!(before, [20, 30]);
    let after = [before[0] + 1];
    assert_eq!(call!("cuMemcpyHtoD", (u64, *const u32, usize), (at, after.as_ptr(), 4)), 0);
    assert_eq!(call!("cuIpcCloseMemHandle", (u64), (at)), 0);
}
