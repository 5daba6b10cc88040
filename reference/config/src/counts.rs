//! The sizes of an architecture, counted: parameters, FLOPs, bytes of its KV cache.

use serde::{Deserialize, Serialize};

use crate::{AttentionConfig, ModelConfig, MoeConfig};

/// Parameters of a model, counted from its shapes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Parameters {
    /// All parameters of the main model (prediction modules not counted).
    pub total: u64,
    /// Weights of the matrices that a token is multiplied with: the head's included, embedding and
    /// norms not.
    pub active: u64,
    /// Parameters of the embedding's table.
    pub embedding: u64,
    /// The prediction modules' own parameters (embedding and head are shared with the main model).
    pub mtp: u64,
}

impl ModelConfig {
    /// Columns of one head's query and key, and columns of its value.
    pub fn head_dims(&self) -> (usize, usize) {
        match self.attention {
            AttentionConfig::Mla { qk_nope_head_dim, qk_rope_head_dim, v_head_dim, .. } => {
                (qk_nope_head_dim + qk_rope_head_dim, v_head_dim)
            }
            AttentionConfig::Gqa { head_dim, .. } => (head_dim, head_dim),
        }
    }

    /// The attention projections of a layer as `(inputs, outputs)` of each Linear.
    pub fn attention_linears(&self) -> Vec<(usize, usize)> {
        let (hidden, heads) = (self.hidden_size, self.heads);
        match self.attention {
            AttentionConfig::Mla {
                q_lora_rank,
                kv_lora_rank: kv,
                qk_nope_head_dim: nope,
                qk_rope_head_dim: rope,
                v_head_dim: v,
            } => {
                let mut linears = match q_lora_rank {
                    None => vec![(hidden, heads * (nope + rope))],
                    Some(rank) => vec![(hidden, rank), (rank, heads * (nope + rope))],
                };
                let rest = [(hidden, kv + rope), (kv, heads * (nope + v)), (heads * v, hidden)];
                linears.extend(rest);
                linears
            }
            AttentionConfig::Gqa { kv_heads, head_dim } => {
                vec![(hidden, (heads + 2 * kv_heads) * head_dim), (heads * head_dim, hidden)]
            }
        }
    }

    /// Weights of a layer's attention projections.
    pub fn attention_params(&self) -> u64 {
        self.attention_linears().iter().map(|&(i, o)| i as u64 * o as u64).sum()
    }

    /// Weights of a layer's norms: two of the layer, MLA's two of its latents.
    pub fn norm_params(&self) -> u64 {
        let latents = match self.attention {
            AttentionConfig::Mla { q_lora_rank, kv_lora_rank, .. } => {
                q_lora_rank.unwrap_or(0) + kv_lora_rank
            }
            AttentionConfig::Gqa { .. } => 0,
        };
        (latents + 2 * self.hidden_size) as u64
    }

    /// Parameters of the feed-forward part of a dense layer.
    pub fn dense_ffn_params(&self) -> u64 {
        3 * self.hidden_size as u64 * self.intermediate_size as u64
    }

    /// Parameters of the feed-forward part of a layer of `moe` of which `experts` routed experts
    /// are counted; gate and shared experts included (not the gate's balancing bias, which is no
    /// weight).
    pub fn moe_ffn_params(&self, moe: &MoeConfig, experts: usize) -> u64 {
        let hidden = self.hidden_size as u64;
        let expert = 3 * hidden * moe.intermediate_size as u64;
        (experts + moe.n_shared_experts) as u64 * expert + moe.n_routed_experts as u64 * hidden
    }

