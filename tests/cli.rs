//! What holds for every subcommand: help, usage errors, readers that leave early.

use std::process::{Command, Output, Stdio};

fn fathom(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_fathom")).args(args).output().unwrap()
}

/// The subcommands that the help lists.
fn subcommands() -> Vec<String> {
    let help = String::from_utf8(fathom(&["--help"]).stdout).unwrap();
    let list = help.split("Commands:").nth(1).unwrap().split("Options:").next().unwrap();
    let names = list.lines().filter(|l| l.starts_with("  ") && !l.starts_with("   "));
    let names: Vec<_> = names
        .map(|l| l.split_whitespace().next().unwrap().to_owned())
        .filter(|n| n != "help")
        .collect();
    assert!(names.len() > 5, "{help}");
    names
}

#[test]
fn every_subcommand_has_help_and_refuses_unknown_flags_with_2() {
    for name in subcommands() {
        let help = fathom(&[&name, "--help"]);
        assert!(help.status.success(), "{name}");
        let text = String::from_utf8(help.stdout).unwrap();
        assert!(text.contains("Usage:"), "{name}: {text}");
        let unknown = fathom(&[&name, "--no-such-flag"]);
        assert_eq!(unknown.status.code(), Some(2), "{name}");
        assert!(unknown.stdout.is_empty(), "{name}");
    }
}

#[test]
fn a_reader_that_leaves_early_is_no_error() {
    // The stream of a large schedule is far longer than a pipe holds.
    let args = "simulate schedule --kind dualpipe --stages 16 --micro-batches 512 --json";
    let mut child = Command::new(env!("CARGO_BIN_EXE_fathom"))
        .args(args.split(' '))
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();
    assert_eq!(String::from_utf8_lossy(&output.stderr), "");
}

/// Wrong files, values and flags of `simulate` and `search`: exit code 2, one message that says
/// what is allowed, nothing on stdout.
#[test]
fn the_simulator_refuses_bad_input_with_2_and_a_reason() {
    let v3 = "--preset deepseek-v3-h800-2048 --json --set";
    for (args, part) in [
        ("simulate /no/such.toml".into(), "/no/such.toml: No such file"),
        ("simulate /".into(), "/: expected a file, found a folder"),
        ("simulate --preset deepseek-v3-h80-2048".into(), "did you mean 'deepseek-v3-h800-2048'?"),
        (format!("simulate {v3} parallel.ppp=4"), "did you mean `pp`?"),
        ("simulate serve --preset deepseek-v3".into(), "deepseek-v3-online-h800"),
        ("simulate serve /no/such.toml".into(), "/no/such.toml: No such file"),
        (
            "simulate serve --preset deepseek-v3-online-h800 --set decode.gpu=8".into(),
            "unknown field `gpu`",
        ),
        (
            "simulate serve --preset deepseek-v3-online-h800 --set decode.ep=3 --json".into(),
            "decode.ep: expected 1 or all 144 gpus of a unit, found 3",
        ),
        (
            "simulate serve --preset deepseek-v3-online-h800 --plan 0".into(),
            "--plan: expected 0.001 to 1e6 requests a second",
        ),
        (format!("simulate {v3} training.total_tokens=nan"), "expected a finite number, found NaN"),
        (format!("simulate {v3} parallel.ep=48"), "ep 48 does not divide the 256 routed experts"),
        (format!("simulate {v3} model.n_layers=0"), "model.layers: expected at least 1, found 0"),
        (format!("simulate {v3} reliability.gpu_mtbf_hours=0.001"), "the run would never end"),
        (format!("search {v3} search.pp=[0]"), "is legal"),
        (format!("search {v3} search.memory_limit_gb=-1"), "expected 0.0 to 1000000000.0"),
        (format!("simulate {v3} stack.preset=megatron"), "did you mean 'megatron-core'?"),
        (format!("simulate {v3} stack.launch_us=-1"), "stack.launch_us: expected 0.0 to"),
        (format!("simulate {v3} stack.graphs=some"), "unknown variant `some`"),
        ("simulate compare deepseek-v3-h800-2048 deepseek-v3-h80-2048".into(), "did you mean"),
        ("simulate chunk --comm-sms 132".into(), "comm_sms 132 leaves none of the 132 SMs"),
        ("simulate chunk --ep 12".into(), "12 GPUs are not whole nodes of 8"),
        ("simulate alltoall --ep 64 --load 1e300".into(), "--load lies in 1 to 1e6"),
        ("simulate gemm --m 1 --n 1 --k 1 --gpu h80".into(), "did you mean 'h800'?"),
        ("simulate schedule --kind zb1p --stages 4 --micro-batches 0".into(), "at least 1"),
        (
            "simulate schedule --kind zb1p --stages 4096 --micro-batches 8192".into(),
            "stages times micro-batches are at most 2097152",
        ),
        ("simulate schedule --kind dualpip --stages 4 --micro-batches 8".into(), "dualpipe"),
        ("simulate calibrate".into(), "required arguments were not provided"),
        ("simulate calibrate --gemms / --gpu h800".into(), "/: expected a file, found a folder"),
    ] {
        let out = fathom(&args.split(' ').collect::<Vec<_>>());
        let error = String::from_utf8(out.stderr).unwrap();
        assert_eq!(out.status.code(), Some(2), "{args}: {error}");
        assert!(error.contains(part), "{args}: {error}");
        assert!(out.stdout.is_empty(), "{args}");
    }
}

