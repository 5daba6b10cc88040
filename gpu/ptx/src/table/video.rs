//! SIMD video instructions; and what is recognised, not executed: scalar video, texture and surface
//! instructions, fifth-generation tensor cores. The rows of those take any suffix and any operand;
//! [`crate::table::Form::recognised`] is true.

use super::Opcode::*;
use super::pattern::{Section, row};

const SIMD: &str = "dtype=u32 s32; atype=u32 s32; btype=u32 s32; op=add";
const SIMD_SET: &str = "atype=u32 s32; btype=u32 s32; cmp=eq ne lt le gt ge; op=add";

/// Rows of these chapters.
pub const SECTIONS: &[Section] = &[
    Section {
        title: "Video Instructions",
        rows: &[
            row(Vadd, "vadd ...", "", "2.0 sm_20", "scalar video addition"),
            row(Vsub, "vsub ...", "", "2.0 sm_20", "scalar video subtraction"),
            row(Vabsdiff, "vabsdiff ...", "", "2.0 sm_20", "scalar video absolute difference"),
            row(Vmin, "vmin ...", "", "2.0 sm_20", "scalar video minimum"),
            row(Vmax, "vmax ...", "", "2.0 sm_20", "scalar video maximum"),
            row(Vshl, "vshl ...", "", "2.0 sm_20", "scalar video left shift"),
            row(Vshr, "vshr ...", "", "2.0 sm_20", "scalar video right shift"),
            row(Vmad, "vmad ...", "", "2.0 sm_20", "scalar video multiply-add"),
            row(Vset, "vset ...", "", "2.0 sm_20", "scalar video comparison"),
            row(
                Vadd2,
                "vadd2.dtype.atype.btype{.sat}{.op} d:b32, a:b32, b:b32, c:b32",
                SIMD,
                "3.0 sm_30",
                "sums of two half-words, chosen from a and b; others are from c, or all are added to c",
            ),
            row(
                Vsub2,
                "vsub2.dtype.atype.btype{.sat}{.op} d:b32, a:b32, b:b32, c:b32",
                SIMD,
                "3.0 sm_30",
                "differences of two half-words, chosen from a and b; others are from c, or all are added to c",
            ),
            row(
                Vavrg2,
                "vavrg2.dtype.atype.btype{.sat}{.op} d:b32, a:b32, b:b32, c:b32",
                SIMD,
                "3.0 sm_30",
                "averages, halves rounded away from zero of two half-words, chosen from a and b; others are from c, or all are added to c",
            ),
            row(
                Vabsdiff2,
                "vabsdiff2.dtype.atype.btype{.sat}{.op} d:b32, a:b32, b:b32, c:b32",
                SIMD,
                "3.0 sm_30",
                "absolute differences of two half-words, chosen from a and b; others are from c, or all are added to c",
            ),
            row(
                Vmin2,
                "vmin2.dtype.atype.btype{.sat}{.op} d:b32, a:b32, b:b32, c:b32",
                SIMD,
                "3.0 sm_30",
                "minima of two half-words, chosen from a and b; others are from c, or all are added to c",
            ),
            row(
                Vmax2,
                "vmax2.dtype.atype.btype{.sat}{.op} d:b32, a:b32, b:b32, c:b32",
                SIMD,
                "3.0 sm_30",
                "maxima of two half-words, chosen from a and b; others are from c, or all are added to c",
            ),
            row(
                Vset2,
                "vset2.atype.btype.cmp{.op} d:b32, a:b32, b:b32, c:b32",
                SIMD_SET,
                "3.0 sm_30",
                "1 or 0 for comparisons of two half-words; others are from c, or all are added to c",
            ),
            row(
                Vadd4,
                "vadd4.dtype.atype.btype{.sat}{.op} d:b32, a:b32, b:b32, c:b32",
                SIMD,
                "3.0 sm_30",
                "sums of four bytes, chosen from a and b; others are from c, or all are added to c",
            ),
            row(
                Vsub4,
                "vsub4.dtype.atype.btype{.sat}{.op} d:b32, a:b32, b:b32, c:b32",
                SIMD,
                "3.0 sm_30",
                "differences of four bytes, chosen from a and b; others are from c, or all are added to c",
            ),
            row(
                Vavrg4,
                "vavrg4.dtype.atype.btype{.sat}{.op} d:b32, a:b32, b:b32, c:b32",
                SIMD,
                "3.0 sm_30",
                "averages, halves rounded away from zero of four bytes, chosen from a and b; others are from c, or all are added to c",
            ),
            row(
                Vabsdiff4,
                "vabsdiff4.dtype.atype.btype{.sat}{.op} d:b32, a:b32, b:b32, c:b32",
                SIMD,
                "3.0 sm_30",
                "absolute differences of four bytes, chosen from a and b; others are from c, or all are added to c",
            ),
            row(
                Vmin4,
                "vmin4.dtype.atype.btype{.sat}{.op} d:b32, a:b32, b:b32, c:b32",
                SIMD,
                "3.0 sm_30",
                "minima of four bytes, chosen from a and b; others are from c, or all are added to c",
            ),
            row(
                Vmax4,
                "vmax4.dtype.atype.btype{.sat}{.op} d:b32, a:b32, b:b32, c:b32",
                SIMD,
                "3.0 sm_30",
                "maxima of four bytes, chosen from a and b; others are from c, or all are added to c",
            ),
            row(
                Vset4,
                "vset4.atype.btype.cmp{.op} d:b32, a:b32, b:b32, c:b32",
                SIMD_SET,
                "3.0 sm_30",
                "1 or 0 for comparisons of four bytes; others are from c, or all are added to c",
            ),
        ],
    },
    Section {
        title: "Texture Instructions",
        rows: &[
            row(Tex, "tex ...", "", "1.0", "texture lookup"),
            row(Tld4, "tld4 ...", "", "2.2 sm_20", "four texels of a bilinear footprint"),
            row(Txq, "txq ...", "", "1.5", "query a texture or sampler attribute"),
            row(Istypep, "istypep ...", "", "4.0 sm_30", "whether an opaque handle is of a kind"),
        ],
    },
    Section {
        title: "Surface Instructions",
        rows: &[
            row(Suld, "suld ...", "", "1.5 sm_20", "surface load"),
            row(Sust, "sust ...", "", "1.5", "surface store"),
            row(Sured, "sured ...", "", "3.0 sm_20", "surface reduction"),
            row(Suq, "suq ...", "", "1.5", "query a surface attribute"),
        ],
    },
    Section {
        title: "TensorCore 5th Generation Family Instructions",
        rows: &[row(
            Tcgen05,
            "tcgen05 ...",
            "",
            "8.6 sm_100a",
            "tensor memory and its matrix instructions",
        )],
    },
];
