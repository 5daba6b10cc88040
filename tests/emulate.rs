//! `fathom emulate` with a driver-API client that nobody here wrote: cuda-python, where it is
//! installed.

use std::path::{Path, PathBuf};
use std::process::Command;

/// Whether a Python has cuda-python, NVRTC and numpy.
fn has_cuda_python(python: &str) -> bool {
    let probe = "import numpy; from cuda.bindings import driver, nvjitlink, nvrtc; \
                 nvjitlink.version()";
    let output = Command::new(python).args(["-c", probe]).output();
    output.is_ok_and(|o| o.status.success())
}

/// `FATHOM_PYTHON`, else `python3` if it has cuda-python, else a virtual environment beside the
/// build, which the first run fetches with pip.
fn python() -> Option<String> {
    if let Ok(python) = std::env::var("FATHOM_PYTHON") {
        assert!(has_cuda_python(&python), "FATHOM_PYTHON={python} lacks cuda-python");
        return Some(python);
    }
    if has_cuda_python("python3") {
        return Some("python3".to_owned());
    }
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("cuda-python");
    let own = folder.join("bin/python").to_string_lossy().into_owned();
    if has_cuda_python(&own) {
        return Some(own);
    }
    let ran = |program: &str, args: &[&str]| {
        let output = Command::new(program).args(args).output();
        output.is_ok_and(|o| o.status.success())
    };
    let install = [&["-m", "pip", "install", "-q"][..], &CUDA_PYTHON].concat();
    let made = ran("python3", &["-m", "venv", &folder.to_string_lossy()]) && ran(&own, &install);
    if made && has_cuda_python(&own) {
        return Some(own);
    }
    fathom_trace::shared::skipped(
        "no Python with cuda-python, and none could be fetched (pip install cuda-bindings \
         nvidia-cuda-nvrtc nvidia-nvjitlink numpy, or set FATHOM_PYTHON)",
    );
    None
}

/// The packages of a Python with cuda-python.
const CUDA_PYTHON: [&str; 4] = ["cuda-bindings", "nvidia-cuda-nvrtc", "nvidia-nvjitlink", "numpy"];

/// `FATHOM_NVCC`, else `nvcc` where there is one, else that of a virtual environment beside the
/// build, which the first run fetches with pip.
fn nvcc() -> Option<PathBuf> {
    let runs = |nvcc: &Path| {
        Command::new(nvcc).arg("--version").output().is_ok_and(|o| o.status.success())
    };
    if let Some(nvcc) = std::env::var_os("FATHOM_NVCC").map(PathBuf::from) {
        assert!(runs(&nvcc), "FATHOM_NVCC={} does not run", nvcc.display());
        return Some(nvcc);
    }
    if runs(Path::new("nvcc")) {
        return Some("nvcc".into());
    }
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("cuda-toolkit");
    let own = || {
        let versions = std::fs::read_dir(folder.join("lib")).ok()?.flatten();
        let mut places = versions.map(|v| v.path().join("site-packages/nvidia/cu13/bin/nvcc"));
        places.find(|nvcc| runs(nvcc))
    };
    if let Some(nvcc) = own() {
        return Some(nvcc);
    }
    let ran = |program: &Path, args: &[&str]| {
        let output = Command::new(program).args(args).output();
        output.is_ok_and(|o| o.status.success())
    };
    let made = ran(Path::new("python3"), &["-m", "venv", &folder.to_string_lossy()]);
    let install = [&["-m", "pip", "install", "-q"][..], &TOOLKIT].concat();
    if made && ran(&folder.join("bin/python"), &install) {
        return own();
    }
    fathom_trace::shared::skipped(
        "no nvcc, and none could be fetched (pip install nvidia-cuda-nvcc nvidia-cuda-runtime \
         nvidia-cuda-crt nvidia-nvvm nvidia-cuda-cccl, or set FATHOM_NVCC)",
    );
    None
}

/// The packages of a CUDA toolkit that compiles and links.
const TOOLKIT: [&str; 5] = [
    "nvidia-cuda-nvcc",
    "nvidia-cuda-runtime",
    "nvidia-cuda-crt",
    "nvidia-nvvm",
    "nvidia-cuda-cccl",
];

