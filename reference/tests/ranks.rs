//! Training on many ranks: whatever the layout, weights, moments, average, losses, place in the
//! data and checkpoint have the bits of one process.
//!
//! A program of its own: it starts many threads, and runs for minutes.

use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use fathom_reference::Tensor;
use fathom_reference::backend::{Ledger, Reference};
use fathom_reference::checkpoint::training::{self, Saved};
use fathom_reference::exchange::threads::{self, End};
use fathom_reference::memory::rank::{self, RankMemory};
use fathom_reference::train::ranks::{RankTrainer, Shared};
use fathom_reference::train::{
    Runner, Setting, StepLog, StepOutcome, TrainConfig, TrainError, Trainer, resumed_config,
};

#[path = "ranks/context_parallel.rs"]
mod context_parallel;
#[path = "ranks/tensor_parallel.rs"]
mod tensor_parallel;

/// A run small enough for a test, with experts, an average and fill-in-the-middle.
fn config(set: &[&str]) -> TrainConfig {
    let mut all: Vec<Setting> = [
        "steps=4",
        "seq_len=16",
        "micro_batch=1",
        "model.vocab_size=384",
        "model.hidden_size=64",
        "model.intermediate_size=64",
        "model.moe.intermediate_size=64",
        "data.tokenizer.vocab_size=280",
        "data.tokenizer.train_bytes=20000",
        "optim.ema_decay=0.5",
        "schedule.learning_rate=1e-3",
        "schedule.balance_loss=1e-2",
    ]
    .map(Setting::set)
    .to_vec();
    all.extend(set.iter().map(|s| Setting::set(s)));
    TrainConfig::preset("tiny", &all).unwrap_or_else(|e| panic!("{set:?}: {e}"))
}

/// What a run comes to: its logs without times, and everything that it keeps, by name.
#[derive(Debug, PartialEq)]
struct Outcome {
    logs: Vec<StepLog>,
    tensors: Vec<(String, Tensor)>,
    header: serde_json::Value,
}

impl Outcome {
    fn of(logs: Vec<StepLog>, saved: Saved) -> Outcome {
        let Saved { mut tensors, mut header, .. } = saved;
        tensors.sort_by(|(a, _), (b, _)| a.cmp(b));
        // The layout is the only thing in which runs may differ.
        header["config"]["parallel"] = serde_json::Value::Null;
        Outcome { logs: logs.into_iter().map(timeless).collect(), tensors, header }
    }

    fn assert_is(&self, one: &Outcome, layout: &str) {
        for (i, (many, one)) in self.logs.iter().zip(&one.logs).enumerate() {
            assert_eq!(many, one, "{layout}: log of step {}", i + 1);
        }
        assert_eq!(self.logs.len(), one.logs.len(), "{layout}");
        assert_eq!(self.header, one.header, "{layout}");
        assert_eq!(self.tensors.len(), one.tensors.len(), "{layout}");
        for ((name, many), (of_one, one)) in self.tensors.iter().zip(&one.tensors) {
            assert_eq!(name, of_one, "{layout}");
            assert!(many == one, "{layout}: {name} differs");
        }
    }
}

fn timeless(log: StepLog) -> StepLog {
    let (bubble_seconds, exposed_seconds) = (None, None);
    StepLog { seconds: 0.0, tokens_per_second: 0.0, bubble_seconds, exposed_seconds, ..log }
}

fn done(outcome: StepOutcome) -> StepLog {
    match outcome {
        StepOutcome::Done(log) => *log,
        other => panic!("{other:?}"),
    }
}

/// The run in one process.
fn one(set: &[&str], steps: usize) -> Outcome {
    let mut trainer = Trainer::new(config(set), Reference).unwrap_or_else(|e| panic!("{e}"));
    let logs = (0..steps).map(|_| done(trainer.step(&|| false).unwrap())).collect();
    Outcome::of(logs, trainer.save().unwrap())
}

