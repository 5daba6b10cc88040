//! Launches as they were before CUDA 4: shape and parameters belong to the function.

mod client;

use client::{call, download, function, start, upload};

const INVALID_VALUE: i32 = 1;

/// Thread `t` of CTA (x, y) writes `a + b + t` at word `4 (2 y + x) + t` behind `to`; `b` is a
/// float.
const PTX: &str = "
.version 8.5
.target sm_90
.address_size 64
.visible .entry k(.param .u32 a, .param .f32 b, .param .u64 to)
{
    .reg .b32 %r<8>;
    .reg .f32 %f<2>;
    .reg .b64 %rd<4>;
    ld.param.u32 %r1, [a];
    ld.param.f32 %f1, [b];
    ld.param.u64 %rd1, [to];
    cvt.rzi.u32.f32 %r2, %f1;
    add.u32 %r1, %r1, %r2;
    mov.u32 %r3, %tid.x;
    add.u32 %r1, %r1, %r3;
    mov.u32 %r4, %ctaid.y;
    mov.u32 %r5, %ctaid.x;
    mad.lo.u32 %r4, %r4, 2, %r5;
    mad.lo.u32 %r4, %r4, 4, %r3;
    mul.wide.u32 %rd2, %r4, 4;
    add.u64 %rd1, %rd1, %rd2;
    st.global.u32 [%rd1], %r1;
    ret;
}";

#[test]
fn shape_and_parameters_stay_with_the_function() {
    start();
    let (k, to) = (function(PTX, "k"), upload(&[0; 16]));
    let set_u32 = |at, value| call!("cuParamSeti", (usize, i32, u32), (k, at, value));
    let set_f32 = |at, value| call!("cuParamSetf", (usize, i32, f32), (k, at, value));
    let set_u64 = |at, value: u64| {
        call!("cuParamSetv", (usize, i32, *const u64, u32), (k, at, &raw const value, 8))
    };
    let grid = |x, y| call!("cuLaunchGrid", (usize, i32, i32), (k, x, y));
    // Without a block there is nothing to launch.
    assert_eq!(grid(1, 1), INVALID_VALUE);
    let block = |x| call!("cuFuncSetBlockShape", (usize, i32, i32, i32), (k, x, 1, 1));
    assert_eq!((block(0), block(4)), (INVALID_VALUE, 0));
    assert_eq!((set_u32(0, 100), set_f32(4, 20.0), set_u64(8, to)), (0, 0, 0));
    assert_eq!(call!("cuParamSetSize", (usize, u32), (k, 16)), 0);
    // Beyond the parameters.
    assert_eq!((set_u32(16, 1), set_u64(12, 1), set_u32(-4, 1)), (1, 1, 1));
    assert_eq!(call!("cuParamSetSize", (usize, u32), (k, 17)), INVALID_VALUE);
    assert_eq!(call!("cuFuncSetSharedSize", (usize, u32), (k, 1024)), 0);

    assert_eq!(call!("cuLaunch", (usize), (k)), 0);
    let one: Vec<u32> = (0..4).map(|t| 120 + t).collect();
    assert_eq!(download(to, 16), [one.clone(), vec![0; 12]].concat());
    // What was set is still there, but for what is set anew.
    assert_eq!(set_u32(0, 200), 0);
    let two: Vec<u32> = (0..4).map(|t| 220 + t).collect();
    let code = call!("cuLaunchGridAsync", (usize, i32, i32, usize), (k, 2, 1, 0));
    assert_eq!(code, 0);
    assert_eq!(download(to, 16), [two.clone(), two.clone(), vec![0; 8]].concat());
    assert_eq!(grid(2, 2), 0);
    assert_eq!(download(to, 16), two.repeat(4));
    assert_eq!(grid(0, 1), INVALID_VALUE);
}
