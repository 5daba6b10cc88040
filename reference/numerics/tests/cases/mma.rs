//! The tensor-core model against the published vectors: every dot of every file, bit for bit.

use crate::files::{CaseFile, cases};
use fathom_numerics::formats::{E2M1, Format, packed};
use fathom_numerics::mma::{Arch, Instr, Mma};
use ndarray::{Array2, ArrayView2, Axis};

/// Unpacks E2M1 codes along K, which is the axis given.
fn unpack_along(packed: ArrayView2<'_, u32>, axis: usize) -> Array2<u32> {
    let lanes = packed.lanes(Axis(axis));
    let unpacked: Vec<u32> = lanes
        .into_iter()
        .flat_map(|lane| {
            let bytes: Vec<u32> = lane.iter().copied().collect();
            let codes = bytes.into_iter().flat_map(|b| packed::unpack_e2m1(b as u8));
            codes.map(|E2M1(code)| u32::from(code))
        })
        .collect();
    let (k, others) = (2 * packed.len_of(Axis(axis)), packed.len_of(Axis(1 - axis)));
    let rows = Array2::from_shape_vec((others, k), unpacked).expect("two codes a byte");
    if axis == 1 { rows } else { rows.reversed_axes() }
}

/// Dots of the project's own files: two scenarios of each published one.
const OWN_DOTS: usize = 41_472;

#[test]
fn every_published_dot_agrees() {
    let (files, own) = cases("mma");
    let mut dots = 0;
    for path in &files {
        let case = CaseFile::open(path);
        let arch = Arch::parse(case.text("arch")).unwrap();
        let instr = Instr::parse(case.text("instr")).unwrap();
        let mma = Mma::find(arch, instr, case.text("qualifier")).unwrap();
        let (a, b, c, want) =
            (case.codes3("a"), case.codes3("b"), case.codes3("c"), case.codes3("out.d"));
        let scales = mma.scale.map(|_| (case.codes3("scale_a"), case.codes3("scale_b")));
        for i in 0..a.len_of(Axis(0)) {
            let at = |x: &ndarray::Array3<u32>| x.index_axis(Axis(0), i).to_owned();
            let (mut a, mut b, c, want) = (at(&a), at(&b), at(&c), at(&want));
            if mma.types.a == Format::E2M1 {
                (a, b) = (unpack_along(a.view(), 1), unpack_along(b.view(), 0));
            }
            let got = match &scales {
                Some((sa, sb)) => {
                    let (sa, sb) = (at(sa), at(sb));
                    mma.mma_scaled(a.view(), b.view(), sa.view(), sb.view(), c.view())
                }
                None => mma.mma(a.view(), b.view(), c.view()),
            };
            for ((place, got), want) in got.indexed_iter().zip(&want) {
                assert_eq!(
                    got,
                    want,
                    "{} scenario {i} d{place:?}: got {got:#x}, expected {want:#x}",
                    path.display()
                );
            }
            dots += got.len();
        }
    }
    let shared = files.len() > own;
    let expected = if shared { (94, OWN_DOTS + 552_960) } else { (47, OWN_DOTS) };
    assert_eq!((files.len(), dots), expected, "files and dots");
}
