//! Tensor parallel ranks against an emulation that has none: every op of the split model is
//! computed for one rank after the other, sums are added here in the order of ranks, and parameters
//! are cut and put together by this file's own table.
//!
//! What a split model computes is held to the model of one rank, of which it differs by rounding.

use fathom_config::{AttentionConfig, ModelConfig};
use fathom_reference::backend::{Backend, Reference};
use fathom_reference::layers::{Balance, BalanceKind, Gradients};
use fathom_reference::model::{Batch, Model, ParamKind, ParamSpec, Params, StepSettings};
use fathom_reference::ops::collective::AllReduce;
use fathom_reference::optim::{Optimizer, scalar};
use fathom_reference::parallel::Parallel;
use fathom_reference::{DynOp, EngineError};
use fathom_trace::DType;
use half::bf16;

use super::*;

/// Tensor parallel ranks of these tests.
const RANKS: usize = 2;

/// Every buffer is a tensor for each rank.
struct SideBySide;

impl Backend for SideBySide {
    type Buffer = Vec<Tensor>;

    fn name(&self) -> String {
        "side by side".into()
    }

    fn execute(
        &self,
        op: &dyn DynOp,
        inputs: Vec<Option<Vec<Tensor>>>,
    ) -> Result<Vec<Vec<Tensor>>, EngineError> {
        if op.as_any().is::<AllReduce>() {
            let parts = inputs[0].as_ref().unwrap();
            return Ok(vec![vec![sum(parts); RANKS]]);
        }
        let of_rank = |rank: usize| {
            let own = inputs.iter().map(|x| x.as_ref().map(|x| x[rank].clone()));
            Reference.execute(op, own.collect())
        };
        let by_rank = (0..RANKS).map(of_rank).collect::<Result<Vec<_>, _>>()?;
        let output = |i: usize| by_rank.iter().map(|outputs| outputs[i].clone()).collect();
        Ok((0..by_rank[0].len()).map(output).collect())
    }

    fn upload(&self, tensor: Tensor) -> Result<Vec<Tensor>, EngineError> {
        Ok(vec![tensor; RANKS])
    }

    /// What the host reads (losses, rows of experts), every rank has alike.
    fn download(&self, buffer: &Vec<Tensor>) -> Result<Tensor, EngineError> {
        assert!(buffer.iter().all(|x| *x == buffer[0]), "ranks have other values");
        Ok(buffer[0].clone())
    }

    fn dtype(&self, buffer: &Vec<Tensor>) -> DType {
        buffer[0].dtype()
    }

    fn shape(&self, buffer: &Vec<Tensor>) -> Vec<usize> {
        buffer[0].shape().to_vec()
    }
}

/// The first rank's partial product plus the second's and so on in F32, rounded once.
fn sum(parts: &[Tensor]) -> Tensor {
    let add = |values: &[Vec<f32>]| -> Vec<f32> {
        let sum = |i: usize| values[1..].iter().fold(values[0][i], |sum, of| sum + of[i]);
        (0..values[0].len()).map(sum).collect()
    };
    let shape = parts[0].shape();
    match parts[0].dtype() {
        DType::F32 => {
            let values: Vec<_> = parts.iter().map(|x| x.as_slice::<f32>().to_vec()).collect();
            Tensor::from_vec(shape, add(&values))
        }
        DType::BF16 => {
            let wide = |x: &Tensor| x.as_slice::<bf16>().iter().map(|x| x.to_f32()).collect();
            let values: Vec<Vec<f32>> = parts.iter().map(wide).collect();
            let sums = add(&values).into_iter().map(bf16::from_f32);
            Tensor::from_vec(shape, sums.collect::<Vec<bf16>>())
        }
        other => panic!("no sum in {other}"),
    }
}

