//! Built-in input of the demonstration: one FP8 GEMM with the contract's output, and one whose
//! output
//! comes from another arithmetic.

use std::collections::BTreeMap;

use fathom_numerics::philox::Philox;
use fathom_numerics::quant::{QuantConfig, quantize_block, quantize_tile};
use fathom_reference::ops::gemm_fp8::{GemmFp8, OutputType};
use fathom_reference::ops::{Case, Engine, EngineError, ReferenceEngine};
use fathom_reference::{DynOp, Tensor};
use fathom_trace::DType;
use ndarray::Array2;

use crate::case_file::CaseFile;

/// Sizes of the demonstration's GEMM.
const SHAPE: (usize, usize, usize) = (64, 192, 512);

/// A GEMM of normal numbers, quantised as DeepSeek-V3 does, with the contract's output.
///
/// # Errors
/// Those of the reference.
pub fn gemm() -> Result<CaseFile, EngineError> {
    with_output_of(Some(128))
}

/// The same case with the output of a kernel that promotes every 64 elements of k.
///
/// # Errors
/// Those of the reference.
pub fn planted() -> Result<CaseFile, EngineError> {
    with_output_of(Some(64))
}

fn with_output_of(promotion_interval: Option<usize>) -> Result<CaseFile, EngineError> {
    let (m, n, k) = SHAPE;
    let config = QuantConfig::default();
    let a = quantize_tile(normal(m, k, 0).view(), 128, &config).expect("the default casts");
    let b = quantize_block(normal(n, k, 1).view(), &config).expect("the default casts");
    let fp8 = |codes: Array2<u8>| Tensor::from_array(codes).reinterpret(DType::F8E4M3);
    let inputs = BTreeMap::from([
        ("a".to_owned(), fp8(a.codes)),
        ("a_scale".to_owned(), Tensor::from_array(a.scales)),
        ("b".to_owned(), fp8(b.codes)),
        ("b_scale".to_owned(), Tensor::from_array(b.scales)),
    ]);
    let stated = GemmFp8::hopper(m, n, k, OutputType::Bf16);
    let computed = GemmFp8 { promotion_interval, ..stated.clone() };
    let case = Case { op: computed.boxed(), inputs };
    let expected = ReferenceEngine.run(&case)?;
    let case = Case { op: stated.boxed(), ..case };
    Ok(CaseFile { case, expected, metadata: BTreeMap::new() })
}

fn normal(rows: usize, columns: usize, stream: u64) -> Array2<f32> {
    let mut values = vec![0.0; rows * columns];
    Philox::new(0, stream).normals(0, &mut values);
    Array2::from_shape_vec((rows, columns), values).expect("as many as the shape has")
}
