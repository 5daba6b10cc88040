//! Matrix instructions of warps and warpgroups.

use super::Opcode::*;
use super::pattern::{Section, row};

const F864: &str =
    "dtype=f16 f32; atype=e4m3 e5m2 e3m2 e2m3 e2m1; btype=e4m3 e5m2 e3m2 e2m3 e2m1; ctype=f16 f32";
const F864S: &str =
    "atype=e4m3 e5m2 e3m2 e2m3 e2m1; btype=e4m3 e5m2 e3m2 e2m3 e2m1; sv=scale_vec::1X";
const MXF4: &str = "sv=scale_vec::2X";
const NVF4: &str = "sv=scale_vec::2X scale_vec::4X; stype=ue8m0 ue4m3";

/// Rows of these chapters.
pub const SECTIONS: &[Section] = &[
    Section {
        title: "Warp Level Matrix Instructions: wmma",
        rows: &[
            row(
                WmmaLoad,
                "wmma.load.ab.sync.aligned.layout.shape{.mem}.type d:any*n, [a]{, stride:u32}",
                "ab=a b; shape=m16n16k16 m8n32k16 m32n8k16; mem=global shared shared::cta; \
                type=f16 bf16 s8 u8",
                "6.0 sm_70",
                "load a fragment of A or B",
            ),
            row(
                WmmaLoad,
                "wmma.load.ab.sync.aligned.layout.shape{.mem}.type d:any*n, [a]{, stride:u32}",
                "ab=a b; shape=m16n16k8; mem=global shared shared::cta; type=tf32",
                "7.0 sm_80",
                "load a fragment of A or B",
            ),
            row(
                WmmaLoad,
                "wmma.load.ab.sync.aligned.layout.shape{.mem}.type d:any*n, [a]{, stride:u32}",
                "ab=a b; shape=m8n8k4; mem=global shared shared::cta; type=f64",
                "7.0 sm_80",
                "load a fragment of A or B",
            ),
            row(
                WmmaLoad,
                "wmma.load.ab.sync.aligned.layout.shape{.mem}.type d:any*n, [a]{, stride:u32}",
                "ab=a b; shape=m8n8k32; mem=global shared shared::cta; type=s4 u4",
                "6.3 sm_75",
                "load a fragment of A or B",
            ),
            row(
                WmmaLoad,
                "wmma.load.ab.sync.aligned.layout.shape{.mem}.type d:any*n, [a]{, stride:u32}",
                "ab=a b; shape=m8n8k128; mem=global shared shared::cta; type=b1",
                "6.3 sm_75",
                "load a fragment of A or B",
            ),
            row(
                WmmaLoad,
                "wmma.load.c.sync.aligned.layout.shape{.mem}.type d:any*n, [a]{, stride:u32}",
                "shape=m16n16k16 m8n32k16 m32n8k16 m16n16k8 m8n8k4 m8n8k32 m8n8k128; mem=global \
                shared shared::cta; type=f16 f32 s32 f64",
                "6.0 sm_70",
                "load a fragment of C",
            ),
            row(
                WmmaStore,
                "wmma.store.d.sync.aligned.layout.shape{.mem}.type [a], r:any*n{, stride:u32}",
                "shape=m16n16k16 m8n32k16 m32n8k16 m16n16k8 m8n8k4 m8n8k32 m8n8k128; mem=global \
                shared shared::cta; type=f16 f32 s32 f64",
                "6.0 sm_70",
                "store a fragment of D",
            ),
            row(
                WmmaMma,
                "wmma.mma.sync.aligned.alayout.blayout.shape.dtype.ctype{.satfinite} d:any*n, \
                a:any*n, b:any*n, c:any*n",
                "shape=m16n16k16 m8n32k16 m32n8k16; dtype=f16 f32; ctype=f16 f32",
                "6.0 sm_70",
                "D = A * B + C in f16 inputs",
            ),
            row(
                WmmaMma,
                "wmma.mma.sync.aligned.alayout.blayout.shape.f32.atype.btype.f32 d:any*n, \
                a:any*n, b:any*n, c:any*n",
                "shape=m16n16k16 m8n32k16 m32n8k16 m16n16k8; atype=bf16 tf32; btype=bf16 tf32",
                "7.0 sm_80",
                "D = A * B + C",
            ),
            row(
                WmmaMma,
                "wmma.mma.sync.aligned.alayout.blayout.shape{.rnd}.f64.f64.f64.f64 d:any*n, \
                a:any*n, b:any*n, c:any*n",
                "shape=m8n8k4",
                "7.0 sm_80",
                "D = A * B + C",
            ),
            row(
                WmmaMma,
                "wmma.mma.sync.aligned.alayout.blayout.shape.s32.atype.btype.s32{.satfinite} \
                d:any*n, a:any*n, b:any*n, c:any*n",
                "shape=m16n16k16 m8n32k16 m32n8k16 m8n8k32; atype=s8 u8 s4 u4; btype=s8 u8 s4 u4",
                "6.3 sm_72",
                "D = A * B + C in integers",
            ),
            row(
                WmmaMma,
                "wmma.mma.op.popc.sync.aligned.row.col.shape.s32.b1.b1.s32 d:any*n, a:any*n, \
                b:any*n, c:any*n",
                "op=xor and; shape=m8n8k128",
                "6.3 sm_75",
                "D = popcount of A op B, + C",
            ),
        ],
    },
    Section {
        title: "Warp Level Matrix Instructions: mma",
        rows: &[
            row(
                Mma,
                "mma.sync.aligned.m8n8k4.alayout.blayout.f32.f16.f16.ctype d:t0*d, a:b32*a, \
                b:b32*b, c:t3*c",
                "ctype=f16 f32",
                "6.4 sm_70",
                "D = A * B + C, four 8x8x4 products a warp",
            ),
            row(
                Mma,
                "mma.sync.aligned.m8n8k4.alayout.blayout.f16.f16.f16.f16 d:t0*d, a:b32*a, \
                b:b32*b, c:t3*c",
                "",
                "6.4 sm_70",
                "D = A * B + C, four 8x8x4 products a warp",
            ),
            row(
                Mma,
                "mma.sync.aligned.shape.row.col.dtype.f16.f16.ctype d:t0*d, a:b32*a, b:b32*b, \
                c:t3*c",
                "shape=m16n8k8 m16n8k16; dtype=f16 f32; ctype=f16 f32",
                "6.5 sm_75",
                "D = A * B + C",
            ),
            row(
                Mma,
                "mma.sync.aligned.shape.row.col.f32.tf32.tf32.f32 d:t0*d, a:b32*a, b:b32*b, c:t3*c",
                "shape=m16n8k4 m16n8k8",
                "7.0 sm_80",
                "D = A * B + C",
            ),
            row(
                Mma,
                "mma.sync.aligned.shape.row.col.f32.bf16.bf16.f32 d:t0*d, a:b32*a, b:b32*b, c:t3*c",
                "shape=m16n8k8 m16n8k16",
                "7.0 sm_80",
                "D = A * B + C",
            ),
            row(
                Mma,
                "mma.sync.aligned.shape.row.col.dtype.atype.btype.ctype d:t0*d, a:b32*a, b:b32*b, \
                c:t3*c",
                "shape=m16n8k16 m16n8k32; dtype=f16 f32; atype=e4m3 e5m2; btype=e4m3 e5m2; \
                ctype=f16 f32",
                "8.4 sm_89",
                "D = A * B + C",
            ),
            row(
                Mma,
                "mma.sync.aligned.m16n8k32.row.col.kind::f8f6f4.dtype.atype.btype.ctype d:t0*d, \
                a:b32*4, b:b32*2, c:t3*c",
                F864,
                "8.7 sm_120a",
                "D = A * B + C",
            ),
            row(
                Mma,
                "mma.sync.aligned.m16n8k64.row.col.kind::mxf4.block_scale{.sv}.f32.e2m1.e2m1.f32\
                .ue8m0 d:t0*d, a:b32*4, b:b32*2, c:t3*c, sa:b32*1, ia:u16*2, sb:b32*1, ib:u16*2",
                MXF4,
                "8.7 sm_120a",
                "D = (A scaled) * (B scaled) + C",
            ),
            row(
                Mma,
                "mma.sync.aligned.m16n8k64.row.col.kind::mxf4nvf4.block_scale.sv.f32.e2m1.e2m1\
                .f32.stype d:t0*d, a:b32*4, b:b32*2, c:t3*c, sa:b32*1, ia:u16*2, sb:b32*1, ib:u16*2",
                NVF4,
                "8.7 sm_120a",
                "D = (A scaled) * (B scaled) + C",
            ),
            row(
                Mma,
                "mma.sync.aligned.m16n8k32.row.col.kind::mxf8f6f4.block_scale{.sv}.f32.atype\
                .btype.f32\
                .ue8m0 d:t0*d, a:b32*4, b:b32*2, c:t3*c, sa:b32*1, ia:u16*2, sb:b32*1, ib:u16*2",
                F864S,
                "8.7 sm_120a",
                "D = (A scaled) * (B scaled) + C",
            ),
            row(
                Mma,
                "mma.sync.aligned.m8n8k4.row.col{.rnd}.f64.f64.f64.f64 d:t0*d, a:t1*a, b:t2*b, \
                c:t3*c",
                "",
                "7.0 sm_80",
                "D = A * B + C",
            ),
            row(
                Mma,
                "mma.sync.aligned.shape.row.col{.rnd}.f64.f64.f64.f64 d:t0*d, a:t1*a, b:t2*b, \
                c:t3*c",
                "shape=m16n8k4 m16n8k8 m16n8k16",
                "7.8 sm_90",
                "D = A * B + C",
            ),
            row(
                Mma,
                "mma.sync.aligned.shape.row.col{.satfinite}.s32.atype.btype.s32 d:t0*d, a:b32*a, \
                b:b32*b, c:t3*c",
                "shape=m8n8k16 m16n8k16 m16n8k32; atype=u8 s8; btype=u8 s8",
                "6.5 sm_75",
                "D = A * B + C in integers",
            ),
            row(
                Mma,
                "mma.sync.aligned.shape.row.col{.satfinite}.s32.atype.btype.s32 d:t0*d, a:b32*a, \
                b:b32*b, c:t3*c",
                "shape=m8n8k32 m16n8k32 m16n8k64; atype=u4 s4; btype=u4 s4",
                "6.5 sm_75",
                "D = A * B + C in integers",
            ),
            row(
                Mma,
                "mma.sync.aligned.shape.row.col.s32.b1.b1.s32.op.popc d:t0*d, a:b32*a, b:b32*b, \
                c:t3*c",
                "shape=m8n8k128 m16n8k128 m16n8k256; op=xor and",
                "7.0 sm_75",
                "D = popcount of A op B, + C",
            ),
            row(
                Mma,
                "mma.variant.sync.aligned.shape.row.col.dtype.f16.f16.ctype d:t0*d, a:b32*n, \
                b:b32*n, c:t3*c, e:b32, #sel:b32",
                "variant=sp sp::ordered_metadata; shape=m16n8k16 m16n8k32; dtype=f16 f32; \
                ctype=f16 f32",
                "7.1 sm_80",
                "D = A * B + C with A 2:4 sparse",
            ),
            row(
                Mma,
                "mma.variant.sync.aligned.shape.row.col.f32.atype.btype.f32 d:t0*d, a:b32*n, \
                b:b32*n, c:t3*c, e:b32, #sel:b32",
                "variant=sp sp::ordered_metadata; shape=m16n8k8 m16n8k16 m16n8k32; atype=bf16 \
                tf32; btype=bf16 tf32",
                "7.1 sm_80",
                "D = A * B + C with A sparse",
            ),
            row(
                Mma,
                "mma.variant.sync.aligned.m16n8k64.row.col.dtype.atype.btype.ctype d:t0*d, \
                a:b32*n, b:b32*n, c:t3*c, e:b32, #sel:b32",
                "variant=sp sp::ordered_metadata; dtype=f16 f32; atype=e4m3 e5m2; btype=e4m3 \
                e5m2; ctype=f16 f32",
                "8.4 sm_89",
                "D = A * B + C with A 2:4 sparse",
            ),
            row(
                Mma,
                "mma.variant.sync.aligned.shape.row.col{.satfinite}.s32.atype.btype.s32 d:t0*d, \
                a:b32*n, b:b32*n, c:t3*c, e:b32, #sel:b32",
                "variant=sp sp::ordered_metadata; shape=m16n8k32 m16n8k64; atype=u8 s8; btype=u8 \
                s8",
                "7.1 sm_80",
                "D = A * B + C with A 2:4 sparse",
            ),
            row(
                Mma,
                "mma.variant.sync.aligned.shape.row.col{.satfinite}.s32.atype.btype.s32 d:t0*d, \
                a:b32*n, b:b32*n, c:t3*c, e:b32, #sel:b32",
                "variant=sp sp::ordered_metadata; shape=m16n8k64 m16n8k128; atype=u4 s4; btype=u4 \
                s4",
                "7.1 sm_80",
                "D = A * B + C with A sparse",
            ),
            row(
                Ldmatrix,
                "ldmatrix.sync.aligned.m8n8.num{.trans}{.ss}.b16 d:b32*num, [a]",
                "",
                "6.5 sm_75",
                "d = one row fragment of each of 1, 2 or 4 matrices; lane l gives the address of \
                row l",
            ),
            row(
                Ldmatrix,
                "ldmatrix.sync.aligned.m16n16.num.trans{.ss}.b8 d:b32*num, [a]",
                "num=x1 x2",
                "8.6 sm_100a",
                "d = fragments of byte matrices, transposed",
            ),
            row(
                Ldmatrix,
                "ldmatrix.sync.aligned.m8n16.num{.ss}.b8x16.fmt d:b32*num, [a]",
                "fmt=b6x16_p32 b4x16_p64",
                "8.6 sm_100a",
                "d = fragments, expanded to bytes",
            ),
            row(
                Ldmatrix,
                "ldmatrix.sync.aligned.m16n16.num.trans{.ss}.b8x16.fmt d:b32*num, [a]",
                "num=x1 x2; fmt=b6x16_p32 b4x16_p64",
                "8.6 sm_100a",
                "d = fragments, expanded to bytes, transposed",
            ),
            row(
                Stmatrix,
                "stmatrix.sync.aligned.m8n8.num{.trans}{.ss}.b16 [a], r:b32*num",
                "",
                "7.8 sm_90",
                "store the fragments of 1, 2 or 4 matrices; lane l gives the address of row l",
            ),
            row(
                Stmatrix,
                "stmatrix.sync.aligned.m16n8.num.trans{.ss}.b8 [a], r:b32*num",
                "",
                "8.6 sm_100a",
                "store fragments of byte matrices",
            ),
            row(
                Movmatrix,
                "movmatrix.sync.aligned.m8n8.trans.b16 d:b32, a:b32",
                "",
                "7.8 sm_75",
                "d = the transpose of an 8x8 matrix across the warp",
            ),
        ],
    },
    Section {
        title: "Asynchronous Warpgroup Level Matrix Instructions: wgmma",
        rows: &[
            row(
                WgmmaMmaAsync,
                "wgmma.mma_async.sync{.aligned}.shape.dtype.f16.f16 +d:t0*d, a:b64, b:b64, !scale, \
                #na:s32, #nb:s32, #ta:s32, #tb:s32",
                "shape=m64n*k16; dtype=f16 f32",
                "8.0 sm_90a",
                "D = A * B + D (0 where scale is false), both from shared memory; na, nb negate; \
                ta, tb transpose",
            ),
            row(
                WgmmaMmaAsync,
                "wgmma.mma_async.sync{.aligned}.shape.dtype.f16.f16 +d:t0*d, a:b32*4, b:b64, \
                !scale, #na:s32, #nb:s32, #tb:s32",
                "shape=m64n*k16; dtype=f16 f32",
                "8.0 sm_90a",
                "as above with A in registers",
            ),
            row(
                WgmmaMmaAsync,
                "wgmma.mma_async.sync{.aligned}.shape.f32.bf16.bf16 +d:t0*d, a:b64, b:b64, !scale, \
                #na:s32, #nb:s32, #ta:s32, #tb:s32",
                "shape=m64n*k16",
                "8.0 sm_90a",
                "D = A * B + D",
            ),
            row(
                WgmmaMmaAsync,
                "wgmma.mma_async.sync{.aligned}.shape.f32.bf16.bf16 +d:t0*d, a:b32*4, b:b64, \
                !scale, #na:s32, #nb:s32, #tb:s32",
                "shape=m64n*k16",
                "8.0 sm_90a",
                "as above with A in registers",
            ),
            row(
                WgmmaMmaAsync,
                "wgmma.mma_async.sync{.aligned}.shape.f32.tf32.tf32 +d:t0*d, a:b64, b:b64, !scale, \
                #na:s32, #nb:s32",
                "shape=m64n*k8",
                "8.0 sm_90a",
                "D = A * B + D",
            ),
            row(
                WgmmaMmaAsync,
                "wgmma.mma_async.sync{.aligned}.shape.f32.tf32.tf32 +d:t0*d, a:b32*4, b:b64, \
                !scale, #na:s32, #nb:s32",
                "shape=m64n*k8",
                "8.0 sm_90a",
                "as above with A in registers",
            ),
            row(
                WgmmaMmaAsync,
                "wgmma.mma_async.sync{.aligned}.shape.dtype.atype.btype +d:t0*d, a:b64, b:b64, \
                !scale, #na:s32, #nb:s32",
                "shape=m64n*k32; dtype=f16 f32; atype=e4m3 e5m2; btype=e4m3 e5m2",
                "8.0 sm_90a",
                "D = A * B + D",
            ),
            row(
                WgmmaMmaAsync,
                "wgmma.mma_async.sync{.aligned}.shape.dtype.atype.btype +d:t0*d, a:b32*4, b:b64, \
                !scale, #na:s32, #nb:s32",
                "shape=m64n*k32; dtype=f16 f32; atype=e4m3 e5m2; btype=e4m3 e5m2",
                "8.0 sm_90a",
                "as above with A in registers",
            ),
            row(
                WgmmaMmaAsync,
                "wgmma.mma_async.sync{.aligned}.shape{.satfinite}.s32.atype.btype +d:t0*d, a:b64, \
                b:b64, !scale",
                "shape=m64n%k32; atype=s8 u8; btype=s8 u8",
                "8.0 sm_90a",
                "D = A * B + D in integers",
            ),
            row(
                WgmmaMmaAsync,
                "wgmma.mma_async.sync{.aligned}.shape{.satfinite}.s32.atype.btype +d:t0*d, \
                a:b32*4, b:b64, !scale",
                "shape=m64n%k32; atype=s8 u8; btype=s8 u8",
                "8.0 sm_90a",
                "as above with A in registers",
            ),
            row(
                WgmmaMmaAsync,
                "wgmma.mma_async.sync{.aligned}.shape.s32.b1.b1.op.popc +d:t0*d, a:b64, b:b64, \
                !scale",
                "shape=m64n%k256; op=and",
                "8.0 sm_90a",
                "D = popcount of A & B, + D",
            ),
            row(
                WgmmaMmaAsync,
                "wgmma.mma_async.sync{.aligned}.shape.s32.b1.b1.op.popc +d:t0*d, a:b32*4, b:b64, \
                !scale",
                "shape=m64n%k256; op=and",
                "8.0 sm_90a",
                "as above with A in registers",
            ),
            row(
                WgmmaMmaAsyncSp,
                "wgmma.mma_async.sp.sync{.aligned}.shape.dtype.f16.f16 +d:t0*d, a:b64, b:b64, \
                meta:b32, #sel:b32, !scale, #na:s32, #nb:s32, #ta:s32, #tb:s32",
                "shape=m64n*k32; dtype=f16 f32",
                "8.2 sm_90a",
                "as wgmma with A 2:4 sparse",
            ),
            row(
                WgmmaMmaAsyncSp,
                "wgmma.mma_async.sp.sync{.aligned}.shape.dtype.f16.f16 +d:t0*d, a:b32*4, b:b64, \
                meta:b32, #sel:b32, !scale, #na:s32, #nb:s32, #tb:s32",
                "shape=m64n*k32; dtype=f16 f32",
                "8.2 sm_90a",
                "as wgmma with A 2:4 sparse, in registers",
            ),
            row(
                WgmmaMmaAsyncSp,
                "wgmma.mma_async.sp.sync{.aligned}.shape.f32.bf16.bf16 +d:t0*d, a:b64, b:b64, \
                meta:b32, #sel:b32, !scale, #na:s32, #nb:s32, #ta:s32, #tb:s32",
                "shape=m64n*k32",
                "8.2 sm_90a",
                "as wgmma with A 2:4 sparse",
            ),
            row(
                WgmmaMmaAsyncSp,
                "wgmma.mma_async.sp.sync{.aligned}.shape.f32.bf16.bf16 +d:t0*d, a:b32*4, b:b64, \
                meta:b32, #sel:b32, !scale, #na:s32, #nb:s32, #tb:s32",
                "shape=m64n*k32",
                "8.2 sm_90a",
                "as wgmma with A 2:4 sparse, in registers",
            ),
            row(
                WgmmaMmaAsyncSp,
                "wgmma.mma_async.sp.sync{.aligned}.shape.f32.tf32.tf32 +d:t0*d, a:any*n, b:b64, \
                meta:b32, #sel:b32, !scale, #na:s32, #nb:s32",
                "shape=m64n*k16",
                "8.2 sm_90a",
                "as wgmma with A 1:2 sparse",
            ),
            row(
                WgmmaMmaAsyncSp,
                "wgmma.mma_async.sp.sync{.aligned}.shape.dtype.atype.btype +d:t0*d, a:any*n, \
                b:b64, meta:b32, #sel:b32, !scale, #na:s32, #nb:s32",
                "shape=m64n*k64; dtype=f16 f32; atype=e4m3 e5m2; btype=e4m3 e5m2",
                "8.2 sm_90a",
                "as wgmma with A 2:4 sparse",
            ),
            row(
                WgmmaMmaAsyncSp,
                "wgmma.mma_async.sp.sync{.aligned}.shape{.satfinite}.s32.atype.btype +d:t0*d, \
                a:any*n, b:b64, meta:b32, #sel:b32, !scale",
                "shape=m64n%k64; atype=s8 u8; btype=s8 u8",
                "8.2 sm_90a",
                "as wgmma with A 2:4 sparse",
            ),
            row(
                WgmmaFence,
                "wgmma.fence.sync{.aligned}",
                "",
                "8.0 sm_90a",
                "order register and shared-memory accesses before the wgmma that follow",
            ),
            row(
                WgmmaCommitGroup,
                "wgmma.commit_group.sync{.aligned}",
                "",
                "8.0 sm_90a",
                "the warpgroup's wgmma since the last commit become a group",
            ),
            row(
                WgmmaWaitGroup,
                "wgmma.wait_group.sync{.aligned} #n:u32",
                "",
                "8.0 sm_90a",
                "wait until at most n of the latest groups are pending",
            ),
        ],
    },
];
