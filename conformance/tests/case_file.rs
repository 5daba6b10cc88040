//! Case files: equal bytes for equal cases, refusals that say where and why, hostile bytes.

use std::collections::BTreeMap;
use std::path::Path;

use fathom_conformance::case_file::{self, CaseFile};
use fathom_reference::op::{ReferenceEngine, op_from};
use fathom_reference::{Case, Engine, Outputs, Tensor};
use proptest::prelude::*;
use serde_json::{Value, json};

/// A small `mma` case whose expectation was worked out by hand: rows of ones times 0.5, plus c.
fn ones() -> CaseFile {
    let params = json!({
        "arch": "sm_90", "instr": "wgmma", "qualifier": "m64n8k16.f32.bf16.bf16",
        "m": 64, "n": 8, "k": 16, "a": "bf16", "b": "bf16", "d": "f32",
    });
    let bf16 = |n: usize, x: f32| vec![half::bf16::from_f32(x); n];
    let inputs = BTreeMap::from([
        ("a".to_owned(), Tensor::from_vec(&[64, 16], bf16(64 * 16, 1.0))),
        ("b".to_owned(), Tensor::from_vec(&[16, 8], bf16(16 * 8, 0.5))),
        ("c".to_owned(), Tensor::from_vec(&[64, 8], vec![0.25f32; 64 * 8])),
    ]);
    let expected =
        Outputs::from([("d".to_owned(), Tensor::from_vec(&[64, 8], vec![8.25f32; 64 * 8]))]);
    let metadata = BTreeMap::from([("source".to_owned(), "worked by hand".to_owned())]);
    CaseFile { case: Case { op: op_from("mma", &params).unwrap(), inputs }, expected, metadata }
}

fn written(file: &CaseFile) -> Vec<u8> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("case.safetensors");
    case_file::write(&path, file).unwrap();
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1, "nothing is left beside");
    std::fs::read(path).unwrap()
}

fn refusal(bytes: &[u8]) -> String {
    case_file::parse(bytes, Path::new("bad.safetensors")).unwrap_err().to_string()
}

/// A file with another header: `change` edits the header's JSON.
fn with_header(bytes: &[u8], change: impl Fn(&mut Value)) -> Vec<u8> {
    let len = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let mut header: Value = serde_json::from_slice(&bytes[8..8 + len]).unwrap();
    change(&mut header);
    let mut text = header.to_string().into_bytes();
    text.resize(text.len().next_multiple_of(8), b' ');
    [&(text.len() as u64).to_le_bytes(), &text[..], &bytes[8 + len..]].concat()
}

fn with_params(bytes: &[u8], key: &str, value: &Value) -> Vec<u8> {
    with_header(bytes, |header| {
        let params = header["__metadata__"]["params"].as_str().unwrap();
        let mut params: Value = serde_json::from_str(params).unwrap();
        params[key] = value.clone();
        header["__metadata__"]["params"] = json!(params.to_string());
    })
}

#[test]
fn what_is_written_is_read_and_its_bytes_are_stable() {
    let bytes = written(&ones());
    let again = case_file::parse(&bytes, Path::new("x")).unwrap();
    assert_eq!(written(&again), bytes);
    assert_eq!(again.metadata["source"], "worked by hand");
    let header_len = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let header = std::str::from_utf8(&bytes[8..8 + header_len]).unwrap();
    let at = |key: &str| header.find(&format!("\"{key}\":")).unwrap();
    assert!(at("__metadata__") < at("a") && at("b") < at("c") && at("c") < at("out.d"));
    assert!(at("op") < at("params") && at("params") < at("source"));
}

#[test]
fn the_reference_meets_the_hand_worked_expectation() {
    let file = ones();
    assert_eq!(ReferenceEngine.run(&file.case).unwrap(), file.expected);
}

