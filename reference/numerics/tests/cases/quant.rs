//! `quantize_tile` and `quantize_block` against the shared case files.

use crate::files::{CaseFile, cases};
use fathom_numerics::formats::{Format, bf16};
use fathom_numerics::quant::{QuantConfig, ScaleKind, quantize_block, quantize_tile};
use ndarray::{Array2, ArrayD, Ix2};

fn two(x: ArrayD<u32>) -> Array2<u32> {
    x.into_dimensionality::<Ix2>().expect("two dimensions")
}

#[test]
fn every_shared_cast_agrees() {
    let (files, own) = cases("quant");
    for path in &files {
        let case = CaseFile::open(path);
        let config = QuantConfig {
            format: Format::parse(case.text("format")).unwrap(),
            scale: if case.text("scale") == "pow2" { ScaleKind::Pow2 } else { ScaleKind::F32 },
            amax_floor: case.params["amax_floor"].as_f64().unwrap() as f32,
        };
        let x = two(case.codes("x"));
        let q = match case.params["tile"].as_u64() {
            Some(tile) => {
                let x = x.map(|&x| bf16::from_bits(x as u16));
                quantize_tile(x.view(), tile as usize, &config).unwrap()
            }
            None => quantize_block(x.map(|&x| f32::from_bits(x)).view(), &config).unwrap(),
        };
        let scales = q.scales.map(|x| x.to_bits());
        assert_eq!(scales, two(case.codes("out.scale")), "{} scale", path.display());
        let codes = q.codes.map(|&x| u32::from(x));
        assert_eq!(codes, two(case.codes("out.q")), "{} q", path.display());
    }
    assert!(own == 7 && [7, 17].contains(&files.len()), "seven files, and ten shared ones");
}
