//! `--backend emulated` as a user runs it: whole training steps in our CUDA kernels, without a GPU,
//! write the checkpoint that the reference writes, also where a run changes its backend halfway;
//! what is generated, evaluated and replayed has the reference's bits. Skipped, aloud, where NVRTC
//! is not to be had.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

#[path = "backends/nccl.rs"]
mod nccl;
#[path = "backends/peer.rs"]
mod peer;
#[path = "backends/ranks.rs"]
mod ranks;

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

/// Grouped queries without experts: as many key heads as divide the query heads.
const GROUPED: &str = r#"
preset = "none"
name = "grouped"
seed = 3
steps = 2
seq_len = 23
micro_batch = 1
grad_shards = 1

[model]
vocab_size = 301
hidden_size = 60
intermediate_size = 43
layers = 2
heads = 4
tie_word_embeddings = true
[model.attention]
kind = "gqa"
kv_heads = 2
head_dim = 24
[model.rope]
theta = 10000.0
interleaved = false

[recipe]
mode = "fp8"
[data.tokenizer]
vocab_size = 300
[optim]
moments = "fp32"
clip = 0.0
ema_decay = 0.0
[schedule]
learning_rate = 1e-3
batch = 2
[checkpoint]
export = false
"#;

/// A router as V2's: softmax, a loss over devices, tokens beyond a device's room dropped; queries
/// without a latent; experts of every micro-batch in one call.
const DROPPING: &str = r#"
steps = 2
seq_len = 32
micro_batch = 2
grad_shards = 2
expert_union = 2

[model]
vocab_size = 333
hidden_size = 100
intermediate_size = 75
layers = 2
heads = 3
mtp_depth = 0
[model.attention]
kind = "mla"
q_lora_rank = 0
kv_lora_rank = 40
qk_nope_head_dim = 24
qk_rope_head_dim = 8
v_head_dim = 32
[model.moe]
n_routed_experts = 6
n_shared_experts = 2
top_k = 3
intermediate_size = 40
n_group = 1
topk_group = 1
group_top = 1
normalize = false
score = "softmax"
first_dense = 1

[data.tokenizer]
vocab_size = 300
[schedule]
batch = 4
balance_loss = 1e-2
balance_kind = { device = { devices = 2 } }
capacity = { devices = 2, factor = 0.75 }
[checkpoint]
export = false
"#;

/// What a command comes to that must succeed.
fn fathom(args: &[&str]) -> Output {
    let output = Command::new(env!("CARGO_BIN_EXE_fathom")).args(args).output().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(0), "{args:?}: {stderr}");
    output
}

/// The same with `--json`.
fn answer(args: &[&str]) -> Value {
    serde_json::from_slice(&fathom(&[args, &["--json"]].concat()).stdout).unwrap()
}

fn command(folder: &Path, run: &str, out: &str, flags: &[&str]) -> Command {
    let file = folder.join("run.toml");
    fs::write(&file, run).unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_fathom"));
    command.args(["train", "--json", "--config"]).arg(&file).arg("--out").arg(folder.join(out));
    command.args(flags);
    command
}

fn train(folder: &Path, run: &str, out: &str, flags: &[&str]) -> Output {
    command(folder, run, out, flags).output().unwrap()
}

/// Every file of the run's checkpoints and of its model, by path.
fn saved(run: &Path) -> BTreeMap<String, Vec<u8>> {
    let mut files = BTreeMap::new();
    let parts = ["checkpoints", "model"].map(|part| run.join(part));
    let mut folders: Vec<_> = parts.into_iter().filter(|part| part.is_dir()).collect();
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

/// Two steps on both backends; gives how often a step on the emulated one waited for the device.
fn assert_the_same_bits(run: &str, mode: &str) -> Option<u64> {
    fathom_gpu::nvrtc::find_or_fetch_for_tests()?;
    let folder = tempfile::tempdir().unwrap();
    let precision = ["--precision", mode];
    let mut waits = None;
    for (out, flags) in [
        ("reference", &[][..]),
        ("emulated", &["--backend", "emulated"]),
        ("other", &["--seed", "9"]),
    ] {
        let output = train(folder.path(), run, out, &[&precision, flags].concat());
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(0), "{mode} {out}: {stderr}");
        let summary: Value = serde_json::from_slice(&output.stdout).unwrap();
        waits = waits.or(summary["waits_per_step"].as_u64());
        assert_eq!(summary["waits_per_step"].is_u64(), out == "emulated", "{summary}");
    }
    let [reference, emulated, other] =
        ["reference", "emulated", "other"].map(|out| folder.path().join(out));
    assert_eq!(steps(&reference).len(), 2);
    assert_eq!(steps(&reference), steps(&emulated), "{mode}");
    assert_the_same_files(&reference, &emulated);
    assert!(saved(&reference) != saved(&other), "another seed gives other bits");
    waits
}