/// What does not fit is an answer, and it is no: exit code 1, with bars that end.
#[test]
fn a_step_that_does_not_fit_exits_with_1() {
    let tiny = ["--set", "cluster.gpu.memory_bytes=1000"];
    let out = fathom(&[&["simulate", "--preset", "deepseek-v3-h800-2048"], &tiny[..]].concat());
    let text = String::from_utf8(out.stdout).unwrap();
    assert_eq!(out.status.code(), Some(1), "{text}");
    assert!(text.contains("does not fit: ") && text.len() < 10_000, "{}", text.len());
    let both = ["simulate", "compare", "deepseek-v3-h800-2048", "deepseek-v3-b200-2048"];
    assert_eq!(fathom(&both).status.code(), Some(0));
    assert_eq!(fathom(&[&both[..], &tiny[..]].concat()).status.code(), Some(1));
}

#[test]
fn completions_and_manual_pages_name_every_command() {
    let fathom = |args: &[&str]| {
        let output = Command::new(env!("CARGO_BIN_EXE_fathom")).args(args).output().unwrap();
        assert!(output.status.success(), "{args:?}");
        String::from_utf8(output.stdout).unwrap()
    };
    for shell in ["bash", "zsh", "fish"] {
        let text = fathom(&["completions", shell]);
        assert!(text.contains("simulate") && text.contains("sweep"), "{shell}");
    }
    assert!(fathom(&["man"]).contains(".TH fathom 1"));
    let folder = tempfile::tempdir().unwrap();
    fathom(&["man", "--dir", folder.path().to_str().unwrap()]);
    let page = std::fs::read_to_string(folder.path().join("fathom-train.1")).unwrap();
    assert!(page.contains("resume"), "{page}");
}

/// A pool that does not fit: exit code 1, the reason on the screen and in the document.
#[test]
fn serving_that_does_not_fit_exits_with_1() {
    let set = "--set decode.gpus=8 --set decode.tp=1 --set workload.concurrency=8";
    let args = format!("simulate serve --preset deepseek-v3-decode-h800-320 {set}");
    let words: Vec<&str> = args.split(' ').collect();
    let screen = fathom(&words);
    assert_eq!(screen.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&screen.stdout).contains("decode does not fit: "));
    let json = fathom(&[&words[..], &["--json"]].concat());
    assert_eq!(json.status.code(), Some(1));
    let document: serde_json::Value = serde_json::from_slice(&json.stdout).unwrap();
    assert!(document["complaints"][0].as_str().unwrap().starts_with("decode does not fit"));
}