/// Steps of a run on the ranks of its layout, from `saved` on; a checkpoint is written at the end.
fn steps(set: &[&str], saved: Option<Saved>, steps: usize, folder: &Path) -> (Vec<StepLog>, Saved) {
    let shared = Shared::open(config(set), saved.map(Arc::new)).unwrap_or_else(|e| panic!("{e}"));
    let world = shared.config.parallel.world();
    let target = folder.to_owned();
    let main = move |exchange| {
        let mut trainer = RankTrainer::new(&shared, Reference, exchange)?;
        let mut logs = Vec::new();
        for _ in 0..steps {
            logs.push(done(trainer.step(&|| false)?));
        }
        Ok::<_, TrainError>((logs, trainer.checkpoint(&target)?))
    };
    let mut all = Vec::new();
    for end in threads::run(world, Duration::from_secs(300), main, &mut || ()) {
        match end {
            End::Returned(Ok(of_rank)) => all.push(of_rank),
            End::Returned(Err(e)) => panic!("{set:?}: {e}"),
            other => panic!("{set:?}: {other:?}"),
        }
    }
    let path = all[0].1.clone();
    let logs: Vec<Vec<StepLog>> =
        all.into_iter().map(|(logs, _)| logs.into_iter().map(timeless).collect()).collect();
    assert!(logs.iter().all(|of_rank| *of_rank == logs[0]), "{set:?}: ranks log differently");
    (logs.into_iter().next().unwrap(), training::read(&path).unwrap())
}

/// The run on the ranks of its layout.
fn many(set: &[&str], count: usize) -> Outcome {
    let folder = tempfile::tempdir().unwrap();
    let (logs, saved) = steps(set, None, count, folder.path());
    Outcome::of(logs, saved)
}

const MODES: [&str; 3] = ["recipe.mode=\"fp32\"", "recipe.mode=\"bf16\"", "recipe.mode=\"fp8\""];

/// Layouts that are compared with one process: pp, dp, ep, schedule.
type Layout = (usize, usize, usize, &'static str);

fn settings((pp, dp, ep, schedule): Layout) -> Vec<String> {
    vec![
        format!("parallel.pp={pp}"),
        format!("parallel.dp={dp}"),
        format!("parallel.ep={ep}"),
        format!("parallel.schedule={schedule:?}"),
    ]
}

/// Runs of one model, `tp`, `grad_shards` and `expert_union`, and the layouts that they lie on.
struct Runs {
    tp: usize,
    grad_shards: usize,
    expert_union: usize,
    layers: usize,
    more: &'static [&'static str],
    modes: &'static [&'static str],
    layouts: &'static [Layout],
}

