//! Training: what must not change a bit, resuming, divergence, and falling loss.

use std::cell::RefCell;
use std::collections::BTreeSet;

use fathom_reference::Tensor;
use fathom_reference::backend::{Call, Recorder, Reference};
use fathom_reference::train::{Setting, StepLog, StepOutcome, TrainConfig, TrainError, Trainer};

/// A run small enough for a test: sequences of 32, a vocabulary of bytes.
fn config(set: &[&str]) -> TrainConfig {
    let mut all: Vec<Setting> = [
        "steps=4",
        "seq_len=32",
        "micro_batch=4",
        "model.vocab_size=384",
        "model.hidden_size=64",
        "model.intermediate_size=64",
        "model.moe.intermediate_size=64",
        "data.tokenizer.vocab_size=280",
        "data.tokenizer.train_bytes=20000",
    ]
    .map(Setting::set)
    .to_vec();
    all.extend(set.iter().map(|s| Setting::set(s)));
    TrainConfig::preset("tiny", &all).unwrap_or_else(|e| panic!("{e}"))
}

fn trainer(set: &[&str]) -> Trainer<Reference> {
    Trainer::new(config(set), Reference).unwrap_or_else(|e| panic!("{e}"))
}

fn step(trainer: &mut Trainer<Reference>) -> StepLog {
    match trainer.step(&|| false).unwrap_or_else(|e| panic!("{e}")) {
        StepOutcome::Done(log) => *log,
        other => panic!("{other:?}"),
    }
}

/// Everything that a step changes, by name.
fn state(trainer: &Trainer<Reference>) -> Vec<(String, Tensor)> {
    trainer.save().unwrap().tensors
}

fn assert_same(a: &[(String, Tensor)], b: &[(String, Tensor)], skip: &str) {
    assert_eq!(a.len(), b.len());
    for ((name, a), (_, b)) in a.iter().zip(b) {
        let skipped = !skip.is_empty() && name.contains(skip);
        assert!(skipped || a == b, "{name} differs");
    }
}

#[test]
fn threads_change_no_bit() {
    let run = |threads| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| {
            let mut trainer = trainer(&["grad_shards=2"]);
            let losses = [step(&mut trainer).loss, step(&mut trainer).loss];
            (losses, state(&trainer))
        })
    };
    let (one, three) = (run(1), run(3));
    assert_eq!(one.0, three.0);
    assert_same(&one.1, &three.1, "");
}

#[test]
fn regrouping_into_micro_batches_changes_no_bit_of_what_the_contract_names() {
    // After one update, since the second step's dense weights see the first one's experts.
    for (mode, skip) in [("fp32", ""), ("bf16", ".experts."), ("fp8", ".experts.")] {
        let run = |micro_batch: usize| {
            let micro_batch = format!("micro_batch={micro_batch}");
            let mode = format!("recipe.mode={mode:?}");
            // Without clipping the experts' gradients do not reach the others through the norm.
            let set = ["optim.clip=0.0", "grad_shards=2", &micro_batch, &mode];
            let mut trainer = trainer(&set);
            step(&mut trainer);
            state(&trainer)
        };
        assert_same(&run(4), &run(1), skip);
    }
}

