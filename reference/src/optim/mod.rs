//! The optimizer: AdamW with clipping by global norm, and an average of the weights.
//!
//! The arithmetic is that of the ops `adamw`, `clip_factor` and `sum_of_squares` of [`crate::ops`];
//! here is what surrounds them: which parameters decay, the bias corrections, the moments. [`ema`]
//! keeps the average on a thread of its own.

pub mod ema;

use fathom_trace::DType;
use serde::{Deserialize, Serialize};

use crate::Tensor;
use crate::backend::{Backend, Place, Result};
use crate::layers::Gradients;
use crate::model::{Model, ParamKind, ParamSpec, Params};
use crate::ops::adamw::AdamW;
use crate::ops::clip_factor::ClipFactor;
use crate::ops::sum_of_squares::SumOfSquares;

/// What a step does where loss or gradient is not finite.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum NonFinite {
    /// The run ends, with the op that first gave such a value.
    Stop,
    /// Weights and moments stay as they are, and the run goes on with the next step's data.
    Skip,
}

/// Element type in which the moments are stored; the arithmetic is in master precision.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum MomentType {
    /// BF16, as the DeepSeek-V3 report stores them (section 3.3.3).
    Bf16,
    /// F32, as the master weights.
    Fp32,
}

/// Settings of the optimizer: TOML section `[optim]`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct OptimConfig {
    /// Decay of the first moment, per step.
    pub beta1: f64,
    /// Decay of the second moment, per step.
    pub beta2: f64,
    /// Epsilon that is added to the root of the second moment.
    pub eps: f64,
    /// Decoupled weight decay, multiplied by the learning rate; norms and selection biases never
    /// decay.
    pub weight_decay: f64,
    /// Largest global norm of the gradient; 0: no clipping.
    pub clip: f64,
    /// Element type of the moments (in `f64` mode they are F64).
    pub moments: MomentType,
    /// Decay per step of the average of the weights; 0: no average is kept.
    pub ema_decay: f64,
    /// What happens where loss or gradient is not finite.
    pub non_finite: NonFinite,
}

impl Default for OptimConfig {
    fn default() -> Self {
        OptimConfig {
            beta1: 0.9,
            beta2: 0.95,
            eps: 1e-8,
            weight_decay: 0.1,
            clip: 1.0,
            moments: MomentType::Bf16,
            ema_decay: 0.0,
            non_finite: NonFinite::Stop,
        }
    }
}

/// Whether weight decay shrinks the parameter: everything but norms and selection biases.
pub fn decays(spec: &ParamSpec) -> bool {
    !matches!(spec.kind, ParamKind::Norm | ParamKind::SelectionBias)
}

/// AdamW with its state: the moments, and how many updates they have seen.
#[derive(Clone, Debug)]
pub struct Optimizer<B: Backend> {
    /// Settings of the run.
    pub config: OptimConfig,
    /// Updates so far, which the bias corrections count.
    pub updates: u64,
    /// First moments by parameter; `None` where it has no gradient.
    pub first: Vec<Option<B::Buffer>>,
    /// Second moments by parameter; `None` where it has no gradient.
    pub second: Vec<Option<B::Buffer>>,
}

/// Norm of a gradient and the factor that clips it, both \[1\] on the backend.
#[derive(Clone, Debug)]
pub struct Clip<B: Backend> {
    /// The norm over all parameters, before clipping.
    pub norm: B::Buffer,
    /// The factor that the gradient is multiplied by: 1 where nothing is clipped.
    pub factor: B::Buffer,
}

impl<B: Backend> Optimizer<B> {
    /// An optimizer before its first update: its moments are zeros.
    ///
    /// # Errors
    /// Those of the backend.
    pub fn new(config: &OptimConfig, model: &Model, backend: &B) -> Result<Optimizer<B>> {
        let dtype = Self::moment_dtype(config, model);
        let zeros = || {
            let zeros = |s: &ParamSpec| s.trained().then(|| backend.zeros(dtype, &s.shape));
            model.specs.iter().map(|s| zeros(s).transpose()).collect::<Result<_>>()
        };
        Ok(Optimizer { config: config.clone(), updates: 0, first: zeros()?, second: zeros()? })
    }

    /// Element type in which moments are stored.
    pub fn moment_dtype(config: &OptimConfig, model: &Model) -> DType {
        match (model.recipe.master(), config.moments) {
            (DType::F64, _) => DType::F64,
            (_, MomentType::Bf16) => DType::BF16,
            (_, MomentType::Fp32) => DType::F32,
        }
    }

    /// The gradient's global norm: a partial sum per parameter, in the order of the model's list.
    ///
    /// # Errors
    /// Those of the backend.
    pub fn clip(&self, model: &Model, backend: &B, gradients: &Gradients<B>) -> Result<Clip<B>> {
        backend.at(Place::default());
        let trained: Vec<_> = gradients.buffers.iter().flatten().collect();
        let mut partials = backend.zeros(model.recipe.master(), &[trained.len()])?;
        for (slot, gradient) in trained.into_iter().enumerate() {
            partials = backend.sum_of_squares(&SumOfSquares { slot }, gradient, partials)?;
        }
        let max_norm = (self.config.clip > 0.0).then_some(self.config.clip);
        let [norm, factor] = backend.clip_factor(&ClipFactor { max_norm }, &partials)?;
        Ok(Clip { norm, factor })
    }

    /// One update of all parameters with a gradient, which it consumes.
    ///
    /// # Errors
    /// Those of the backend; parameters and moments are then only partly updated.
    pub fn update(
        &mut self,
        model: &Model,
        backend: &B,
        params: &mut Params<B>,
        gradients: Gradients<B>,
        (clip, learning_rate): (&Clip<B>, f64),
    ) -> Result<()> {
        self.updates += 1;
        let config = &self.config;
        let rest = |beta: f64| 1.0 - power(beta, self.updates);
        let op = AdamW {
            beta1: config.beta1,
            beta2: config.beta2,
            eps: config.eps,
            decay: 1.0,
            step_size: learning_rate / rest(config.beta1),
            correction: rest(config.beta2).sqrt(),
        };
        let decay = 1.0 - learning_rate * config.weight_decay;
        let old = std::mem::take(&mut params.buffers);
        for (i, (w, gradient)) in old.into_iter().zip(gradients.buffers).enumerate() {
            let moments = (self.first[i].take(), self.second[i].take());
            let (Some(gradient), (Some(m), Some(v))) = (gradient, moments) else {
                params.buffers.push(w);
                continue;
            };
            let spec = &model.specs[i];
            backend.at(Place { layer: spec.layer, ..Place::default() });
            let op = if decays(spec) { AdamW { decay, ..op.clone() } } else { op.clone() };
            let [w, m, v] = backend.adamw(&op, w, m, v, &gradient, &clip.factor)?;
            params.buffers.push(w);
            (self.first[i], self.second[i]) = (Some(m), Some(v));
        }
        Ok(())
    }
}

/// `base^n` by repeated squaring: the same bits everywhere, unlike `powi`.
fn power(mut base: f64, mut n: u64) -> f64 {
    let mut result = 1.0;
    while n > 0 {
        if n & 1 == 1 {
            result *= base;
        }
        base *= base;
        n >>= 1;
    }
    result
}

/// A one-element F32 or F64 tensor's value.
pub fn scalar(tensor: &Tensor) -> f64 {
    match tensor.dtype() {
        DType::F64 => tensor.as_slice::<f64>()[0],
        _ => tensor.as_slice::<f32>()[0].into(),
    }
}
