//! Textures and surfaces. What is fetched and how is the object's to say (its format, its
//! addressing, its filter); an instruction says the shape of the coordinates.

use super::Opcode::*;
use super::pattern::{Section, row};

const TEX: &str =
    "mip=base; geom=1d 2d 3d a1d a2d cube acube 2dms a2dms; dtype=u32 s32 f16 f32; ctype=s32 f32";
const TEX2: &str = "mip=base; geom=1d 2d 3d a1d a2d cube acube; ctype=s32 f32";
const LEVEL: &str = "geom=1d 2d 3d a1d a2d cube acube; dtype=u32 s32 f16 f32; ctype=s32 f32";
const LEVEL2: &str = "geom=1d 2d 3d a1d a2d cube acube; ctype=s32 f32";
const GRAD: &str = "geom=1d 2d 3d a1d a2d cube acube; dtype=u32 s32 f16 f32";
const GRAD2: &str = "geom=1d 2d 3d a1d a2d cube acube";
const COMPARE: &str = "mip=base; geom=1d 2d a1d a2d cube acube; dtype=u32 s32 f32";
const GATHER: &str = "comp=r g b a; geom=2d a2d cube acube; dtype=u32 s32 f32";
const LOAD: &str =
    "geom=1d 2d 3d a1d a2d; cop=ca cg cs cv; vec=v2 v4; type=b8 b16 b32 b64; out=trap clamp zero";
const STORE: &str =
    "geom=1d 2d 3d a1d a2d; cop=wb cg cs wt; vec=v2 v4; type=b8 b16 b32 b64; out=trap clamp zero";
const FORMATTED: &str = "geom=1d 2d 3d a1d a2d; vec=v2 v4; out=trap clamp zero";

/// Rows of these chapters.
pub const SECTIONS: &[Section] = &[
    Section {
        title: "Texture Instructions",
        rows: &[
            row(
                Tex,
                "tex{.mip}.geom.v4.dtype.ctype d:t0*4{|p:pred}, [t, c]{, offset:s32*n}",
                TEX,
                "1.0",
                "d = what texture t gives at coordinates c; p = whether it is resident (always)",
            ),
            row(
                Tex,
                "tex{.mip}.geom.v2.f16x2.ctype d:t0*2{|p:pred}, [t, c]{, offset:s32*n}",
                TEX2,
                "4.2 sm_53",
                "d = what texture t gives at coordinates c, as pairs of f16",
            ),
            row(
                Tex,
                "tex.level.geom.v4.dtype.ctype d:t0*4{|p:pred}, [t, c], lod:t1{, offset:s32*n}",
                LEVEL,
                "3.1",
                "d = what texture t gives at coordinates c and that level of detail",
            ),
            row(
                Tex,
                "tex.level.geom.v2.f16x2.ctype d:t0*2{|p:pred}, [t, c], lod:t1{, offset:s32*n}",
                LEVEL2,
                "4.2 sm_53",
                "d = what texture t gives at coordinates c and that level, as pairs of f16",
            ),
            row(
                Tex,
                "tex.grad.geom.v4.dtype.f32 d:t0*4{|p:pred}, [t, c], dx:f32*n, dy:f32*n\
                {, offset:s32*n}",
                GRAD,
                "3.1",
                "d = what texture t gives at coordinates c, whose derivatives choose the level",
            ),
            row(
                Tex,
                "tex.grad.geom.v2.f16x2.f32 d:t0*2{|p:pred}, [t, c], dx:f32*n, dy:f32*n\
                {, offset:s32*n}",
                GRAD2,
                "4.2 sm_53",
                "d = as above, as pairs of f16",
            ),
            row(
                Tex,
                "tex{.mip}.geom.v4.dtype.f32 d:t0*4{|p:pred}, [t, c]{, offset:s32*n}, compare:f32",
                COMPARE,
                "4.3 sm_20",
                "comparisons with a depth texture: recognised, not executed",
            ),
            row(
                Tld4,
                "tld4.comp.geom.v4.dtype.f32 d:t0*4{|p:pred}, [t, c]{, offset:s32*n}",
                GATHER,
                "2.2 sm_20",
                "d = one component of the four texels that a bilinear filter would weigh at c",
            ),
            row(
                Tld4,
                "tld4.comp.geom.v4.dtype.f32 d:t0*4{|p:pred}, [t, c]{, offset:s32*n}, compare:f32",
                GATHER,
                "4.3 sm_20",
                "comparisons with a depth texture: recognised, not executed",
            ),
            row(
                Txq,
                "txq.query.b32 d:b32, [t]",
                "query=width height depth channel_data_type channel_order normalized_coords \
                array_size num_mipmap_levels num_samples force_unnormalized_coords filter_mode \
                addr_mode_0 addr_mode_1 addr_mode_2",
                "1.5",
                "d = an attribute of texture t or of its sampler",
            ),
            row(
                Txq,
                "txq.level.query.b32 d:b32, [t], lod:b32",
                "query=width height depth",
                "4.1 sm_30",
                "d = a size of a level of texture t",
            ),
            row(
                Istypep,
                "istypep.type d:pred, a:b64",
                "type=texref samplerref surfref",
                "4.0 sm_30",
                "whether a names an object of that kind",
            ),
        ],
    },
    Section {
        title: "Surface Instructions",
        rows: &[
            row(
                Suld,
                "suld.b.geom{.cop}{.vec}.type.out d:~t0*vec, [t, c]",
                LOAD,
                "1.5 sm_20",
                "d = the bytes of surface t at c, whose first coordinate counts bytes",
            ),
            row(
                Sust,
                "sust.b.geom{.cop}{.vec}.type.out [t, c], r:~t0*vec",
                STORE,
                "1.5",
                "the bytes of surface t at c = r; the first coordinate counts bytes",
            ),
            row(
                Sust,
                "sust.p.geom{.vec}.b32.out [t, c], r:b32*vec",
                FORMATTED,
                "2.0 sm_20",
                "the texel of surface t at c = r, converted to its format",
            ),
            row(
                Sured,
                "sured.b.op.geom.type.out [t, c], r:t0",
                "op=add min max; geom=1d 2d 3d; type=u32 s32 u64; out=trap clamp zero",
                "3.0 sm_20",
                "combine r into surface t at c; the first coordinate counts bytes",
            ),
            row(
                Sured,
                "sured.b.op.geom.s64.out [t, c], r:t0",
                "op=min max; geom=1d 2d 3d; out=trap clamp zero",
                "3.0 sm_20",
                "combine r into surface t at c; the first coordinate counts bytes",
            ),
            row(
                Sured,
                "sured.b.op.geom.b32.out [t, c], r:t0",
                "op=and or; geom=1d 2d 3d; out=trap clamp zero",
                "3.0 sm_20",
                "combine r into surface t at c; the first coordinate counts bytes",
            ),
            row(
                Sured,
                "sured.p.op.geom.b32.out [t, c], r:t0",
                "op=add min max and or; geom=1d 2d 3d; out=trap clamp zero",
                "3.0 sm_20",
                "combine r into the texel of surface t at c, signed or not by its format",
            ),
            row(
                Sured,
                "sured.p.op.geom.b64.out [t, c], r:t0",
                "op=min max; geom=1d 2d 3d; out=trap clamp zero",
                "5.0 sm_50",
                "combine r into the texel of surface t at c, signed or not by its format",
            ),
            row(
                Suq,
                "suq.query.b32 d:b32, [t]",
                "query=width height depth channel_data_type channel_order array_size memory_layout",
                "1.5",
                "d = an attribute of surface t",
            ),
        ],
    },
];
