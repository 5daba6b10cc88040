//! What a model is, without its weights: parameters, memory, work per token, cache per token.

use serde::Serialize;

use crate::memory::{self, Activations, MemoryError};
use crate::model::{BuildError, Model, ParamKind};
use crate::parallel::Parallel;
use crate::precision::{Mode, Recipe};
use fathom_config::{AttentionConfig, ModelConfig};

/// Numbers of parameters of a model, over all ranks.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Parameters {
    /// Parameters of the main model, with embedding and head.
    pub total: u64,
    /// Parameters that a token uses, without the embedding's table (head included).
    pub active_without_embedding: u64,
    /// Parameters that a token uses, with the embedding's table.
    pub active: u64,
    /// Parameters of the embedding's table.
    pub embedding: u64,
    /// Parameters of the output head (0 where it is the embedding).
    pub head: u64,
    /// Parameters of all routed experts of the main model.
    pub routed_experts: u64,
    /// Parameters of the MTP modules, without the shared embedding and head.
    pub mtp: u64,
}

/// Bytes of a training step's lasting tensors, over all ranks.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Memory {
    /// Bytes of the weights as GEMMs read them.
    pub weights: u64,
    /// Bytes of the F32 master copies (0 where the weights are the masters).
    pub master: u64,
    /// Bytes of the gradient accumulators, with those of further uses of shared parameters.
    pub gradients: u64,
    /// Bytes of the two moments of AdamW, in BF16.
    pub moments: u64,
}

impl Memory {
    /// Bytes of all of them.
    pub fn sum(&self) -> u64 {
        self.weights + self.master + self.gradients + self.moments
    }
}

/// What a training step holds with one recipe: lasting tensors and activations.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Policy {
    /// Name of the policy: what is kept and what is made again.
    pub name: &'static str,
    /// Activations of a micro-batch, in bytes.
    pub activations_bytes: Activations,
    /// Bytes of lasting tensors and kept activations together.
    pub training_bytes: u64,
}

/// What a micro-batch of `sequences` sequences of `sequence` tokens holds, by each policy of the
/// mode.
///
/// # Errors
/// [`MemoryError`].
pub fn by_policy(
    config: &ModelConfig,
    mode: Mode,
    sequences: usize,
    sequence: usize,
) -> Result<Vec<Policy>, MemoryError> {
    let of = |(name, recipe): (&'static str, Recipe)| {
        let activations_bytes = memory::predict(config, &recipe, sequences, sequence)?;
        let model = Model::new(config, recipe, Parallel::default(), 0)?;
        let training_bytes = lasting(&model).sum() + activations_bytes.kept;
        Ok(Policy { name, activations_bytes, training_bytes })
    };
    memory::policies(mode).into_iter().map(of).collect()
}

/// A model's figures: what `fathom model inspect` shows.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Inspection {
    /// Numbers of parameters.
    pub parameters: Parameters,
    /// Bytes that training holds beside activations.
    pub memory_bytes: Memory,
    /// GFLOP per token of forward and backward at `sequence` tokens, causal attention.
    pub training_gflop_per_token: f64,
    /// GFLOP per token of forward and backward with every key counted for every query.
    pub training_gflop_per_token_non_causal: f64,
    /// GFLOP per token of the forward alone, causal.
    pub forward_gflop_per_token: f64,
    /// Sequence length, in tokens, at which the FLOPs are counted.
    pub sequence: usize,
    /// BF16 bytes that a token adds to the KV cache, over all layers.
    pub kv_cache_bytes_per_token: u64,
    /// Bytes that the same heads would take as multi-head, grouped-query (8 groups) and multi-query
    /// attention, by name.
    pub kv_cache_alternatives: Vec<(String, u64)>,
}

/// Works a model's figures out, for sequences of `sequence` tokens.
///
/// # Errors
/// [`BuildError`] where it cannot be laid out.
pub fn inspect(
    config: &ModelConfig,
    recipe: Recipe,
    sequence: usize,
) -> Result<Inspection, BuildError> {
    let model = Model::new(config, recipe, Parallel::default(), 0)?;
    let parameters = parameters(config, &model);
    let linear = parameters.active_without_embedding as f64;
    let causal = attention_flops(config, (sequence as f64 + 1.0) / 2.0);
    let whole = attention_flops(config, sequence as f64);
    Ok(Inspection {
        memory_bytes: lasting(&model),
        training_gflop_per_token: (6.0 * linear + 3.0 * causal) / 1e9,
        training_gflop_per_token_non_causal: (6.0 * linear + 3.0 * whole) / 1e9,
        forward_gflop_per_token: (2.0 * linear + causal) / 1e9,
        sequence,
        kv_cache_bytes_per_token: cache_bytes(config),
        kv_cache_alternatives: alternatives(config),
        parameters,
    })
}