    /// The parameters of the model, counted from its shapes.
    pub fn parameters(&self) -> Parameters {
        let hidden = self.hidden_size as u64;
        let embedding = self.vocab_size as u64 * hidden;
        let head = if self.tie_word_embeddings { 0 } else { embedding };
        let (attention, norms) = (self.attention_params(), self.norm_params());
        let dense = (self.dense_ffn_params(), self.dense_ffn_params());
        let experts = self.moe.map(|moe| {
            let [all, used] =
                [moe.n_routed_experts, moe.top_k].map(|n| self.moe_ffn_params(&moe, n));
            (moe.first_dense.min(self.layers), (all, used))
        });
        let (n_dense, routed) = experts.unwrap_or((self.layers, dense));
        let (n_dense, n_routed) = (n_dense as u64, (self.layers - n_dense) as u64);
        let layers = self.layers as u64;
        let projection_and_norms = 2 * hidden * hidden + 3 * hidden;
        Parameters {
            total: embedding
                + head
                + hidden
                + layers * (attention + norms)
                + n_dense * dense.0
                + n_routed * routed.0,
            active: embedding + layers * attention + n_dense * dense.1 + n_routed * routed.1,
            embedding,
            mtp: self.mtp_depth as u64 * (attention + norms + routed.0 + projection_and_norms),
        }
    }

    /// FLOPs of training on one token, forward and backward (arXiv 2505.09343, table 2's
    /// convention): 6 for every parameter that the token passes, and attention over `seq_len`
    /// tokens, causal (half of it) or not.
    pub fn train_flops_per_token(&self, seq_len: u64, causal: bool) -> f64 {
        let (qk, v) = self.head_dims();
        let keys = if causal { seq_len as f64 / 2.0 } else { seq_len as f64 };
        let attention = 2.0 * keys * (self.heads * (qk + v) * self.layers) as f64;
        6.0 * self.parameters().active as f64 + 3.0 * attention
    }

    /// Bytes of KV cache that one token takes with elements of `element_bytes`.
    pub fn kv_bytes_per_token(&self, element_bytes: u64) -> u64 {
        let per_layer = match self.attention {
            AttentionConfig::Mla { kv_lora_rank, qk_rope_head_dim, .. } => {
                kv_lora_rank + qk_rope_head_dim
            }
            AttentionConfig::Gqa { kv_heads, head_dim } => 2 * kv_heads * head_dim,
        };
        (per_layer * self.layers) as u64 * element_bytes
    }

    /// Columns of queries, keys and values over all heads and layers, MTP modules included: what
    /// attention multiplies per pair of tokens.
    pub fn attention_width(&self) -> f64 {
        let (qk, v) = self.head_dims();
        ((self.layers + self.mtp_depth) * self.heads * (qk + v)) as f64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn model(name: &str) -> ModelConfig {
        ModelConfig::preset(name).unwrap()
    }

    /// 671.03 B in all; 36.62 B active without the embedding, 37.55 B with it: the public
    /// checkpoint and arXiv 2412.19437, section 4.2.
    #[test]
    fn deepseek_v3_has_its_published_size() {
        let p = model("deepseek-v3").parameters();
        assert_eq!(format!("{:.2}", p.total as f64 / 1e9), "671.03");
        assert_eq!(format!("{:.2}", p.active as f64 / 1e9), "36.62");
        assert_eq!(format!("{:.2}", (p.active + p.embedding) as f64 / 1e9), "37.55");
    }

    #[test]
    fn kv_cache_is_exact() {
        let kb = |name: &str| model(name).kv_bytes_per_token(2);
        assert_eq!(kb("deepseek-v3"), 70_272);
        assert_eq!(kb("qwen2.5-72b"), 327_680);
        assert_eq!(kb("llama-3.1-405b"), 516_096);
    }

    #[test]
    fn flops_a_token_to_the_printed_digits() {
        let gf = |n: &str| model(n).train_flops_per_token(4096, true) / 1e9;
        assert_eq!(format!("{:.0}", gf("deepseek-v3")), "250");
        assert_eq!(format!("{:.0}", gf("deepseek-v2")), "155");
    }

    #[test]
    fn moe_layers_begin_after_the_dense_ones() {
        let m = model("deepseek-v3");
        assert!(!m.is_moe(2) && m.is_moe(3));
        assert!(!model("llama-3.1-405b").is_moe(100));
    }
}
