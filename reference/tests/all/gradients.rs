//! The whole model's gradients in `f64` against central differences of its loss.
//!
//! Every parameter tensor is sampled. A discrete choice (an expert, a dropped token) that flips
//! between the two sides makes the loss jump, and its gradient is not that of the jump: such a
//! sample is left out, and few may be.

use fathom_config::{AttentionConfig, ModelConfig, MtpKind, Score};
use fathom_numerics::philox::Philox;
use fathom_reference::Tensor;
use fathom_reference::backend::Reference;
use fathom_reference::layers::{Balance, BalanceKind, Capacity};
use fathom_reference::model::{Batch, Model, ParamKind, ParamSpec, Params, StepSettings};
use fathom_reference::precision::{Mode, Recipe};
use fathom_trace::Parallel;

/// Latent attention with a query latent, experts in groups, a shared expert, one MTP module.
fn config() -> ModelConfig {
    let mut config = ModelConfig::preset("small").unwrap();
    (config.layers, config.vocab_size, config.hidden_size) = (2, 24, 16);
    (config.heads, config.intermediate_size) = (2, 20);
    // Large weights, so that no gradient drowns in the rounding of the loss.
    config.initializer_range = 0.3;
    config.attention = AttentionConfig::Mla {
        q_lora_rank: Some(12),
        kv_lora_rank: 10,
        qk_nope_head_dim: 6,
        qk_rope_head_dim: 4,
        v_head_dim: 8,
    };
    config.moe.as_mut().unwrap().intermediate_size = 12;
    config
}

const LENGTHS: [usize; 3] = [9, 6, 2];

struct Run {
    model: Model,
    batch: Batch,
    settings: StepSettings,
}

/// A loss, and the discrete choices that it was taken under.
#[derive(PartialEq)]
struct Loss {
    value: f64,
    choices: Vec<Tensor>,
}

impl Run {
    fn new(config: &ModelConfig, settings: impl FnOnce(StepSettings) -> StepSettings) -> Run {
        let recipe = Recipe::new(Mode::F64);
        let model = Model::new(config, recipe, Parallel::default(), 0).unwrap();
        let token = |s: usize, i: usize| ((s * 7 + i * i * 5 + i * 3) % 24) as u32;
        let sequence = |(s, &n): (usize, &usize)| (0..n).map(|i| token(s, i)).collect();
        let sequences: Vec<Vec<u32>> = LENGTHS.iter().enumerate().map(sequence).collect();
        let batch = Batch::from_sequences(&sequences);
        let settings = settings(StepSettings::of(&batch, config.mtp_depth, 0.3));
        Run { model, batch, settings }
    }

    fn params(&self) -> Params<Reference> {
        let mut params = self.model.init(&Reference, 3).unwrap();
        for (id, spec) in self.model.specs.iter().enumerate() {
            if matches!(spec.kind, ParamKind::Norm | ParamKind::SelectionBias) {
                let mut random = vec![0.0f32; spec.elements()];
                Philox::new(9, id as u64).normals(0, &mut random);
                let values = params.buffers[id].as_mut_slice::<f64>().iter_mut().zip(random);
                values.for_each(|(x, r)| *x += 0.1 * f64::from(r));
            }
        }
        params
    }

    fn loss(&self, params: &Params<Reference>) -> Loss {
        let (model, settings) = (&self.model, &self.settings);
        let weights = model.weights(&Reference, params).unwrap();
        let batch = model.batch(&Reference, &self.batch).unwrap();
        let forward = model.forward(&Reference, &weights, &batch, settings, false).unwrap();
        let report = model.report(&Reference, &forward).unwrap();
        let mtp: f64 = report.mtp.iter().zip(&settings.mtp_scales).map(|(l, s)| l * s).sum();
        let layers = forward.layers.iter().chain(forward.mtp.iter().map(|m| &m.2.layer));
        let choices = layers
            .filter_map(|kept| kept.mlp.moe.as_ref())
            .flat_map(|moe| [Some(moe.indices.clone()), moe.dropped.clone()].into_iter().flatten());
        let value = report.main * settings.main_scale + mtp + report.balance;
        Loss { value, choices: choices.collect() }
    }