/// Fused ops are asked for where the recipe says so, and give the bits of those that they stand
/// for: everything made again or everything kept, and the baselines whose casts they cannot do.
#[test]
fn fused_ops_change_no_bit() {
    let keep = "recipe={recompute_norms=false,recompute_swiglu=false,keep_swiglu_input_fp8=false}";
    let whole = "recipe.fp8={activation_block=[\"all\",\"all\"],gradient_block=[\"all\",\"all\"]}";
    for (set, expected) in [
        ("recipe.mode=\"fp8\"", true),
        (keep, true),
        ("recipe.fp8.gradient_format=\"e5m2\"", true),
        (whole, false),
        ("recipe.mode=\"bf16\"", false),
    ] {
        let run = |fused: &str| {
            let asked = RefCell::new(BTreeSet::new());
            let seen = |call: &Call<'_, Reference>| {
                asked.borrow_mut().insert(call.op.name());
                Ok(())
            };
            let backend = Recorder::new(Reference, seen);
            let mut trainer = Trainer::new(config(&[set, fused]), backend).unwrap();
            trainer.step(&|| false).unwrap();
            let saved = trainer.save().unwrap();
            drop(trainer);
            (saved, asked.into_inner())
        };
        let (apart, asked) = run("recipe.fused=false");
        assert!(asked.is_disjoint(&FUSED.into()), "{set}: {asked:?}");
        assert!(!asked.contains(SUMMED), "{set}: {asked:?}");
        let (fused, asked) = run("recipe.fused=true");
        assert_eq!(asked.is_superset(&FUSED.into()), expected, "{set}: {asked:?}");
        assert_eq!(asked.contains(SUMMED), !expected, "{set}: {asked:?}");
        assert!(apart == fused, "{set}");
    }
}

/// The ops that do the work of several where casts are of one row's values.
const FUSED: [&str; 6] = [
    "add_rms_norm_quantize",
    "dispatch_codes",
    "rms_norm_backward_quantize",
    "rms_norm_quantize",
    "swiglu_backward_quantize",
    "swiglu_quantize",
];
/// The one that there is where they are not.
const SUMMED: &str = "add_rms_norm";

#[test]
fn shards_are_part_of_the_result_and_added_by_the_tree() {
    let weights = |shards: &str| {
        let mut trainer = trainer(&["recipe.mode=\"fp32\"", shards]);
        step(&mut trainer);
        trainer.host_weights().unwrap()
    };
    assert_ne!(weights("grad_shards=1"), weights("grad_shards=4"));
}

#[test]
fn a_resumed_run_is_the_run_that_never_stopped() {
    let mut whole = trainer(&["optim.ema_decay=0.5"]);
    let losses: Vec<f64> = (0..4).map(|_| step(&mut whole).loss).collect();
    let mut first = trainer(&["optim.ema_decay=0.5"]);
    step(&mut first);
    step(&mut first);
    // An interrupted step leaves everything as it was.
    let before = first.save().unwrap();
    assert_eq!(first.step(&|| true).unwrap(), StepOutcome::Interrupted);
    assert_eq!(first.save().unwrap(), before);
    drop(first);
    let mut second = Trainer::resume(config(&["optim.ema_decay=0.5"]), Reference, before).unwrap();
    assert_eq!(second.steps, 2);
    let rest = [step(&mut second).loss, step(&mut second).loss];
    assert_eq!(rest, losses[2..]);
    assert_eq!(second.save().unwrap(), whole.save().unwrap());
    assert!(second.finished());
}

#[test]
fn another_model_or_other_data_is_refused() {
    let mut first = trainer(&[]);
    step(&mut first);
    let saved = first.save().unwrap();
    let refuse = |set: &[&str]| {
        let Err(error) = Trainer::resume(config(set), Reference, saved.clone()) else {
            panic!("{set:?} is accepted")
        };
        error.to_string()
    };
    let e = refuse(&["model.intermediate_size=128"]);
    assert!(e.contains("weights/model.layers.0.mlp") && e.contains("expected F32"), "{e}");
    assert!(refuse(&["optim.moments=\"fp32\""]).contains("first/"));
    assert!(refuse(&["seed=2"]).contains("data position"));
}

#[test]
fn loss_falls_and_the_load_is_reported() {
    let mut trainer = trainer(&["steps=40", "seq_len=64", "data.fim_rate=0.0"]);
    let logs: Vec<StepLog> = (0..40).map(|_| step(&mut trainer)).collect();
    let mean = |logs: &[StepLog]| logs.iter().map(|l| l.loss).sum::<f64>() / logs.len() as f64;
    let (first, last) = (mean(&logs[..5]), mean(&logs[35..]));
    assert!(last < first - 1.0, "{first} to {last}");
    let log = &logs[39];
    // One routed layer and the MTP module's: 4 sequences of 64 tokens, two experts each.
    let layers: Vec<usize> = log.expert_load.iter().map(|(layer, _)| *layer).collect();
    assert_eq!(layers, [1, 2]);
    let load = &log.expert_load[0].1;
    assert_eq!((load.len(), load.iter().sum::<u64>()), (4, 4 * 64 * 2));
    assert!(log.max_violation.iter().all(|v| (0.0..=3.0).contains(v)));
    assert_eq!((log.tokens, log.batch, log.mtp_loss.len()), (40 * 4 * 64, 4, 1));
    assert!(log.balance_loss > 0.0 && log.balance_loss < 1e-2);
}