/// The elements of a whole parameter that a rank has, in its order: heads and widths in equal
/// shares, the columns of what follows them, all of everything else.
fn places(config: &ModelConfig, spec: &ParamSpec, rank: usize) -> Vec<usize> {
    let columns = *spec.shape.last().unwrap();
    let rows = spec.elements() / columns;
    let is = |name: &str| spec.name.ends_with(name) && spec.kind == ParamKind::Linear;
    // Sections of rows, each of one projection, and whether ranks share it out.
    let sections = match config.attention {
        _ if is("gate_up_proj.weight") => vec![(rows / 2, true), (rows / 2, true)],
        _ if is("q_b_proj.weight") || is("kv_b_proj.weight") => vec![(rows, true)],
        AttentionConfig::Gqa { kv_heads, head_dim } if is("qkv.weight") => {
            let [q, kv] = [config.heads, kv_heads].map(|heads| heads * head_dim);
            vec![(q, true), (kv, true), (kv, true)]
        }
        AttentionConfig::Mla { q_lora_rank: None, qk_nope_head_dim, qk_rope_head_dim, .. }
            if is("qkv_a.weight") =>
        {
            let queries = config.heads * (qk_nope_head_dim + qk_rope_head_dim);
            vec![(queries, true), (rows - queries, false)]
        }
        _ => vec![(rows, false)],
    };
    let share = |n: usize| rank * n / RANKS..(rank + 1) * n / RANKS;
    let of_columns = match is("o_proj.weight") || is("down_proj.weight") {
        true => share(columns),
        false => 0..columns,
    };
    let mut places = Vec::new();
    let mut first = 0;
    for (rows, is_shared) in sections {
        for row in if is_shared { share(rows) } else { 0..rows } {
            places.extend(of_columns.clone().map(|column| (first + row) * columns + column));
        }
        first += rows;
    }
    places
}

fn cut(whole: &Tensor, places: &[usize], shape: &[usize]) -> Tensor {
    let values = whole.as_slice::<f32>();
    Tensor::from_vec(shape, places.iter().map(|&i| values[i]).collect::<Vec<f32>>())
}

/// The whole gradient of the ranks' own; what several have is the same.
fn together(config: &ModelConfig, spec: &ParamSpec, parts: &[Tensor]) -> Tensor {
    let mut whole: Vec<Option<f32>> = vec![None; spec.elements()];
    for (rank, part) in parts.iter().enumerate() {
        let places = places(config, spec, rank);
        assert_eq!(places.len(), part.len(), "{}", spec.name);
        for (i, &value) in places.into_iter().zip(part.as_slice::<f32>()) {
            let before = whole[i].replace(value);
            let same = before.is_none_or(|before| before.to_bits() == value.to_bits());
            assert!(same, "{}: ranks have {before:?} and {value} at {i}", spec.name);
        }
    }
    Tensor::from_vec(&spec.shape, whole.into_iter().map(Option::unwrap).collect::<Vec<f32>>())
}