/// Compiles a program of tests/emulate.
fn compile(nvcc: &Path, options: &[&str], source: &str, program: &Path) {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/emulate").join(source);
    let built = Command::new(nvcc).args(options).arg("-o").args([program, &source]).output();
    let built = built.unwrap();
    assert!(built.status.success(), "{}", String::from_utf8_lossy(&built.stderr));
}

#[test]
fn a_fault_is_reported_loses_the_context_or_aborts() {
    let Some(nvcc) = nvcc() else { return };
    let folder = tempfile::tempdir().unwrap();
    let program = folder.path().join("fault");
    compile(&nvcc, &[], "fault.cu", &program);
    // A program that goes on and ends well had a finding all the same; SIGABRT is 6.
    for (choice, code) in [("report", 1), ("context", 7), ("abort", 134)] {
        let output = emulate(&["--on-finding", choice, "--", program.to_str().unwrap()]);
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(code), "{choice}: {stderr}");
        assert!(stderr.contains("out-of-bounds access"), "{choice}: {stderr}");
    }
    assert_eq!(emulate(&["--on-finding", "panic", "--", "true"]).status.code(), Some(2));
}

/// The first finding is told with its source line, why it matters and how to silence it; files
/// and the page have all.
#[test]
fn findings_have_their_source_line_wherever_they_are_told() {
    let Some(nvcc) = nvcc() else { return };
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    let (program, page) = (path("fault"), path("run.html"));
    compile(&nvcc, &["-lineinfo"], "fault.cu", Path::new(&program));
    for name in ["f.json", "f.sarif", "f.xml"] {
        let file = path(name);
        let run = emulate(&["--findings", &file, "--report", &page, "--", &program]);
        let stderr = String::from_utf8_lossy(&run.stderr);
        let source = stderr.lines().find(|line| line.contains("fault.cu:")).unwrap_or(&stderr);
        assert!(source.trim().starts_with("from "), "{stderr}");
        assert!(stderr.contains("why it matters: no allocation holds that address"), "{stderr}");
        assert!(stderr.contains("to silence it: always on"), "{stderr}");
    }
    let written = |name: &str| std::fs::read_to_string(path(name)).unwrap();
    let json = |name| serde_json::from_str::<serde_json::Value>(&written(name)).unwrap();
    let finding = &json("f.json")["findings"][0];
    assert_eq!(
        (&finding["kind"], &finding["source"]["line"]),
        (&"out_of_bounds".into(), &2.into())
    );
    let run = &json("f.sarif")["runs"][0];
    let result = &run["results"][0];
    assert_eq!(run["tool"]["driver"]["rules"][0]["id"], result["ruleId"]);
    let place = &result["locations"][0]["physicalLocation"];
    assert!(place["artifactLocation"]["uri"].as_str().unwrap().ends_with("fault.cu"), "{place}");
    assert_eq!((&place["region"]["startLine"], &result["level"]), (&2.into(), &"error".into()));
    let junit = written("f.xml");
    assert!(junit.contains("tests=\"1\" failures=\"1\""), "{junit}");
    let page = written("run.html");
    for part in
        ["out-of-bounds access", "fault.cu:2", "<td>write<small title=\"_Z5writePi\">", ">exact<"]
    {
        assert!(page.contains(part), "{part}: {page}");
    }
    assert_eq!(emulate(&["--findings", &path("f.txt"), "--", "true"]).status.code(), Some(2));
}

/// What nvcc builds by default: the runtime linked in, PTX packed with zstd beside machine code.
#[test]
fn a_program_that_nvcc_built_runs_unchanged() {
    let Some(nvcc) = nvcc() else { return };
    let folder = tempfile::tempdir().unwrap();
    let program = folder.path().join("runtime");
    for packing in [&[][..], &["--compress-mode=speed"], &["--no-compress"]] {
        compile(&nvcc, packing, "runtime.cu", &program);
        let output = emulate(&["--check", "all", "--", program.to_str().unwrap()]);
        let words = String::from_utf8_lossy(&output.stdout);
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{packing:?}: {words}{stderr}");
        assert_eq!(words, "kernel of 4 threads\nkernel of 4 threads\n0 failures\n");
    }
}

fn emulate(args: &[&str]) -> std::process::Output {
    Command::new(env!("CARGO_BIN_EXE_fathom")).arg("emulate").args(args).output().unwrap()
}

