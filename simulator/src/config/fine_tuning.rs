//! What of a model is trained, and what of a run lies in the hosts' memory.

use fathom_config::{AttentionConfig, ModelConfig};
use serde::{Deserialize, Serialize};

/// A product of a layer that has an adapter beside it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LoraTarget {
    /// Queries, keys and values; of latent attention the projections down to the latents.
    Qkv,
    /// The projection after attention.
    Output,
    /// Both halves of a dense feed-forward's first product.
    GateUp,
    /// Its second product.
    Down,
}

impl LoraTarget {
    /// Input and output width of the product in `model`.
    pub fn widths(self, model: &ModelConfig) -> (u64, u64) {
        let (_, v) = model.head_dims();
        let (h, ffn) = (model.hidden_size, model.intermediate_size);
        let (k, n) = match (self, model.attention) {
            (LoraTarget::Qkv, AttentionConfig::Gqa { kv_heads, head_dim }) => {
                (h, (model.heads + 2 * kv_heads) * head_dim)
            }
            (
                LoraTarget::Qkv,
                AttentionConfig::Mla { q_lora_rank, kv_lora_rank, qk_rope_head_dim, .. },
            ) => (h, q_lora_rank.unwrap_or(0) + kv_lora_rank + qk_rope_head_dim),
            (LoraTarget::Output, _) => (model.heads * v, h),
            (LoraTarget::GateUp, _) => (h, 2 * ffn),
            (LoraTarget::Down, _) => (ffn, h),
        };
        (k as u64, n as u64)
    }
}

/// Low-rank adapters (arXiv 2106.09685): TOML table `[lora]`. The model's own weights are frozen:
/// no gradients, no optimizer state, no products for weight gradients. An adapter is two products
/// in BF16 beside the one that it adapts.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Lora {
    /// Inner width of an adapter.
    pub rank: u64,
    /// Products of every layer that have one.
    pub targets: Vec<LoraTarget>,
}

impl Lora {
    /// Parameters of a layer's adapters.
    pub fn parameters(&self, model: &ModelConfig) -> f64 {
        let of = |t: &LoraTarget| {
            let (k, n) = t.widths(model);
            (self.rank * (k + n)) as f64
        };
        self.targets.iter().map(of).sum()
    }

    /// Why these adapters cannot be timed on `model`.
    pub fn refusal(&self, model: &ModelConfig) -> Option<String> {
        let of_experts = |t: &LoraTarget| matches!(t, LoraTarget::GateUp | LoraTarget::Down);
        if self.targets.is_empty() {
            return Some("lora.targets is empty: name products that have adapters".into());
        }
        let wrong = model.moe.is_some() && self.targets.iter().any(of_experts);
        let message = "lora.targets: adapters of experts are not modelled; use qkv and output";
        wrong.then(|| message.to_owned())
    }
}

/// What lies in the memory of the hosts: TOML table `[offload]`.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Offload {
    /// Share of the optimizer's moments that lie there; what they belong to is updated there, after
    /// its gradients have come and before its weights go back.
    pub optimizer: f64,
    /// Share of the activations kept for the backward that wait there, moved under computation.
    pub activations: f64,
    /// Link of a GPU with its host, one direction, bytes/s.
    pub link_bytes_per_s: f64,
    /// Bytes/s that a GPU's share of the host moves in its memory while it updates.
    pub update_bytes_per_s: f64,
    /// Memory of the host for each GPU, bytes.
    pub memory_bytes: f64,
}

/// PCIe 5.0 with 16 lanes, 63 GB/s, at four fifths; an eighth of two sockets with eight channels of
/// DDR5-4800 each (614 GB/s), at half; an eighth of 2 TB (NVIDIA DGX H100 data sheet).
impl Default for Offload {
    fn default() -> Self {
        Offload {
            optimizer: 0.0,
            activations: 0.0,
            link_bytes_per_s: 50e9,
            update_bytes_per_s: 38e9,
            memory_bytes: 250e9,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// LLaMA-3.1-70B: hidden 8192, 64 heads of 128, 8 of keys and of values.
    #[test]
    fn adapters_by_hand() {
        let model = ModelConfig::preset("llama-3.1-70b").unwrap();
        assert_eq!(LoraTarget::Qkv.widths(&model), (8192, 10240));
        assert_eq!(LoraTarget::Down.widths(&model), (28672, 8192));
        let lora = Lora { rank: 16, targets: vec![LoraTarget::Qkv, LoraTarget::Output] };
        assert_eq!(lora.parameters(&model), 16.0 * (8192 + 10240 + 8192 + 8192) as f64);
        assert_eq!(lora.refusal(&model), None);
        let experts = ModelConfig::preset("qwen3-30b-a3b").unwrap();
        let lora = Lora { targets: vec![LoraTarget::Down], ..lora };
        assert!(lora.refusal(&experts).unwrap().contains("experts"));
    }
}
