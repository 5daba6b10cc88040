//! `fathom emulate` with a driver-API client that nobody here wrote: cuda-python, where it is
//! installed.

use std::path::Path;
use std::process::Command;

/// A Python that has cuda-python and NVRTC: `FATHOM_PYTHON`, else `python3`.
fn python() -> Option<String> {
    let python = std::env::var("FATHOM_PYTHON").unwrap_or_else(|_| "python3".to_owned());
    let probe = Command::new(&python)
        .args(["-c", "import numpy; from cuda.bindings import driver, nvrtc"])
        .output();
    if probe.is_ok_and(|o| o.status.success()) {
        return Some(python);
    }
    eprintln!(
        "SKIPPED: {python} lacks cuda-python (pip install cuda-bindings nvidia-cuda-nvrtc numpy, \
         or set FATHOM_PYTHON)"
    );
    None
}

fn emulate(args: &[&str]) -> std::process::Output {
    Command::new(env!("CARGO_BIN_EXE_fathom")).arg("emulate").args(args).output().unwrap()
}

#[test]
fn a_cuda_python_program_runs_unchanged() {
    let Some(python) = python() else { return };
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/emulate/axpy.py");
    let output = emulate(&["--", &python, script.to_str().unwrap()]);
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{stderr}");
    assert_eq!(String::from_utf8_lossy(&output.stdout).trim(), "NVIDIA H800 (emulated): equal");
    assert!(stderr.contains("1 launches of 1 kernels"), "{stderr}");
}

#[test]
fn the_command_s_failure_is_ours_and_bad_choices_are_usage_errors() {
    assert_eq!(emulate(&["--", "false"]).status.code(), Some(1));
    assert_eq!(emulate(&["--", "true"]).status.code(), Some(0));
    assert_eq!(emulate(&["--", "/no/such/program"]).status.code(), Some(2));
    let unknown = emulate(&["--gpu", "h900", "--", "true"]);
    assert_eq!(unknown.status.code(), Some(2));
    let stderr = String::from_utf8_lossy(&unknown.stderr);
    assert!(stderr.contains("h900") && stderr.contains("h800"), "{stderr}");
    assert_eq!(emulate(&["--check", "rases", "--", "true"]).status.code(), Some(2));
}