/// MXFP8 is selected by keys of the recipe, trains beside the report's recipe, and goes on from a
/// checkpoint with the same bits.
#[test]
fn mxfp8_trains_as_the_reports_recipe_does() {
    let mx = [
        "recipe.fp8.activation_block=[1,32]",
        "recipe.fp8.weight_block=[1,32]",
        "recipe.fp8.gradient_block=[1,32]",
        "recipe.fp8.scale=\"mx\"",
        "recipe.fp8.promotion_interval=32",
        "recipe.dispatch_scale=\"mx\"",
    ];
    assert_eq!(config(&mx).recipe.fp8, fathom_reference::precision::Fp8Recipe::mx());
    let losses = |set: &[&str]| {
        let mut trainer = trainer(&[&["steps=12", "schedule.learning_rate=0.003"], set].concat());
        let losses: Vec<f64> = (0..12).map(|_| step(&mut trainer).loss).collect();
        losses
    };
    let (report, mx) = (losses(&[]), losses(&mx));
    for (a, b) in report.iter().zip(&mx) {
        assert!(a != b && (a - b).abs() < 0.05 * a, "{report:?} {mx:?}");
    }
    assert!(mx[11] < 0.9 * mx[0], "{mx:?}");
}

/// Keys of delayed per-tensor scaling, with the report's other baselines of that kind.
const DELAYED: [&str; 7] = [
    "recipe.fp8.activation_block=[\"all\",\"all\"]",
    "recipe.fp8.weight_block=[\"all\",\"all\"]",
    "recipe.fp8.gradient_block=[\"all\",\"all\"]",
    "recipe.fp8.delayed.history=3",
    "recipe.fp8.delayed.margin=1",
    "recipe.fp8.gradient_format=\"e5m2\"",
    "schedule.learning_rate=0.003",
];

