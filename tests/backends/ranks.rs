//! Ranks on the kernels' backend: a device each, or one that they share, as threads and as
//! processes; the bits are those of one process on the reference.

use fathom_reference::checkpoint::training;

use super::*;

/// Shards for two pipelines with both directions, experts of two shards a call.
const SHARDS: [&str; 4] = ["grad_shards=4", "expert_union=2", "micro_batch=1", "schedule.batch=8"];

/// `--set` before each.
pub fn set<'a>(settings: &[&'a str]) -> Vec<&'a str> {
    settings.iter().flat_map(|setting| ["--set", setting]).collect()
}

/// A run of the folder `out`, on ranks or not; what it says must not be an error.
pub fn ran(folder: &Path, out: &str, before: &[&str], flags: &[&str]) {
    let command = command(folder, RUN, out, &[&set(&SHARDS)[..], flags].concat());
    let mut all = Command::new(before.first().unwrap_or(&env!("CARGO_BIN_EXE_fathom")));
    if !before.is_empty() {
        all.args(&before[1..]).arg(command.get_program());
    }
    let output = all.args(command.get_args()).output().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{out} {flags:?}: {stderr}");
}

/// Weights, moments, average, place in the data and configuration of the newest checkpoint,
/// whatever the layout.
fn newest(run: &Path) -> (Vec<(String, fathom_reference::Tensor)>, Value) {
    let folders = fs::read_dir(run.join("checkpoints")).unwrap();
    let newest = folders.map(|entry| entry.unwrap().path()).max().unwrap();
    let training::Saved { mut tensors, mut header, .. } = training::read(&newest).unwrap();
    tensors.sort_by(|(a, _), (b, _)| a.cmp(b));
    header["config"]["parallel"] = Value::Null;
    (tensors, header)
}

pub fn assert_the_same_run(a: &Path, b: &Path) {
    let layoutless = |mut line: Value| {
        for key in ["bubble_seconds", "exposed_seconds"] {
            line.as_object_mut().unwrap().remove(key);
        }
        line
    };
    let [expected, found] = [a, b].map(|run| steps(run).into_iter().map(layoutless));
    assert_eq!(expected.collect::<Vec<_>>(), found.collect::<Vec<_>>(), "{}", b.display());
    let [(expected, of_one), (found, of_many)] = [a, b].map(newest);
    assert_eq!(of_one, of_many, "{}", b.display());
    assert!(expected.len() > 10 && expected.len() == found.len());
    for ((name, expected), (of_many, found)) in expected.iter().zip(&found) {
        assert_eq!(name, of_many);
        assert!(expected == found, "{}: {name} differs", b.display());
    }
}

/// As if the run had been killed before its last step.
fn without_the_last_step(run: &Path) {
    fs::remove_dir_all(run.join("checkpoints/step-00000003")).unwrap();
    fs::remove_dir_all(run.join("model")).unwrap();
}

/// Pipeline with DualPipe, data and expert parallel ranks with a device each; then on from the
/// second step on another layout: on the reference, and on ranks that share one device.
#[test]
fn ranks_on_devices_have_the_bits_of_one_process_on_the_reference() {
    if fathom_gpu::nvrtc::find_or_fetch_for_tests().is_none() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    let [alone, ranks] = ["alone", "ranks"].map(|out| folder.join(out));
    let run = ["--precision", "fp8", "--steps", "3", "--set", "checkpoint={every=1,keep=9}"];
    let on = |out: &str, before: &[&str], layout: &[&str], flags: &[&str]| {
        ran(folder, out, before, &[&run[..], &set(layout), flags].concat());
    };
    on("alone", &[], &[], &[]);
    let dual = ["parallel.pp=2", "parallel.dp=2", "parallel.ep=2"];
    let dual = [&dual[..], &["parallel.schedule=\"dualpipe\""]].concat();
    on("ranks", &[], &dual, &["--ranks", "4", "--backend", "emulated"]);
    assert_the_same_run(&alone, &ranks);

    without_the_last_step(&ranks);
    let data = ["parallel.pp=1", "parallel.dp=4", "parallel.ep=2", "parallel.schedule=\"1f1b\""];
    on("ranks", &[], &data, &["--resume"]);
    assert_the_same_run(&alone, &ranks);

    without_the_last_step(&ranks);
    let one_device = [env!("CARGO_BIN_EXE_fathom"), "emulate", "--devices", "1", "--"];
    let pipeline = ["parallel.pp=2", "parallel.dp=2", "parallel.ep=1"];
    on("ranks", &one_device, &pipeline, &["--resume", "--backend", "emulated"]);
    assert_the_same_run(&alone, &ranks);
}

/// The kernels compute heads and widths of a rank, the host adds its partial products to the
/// other's.
#[test]
fn tensor_parallel_ranks_on_devices_have_the_bits_of_the_reference() {
    if fathom_gpu::nvrtc::find_or_fetch_for_tests().is_none() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    let layout = set(&["parallel.tp=2"]);
    let run = [&["--precision", "bf16", "--steps", "1"][..], &layout].concat();
    ran(folder, "reference", &[], &run);
    ran(folder, "devices", &[], &[&run[..], &["--backend", "emulated"]].concat());
    assert_the_same_run(&folder.join("reference"), &folder.join("devices"));
}

/// The kernels attend over whole sequences with a rank's heads; what turns parts of sequences into
/// heads passes the host.
#[test]
fn context_parallel_ranks_on_devices_have_the_bits_of_one_process_on_the_reference() {
    if fathom_gpu::nvrtc::find_or_fetch_for_tests().is_none() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    let run = ["--precision", "fp8", "--steps", "1", "--set", "context_shards=2"];
    ran(folder, "alone", &[], &run);
    let layout = set(&["parallel.cp=2", "parallel.ep=2"]);
    ran(folder, "ranks", &[], &[&run[..], &layout, &["--backend", "emulated"]].concat());
    assert_the_same_run(&folder.join("alone"), &folder.join("ranks"));
}

/// Every process has an emulated driver of its own, and takes the device of its `LOCAL_RANK`.
#[test]
fn processes_on_devices_have_the_bits_of_one_process_on_the_reference() {
    if fathom_gpu::nvrtc::find_or_fetch_for_tests().is_none() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    let bf16 = ["--precision", "bf16", "--steps", "1"];
    ran(folder, "alone", &[], &bf16);
    let layout = set(&["parallel.pp=2"]);
    let processes = [&bf16[..], &layout, &["--processes", "--backend", "emulated"]].concat();
    ran(folder, "processes", &[], &processes);
    assert_the_same_run(&folder.join("alone"), &folder.join("processes"));
}
