//! The low-precision modes: how far they are from `fp32`, and what must not change a bit.

use fathom_config::ModelConfig;
use fathom_reference::backend::{Meta, Reference};
use fathom_reference::layers::{Balance, BalanceKind};
use fathom_reference::model::{Batch, Model, ParamKind, StepSettings};
use fathom_reference::precision::{Fp8Recipe, Mode, Recipe};
use fathom_reference::{EngineError, Tensor};
use fathom_trace::{DType, Parallel};

fn config() -> ModelConfig {
    let mut config = ModelConfig::preset("small").unwrap();
    (config.layers, config.vocab_size, config.hidden_size) = (2, 96, 64);
    config
}

fn sequences(lengths: &[usize]) -> Vec<Vec<u32>> {
    let token = |s: usize, i: usize| ((s * 31 + i * i * 7 + i * 3) % 96) as u32;
    lengths.iter().enumerate().map(|(s, &n)| (0..n).map(|i| token(s, i)).collect()).collect()
}

/// Gradients after `micro_batches`, each a list of sequences, of one step.
fn gradients(
    recipe: &Recipe,
    micro_batches: &[Vec<Vec<u32>>],
) -> Result<(f64, Model, Vec<Option<Tensor>>), EngineError> {
    let model = Model::new(&config(), recipe.clone(), Parallel::default(), 0).unwrap();
    let backend = Reference;
    let params = model.init(&backend, 7)?;
    let weights = model.weights(&backend, &params)?;
    let whole = Batch::from_sequences(&micro_batches.concat());
    let mut settings = StepSettings::of(&whole, model.config.mtp_depth, 0.3);
    let weight = 1e-2 / micro_batches.concat().len() as f64;
    settings.balance = vec![Balance { kind: BalanceKind::Sequence, weight }];
    let mut grads = model.zero_gradients(&backend)?;
    let mut loss = 0.0;
    for sequences in micro_batches {
        let batch = model.batch(&backend, &Batch::from_sequences(sequences))?;
        let report = model.step(&backend, &weights, &batch, &settings, &mut grads)?;
        assert!(report.balance > 0.0);
        loss += report.main * settings.main_scale;
    }
    let grads = model.finish_gradients(&backend, grads)?;
    Ok((loss, model, grads.buffers))
}

fn relative(found: &Tensor, expected: &Tensor) -> f64 {
    let norm = |x: &mut dyn Iterator<Item = f64>| x.map(|x| x * x).sum::<f64>().sqrt();
    let (f, e) = (found.as_slice::<f32>(), expected.as_slice::<f32>());
    let scale = norm(&mut e.iter().map(|&x| f64::from(x)));
    norm(&mut f.iter().zip(e).map(|(&f, &e)| f64::from(f) - f64::from(e))) / scale.max(1e-30)
}

/// Median over the parameters of the gradients' distance.
fn median_error(found: &[Option<Tensor>], expected: &[Option<Tensor>]) -> f64 {
    let pairs = found.iter().zip(expected);
    let mut errors: Vec<f64> =
        pairs.filter_map(|(f, e)| Some(relative(f.as_ref()?, e.as_ref()?))).collect();
    errors.sort_by(f64::total_cmp);
    errors[errors.len() / 2]
}

#[test]
fn low_precision_is_near_fp32_and_not_equal() {
    let batches = [sequences(&[40, 24])];
    let (exact, _, expected) = gradients(&Recipe::new(Mode::Fp32), &batches).unwrap();
    // Unit roundoff of the operands, with room for some tens of roundings on the way; an expert
    // that a rounding of its affinity exchanges may move single tensors further.
    for (mode, loss_bound, median_bound) in [(Mode::Bf16, 2e-3, 0.03), (Mode::Fp8, 2e-2, 0.25)] {
        let (loss, _, found) = gradients(&Recipe::new(mode), &batches).unwrap();
        assert!((loss - exact).abs() / exact < loss_bound, "{mode:?}: {loss} against {exact}");
        let median = median_error(&found, &expected);
        assert!(median > 1e-4 && median < median_bound, "{mode:?}: median {median}");
    }
}

#[test]
fn regrouping_sequences_changes_no_bit_of_dense_weights() {
    let all = sequences(&[40, 24, 33]);
    for mode in [Mode::Fp32, Mode::Bf16, Mode::Fp8] {
        let recipe = Recipe::new(mode);
        let (_, model, one) = gradients(&recipe, std::slice::from_ref(&all)).unwrap();
        let three: Vec<_> = all.iter().map(|s| vec![s.clone()]).collect();
        let (_, _, three) = gradients(&recipe, &three).unwrap();
        for ((spec, one), three) in model.specs.iter().zip(&one).zip(&three) {
            if mode == Mode::Fp32 || spec.kind != ParamKind::Experts {
                assert!(one == three, "{mode:?}: gradient of {}", spec.name);
            }
        }
    }
}