/// Copied away from everything it was built with, the program still has its driver.
#[test]
fn the_program_brings_its_driver_wherever_it_is() {
    let folder = tempfile::tempdir().unwrap();
    let copy = folder.path().join("fathom");
    std::fs::copy(env!("CARGO_BIN_EXE_fathom"), &copy).unwrap();
    let run = |library: Option<&str>| {
        let mut command = Command::new(&copy);
        command.args(["emulate", "--gpu", "h100", "--"]).arg(&copy).args(["doctor", "--json"]);
        library.map(|path| command.env("FATHOM_LIBCUDA", path));
        command.output().unwrap()
    };
    let output = run(None);
    let stdout = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert!(stdout.contains("H100") && stdout.contains("(emulated)"), "{stdout}");
    let output = run(Some("/nowhere/libcuda.so"));
    assert_eq!(output.status.code(), Some(2));
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(stderr.contains("FATHOM_LIBCUDA=/nowhere/libcuda.so: expected"), "{stderr}");
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

/// NVRTC's and nvJitLink's cubins, which other programs load, are PTX here.
#[test]
fn a_program_that_asks_for_machine_code_gets_ptx() {
    let Some(python) = python() else { return };
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/emulate/cubin.py");
    let output = emulate(&["--", &python, script.to_str().unwrap()]);
    let words = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{words}{}", String::from_utf8_lossy(&output.stderr));
    assert_eq!(
        words,
        "NVRTC's cubin: True\nnvJitLink's of CUBIN and CUBIN: True\n\
         nvJitLink's of PTX and CUBIN: True\nnvJitLink's of LTOIR and LTOIR: True\n\
         nvJitLink's of LTOIR and PTX: True\nnvJitLink's error: ERROR_PTX_COMPILE\n"
    );
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

/// A launch file of three threads that double what they find, and expect it.
fn launch_file(folder: &Path, expected: [u32; 3]) -> std::path::PathBuf {
    let ptx = ".version 8.0
.target sm_90
.address_size 64
.visible .entry twice(.param .u64 p)
{
    .reg .u64 %rd<3>;
    .reg .u32 %r<2>;
    ld.param.u64 %rd0, [p];
    mov.u32 %r0, %tid.x;
    mul.wide.u32 %rd1, %r0, 4;
    add.u64 %rd2, %rd0, %rd1;
    ld.global.u32 %r1, [%rd2];
    shl.b32 %r1, %r1, 1;
    st.global.u32 [%rd2], %r1;
    ret;
}
";
    std::fs::write(folder.join("twice.ptx"), ptx).unwrap();
    let json = r#"{"entry": "twice", "grid": [1, 1, 1], "threads": 3,
                   "params": [{"name": "p", "ptx_type": "u64"}]}"#;
    let path = folder.join("twice.json");
    std::fs::write(&path, json).unwrap();
    let bytes = |v: [u32; 3]| v.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<u8>>();
    let (input, output) = (bytes([1, 2, 3]), bytes(expected));
    let view = |data| safetensors::tensor::TensorView::new(safetensors::Dtype::U32, vec![3], data);
    let tensors = [("p", view(&input).unwrap()), ("out.p", view(&output).unwrap())];
    let file = safetensors::serialize(tensors, None).unwrap();
    std::fs::write(folder.join("twice.safetensors"), file).unwrap();
    path
}

#[test]
fn a_launch_file_is_run_and_compared() {
    let folder = tempfile::tempdir().unwrap();
    let path = launch_file(folder.path(), [2, 4, 6]);
    let path = path.to_str().unwrap();
    let output = emulate(&["run", path, "--check", "all", "--profile"]);
    let text = String::from_utf8_lossy(&output.stdout);
    assert_eq!(output.status.code(), Some(0), "{text}{}", String::from_utf8_lossy(&output.stderr));
    for part in ["p: 3 elements, 0 mismatches", "global sectors", "warp instructions", "warp 0"] {
        assert!(text.contains(part), "no {part} in {text}");
    }

    launch_file(folder.path(), [2, 5, 6]);
    let output = emulate(&["run", path, "--json"]);
    assert_eq!(output.status.code(), Some(1));
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(
        (&report["status"], &report["outputs"][0]["mismatches"]),
        (&"fail".into(), &1.into())
    );
    assert_eq!(report["outputs"][0]["first"]["index"], 1);

    std::fs::write(folder.path().join("twice.json"), "{}").unwrap();
    let output = emulate(&["run", path]);
    assert_eq!(output.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&output.stderr).contains("twice.json"));
}
