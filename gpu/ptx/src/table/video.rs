//! Recognised, not executed: video, texture and surface instructions, fifth-generation tensor
//! cores. Their rows take any suffix and any operand; [`crate::table::Form::recognised`] is true.

use super::Opcode::*;
use super::pattern::{Section, row};

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
            row(Vadd2, "vadd2 ...", "", "3.0 sm_30", "addition of two half-words"),
            row(Vsub2, "vsub2 ...", "", "3.0 sm_30", "subtraction of two half-words"),
            row(Vavrg2, "vavrg2 ...", "", "3.0 sm_30", "average of two half-words"),
            row(
                Vabsdiff2,
                "vabsdiff2 ...",
                "",
                "3.0 sm_30",
                "absolute difference of two half-words",
            ),
            row(Vmin2, "vmin2 ...", "", "3.0 sm_30", "minimum of two half-words"),
            row(Vmax2, "vmax2 ...", "", "3.0 sm_30", "maximum of two half-words"),
            row(Vset2, "vset2 ...", "", "3.0 sm_30", "comparison of two half-words"),
            row(Vadd4, "vadd4 ...", "", "3.0 sm_30", "addition of four bytes"),
            row(Vsub4, "vsub4 ...", "", "3.0 sm_30", "subtraction of four bytes"),
            row(Vavrg4, "vavrg4 ...", "", "3.0 sm_30", "average of four bytes"),
            row(Vabsdiff4, "vabsdiff4 ...", "", "3.0 sm_30", "absolute difference of four bytes"),
            row(Vmin4, "vmin4 ...", "", "3.0 sm_30", "minimum of four bytes"),
            row(Vmax4, "vmax4 ...", "", "3.0 sm_30", "maximum of four bytes"),
            row(Vset4, "vset4 ...", "", "3.0 sm_30", "comparison of four bytes"),
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