/// A step's casts use the scales of the steps before; what the step found is the largest magnitude
/// over its micro-batches, recomputed casts and both products of an operand.
#[test]
fn delayed_scales_follow_from_what_the_steps_before_cast() {
    /// The scale and the largest magnitude of a cast.
    type Cast = (f32, f32);
    let casts: std::sync::Mutex<Vec<Cast>> = std::sync::Mutex::default();
    let backend = Recorder::new(Reference, |call: &Call<'_, Reference>| {
        if call.op.name() == "quantize_delayed" {
            let x = call.inputs[0].as_ref().expect("mandatory");
            // The upper half of a float is its BF16.
            let magnitude = |i| f32::from_bits((x.bits(i) as u32) << 16).abs();
            let largest = (0..x.len()).map(magnitude).fold(0.0, f32::max);
            let scale = call.inputs[2].as_ref().expect("mandatory").as_slice::<f32>()[0];
            casts.lock().unwrap().push((scale, largest));
        }
        Ok(())
    });
    let set = [&DELAYED[..], &["grad_shards=2", "micro_batch=1"]].concat();
    let mut trainer = Trainer::new(config(&set), backend).unwrap_or_else(|e| panic!("{e}"));
    let mut seen: Vec<Vec<Cast>> = Vec::new();
    let mut histories: Vec<Vec<(String, Vec<f32>)>> = Vec::new();
    for _ in 0..2 {
        let StepOutcome::Done(_) = trainer.step(&|| false).unwrap() else { panic!("it diverged") };
        seen.push(std::mem::take(&mut *casts.lock().unwrap()));
        let saved = trainer.save().unwrap().tensors;
        let amax = saved.into_iter().filter(|(name, _)| name.starts_with("amax/"));
        let rows = amax.flat_map(|(name, t)| {
            assert_eq!(t.shape(), [2, 4], "{name}");
            let rows: Vec<_> = t.as_slice::<f32>().chunks(4).map(<[f32]>::to_vec).collect();
            rows.into_iter().enumerate().map(move |(i, row)| (format!("{name} {i}"), row))
        });
        histories.push(rows.collect());
    }
    assert!(seen[0].iter().all(|(scale, _)| *scale == 1.0), "a run begins with scales of 1");
    let (first, second) = (&histories[0], &histories[1]);
    let sharing = |scale: f32| first.iter().filter(|(_, row)| row[0] == scale).count();
    let mut told_apart = 0;
    for ((name, one), (_, two)) in first.iter().zip(second) {
        if one[1] == 0.0 {
            // A shared expert reads what the routed ones do, at their site.
            assert!(name.contains("shared") && *one == [1.0, 0.0, 0.0, 0.0], "{name}: {one:?}");
            continue;
        }
        // Half of what fills the format, for the margin: E4M3 for activations, E5M2 for gradients.
        let most = if name.ends_with('0') { 448.0 } else { 57344.0 };
        let largest = one[1].max(two[1]);
        assert_eq!(one[2..], [0.0; 2], "{name}: {one:?}");
        assert_eq!((one[0], two[0]), (most / one[1] / 2.0, most / largest / 2.0), "{name}");
        assert_eq!(two[2..], [one[1], 0.0], "{name}");
        // Casts are known by their scale: where two sites have one largest magnitude they are not.
        if sharing(one[0]) > 1 {
            continue;
        }
        told_apart += 1;
        // All casts of the second step at this site have the first one's scale, and what they met
        // at most is in its history.
        let here = seen[1].iter().filter(|(scale, _)| *scale == one[0]);
        let met: Vec<f32> = here.map(|(_, amax)| *amax).collect();
        assert!(met.len() >= 4 && met.contains(&two[1]), "{name}: {two:?} {met:?}");
        assert!(met.iter().all(|amax| *amax <= two[1]), "{name}: {two:?} {met:?}");
    }
    assert!(told_apart > 20, "{told_apart}");
}

#[test]
fn delayed_scaling_trains_and_resumes_to_the_bit() {
    let losses = |trainer: &mut Trainer<Reference>, n: usize| -> Vec<f64> {
        (0..n).map(|_| step(trainer).loss).collect()
    };
    let set = [&DELAYED[..], &["steps=12"]].concat();
    let mut whole = trainer(&set);
    let all = losses(&mut whole, 12);
    assert!(all[11] < 0.9 * all[0], "{all:?}");
    let mut first = trainer(&set);
    losses(&mut first, 5);
    let saved = first.save().unwrap();
    let mut second = Trainer::resume(config(&set), Reference, saved.clone()).unwrap();
    assert_eq!(losses(&mut second, 7), all[5..]);
    assert_eq!(second.save().unwrap(), whole.save().unwrap());
    // Current scales give other bits, so the histories do count.
    let per_tensor: Vec<&str> = set.iter().filter(|s| !s.contains("delayed")).copied().collect();
    let current = losses(&mut trainer(&per_tensor), 3);
    assert!(current[2] != all[2] && (current[2] - all[2]).abs() < 0.05 * all[2]);
    // Another length of the histories is another run.
    let other = [&set[..], &["recipe.fp8.delayed.history=4"]].concat();
    let Err(error) = Trainer::resume(config(&other), Reference, saved) else { panic!("accepted") };
    assert!(error.to_string().contains("amax/") && error.to_string().contains("[2, 5]"), "{error}");
}

