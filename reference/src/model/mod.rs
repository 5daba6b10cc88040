//! The model: DeepSeek-V3 as a list of parameters and layers, forward and backward over any
//! [`Backend`].
//!
//! # How to use it
//!
//! ```text
//! let model = Model::new(&config, Recipe::new(Mode::Fp32), Parallel::default(), 0)?;
//! let params = model.init(&backend, seed)?;              // or checkpoint::hf::load
//! let weights = model.weights(&backend, &params)?;       // casts, once an optimizer step
//! let mut grads = model.zero_gradients(&backend)?; // one set per shard
//! for batch in micro_batches {
//!     let batch = model.batch(&backend, &batch)?;        // uploads ids, targets, tables
//!     let report = model.step(&backend, &weights, &batch, &settings, &mut grads)?;
//! }
//! ```
//!
//! [`Model::step`] is forward, input-backward and weight-backward of one micro-batch, adding into
//! `grads` in a fixed order, so that micro-batches chain. Its pieces are public:
//! [`Model::forward`] keeps what the backward needs in a [`Forward`]; [`Model::backward`] consumes
//! it. A pipeline schedule drives the layers itself: [`layer::Layer`] has every part (attention,
//! dispatch, mlp, combine) with its forward, input-backward and weight-backward.
//!
//! Parameters are listed in [`Model::specs`] and held in a [`Params`] by [`ParamId`]; a spec names
//! the checkpoint tensors that the parameter consists of. Gradients, moments and master weights
//! have the parameter's shape.

mod build;
mod decode;
pub mod layer;
mod mtp;
pub mod params;
pub mod routing;
pub mod stage;
mod step;
mod tail;
pub mod workload;

pub use build::{BuildError, Model};
pub use decode::LatentCache;
pub use mtp::{Join, MtpModule};
pub use params::{ParamId, ParamKind, ParamSpec, Part};
pub use stage::{Lane, PairedBackward, StageKept, StageReport};
pub use step::{Batch, DeviceBatch, Forward, SequenceParts, StepReport, StepSettings};

use fathom_numerics::philox::Philox;
use fathom_trace::DType;

use crate::backend::{Backend, Result};
use crate::layers::operand::Weight;
use crate::layers::{Gradients, Weights};
use crate::ops::add::Add;
use crate::ops::cast::Cast;
use crate::precision::Mode;
use crate::{DynOp, Tensor};

/// Parameter values by [`ParamId`], in master precision.
#[derive(Clone, Debug)]
pub struct Params<B: Backend> {
    /// One buffer per parameter, indexed by [`ParamId`].
    pub buffers: Vec<B::Buffer>,
}

impl Model {
    /// The weights in the forms that ops take (FP8 codes with scales, BF16, or the master values),
    /// made once an optimizer step.
    ///
    /// # Errors
    /// Those of the backend.
    pub fn weights<B: Backend>(&self, backend: &B, params: &Params<B>) -> Result<Weights<B>> {
        let mut operands = Vec::with_capacity(self.specs.len());
        for (i, (spec, master)) in self.specs.iter().zip(&params.buffers).enumerate() {
            let head = self.head == Some(ParamId(i));
            let product = matches!(spec.kind, ParamKind::Linear | ParamKind::Experts);
            operands.push(match self.recipe.mode {
                Mode::Fp8 if product => {
                    let op = self.recipe.fp8.weight_cast();
                    let [q, scale, q_t, scale_t] = backend.quantize_weight(&op, master)?;
                    Weight::Codes { q, scale, q_t, scale_t }
                }
                Mode::Fp8 | Mode::Bf16 if head || product => {
                    Weight::Plain(backend.cast(&Cast { out: DType::BF16 }, master)?)
                }
                _ => Weight::Plain(master.clone()),
            });
        }
        let master = params.buffers.iter().cloned().map(Some).collect();
        Ok(Weights { master, operands, delayed: None })
    }

    /// The same for a step of training, of which nothing but the weights holds the masters: those
    /// that only products read are let go.
    ///
    /// # Errors
    /// Those of the backend.
    pub fn training_weights<B: Backend>(
        &self,
        backend: &B,
        params: Params<B>,
    ) -> Result<Weights<B>> {
        let mut weights = self.weights(backend, &params)?;
        for (spec, master) in self.specs.iter().zip(&mut weights.master) {
            if matches!(spec.kind, ParamKind::Linear | ParamKind::Experts | ParamKind::Head) {
                *master = None;
            }
        }
        Ok(weights)
    }

    /// Accumulators of zeros, one set per shard: one per parameter, then one for every further use
    /// of a shared parameter (embedding and head in MTP modules, the head where it is tied).
    ///
    /// Uses have accumulators of their own so that each is a chain over sequences, whatever the
    /// micro-batches; [`Model::finish_gradients`] adds them up.
    ///
    /// # Errors
    /// Those of the backend.
    pub fn zero_gradients<B: Backend>(&self, backend: &B) -> Result<Gradients<B>> {
        self.zero_gradients_of(backend, true)
    }

    /// As [`Model::zero_gradients`] for shard `i` of a union: routed experts have accumulators in
    /// the first only.
    pub(crate) fn zero_gradients_in_union<B: Backend>(
        &self,
        backend: &B,
        i: usize,
    ) -> Result<Gradients<B>> {
        self.zero_gradients_of(backend, i == 0)
    }

    fn zero_gradients_of<B: Backend>(&self, backend: &B, experts: bool) -> Result<Gradients<B>> {
        let zeros = |spec: &ParamSpec| {
            let zeros = || backend.zeros(self.recipe.master(), &spec.shape);
            let has_one = spec.trained() && (experts || spec.kind != ParamKind::Experts);
            has_one.then(zeros).transpose()
        };
        let uses = self.further_uses().into_iter().map(|id| &self.specs[id.0]);
        let buffers = self.specs.iter().chain(uses).map(zeros).collect::<Result<_>>()?;
        Ok(Gradients { buffers })
    }

