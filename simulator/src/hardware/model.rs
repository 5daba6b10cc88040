//! The shape of a transformer: what the workload, the memory model and the cost model need to know
//! of it.

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

/// Parameters of a model, counted from its shapes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Parameters {
    /// All parameters of the main model (prediction modules not counted).
    pub total: u64,
    /// Weights of the matrices that a token is multiplied with: the head's included, embedding and
    /// norms not.
    pub active: u64,
    /// The embedding's.
    pub embedding: u64,
    /// The prediction modules' own (embedding and head are shared with the main model).
    pub mtp: u64,
}

impl Model {
    /// Query heads times the head dimension of queries and keys, and of values.
    pub fn head_dims(&self) -> (u64, u64) {
        match self.attention {
            Attention::Mla { qk_nope_head_dim, qk_rope_head_dim, v_head_dim, .. } => {
                (qk_nope_head_dim + qk_rope_head_dim, v_head_dim)
            }
            Attention::Gqa { head_dim, .. } => (head_dim, head_dim),
        }
    }

    /// The attention projections of a layer as `(inputs, outputs)` of each Linear.
    pub fn attention_linears(&self) -> Vec<(u64, u64)> {
        let (h, heads) = (self.hidden, self.n_heads);
        match self.attention {
            Attention::Mla {
                q_lora_rank: q,
                kv_lora_rank: kv,
                qk_nope_head_dim: nope,
                qk_rope_head_dim: rope,
                v_head_dim: v,
            } => {
                let mut linears = if q == 0 {
                    vec![(h, heads * (nope + rope))]
                } else {
                    vec![(h, q), (q, heads * (nope + rope))]
                };
                linears.extend([(h, kv + rope), (kv, heads * (nope + v)), (heads * v, h)]);
                linears
            }
            Attention::Gqa { n_kv_heads, head_dim } => {
                vec![(h, (heads + 2 * n_kv_heads) * head_dim), (heads * head_dim, h)]
            }
        }
    }

    /// Weights of a layer's attention projections.
    pub fn attention_params(&self) -> u64 {
        self.attention_linears().iter().map(|(i, o)| i * o).sum()
    }

    /// Weights of a layer's norms: two of the layer, MLA's two of its latents.
    pub fn norm_params(&self) -> u64 {
        let latents = match self.attention {
            Attention::Mla { q_lora_rank, kv_lora_rank, .. } => q_lora_rank + kv_lora_rank,
            Attention::Gqa { .. } => 0,
        };
        latents + 2 * self.hidden
    }

    /// Whether transformer layer `index` has routed experts.
    pub fn is_moe_layer(&self, index: u64) -> bool {
        self.moe.is_some_and(|m| index >= m.n_dense_layers)
    }

    /// Parameters of the FFN of a dense layer.
    pub fn dense_ffn_params(&self) -> u64 {
        3 * self.hidden * self.intermediate
    }

    /// Parameters of the FFN of a MoE layer with `experts` routed experts counted, gate and shared
    /// experts included
    /// (not the gate's balancing bias, which is no weight).
    pub fn moe_ffn_params(&self, moe: &Moe, experts: u64) -> u64 {
        let expert = 3 * self.hidden * moe.moe_intermediate;
        (experts + moe.n_shared_experts) * expert + moe.n_routed_experts * self.hidden
    }

    /// Parameters counted from the shapes.
    pub fn parameters(&self) -> Parameters {
        let embedding = self.vocab_size * self.hidden;
        let head = if self.tied_embeddings { 0 } else { embedding };
        let (mut total, mut active) = (embedding + head + self.hidden, embedding);
        for layer in 0..self.n_layers {
            let attention = self.attention_params();
            let (all, used) = match self.moe {
                Some(m) if self.is_moe_layer(layer) => (
                    self.moe_ffn_params(&m, m.n_routed_experts),
                    self.moe_ffn_params(&m, m.n_activated_experts),
                ),
                _ => (self.dense_ffn_params(), self.dense_ffn_params()),
            };
            total += attention + all + self.norm_params();
            active += attention + used;
        }
        let mtp_layer = match self.moe {
            Some(m) => self.moe_ffn_params(&m, m.n_routed_experts),
            None => self.dense_ffn_params(),
        };
        let eh_proj_and_norms = 2 * self.hidden * self.hidden + 3 * self.hidden;
        let mtp = self.n_mtp_layers
            * (self.attention_params() + self.norm_params() + mtp_layer + eh_proj_and_norms);
        Parameters { total, active, embedding, mtp }
    }

    /// FLOPs of training on one token, forward and backward (arXiv 2505.09343, table 2's
    /// convention): 6 a parameter
    /// that the token passes, and attention over `seq_len`, causal (half of it) or not.
    pub fn train_flops_per_token(&self, seq_len: u64, causal: bool) -> f64 {
        let (qk, v) = self.head_dims();
        let keys = if causal { seq_len as f64 / 2.0 } else { seq_len as f64 };
        let attention = 2.0 * keys * (self.n_heads * (qk + v) * self.n_layers) as f64;
        6.0 * self.parameters().active as f64 + 3.0 * attention
    }

    /// Bytes of KV cache that one token takes with elements of `element_bytes`.
    pub fn kv_bytes_per_token(&self, element_bytes: u64) -> u64 {
        let per_layer = match self.attention {
            Attention::Mla { kv_lora_rank, qk_rope_head_dim, .. } => {
                kv_lora_rank + qk_rope_head_dim
            }
            Attention::Gqa { n_kv_heads, head_dim } => 2 * n_kv_heads * head_dim,
        };
        per_layer * self.n_layers * element_bytes
    }
}

#[cfg(test)]
mod tests {
    use crate::hardware::model;

    /// FIGURES: 671.03 B in all; 36.62 B active without the embedding, 37.55 B with it.
    #[test]
    fn deepseek_v3_has_its_published_size() {
        let p = model("deepseek-v3").unwrap().parameters();
        assert_eq!(format!("{:.2}", p.total as f64 / 1e9), "671.03");
        assert_eq!(format!("{:.2}", p.active as f64 / 1e9), "36.62");
        assert_eq!(format!("{:.2}", (p.active + p.embedding) as f64 / 1e9), "37.55");
    }

    #[test]
    fn kv_cache_is_exact() {
        let kb = |name: &str| model(name).unwrap().kv_bytes_per_token(2);
        assert_eq!(kb("deepseek-v3"), 70_272);
        assert_eq!(kb("qwen2.5-72b"), 327_680);
        assert_eq!(kb("llama-3.1-405b"), 516_096);
    }

    #[test]
    fn flops_a_token_to_the_printed_digits() {
        let gf = |n: &str| model(n).unwrap().train_flops_per_token(4096, true) / 1e9;
        assert_eq!(format!("{:.0}", gf("deepseek-v3")), "250");
        assert_eq!(format!("{:.0}", gf("deepseek-v2")), "155");
    }

    #[test]
    fn moe_layers_begin_after_the_dense_ones() {
        let m = model("deepseek-v3").unwrap();
        assert!(!m.is_moe_layer(2) && m.is_moe_layer(3));
        assert!(!model("llama-3.1-405b").unwrap().is_moe_layer(100));
    }
}
