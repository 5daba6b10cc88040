//! Multicast objects over three devices: one address, memory of each behind it.

mod client;

use std::ffi::c_int;

use client::{call, download, function, launch, start};

const PTX: &str = "
.version 8.1
.target sm_90
.address_size 64
.visible .entry all(.param .u64 at, .param .u64 out)
{
    .reg .u64 %a, %o; .reg .b32 %r<8>; .reg .f32 %f<4>; .reg .b64 %x;
    ld.param.u64 %a, [at];
    ld.param.u64 %o, [out];
    multimem.ld_reduce.relaxed.sys.global.add.u32 %r0, [%a];
    multimem.ld_reduce.global.max.s32 %r1, [%a+4];
    multimem.ld_reduce.global.add.v2.f32 {%f0, %f1}, [%a+8];
    multimem.ld_reduce.global.add.f16x2 %r2, [%a+16];
    multimem.ld_reduce.global.add.acc::f32.f16x2 %r3, [%a+16];
    multimem.red.release.sys.global.add.u32 [%a+20], 5;
    multimem.st.global.b64 [%a+24], 0x1122334455667788;
    st.global.b32 [%o], %r0;
    st.global.b32 [%o+4], %r1;
    st.global.v2.f32 [%o+8], {%f0, %f1};
    st.global.b32 [%o+16], %r2;
    st.global.b32 [%o+20], %r3;
    ret;
}
.visible .entry plain(.param .u64 at, .param .u64 out)
{
    .reg .u64 %a; .reg .b32 %r0;
    ld.param.u64 %a, [at];
    ld.global.b32 %r0, [%a];
    st.global.b32 [%a+64], %r0;
    ret;
}
";

/// The granularity, which is a piece of 2 MiB.
const PIECE: usize = 2 << 20;

/// `CUmulticastObjectProp` as words: devices, bytes, handle types, flags.
type Properties = [usize; 4];

/// `CUmemAllocationProp` of memory on a device.
fn memory(device: u32) -> usize {
    let properties: ([u32; 4], [u64; 2]) = ([1, 0, 1, device], [0; 2]);
    let mut handle = 0usize;
    let create = call!(
        "cuMemCreate",
        (*mut usize, usize, *const ([u32; 4], [u64; 2]), u64),
        (&mut handle, 2 * PIECE, &properties, 0)
    );
    assert_eq!(create, 0);
    handle
}

/// A handle mapped somewhere, for everybody.
fn mapped(handle: usize, bytes: usize, offset: usize) -> u64 {
    let mut at = 0u64;
    let reserve =
        call!("cuMemAddressReserve", (*mut u64, usize, usize, u64, u64), (&mut at, bytes, 0, 0, 0));
    assert_eq!(reserve, 0);
    assert_eq!(
        call!("cuMemMap", (u64, usize, usize, usize, u64), (at, bytes, offset, handle, 0)),
        0
    );
    let access = [[1u32, 0, 3]];
    let set = call!(
        "cuMemSetAccess",
        (u64, usize, *const [u32; 3], usize),
        (at, bytes, access.as_ptr(), 1)
    );
    assert_eq!(set, 0);
    at
}

fn write(at: u64, words: &[u32]) {
    let (from, bytes) = (words.as_ptr(), size_of_val(words));
    assert_eq!(call!("cuMemcpyHtoD", (u64, *const u32, usize), (at, from, bytes)), 0);
}

#[test]
fn one_address_reaches_the_memory_of_all() {
    // SAFETY: the only test of this program, before any other thread.
    unsafe {
        std::env::set_var("FATHOM_EMULATE_DEVICES", "3");
        std::env::set_var("FATHOM_EMULATE_CHECK", "all");
    }
    start();
    for device in 1..3 {
        let mut context = 0usize;
        let retain = call!("cuDevicePrimaryCtxRetain", (*mut usize, c_int), (&mut context, device));
        assert_eq!(retain, 0);
    }
    let properties: Properties = [3, PIECE, 0, 0];
    let mut granularity = 0usize;
    let asked = call!(
        "cuMulticastGetGranularity",
        (*mut usize, *const Properties, u32),
        (&mut granularity, &properties, 0)
    );
    assert_eq!((asked, granularity), (0, PIECE));
    let mut multicast = 0usize;
    let create =
        call!("cuMulticastCreate", (*mut usize, *const Properties), (&mut multicast, &properties));
    assert_eq!(create, 0);
    for device in 0..3 {
        assert_eq!(call!("cuMulticastAddDevice", (usize, c_int), (multicast, device)), 0);
    }
    assert_ne!(call!("cuMulticastAddDevice", (usize, c_int), (multicast, 0)), 0);
    // The second piece of each device's memory lies behind the object; that of the last is bound by
    // its address, and after the object was mapped.
    let memories = [0, 1, 2].map(memory);
    let homes = memories.map(|handle| mapped(handle, 2 * PIECE, 0));
    type Bind = unsafe extern "C" fn(usize, c_int, usize, usize, usize, usize, u64) -> c_int;
    let bind = client::address("cuMulticastBindMem");
    // SAFETY: the type is that of cuda.h.
    let bind: Bind = unsafe { std::mem::transmute(bind) };
    for device in 0..2 {
        // SAFETY: no pointers are given.
        let bound =
            unsafe { bind(multicast, device, 0, memories[device as usize], PIECE, PIECE, 0) };
        assert_eq!(bound, 0);
    }
    // SAFETY: as above. Memory of another device, and a second time.
    assert_ne!(unsafe { bind(multicast, 2, 0, memories[1], PIECE, PIECE, 0) }, 0);
    // SAFETY: as above.
    assert_ne!(unsafe { bind(multicast, 1, 0, memories[1], 0, PIECE, 0) }, 0);
    let at = mapped(multicast, PIECE, 0);
    let bound = call!(
        "cuMulticastBindAddr",
        (usize, c_int, usize, u64, usize, u64),
        (multicast, 2, 0, homes[2] + PIECE as u64, PIECE, 0)
    );
    assert_eq!(bound, 0);

    // In f16, 2048 and 1 are 2048 again, since halves go to even; in singles they are 2050.
    let halves = [0x6800_3c00, 0x3c00_3c00, 0x3c00_3c00];
    for (device, home) in homes.iter().enumerate() {
        let n = device as u32;
        let floats = [1.5f32, 0.25].map(|v| (v * (n + 1) as f32).to_bits());
        let words =
            [10 + n, (n as i32 * 7 - 20) as u32, floats[0], floats[1], halves[device], n, 0, 0];
        write(home + PIECE as u64, &words);
    }
    let mut out = 0u64;
    assert_eq!(call!("cuMemAlloc", (*mut u64, usize), (&mut out, 256)), 0);
    assert_eq!(launch(function(PTX, "all"), 0, 1, &[at, out]), 0);
    let found = download(out, 6);
    assert_eq!(found[..2], [33, (-6i32) as u32]);
    assert_eq!([found[2], found[3]].map(f32::from_bits), [9.0, 1.5]);
    // 1 + 1 + 1 below, and above 2048 + 1 + 1.
    assert_eq!(found[4..], [0x6800_4200, 0x6801_4200]);
    for (device, home) in homes.iter().enumerate() {
        let memory = download(home + PIECE as u64 + 16, 4);
        assert_eq!(memory, [halves[device], device as u32 + 5, 0x5566_7788, 0x1122_3344]);
    }
    // No other instruction reaches it.
    assert_eq!(launch(function(PTX, "plain"), 0, 1, &[at, out]), 0);
    assert_ne!(call!("cuCtxSynchronize", (), ()), 0);
}