/// What is compared.
const TABLE: [Runs; 4] = [
    Runs {
        tp: 1,
        grad_shards: 4,
        expert_union: 1,
        layers: 4,
        more: &["schedule.batch=16"],
        modes: &MODES,
        layouts: &[
            (1, 1, 1, "1f1b"),
            (1, 2, 1, "1f1b"),
            (1, 4, 1, "1f1b"),
            (2, 1, 1, "gpipe"),
            (4, 1, 1, "1f1b"),
            (2, 2, 1, "zb1p"),
            (2, 1, 1, "interleaved"),
            (2, 1, 1, "zb-v"),
            (2, 1, 1, "chimera"),
            (4, 1, 1, "dualpipe"),
            (2, 2, 1, "dualpipe"),
            (2, 1, 1, "dualpipev"),
        ],
    },
    Runs {
        tp: 1,
        grad_shards: 4,
        expert_union: 2,
        layers: 4,
        more: &["schedule.batch=16"],
        modes: &MODES,
        layouts: &[
            (2, 2, 2, "dualpipe"),
            (1, 2, 2, "1f1b"),
            (1, 4, 2, "1f1b"),
            (1, 2, 1, "1f1b"),
            (4, 2, 2, "zb1p"),
            (2, 2, 1, "zb-v"),
            (2, 4, 2, "interleaved"),
        ],
    },
    Runs {
        tp: 1,
        grad_shards: 4,
        expert_union: 4,
        layers: 4,
        more: &["schedule.batch=16"],
        modes: &MODES,
        layouts: &[(2, 4, 4, "dualpipev"), (1, 4, 4, "1f1b"), (1, 1, 1, "1f1b")],
    },
    // Deep pipelines of a narrow model.
    Runs {
        tp: 1,
        grad_shards: 4,
        expert_union: 2,
        layers: 16,
        more: &[
            "schedule.batch=64",
            "seq_len=8",
            "model.hidden_size=32",
            "model.intermediate_size=32",
            "model.moe.intermediate_size=32",
        ],
        modes: &[MODES[1]],
        layouts: &[
            (8, 2, 2, "dualpipe"),
            (8, 1, 1, "gpipe"),
            (8, 1, 1, "1f1b"),
            (8, 1, 1, "interleaved"),
            (8, 1, 1, "zb1p"),
            (8, 1, 1, "zb-v"),
            (8, 1, 1, "chimera"),
            (8, 1, 1, "dualpipev"),
            (16, 1, 1, "gpipe"),
            (16, 1, 1, "1f1b"),
            (16, 1, 1, "zb1p"),
            (16, 2, 2, "chimera"),
            (16, 2, 2, "dualpipe"),
        ],
    },
];

/// What is compared with tensor parallel ranks alone.
const TENSOR_PARALLEL: [Runs; 2] = [
    // Widths of which a rank has whole FP8 tiles.
    Runs {
        tp: 2,
        grad_shards: 4,
        expert_union: 2,
        layers: 4,
        more: &[
            "schedule.batch=16",
            "seq_len=8",
            "model.heads=4",
            "model.attention.qk_nope_head_dim=64",
            "model.attention.qk_rope_head_dim=64",
            "model.intermediate_size=256",
            "model.moe.n_shared_experts=4",
        ],
        modes: &MODES,
        layouts: &[
            (1, 1, 1, "1f1b"),
            (1, 2, 2, "1f1b"),
            (2, 1, 1, "interleaved"),
            (2, 2, 2, "dualpipe"),
            (4, 1, 1, "zb1p"),
        ],
    },
    Runs {
        tp: 4,
        grad_shards: 4,
        expert_union: 2,
        layers: 4,
        more: &["schedule.batch=16", "seq_len=8", "model.heads=4"],
        modes: &[MODES[0], MODES[1]],
        layouts: &[(1, 1, 1, "1f1b"), (2, 2, 2, "dualpipe")],
    },
];

/// Steps where all is asked for, and else.
const LONG: [usize; 2] = [5, 5];
const SHORT: [usize; 2] = [2, 1];

/// Whether FATHOM_LAYOUTS asks for long runs, in all modes.
fn all_is_asked_for() -> bool {
    std::env::var_os("FATHOM_LAYOUTS").is_some_and(|asked| asked == "all")
}

/// Steps of a run on its first layout, and on the next.
fn counts() -> [usize; 2] {
    if all_is_asked_for() { LONG } else { SHORT }
}

/// A run with the first settings that goes on with the next comes to the whole one's outcome.
fn assert_goes_on(first: &[String], then: &[String], whole: &Outcome, name: &str) {
    let (folder, counts) = (tempfile::tempdir().unwrap(), counts());
    let (mut logs, saved) = steps(&words(first), None, counts[0], folder.path());
    let (more, saved) = steps(&words(then), Some(saved), counts[1], folder.path());
    logs.extend(more);
    Outcome::of(logs, saved).assert_is(whole, name);
}

