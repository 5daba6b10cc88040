//! `fathom train` from outside: killed at random moments, interrupted, resumed past damage, and
//! what its folder holds at the end.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

#[path = "train/processes.rs"]
mod processes;

/// Steps between two checkpoints.
const EVERY: u64 = 4;

/// A run of some milliseconds a step.
const RUN: &str = r#"
steps = 40
seq_len = 16
micro_batch = 2
grad_shards = 2

[model]
vocab_size = 320
hidden_size = 32
intermediate_size = 32
[model.attention]
kind = "mla"
q_lora_rank = 16
kv_lora_rank = 16
qk_nope_head_dim = 16
qk_rope_head_dim = 8
v_head_dim = 16
[model.moe]
intermediate_size = 32

[data]
fim_rate = 0.5
[data.tokenizer]
vocab_size = 270

[optim]
ema_decay = 0.9

[schedule]
batch = 4

[checkpoint]
every = 4
shard_bytes = 65536

[log]
sample_every = 10
sample_tokens = 4
"#;

struct Bench {
    folder: tempfile::TempDir,
}

impl Bench {
    fn new() -> Bench {
        let folder = tempfile::tempdir().unwrap();
        let text: String = (0..400).map(|i| format!("line {i} of {}\n", i * i % 97)).collect();
        fs::write(folder.path().join("text.txt"), text).unwrap();
        fs::write(folder.path().join("run.toml"), RUN).unwrap();
        Bench { folder }
    }

    fn out(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn command(&self, name: &str, more: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_fathom"));
        command.arg("train").arg("--config").arg(self.out("run.toml"));
        command.arg("--data").arg(self.out("text.txt")).arg("--out").arg(self.out(name));
        command.args(more).stdin(Stdio::null());
        command
    }

    /// The same command behind another that starts it.
    fn before(&self, mut starter: Command, name: &str, more: &[&str]) -> Command {
        let command = self.command(name, more);
        starter.arg(command.get_program()).args(command.get_args()).stdin(Stdio::null());
        starter
    }

    fn run(&self, name: &str, more: &[&str]) -> Output {
        let output = self.command(name, more).output().unwrap();
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{stderr}");
        output
    }

    fn spawn(&self, name: &str) -> Child {
        let mut command = self.command(name, &["--resume"]);
        command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap()
    }

    /// Refused as bad input; the message, and the folder is as it was before.
    fn refused(&self, name: &str, more: &[&str]) -> String {
        let mut command = Command::new(env!("CARGO_BIN_EXE_fathom"));
        command.arg("train").arg("--out").arg(self.out(name)).args(more);
        self.refuses(name, &mut command)
    }

    fn refuses(&self, name: &str, command: &mut Command) -> String {
        let folder = self.out(name);
        let look = || if folder.exists() { files(&folder) } else { BTreeMap::new() };
        let before = look();
        let output = command.stdin(Stdio::null()).output().unwrap();
        let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(2), "{stderr}");
        assert!(before == look(), "the folder changed: {stderr}");
        stderr
    }

    /// Steps of the checkpoints, ascending.
    fn checkpoints(&self, name: &str) -> Vec<u64> {
        let Ok(entries) = fs::read_dir(self.out(name).join("checkpoints")) else { return vec![] };
        let step = |e: fs::DirEntry| e.file_name().to_str()?.strip_prefix("step-")?.parse().ok();
        let mut steps: Vec<u64> = entries.flatten().filter_map(step).collect();
        steps.sort_unstable();
        steps
    }

    /// Lines of the log of these kinds, without what a clock says.
    fn lines(&self, name: &str, kinds: &[&str]) -> Vec<Value> {
        let text = fs::read_to_string(self.out(name).join("train.jsonl")).unwrap_or_default();
        let lines = text.lines().filter_map(|l| serde_json::from_str::<Value>(l).ok());
        let asked = |l: &Value| l["kind"].as_str().is_some_and(|kind| kinds.contains(&kind));
        let mut lines: Vec<Value> = lines.filter(asked).collect();
        for line in &mut lines {
            let line = line.as_object_mut().unwrap();
            for time in ["seconds", "tokens_per_second", "bubble_seconds", "exposed_seconds"] {
                line.remove(time);
            }
        }
        lines
    }

    fn steps(&self, name: &str) -> Vec<Value> {
        self.lines(name, &["step"])
    }
}

/// Every file under a folder.
fn files(folder: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut found = BTreeMap::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(next) = folders.pop() {
        for entry in fs::read_dir(&next).unwrap().flatten() {
            match entry.path() {
                path if path.is_dir() => folders.push(path),
                path => {
                    let bytes = fs::read(&path).unwrap();
                    found.insert(path.strip_prefix(folder).unwrap().to_owned(), bytes);
                }
            }
        }
    }
    found
}