fn parameters(config: &ModelConfig, model: &Model) -> Parameters {
    let mut found = Parameters::default();
    let moe = config.moe.as_ref();
    let mut idle = 0;
    for spec in &model.specs {
        let n = spec.elements() as u64;
        if spec.layer.is_some_and(|layer| layer >= config.layers) {
            found.mtp += n;
            continue;
        }
        // The selection bias is state of the routing rule, not a weight.
        if spec.kind == ParamKind::SelectionBias {
            continue;
        }
        found.total += n;
        match spec.kind {
            ParamKind::Embedding => found.embedding = n,
            ParamKind::Head => found.head = n,
            ParamKind::Experts => {
                found.routed_experts += n;
                let moe = moe.expect("experts come with a configuration");
                idle += n / moe.n_routed_experts as u64 * (moe.n_routed_experts - moe.top_k) as u64;
            }
            _ => {}
        }
    }
    found.active = found.total - idle;
    // A tied table is the head as well: a token multiplies by it.
    let only_looked_up = if config.tie_word_embeddings { 0 } else { found.embedding };
    found.active_without_embedding = found.active - only_looked_up;
    found
}

/// FLOPs per token of queries times keys and probabilities times values, for `keys` seen keys.
fn attention_flops(config: &ModelConfig, keys: f64) -> f64 {
    let widths = match config.attention {
        AttentionConfig::Mla { qk_nope_head_dim, qk_rope_head_dim, v_head_dim, .. } => {
            qk_nope_head_dim + qk_rope_head_dim + v_head_dim
        }
        AttentionConfig::Gqa { head_dim, .. } => 2 * head_dim,
    };
    2.0 * (config.layers * config.heads * widths) as f64 * keys
}

/// BF16 bytes a token adds to the cache: the latent and the shared key, or keys and values.
pub fn cache_bytes(config: &ModelConfig) -> u64 {
    let elements = match config.attention {
        AttentionConfig::Mla { kv_lora_rank, qk_rope_head_dim, .. } => {
            kv_lora_rank + qk_rope_head_dim
        }
        AttentionConfig::Gqa { kv_heads, head_dim } => 2 * kv_heads * head_dim,
    };
    (2 * config.layers * elements) as u64
}

fn alternatives(config: &ModelConfig) -> Vec<(String, u64)> {
    let width = match config.attention {
        AttentionConfig::Mla { qk_nope_head_dim, qk_rope_head_dim, v_head_dim, .. } => {
            qk_nope_head_dim + qk_rope_head_dim + v_head_dim
        }
        AttentionConfig::Gqa { head_dim, .. } => 2 * head_dim,
    };
    let bytes = |kv_heads: usize| (2 * config.layers * kv_heads * width) as u64;
    let named = [("mha", config.heads), ("gqa-8", 8.min(config.heads)), ("mqa", 1)];
    named.map(|(name, heads)| (name.to_owned(), bytes(heads))).to_vec()
}

/// Bytes of the lasting tensors of a training step with BF16 moments.
pub fn lasting(model: &Model) -> Memory {
    let mut memory = Memory::default();
    let master = model.recipe.master().size() as u64;
    let low = matches!(model.recipe.mode, Mode::Fp8 | Mode::Bf16);
    for spec in &model.specs {
        let n = spec.elements() as u64;
        let product = matches!(spec.kind, ParamKind::Linear | ParamKind::Experts);
        let width = match (model.recipe.mode, spec.kind) {
            // Two orientations of one byte.
            (Mode::Fp8, _) if product => 2,
            (Mode::Bf16, _) if product => 2,
            (_, ParamKind::Head) if low => 2,
            _ => 0,
        };
        memory.weights += if low { width * n } else { master * n };
        memory.master += if low { master * n } else { 0 };
        if spec.trained() {
            memory.gradients += master * n;
            memory.moments += 4 * n;
        }
    }
    let uses = model.further_uses().into_iter().map(|id| model.specs[id.0].elements() as u64);
    memory.gradients += uses.sum::<u64>() * master;
    memory
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn deepseek_v3_has_the_published_figures() {
        let config = ModelConfig::preset("deepseek-v3").unwrap();
        let found = inspect(&config, Recipe::new(Mode::Fp8), 4096).unwrap();
        let billions = |n: u64| (n as f64 / 1e7).round() / 100.0;
        assert_eq!(billions(found.parameters.total), 671.03);
        assert_eq!(found.parameters.active_without_embedding, 36_625_603_584);
        assert_eq!(billions(found.parameters.active), 37.55);
        assert_eq!(found.kv_cache_bytes_per_token, 70_272);
        // The report's 250 GFLOP a token at sequence 4096.
        assert!((found.training_gflop_per_token - 250.0).abs() < 5.0, "{found:?}");
    }

    #[test]
    fn caches_of_other_models_are_the_published_ones() {
        for (name, bytes) in [("qwen2.5-72b", 327_680), ("llama-3.1-405b", 516_096)] {
            assert_eq!(cache_bytes(&ModelConfig::preset(name).unwrap()), bytes);
        }
    }
}
