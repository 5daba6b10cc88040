//! Parts of sequences: what they change in one process, and that context parallel ranks, which
//! share them out, change nothing further.

use super::*;

/// Layouts that are compared with one process: pp, dp, cp, ep, schedule.
type Layout = (usize, usize, usize, usize, &'static str);

fn settings((pp, dp, cp, ep, schedule): Layout) -> Vec<String> {
    let all = super::settings((pp, dp, ep, schedule));
    all.into_iter().chain([format!("parallel.cp={cp}")]).collect()
}

/// Runs of one model, `context_shards`, `grad_shards` and `expert_union`, and their layouts.
struct Runs {
    context_shards: usize,
    grad_shards: usize,
    expert_union: usize,
    more: &'static [&'static str],
    layouts: &'static [Layout],
}

const TABLE: [Runs; 3] = [
    Runs {
        context_shards: 2,
        grad_shards: 4,
        expert_union: 2,
        more: &["model.layers=4"],
        layouts: &[
            (1, 1, 1, 1, "1f1b"),
            (1, 1, 2, 2, "1f1b"),
            (1, 2, 2, 4, "1f1b"),
            (2, 1, 2, 2, "1f1b"),
            (2, 2, 2, 4, "dualpipe"),
            (2, 2, 1, 2, "zb-v"),
            (2, 2, 2, 2, "interleaved"),
            (4, 1, 2, 2, "zb1p"),
            (2, 2, 2, 4, "dualpipev"),
        ],
    },
    // More parts than ranks, and as many.
    Runs {
        context_shards: 4,
        grad_shards: 2,
        expert_union: 1,
        more: &["model.layers=4", "model.heads=4"],
        layouts: &[
            (1, 1, 2, 2, "1f1b"),
            (1, 1, 4, 4, "1f1b"),
            (1, 2, 1, 1, "1f1b"),
            (2, 1, 2, 2, "dualpipe"),
        ],
    },
    // Several sequences a micro-batch, whose parts do not stand in order.
    Runs {
        context_shards: 2,
        grad_shards: 2,
        expert_union: 1,
        more: &["model.layers=2", "micro_batch=2", "model.mtp_depth=2"],
        layouts: &[(1, 1, 2, 2, "1f1b"), (2, 1, 2, 2, "1f1b"), (1, 2, 1, 1, "1f1b")],
    },
];

const HEADER: &str = "| context_shards | grad_shards | expert_union | pp | dp | cp | ep | schedule \
                      | then | steps | fp32 | bf16 | fp8 |";
const LINE: &str = "|---:|---:|---:|---:|---:|---:|---:|---|---|---|---|---|---|";

#[test]
fn layouts_of_context_parallel_ranks_have_the_bits_of_one_process() {
    let mut rows = String::new();
    for Runs { context_shards, grad_shards, expert_union, more, layouts } in TABLE {
        let run = [
            format!("context_shards={context_shards}"),
            format!("grad_shards={grad_shards}"),
            format!("expert_union={expert_union}"),
            "schedule.batch=16".to_owned(),
        ];
        let with = |mode: &str, layout: &[String]| -> Vec<String> {
            let more = more.iter().map(|set| (*set).to_owned());
            let all = run.iter().chain(layout).cloned().chain(more);
            all.chain([mode.to_owned()]).collect()
        };
        let wholes = MODES.map(|mode| one(&words(&with(mode, &[])), counts().iter().sum()));
        for (i, &layout) in layouts.iter().enumerate() {
            let next = layouts[(i + 1) % layouts.len()];
            for (mode, whole) in MODES.iter().zip(&wholes) {
                let [first, then] = [layout, next].map(|layout| with(mode, &settings(layout)));
                let name = format!("{context_shards} parts, {layout:?}, {next:?}, {mode}");
                assert_goes_on(&first, &then, whole, &name);
            }
            let (pp, dp, cp, ep, schedule) = layout;
            let (pp2, dp2, cp2, ep2, schedule2) = next;
            let [first, then] = counts();
            rows += &format!(
                "| {context_shards} | {grad_shards} | {expert_union} | {pp} | {dp} | {cp} | {ep} | \
                 {schedule} | pp {pp2} dp {dp2} cp {cp2} ep {ep2} {schedule2} | {first} + {then} | \
                 equal | equal | equal |\n"
            );
        }
    }
    assert_on_page(&format!("{HEADER}\n{LINE}"), &rows);
}

