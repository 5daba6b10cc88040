//! Kernels that launch kernels, by the names that nvcc has for it.

mod client;

use client::{download, function, start, upload};

/// `parent` asks for a copy of the first word to the fourth, behind everything else for `last`,
/// then for `child` twice, whose own child is `grandchild`. Each kernel appends its mark to the
/// word: 10 w + mark.
const PTX: &str = "
.version 8.0
.target sm_90
.address_size 64
.extern .func (.param .b64 r) __cudaCDP2GetParameterBufferV2(.param .b64 k, .param .align 4 .b8 g[12], .param .align 4 .b8 b[12], .param .b32 s);
.extern .func (.param .b32 r) __cudaCDP2LaunchDeviceV2_ptsz(.param .b64 b, .param .b64 s);
.extern .func (.param .b32 r) __cudaCDP2MemcpyAsync_ptsz(.param .b64 to, .param .b64 from, .param .b64 count, .param .b32 kind, .param .b64 stream);
.extern .func (.param .b32 r) __cudaCDP2GetLastError();
.visible .entry last(.param .u64 p);

.func mark(.param .b64 p, .param .b32 mark)
{
    .reg .b32 %r<4>;
    .reg .b64 %rd<2>;
    ld.param.u64 %rd1, [p];
    ld.param.u32 %r1, [mark];
    ld.global.u32 %r2, [%rd1];
    mad.lo.u32 %r2, %r2, 10, %r1;
    st.global.u32 [%rd1], %r2;
    ret;
}

.func (.param .b32 error) launch(.param .b64 kernel, .param .b64 p, .param .b64 stream, .param .b32 threads)
{
    .reg .b32 %r<4>;
    .reg .b64 %rd<4>;
    .param .b64 k; .param .align 4 .b8 g[12]; .param .align 4 .b8 b[12]; .param .b32 s;
    .param .b64 buffer; .param .b64 on; .param .b32 r;
    ld.param.u64 %rd1, [kernel];
    st.param.b64 [k], %rd1;
    mov.u32 %r1, 1;
    st.param.b32 [g], %r1;
    st.param.b32 [g+4], %r1;
    st.param.b32 [g+8], %r1;
    ld.param.u32 %r2, [threads];
    st.param.b32 [b], %r2;
    st.param.b32 [b+4], %r1;
    st.param.b32 [b+8], %r1;
    mov.u32 %r1, 64;
    st.param.b32 [s], %r1;
    call.uni (buffer), __cudaCDP2GetParameterBufferV2, (k, g, b, s);
    ld.param.b64 %rd1, [buffer];
    ld.param.u64 %rd2, [p];
    st.u64 [%rd1], %rd2;
    st.param.b64 [buffer], %rd1;
    ld.param.u64 %rd2, [stream];
    st.param.b64 [on], %rd2;
    call.uni (r), __cudaCDP2LaunchDeviceV2_ptsz, (buffer, on);
    ld.param.b32 %r1, [r];
    st.param.b32 [error], %r1;
    ret;
}

.visible .entry grandchild(.param .u64 p)
{
    .reg .b32 %r<2>;
    .reg .b64 %rd<2>;
    .param .b64 a; .param .b32 m;
    ld.param.u64 %rd1, [p];
    st.param.b64 [a], %rd1;
    st.param.b32 [m], 3;
    call.uni mark, (a, m);
    ret;
}

.visible .entry child(.param .u64 p)
{
    .reg .pred %p<2>;
    .reg .b32 %r<4>;
    .reg .b64 %rd<4>;
    .param .b64 k; .param .b64 a; .param .b64 s; .param .b32 m; .param .b32 r;
    ld.param.u64 %rd1, [p];
    // Threads and dynamic shared memory are what the launch asked for.
    mov.u32 %r1, %ntid.x;
    mov.u32 %r2, %dynamic_smem_size;
    st.global.u32 [%rd1+4], %r1;
    st.global.u32 [%rd1+8], %r2;
    mov.u32 %r1, %tid.x;
    setp.ne.u32 %p1, %r1, 0;
    @%p1 bra END;
    st.param.b64 [a], %rd1;
    st.param.b32 [m], 2;
    call.uni mark, (a, m);
    mov.u64 %rd2, grandchild;
    st.param.b64 [k], %rd2;
    st.param.b64 [a], %rd1;
    st.param.b64 [s], 0;
    st.param.b32 [m], 1;
    call.uni (r), launch, (k, a, s, m);
END:
    ret;
}

.visible .entry parent(.param .u64 p)
{
    .reg .b32 %r<4>;
    .reg .b64 %rd<4>;
    .param .b64 k; .param .b64 a; .param .b64 s; .param .b32 m; .param .b32 r;
    .param .b64 to; .param .b64 from; .param .b64 count; .param .b32 kind;
    ld.param.u64 %rd1, [p];
    add.u64 %rd2, %rd1, 12;
    st.param.b64 [to], %rd2;
    st.param.b64 [from], %rd1;
    st.param.b64 [count], 4;
    st.param.b32 [kind], 3;
    st.param.b64 [s], 0;
    call.uni (r), __cudaCDP2MemcpyAsync_ptsz, (to, from, count, kind, s);
    mov.u64 %rd2, last;
    st.param.b64 [k], %rd2;
    st.param.b64 [a], %rd1;
    st.param.b64 [s], 3;
    st.param.b32 [m], 1;
    call.uni (r), launch, (k, a, s, m);
    mov.u64 %rd2, child;
    st.param.b64 [k], %rd2;
    st.param.b64 [a], %rd1;
    st.param.b64 [s], 0;
    st.param.b32 [m], 7;
    call.uni (r), launch, (k, a, s, m);
    ld.param.b32 %r1, [r];
    st.param.b64 [k], %rd2;
    st.param.b64 [a], %rd1;
    st.param.b64 [s], 0;
    st.param.b32 [m], 7;
    call.uni (r), launch, (k, a, s, m);
    ld.param.b32 %r2, [r];
    add.u32 %r1, %r1, %r2;
    call.uni (r), __cudaCDP2GetLastError, ();
    ld.param.b32 %r2, [r];
    add.u32 %r1, %r1, %r2;
    st.global.u32 [%rd1+16], %r1;
    st.param.b64 [a], %rd1;
    st.param.b32 [m], 1;
    call.uni mark, (a, m);
    ret;
}

.visible .entry last(.param .u64 p)
{
    .reg .b64 %rd<2>;
    .param .b64 a; .param .b32 m;
    ld.param.u64 %rd1, [p];
    st.param.b64 [a], %rd1;
    st.param.b32 [m], 4;
    call.uni mark, (a, m);
    ret;
}
";

#[test]
fn children_run_behind_their_parent_each_with_its_own_before_the_next() {
    start();
    let parent = function(PTX, "parent");
    // Twice: what was launched is forgotten.
    for _ in 0..2 {
        let at = upload(&[0, 0, 0, 0, 99]);
        assert_eq!(client::launch(parent, 0, 1, &[at]), 0);
        // The copy is made behind the parent, before the children.
        assert_eq!(download(at, 5), [123_234, 7, 64, 1, 0]);
    }
}

#[test]
fn a_child_that_cannot_run_is_left_out() {
    start();
    let too_many = PTX.replace("st.param.b32 [m], 7;", "st.param.b32 [m], 2000;");
    let parent = function(&too_many, "parent");
    let at = upload(&[0; 5]);
    assert_eq!(client::launch(parent, 0, 1, &[at]), 0);
    assert_eq!(download(at, 5), [14, 0, 0, 1, 0]);
}
