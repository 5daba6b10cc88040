//! The architecture of a transformer, in our own names.

use schemars::JsonSchema;
use serde::{Deserialize, Deserializer, Serialize};

/// How the router's logits become affinities of a token to the experts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Score {
    /// A sigmoid of each expert's logit by itself, as in V3.
    Sigmoid,
    /// A softmax over the experts, as in V2.
    Softmax,
}

/// YaRN, as checkpoints configure it (arXiv 2309.00071).
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Yarn {
    /// Ratio of the new context length to the original.
    pub factor: f64,
    /// Context length before the extension.
    pub original_max_position_embeddings: usize,
    /// Rotations above which a frequency is kept.
    #[serde(default = "thirty_two")]
    pub beta_fast: f64,
    /// Rotations below which a frequency is divided by `factor`.
    #[serde(default = "one")]
    pub beta_slow: f64,
    /// Weight of the attention temperature in the tables.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mscale: Option<f64>,
    /// Weight of the attention temperature in the softmax scale.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mscale_all_dim: Option<f64>,
    /// What the tables are multiplied by, where the checkpoint says so itself.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub attention_factor: Option<f64>,
    /// Whether the ends of the ramp are rounded to whole dimensions.
    #[serde(default = "yes")]
    pub truncate: bool,
}

fn thirty_two() -> f64 {
    32.0
}

fn one() -> f64 {
    1.0
}

fn yes() -> bool {
    true
}

/// Rotary position embedding (RoPE).
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RopeConfig {
    /// Base of the frequencies: pair i of d rotates by `theta^(-2i/d)` per position.
    pub theta: f64,
    /// Whether rotated pairs are neighbouring columns; else they are half of the rotated columns
    /// apart, as in Llama.
    #[serde(default = "yes")]
    pub interleaved: bool,
    /// Context extension by YaRN; none: the positions are as trained.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub yarn: Option<Yarn>,
}

/// How tokens attend to each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "lowercase", deny_unknown_fields)]
pub enum AttentionConfig {
    /// Multi-head latent attention (DeepSeek-V2 report, section 2.1).
    Mla {
        /// Width of the query latent; none (in TOML: 0) for a direct projection.
        #[serde(
            default,
            skip_serializing_if = "Option::is_none",
            deserialize_with = "zero_is_none"
        )]
        q_lora_rank: Option<usize>,
        /// Width of the key-value latent.
        kv_lora_rank: usize,
        /// Columns of a head's query and key without position.
        qk_nope_head_dim: usize,
        /// Columns of a head's query, and of the shared key, with position.
        qk_rope_head_dim: usize,
        /// Columns of a head's value.
        v_head_dim: usize,
    },
    /// Grouped-query attention; multi-head with `kv_heads` = heads, multi-query with 1.
    Gqa {
        /// Number of key and value heads.
        kv_heads: usize,
        /// Columns of a head, all with position.
        head_dim: usize,
    },
}

/// The mixture of experts of a model (DeepSeek-V3 report, section 2.1.2).
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MoeConfig {
    /// Routed experts of a layer.
    pub n_routed_experts: usize,
    /// Shared experts of a layer; they are computed as one of their joint width.
    pub n_shared_experts: usize,
    /// Routed experts that each token chooses.
    pub top_k: usize,
    /// Width of an expert's hidden layer.
    pub intermediate_size: usize,
    /// Groups into which the routed experts are divided.
    #[serde(default = "one_usize")]
    pub n_group: usize,
    /// Groups out of which a token may choose its experts.
    #[serde(default = "one_usize")]
    pub topk_group: usize,
    /// Best experts of a group whose affinities add up to its score.
    #[serde(default = "one_usize")]
    pub group_top: usize,
    /// Factor that is multiplied onto the gate values.
    #[serde(default = "one")]
    pub routed_scaling_factor: f64,
    /// Whether the gate values of a token's experts are divided by their sum.
    #[serde(default = "yes")]
    pub normalize: bool,
    /// How the router's logits become affinities.
    #[serde(default = "sigmoid")]
    pub score: Score,
    /// Leading layers that are dense, without experts.
    #[serde(default)]
    pub first_dense: usize,
}

