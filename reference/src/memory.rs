//! What a training step holds in memory: lasting tensors, and activations by recipe and
//! micro-batch.
//!
//! Nothing is estimated: the step runs on a [`Ledger`], on [`Meta`] to predict any size, on another
//! backend to measure. What is kept for the backward is what is alive between forward and
//! backward. [`room`] asks whether the machine has as much.
//!
//! Three predictions, each of something else. [`training`] is of a process with all ranks that are
//! its threads, asked before every run: one micro-batch on the counting backend, the rest by what
//! it may come to at most, in a moment. [`rank()`](rank::rank) is of one rank at its peak, to the
//! byte: it walks every instruction of a step, which is what the executor is tested against. The
//! simulator's `memory` is of a GPU under other software, whose allocator, buffers and ZeRO stages
//! are not ours: sums in closed form, since a search asks for tens of thousands of layouts.

pub mod rank;
pub mod room;

use serde::Serialize;

use self::room::Need;
use crate::EngineError;
use crate::backend::{Alive, Backend, Ledger, Load, Meta};
use crate::inspect::{self, Memory};
use crate::model::workload::{TooMuch, countable};
use crate::model::{Batch, BuildError, Model, StepSettings};
use crate::optim::MomentType;
use crate::parallel::Parallel;
use crate::precision::{Mode, Recipe};
use crate::train::{TrainConfig, ranks};
use fathom_config::ModelConfig;

/// Bytes of a micro-batch beyond the lasting tensors.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Activations {
    /// Bytes alive between forward and backward: what the forward keeps, with the micro-batch's
    /// tokens, targets and RoPE tables.
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
    /// The micro-batch is beyond counting.
    #[error(transparent)]
    TooMuch(#[from] TooMuch),
}

/// What a micro-batch of `sequences` sequences of `length` tokens holds beyond the lasting tensors,
/// found by running the step on [`Meta`]: no memory of that size is needed.
///
/// # Errors
/// [`MemoryError`].
pub fn predict(
    config: &ModelConfig,
    recipe: &Recipe,
    sequences: usize,
    length: usize,
) -> Result<Activations, MemoryError> {
    countable(config, sequences, length, 1)?;
    let batch = Batch::from_sequences(&vec![vec![0; length]; sequences]);
    measure(config, recipe, Meta::new(0, Load::Balanced), &batch)
}

/// What a training run holds at once in one process, on all ranks that are its threads: lasting
/// tensors, the sets of gradients that wait for their neighbours in the tree of shards (on ranks:
/// of all shards), each for the parts of its sequences, and a micro-batch's activations at their
/// peak, a set a rank or for the context parallel ranks that share it.
///
/// # Errors
/// [`MemoryError`].
pub fn training(config: &TrainConfig) -> Result<Need, MemoryError> {
    let TrainConfig { model, recipe, micro_batch, seq_len, optim, .. } = config;
    let leaves = config.grad_shards.max(1) * config.context_shards.max(1);
    let activations = predict(model, recipe, *micro_batch, *seq_len)?;
    let model = Model::new(model, recipe.clone(), Parallel::default(), 0)?;
    let lasting = inspect::lasting(&model);
    let parameters: u64 = model.specs.iter().map(|spec| spec.elements() as u64).sum();
    let master = parameters * model.recipe.master().size() as u64;
    let ranks = config.parallel.world() as u64;
    let (sets, held) = match ranks {
        1 => (u64::from(leaves.ilog2()) + config.context_shards as u64, 1.0),
        _ => (leaves as u64, held_by_ranks(config)? as f64 / parameters as f64),
    };
    let times = |bytes: u64| (bytes as f64 * held) as u64;
    // Ranks gather the masters that they cast, beside the pieces that they own.
    let gathered = if ranks > 1 { times(lasting.master) } else { 0 };
    let moments = match (model.recipe.mode, optim.moments) {
        (Mode::F64, _) => 4 * lasting.moments,
        (_, MomentType::Fp32) => 2 * lasting.moments,
        (_, MomentType::Bf16) => lasting.moments,
    };
    let parts = vec![
        ("weights", times(lasting.weights)),
        ("master copies", lasting.master + gathered),
        ("gradients", lasting.gradients * sets),
        ("moments", moments),
        ("average of the weights", if optim.ema_decay > 0.0 { master } else { 0 }),
        ("activations", activations.peak * ranks / config.parallel.cp as u64),
    ];
    Ok(Need { job: format!("training '{}'", config.name), parts })
}

/// Parameters that all ranks of a layout hold together.
fn held_by_ranks(config: &TrainConfig) -> Result<u64, MemoryError> {
    let Parallel { pp, dp, tp, cp, .. } = config.parallel.sizes();
    let period = ranks::period(config.parallel.sizes());
    let mut held = 0;
    for pp in 0..pp {
        for data in 0..period {
            for model in ranks::stages(config, pp, (data, 0))? {
                let own: usize = model.specs.iter().map(|spec| spec.elements()).sum();
                held += (own * tp * dp * cp / period) as u64;
            }
        }
    }
    Ok(held)
}

/// What an evaluation holds beside its activations; `gradients` where it takes them too.
pub fn evaluation(model: &Model, gradients: bool) -> Need {
    let Memory { weights, master, gradients: sums, .. } = inspect::lasting(model);
    let parts = vec![
        ("weights", weights),
        ("master copies", master),
        ("gradients", if gradients { sums } else { 0 }),
    ];
    Need { job: "this model".into(), parts }
}

/// What a micro-batch holds on a backend, of a model whose parameters are all zero: sizes do not
/// depend on values.
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

#[cfg(test)]
mod tests {
    use super::*;

    /// The parts that `fathom train --preset deepseek-v3` would hold in one process, by the
    /// published number of parameters (671.03 B, and 11.5 B of the MTP module).
    #[test]
    fn deepseek_v3_does_not_fit_and_a_small_run_does() {
        let need = training(&TrainConfig::preset("deepseek-v3", &[]).unwrap()).unwrap();
        let bytes = |name: &str| need.parts.iter().find(|(n, _)| *n == name).unwrap().1 as f64;
        let parameters = 682.5e9;
        for (name, a_parameter) in [("weights", 2.0), ("master copies", 4.0), ("moments", 4.0)] {
            let ratio = bytes(name) / (a_parameter * parameters);
            assert!((0.97..1.01).contains(&ratio), "{name}: {ratio}");
        }
        assert!(bytes("gradients") >= 4.0 * 0.99 * parameters);
        assert!(need.check().unwrap_err().to_string().contains("training 'deepseek-v3' needs"));
        let tiny = training(&TrainConfig::preset("tiny", &[]).unwrap()).unwrap();
        assert!((1 << 24..1 << 32).contains(&tiny.sum()), "{tiny}");
    }
}