/// Every layout runs some steps, is gone on with on the next layout, and is compared with one
/// process, or with its tensor parallel ranks alone, whose sums are part of the result: rows of the
/// page's table.
fn compared(runs: &[Runs]) -> String {
    let (all, counts) = (all_is_asked_for(), counts());
    let mut rows = String::new();
    for Runs { tp, grad_shards, expert_union, layers, more, modes, layouts } in runs {
        let mut run = vec![
            format!("parallel.tp={tp}"),
            format!("grad_shards={grad_shards}"),
            format!("expert_union={expert_union}"),
            format!("model.layers={layers}"),
        ];
        run.extend(more.iter().map(|set| (*set).to_owned()));
        let with = |mode: &str, layout: &[String]| -> Vec<String> {
            let all = run.iter().chain(layout).cloned();
            all.chain([mode.to_owned()]).collect()
        };
        // Four tensor parallel ranks have no whole FP8 tiles.
        let modes = if all && *tp < 4 { &MODES[..] } else { modes };
        let whole = |mode: &&str| {
            let (set, count) = (with(mode, &[]), counts.iter().sum());
            if *tp > 1 { many(&words(&set), count) } else { one(&words(&set), count) }
        };
        let wholes: Vec<Outcome> = modes.iter().map(whole).collect();
        for (i, &layout) in layouts.iter().enumerate() {
            let next = layouts[(i + 1) % layouts.len()];
            for (mode, whole) in modes.iter().zip(&wholes) {
                let [first, then] = [layout, next].map(|layout| with(mode, &settings(layout)));
                let name = format!("tp {tp}, {layout:?}, {next:?}, {mode}");
                assert_goes_on(&first, &then, whole, &name);
            }
            let (pp, dp, ep, schedule) = layout;
            let (pp2, dp2, ep2, schedule2) = next;
            let [first, then] = counts;
            let equal = MODES.map(|mode| if modes.contains(&mode) { "equal" } else { "" });
            let tp = if *tp > 1 { format!("| {tp} ") } else { String::new() };
            rows += &format!(
                "{tp}| {grad_shards} | {expert_union} | {layers} | {pp} | {dp} | {ep} | {schedule} | \
                 pp {pp2} dp {dp2} ep {ep2} {schedule2} | {first} + {then} | {} |\n",
                equal.join(" | ")
            );
        }
    }
    rows
}

const HEADER: &str = "| grad_shards | expert_union | layers | pp | dp | ep | schedule | then | \
                      steps | fp32 | bf16 | fp8 |";
const LINE: &str = "|---:|---:|---:|---:|---:|---:|---|---|---|---|---|---|";

/// Holds a table of the page to these rows; `FATHOM_BLESS=1` writes them there. The page has the
/// short runs: long ones are printed.
fn assert_on_page(header: &str, rows: &str) {
    static PAGE: Mutex<()> = Mutex::new(());
    let _turn = PAGE.lock().unwrap_or_else(PoisonError::into_inner);
    if all_is_asked_for() {
        println!("{header}\n{rows}");
        return;
    }
    let page = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/distributed.md");
    let text = std::fs::read_to_string(&page).unwrap();
    let begin = format!("\n{}\n", header.lines().next().unwrap());
    let (before, table) = text.split_once(&begin).expect("the table's first line");
    let after = table.split_once("\n\n").map_or(String::new(), |(_, after)| format!("\n{after}"));
    let expected = format!("{before}\n{header}\n{rows}{after}");
    if std::env::var_os("FATHOM_BLESS").is_some() {
        std::fs::write(&page, &expected).unwrap();
    }
    let text = std::fs::read_to_string(&page).unwrap();
    assert!(text == expected, "docs/distributed.md has another table; FATHOM_BLESS=1 rewrites it");
}

#[test]
fn the_layouts_of_the_table_have_the_bits_of_one_process() {
    assert_on_page(&format!("{HEADER}\n{LINE}"), &compared(&TABLE));
}

#[test]
fn layouts_of_tensor_parallel_ranks_have_the_bits_of_these_alone() {
    assert_on_page(&format!("| tp {HEADER}\n|---:{LINE}"), &compared(&TENSOR_PARALLEL));
}

