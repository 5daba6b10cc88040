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
