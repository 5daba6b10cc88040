//! Two devices: kernels that the host launches one after another, and that wait for one another.

use std::ffi::{CString, c_char, c_int, c_void};

use libloading::Library;

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

fn check(code: c_int) {
    assert_eq!(code, 0);
}

#[test]
fn a_kernel_waits_for_one_that_another_device_runs() {
    // SAFETY: the only test of this program, before any other thread.
    unsafe { std::env::set_var("FATHOM_EMULATE_DEVICES", "2") };
    let folder = std::env::current_exe().unwrap().parent().unwrap().to_owned();
    let places = [folder.join("libfathom_libcuda.so"), folder.join("../libfathom_libcuda.so")];
    let path = places.iter().find(|p| p.is_file()).expect("built beside the tests");
    // SAFETY: our own library, whose initialisers do nothing.
    let library = unsafe { Library::new(path).unwrap() };
    macro_rules! call {
        ($name:literal, ($($type:ty),*), ($($arg:expr),* $(,)?)) => {{
            type F = unsafe extern "C" fn($($type),*) -> c_int;
            // SAFETY: the types are those of cuda.h; pointers are to live locals.
            unsafe { check(library.get::<F>(concat!($name, "\0").as_bytes()).unwrap()($($arg),*)) }
        }};
    }
    call!("cuInit", (u32), (0));
    let mut count = 0;
    call!("cuDeviceGetCount", (*mut c_int), (&mut count));
    assert_eq!(count, 2);
    let text = CString::new(PTX).unwrap();
    let (mut contexts, mut memory) = ([0usize; 2], 0u64);
    for (device, context) in contexts.iter_mut().enumerate() {
        call!("cuDevicePrimaryCtxRetain", (*mut usize, c_int), (context, device as c_int));
    }
    call!("cuCtxSetCurrent", (usize), (contexts[0]));
    call!("cuMemAlloc_v2", (*mut u64, usize), (&mut memory, 8));
    call!("cuMemsetD8_v2", (u64, u8, usize), (memory, 0, 8));
    // The one that waits is launched first.
    for (device, name) in [(0, c"wait"), (1, c"signal")] {
        call!("cuCtxSetCurrent", (usize), (contexts[device]));
        let (mut module, mut function) = (0usize, 0usize);
        let image = text.as_ptr();
        call!("cuModuleLoadData", (*mut usize, *const c_char), (&mut module, image));
        call!(
            "cuModuleGetFunction",
            (*mut usize, usize, *const c_char),
            (&mut function, module, name.as_ptr())
        );
        let (mut flag, mut out) = (memory, memory + 4);
        let params: [*mut c_void; 2] = [(&raw mut flag).cast(), (&raw mut out).cast()];
        call!(
            "cuLaunchKernel",
            (usize, u32, u32, u32, u32, u32, u32, u32, usize, *const *mut c_void, usize),
            (function, 1, 1, 1, 1, 1, 1, 0, 0, params.as_ptr(), 0)
        );
    }
    call!("cuCtxSynchronize", (), ());
    let mut back = [0u32; 2];
    call!("cuMemcpyDtoH_v2", (*mut u32, u64, usize), (back.as_mut_ptr(), memory, 8));
    assert_eq!(back, [42, 42]);
}
