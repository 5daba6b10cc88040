//! The memory of ranks that are processes, as Linux counts it, beside what `memory::rank` predicts:
//! `cargo build --release && cargo run --release -p fathom-benches --example peak_memory_ranks`.
//! What a process has besides (the program, the tokenizer, data, messages) is taken from the same
//! layout with a model that is small beside it.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;
use std::{fs, thread};

use fathom_reference::memory::rank;
use fathom_reference::train::{Setting, TrainConfig};

/// Some 22 million parameters.
const LARGE: [&str; 4] = [
    "model.hidden_size=384",
    "model.intermediate_size=1536",
    "model.moe.intermediate_size=256",
    "model.layers=6",
];
const SMALL: [&str; 1] = ["model.layers=6"];
/// Without what rank 0 gathers a whole model for: samples and the exported model.
const RUN: [&str; 7] = [
    "schedule.batch=8",
    "micro_batch=1",
    "seq_len=64",
    "optim.ema_decay=0",
    "model.mtp_depth=0",
    "checkpoint.export=false",
    "log.sample_every=0",
];

const LAYOUTS: [(&str, &[&str]); 3] = [
    ("pp 2, 1f1b", &["grad_shards=1", "parallel.pp=2"]),
    ("dp 2", &["grad_shards=2", "parallel.dp=2"]),
    (
        "pp 2, dp 2, ep 2, DualPipe",
        &[
            "grad_shards=4",
            "expert_union=2",
            "parallel.pp=2",
            "parallel.dp=2",
            "parallel.ep=2",
            "parallel.schedule=\"dualpipe\"",
        ],
    ),
];

/// The program, which cargo has put beside the folder of examples.
fn program() -> PathBuf {
    let own = std::env::current_exe().expect("this program's path");
    let program = own.parent().and_then(Path::parent).expect("a folder").join("fathom");
    assert!(program.is_file(), "{} is not there: cargo build --release", program.display());
    program
}

/// Number as a rank and peak bytes of a process that `parent` has started; none where it is
/// another's, or has ended.
fn rank_of(process: &Path, parent: u32) -> Option<(usize, u64)> {
    let status = fs::read_to_string(process.join("status")).ok()?;
    let number = |key: &str| {
        let value = status.lines().find_map(|line| line.strip_prefix(key))?;
        value.split_whitespace().next()?.parse::<u64>().ok()
    };
    if number("PPid:")? != u64::from(parent) {
        return None;
    }
    let variables = fs::read(process.join("environ")).ok()?;
    let mut variables = variables.split(|&b| b == 0);
    let rank = variables.find_map(|v| v.strip_prefix(b"RANK="))?;
    Some((std::str::from_utf8(rank).ok()?.parse().ok()?, 1024 * number("VmHWM:")?))
}

/// The most that each rank's process ever had, until the run ends.
fn watch(mut run: Child) -> BTreeMap<usize, u64> {
    let mut peaks = BTreeMap::new();
    while run.try_wait().expect("the run's state").is_none() {
        for process in fs::read_dir("/proc").expect("Linux").flatten() {
            if let Some((rank, peak)) = rank_of(&process.path(), run.id()) {
                let most: &mut u64 = peaks.entry(rank).or_default();
                *most = peak.max(*most);
            }
        }
        thread::sleep(Duration::from_millis(20));
    }
    let output = run.wait_with_output().expect("what the run said");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    peaks
}

/// Of every rank: bytes predicted and seen.
fn ranks(settings: &[&str]) -> Vec<(u64, u64)> {
    let set: Vec<Setting> = settings.iter().copied().map(Setting::set).collect();
    let config = TrainConfig::preset("tiny", &set).unwrap_or_else(|e| panic!("{settings:?}: {e}"));
    let (world, dp) = (config.parallel.world(), config.parallel.dp);
    let folder = tempfile::tempdir().expect("a folder for the run");
    let mut command = Command::new(program());
    command.args(["train", "--preset", "tiny", "--steps", "2", "--processes", "--ranks"]);
    command.arg(world.to_string()).arg("--out").arg(folder.path().join("run"));
    for set in settings {
        command.args(["--set", set]);
    }
    command.env("RAYON_NUM_THREADS", "1").stdout(Stdio::null()).stderr(Stdio::piped());
    let seen = watch(command.spawn().expect("the program starts"));
    assert_eq!(seen.len(), world, "{seen:?}");
    let told = |number: usize| rank::rank(&config, number / dp, 8).expect("a prediction").sum();
    seen.into_iter().map(|(number, seen)| (told(number), seen)).collect()
}

fn main() {
    let mb = |bytes: u64| bytes as f64 / 1e6;
    println!("| layout | mode | rank | predicted, MB | VmHWM, MB | besides, MB | ratio |");
    println!("|---|---|---:|---:|---:|---:|---:|");
    for (name, layout) in LAYOUTS {
        for mode in ["fp8", "bf16"] {
            let mode_set = format!("recipe.mode=\"{mode}\"");
            let with = |model: &[&'static str]| {
                ranks(&[model, &RUN[..], layout, &[mode_set.as_str()]].concat())
            };
            let besides = with(&SMALL);
            for (number, (told, seen)) in with(&LARGE).into_iter().enumerate() {
                let (small, all) = besides[number];
                let besides = all.saturating_sub(small);
                println!(
                    "| {name} | {mode} | {number} | {:.0} | {:.0} | {:.0} | {:.2} |",
                    mb(told),
                    mb(seen),
                    mb(besides),
                    (seen as f64 - besides as f64) / told as f64
                );
            }
        }
    }
}