/// The gradient of the first step, by parameter: the first moments, which are a tenth of it.
fn gradients(set: &[&str]) -> (Vec<StepLog>, Vec<(String, Tensor)>) {
    let run = ["optim.moments=\"fp32\"", "optim.clip=0", "optim.beta1=0.9"];
    let Outcome { logs, tensors, .. } = one(&[&run[..], set].concat(), 1);
    let first = tensors.into_iter().filter(|(name, _)| name.starts_with("first/")).collect();
    (logs, first)
}

fn values(tensor: &Tensor) -> Vec<f64> {
    match tensor.dtype() {
        fathom_trace::DType::F64 => tensor.as_slice::<f64>().to_vec(),
        _ => tensor.as_slice::<f32>().iter().map(|&x| f64::from(x)).collect(),
    }
}

/// The parts of a sequence add up to its gradient: in F64 to the last digits, in F32 within its
/// rounding, and there to other bits.
#[test]
fn parts_of_sequences_change_the_gradient_by_rounding_alone() {
    let variants: [&[&str]; 4] = [
        &[],
        &["model.mtp_depth=2", "micro_batch=2", "schedule.balance_kind=\"batch\""],
        &[
            "model.attention={kind=\"gqa\",kv_heads=2,head_dim=32}",
            "model.tie_word_embeddings=true",
        ],
        &["model.mtp_depth=2", "model.mtp_kind=\"parallel\"", "expert_union=2"],
    ];
    for variant in variants {
        for (mode, tolerance) in [("f64", 1e-12), ("fp32", 2e-5)] {
            let mode_set = format!("recipe.mode={mode:?}");
            let run = [variant, &["grad_shards=2", "schedule.batch=4", &mode_set]].concat();
            let (logs, whole) = gradients(&run);
            for shards in ["context_shards=2", "context_shards=8"] {
                let (of_parts, parts) = gradients(&[&run[..], &[shards]].concat());
                let name = format!("{variant:?} {mode} {shards}");
                let near = |a: f64, b: f64| (a - b).abs() <= tolerance * a.abs().max(1e-30);
                let [a, b] = [&logs[0], &of_parts[0]];
                assert!(near(a.loss, b.loss) && near(a.balance_loss, b.balance_loss), "{name}");
                assert_eq!(a.expert_load, b.expert_load, "{name}");
                let mut other_bits = 0;
                for ((parameter, a), (of, b)) in whole.iter().zip(&parts) {
                    assert_eq!(parameter, of);
                    let [a_values, b_values] = [a, b].map(values);
                    let largest = a_values.iter().fold(0.0f64, |m, x| m.max(x.abs()));
                    let apart = a_values.iter().zip(&b_values).map(|(a, b)| (a - b).abs());
                    let apart = apart.fold(0.0f64, f64::max);
                    assert!(apart <= tolerance * largest, "{name}: {parameter} {apart} {largest}");
                    other_bits += usize::from(a != b);
                }
                assert!(other_bits > 0, "{name}: a key of the result changes it");
            }
        }
    }
}

/// With one sequence a micro-batch everything but the order of a dense weight's sum is as with
/// whole sequences: the routed experts' gradients have the same bits.
#[test]
fn routed_experts_do_not_see_the_parts() {
    for mode in MODES {
        let run = [mode, "grad_shards=2", "schedule.batch=4"];
        let whole = gradients(&run).1;
        let parts = gradients(&[&run[..], &["context_shards=4"]].concat()).1;
        let mut experts = 0;
        for ((name, whole), (_, parts)) in whole.iter().zip(&parts) {
            if name.contains(".mlp.experts.") {
                assert!(whole == parts, "{mode}: {name}");
                experts += 1;
            }
        }
        assert!(experts > 0, "{mode}");
    }
}

