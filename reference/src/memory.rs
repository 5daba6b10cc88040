//! What a training step holds in memory: lasting tensors, and activations by recipe and
//! micro-batch.
//!
//! Nothing is estimated: the step runs on a [`Ledger`], on [`Meta`] to predict any size, on another
//! backend to measure. What is kept for the backward is what is alive between forward and
//! backward.

use serde::Serialize;

use crate::EngineError;
use crate::backend::{Alive, Backend, Ledger, Load, Meta};
use crate::config::ModelConfig;
use crate::model::{Batch, BuildError, Model, StepSettings};
use crate::parallel::Parallel;
use crate::precision::{Mode, Recipe};

/// Bytes of a micro-batch beyond the lasting tensors.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Activations {
    /// Kept from the forward for the backward, with tokens, targets and tables.
    pub kept: u64,
    /// The most that is alive at any moment of forward and backward, gradients being written in
    /// place.
    pub peak: u64,
}

/// Why a step's memory cannot be told.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// The model cannot be laid out.
    #[error(transparent)]
    Build(#[from] BuildError),
    /// An op refused its inputs.
    #[error(transparent)]
    Engine(#[from] EngineError),
}

/// What a micro-batch of `sequences` sequences of `length` tokens holds.
///
/// # Errors
/// [`MemoryError`].
pub fn predict(
    config: &ModelConfig,
    recipe: &Recipe,
    sequences: usize,
    length: usize,
) -> Result<Activations, MemoryError> {
    let batch = Batch::from_sequences(&vec![vec![0; length]; sequences]);
    measure(config, recipe, Meta::new(0, Load::Balanced), &batch)
}

/// What a micro-batch holds on a backend, of a model with initial values.
///
/// # Errors
/// [`MemoryError`].
pub fn measure<B: Backend>(
    config: &ModelConfig,
    recipe: &Recipe,
    backend: B,
    host: &Batch,
) -> Result<Activations, MemoryError> {
    let model = Model::new(config, recipe.clone(), Parallel::default(), 0)?;
    let ledger = Ledger::new(backend);
    let params = model.shapes(&ledger)?;
    let weights = model.weights(&ledger, &params)?;
    let gradients = model.zero_gradients(&ledger)?;
    let before = ledger.alive().bytes;
    ledger.reset_peak();
    let batch = model.batch(&ledger, host)?;
    let settings = StepSettings::of(host, config.mtp_depth, 0.3);
    let forward = model.forward(&ledger, &weights, &batch, &settings, false)?;
    let kept = ledger.alive().bytes - before;
    let after = model.backward(&ledger, &weights, &batch, &settings, forward, gradients)?;
    let Alive { peak, .. } = ledger.alive();
    drop(after);
    Ok(Activations { kept, peak: peak - before })
}

/// The recipes that differ in what is kept: the mode's default, nothing made again, everything made
/// again, and each choice alone turned.
pub fn policies(mode: Mode) -> Vec<(&'static str, Recipe)> {
    let default = Recipe::new(mode);
    let all = |recompute: bool, narrow: bool| Recipe {
        recompute_norms: recompute,
        recompute_up_projections: recompute,
        recompute_swiglu: recompute,
        keep_swiglu_input_fp8: narrow,
        keep_attention_output_e5m6: narrow,
        ..default.clone()
    };
    let fp8 = mode == Mode::Fp8;
    let mut policies = vec![
        ("default", default.clone()),
        ("keep everything", all(false, false)),
        ("recompute everything", all(true, fp8)),
    ];
    let turned = |turn: fn(&mut Recipe)| {
        let mut recipe = all(false, false);
        turn(&mut recipe);
        recipe
    };
    policies.push(("recompute norms only", turned(|r| r.recompute_norms = true)));
    policies.push(("recompute up-projections only", turned(|r| r.recompute_up_projections = true)));
    policies.push(("recompute SwiGLU only", turned(|r| r.recompute_swiglu = true)));
    if fp8 {
        policies.push(("SwiGLU's input in FP8 only", turned(|r| r.keep_swiglu_input_fp8 = true)));
        policies.push((
            "attention's output in E5M6 only",
            turned(|r| r.keep_attention_output_e5m6 = true),
        ));
    }
    policies
}
