//! What tests with planted faults share: reproducible numbers, a diagnosis, and what it must name.

use std::collections::BTreeMap;

use fathom_conformance::case_file::CaseFile;
use fathom_conformance::diagnose::{Diagnosis, diagnose};
use fathom_numerics::formats::to_bf16;
use fathom_numerics::quant::Quantized;
use fathom_reference::op::op_from;
use fathom_reference::{Case, Tensor};
use fathom_trace::DType;
use ndarray::Array2;
use serde_json::Value;

/// Standard normal numbers (sum of twelve uniforms), reproducible.
pub fn normal(count: usize, seed: u64) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut uniform = || {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (state >> 40) as f32 / (1u64 << 24) as f32
    };
    (0..count).map(|_| (0..12).map(|_| uniform()).sum::<f32>() - 6.0).collect()
}

pub fn matrix(m: usize, k: usize, seed: u64) -> Array2<f32> {
    Array2::from_shape_vec((m, k), normal(m * k, seed)).unwrap()
}

pub fn codes(q: &Quantized) -> Tensor {
    Tensor::from_array(q.codes.clone()).reinterpret(DType::F8E4M3)
}

pub fn bf16s(d: &Array2<f32>) -> Tensor {
    Tensor::from_array(d.mapv(to_bf16))
}

pub fn found(
    op: &str,
    params: &Value,
    inputs: &[(&str, Tensor)],
    out: &[(&str, Tensor)],
) -> Diagnosis {
    let map = |all: &[(&str, Tensor)]| -> BTreeMap<String, Tensor> {
        all.iter().map(|(role, t)| ((*role).to_owned(), t.clone())).collect()
    };
    let case = Case { op: op_from(op, params).unwrap(), inputs: map(inputs) };
    let file = CaseFile { case, expected: map(out), metadata: BTreeMap::new() };
    let found = diagnose(&file, &|_| ()).unwrap();
    // The hypotheses' own arithmetic without a deviation is the contract's.
    let given = found.hypotheses.iter().find(|h| h.deviations.is_empty()).unwrap();
    if found.examined == found.elements {
        assert_eq!(given.agree, found.elements - found.mismatches, "{op}: {}", found.verdict);
    }
    found
}

/// The cause is named by these words, and all elements are explained.
pub fn named(found: &Diagnosis, words: &str) {
    assert!(found.mismatches > 0, "the fault must show: {words}");
    assert!(found.explained, "{words}: {}", found.verdict);
    assert!(found.verdict.contains(words), "expected '{words}' in: {}", found.verdict);
    assert!(found.cause.is_some(), "{}", found.verdict);
}