/// Grouping sequences into micro-batches changes no bit of what tokens pass one by one: a part's
/// chain goes through the sequences in order.
#[test]
fn micro_batches_change_no_bit_of_dense_weights() {
    for mode in MODES {
        let run = [mode, "context_shards=2", "schedule.batch=4", "schedule.balance_loss=0"];
        let [of_one, of_four] = ["micro_batch=1", "micro_batch=4"].map(|n| {
            let dense = ["model.moe.first_dense=3"];
            gradients(&[&run[..], &dense, &[n]].concat()).1
        });
        assert!(of_one == of_four, "{mode}");
    }
}

/// Documents that are masked from each other end anywhere in a part, or go over several.
#[test]
fn masked_documents_lie_in_parts() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("documents.jsonl");
    let document = |i: usize| {
        let text = format!("document {i} ").repeat(3);
        format!("{{\"text\": \"{}\"}}\n", &text[..i * 7 % 29 + 1])
    };
    std::fs::write(&path, (0..60).map(document).collect::<String>()).unwrap();
    let source = format!("data.sources=[{{format=\"jsonl\",path={:?}}}]", path.to_str().unwrap());
    for mode in MODES {
        let set = [
            mode,
            &source,
            "data.mask_documents=true",
            "data.duplicates.exact=false",
            "model.mtp_depth=2",
            "micro_batch=2",
            "context_shards=4",
            "model.heads=4",
            "schedule.batch=4",
        ];
        let whole = one(&set, 2);
        for layout in [["parallel.cp=2", "parallel.ep=2"], ["parallel.cp=4", "parallel.ep=4"]] {
            many(&[&set[..], &layout].concat(), 2).assert_is(&whole, mode);
        }
    }
}

/// Grouped queries, a tied head, parallel heads, dense models without experts, recomputation.
#[test]
fn other_models_lie_on_context_parallel_ranks() {
    let dense = "model.moe.first_dense=3";
    let variants: [(&[&str], &[&str]); 4] = [
        (&["model.attention={kind=\"gqa\",kv_heads=2,head_dim=32}"], &["parallel.ep=2"]),
        (
            &["model.tie_word_embeddings=true", "schedule.balance_kind=\"batch\""],
            &["parallel.ep=2"],
        ),
        (&["model.mtp_depth=2", "model.mtp_kind=\"parallel\""], &["parallel.ep=2"]),
        (&[dense, "recipe.recompute_up_projections=true"], &["parallel.ep=2"]),
    ];
    for (variant, layout) in variants {
        for mode in &MODES[1..] {
            let set = [variant, &[mode, "context_shards=2", "schedule.batch=4"]].concat();
            let whole = one(&set, 2);
            let layout = [layout, &["parallel.cp=2", "parallel.pp=2"]].concat();
            many(&[&set[..], &layout].concat(), 2).assert_is(&whole, &format!("{set:?}"));
        }
    }
}

/// Tensor parallel ranks with context parallel ones beside them, against the former alone.
#[test]
fn tensor_parallel_ranks_have_context_parallel_ones() {
    for mode in &MODES[..2] {
        let run = [mode, "parallel.tp=2", "model.heads=4", "context_shards=2", "schedule.batch=4"];
        let alone = many(&run, 2);
        let context = ["parallel.cp=2", "parallel.ep=2"];
        many(&[&run[..], &context].concat(), 2).assert_is(&alone, mode);
    }
}

#[test]
fn other_parts_are_refused_where_a_run_goes_on() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path();
    let config = config(&["context_shards=2", "parallel.cp=2", "parallel.ep=2"]);
    std::fs::write(out.join("run.toml"), config.to_toml()).unwrap();
    let asked = |set: &[&str]| {
        let set: Vec<Setting> = set.iter().map(|s| Setting::set(s)).collect();
        let path = out.join("run.toml");
        resumed_config(out, move |_| Ok(TrainConfig::read(&path, &set).unwrap()))
    };
    let e = asked(&["context_shards=4"]).unwrap_err().to_string();
    assert!(e.contains("context_shards is 2 there and 4 on the command line"), "{e}");
    let one = asked(&["parallel.cp=1", "parallel.ep=1"]).unwrap().unwrap();
    assert_eq!((one.parallel.cp, one.context_shards), (1, 2));
}
