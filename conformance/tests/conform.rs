//! The suites: an engine with another arithmetic is found out, on a small case, and the case file
//! says which arithmetic it was. The kernels themselves are run by the program's own test.

use std::collections::BTreeMap;

use fathom_conformance::conform::{self, Options, SIMPLIFICATIONS};
use fathom_conformance::{case_file, diagnose};
use fathom_numerics::elementary;
use fathom_reference::op::{Case, Engine, EngineError, Outputs, ReferenceEngine};
use fathom_reference::ops::cross_entropy::CrossEntropy;
use fathom_reference::ops::gemm_fp8::GemmFp8;
use fathom_reference::{DynOp, Tensor};

/// Promotes every 64 instead of every 128.
struct Hasty;

impl Engine for Hasty {
    fn name(&self) -> String {
        "hasty".to_owned()
    }

    fn run(&self, case: &Case) -> Result<Outputs, EngineError> {
        let op = case.op.as_any().downcast_ref::<GemmFp8>().expect("a GEMM");
        let op = GemmFp8 { promotion_interval: Some(64), ..op.clone() };
        ReferenceEngine.run(&Case { op: op.boxed(), inputs: case.inputs.clone() })
    }
}

/// Fails like a kernel that left its memory.
struct Broken;

impl Engine for Broken {
    fn name(&self) -> String {
        "broken".to_owned()
    }

    fn run(&self, case: &Case) -> Result<Outputs, EngineError> {
        let op = case.op.name().to_owned();
        let reason = "CUDA_ERROR_ILLEGAL_ADDRESS".to_owned();
        Err(EngineError::Failed { engine: self.name(), op, reason })
    }
}

fn options(save: &std::path::Path) -> Options {
    Options { cases: 0..6, seed: 3, simplifications: SIMPLIFICATIONS, save: save.to_owned() }
}

#[test]
fn the_reference_agrees_with_itself_on_every_suite() {
    let folder = tempfile::tempdir().unwrap();
    for suite in conform::suites(&[]).unwrap() {
        let options = options(folder.path());
        let report =
            conform::run(suite, &ReferenceEngine, &ReferenceEngine, &options, &|| ()).unwrap();
        assert_eq!((report.cases, report.passed), (6, 6), "{}", suite.op);
        assert!(
            report.elements >= 2 * report.cases && report.failure.is_none(),
            "{}: {}",
            suite.op,
            report.elements
        );
    }
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
}

#[test]
fn every_kernel_has_a_suite() {
    for kernel in fathom_gpu::kernels::KERNELS {
        let op = kernel.op;
        assert!(
            conform::suites(&[op.to_owned()]).is_ok(),
            "the kernel of {op} has no suite: write conformance/src/conform/{op}.rs and name it \
             among the suites"
        );
    }
}

#[test]
fn another_arithmetic_is_found_simplified_and_named() {
    let folder = tempfile::tempdir().unwrap();
    let suite = conform::suites(&["gemm_fp8".to_owned()]).unwrap()[0];
    let run = || conform::run(suite, &Hasty, &ReferenceEngine, &options(folder.path()), &|| ());
    let report = run().unwrap();
    let failure = report.failure.expect("64 is not 128");
    let first = failure.tensors[0].first.as_ref().expect("a mismatch");
    assert_eq!(first.index.len(), 2);
    let file = case_file::read(failure.file.as_ref().expect("kept")).unwrap();
    assert_eq!(file.metadata["source"], failure.what);
    let diagnosis = diagnose::diagnose(&file, &|_| ()).unwrap();
    assert!(diagnosis.explained && diagnosis.verdict.contains("64"), "{}", diagnosis.verdict);
    // The same seed finds the same case.
    assert_eq!(run().unwrap().failure.unwrap().what, failure.what);
}

#[test]
fn a_failed_launch_is_a_failure_and_an_unknown_op_an_error() {
    let folder = tempfile::tempdir().unwrap();
    let suite = conform::suites(&["quantize_tile".to_owned()]).unwrap()[0];
    let report =
        conform::run(suite, &Broken, &ReferenceEngine, &options(folder.path()), &|| ()).unwrap();
    let failure = report.failure.unwrap();
    assert!(failure.error.unwrap().contains("ILLEGAL_ADDRESS") && failure.file.is_none());
    let error = conform::suites(&["gem".to_owned()]).err().unwrap().to_string();
    assert!(error.contains("expected adamw, add"), "{error}");
}

/// The reference once took the system library's logarithm here, which is 0x3F08B529.
#[test]
fn the_heads_logarithm_is_the_contracts() {
    let logits = [0.0f32, (0.705_766_f32).ln()];
    let sum = 1.0 + elementary::exp(logits[1]);
    assert_eq!(sum.to_bits(), 0x3FDA_568A);
    let inputs = BTreeMap::from([
        ("x".to_owned(), Tensor::from_vec(&[1, 1], vec![1.0f32])),
        ("weight".to_owned(), Tensor::from_vec(&[2, 1], logits.to_vec())),
        ("targets".to_owned(), Tensor::from_vec(&[1], vec![0i32])),
    ]);
    let outputs = ReferenceEngine.run(&Case { op: CrossEntropy {}.boxed(), inputs }).unwrap();
    let lse = outputs["lse"].as_slice::<f32>()[0];
    assert_eq!(lse.to_bits(), 0x3F08_B528);
    assert_eq!(lse.to_bits(), elementary::log(sum).to_bits());
}