    fn gradients(&self, params: &Params<Reference>) -> Vec<Option<Tensor>> {
        let (model, backend) = (&self.model, &Reference);
        let weights = model.weights(backend, params).unwrap();
        let batch = model.batch(backend, &self.batch).unwrap();
        let mut grads = model.zero_gradients(backend).unwrap();
        model.step(backend, &weights, &batch, &self.settings, &mut grads).unwrap();
        model.finish_gradients(backend, grads).unwrap().buffers
    }

    /// Compares `samples` elements of every parameter; gives how many were compared.
    fn check(&self, samples: usize) -> usize {
        let mut params = self.params();
        let grads = self.gradients(&params);
        let base = self.loss(&params);
        let (mut compared, mut flipped) = (0, 0);
        for (id, (spec, grad)) in self.model.specs.iter().zip(&grads).enumerate() {
            let Some(grad) = grad else { continue };
            let grad = grad.as_slice::<f64>();
            let scale = grad.iter().fold(0.0f64, |m, g| m.max(g.abs()));
            // Half of the samples among the largest gradients: most rows of an embedding and most
            // experts of a short batch have none.
            for place in places(spec, grad, samples) {
                let mut shifted = |h: f64| {
                    let values = params.buffers[id].as_mut_slice::<f64>();
                    let before = values[place];
                    values[place] = before + h;
                    let loss = self.loss(&params);
                    params.buffers[id].as_mut_slice::<f64>()[place] = before;
                    loss
                };
                let h = 1e-5;
                let (above, below) = (shifted(h), shifted(-h));
                if above.choices != base.choices || below.choices != base.choices {
                    flipped += 1;
                    continue;
                }
                let difference = (above.value - below.value) / (2.0 * h);
                // Rounding of a loss near 4 over 2 h, and the third derivative's share.
                let bound = 1e-9 + 1e-6 * scale;
                assert!(
                    (difference - grad[place]).abs() < bound,
                    "{} [{place}]: gradient {:e}, difference {difference:e}",
                    spec.name,
                    grad[place]
                );
                compared += 1;
            }
        }
        assert!(flipped * 20 <= compared, "{flipped} flipped of {compared}");
        compared
    }
}

/// Places of the largest gradient and of random elements.
fn places(spec: &ParamSpec, grad: &[f64], samples: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..grad.len()).collect();
    order.sort_by(|&a, &b| grad[b].abs().total_cmp(&grad[a].abs()));
    let mut random = vec![0.0f32; samples];
    Philox::new(17, spec.elements() as u64).normals(0, &mut random);
    let random = random.iter().map(|r| (r.abs() * 1e6) as usize % grad.len());
    let mut places: Vec<usize> = order.into_iter().take(samples.div_ceil(2)).collect();
    places.extend(random.take(samples / 2));
    places
}

fn balance(kind: BalanceKind) -> impl Fn(StepSettings) -> StepSettings {
    move |settings| StepSettings { balance: vec![Balance { kind, weight: 0.05 }], ..settings }
}

#[test]
fn the_model_with_two_mtp_modules_and_the_balance_loss() {
    let config = ModelConfig { mtp_depth: 2, ..config() };
    let run = Run::new(&config, balance(BalanceKind::Sequence));
    // Selection biases have no gradient; everything else is sampled.
    let trained = run.model.specs.iter().filter(|s| s.trained()).count();
    assert!(run.check(6) > 5 * trained);
}

#[test]
fn without_a_query_latent_with_tied_embeddings_and_recomputation() {
    let mut config = ModelConfig { tie_word_embeddings: true, ..config() };
    let AttentionConfig::Mla { q_lora_rank, .. } = &mut config.attention else { unreachable!() };
    *q_lora_rank = None;
    let mut run = Run::new(&config, |settings| settings);
    run.model.recipe.recompute_norms = true;
    run.model.recipe.recompute_up_projections = true;
    run.model.recipe.recompute_swiglu = true;
    run.check(4);
}

