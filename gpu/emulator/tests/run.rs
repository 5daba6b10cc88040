//! Launch files: a small one of our own, and any folder that `FATHOM_EXTRA_PTX` names.

use std::path::Path;

use fathom_emulator::run::{launch_files, run_file};
use fathom_emulator::{Error, Settings};
use safetensors::tensor::{Dtype, TensorView};

const PTX: &str = include_str!("data/axpy.ptx");

fn write(folder: &Path, expected: [f32; 4], grid: &str) {
    let json = format!(
        r#"{{"entry": "axpy", "threads": 32, "grid": {grid}, "target": "sm_80",
            "params": [{{"name": "x", "ptx_type": "u64"}}, {{"name": "y", "ptx_type": "u64"}},
                       {{"name": "a", "ptx_type": "f32"}}, {{"name": "n", "ptx_type": "u32"}}],
            "arguments": {{"a": 2.5, "n": 4}}}}"#
    );
    std::fs::write(folder.join("axpy.json"), json).unwrap();
    std::fs::write(folder.join("axpy.ptx"), PTX).unwrap();
    let bytes = |v: [f32; 4]| v.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<u8>>();
    let (x, y, out) = (bytes([1., 2., 3., 4.]), bytes([1.; 4]), bytes(expected));
    let view = |data| TensorView::new(Dtype::F32, vec![4], data).unwrap();
    let tensors = [("x", view(&x)), ("y", view(&y)), ("out.y", view(&out))];
    let file = safetensors::serialize(tensors, None).unwrap();
    std::fs::write(folder.join("axpy.safetensors"), file).unwrap();
}

#[test]
fn a_launch_file_runs_and_compares() {
    let folder = tempfile::tempdir().unwrap();
    write(folder.path(), [3.5, 6.0, 8.5, 11.0], "[1, 1, 1]");
    let file = &launch_files(folder.path()).unwrap()[0];
    let outcome = run_file(file, "a100", Settings::default()).unwrap();
    assert!(outcome.holds());
    assert_eq!(outcome.compared[0].elements, 4);

    write(folder.path(), [3.5, 6.0, 8.25, 11.0], "[1, 1, 1]");
    let outcome = run_file(file, "a100", Settings::default()).unwrap();
    let first = outcome.compared[0].first.clone().unwrap();
    assert_eq!((outcome.compared[0].differing, first.0), (1, 2));
    assert!(first.1.contains("8.25") && first.2.contains("8.5"));

    write(folder.path(), [0.0; 4], "[1, 1]");
    let error = run_file(file, "a100", Settings::default()).unwrap_err();
    assert!(matches!(&error, Error::File { file, .. } if file.ends_with("axpy.json")), "{error}");

    // Broken PTX is named by file, line and column.
    write(folder.path(), [0.0; 4], "[1, 1, 1]");
    std::fs::write(folder.path().join("axpy.ptx"), PTX.replace("fma.rn", "fma.xx")).unwrap();
    let error = run_file(file, "a100", Settings::default()).unwrap_err().to_string();
    assert!(error.contains("axpy.ptx:21:5"), "{error}");
    for (from, to) in [("\"u32\"", "\"u9\""), ("\"entry\": \"axpy\"", "\"entry\": \"nope\"")] {
        write(folder.path(), [0.0; 4], "[1, 1, 1]");
        let json = std::fs::read_to_string(file).unwrap().replace(from, to);
        std::fs::write(file, json).unwrap();
        let error = run_file(file, "a100", Settings::default()).unwrap_err();
        assert!(matches!(&error, Error::File { file, .. } if file.ends_with("json")), "{error}");
    }
}

/// What nothing answers to is refused by its name: keys, arguments, tolerances and tensors that are
/// misspelt, and numbers that a parameter cannot hold.
#[test]
fn what_names_nothing_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    write(folder.path(), [3.5, 6.0, 8.5, 11.0], "[1, 1, 1]");
    let file = &launch_files(folder.path()).unwrap()[0];
    let good = std::fs::read_to_string(file).unwrap();
    for (from, to, said) in [
        ("\"threads\"", "\"thread\"", "unknown key 'thread': did you mean 'threads'?"),
        ("\"target\"", "\"Shared_Byte\"", "did you mean 'shared_bytes'?"),
        ("\"n\": 4", "\"n\": 4, \"m\": 4", "arguments.m: expected one of the params x, y, a, n"),
        ("\"n\": 4", "\"n\": 4, \"x\": 4", "arguments.x: expected an argument or a tensor"),
        ("\"n\": 4", "\"n\": 4294967296", "arguments.n: expected a u32, found 4294967296"),
        ("\"n\": 4", "\"n\": -1", "arguments.n: expected a u32, found -1"),
        ("\"a\": 2.5", "\"a\": 1e39", "arguments.a: expected a f32"),
        ("\"u32\"", "\"u64\"", "params: n: expected 4 bytes as in the PTX, found 8"),
        ("\"n\", \"p", "\"a\", \"p", "params: two are called 'a'"),
        ("\"name\": \"y\"", "\"name\": \"z\"", "axpy.safetensors: tensor '"),
        ("\"target\"", "\"tolerance\": {\"x\": 0}, \"target\"", "tolerance.x: expected a tensor"),
        ("\"target\"", "\"tolerance\": {\"y\": -1}, \"target\"", "expected at least 0, found -1"),
    ] {
        std::fs::write(file, good.replacen(from, to, 1)).unwrap();
        let error = run_file(file, "a100", Settings::default()).unwrap_err();
        let Error::File { .. } = &error else { panic!("{error}") };
        assert!(error.to_string().contains(said), "{error}");
    }
}

#[test]
fn extra_folder() {
    let Some(folder) = std::env::var_os("FATHOM_EXTRA_PTX") else {
        let why = "no further launches (set FATHOM_EXTRA_PTX to a folder of launch files)";
        fathom_trace::shared::skipped(why);
        return;
    };
    let files = launch_files(Path::new(&folder)).unwrap();
    assert!(!files.is_empty(), "FATHOM_EXTRA_PTX={} holds no *.json", folder.display());
    for file in files {
        let outcome = run_file(&file, "h800", Settings::default()).unwrap();
        for finding in &outcome.report.findings {
            eprintln!("{finding}");
        }
        assert!(outcome.holds(), "{}: {:?}", file.display(), outcome.compared);
    }
}