fn one_usize() -> usize {
    1
}

fn sigmoid() -> Score {
    Score::Sigmoid
}

/// How multi-token prediction (MTP) chains its predictions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum MtpKind {
    /// Modules one after another, each with the next token's embedding: DeepSeek-V3.
    Sequential,
    /// Heads side by side on the main model's hidden state: Gloeckle et al., arXiv 2404.19737.
    Parallel,
}

/// The architecture of a model: everything that decides its shapes and its arithmetic but
/// precision.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ModelConfig {
    /// Name for people; may be empty.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub name: String,
    /// Tokens of the vocabulary: rows of embedding and head.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Decoder layers, without MTP modules.
    pub layers: usize,
    /// Heads of the queries.
    pub heads: usize,
    /// How tokens attend to each other.
    pub attention: AttentionConfig,
    /// Width of a dense layer's feed-forward part.
    pub intermediate_size: usize,
    /// Mixture of experts; none for a dense model.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub moe: Option<MoeConfig>,
    /// MTP modules, each of which predicts one token further ahead.
    #[serde(default)]
    pub mtp_depth: usize,
    /// How the MTP modules predict.
    #[serde(default = "sequential")]
    pub mtp_kind: MtpKind,
    /// Rotary position embedding.
    #[serde(default)]
    pub rope: RopeConfig,
    /// Longest sequence that the positions are made for.
    #[serde(default = "four_thousand")]
    pub max_position_embeddings: usize,
    /// Added to the mean square in RMSNorm (the latents' norms always use 1e-6).
    #[serde(default = "millionth")]
    pub rms_norm_eps: f64,
    /// Whether the output head is the embedding's table.
    #[serde(default)]
    pub tie_word_embeddings: bool,
    /// Standard deviation of the initial weights.
    #[serde(default = "fiftieth")]
    pub initializer_range: f64,
    /// Token that begins a sequence, where the vocabulary has one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bos_token_id: Option<u32>,
    /// Tokens each of which ends a text.
    #[serde(default)]
    pub eos_token_ids: Vec<u32>,
}

fn sequential() -> MtpKind {
    MtpKind::Sequential
}

fn four_thousand() -> usize {
    4096
}

fn millionth() -> f64 {
    1e-6
}

fn fiftieth() -> f64 {
    0.02
}

impl Default for RopeConfig {
    fn default() -> Self {
        RopeConfig { theta: 10000.0, interleaved: true, yarn: None }
    }
}

/// TOML has no null: 0 stands for it.
fn zero_is_none<'de, D: Deserializer<'de>>(input: D) -> Result<Option<usize>, D::Error> {
    Ok(Option::<usize>::deserialize(input)?.filter(|&rank| rank > 0))
}

impl ModelConfig {
    /// Whether a layer (MTP modules follow the last) has routed experts.
    pub fn is_moe(&self, layer: usize) -> bool {
        self.moe.is_some_and(|m| layer >= m.first_dense)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zero_projects_the_query_directly() {
        let read = |rank: &str| {
            let rest =
                "kv_lora_rank = 4\nqk_nope_head_dim = 2\nqk_rope_head_dim = 2\nv_head_dim = 2";
            toml::from_str(&format!("kind = \"mla\"\n{rank}{rest}\n")).unwrap()
        };
        let rank = |attention| match attention {
            AttentionConfig::Mla { q_lora_rank, .. } => q_lora_rank,
            AttentionConfig::Gqa { .. } => panic!("MLA was asked for"),
        };
        assert_eq!(rank(read("q_lora_rank = 0\n")), None);
        assert_eq!(rank(read("")), None);
        assert_eq!(rank(read("q_lora_rank = 8\n")), Some(8));
    }
}