/// Steps of a run of one gradient shard: weights and moments by name, and each step's gradient norm
/// and main loss.
fn emulated(set: &[&str], steps: u64) -> (Vec<(String, Tensor)>, Vec<[f64; 2]>) {
    let shared = Shared::open(config(set), None).unwrap_or_else(|e| panic!("{set:?}: {e}"));
    let config = shared.config;
    let mut loader = shared.loader.lock().unwrap();
    let model = |parallel| Model::new(&config.model, config.recipe.clone(), parallel, 0).unwrap();
    let whole = model(Parallel::default());
    let split = model(Parallel { tp: RANKS, ..Parallel::default() });
    let mut params = whole.init(&Reference, config.seed).unwrap();
    let mut optimizer = Optimizer::new(&config.optim, &whole, &Reference).unwrap();
    let mut logs = Vec::new();
    for step in 1..=steps {
        let of_spec = |((whole, own), values): ((&ParamSpec, &ParamSpec), &Tensor)| {
            let of_rank = |rank| cut(values, &places(&config.model, whole, rank), &own.shape);
            (0..RANKS).map(of_rank).collect::<Vec<Tensor>>()
        };
        let specs = whole.specs.iter().zip(&split.specs);
        let buffers = specs.zip(&params.buffers).map(of_spec).collect();
        let weights = split.training_weights(&SideBySide, Params { buffers }).unwrap();
        let batches: Vec<Batch> = (0..BATCH).map(|_| loader.next().unwrap()).collect();
        let rows =
            |count: &dyn Fn(&Batch) -> usize| batches.iter().map(count).sum::<usize>() as f64;
        let settings = StepSettings {
            step,
            micro_batch: None,
            main_scale: 1.0 / rows(&|b| b.predicted()),
            mtp_scales: vec![0.3 / rows(&|b| b.predicted_mtp(1))],
            balance: vec![Balance {
                kind: BalanceKind::Sequence,
                weight: 1e-2 / rows(&|b| b.segments.len()),
            }],
            capacity: None,
        };
        let mut gradients = split.zero_gradients(&SideBySide).unwrap();
        let mut loss = 0.0;
        for batch in &batches {
            let batch = split.batch(&SideBySide, batch).unwrap();
            let report = split.step(&SideBySide, &weights, &batch, &settings, &mut gradients);
            loss += report.unwrap().main;
        }
        let gradients = split.finish_gradients(&SideBySide, gradients).unwrap();
        let put = |(spec, parts): (&ParamSpec, &Option<Vec<Tensor>>)| {
            parts.as_ref().map(|parts| together(&config.model, spec, parts))
        };
        let buffers = whole.specs.iter().zip(&gradients.buffers).map(put).collect();
        let gradients = Gradients { buffers };
        let clip = optimizer.clip(&whole, &Reference, &gradients).unwrap();
        logs.push([scalar(&clip.norm), loss / rows(&|b| b.predicted())]);
        optimizer.update(&whole, &Reference, &mut params, gradients, (&clip, 1e-3)).unwrap();
    }
    let mut tensors = Vec::new();
    for (i, spec) in whole.specs.iter().enumerate() {
        tensors.push((format!("weights/{}", spec.name), params.buffers[i].clone()));
        for (name, moments) in [("first", &optimizer.first), ("second", &optimizer.second)] {
            tensors.extend(moments[i].clone().map(|t| (format!("{name}/{}", spec.name), t)));
        }
    }
    tensors.sort_by(|(a, _), (b, _)| a.cmp(b));
    (tensors, logs)
}

/// Sequences of a step, each a micro-batch.
const BATCH: usize = 4;

/// One gradient shard, no average, biases that stay.
const RUN: [&str; 7] = [
    "schedule.batch=4",
    "optim.ema_decay=0",
    "schedule.bias_update_speed=0",
    "model.heads=4",
    "model.intermediate_size=256",
    "model.moe.n_shared_experts=2",
    "model.moe.intermediate_size=128",
];

/// Latent attention with a latent of the queries and without, and grouped queries, of heads that
/// leave every rank whole FP8 tiles.
const ATTENTIONS: [&[&str]; 3] = [
    &[
        "model.attention.qk_nope_head_dim=64",
        "model.attention.qk_rope_head_dim=64",
        "model.attention.v_head_dim=64",
    ],
    &[
        "model.attention.q_lora_rank=0",
        "model.attention.qk_nope_head_dim=64",
        "model.attention.qk_rope_head_dim=64",
        "model.attention.v_head_dim=64",
    ],
    &["model.attention={kind=\"gqa\",kv_heads=4,head_dim=64}"],
];

#[test]
fn tensor_parallel_ranks_have_the_bits_of_partial_products_added_in_order() {
    for (attention, mode) in ATTENTIONS.iter().flat_map(|a| MODES.map(|mode| (a, mode))) {
        let set = [&RUN[..], attention, &[mode]].concat();
        let (expected, logs) = emulated(&set, 2);
        let Outcome { tensors, logs: found, .. } =
            many(&[&set[..], &["parallel.tp=2"]].concat(), 2);
        let found_logs: Vec<_> = found.iter().map(|log| [log.gradient_norm, log.loss]).collect();
        assert_eq!(found_logs, logs, "{attention:?} {mode}");
        assert_eq!(tensors.len(), expected.len());
        for ((name, found), (of_expected, expected)) in tensors.iter().zip(&expected) {
            assert_eq!(name, of_expected);
            assert!(found == expected, "{attention:?} {mode}: {name} differs");
        }
    }
}