fn assert_the_same_files(a: &Path, b: &Path) {
    let (expected, found) = (saved(a), saved(b));
    assert!(expected.len() > 1, "{:?}", expected.keys());
    assert_eq!(expected.keys().collect::<Vec<_>>(), found.keys().collect::<Vec<_>>());
    let differing = expected.iter().filter(|(name, bytes)| found[*name] != **bytes);
    let names: Vec<_> = differing.map(|(name, _)| name).collect();
    assert!(names.is_empty(), "{}: files that differ: {names:?}", b.display());
}

#[test]
fn two_steps_in_fp32_give_the_references_bits() {
    assert_the_same_bits(RUN, "fp32");
}

#[test]
fn two_steps_in_bf16_give_the_references_bits() {
    assert_the_same_bits(RUN, "bf16");
}

#[test]
fn two_steps_in_fp8_give_the_references_bits() {
    assert_the_same_bits(RUN, "fp8");
}

/// The host waits for a loss a micro-batch and for the norm of the gradient, and for nothing else.
#[test]
fn grouped_queries_without_experts_give_the_references_bits() {
    if let Some(waits) = assert_the_same_bits(GROUPED, "fp8") {
        assert_eq!(waits, 2 + 1);
    }
}

#[test]
fn a_run_that_does_not_fit_says_what_holds_the_memory_and_what_to_do() {
    if fathom_gpu::nvrtc::find_or_fetch_for_tests().is_none() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let flags = ["--backend", "emulated", "--device-memory", "1200000"];
    let output = train(folder.path(), GROUPED, "run", &flags);
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{stderr}");
    for part in ["no room on the device for ", " are held (", " by ", "and 1200000 are there; make"]
    {
        assert!(stderr.contains(part), "no '{part}' in {stderr}");
    }
}

/// A run compiles its kernels before it begins: it writes its folder when the last of them lies in
/// the cache.
#[test]
fn kernels_are_compiled_before_the_first_step() {
    let Some(nvrtc) = fathom_gpu::nvrtc::find_or_fetch_for_tests() else { return };
    let folder = tempfile::tempdir().unwrap();
    let cache = folder.path().join("cache");
    let mut command =
        command(folder.path(), GROUPED, "run", &["--backend", "emulated", "--steps", "1"]);
    command.env("FATHOM_CACHE", &cache).env("FATHOM_NVRTC", nvrtc.library.parent().unwrap());
    let output = command.output().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{stderr}");
    let files = fs::read_dir(cache.join("kernels")).unwrap().map(Result::unwrap);
    let written = |file: fs::DirEntry| file.metadata().unwrap().modified().unwrap();
    let last = files.map(written).max().expect("some kernels");
    let begun = fs::metadata(folder.path().join("run/run.toml")).unwrap().modified().unwrap();
    assert!(last <= begun, "a kernel was compiled after the run had begun: {last:?}, {begun:?}");
}

#[test]
fn dropped_tokens_and_losses_of_devices_give_the_references_bits() {
    assert_the_same_bits(DROPPING, "bf16");
}