fn words(settings: &[String]) -> Vec<&str> {
    settings.iter().map(String::as_str).collect()
}

/// An expert's rows of a union are one call, and that is another result than calls of their own.
#[test]
fn a_union_of_shards_is_part_of_the_result() {
    let set = ["grad_shards=4", "schedule.batch=8"];
    let alone = one(&set, 2);
    assert_ne!(alone.tensors, one(&[&set[..], &["expert_union=4"]].concat(), 2).tensors);
}

/// The report's shape in miniature: pp 16, ep 4, dp 4, both directions of DualPipe, 64 ranks.
#[test]
fn sixty_four_ranks_are_one_process() {
    let set = [
        "model.layers=16",
        "grad_shards=8",
        "expert_union=4",
        "schedule.batch=128",
        "seq_len=8",
        "model.hidden_size=32",
        "model.intermediate_size=32",
        "model.moe.intermediate_size=32",
    ];
    let layout = settings((16, 4, 4, "dualpipe"));
    let all = [&set[..], &words(&layout)].concat();
    many(&all, 1).assert_is(&one(&set, 1), "64 ranks");
}

/// A tied head, two MTP modules and a dropped token: what several stages share.
#[test]
fn what_stages_share_is_added_in_order() {
    for more in [
        &["model.tie_word_embeddings=true", "model.mtp_depth=2"][..],
        &["model.mtp_depth=2", "model.mtp_kind=\"parallel\""],
        &["model.mtp_depth=0", "schedule.capacity.devices=2", "schedule.capacity.factor=1.0"],
    ] {
        let set = ["model.layers=4", "grad_shards=4", "expert_union=2", "schedule.batch=16"];
        let set = [&set[..], more].concat();
        let whole = one(&set, 2);
        for layout in [(2, 2, 2, "dualpipe"), (4, 2, 1, "1f1b"), (1, 2, 2, "1f1b")] {
            let layout = settings(layout);
            let all = [&set[..], &words(&layout)].concat();
            many(&all, 2).assert_is(&whole, &format!("{more:?} {layout:?}"));
        }
    }
}

#[test]
fn a_run_goes_on_on_another_layout_with_the_same_bits() {
    let set = ["model.layers=4", "grad_shards=4", "expert_union=2", "schedule.batch=16"];
    let layouts: [&[&str]; 3] = [
        &["parallel.pp=2", "parallel.dp=2", "parallel.ep=2", "parallel.schedule=\"dualpipe\""],
        &["parallel.dp=4", "parallel.ep=2"],
        &["parallel.pp=4", "parallel.stage_layers=[1,1,1,1]", "parallel.ep=1"],
    ];
    let whole = one(&set, 4);
    let (mut logs, mut saved) = (Vec::new(), None);
    for (layout, count) in layouts.into_iter().zip([1, 2, 1]) {
        let folder = tempfile::tempdir().unwrap();
        let (new, written) =
            steps(&[&set[..], layout].concat(), saved.take(), count, folder.path());
        logs.extend(new);
        saved = Some(written);
    }
    Outcome::of(logs, saved.unwrap()).assert_is(&whole, "three layouts");
    // And one process goes on from what ranks wrote.
    let folder = tempfile::tempdir().unwrap();
    let (mut logs, saved) = steps(&[&set[..], layouts[0]].concat(), None, 2, folder.path());
    let mut trainer = Trainer::resume(config(&set), Reference, saved).unwrap();
    logs.extend((0..2).map(|_| done(trainer.step(&|| false).unwrap())));
    Outcome::of(logs, trainer.save().unwrap()).assert_is(&whole, "ranks, then one process");
}

