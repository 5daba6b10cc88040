//! `fathom conform` as a user runs it, on the emulated driver: our kernels give the reference's
//! bits with every sanitizer on. Skipped, aloud, where NVRTC is not to be had.

use std::process::{Command, Output};

use serde_json::Value;

fn fathom(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_fathom")).args(args).output().unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

#[test]
fn kernels_agree_with_the_reference_and_the_sanitizers_are_silent() {
    if fathom_gpu::nvrtc::find_or_fetch_for_tests().is_none() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let save = folder.path().to_str().unwrap();
    let output = fathom(&[
        "conform", "--device", "emulated", "--cases", "6", "--check", "all", "--json", "--save",
        save,
    ]);
    let stderr = text(&output.stderr);
    assert_eq!(output.status.code(), Some(0), "{stderr}{}", text(&output.stdout));
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(report["device"], "emulated");
    assert!(report["gpu"].as_str().unwrap().contains("H800"), "{report:#}");
    for op in report["ops"].as_array().unwrap() {
        assert_eq!((&op["cases"], &op["passed"]), (&6.into(), &6.into()), "{op:#}");
        // The fewest: a case of clip_factor has two numbers.
        assert!(op["elements"].as_u64().unwrap() >= 12 && op["failure"].is_null(), "{op:#}");
    }
    assert_eq!(report["ops"].as_array().unwrap().len(), fathom_gpu::kernels::KERNELS.len());
    assert!(!stderr.contains("findings"), "{stderr}");
}

/// The verdicts of a run that must agree.
fn agreeing(args: &[&str]) -> Value {
    let folder = tempfile::tempdir().unwrap();
    let save = folder.path().to_str().unwrap();
    let fixed = ["conform", "--device", "emulated", "--json", "--save", save];
    let output = fathom(&[&fixed, args].concat());
    let said = format!("{args:?}: {}{}", text(&output.stderr), text(&output.stdout));
    assert_eq!(output.status.code(), Some(0), "{said}");
    serde_json::from_slice(&output.stdout).unwrap()
}

/// Kernels give the same bits however many SMs they are launched for, and in whatever order warps
/// and CTAs take their turns: each time they are held to the same reference.
#[test]
fn no_bit_depends_on_the_number_of_sms_or_on_the_schedule() {
    if fathom_gpu::nvrtc::find_or_fetch_for_tests().is_none() {
        return;
    }
    for (gpu, sms, seed) in [("h100", "2", "1"), ("h200", "7", "2"), ("h800", "132", "3")] {
        let how = ["--cases", "2", "--gpu", gpu, "--sms", sms, "--schedule-seed", seed];
        let report = agreeing(&how);
        assert!(report["gpu"].as_str().unwrap().contains(&gpu.to_uppercase()), "{report:#}");
        for op in report["ops"].as_array().unwrap() {
            assert_eq!(op["passed"], 2, "{how:?}: {op:#}");
        }
    }
}

/// Case 24 has as many rows as a large micro-batch.
#[test]
fn twenty_thousand_rows_agree() {
    if fathom_gpu::nvrtc::find_or_fetch_for_tests().is_none() {
        return;
    }
    let ops = "rms_norm,rope,swiglu,router,dispatch_plan,dispatch,combine,quantize_tile";
    let report = agreeing(&["--only", ops, "--case", "24"]);
    let all = report["ops"].as_array().unwrap();
    assert_eq!(all.len(), 8);
    for op in all {
        assert_eq!(op["passed"], 1, "{op:#}");
        assert!(op["elements"].as_u64().unwrap() >= 20_000, "{op:#}");
    }
}

/// What the page says that an op's kernels did is all of it, and nothing of its neighbours.
#[test]
fn the_page_counts_every_launch_with_its_op() {
    if fathom_gpu::nvrtc::find_or_fetch_for_tests().is_none() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let page = folder.path().join("page.html");
    let ops = ["add", "rms_norm", "swiglu"];
    let path = page.to_str().unwrap();
    agreeing(&["--only", &ops.join(","), "--cases", "3", "--report", path]);
    let text = std::fs::read_to_string(&page).unwrap();
    let sections: Vec<&str> = text.split("<tr class=\"total\"><td>").skip(1).collect();
    assert_eq!(sections.len(), ops.len(), "{text}");
    for (op, section) in ops.iter().zip(sections) {
        // Name, cases to bits, registers, launches: of each of the op's kernels.
        let kernels: Vec<(&str, &str)> = section
            .split("<td class=\"part\">")
            .skip(1)
            .map(|row| {
                let cells: Vec<&str> = row.split("<td>").collect();
                let end = |cell: &'_ str| cell.find("</td>").unwrap();
                (&row[..end(row)], &cells[2][..end(cells[2])])
            })
            .collect();
        assert!(kernels.iter().all(|(name, _)| name.contains(op)), "{op}: {kernels:?}");
        let launches: u32 = kernels.iter().map(|(_, n)| n.parse::<u32>().unwrap()).sum();
        assert_eq!(launches, 3, "{op}: {kernels:?}");
    }
}

/// One layer with routed experts, so small that six runs of it take seconds.
const SMALL: &str = r#"
seq_len = 16
micro_batch = 2

[model]
vocab_size = 320
hidden_size = 40
intermediate_size = 24
layers = 1
heads = 2
mtp_depth = 0
[model.attention]
kind = "mla"
q_lora_rank = 16
kv_lora_rank = 24
qk_nope_head_dim = 16
qk_rope_head_dim = 8
v_head_dim = 16
[model.moe]
intermediate_size = 16
first_dense = 0

[data.tokenizer]
vocab_size = 300
[schedule]
batch = 2
"#;

/// Training runs in all modes, op by op and by their checkpoints, and the page of it.
#[test]
fn whole_training_runs_agree() {
    if fathom_gpu::nvrtc::find_or_fetch_for_tests().is_none() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let [run, page] = ["run.toml", "conform.html"].map(|name| folder.path().join(name));
    std::fs::write(&run, SMALL).unwrap();
    let [run, html] = [&run, &page].map(|path| path.to_str().unwrap());
    let ops = ["--only", "add", "--cases", "2"];
    let runs = ["--model", run, "--steps", "1", "--report", html];
    let report = agreeing(&[&runs[..], &ops].concat());
    let models = report["models"].as_array().unwrap();
    let names: Vec<_> = models.iter().map(|m| m["run"].as_str().unwrap()).collect();
    let expected =
        ["fp8", "bf16", "fp32"].map(|m| [format!("{m}, recomputed"), format!("{m}, kept")]);
    assert_eq!(names, expected.as_flattened());
    for model in models {
        assert!(model["failure"].is_null() && model["steps"] == 1, "{model:#}");
        assert!(model["calls"].as_u64().unwrap() > 100, "{model:#}");
        assert!(model["files"].as_u64().unwrap() >= 2, "{model:#}");
    }
    let page = std::fs::read_to_string(page).unwrap();
    for part in ["Every bit agrees", "<td>add</td>", "<td class=\"part\">add</td>", "fp8, kept"] {
        assert!(page.contains(part), "no '{part}' in {page}");
    }
}

#[test]
fn the_wrong_device_and_unknown_words_are_refused() {
    for (args, expected) in [
        (&["conform", "--only", "gem"][..], "expected adamw, add"),
        (&["conform", "--device", "tpu"], "expected cuda or emulated, found 'tpu'"),
        (&["conform", "--device", "emulated", "--gpu", "h9"], "h9"),
        (&["conform", "--device", "emulated", "--check", "luck"], "luck"),
    ] {
        let output = fathom(args);
        assert_eq!(output.status.code(), Some(2), "{args:?}");
        let stderr = text(&output.stderr);
        assert!(stderr.contains(expected), "{args:?}: {stderr}");
    }
    // Under the emulated driver, --device cuda finds a driver that is not NVIDIA's; its exit code
    // is passed on.
    let program = env!("CARGO_BIN_EXE_fathom");
    let output = fathom(&["emulate", "--", program, "conform", "--device", "cuda"]);
    let stderr = text(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{stderr}");
    let expected = "--device cuda: expected NVIDIA's driver, found the emulated driver";
    assert!(stderr.contains(expected), "{stderr}");
}
