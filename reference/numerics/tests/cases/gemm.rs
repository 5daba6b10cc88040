//! `gemm_fp8` against the shared case files.

use crate::files::{CaseFile, cases};
use fathom_numerics::gemm::{Fp8Operand, GemmConfig, cast_bf16, gemm_fp8};
use ndarray::{Array2, ArrayD, Ix2};

fn two(x: ArrayD<u32>) -> Array2<u32> {
    x.into_dimensionality::<Ix2>().expect("two dimensions")
}

#[test]
fn every_shared_gemm_agrees() {
    let (files, own) = cases("gemm");
    for path in &files {
        let case = CaseFile::open(path);
        let codes = |name: &str| two(case.codes(name)).map(|&x| x as u8);
        let scales = |name: &str| two(case.codes(name)).map(|&x| f32::from_bits(x));
        let (a, b) = (codes("a"), codes("b"));
        let (a_scale, b_scale) = (scales("a_scale"), scales("b_scale"));
        let a = Fp8Operand::tile_1x128(a.view(), a_scale.view());
        let b = Fp8Operand::block_128x128(b.view(), b_scale.view());
        let d = gemm_fp8(&a, &b, &GemmConfig::default()).unwrap();
        let got = match case.text("d") {
            "bf16" => cast_bf16(d.view()).map(|x| u32::from(x.to_bits())),
            _ => d.map(|x| x.to_bits()),
        };
        let want = two(case.codes("out.d"));
        assert_eq!(got, want, "{}", path.display());
    }
    assert!(own == 2 && [2, 7].contains(&files.len()), "two files, and five shared ones");
}