/// Documents so short that a micro-batch has no row of the second MTP module, beside one that has:
/// the module's experts are the same call for both.
#[test]
fn micro_batches_without_rows_of_a_module_take_part() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("documents.jsonl");
    // Eight documents of two tokens fill a sequence of 16; then one that is longer.
    let line = |text: &str| format!("{{\"text\": \"{text}\"}}\n");
    let sequence = |i: usize| match i % 2 {
        0 => (0..8).map(|j| line(&char::from(b'a' + (i + j) as u8 % 26).to_string())).collect(),
        _ => line(&format!("document {i} ").repeat(2)[..15]),
    };
    std::fs::write(&path, (0..40).map(sequence).collect::<String>()).unwrap();
    let source = format!("data.sources=[{{format=\"jsonl\",path={:?}}}]", path.to_str().unwrap());
    for mode in MODES {
        let set = [
            mode,
            &source,
            "data.mask_documents=true",
            "data.shuffle=false",
            "data.duplicates.exact=false",
            "model.mtp_depth=2",
            "grad_shards=2",
            "expert_union=2",
            "schedule.batch=4",
        ];
        let whole = one(&set, 2);
        let layout = ["parallel.dp=2", "parallel.ep=2"];
        many(&[&set[..], &layout].concat(), 2).assert_is(&whole, mode);
    }
}

#[test]
fn a_value_that_is_not_finite_is_reported_as_in_one_process() {
    let set = ["recipe.mode=\"fp32\"", "model.layers=4", "grad_shards=2", "schedule.batch=8"];
    assert_reported_alike(&set, &["parallel.pp=2", "parallel.dp=2"]);
    let parts = [&set[..], &["context_shards=2"]].concat();
    assert_reported_alike(&parts, &["parallel.pp=2", "parallel.cp=2", "parallel.ep=2"]);
}

/// What a run and its four ranks say of a weight that is not finite, or too large.
fn assert_reported_alike(set: &[&str], layout: &[&str]) {
    let mut trainer = Trainer::new(config(set), Reference).unwrap();
    done(trainer.step(&|| false).unwrap());
    let saved = trainer.save().unwrap();
    let poisoned = |name: &str, value: f32| {
        let mut saved = saved.clone();
        let (_, tensor) = saved.tensors.iter_mut().find(|(n, _)| n == name).unwrap();
        tensor.as_mut_slice::<f32>().fill(value);
        saved
    };
    for (name, value) in [
        ("weights/model.layers.2.self_attn.o_proj.weight", f32::MAX),
        ("weights/model.norm.weight", f32::NAN),
    ] {
        let saved = poisoned(name, value);
        let mut one = Trainer::resume(config(set), Reference, saved.clone()).unwrap();
        let Err(TrainError::Diverged(expected)) = one.step(&|| false) else { panic!("{name}") };
        let all = [set, layout].concat();
        let shared = Shared::open(config(&all), Some(Arc::new(saved))).unwrap();
        let main = move |exchange| {
            let mut trainer = RankTrainer::new(&shared, Reference, exchange)?;
            match trainer.step(&|| false) {
                Err(TrainError::Diverged(found)) => Ok(found),
                Err(error) => Err(error),
                Ok(outcome) => panic!("{outcome:?}"),
            }
        };
        for end in threads::run(4, Duration::from_secs(300), main, &mut || ()) {
            match end {
                End::Returned(Ok(found)) => assert_eq!(found.to_string(), expected.to_string()),
                other => panic!("{name}: {other:?}"),
            }
        }
    }
}

#[test]
fn ranks_of_other_configurations_are_refused_with_both_sides() {
    let shared = |seed: &str| Shared::open(config(&["grad_shards=2", "parallel.dp=2", seed]), None);
    let both = [shared("seed=1").unwrap(), shared("seed=2").unwrap()];
    let main = move |exchange: Arc<dyn fathom_reference::exchange::Exchange>| {
        let own = &both[exchange.rank()];
        RankTrainer::new(own, Reference, exchange).map(|_| ())
    };
    let ends = threads::run(2, Duration::from_secs(60), main, &mut || ());
    let words = format!("{ends:?}");
    assert!(words.contains("seed = 1") && words.contains("seed = 2"), "{words}");
}

