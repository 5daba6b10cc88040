//! What an iteration of inference consists of, as op records of the model's own code.

use fathom_config::{ModelConfig, MoeConfig};
use fathom_trace::OpRecord;

use crate::config::Precision;
use crate::error::SimError;

/// What a source of records is asked: the tokens of one micro-batch through a model of one layer of
/// every kind.
#[derive(Debug, Clone, PartialEq)]
pub struct Iteration {
    /// One dense layer first where the model has any, one MoE layer, one prediction module.
    pub model: ModelConfig,
    /// Tokens on this rank.
    pub tokens: u64,
    /// How many ranks share out each product.
    pub tp: u64,
    /// Expert-parallel ranks of the record; how many rows an expert gets is put in afterwards.
    pub ep: u64,
    /// Arithmetic of the GEMMs.
    pub precision: Precision,
}

/// Where the op records of inference come from.
pub trait InferenceOps: Send + Sync {
    /// The forward of a prompt: attention over whole heads.
    ///
    /// # Errors
    /// [`SimError::Layout`] where the model cannot be laid out so.
    fn prefill(&self, iteration: &Iteration) -> Result<Vec<OpRecord>, SimError>;

    /// New tokens of as many requests: the absorbed form, over caches.
    ///
    /// # Errors
    /// As [`InferenceOps::prefill`].
    fn decode(&self, iteration: &Iteration) -> Result<Vec<OpRecord>, SimError>;
}

/// `model` with one layer of every kind, and the indices of its dense layer, its layer with routed
/// experts and its prediction module.
pub(super) fn cut(model: &ModelConfig) -> (ModelConfig, [Option<usize>; 3]) {
    let dense = model.moe.map_or(model.layers, |m| m.first_dense.min(model.layers));
    let (has_dense, has_moe) = (dense.min(1), (model.layers - dense).min(1));
    let moe = model.moe.filter(|_| has_moe > 0 || model.mtp_depth > 0);
    let small = ModelConfig {
        layers: has_dense + has_moe,
        mtp_depth: model.mtp_depth.min(1),
        moe: moe.map(|m| MoeConfig { first_dense: has_dense, ..m }),
        ..model.clone()
    };
    let index = |has: usize, at: usize| (has > 0).then_some(at);
    let layers =
        [index(has_dense, 0), index(has_moe, has_dense), index(small.mtp_depth, small.layers)];
    (small, layers)
}