#[test]
fn refusals_name_file_tensor_expected_and_found() {
    let good = written(&ones());
    let says = |bytes: &[u8], parts: &[&str]| {
        let message = refusal(bytes);
        for part in ["bad.safetensors"].iter().chain(parts) {
            assert!(message.contains(part), "'{part}' is not in: {message}");
        }
    };
    says(b"", &["expected a safetensors file", "0 bytes", "truncated"]);
    says(&good[..good.len() - 1], &["truncated"]);
    says(&good[..40], &["truncated"]);
    says(b"\x10\0\0\0\0\0\0\0{\"a\": nonsense }", &["malformed header"]);

    says(&with_header(&good, |h| h["__metadata__"] = json!({})), &["metadata 'op'", "nothing"]);
    says(
        &with_header(&good, |h| h["__metadata__"]["params"] = json!("{")),
        &["metadata 'params'", "JSON object"],
    );
    let misspelt = with_header(&good, |h| {
        let params = h["__metadata__"].as_object_mut().unwrap().remove("params").unwrap();
        h["__metadata__"]["parms"] = params;
    });
    says(&misspelt, &["metadata 'params'", "found 'parms'; is that a misspelling?"]);
    says(
        &with_header(&good, |h| h["__metadata__"]["op"] = json!("gem")),
        &["unknown op 'gem'", "known are", "mma"],
    );
    says(&with_params(&good, "k", &json!("sixteen")), &["params of mma, at 'k'", "sixteen"]);
    says(
        &with_params(&good, "kk", &json!(1)),
        &["params of mma: unknown 'kk' (did you mean 'k'?)"],
    );
    let huge = &json!(1u64 << 40);
    says(&with_params(&good, "k", huge), &["at 'k'", "expected at most 2147483647"]);
    says(&with_params(&good, "k", &json!(32)), &["at 'k'", "expected 16", "found 32"]);
    says(&with_params(&good, "arch", &json!("sm_91")), &["at 'arch'", "sm_91", "sm_90"]);

    let rename = |from: &'static str, to: &'static str| {
        with_header(&good, |h| {
            let tensor = h.as_object_mut().unwrap().remove(from).unwrap();
            h[to] = tensor;
        })
    };
    let missing = "tensors of mma: missing 'c' (F32";
    says(&rename("c", "cc"), &[missing, "unknown 'cc' (did you mean 'c'?)"]);
    says(&rename("c", "zzz"), &[missing, "unknown 'zzz' (there are a, b, c, ", "out.d)"]);
    says(&rename("out.d", "out.e"), &["unknown 'out.e' (did you mean 'out.d'?)"]);
    says(&rename("out.d", "d"), &["unknown 'd' (did you mean 'out.d'?)"]);
    says(&rename("c", "scale_a"), &[missing]);
    let edit = |name: &'static str, key: &'static str, value: Value| {
        with_header(&good, move |h| h[name][key] = value.clone())
    };
    says(&edit("a", "dtype", json!("F16")), &["tensor 'a'", "expected dtype BF16", "found F16"]);
    says(&edit("a", "shape", json!([16, 64])), &["tensor 'a'", "[64, 16]", "[16, 64]"]);
    says(&edit("out.d", "shape", json!([8, 64])), &["'out.d'", "[64, 8]", "[8, 64]"]);
    says(&edit("out.d", "dtype", json!("I32")), &["'out.d'", "expected dtype F32", "found I32"]);
    says(&edit("out.d", "dtype", json!("C64")), &["bad.safetensors"]);
}

/// A file without elements that asks for an output of terabytes.
#[test]
fn an_output_out_of_proportion_is_refused() {
    let empty = |shape: &[usize]| Tensor::zeros(fathom_trace::DType::F32, shape);
    let refused = |rows: usize, expected: &str| {
        let (a, b) = (empty(&[rows, 0]), empty(&[rows, 0]));
        let tensors = BTreeMap::from([("a".to_owned(), &a), ("b".to_owned(), &b)]);
        let metadata = [("op", "gemm"), ("params", r#"{"layout": "nt", "out": "F32"}"#)];
        let metadata = metadata.map(|(key, value)| (key.to_owned(), value.to_owned()));
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("case.safetensors");
        case_file::write_tensors(&path, tensors, &metadata.into()).unwrap();
        let message = case_file::read(&path).unwrap_err().to_string();
        assert!(message.contains(expected), "{message}");
    };
    refused(1 << 20, "output 'd' [1048576, 1048576] of F32 exceeds 64 GiB");
    refused(1 << 40, "expected shape sizes of at most 2147483647");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    /// No bytes make the reader panic, hang or allocate what the file does not hold.
    #[test]
    fn damaged_files_are_read_or_refused(
        edits in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8),
        cut in any::<Option<prop::sample::Index>>(),
    ) {
        thread_local! { static GOOD: Vec<u8> = written(&ones()); }
        let mut bytes = GOOD.with(Clone::clone);
        // Most damage is done to the header, where the structure is.
        for (place, byte) in edits {
            let place = place.index(900).min(bytes.len() - 1);
            bytes[place] = byte;
        }
        if let Some(cut) = cut {
            bytes.truncate(cut.index(bytes.len()));
        }
        let _ = case_file::parse(&bytes, Path::new("damaged"));
    }
}