    /// The parameters whose further uses have accumulators behind those of the parameters.
    pub(crate) fn further_uses(&self) -> Vec<ParamId> {
        let tied = self.head.filter(|_| self.config.tie_word_embeddings);
        let embeddings = self.mtp.iter().filter(|m| m.join.is_some()).map(|_| self.embedding);
        let heads = self.mtp.iter().map(|_| self.head);
        tied.into_iter().chain(embeddings.chain(heads).flatten()).collect()
    }

    /// The accumulator of the main model's head.
    fn head_slot(&self) -> usize {
        let head = self.head.expect("this stage has the head").0;
        if self.config.tie_word_embeddings { self.specs.len() } else { head }
    }

    /// The accumulators of the shared parameters in MTP module `index` (from 0).
    fn mtp_slots(&self, index: usize) -> MtpSlots {
        let embeddings = self.specs.len() + usize::from(self.config.tie_word_embeddings);
        let heads = embeddings + self.mtp.iter().filter(|m| m.join.is_some()).count();
        MtpSlots { embedding: embeddings + index, head: heads + index }
    }

    /// Whether the accumulator of a parameter of its own is on another stage: the embedding, where
    /// MTP modules or a tied head read it on a last stage that is not the first.
    fn is_elsewhere(&self, id: ParamId) -> bool {
        self.at.pp > 0 && self.embedding == Some(id)
    }

    /// Further uses of parameters whose first use is on another stage: accumulator and parameter,
    /// in the order in which they are added.
    pub(crate) fn uses_elsewhere(&self) -> Vec<(usize, ParamId)> {
        let uses = self.further_uses().into_iter().enumerate();
        let slots = uses.map(|(i, id)| (self.specs.len() + i, id));
        slots.filter(|(_, id)| self.is_elsewhere(*id)).collect()
    }

    /// The op that adds gradients to each other.
    pub(crate) fn gradient_sum(&self) -> Add {
        Add { out: self.recipe.master() }
    }

    /// Ends a shard: adds each further use's accumulator to its parameter's, in order. Of a
    /// parameter whose first use is on another stage the uses are left apart.
    ///
    /// # Errors
    /// Those of the backend.
    ///
    /// # Panics
    /// Where `gradients` are not of this model.
    pub fn finish_gradients<B: Backend>(
        &self,
        backend: &B,
        mut gradients: Gradients<B>,
    ) -> Result<Gradients<B>> {
        let mut uses = gradients.buffers.split_off(self.specs.len());
        for (id, of_use) in self.further_uses().into_iter().zip(&mut uses) {
            if self.is_elsewhere(id) {
                continue;
            }
            let of_use = of_use.take().expect("trained");
            let sum = gradients.buffers[id.0].take().expect("trained");
            let op = self.gradient_sum();
            gradients.buffers[id.0] = Some(backend.add(&op, &sum, &of_use, None)?);
        }
        if self.at.pp > 0 {
            gradients.buffers.extend(uses);
        }
        Ok(gradients)
    }

    /// Parameters that are all zero, for where only their shapes matter (`meta`, memory).
    ///
    /// # Errors
    /// Those of the backend.
    pub fn shapes<B: Backend>(&self, backend: &B) -> Result<Params<B>> {
        let master = self.recipe.master();
        let zeros = |spec: &ParamSpec| backend.zeros(master, &spec.shape);
        Ok(Params { buffers: self.specs.iter().map(zeros).collect::<Result<_>>()? })
    }

    /// Initial values: normal with the configuration's standard deviation, norms one, selection
    /// biases zero. Each checkpoint tensor has its own stream of (`seed`, name), so that the values
    /// depend neither on the layout nor on the precision.
    ///
    /// # Errors
    /// Those of the backend.
    pub fn init<B: Backend>(&self, backend: &B, seed: u64) -> Result<Params<B>> {
        let master = self.recipe.master();
        let one = |spec: &ParamSpec| {
            let values: Vec<f32> = match spec.kind {
                ParamKind::Norm => vec![1.0; spec.elements()],
                ParamKind::SelectionBias => vec![0.0; spec.elements()],
                _ => spec.parts.iter().flat_map(|p| self.normal(seed, p)).collect(),
            };
            let tensor = Tensor::from_vec(&spec.shape, values);
            backend.upload(convert(tensor, master))
        };
        Ok(Params { buffers: self.specs.iter().map(one).collect::<Result<_>>()? })
    }

    /// Normal values of one checkpoint tensor: stream (seed, hash of its name).
    fn normal(&self, seed: u64, part: &Part) -> Vec<f32> {
        let hash = blake3::hash(part.name.as_bytes());
        let stream = u64::from_le_bytes(hash.as_bytes()[..8].try_into().expect("eight bytes"));
        let mut values = vec![0.0; part.shape.iter().product()];
        Philox::new(seed, stream).normals(0, &mut values);
        let sigma = self.config.initializer_range as f32;
        values.iter_mut().for_each(|x| *x *= sigma);
        values
    }
}

/// Accumulators of the shared parameters in an MTP module.
struct MtpSlots {
    embedding: usize,
    head: usize,
}

/// A tensor in another float type.
pub(crate) fn convert(tensor: Tensor, dtype: DType) -> Tensor {
    if tensor.dtype() == dtype {
        return tensor;
    }
    let cast: Box<dyn DynOp> = Box::new(Cast { out: dtype });
    cast.run(vec![Some(tensor)]).expect("floats are cast").remove(0)
}