/// The trace of a run shows what the schedule says, in its order, and nothing twice at once.
#[test]
fn the_executed_timeline_is_the_schedules() {
    let set = [
        "model.layers=4",
        "grad_shards=4",
        "schedule.batch=16",
        "parallel.pp=2",
        "parallel.dp=2",
        "parallel.ep=2",
        "parallel.schedule=\"dualpipe\"",
    ];
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("trace.json");
    let mut shared = Shared::open(config(&set), None).unwrap();
    shared.timeline.trace = Some(path.clone());
    let main = move |exchange| {
        let mut trainer = RankTrainer::new(&shared, Reference, exchange)?;
        let logs = [done(trainer.step(&|| false)?), done(trainer.step(&|| false)?)];
        trainer.end()?;
        Ok::<_, TrainError>(logs)
    };
    for end in threads::run(4, Duration::from_secs(300), main, &mut || ()) {
        let End::Returned(Ok(logs)) = end else { panic!("{end:?}") };
        for StepLog { seconds, bubble_seconds, exposed_seconds, .. } in logs {
            let [bubble, exposed] = [bubble_seconds.unwrap(), exposed_seconds.unwrap()];
            assert!(bubble > 0.0 && exposed > 0.0 && bubble + exposed < seconds);
        }
    }
    let trace: serde_json::Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    let events = trace["traceEvents"].as_array().unwrap();
    let ns = |v: &serde_json::Value| (v.as_f64().unwrap() * 1e3).round() as u64;
    let spans = |rank: usize, thread: u32| {
        let own = |e: &&serde_json::Value| e["ph"] == "X" && e["pid"] == rank && e["tid"] == thread;
        let span = |e: &serde_json::Value| {
            let (name, begin) = (e["name"].as_str().unwrap().to_owned(), ns(&e["ts"]));
            (begin, begin + ns(&e["dur"]), name)
        };
        let mut spans: Vec<(u64, u64, String)> = events.iter().filter(own).map(span).collect();
        spans.sort();
        spans
    };
    let schedule = config(&set).pipeline(16).unwrap();
    let own_parts =
        ["attention", "mlp"].iter().flat_map(|c| ["F", "B", "W"].map(|p| format!("{c} {p}")));
    let own_parts: Vec<String> = own_parts.collect();
    let mut instructions = Vec::new();
    for rank in 0..4 {
        let [plan, compute, waits] = [0, 1, 2].map(|thread| spans(rank, thread));
        for thread in [&plan, &compute, &waits] {
            let apart = |pair: &[(u64, u64, String)]| pair[0].1 <= pair[1].0;
            assert!(thread.windows(2).all(apart), "rank {rank} does two things at once");
        }
        let ops = schedule.ranks[rank / 2].iter();
        let words: Vec<String> = ops.map(|&op| fathom_schedule::draw::op_text(op)).collect();
        let names: Vec<&String> = plan.iter().map(|(.., name)| name).collect();
        assert_eq!(names, words.iter().chain(&words).collect::<Vec<_>>(), "rank {rank}");
        for part in &own_parts {
            assert!(compute.iter().any(|(.., name)| name == part), "rank {rank}: no {part}");
        }
        for part in ["dispatch F", "combine F", "dispatch B", "combine B"] {
            assert!(waits.iter().any(|(.., name)| name == part), "rank {rank}: no {part}");
        }
        instructions.push(plan);
    }
    // Two steps of eight micro-batches a pipeline, one boundary, forward and backward.
    let mut arrows = std::collections::BTreeMap::<u64, Vec<(usize, u64)>>::new();
    for e in events.iter().filter(|e| e["ph"] == "s" || e["ph"] == "f") {
        let end = (e["pid"].as_u64().unwrap() as usize, ns(&e["ts"]));
        arrows.entry(e["id"].as_u64().unwrap()).or_default().push(end);
    }
    assert_eq!(arrows.len(), 2 * 8 * 2 * 2);
    for ends in arrows.values() {
        let [(from, sent), (to, received)] = ends[..] else { panic!("{ends:?}") };
        assert!(from != to && from % 2 == to % 2 && sent <= received, "{ends:?}");
    }
}