fn assert_same_run(bench: &Bench, a: &str, b: &str) {
    assert_same_parts(bench, a, b, &["checkpoints", "model", "model-average"]);
}

fn assert_same_parts(bench: &Bench, a: &str, b: &str, parts: &[&str]) {
    for part in parts {
        let [a, b] = [a, b].map(|name| files(&bench.out(name).join(part)));
        assert!(!a.is_empty() && a.keys().eq(b.keys()), "{part}: {:?} {:?}", a.keys(), b.keys());
        for (path, bytes) in &a {
            assert!(*bytes == b[path], "{part}/{} differs", path.display());
        }
    }
    assert_eq!(bench.steps(a), bench.steps(b));
}

/// Logs that tell the same: losses, loads, validation, samples.
fn assert_same_lines(bench: &Bench, a: &str, b: &str) {
    let kinds = ["step", "validation", "sample", "diverged"];
    let [of_a, of_b] = [a, b].map(|name| bench.lines(name, &kinds));
    assert!(!of_a.is_empty());
    assert_eq!(of_a, of_b, "{a}, {b}");
}

/// Waits for the end, at most until `deadline`; `true` where it ended by itself.
fn wait(child: &mut Child, deadline: Instant) -> bool {
    while Instant::now() < deadline {
        if child.try_wait().unwrap().is_some() {
            return true;
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    false
}

/// Set FATHOM_KILLS to kill more often than in CI.
#[test]
fn a_run_killed_at_random_moments_ends_with_the_bits_of_one_left_alone() {
    let bench = Bench::new();
    let begin = Instant::now();
    bench.run("alone", &[]);
    let whole = begin.elapsed();
    assert_eq!(bench.checkpoints("alone"), [36, 40]);
    let kills: u32 = std::env::var("FATHOM_KILLS").map_or(8, |n| n.parse().unwrap());
    let mut random = 0x9E37_79B9_7F4A_7C15u64;
    let mut killed = 0;
    for _ in 0..kills {
        random = random.wrapping_mul(0x5851_F42D_4C95_7F2D).wrapping_add(0x1405_7B7E_F767_814F);
        // Anywhere in a run: at the start, in a step, in the writing of a checkpoint or the end.
        let after = whole.mul_f64((random >> 40) as f64 / (1u64 << 24) as f64);
        let mut child = bench.spawn("killed");
        let ended = wait(&mut child, Instant::now() + after);
        child.kill().unwrap();
        child.wait().unwrap();
        if ended {
            // It came through before it was killed: once more from the start.
            assert_same_run(&bench, "alone", "killed");
            fs::remove_dir_all(bench.out("killed")).unwrap();
            continue;
        }
        killed += 1;
        let last = bench.steps("killed").last().map_or(0, |l| l["step"].as_u64().unwrap());
        let newest = bench.checkpoints("killed").last().copied().unwrap_or(0);
        assert!(newest + EVERY >= last, "checkpoint {newest} after step {last}");
    }
    assert!(killed > 0, "no run was slow enough to be killed");
    // What a process leaves that is killed while it writes the model.
    let left = bench.out("killed").join("model/.writing-left");
    fs::create_dir_all(left.parent().unwrap()).unwrap();
    fs::write(left, "half a file").unwrap();
    bench.run("killed", &["--resume"]);
    assert_same_run(&bench, "alone", "killed");
}

/// Ranks as threads, killed and gone on with on another layout each time; layouts as `--set`s.
#[test]
fn a_run_on_ranks_ends_with_the_bits_of_one_process_whatever_kills_it() {
    let bench = Bench::new();
    bench.run("alone", &["--seed", "3"]);
    let layouts: [&[&str]; 4] = [
        &["--ranks", "4", "--set", "parallel.dp=2", "--set", "parallel.pp=2"],
        &["--set", "parallel.pp=1", "--set", "parallel.dp=2"],
        &[
            "--set",
            "parallel.pp=2",
            "--set",
            "parallel.dp=1",
            "--set",
            "parallel.schedule=\"zb1p\"",
        ],
        &["--set", "parallel.pp=1", "--set", "parallel.dp=1"],
    ];
    let begin = Instant::now();
    let output = bench.run("left", &[&["--seed", "3"], layouts[0]].concat());
    let whole = begin.elapsed();
    assert!(String::from_utf8_lossy(&output.stdout).contains("trained 40 steps"));
    assert_same_parts(&bench, "alone", "left", &["model", "model-average"]);
    let mut killed = 0;
    for (i, part) in [0.4, 0.5, 0.45].into_iter().enumerate() {
        let mut command = bench.command("killed", &["--seed", "3", "--resume"]);
        command.args(layouts[i]).stdout(Stdio::null()).stderr(Stdio::null());
        let mut child = command.spawn().unwrap();
        killed += u32::from(!wait(&mut child, Instant::now() + whole.mul_f64(part)));
        child.kill().unwrap();
        child.wait().unwrap();
    }
    assert!(killed > 0, "no run was slow enough to be killed");
    bench.run("killed", &[&["--seed", "3", "--resume"], layouts[3]].concat());
    assert_same_parts(&bench, "alone", "killed", &["model", "model-average"]);
    // What does not fit is refused with the numbers, and nothing is begun.
    let message = bench.refused("none", &["--ranks", "3"]);
    assert!(message.contains("--ranks 3: expected 1, the ranks of the layout"), "{message}");
    let message = bench.refused("none", &["--set", "parallel.dp=3"]);
    assert!(message.contains("grad_shards: expected a multiple of 3"), "{message}");
}

#[test]
fn an_interrupt_writes_a_checkpoint_and_a_resumed_run_goes_on_past_damage() {
    let bench = Bench::new();
    bench.run("alone", &[]);
    let mut child = bench.command("stopped", &["--json"]).stdout(Stdio::piped()).spawn().unwrap();
    while bench.steps("stopped").len() < 6 {
        std::thread::sleep(Duration::from_millis(2));
        assert!(child.try_wait().unwrap().is_none(), "it ended before it was interrupted");
    }
    let id = child.id().to_string();
    assert!(Command::new("kill").args(["-INT", &id]).status().unwrap().success());
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success());
    let summary: Value = serde_json::from_slice(&output.stdout).unwrap();
    let (steps, newest) = (summary["steps"].as_u64().unwrap(), bench.checkpoints("stopped"));
    assert_eq!(summary["stopped"], true);
    assert_eq!((newest.len(), newest.last()), (2, Some(&steps)));
    // The folder is not begun anew by mistake.
    let refused = bench.command("stopped", &[]).output().unwrap();
    assert_eq!(refused.status.code(), Some(2));
    let message = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(message.contains("--resume"), "{message}");
    // A byte of the newest checkpoint turns over.
    let damaged = bench.out("stopped").join(format!("checkpoints/step-{steps:08}"));
    let file = files(&damaged).into_keys().find(|p| p.extension().is_some_and(|e| e != "json"));
    let file = damaged.join(file.unwrap());
    let mut bytes = fs::read(&file).unwrap();
    *bytes.last_mut().unwrap() ^= 0x10;
    fs::write(&file, bytes).unwrap();
    let output = bench.run("stopped", &["--resume", "--json"]);
    let warning = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(warning.contains("is not used") && warning.contains("blake3"), "{warning}");
    let summary: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(summary["resumed_from"].as_u64(), Some(newest[0]));
    assert_eq!(summary["steps"], 40);
    assert_same_run(&bench, "alone", "stopped");
    // What it exports is read by eval.
    let model = bench.out("stopped").join("model");
    let tokens = bench.out("ids.json");
    fs::write(&tokens, "[[1, 2, 3, 4]]").unwrap();
    let mut eval = Command::new(env!("CARGO_BIN_EXE_fathom"));
    eval.arg("eval").arg("--model").arg(&model).arg("--tokens").arg(&tokens).arg("--json");
    let output = eval.output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert!(model.join("tokenizer.json").is_file());
}

/// Killed before its first checkpoint, a run goes on as itself: not as the default preset, not with
/// other values, and not twice at once.
#[test]
fn a_resumed_run_is_the_folders_own() {
    let bench = Bench::new();
    bench.run("alone", &["--steps", "8", "--set", "checkpoint.every=0"]);
    let message = bench.refused("nothing", &["--resume"]);
    assert!(message.contains("expected a run to go on with (run.toml)"), "{message}");

    let never = ["--steps", "8", "--set", "checkpoint.every=0"];
    let mut child = bench.command("killed", &never).stderr(Stdio::null()).spawn().unwrap();
    while bench.steps("killed").is_empty() {
        std::thread::sleep(Duration::from_millis(2));
    }
    // Stopped, it still holds the folder.
    let stop = Command::new("kill").args(["-STOP", &child.id().to_string()]).status().unwrap();
    assert!(stop.success());
    let message = bench.refused("killed", &["--resume"]);
    let holder = format!("process {}", child.id());
    assert!(message.contains("another run is in this folder") && message.contains(&holder));
    child.kill().unwrap();
    child.wait().unwrap();
    assert_eq!(bench.checkpoints("killed"), [0u64; 0], "it was to be killed before");

    let message = bench.refuses("killed", &mut bench.command("killed", &never));
    assert!(message.contains("no checkpoint yet") && message.contains("--resume"), "{message}");
    let more = ["--resume", "--steps", "9", "--precision", "bf16"];
    let message = bench.refused("killed", &more);
    for part in ["steps is 8 there and 9", "recipe.mode is \"fp8\" there and \"bf16\"", "run.toml"]
    {
        assert!(message.contains(part), "{message}");
    }
    let mut resume = Command::new(env!("CARGO_BIN_EXE_fathom"));
    resume.arg("train").arg("--resume").arg("--out").arg(bench.out("killed"));
    let output = resume.output().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{stderr}");
    assert!(stderr.contains(&format!("the lock of {holder}")), "{stderr}");
    assert_same_run(&bench, "alone", "killed");
}

#[test]
fn without_a_whole_checkpoint_nothing_is_begun_anew() {
    let bench = Bench::new();
    bench.run("run", &[]);
    let checkpoints = bench.out("run").join("checkpoints");
    for step in ["step-00000036", "step-00000040"] {
        fs::write(checkpoints.join(step).join("checkpoint.json"), "{}").unwrap();
    }
    let message = bench.refused("run", &["--resume"]);
    for part in ["found 2 damaged", "step-00000036", "step-00000040"] {
        assert!(message.contains(part), "{message}");
    }
}

/// `timeout` signals a process and its group within microseconds.
#[test]
fn two_signals_of_one_request_are_one() {
    let bench = Bench::new();
    let more = ["--steps", "4000", "--set", "checkpoint.every=0"];
    let mut child = bench.command("stopped", &more).stderr(Stdio::null()).spawn().unwrap();
    while bench.steps("stopped").len() < 2 {
        std::thread::sleep(Duration::from_millis(2));
    }
    let id = child.id().to_string();
    let both = format!("kill -TERM {id}; kill -TERM {id}; kill -INT {id}");
    assert!(Command::new("sh").args(["-c", &both]).status().unwrap().success());
    assert_eq!(child.wait().unwrap().code(), Some(0));
    assert_eq!(bench.checkpoints("stopped").len(), 1);
}

/// The loss on what is held out is measured on the same sequences in every run, is logged, and
/// changes nothing of the training.
#[test]
fn validation_changes_no_bit_of_the_run() {
    let bench = Bench::new();
    let held = bench.out("held.txt");
    fs::write(&held, "line 7 of 49\nline 8 of 64\n".repeat(30)).unwrap();
    bench.run("alone", &[]);
    let validate = ["--validate", held.to_str().unwrap(), "--set", "data.validation.every=15"];
    let output = bench.run("measured", &[&validate[..], &["--json"]].concat());
    let summary: Value = serde_json::from_slice(&output.stdout).unwrap();
    let text = fs::read_to_string(bench.out("measured").join("train.jsonl")).unwrap();
    let lines = text.lines().map(|l| serde_json::from_str::<Value>(l).unwrap());
    let lines: Vec<Value> = lines.filter(|l| l["kind"] == "validation").collect();
    assert_eq!(lines.iter().map(|l| l["step"].as_u64().unwrap()).collect::<Vec<_>>(), [15, 30, 40]);
    let losses: Vec<f64> = lines.iter().map(|l| l["loss"].as_f64().unwrap()).collect();
    assert!(losses[2] < losses[0], "{losses:?}");
    assert_eq!(summary["validation_loss"].as_f64(), Some(losses[2]));
    let [alone, measured] = ["alone", "measured"].map(|name| files(&bench.out(name).join("model")));
    assert!(alone == measured, "the model differs");
    assert_eq!(bench.steps("alone"), bench.steps("measured"));
}

/// A grid of two keys and two seeds, stopped in its midst: the same command goes on, and the table
/// is that of a sweep left alone.
#[test]
fn a_sweep_goes_on_where_it_stopped() {
    let bench = Bench::new();
    let sweep = |name: &str, steps: &str| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_fathom"));
        command.arg("sweep").arg("--config").arg(bench.out("run.toml"));
        command.arg("--data").arg(bench.out("text.txt")).arg("--out").arg(bench.out(name));
        command.args(["--grid", "schedule.learning_rate=1e-3,1e-2", "--grid", "optim.clip=0,1"]);
        command.args(["--seeds", "1,2", "--json", "--steps", steps]).stdin(Stdio::null());
        command
    };
    let whole = sweep("whole", "12").output().unwrap();
    assert!(whole.status.success(), "{}", String::from_utf8_lossy(&whole.stderr));
    let table: Value = serde_json::from_slice(&whole.stdout).unwrap();
    let rows = table["rows"].as_array().unwrap();
    assert_eq!((rows.len(), rows[0]["seeds"].as_array().unwrap().len()), (4, 2));
    let score = |row: &Value| row["loss"]["mean"].as_f64().unwrap();
    let best = rows.iter().map(score).fold(f64::INFINITY, f64::min);
    assert_eq!(score(&table["best"]), best);
    let picture = fs::read_to_string(bench.out("whole").join("sweep.svg")).unwrap();
    assert_eq!((picture.matches("<polyline").count(), picture.matches("<circle").count()), (2, 4));

    let mut child = sweep("stopped", "12").stdout(Stdio::null()).spawn().unwrap();
    while !bench.out("stopped").join("learning_rate=1e-3_clip=1_seed=1").exists() {
        std::thread::sleep(Duration::from_millis(2));
    }
    child.kill().unwrap();
    child.wait().unwrap();
    let again = sweep("stopped", "12").output().unwrap();
    assert!(again.status.success(), "{}", String::from_utf8_lossy(&again.stderr));
    assert_eq!(serde_json::from_slice::<Value>(&again.stdout).unwrap(), table);
    // Other steps are another sweep.
    let message = bench.refuses("stopped", sweep("stopped", "13").stdout(Stdio::null()));
    assert!(message.contains("steps is 12 there and 13"), "{message}");
}