/// The micro-batch is part of the contract of routed experts in `fp8` and `bf16`: their tokens are
/// tiled by expert. Regrouping them moves roundings, not more.
#[test]
fn regrouping_moves_routed_experts_within_rounding() {
    let all = sequences(&[40, 24, 33]);
    for (mode, bound) in [(Mode::Bf16, 1e-5), (Mode::Fp8, 0.1)] {
        let recipe = Recipe::new(mode);
        let (_, model, one) = gradients(&recipe, std::slice::from_ref(&all)).unwrap();
        let three: Vec<_> = all.iter().map(|s| vec![s.clone()]).collect();
        let (_, _, three) = gradients(&recipe, &three).unwrap();
        let mut moved = false;
        for ((spec, one), three) in model.specs.iter().zip(&one).zip(&three) {
            if spec.kind == ParamKind::Experts {
                let (one, three) = (one.as_ref().unwrap(), three.as_ref().unwrap());
                moved |= one != three;
                let error = relative(three, one);
                assert!(error < bound, "{mode:?}: {} by {error:e}", spec.name);
            }
        }
        assert!(moved, "{mode:?}: the contract could be stronger");
    }
}

#[test]
fn threads_change_no_bit() {
    let batches = [sequences(&[40, 24])];
    for mode in Mode::ALL {
        let recipe = Recipe::new(mode);
        let with = |threads: usize| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| gradients(&recipe, &batches)).unwrap()
        };
        let (one, three) = (with(1), with(3));
        assert!(one.0.to_bits() == three.0.to_bits() && one.2 == three.2, "{mode:?}");
    }
}

#[test]
fn recomputing_changes_no_bit_of_plain_gradients() {
    let batches = [sequences(&[20])];
    let (_, _, kept) = gradients(&Recipe::new(Mode::Fp32), &batches).unwrap();
    let recompute = Recipe {
        recompute_norms: true,
        recompute_up_projections: true,
        recompute_swiglu: true,
        ..Recipe::new(Mode::Fp32)
    };
    let (_, _, again) = gradients(&recompute, &batches).unwrap();
    assert!(kept == again);
}

#[test]
fn the_baselines_of_fp8_run() {
    // More rows than a block has, so that experts share out the rows of blocks.
    let batches = [sequences(&[150, 90])];
    let tile = Fp8Recipe::default();
    let baselines = [
        Fp8Recipe { gradient_format: fathom_numerics::formats::Format::E5M2, ..tile.clone() },
        Fp8Recipe { gradient_block: [Some(128), Some(128)], ..tile },
        Fp8Recipe { promotion_interval: None, ..Fp8Recipe::per_tensor() },
        Fp8Recipe::mx(),
        // Weights whose blocks are no squares.
        Fp8Recipe { weight_block: [Some(1), Some(128)], ..Fp8Recipe::default() },
    ];
    let report = gradients(&Recipe::new(Mode::Fp8), &batches).unwrap();
    let (_, _, exact) = gradients(&Recipe::new(Mode::Fp32), &batches).unwrap();
    for fp8 in baselines {
        let recipe = Recipe { fp8: fp8.clone(), ..Recipe::new(Mode::Fp8) };
        let (loss, _, grads) = gradients(&recipe, &batches).unwrap();
        assert!((loss - report.0).abs() / report.0 < 0.05, "{fp8:?}");
        assert!(grads != report.2, "{fp8:?} changes nothing");
        let median = median_error(&grads, &exact);
        assert!(median < 0.4, "{fp8:?}: median {median}");
    }
}

#[test]
fn meta_records_the_ops_that_the_reference_runs() {
    for mode in Mode::ALL {
        let recipe = Recipe::new(mode);
        let model = Model::new(&config(), recipe.clone(), Parallel::default(), 0).unwrap();
        let meta = Meta::default();
        let params = model.shapes(&meta).unwrap();
        let weights = model.weights(&meta, &params).unwrap();
        let host = Batch::from_sequences(&sequences(&[40, 24]));
        let batch = model.batch(&meta, &host).unwrap();
        let settings = StepSettings::of(&host, 1, 0.3);
        let forward = model.forward(&meta, &weights, &batch, &settings, false).unwrap();
        let zeros = model.zero_gradients(&meta).unwrap();
        model.backward(&meta, &weights, &batch, &settings, forward, zeros).unwrap();
        let records = meta.take_records();
        let products = records.iter().filter(|r| r.op.contains("gemm") || r.op == "wgrad_fp8");
        let flops: u64 = products.map(|r| r.flops).sum();
        assert!(flops > 0 && records.len() > 100, "{mode:?}: {} records", records.len());
        assert!(records.iter().all(|r| r.inputs.iter().all(|i| i.dtype != DType::F16)));
    }
}