/// The most that the backend of each rank held in a step.
fn held(set: &[&str]) -> Vec<u64> {
    let shared = Shared::open(config(set), None).unwrap_or_else(|e| panic!("{e}"));
    let world = shared.config.parallel.world();
    let main = move |exchange| {
        let mut trainer = RankTrainer::new(&shared, Ledger::new(Reference), exchange)?;
        trainer.backend().inner().reset_peak();
        done(trainer.step(&|| false)?);
        Ok::<_, TrainError>(trainer.backend().inner().alive().peak)
    };
    let ends = threads::run(world, Duration::from_secs(300), main, &mut || ());
    let peak = |end| match end {
        End::Returned(Ok(peak)) => peak,
        other => panic!("{set:?}: {other:?}"),
    };
    ends.into_iter().map(peak).collect()
}

/// A rank holds what its instructions need, not more than a tenth beyond it: told by walking the
/// instructions on the backend that computes nothing, and seen.
#[test]
fn a_rank_holds_what_its_instructions_need() {
    let run = ["model.layers=4", "schedule.batch=16", "optim.ema_decay=0"];
    let mb = |bytes: u64| bytes as f64 / 1e6;
    let mut wrong = Vec::new();
    for (tp, cp, shards, union, layout) in [
        (1, 1, 1, 1, (2, 1, 1, "1f1b")),
        (1, 1, 4, 1, (2, 1, 1, "1f1b")),
        (1, 1, 2, 1, (1, 2, 1, "1f1b")),
        (1, 1, 2, 1, (2, 1, 1, "dualpipe")),
        (1, 1, 2, 1, (2, 1, 1, "zb1p")),
        (1, 1, 4, 2, (2, 2, 2, "dualpipe")),
        (1, 1, 2, 1, (2, 1, 1, "dualpipev")),
        (2, 1, 1, 1, (1, 1, 1, "1f1b")),
        (2, 1, 4, 2, (2, 2, 2, "dualpipe")),
        (1, 2, 1, 1, (1, 1, 2, "1f1b")),
        (1, 2, 2, 1, (2, 1, 2, "dualpipe")),
    ] {
        // Tensor parallel ranks of this model have no whole FP8 tiles.
        let modes = if tp > 1 { &MODES[1..2] } else { &MODES[1..] };
        for &mode in modes {
            let (shards, union) =
                (format!("grad_shards={shards}"), format!("expert_union={union}"));
            let layout_set = settings(layout);
            let ranks = [format!("parallel.tp={tp}"), format!("parallel.cp={cp}")];
            let layout_set = [words(&layout_set), words(&ranks)].concat();
            let set = [&run[..], &layout_set, &[&shards, &union, mode]].concat();
            let (pp, dp, ..) = layout;
            let config = config(&set);
            let told: Vec<RankMemory> =
                (0..pp).map(|pp| rank::rank(&config, pp, 16).unwrap()).collect();
            for (number, seen) in held(&set).into_iter().enumerate() {
                let told = &told[number / (dp * cp * tp)];
                let ratio = seen as f64 / told.sum() as f64;
                let line = format!(
                    "tp {tp} cp {cp} {layout:?} {mode} {shards} rank {number}: states {:.2} weights {:.2} gradients \
                     {:.2} activations {:.2} MB, seen {:.2} MB, {ratio:.3}",
                    mb(told.states),
                    mb(told.weights),
                    mb(told.gradients),
                    mb(told.activations),
                    mb(seen)
                );
                println!("{line}");
                if !(0.9..1.1).contains(&ratio) {
                    wrong.push(line);
                }
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}