/// The gradients of a step (first moments, nothing clipped) and its losses, on ranks and on one.
#[test]
fn tensor_parallel_ranks_differ_from_one_by_rounding_alone() {
    let values = |x: &Tensor| -> Vec<f64> {
        match x.dtype() {
            DType::F64 => x.as_slice::<f64>().to_vec(),
            _ => x.as_slice::<f32>().iter().map(|&x| f64::from(x)).collect(),
        }
    };
    for (mode, most) in [("fp32", 1e-5), ("f64", 1e-12)] {
        let mode = format!("recipe.mode={mode:?}");
        for attention in ATTENTIONS {
            let step = ["optim.clip=0", "optim.moments=\"fp32\"", &mode];
            let set = [&RUN[..], attention, &step].concat();
            let whole = one(&set, 1);
            let split = many(&[&set[..], &["parallel.tp=2"]].concat(), 1);
            let near = |found: f64, expected: f64, scale: f64, what: &str| {
                let error = (found - expected).abs() / scale;
                assert!(error <= most, "{attention:?} {mode}: {what}: {found} for {expected}");
                error
            };
            let [of_one, of_many] = [&whole, &split].map(|outcome| &outcome.logs[0]);
            assert_eq!(of_many.tokens, of_one.tokens);
            for (found, expected) in [
                (of_many.loss, of_one.loss),
                (of_many.mtp_loss[0], of_one.mtp_loss[0]),
                (of_many.balance_loss, of_one.balance_loss),
                (of_many.gradient_norm, of_one.gradient_norm),
            ] {
                near(found, expected, expected, "losses and norm");
            }
            let (mut differ, mut worst) = (0, 0.0f64);
            for ((name, found), (_, expected)) in split.tensors.iter().zip(&whole.tensors) {
                if !name.starts_with("first/") {
                    continue;
                }
                differ += usize::from(found != expected);
                let [found, expected] = [found, expected].map(values);
                let largest = expected.iter().fold(0.0f64, |most, x| most.max(x.abs()));
                for (&found, &expected) in found.iter().zip(&expected) {
                    worst = worst.max(near(found, expected, largest, name));
                }
            }
            println!("{mode} {attention:?}: {differ} gradients differ, at most by {worst:.1e}");
            assert!(differ > 0, "the sums are others");
        }
    }
}

/// What the backward computes again is no sum of ranks.
#[test]
fn recomputation_changes_no_bit_of_tensor_parallel_ranks() {
    // SwiGLU's input in FP8 would change it by itself.
    let exact = [MODES[2], "recipe.keep_swiglu_input_fp8=false", "parallel.tp=2"];
    let set = [&RUN[..], ATTENTIONS[0], &exact].concat();
    let keep = [
        "recipe.recompute_norms=false",
        "recipe.recompute_up_projections=false",
        "recipe.recompute_swiglu=false",
    ];
    let again = many(&set, 2);
    let kept = many(&[&set[..], &keep].concat(), 2);
    assert_eq!(again.logs, kept.logs);
    assert!(again.tensors == kept.tensors);
}

/// A checkpoint of two tensor parallel ranks holds whole tensors: one rank goes on from it, and
/// they go on from one rank's.
#[test]
fn a_checkpoint_is_read_by_another_number_of_tensor_parallel_ranks() {
    let set = [&RUN[..], ATTENTIONS[0], &[MODES[0]]].concat();
    let split = [&set[..], &["parallel.tp=2"]].concat();
    let folder = tempfile::tempdir().unwrap();
    let close = |a: &StepLog, b: &StepLog| {
        assert_eq!(a.tokens, b.tokens);
        assert!((a.loss / b.loss - 1.0).abs() < 1e-4, "{} and {}", a.loss, b.loss);
    };
    let whole = one(&set, 2);
    let (logs, saved) = steps(&split, None, 1, folder.path());
    let mut trainer = Trainer::resume(config(&set), Reference, saved).unwrap();
    close(&logs[0], &whole.logs[0]);
    close(&done(trainer.step(&|| false).unwrap()), &whole.logs[1]);
    let mut trainer = Trainer::new(config(&set), Reference).unwrap();
    done(trainer.step(&|| false).unwrap());
    let (logs, _) = steps(&split, Some(trainer.save().unwrap()), 1, folder.path());
    close(&logs[0], &whole.logs[1]);
}