#[test]
fn grouped_multi_head_and_multi_query_attention() {
    for kv_heads in [1, 2, 4] {
        let attention = AttentionConfig::Gqa { kv_heads, head_dim: 6 };
        let config = ModelConfig { attention, heads: 4, moe: None, mtp_depth: 0, ..config() };
        Run::new(&config, |settings| settings).check(4);
    }
}

/// V2: softmax affinities that are not divided by their sum.
fn v2() -> ModelConfig {
    let mut config = config();
    let moe = config.moe.as_mut().unwrap();
    (moe.score, moe.normalize, moe.group_top) = (Score::Softmax, false, 1);
    config
}

#[test]
fn the_classic_losses_alone_and_together() {
    let device = BalanceKind::Device { devices: 4 };
    for kind in [BalanceKind::Batch, BalanceKind::Expert, device] {
        Run::new(&v2(), balance(kind)).check(2);
    }
    let both = [(BalanceKind::Expert, 0.03), (device, 0.05)];
    let balance = both.map(|(kind, weight)| Balance { kind, weight }).to_vec();
    Run::new(&v2(), |settings| StepSettings { balance, ..settings }).check(2);
}

#[test]
fn dropped_tokens_have_the_gradient_of_what_is_left() {
    let capacity = Capacity { devices: 4, factor: 0.75, exempt: vec![1] };
    let limited = |settings| StepSettings { capacity: Some(capacity), ..settings };
    let run = Run::new(&v2(), limited);
    let params = run.params();
    let dropped = |run: &Run| {
        let weights = run.model.weights(&Reference, &params).unwrap();
        let batch = run.model.batch(&Reference, &run.batch).unwrap();
        let forward =
            run.model.forward(&Reference, &weights, &batch, &run.settings, false).unwrap();
        let report = run.model.report(&Reference, &forward).unwrap();
        let rows: usize = report.loads.iter().flat_map(|(_, counts)| counts).sum();
        (report.dropped, rows)
    };
    let (some, left) = dropped(&run);
    let (none, all) = dropped(&Run::new(&v2(), |settings| settings));
    assert!(some > 0 && none == 0);
    assert_eq!(some + left, all);
    run.check(4);
}

#[test]
fn parallel_heads() {
    let config = ModelConfig { mtp_depth: 2, mtp_kind: MtpKind::Parallel, ..config() };
    let run = Run::new(&config, |settings| settings);
    assert!(run.model.specs.iter().all(|s| !s.name.ends_with("eh_proj.weight")));
    run.check(4);
}

#[test]
fn a_parallel_head_predicts_from_its_row_alone_and_a_sequential_one_from_the_next_token_too() {
    for (kind, sees_next) in [(MtpKind::Parallel, false), (MtpKind::Sequential, true)] {
        let config = ModelConfig { mtp_kind: kind, ..config() };
        let run = Run::new(&config, |settings| settings);
        let params = run.params();
        let weights = run.model.weights(&Reference, &params).unwrap();
        let heads = |token: u32| {
            let tokens: Vec<u32> = vec![1, 5, 9, token, 3];
            let host = Batch::from_sequences(&[tokens]);
            let batch = run.model.batch(&Reference, &host).unwrap();
            let forward =
                run.model.forward(&Reference, &weights, &batch, &run.settings, false).unwrap();
            let rows = forward.mtp[0].0.as_slice::<f64>();
            rows.chunks(config.hidden_size).map(<[f64]>::to_vec).collect::<Vec<_>>()
        };
        let (a, b) = (heads(2), heads(4));
        let same: Vec<bool> = a.iter().zip(&b).map(|(a, b)| a == b).collect();
        // Token 3 differs: the head's row 2 sees it only where the next token joins.
        assert_eq!(same, [true, true, !sees_next, false], "{kind:?}");
    }
}
