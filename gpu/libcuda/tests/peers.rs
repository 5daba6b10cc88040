//! Two devices: kernels that the host launches one after another, and that wait for one another.

mod client;

use std::ffi::c_int;

use client::{call, download, function, launch, start, upload};

const PTX: &str = "
.version 8.0
.target sm_90
.address_size 64
.visible .entry wait(.param .u64 flag, .param .u64 out)
{
    .reg .u64 %f, %o; .reg .u32 %v; .reg .pred %p;
    ld.param.u64 %f, [flag];
    ld.param.u64 %o, [out];
LOOP:
    ld.acquire.sys.global.u32 %v, [%f];
    setp.eq.u32 %p, %v, 0;
    @%p bra LOOP;
    st.global.u32 [%o], %v;
    ret;
}
.visible .entry signal(.param .u64 flag, .param .u64 out)
{
    .reg .u64 %f;
    ld.param.u64 %f, [flag];
    st.release.sys.global.u32 [%f], 42;
    ret;
}
";

#[test]
fn a_kernel_waits_for_one_that_another_device_runs() {
    // SAFETY: the only test of this program, before any other thread.
    unsafe { std::env::set_var("FATHOM_EMULATE_DEVICES", "2") };
    start();
    let (mut count, mut contexts) = (0, [0usize; 2]);
    assert_eq!(call!("cuDeviceGetCount", (*mut c_int), (&mut count)), 0);
    assert_eq!(count, 2);
    for (device, context) in contexts.iter_mut().enumerate() {
        let retain =
            call!("cuDevicePrimaryCtxRetain", (*mut usize, c_int), (context, device as c_int));
        assert_eq!(retain, 0);
    }
    let memory = upload(&[0; 2]);
    // The one that waits is launched first, and the host makes calls before the other.
    for (device, name) in [(0, "wait"), (1, "signal")] {
        assert_eq!(call!("cuCtxSetCurrent", (usize), (contexts[device])), 0);
        assert_eq!(launch(function(PTX, name), 0, 1, &[memory, memory + 4]), 0);
        assert_eq!(call!("cuCtxSetCurrent", (usize), (contexts[1])), 0);
        let other = upload(&[1, 2, 3]);
        assert_eq!(download(other, 3), [1, 2, 3]);
    }
    assert_eq!(call!("cuCtxSetCurrent", (usize), (contexts[0])), 0);
    assert_eq!(download(memory, 2), [42, 42]);
}
