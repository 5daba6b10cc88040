//! `fathom check` as a user runs it: every shared case passes, a flipped bit fails at its place.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use serde_json::Value;

fn fathom(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_fathom")).args(args).output().unwrap()
}

fn json(output: &Output) -> Value {
    serde_json::from_slice(&output.stdout).unwrap_or_else(|e| {
        panic!("{e} in {}", String::from_utf8_lossy(&output.stdout));
    })
}

/// Our own small cases, so that a stranger's clone tests itself.
fn own_cases() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("conformance/tests/cases")
}

fn all_cases() -> Vec<PathBuf> {
    let shared = fathom_trace::shared::dir().map(|d| d.join("cases"));
    [Some(own_cases()), shared].into_iter().flatten().collect()
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

fn files_below(folder: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            files.extend(files_below(&path));
        } else if path.extension().is_some_and(|e| e == "safetensors") {
            files.push(path);
        }
    }
    files.sort();
    files
}

#[test]
fn every_case_agrees_in_every_bit() {
    for folder in all_cases() {
        let output = fathom(&["check", text(&folder), "--json"]);
        let report = json(&output);
        for file in report["files"].as_array().unwrap() {
            assert_eq!(file["status"], "pass", "{file:#}");
        }
        assert_eq!(output.status.code(), Some(0));
        assert_eq!(report["files"].as_array().unwrap().len(), files_below(&folder).len());
    }
}

/// One bit of one expected output flipped, in every file: exit 1, and the right coordinates.
#[test]
fn a_flipped_bit_fails_with_its_coordinates() {
    let scratch = tempfile::tempdir().unwrap();
    for (number, path) in all_cases().iter().flat_map(|f| files_below(f)).enumerate() {
        let mut bytes = std::fs::read(&path).unwrap();
        let len = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
        let header: Value = serde_json::from_slice(&bytes[8..8 + len]).unwrap();
        let outputs: Vec<_> =
            header.as_object().unwrap().iter().filter(|(k, _)| k.starts_with("out.")).collect();
        let (name, tensor) = outputs[number % outputs.len()];
        let shape: Vec<usize> = serde_json::from_value(tensor["shape"].clone()).unwrap();
        let offsets: [usize; 2] = serde_json::from_value(tensor["data_offsets"].clone()).unwrap();
        let elements: usize = shape.iter().product();
        let element = number * 7919 % elements;
        let size = (offsets[1] - offsets[0]) / elements;
        let byte = 8 + len + offsets[0] + element * size + number % size;
        bytes[byte] ^= 1 << (number % 8);

        let flipped = scratch.path().join("flipped.safetensors");
        std::fs::write(&flipped, bytes).unwrap();
        let output = fathom(&["check", text(&flipped), "--json"]);
        assert_eq!(output.status.code(), Some(1), "{}", path.display());
        let report = json(&output);
        let tensors = report["files"][0]["tensors"].as_array().unwrap();
        let found = tensors.iter().find(|t| t["name"] == **name).unwrap();
        assert_eq!(found["mismatches"], 1, "{}", path.display());
        let mut index = element;
        let mut expected = vec![0; shape.len()];
        for (i, size) in expected.iter_mut().zip(&shape).rev() {
            (*i, index) = (index % size, index / size);
        }
        assert_eq!(found["first"]["index"], serde_json::json!(expected), "{}", path.display());
        let hex = |key: &str| {
            u64::from_str_radix(&found["first"][key].as_str().unwrap()[2..], 16).unwrap()
        };
        assert_eq!((hex("expected") ^ hex("got")).count_ones(), 1);
        assert!(tensors.iter().all(|t| t["name"] == **name || t["mismatches"] == 0));
    }
}

#[test]
fn outputs_are_saved_where_the_file_was_found() {
    let scratch = tempfile::tempdir().unwrap();
    let out = scratch.path().join("out");
    let output = fathom(&["check", text(&own_cases()), "--save-outputs", text(&out)]);
    assert_eq!(output.status.code(), Some(0));
    let relative = |folder: &Path| -> Vec<PathBuf> {
        files_below(folder).iter().map(|p| p.strip_prefix(folder).unwrap().to_owned()).collect()
    };
    assert_eq!(relative(&out), relative(&own_cases()));

    // A file argument is saved under its name, and what was saved is what the file expects.
    let one = files_below(&own_cases()).remove(0);
    let output = fathom(&["check", text(&one), "--save-outputs", text(scratch.path())]);
    assert_eq!(output.status.code(), Some(0));
    let saved = std::fs::read(scratch.path().join(one.file_name().unwrap())).unwrap();
    let saved = safetensors::SafeTensors::deserialize(&saved).unwrap();
    let original = std::fs::read(&one).unwrap();
    let original = safetensors::SafeTensors::deserialize(&original).unwrap();
    assert!(!saved.is_empty());
    for (name, tensor) in saved.tensors() {
        assert_eq!(tensor.data(), original.tensor(&name).unwrap().data(), "{name}");
    }
}

#[test]
fn bad_input_exits_with_2_and_says_where() {
    let scratch = tempfile::tempdir().unwrap();
    let bad = scratch.path().join("bad.safetensors");
    std::fs::write(&bad, b"not a case").unwrap();
    let output = fathom(&["check", text(&bad), text(&own_cases()), "--json"]);
    assert_eq!(output.status.code(), Some(2));
    let report = json(&output);
    assert_eq!(report["files"][0]["status"], "error");
    assert_eq!(report["files"][1]["status"], "pass", "one bad file does not hide the others");
    assert!(String::from_utf8_lossy(&output.stderr).contains("bad.safetensors"));

    for args in [
        &["check", "/no/such/path"][..],
        &["check"],
        &["check", text(scratch.path()), "--tolerance", "ulps=3"],
    ] {
        assert_eq!(fathom(args).status.code(), Some(2), "{args:?}");
    }
    let empty = tempfile::tempdir().unwrap();
    let output = fathom(&["check", text(empty.path())]);
    assert_eq!(output.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&output.stderr).contains("found none in this folder"));
}

#[test]
fn a_tolerance_accepts_no_more_than_it_says() {
    let path = files_below(&own_cases()).into_iter().find(|p| text(p).contains("mma")).unwrap();
    let mut bytes = std::fs::read(path).unwrap();
    let len = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let header: Value = serde_json::from_slice(&bytes[8..8 + len]).unwrap();
    let start = header["out.d"]["data_offsets"][0].as_u64().unwrap() as usize;
    bytes[8 + len + start] ^= 2; // two units in the last place
    let scratch = tempfile::tempdir().unwrap();
    let flipped = scratch.path().join("flipped.safetensors");
    std::fs::write(&flipped, bytes).unwrap();
    for (tolerance, code) in [("ulp=1", 1), ("ulp=2", 0), ("rel=1e-3", 0), ("rel=1e-12", 1)] {
        let output = fathom(&["check", text(&flipped), "--tolerance", tolerance]);
        assert_eq!(output.status.code(), Some(code), "{tolerance}");
    }
}