/// Waits until the run has done `steps` steps, or has ended.
fn wait(child: &mut Child, run: &Path, steps_done: usize) {
    let deadline = Instant::now() + Duration::from_secs(240);
    let done = || run.join("train.jsonl").exists() && steps(run).len() >= steps_done;
    while !done() && child.try_wait().unwrap().is_none() {
        assert!(Instant::now() < deadline, "no {steps_done} steps of {}", run.display());
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// A run goes from one backend to the other, stopped by a signal and killed, in both directions,
/// and ends with the bits of one that was left alone on the reference.
#[test]
fn a_run_that_changes_its_backend_goes_on_to_the_bit() {
    if fathom_gpu::nvrtc::find_or_fetch_for_tests().is_none() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    let keep = "checkpoint={every=1,keep=9}";
    let flags = ["--steps", "5", "--precision", "fp8", "--set", keep];
    let on = |out: &str, more: &[&str]| command(folder, RUN, out, &[&flags, more].concat());
    let done = |mut command: Command| {
        let output = command.output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    };
    let emulated = ["--backend", "emulated", "--resume"];
    let [alone, there, back] = ["alone", "there", "back"].map(|out| folder.join(out));
    done(on("alone", &[]));

    // Stopped by a signal to the one process that was started.
    let mut child = on("there", &emulated).stdout(Stdio::piped()).spawn().unwrap();
    wait(&mut child, &there, 1);
    let id = child.id().to_string();
    assert!(Command::new("kill").args(["-TERM", &id]).status().unwrap().success());
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(0));
    let summary: Value = serde_json::from_slice(&output.stdout).unwrap();
    let stopped = summary["steps"].as_u64().unwrap();
    assert!(summary["stopped"] == true && (1..4).contains(&stopped), "{summary}");
    let newest = there.join(format!("checkpoints/step-{stopped:08}"));
    assert!(newest.is_dir(), "{}", newest.display());

    // Killed: nobody is left who holds the folder, and the reference goes on in it.
    let mut child = on("there", &emulated).stdout(Stdio::null()).spawn().unwrap();
    wait(&mut child, &there, stopped as usize + 1);
    assert_eq!(child.try_wait().unwrap(), None, "it ended before it was killed");
    child.kill().unwrap();
    child.wait().unwrap();
    done(on("there", &["--resume"]));

    // From the reference's fourth step on, as if it had been killed there.
    done(on("back", &[]));
    fs::remove_dir_all(back.join("checkpoints/step-00000005")).unwrap();
    fs::remove_dir_all(back.join("model")).unwrap();
    done(on("back", &emulated));

    for crossed in [there, back] {
        assert_eq!(steps(&alone), steps(&crossed));
        assert_the_same_files(&alone, &crossed);
    }
}

/// A run that begins with fused ops and goes on without them on the other backend ends with the
/// bits of one that never had them.
#[test]
fn a_run_goes_on_without_the_fused_ops_that_it_began_with() {
    if fathom_gpu::nvrtc::find_or_fetch_for_tests().is_none() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    let run = |out: &str, set: &str, more: &[&str]| {
        let keep = ["--set", "checkpoint={every=1,keep=9}", "--set", set];
        let flags = ["--steps", "3", "--precision", "fp8"];
        let output = train(folder, RUN, out, &[&flags[..], &keep, more].concat());
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    };
    let (apart, fused) = ("recipe.fused=false", "recipe.fused=true");
    run("alone", apart, &[]);
    let emulated = ["--backend", "emulated"];
    let there = ("there", &emulated[..], &["--resume"][..]);
    let back = ("back", &[][..], &["--backend", "emulated", "--resume"][..]);
    for (out, first, second) in [there, back] {
        // From its second step on, as if it had been killed there.
        run(out, fused, first);
        let path = folder.join(out);
        fs::remove_dir_all(path.join("checkpoints/step-00000003")).unwrap();
        fs::remove_dir_all(path.join("model")).unwrap();
        run(out, apart, second);
        assert_eq!(steps(&folder.join("alone")), steps(&path));
        assert_the_same_files(&folder.join("alone"), &path);
    }
}

/// A model that the reference has trained: text with and without drafts, losses, and the recorded
/// ops of a step are the same on the emulated driver.
#[test]
fn text_losses_and_recorded_steps_are_the_references() {
    if fathom_gpu::nvrtc::find_or_fetch_for_tests().is_none() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).display().to_string();
    let record = ["--record", &path("recorded"), "--record-step", "2", "--precision", "fp8"];
    let output = train(folder.path(), RUN, "run", &record);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));

    let model = path("run/model");
    let prompt = ["--model", &model, "--prompt", "The cache", "--tokens", "6", "--ignore-eos"];
    let text = |flags: &[&str]| {
        let said = answer(&[&["generate"], &prompt[..], flags].concat());
        (said["tokens"].clone(), said["drafted"].as_u64().unwrap())
    };
    let (expected, _) = text(&["--precision", "bf16"]);
    assert_eq!(expected.as_array().unwrap().len(), 6);
    let emulated = ["--precision", "bf16", "--backend", "emulated"];
    assert_eq!(text(&emulated), (expected.clone(), 0));
    let (tokens, drafted) = text(&[&emulated[..], &["--speculative"]].concat());
    assert_eq!(tokens, expected);
    assert!(drafted > 0);

    fs::write(path("ids.json"), "[[5, 17, 2, 101, 30], [9, 1, 40]]").unwrap();
    let ids = path("ids.json");
    let evaluated = |name: &str, flags: &[&str]| {
        let save = path(name);
        let command = ["eval", "--model", &model, "--tokens", &ids, "--grads", "--save", &save];
        let said = answer(&[&command[..], &["--precision", "fp8"], flags].concat());
        (said, fs::read(&save).unwrap())
    };
    let expected = evaluated("a.safetensors", &[]);
    assert!(expected == evaluated("b.safetensors", &["--backend", "emulated"]), "eval differs");

    let replayed = answer(&["replay", &path("recorded"), "--backend", "emulated"]);
    assert_eq!(replayed["failing"], Value::Array(Vec::new()));
    let ops = replayed["ops"].as_array().unwrap();
    assert!(ops.len() > 25, "{replayed:#}");
    for op in ops {
        assert_eq!(op["pass"], op["cases"], "{op:#}");
        assert_eq!((&op["mismatches"], &op["unsupported"]), (&0.into(), &0.into()), "{op:#}");
    }
}

/// Mode f64 stands outside the contract, and kernels know nothing of it.
#[test]
fn a_run_that_kernels_do_not_cover_is_refused_before_it_begins() {
    if fathom_gpu::nvrtc::find_or_fetch_for_tests().is_none() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let flags = ["--backend", "emulated", "--precision", "f64"];
    let output = train(folder.path(), RUN, "run", &flags);
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{stderr}");
    for part in ["do not cover", "adamw: w is F64, and kernels compute in F32", "calls a step"] {
        assert!(stderr.contains(part), "no '{part}' in {stderr}");
    }
    assert!(!folder.path().join("run").exists(), "nothing was begun");
}
