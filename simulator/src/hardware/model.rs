//! The shape of a transformer: what the workload, the memory model and the cost model need to know of it.

use serde::{Deserialize, Serialize};

/// How attention is built.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "lowercase", deny_unknown_fields)]
pub enum Attention {
    /// Multi-head latent attention.
    Mla {
        /// Rank of the query's down-projection; 0 where the query is projected directly.
        q_lora_rank: u64,
        /// Rank of the joint key-value compression.
        kv_lora_rank: u64,
        /// Head dimension without position.
        qk_nope_head_dim: u64,
        /// Head dimension that carries RoPE, shared by all heads of the key.
        qk_rope_head_dim: u64,
        /// Head dimension of the values.
        v_head_dim: u64,
    },
    /// Grouped-query attention; multi-head and multi-query are its two ends.
    Gqa {
        /// Key-value heads.
        n_kv_heads: u64,
        /// Head dimension of queries, keys and values.
        head_dim: u64,
    },
}

/// Routed experts of a mixture-of-experts model.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Moe {
    /// Routed experts a layer.
    pub n_routed_experts: u64,
    /// Experts a token goes to.
    pub n_activated_experts: u64,
    /// Shared experts, every token passes them.
    pub n_shared_experts: u64,
    /// Intermediate size of one expert.
    pub moe_intermediate: u64,
    /// Groups of experts for node-limited routing; 1 where routing is free.
    pub n_expert_groups: u64,
    /// Groups a token may use.
    pub n_limited_groups: u64,
    /// First layers that are dense.
    pub n_dense_layers: u64,
}

/// A model's shape.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Model {
    /// Name for people.
    pub name: String,
    /// Transformer layers without the prediction modules.
    pub n_layers: u64,
    /// Hidden size.
    pub hidden: u64,
    /// Attention heads.
    pub n_heads: u64,
    /// Intermediate size of a dense FFN (SwiGLU: gate and up have this width each).
    pub intermediate: u64,
    /// Vocabulary.
    pub vocab_size: u64,
    /// Multi-token-prediction modules.
    #[serde(default)]
    pub n_mtp_layers: u64,
    /// The head is the embedding's matrix.
    #[serde(default)]
    pub tied_embeddings: bool,
    /// Attention.
    pub attention: Attention,
    /// Routed experts, if any.
    #[serde(default)]
    pub moe: Option<Moe>,
}