#[test]
fn delayed_scales_are_refused_where_there_is_no_one_history() {
    let refuse = |set: &[&str]| {
        let set: Vec<Setting> = DELAYED.iter().chain(set).map(|s| Setting::set(s)).collect();
        TrainConfig::preset("tiny", &set).unwrap_err().to_string()
    };
    for (key, set) in [
        ("recipe.fp8.activation_block", &["recipe.fp8.activation_block=[1,128]"][..]),
        ("recipe.fp8.gradient_block", &["recipe.fp8.gradient_block=[1,128]"]),
        ("recipe.fp8.scale", &["recipe.fp8.scale=\"pow2\""]),
        ("recipe.fp8.delayed.history", &["recipe.fp8.delayed.history=0"]),
        ("parallel", &["grad_shards=2", "parallel.dp=2"]),
    ] {
        let error = refuse(set);
        assert!(error.contains(key) && error.contains("expected"), "{error}");
    }
}

#[test]
fn selection_biases_move_by_gamma_against_the_load() {
    let mut trainer = trainer(&["schedule.bias_update_speed=0.25"]);
    let log = step(&mut trainer);
    for (layer, load) in &log.expert_load {
        let name = format!("weights/model.layers.{layer}.mlp.gate.e_score_correction_bias");
        let state = state(&trainer);
        let (_, bias) = state.iter().find(|(n, _)| *n == name).unwrap();
        let mean = load.iter().sum::<u64>() as f64 / load.len() as f64;
        let expected = load.iter().map(|&n| match (n as f64).total_cmp(&mean) {
            std::cmp::Ordering::Less => 0.25,
            std::cmp::Ordering::Greater => -0.25,
            std::cmp::Ordering::Equal => 0.0,
        });
        assert_eq!(bias.as_slice::<f32>(), expected.collect::<Vec<f32>>());
    }
}

/// Sets element 5 of a parameter.
fn plant(trainer: &mut Trainer<Reference>, name: &str, value: f32) {
    let id = trainer.model.specs.iter().position(|s| s.name == name);
    let id = id.unwrap_or_else(|| panic!("no parameter {name}"));
    trainer.params.buffers[id].as_mut_slice::<f32>()[5] = value;
}

#[test]
fn divergence_names_layer_op_and_tensor() {
    let mut trainer = trainer(&["recipe.mode=\"fp32\""]);
    step(&mut trainer);
    // The product of layer 1's output projection overflows; no parameter is bad itself.
    plant(&mut trainer, "model.layers.1.self_attn.o_proj.weight", 3e38);
    plant(&mut trainer, "model.layers.1.self_attn.kv_a_layernorm.weight", 1e30);
    let Err(TrainError::Diverged(found)) = trainer.step(&|| false) else { panic!("it goes on") };
    let culprit = found.culprit.clone().unwrap();
    assert_eq!((culprit.op, culprit.place.layer, culprit.place.step), ("gemm", Some(1), 2));
    assert_eq!((culprit.output.tensor.as_str(), culprit.output.shape.len()), ("d", 2));
    let text = found.to_string();
    assert!(text.contains("layer 1, attention, forward, micro-batch 0: op gemm"), "{text}");
    // A parameter that is bad before the step is named itself.
    plant(&mut trainer, "model.layers.0.mlp.down_proj.weight", f32::NAN);
    let Err(TrainError::Diverged(found)) = trainer.step(&|| false) else { panic!("it goes on") };
    let parameter = found.parameter.unwrap();
    assert_eq!(parameter.tensor, "model.layers.0.mlp.down_proj.weight");
    assert_eq!(parameter.index, [0, 5]);
}

#[test]
fn a_skipped_step_changes_no_weight_and_goes_on_with_the_next_data() {
    let mut trainer = trainer(&["recipe.mode=\"fp32\"", "optim.non_finite=\"skip\""]);
    plant(&mut trainer, "model.norm.weight", f32::INFINITY);
    let before = state(&trainer);
    let outcome = trainer.step(&|| false).unwrap();
    let StepOutcome::Skipped(log, _) = outcome else { panic!("{outcome:?}") };
    assert!(log.skipped);
    assert_same(&before, &state(&trainer), "");
    assert_eq!((trainer.steps, trainer.optimizer.updates), (1, 0));
    plant(&mut trainer, "model.norm.weight", 1.0);
    assert_eq!(step(&mut trainer).step, 2);
}
