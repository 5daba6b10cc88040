//! Kernels that call the device runtime to meet as a grid, as Numba's do.

mod client;

use client::{call, download, function, start, upload};

/// Each CTA of three adds 1 to a word; behind the grid's barrier all see 3, twice over.
const PTX: &str = "
.version 8.0
.target sm_90
.address_size 64
.extern .func (.param .b64 r) cudaCGGetIntrinsicHandle(.param .b32 scope);
.extern .func (.param .b32 r) cudaCGSynchronize(.param .b64 handle, .param .b32 flags);
.visible .entry k(.param .u64 p)
{
    .reg .pred %p<2>;
    .reg .b32 %r<8>;
    .reg .b64 %rd<8>;
    .param .b32 scope; .param .b64 handle; .param .b64 grid; .param .b32 flags; .param .b32 error;
    ld.param.u64 %rd0, [p];
    mov.u32 %r0, %tid.x;
    setp.eq.u32 %p0, %r0, 0;
    st.param.b32 [scope], 1;
    call.uni (handle), cudaCGGetIntrinsicHandle, (scope);
    ld.param.b64 %rd1, [handle];
    mov.u32 %r1, 0;
AGAIN:
    @%p0 red.global.add.u32 [%rd0], 1;
    st.param.b64 [grid], %rd1;
    st.param.b32 [flags], 0;
    call.uni (error), cudaCGSynchronize, (grid, flags);
    ld.param.b32 %r5, [error];
    ld.volatile.global.u32 %r2, [%rd0];
    mov.u32 %r3, %ctaid.x;
    mad.lo.u32 %r3, %r3, 64, %r0;
    mul.wide.u32 %rd2, %r3, 4;
    add.u64 %rd2, %rd0, %rd2;
    ld.global.u32 %r4, [%rd2+4];
    mad.lo.u32 %r4, %r4, 100, %r2;
    mad.lo.u32 %r4, %r5, 10000, %r4;
    st.global.u32 [%rd2+4], %r4;
    st.param.b64 [grid], %rd1;
    st.param.b32 [flags], 0;
    call.uni (error), cudaCGSynchronize, (grid, flags);
    add.u32 %r1, %r1, 1;
    setp.lt.u32 %p1, %r1, 2;
    @%p1 bra AGAIN;
    ret;
}
";

#[test]
fn a_grid_meets_by_way_of_the_device_runtime() {
    start();
    let k = function(PTX, "k");
    let at = upload(&[0; 1 + 3 * 64]);
    let params = [&raw const at];
    let launch = call!(
        "cuLaunchCooperativeKernel",
        (usize, u32, u32, u32, u32, u32, u32, u32, usize, *const *const u64),
        (k, 3, 1, 1, 64, 1, 1, 0, 0, params.as_ptr())
    );
    assert_eq!(launch, 0);
    let found = download(at, 1 + 3 * 64);
    assert_eq!(found[0], 6);
    // 3 behind the first barrier, 6 behind the third.
    assert!(found[1..].iter().all(|v| *v == 306), "{found:?}");
    // Without a cooperative launch there is no grid to meet: an error, each time.
    let alone = upload(&[0; 1 + 3 * 64]);
    assert_eq!(client::launch(k, 0, 64, &[alone]), 0);
    assert!(download(alone, 65)[1..].iter().all(|v| *v > 10_000));
}
