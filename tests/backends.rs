//! `--backend emulated` as a user runs it: whole training steps in our CUDA kernels, without a GPU,
//! write the checkpoint that the reference writes. Skipped, aloud, where NVRTC is not to be had.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::{Command, Output};

use serde_json::Value;

/// Latent attention, a dense and a routed layer, an MTP module; sizes that no tile divides.
const RUN: &str = r#"
steps = 2
seq_len = 32
micro_batch = 2
grad_shards = 2

[model]
vocab_size = 320
hidden_size = 72
intermediate_size = 40
layers = 2
heads = 2
mtp_depth = 1
[model.attention]
kind = "mla"
q_lora_rank = 24
kv_lora_rank = 32
qk_nope_head_dim = 16
qk_rope_head_dim = 16
v_head_dim = 16
[model.moe]
n_routed_experts = 4
top_k = 2
intermediate_size = 24
n_group = 2
topk_group = 1
group_top = 2
first_dense = 1

[data]
fim_rate = 0.5
[data.tokenizer]
vocab_size = 300
"#;

fn train(folder: &Path, out: &str, flags: &[&str]) -> Output {
    let file = folder.join("run.toml");
    fs::write(&file, RUN).unwrap();
    let command = ["train", "--json", "--config", file.to_str().unwrap(), "--out"];
    let out = folder.join(out);
    Command::new(env!("CARGO_BIN_EXE_fathom")).args(command).arg(&out).args(flags).output().unwrap()
}

/// Every file of the run's checkpoints and of its model, by path.
fn saved(run: &Path) -> BTreeMap<String, Vec<u8>> {
    let mut files = BTreeMap::new();
    let mut folders = vec![run.join("checkpoints"), run.join("model")];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).unwrap() {
            let path = entry.unwrap().path();
            match path.is_dir() {
                true => folders.push(path),
                false => {
                    let name = path.strip_prefix(run).unwrap().display().to_string();
                    files.insert(name, fs::read(&path).unwrap());
                }
            }
        }
    }
    files
}

/// What each step reported, without its times.
fn steps(run: &Path) -> Vec<Value> {
    let text = fs::read_to_string(run.join("train.jsonl")).unwrap();
    let lines = text.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
    let timeless = |mut line: Value| {
        let step = line.as_object_mut().unwrap();
        for key in ["seconds", "tokens_per_second"] {
            step.remove(key);
        }
        line
    };
    lines.filter(|line| line.get("gradient_norm").is_some()).map(timeless).collect()
}

fn assert_the_same_bits(mode: &str) {
    if fathom_gpu::nvrtc::find_or_fetch_for_tests().is_none() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let precision = ["--precision", mode];
    for (out, flags) in [
        ("reference", &[][..]),
        ("emulated", &["--backend", "emulated"]),
        ("other", &["--seed", "9"]),
    ] {
        let output = train(folder.path(), out, &[&precision, flags].concat());
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(0), "{mode} {out}: {stderr}");
    }
    let [reference, emulated, other] =
        ["reference", "emulated", "other"].map(|out| folder.path().join(out));
    assert_eq!(steps(&reference).len(), 2);
    assert_eq!(steps(&reference), steps(&emulated), "{mode}");
    let (expected, found) = (saved(&reference), saved(&emulated));
    assert!(expected.len() > 4, "{:?}", expected.keys());
    assert_eq!(expected.keys().collect::<Vec<_>>(), found.keys().collect::<Vec<_>>());
    let differing: Vec<_> =
        expected.iter().filter(|(name, bytes)| found[*name] != **bytes).collect();
    let names: Vec<_> = differing.iter().map(|(name, _)| name).collect();
    assert!(names.is_empty(), "{mode}: files that differ: {names:?}");
    assert_ne!(expected, saved(&other), "another seed gives other bits");
}

#[test]
fn two_steps_in_fp32_give_the_references_bits() {
    assert_the_same_bits("fp32");
}

#[test]
fn two_steps_in_bf16_give_the_references_bits() {
    assert_the_same_bits("bf16");
}

#[test]
fn two_steps_in_fp8_give_the_references_bits() {
    assert_the_same_bits("fp8");
}

/// Mode f64 stands outside the contract, and kernels know nothing of it.
#[test]
fn a_run_that_kernels_do_not_cover_is_refused_before_it_begins() {
    if fathom_gpu::nvrtc::find_or_fetch_for_tests().is_none() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let flags = ["--backend", "emulated", "--precision", "f64"];
    let output = train(folder.path(), "run", &flags);
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{stderr}");
    for part in ["do not cover", "adamw: w is F64, and kernels compute in F32", "calls a step"] {
        assert!(stderr.contains(part), "no '{part}' in {stderr}");
    }
    assert!(!folder.path().join("run").exists(), "nothing was begun");
}
