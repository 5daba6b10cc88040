//! Training: what must not change a bit, resuming, divergence, and falling loss.

use fathom_reference::Tensor;
use fathom_reference::backend::Reference;
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
