//! Ranks as processes, over sockets and over MPI: checkpoints and logs are those of one process,
//! also where a run goes on from the middle over another transport and on another layout.
//!
//! The program starts itself once a rank: `launch` does, or `mpirun`. Ranks over MPI need
//! `--features mpi` and an `mpirun`; without, this says so.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use fathom_reference::Tensor;
use fathom_reference::backend::Reference;
use fathom_reference::checkpoint::training;
use fathom_reference::exchange::environment::Environment;
use fathom_reference::exchange::launch;
use fathom_reference::exchange::processes::Transport;
use fathom_reference::train::{RunFolder, Setting, TrainConfig, ranks};
use serde_json::Value;

/// How the ranks of a run are there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum By {
    Threads,
    Processes,
    Mpi,
}

/// A layout of four ranks (pp, dp, ep, schedule), or of one.
type Layout = (usize, usize, usize, &'static str);

/// What a run lies on, and what it goes on on from its middle.
const TABLE: [((By, Layout), (By, Layout)); 5] = [
    ((By::Processes, (2, 2, 2, "dualpipe")), (By::Threads, (1, 4, 2, "1f1b"))),
    ((By::Threads, (4, 1, 1, "zb1p")), (By::Processes, (1, 4, 4, "1f1b"))),
    ((By::Mpi, (2, 2, 2, "dualpipe")), (By::Processes, (4, 1, 1, "1f1b"))),
    ((By::Processes, (1, 4, 4, "1f1b")), (By::Mpi, (4, 1, 1, "dualpipe"))),
    ((By::Mpi, (1, 4, 4, "1f1b")), (By::Threads, (1, 1, 1, "1f1b"))),
];

const MODES: [&str; 3] = ["fp32", "bf16", "fp8"];

/// The variable in which a rank finds its run: settings, one a line, then the folder.
const RUN: &str = "FATHOM_TEST_RUN";

fn config(set: &[String]) -> TrainConfig {
    let mut all: Vec<Setting> = [
        "steps=10",
        "seq_len=16",
        "micro_batch=1",
        "grad_shards=8",
        "expert_union=4",
        "model.layers=4",
        "model.vocab_size=384",
        "model.hidden_size=64",
        "model.intermediate_size=64",
        "model.moe.intermediate_size=64",
        "data.tokenizer.vocab_size=280",
        "data.tokenizer.train_bytes=20000",
        "schedule.batch=32",
        "schedule.balance_loss=1e-2",
        "checkpoint.every=5",
        "checkpoint.export=false",
        "log.tensorboard=false",
        "log.sample_every=0",
    ]
    .map(Setting::set)
    .to_vec();
    all.extend(set.iter().map(|s| Setting::set(s)));
    TrainConfig::preset("tiny", &all).unwrap_or_else(|e| panic!("{set:?}: {e}"))
}

fn settings(mode: &str, (pp, dp, ep, schedule): Layout) -> Vec<String> {
    vec![
        format!("recipe.mode={mode:?}"),
        format!("parallel.pp={pp}"),
        format!("parallel.dp={dp}"),
        format!("parallel.ep={ep}"),
        format!("parallel.schedule={schedule:?}"),
    ]
}

/// This process as a rank of the run that it was started for.
#[test]
fn rank() {
    let Ok(run) = std::env::var(RUN) else { return };
    let environment = Environment::read().unwrap().expect("a rank is started as one");
    let mut set: Vec<String> = run.lines().map(str::to_owned).collect();
    let folder = RunFolder { out: set.pop().unwrap().into(), resume: true };
    let transport = Transport::of(&environment);
    if environment.by_mpirun && cfg!(feature = "mpi") {
        assert_eq!(transport, Transport::Mpi);
    }
    let of = (&environment, transport);
    let calls: ranks::run::Calls<'_> = (&|| false, &mut |_| ());
    let ended = ranks::run::run_process(config(&set), || Reference, &folder, None, of, calls);
    ended.unwrap_or_else(|e| panic!("{e}"));
}

/// This program as a rank.
fn program(set: &[String], out: &Path) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", "rank", "--nocapture"]);
    command.env(RUN, format!("{}\n{}", set.join("\n"), out.display()));
    command.stdout(Stdio::null());
    command
}

