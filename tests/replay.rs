//! `fathom eval --record` and `fathom replay` as a user runs them.

use std::path::Path;
use std::process::{Command, Output};

use fathom_config::ModelConfig;
use fathom_reference::backend::Reference;
use fathom_reference::checkpoint::hf;
use fathom_reference::model::Model;
use fathom_reference::precision::{Mode, Recipe};
use fathom_trace::Parallel;
use serde_json::Value;

fn fathom(folder: &Path, args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_fathom")).current_dir(folder).args(args).output().unwrap()
}

fn words(output: &Output) -> String {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    text(&output.stdout) + &text(&output.stderr)
}

/// A small checkpoint in `model/` and two sequences in `ids.json`.
fn checkpoint(folder: &Path) {
    let mut config = ModelConfig::preset("small").unwrap();
    (config.layers, config.vocab_size, config.hidden_size) = (2, 32, 32);
    let recipe = Recipe::new(Mode::Fp32);
    let model = Model::new(&config, recipe, Parallel::default(), 0).unwrap();
    let params = model.init(&Reference, 1).unwrap();
    hf::save(&folder.join("model"), &model, &Reference, &params, 1 << 30).unwrap();
    std::fs::write(folder.join("ids.json"), "[[1, 2, 3, 4, 5], [6, 7, 8]]").unwrap();
}

#[test]
fn an_evaluation_is_recorded_and_replayed() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    checkpoint(folder);
    let eval = ["eval", "--model", "model", "--tokens", "ids.json", "--precision", "fp8"];
    let flags = ["--grads", "--record", "run", "--op-trace", "ops.jsonl"];
    let output = fathom(folder, &[&eval[..], &flags[..]].concat());
    assert_eq!(output.status.code(), Some(0), "{}", words(&output));
    let trace = std::fs::read_to_string(folder.join("ops.jsonl")).unwrap();
    let cases = std::fs::read_dir(folder.join("run")).unwrap().count();
    assert_eq!(trace.lines().count(), cases + 1);

    let output = fathom(folder, &["replay", "run", "--json"]);
    assert_eq!(output.status.code(), Some(0), "{}", words(&output));
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    let ops = report["ops"].as_array().unwrap();
    let pass: u64 = ops.iter().map(|op| op["pass"].as_u64().unwrap()).sum();
    assert_eq!(pass as usize, cases);
    assert_eq!(report["failing"], Value::Array(Vec::new()));

    let output = fathom(folder, &["replay", "run", "--op", "rms_norm"]);
    assert_eq!(output.status.code(), Some(0), "{}", words(&output));
    assert!(words(&output).contains("agree in every bit"));
    // One bit of an input of the final norm: its output no longer follows.
    let norm = std::fs::read_dir(folder.join("run"))
        .unwrap()
        .map(|e| e.unwrap().path())
        .find(|p| p.to_string_lossy().ends_with("-head-F-rms_norm.safetensors"))
        .unwrap();
    let mut bytes = std::fs::read(&norm).unwrap();
    *bytes.last_mut().unwrap() ^= 0x01;
    std::fs::write(&norm, bytes).unwrap();
    let output = fathom(folder, &["replay", "run", "--op", "rms_norm"]);
    assert_eq!(output.status.code(), Some(1), "{}", words(&output));
    std::fs::write(&norm, b"no case").unwrap();
    let output = fathom(folder, &["replay", "run"]);
    assert_eq!(output.status.code(), Some(2), "{}", words(&output));
}

#[test]
fn a_recording_that_cannot_be_made_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    checkpoint(folder);
    let eval = ["eval", "--model", "model", "--tokens", "ids.json"];
    let cases: [(&[&str], &str); 3] = [
        (&["--record", "."], "empty or absent folder"),
        (&["--record", "run", "--record-op", "gem"], "unknown op 'gem'"),
        (&["--record-layer", "1"], "--record"),
    ];
    for (flags, expected) in cases {
        let output = fathom(folder, &[&eval[..], flags].concat());
        assert_eq!(output.status.code(), Some(2), "{}", words(&output));
        assert!(words(&output).contains(expected), "{}", words(&output));
    }
    let output = fathom(folder, &["replay", "run"]);
    assert_eq!(output.status.code(), Some(2), "{}", words(&output));
    let output = fathom(folder, &["replay", "model", "--backend", "abacus"]);
    assert_eq!(output.status.code(), Some(2));
    assert!(
        words(&output).contains("possible values: reference, cuda, emulated"),
        "{}",
        words(&output)
    );
}