#[test]
fn bad_input_names_its_place_and_leaves_nothing() {
    let bench = Bench::new();
    let run = |more: &[&str]| {
        let output = bench.command("bad", more).output().unwrap();
        assert_eq!(output.status.code(), Some(2));
        assert!(!bench.out("bad").exists(), "a folder is left");
        String::from_utf8_lossy(&output.stderr).into_owned()
    };
    let message = run(&["--set", "optim.weight_decya=1"]);
    assert!(message.contains("did you mean `weight_decay`?"), "{message}");
    let message = run(&["--precision", "fp9"]);
    assert!(
        message.contains("recipe.mode") && message.contains("did you mean 'fp8'?"),
        "{message}"
    );
    let message = run(&["--set", "model.vocab_size=100"]);
    assert!(message.contains("model.vocab_size: expected at least 270"), "{message}");
    for (set, part) in [
        ("schedule.batch=5", "expected a multiple of grad_shards = 2"),
        ("schedule.batch=0", "expected a multiple of grad_shards = 2"),
        ("grad_shards=256", "grad_shards = 256"),
        ("schedule.learning_rate=-1", "schedule.learning_rate: expected >= 0, found -1"),
        ("schedule.mtp_lambda=-3", "schedule.mtp_lambda: expected >= 0, found -3"),
        ("tokens=-5", "tokens: expected above 0, found -5"),
        ("optim.clip=nan", "expected a finite number, found NaN"),
        ("data.validation.share=1.5", "data.validation.share: expected 0 to below 1, found 1.5"),
        ("data.validation.share=1e-9", "raise data.validation.share"),
    ] {
        let message = run(&["--set", set]);
        assert!(message.contains(part), "{set}: {message}");
    }
    fs::write(bench.out("run.toml"), "steps = 3\n\n[optim]\nclipp = 1\n").unwrap();
    let message = run(&[]);
    assert!(message.contains("run.toml:4: optim.clipp: unknown field"), "{message}");
    // What a complete file lacks is told at once, with the line.
    let text = "preset = \"none\"\nname = \"a\"\nsteps = 3\n[schedule]\nlearning_rate = 1e-3\n";
    fs::write(bench.out("run.toml"), text).unwrap();
    let message = run(&[]);
    for key in ["seed", "seq_len", "micro_batch", "grad_shards", "schedule.batch", "vocab_size"] {
        assert!(message.contains(key), "{key}: {message}");
    }
}

/// Sections that the program's own complete files also have do not make a file complete.
#[test]
fn a_file_without_preset_stands_on_tiny() {
    let bench = Bench::new();
    let text = "name = \"a\"\nseed = 3\nsteps = 1\n[model]\npreset = \"small\"\nvocab_size = 1024\n\
        [recipe]\nmode = \"fp32\"\n[schedule]\nlearning_rate = 1e-3\nbatch = 4\n";
    fs::write(bench.out("run.toml"), text).unwrap();
    bench.run("run", &["--set", "seq_len=16", "--set", "log.sample_every=0"]);
    assert_eq!(bench.checkpoints("run"), [1]);
}