fn run(by: By, set: &[String], out: &Path) {
    let config = config(set);
    let world = config.parallel.world();
    match by {
        By::Threads => {
            let folder = RunFolder { out: out.to_owned(), resume: true };
            let calls: ranks::run::Calls<'_> = (&|| false, &mut |_| ());
            ranks::run::run(config, |_| Reference, &folder, None, calls).unwrap();
        }
        By::Processes => {
            let ended = launch::run(|| Ok(program(set, out)), (world, 1), &|| false).unwrap();
            assert!(ended.codes.iter().all(|code| *code == Some(0)), "{ended:?}");
        }
        By::Mpi => {
            let rank = program(set, out);
            let mut mpirun = Command::new("mpirun");
            mpirun.args(["--oversubscribe", "--bind-to", "none", "-n", &world.to_string()]);
            mpirun.arg(rank.get_program()).args(rank.get_args());
            mpirun.envs(rank.get_envs().filter_map(|(name, value)| Some((name, value?))));
            mpirun.env("OMPI_ALLOW_RUN_AS_ROOT", "1").env("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1");
            mpirun.env("RAYON_NUM_THREADS", "1").stdout(Stdio::null());
            assert!(mpirun.status().unwrap().success());
        }
    }
}

/// What a run keeps and logs, without times and layout.
#[derive(Debug, PartialEq)]
struct Kept {
    tensors: Vec<(String, Tensor)>,
    header: Value,
    steps: Vec<Value>,
}

fn checkpoint(out: &Path, step: u64) -> PathBuf {
    training::path(&out.join("checkpoints"), step)
}

fn kept(out: &Path) -> Kept {
    let mut saved = training::read(&checkpoint(out, 10)).unwrap();
    saved.tensors.sort_by(|(a, _), (b, _)| a.cmp(b));
    saved.header["config"]["parallel"] = Value::Null;
    let text = std::fs::read_to_string(out.join("train.jsonl")).unwrap();
    let lines = text.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
    let mut steps: Vec<Value> = lines.filter(|line| line["kind"] == "step").collect();
    for step in &mut steps {
        for time in ["seconds", "tokens_per_second", "bubble_seconds", "exposed_seconds"] {
            step.as_object_mut().unwrap().remove(time);
        }
    }
    Kept { tensors: saved.tensors, header: saved.header, steps }
}

fn words((by, (pp, dp, ep, schedule)): (By, Layout)) -> String {
    let by = match by {
        By::Threads => "threads",
        By::Processes => "processes, TCP",
        By::Mpi => "processes, MPI",
    };
    format!("{by} | pp {pp} dp {dp} ep {ep} {schedule}")
}

/// All modes with `FATHOM_LAYOUTS=all`, else one a row. The page shows the rows of all modes but
/// those over MPI (`FATHOM_BLESS=1` rewrites it), which run where there is one.
#[test]
fn transports_change_no_bit() {
    if std::env::var_os(RUN).is_some() {
        return;
    }
    let everything = std::env::var_os("FATHOM_LAYOUTS").is_some_and(|what| what == "all");
    let mpirun = Command::new("mpirun").arg("--version").output().is_ok();
    let mpi = cfg!(feature = "mpi") && mpirun;
    if !mpi {
        let why = if mpirun { "the test was built without --features mpi" } else { "no mpirun" };
        println!("PARTLY: ranks over MPI were not run: {why}");
    }
    let folder = tempfile::tempdir().unwrap();
    let whole = MODES.map(|mode| {
        let out = folder.path().join(mode);
        run(By::Threads, &settings(mode, (1, 1, 1, "1f1b")), &out);
        kept(&out)
    });
    let mut rows = String::from(
        "| ranks | layout | then ranks | layout | fp32 | bf16 | fp8 |\n|---|---|---|---|---|---|---|\n",
    );
    for (i, (first, then)) in TABLE.into_iter().enumerate() {
        if [first.0, then.0].contains(&By::Mpi) {
            if !mpi {
                continue;
            }
        } else {
            rows += &format!("| {} | {} | equal | equal | equal |\n", words(first), words(then));
        }
        for (m, (mode, whole)) in MODES.iter().zip(&whole).enumerate() {
            if !everything && i % MODES.len() != m {
                continue;
            }
            let out = folder.path().join(format!("{i}-{mode}"));
            run(first.0, &settings(mode, first.1), &out);
            assert!(kept(&out) == *whole, "{first:?}, {mode}");
            // Once more from the middle.
            std::fs::remove_dir_all(checkpoint(&out, 10)).unwrap();
            run(then.0, &settings(mode, then.1), &out);
            assert!(kept(&out) == *whole, "{first:?}, then {then:?}, {mode}");
        }
    }
    let page = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/distributed.md");
    let text = std::fs::read_to_string(&page).unwrap();
    let (before, rest) = text.split_once("| ranks | layout |").expect("the page has the table");
    let after = rest.split_once("\n\n").map_or("", |(_, after)| after);
    let expected = format!("{before}{rows}\n{after}");
    if everything && std::env::var_os("FATHOM_BLESS").is_some() {
        std::fs::write(&page, &expected).unwrap();
    } else {
        assert!(text == expected, "docs/distributed.md has another table of transports");
    }
}
