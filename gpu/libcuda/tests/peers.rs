//! Two devices: kernels that the host launches one after another, and that wait for one another.

mod client;

use std::ffi::c_int;
use std::sync::{Mutex, MutexGuard, Once, PoisonError};

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

/// The contexts of two devices, of which one test at a time has the use.
fn two_devices() -> (MutexGuard<'static, ()>, [usize; 2]) {
    static FIRST: Once = Once::new();
    static TURN: Mutex<()> = Mutex::new(());
    let turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    // SAFETY: nobody reads the environment meanwhile; every test of this program comes here first.
    FIRST.call_once(|| unsafe { std::env::set_var("FATHOM_EMULATE_DEVICES", "2") });
    start();
    let (mut count, mut contexts) = (0, [0usize; 2]);
    assert_eq!(call!("cuDeviceGetCount", (*mut c_int), (&mut count)), 0);
    assert_eq!(count, 2);
    for (device, context) in contexts.iter_mut().enumerate() {
        let retain =
            call!("cuDevicePrimaryCtxRetain", (*mut usize, c_int), (context, device as c_int));
        assert_eq!(retain, 0);
    }
    (turn, contexts)
}

fn make_current(context: usize) {
    assert_eq!(call!("cuCtxSetCurrent", (usize), (context)), 0);
}

#[test]
fn a_kernel_waits_for_one_that_another_device_runs() {
    let (_turn, contexts) = two_devices();
    let memory = upload(&[0; 2]);
    // The one that waits is launched first, and the host makes calls before the other.
    for (device, name) in [(0, "wait"), (1, "signal")] {
        make_current(contexts[device]);
        assert_eq!(launch(function(PTX, name), 0, 1, &[memory, memory + 4]), 0);
        make_current(contexts[1]);
        let other = upload(&[1, 2, 3]);
        assert_eq!(download(other, 3), [1, 2, 3]);
    }
    make_current(contexts[0]);
    assert_eq!(download(memory, 2), [42, 42]);
}

/// Another kernel has run beside the one that waits: what its stream has behind it may go on, and
/// so may the host that waited for it.
#[test]
fn a_kernel_that_waits_holds_up_neither_streams_nor_the_host() {
    let (_turn, contexts) = two_devices();
    make_current(contexts[0]);
    let memory = upload(&[0; 2]);
    assert_eq!(launch(function(PTX, "wait"), 0, 1, &[memory, memory + 4]), 0);
    make_current(contexts[1]);
    let (signal, other) = (function(PTX, "signal"), upload(&[0; 2]));
    assert_eq!(launch(signal, 0, 1, &[other, other]), 0);
    assert_eq!(download(other, 1), [42]);
    // Only now the host asks for what the first one waits for, behind one more.
    assert_eq!(launch(signal, 0, 1, &[other + 4, other]), 0);
    assert_eq!(launch(signal, 0, 1, &[memory, other]), 0);
    make_current(contexts[0]);
    assert_eq!(download(memory, 2), [42, 42]);
    assert_eq!(download(other, 2), [42, 42]);
}
