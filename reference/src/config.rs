//! The architecture: our own names, read from a Hugging Face `config.json` or from a preset.
//!
//! Hugging Face's names stop here: `reference/src/checkpoint` and this file are the only places
//! that know them. Presets are TOML data under `reference/presets/`.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::files::{self, MESSAGE, VALUE, shorten};
use crate::ops::router::Score;

mod limits;

/// Why a configuration cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// The system's answer.
        source: std::io::Error,
    },
    /// The file is not what it should be.
    #[error("{}, at '{place}': expected {expected}, found {found}", path.display())]
    Value {
        /// The file, or the preset's name.
        path: PathBuf,
        /// The key.
        place: String,
        /// What should stand there.
        expected: String,
        /// What stands there.
        found: String,
    },
    /// No preset has this name.
    #[error("unknown preset '{found}'; known are {}", preset_names().join(", "))]
    Preset {
        /// The name given.
        found: String,
    },
}

/// YaRN, as checkpoints configure it (arXiv 2309.00071).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
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

/// Rotary position embedding.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RopeConfig {
    /// Base of the frequencies.
    pub theta: f64,
    /// Whether rotated pairs are neighbours.
    #[serde(default = "yes")]
    pub interleaved: bool,
    /// Context extension.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub yarn: Option<Yarn>,
}

/// How tokens attend to each other.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "lowercase", deny_unknown_fields)]
pub enum AttentionConfig {
    /// Multi-head latent attention.
    Mla {
        /// Width of the query latent; none for a direct projection.
        #[serde(default, skip_serializing_if = "Option::is_none")]
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
        /// Key and value heads.
        kv_heads: usize,
        /// Columns of a head, all with position.
        head_dim: usize,
    },
}

/// Mixture of experts.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MoeConfig {
    /// Routed experts.
    pub n_routed_experts: usize,
    /// Shared experts; they form one of their joint width.
    pub n_shared_experts: usize,
    /// Routed experts a token.
    pub top_k: usize,
    /// Width of an expert.
    pub intermediate_size: usize,
    /// Groups of experts.
    #[serde(default = "one_usize")]
    pub n_group: usize,
    /// Groups that a token may reach.
    #[serde(default = "one_usize")]
    pub topk_group: usize,
    /// Best experts of a group that make its score.
    #[serde(default = "one_usize")]
    pub group_top: usize,
    /// Multiplied onto the gate values.
    #[serde(default = "one")]
    pub routed_scaling_factor: f64,
    /// Whether gate values are divided by their sum.
    #[serde(default = "yes")]
    pub normalize: bool,
    /// How logits become affinities.
    #[serde(default = "sigmoid")]
    pub score: Score,
    /// Leading layers that are dense.
    #[serde(default)]
    pub first_dense: usize,
}

fn one_usize() -> usize {
    1
}

fn sigmoid() -> Score {
    Score::Sigmoid
}

/// How several future tokens are predicted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum MtpKind {
    /// Modules one after another, each with the next token's embedding: DeepSeek-V3.
    Sequential,
    /// Heads side by side on the main model's hidden state: Gloeckle et al., arXiv 2404.19737.
    Parallel,
}

/// The architecture of a model.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ModelConfig {
    /// Tokens of the vocabulary.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Decoder layers, without MTP modules.
    pub layers: usize,
    /// Query heads.
    pub heads: usize,
    /// How tokens attend to each other.
    pub attention: AttentionConfig,
    /// Width of a dense layer's feed-forward part.
    pub intermediate_size: usize,
    /// Mixture of experts; none for a dense model.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub moe: Option<MoeConfig>,
    /// MTP modules.
    #[serde(default)]
    pub mtp_depth: usize,
    /// How they predict.
    #[serde(default = "sequential")]
    pub mtp_kind: MtpKind,
    /// Rotary position embedding.
    pub rope: RopeConfig,
    /// Longest sequence that the positions are made for.
    pub max_position_embeddings: usize,
    /// Added to the mean square in RMSNorm (the latents' norms always use 1e-6).
    pub rms_norm_eps: f64,
    /// Whether the head is the embedding.
    #[serde(default)]
    pub tie_word_embeddings: bool,
    /// Standard deviation of initial weights.
    pub initializer_range: f64,
    /// Token before a sequence, where the vocabulary has one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bos_token_id: Option<u32>,
    /// Tokens that end a text.
    #[serde(default)]
    pub eos_token_ids: Vec<u32>,
}

fn sequential() -> MtpKind {
    MtpKind::Sequential
}

const PRESETS: &[(&str, &str)] = &[
    ("deepseek-v3", include_str!("../presets/deepseek-v3.toml")),
    ("small", include_str!("../presets/small.toml")),
    ("qwen2.5-72b-gqa", include_str!("../presets/qwen2.5-72b-gqa.toml")),
    ("llama-3.1-405b-gqa", include_str!("../presets/llama-3.1-405b-gqa.toml")),
];

/// The names of the built-in architectures.
pub fn preset_names() -> Vec<&'static str> {
    PRESETS.iter().map(|(name, _)| *name).collect()
}

impl ModelConfig {
    /// A built-in architecture.
    ///
    /// # Errors
    /// [`ConfigError::Preset`].
    pub fn preset(name: &str) -> Result<ModelConfig, ConfigError> {
        let found = PRESETS.iter().find(|(n, _)| *n == name);
        let (_, text) = found.ok_or_else(|| ConfigError::Preset { found: name.to_owned() })?;
        let config: ModelConfig = toml::from_str(text).map_err(|e| ConfigError::Value {
            path: name.into(),
            place: "preset".into(),
            expected: "a model".into(),
            found: e.to_string(),
        })?;
        config.check(Path::new(name))?;
        Ok(config)
    }

    /// Reads `config.json` of a Hugging Face folder (`path` is the file).
    ///
    /// # Errors
    /// [`ConfigError`] naming file and key.
    pub fn from_hf_file(path: &Path) -> Result<ModelConfig, ConfigError> {
        let io = |source| ConfigError::Io { path: path.to_owned(), source };
        let text = files::read_text(path, files::CONFIG_BYTES).map_err(io)?;
        let json = serde_json::from_str(&text).map_err(|e| ConfigError::Value {
            path: path.to_owned(),
            place: "the file".into(),
            expected: "JSON".into(),
            found: shorten(&e.to_string(), MESSAGE),
        })?;
        ModelConfig::from_hf(&json, path)
    }

    /// Reads the JSON of a Hugging Face `deepseek_v3` configuration; `path` is only named in
    /// errors.
    ///
    /// # Errors
    /// [`ConfigError::Value`] naming the key.
    pub fn from_hf(json: &Value, path: &Path) -> Result<ModelConfig, ConfigError> {
        let keys = Keys { json, path, prefix: "" };
        keys.must_be("model_type", "deepseek_v3", &[Value::from("deepseek_v3")])?;
        keys.must_be("hidden_act", "silu", &[Value::from("silu"), Value::Null])?;
        keys.must_be("attention_bias", "false", &[Value::from(false), Value::Null])?;
        keys.must_be("moe_layer_freq", "1", &[Value::from(1), Value::Null])?;
        keys.must_be("scoring_func", "sigmoid", &[Value::from("sigmoid"), Value::Null])?;
        keys.must_be("topk_method", "noaux_tc", &[Value::from("noaux_tc"), Value::Null])?;
        let n_routed_experts = keys.usize_or("n_routed_experts", 256)?;
        let n_group = keys.usize_or("n_group", 8)?;
        let layers = keys.usize("num_hidden_layers")?;
        let top_k = keys.usize_or("num_experts_per_tok", 8)?;
        let moe = MoeConfig {
            n_routed_experts,
            n_shared_experts: keys.usize_or("n_shared_experts", 1)?,
            top_k,
            intermediate_size: keys.usize_or("moe_intermediate_size", 2048)?,
            n_group,
            topk_group: keys.usize_or("topk_group", 4)?,
            group_top: group_top(n_routed_experts, n_group),
            routed_scaling_factor: keys.f64_or("routed_scaling_factor", 2.5)?,
            normalize: keys.bool_or("norm_topk_prob", true)?,
            score: Score::Sigmoid,
            first_dense: keys.usize_or("first_k_dense_replace", 3)?,
        };
        let mtp_depth = match keys.opt_usize("num_nextn_predict_layers")? {
            Some(depth) => depth,
            None => keys.usize_or("num_mtp_layers", 0)?,
        };
        let config = ModelConfig {
            vocab_size: keys.usize("vocab_size")?,
            hidden_size: keys.usize("hidden_size")?,
            layers,
            heads: keys.usize("num_attention_heads")?,
            attention: AttentionConfig::Mla {
                q_lora_rank: keys.opt_usize("q_lora_rank")?,
                kv_lora_rank: keys.usize_or("kv_lora_rank", 512)?,
                qk_nope_head_dim: keys.usize_or("qk_nope_head_dim", 128)?,
                qk_rope_head_dim: keys.usize_or("qk_rope_head_dim", 64)?,
                v_head_dim: keys.usize_or("v_head_dim", 128)?,
            },
            intermediate_size: keys.usize("intermediate_size")?,
            // MTP modules are layers behind the last.
            moe: (moe.first_dense < layers.saturating_add(mtp_depth)).then_some(moe),
            mtp_depth,
            mtp_kind: MtpKind::Sequential,
            rope: keys.rope()?,
            max_position_embeddings: keys.usize_or("max_position_embeddings", 4096)?,
            rms_norm_eps: keys.f64_or("rms_norm_eps", 1e-6)?,
            tie_word_embeddings: keys.bool_or("tie_word_embeddings", false)?,
            initializer_range: keys.f64_or("initializer_range", 0.02)?,
            bos_token_id: keys.token_ids("bos_token_id")?.first().copied(),
            eos_token_ids: keys.token_ids("eos_token_id")?,
        };
        config.check(path)?;
        Ok(config)
    }

    /// What `config.json` says of this architecture.
    ///
    /// # Errors
    /// What of it Hugging Face's `deepseek_v3` cannot say.
    pub fn to_hf(&self) -> Result<Value, &'static str> {
        let AttentionConfig::Mla {
            q_lora_rank,
            kv_lora_rank,
            qk_nope_head_dim,
            qk_rope_head_dim,
            v_head_dim,
        } = self.attention
        else {
            return Err("its attention has no latent");
        };
        let moe = match &self.moe {
            Some(moe) => moe.clone(),
            None => {
                let v3 = ModelConfig::preset("deepseek-v3").expect("a preset of ours");
                MoeConfig {
                    first_dense: self.layers + self.mtp_depth,
                    ..v3.moe.expect("it has experts")
                }
            }
        };
        if moe.score != Score::Sigmoid {
            return Err("its affinities are no sigmoids");
        }
        if self.mtp_depth > 0 && self.mtp_kind != MtpKind::Sequential {
            return Err("its MTP heads are parallel");
        }
        if moe.n_group > 1 && moe.group_top != group_top(moe.n_routed_experts, moe.n_group) {
            return Err("a group's score is not the sum of its two best experts (group_top)");
        }
        let mut rope = serde_json::json!({ "rope_type": "default", "rope_theta": self.rope.theta });
        if let Some(yarn) = &self.rope.yarn {
            rope = serde_json::to_value(yarn).expect("numbers");
            rope["rope_type"] = "yarn".into();
            rope["rope_theta"] = self.rope.theta.into();
        }
        Ok(serde_json::json!({
            "architectures": ["DeepseekV3ForCausalLM"],
            "model_type": "deepseek_v3",
            "attention_bias": false,
            "attention_dropout": 0.0,
            "bos_token_id": self.bos_token_id,
            "dtype": "float32",
            "eos_token_id": match &self.eos_token_ids[..] {
                [] => Value::Null,
                [one] => (*one).into(),
                several => several.into(),
            },
            "first_k_dense_replace": moe.first_dense,
            "head_dim": qk_rope_head_dim,
            "hidden_act": "silu",
            "hidden_size": self.hidden_size,
            "initializer_range": self.initializer_range,
            "intermediate_size": self.intermediate_size,
            "kv_lora_rank": kv_lora_rank,
            "max_position_embeddings": self.max_position_embeddings,
            "moe_intermediate_size": moe.intermediate_size,
            "n_group": moe.n_group,
            "n_routed_experts": moe.n_routed_experts,
            "n_shared_experts": moe.n_shared_experts,
            "norm_topk_prob": moe.normalize,
            "num_attention_heads": self.heads,
            "num_experts_per_tok": moe.top_k,
            "num_hidden_layers": self.layers,
            "num_key_value_heads": self.heads,
            "num_nextn_predict_layers": self.mtp_depth,
            "q_lora_rank": q_lora_rank,
            "qk_nope_head_dim": qk_nope_head_dim,
            "qk_rope_head_dim": qk_rope_head_dim,
            "qk_head_dim": qk_nope_head_dim + qk_rope_head_dim,
            "rms_norm_eps": self.rms_norm_eps,
            "rope_interleave": self.rope.interleaved,
            "rope_parameters": rope,
            "routed_scaling_factor": moe.routed_scaling_factor,
            "tie_word_embeddings": self.tie_word_embeddings,
            "topk_group": moe.topk_group,
            "use_cache": true,
            "v_head_dim": v_head_dim,
            "vocab_size": self.vocab_size,
        }))
    }

    /// Whether a layer (MTP modules follow the last) has routed experts.
    pub fn is_moe(&self, layer: usize) -> bool {
        self.moe.as_ref().is_some_and(|m| layer >= m.first_dense)
    }
}

/// The checkpoints' own code sums the two best of a group, whatever top_k.
fn group_top(n_routed_experts: usize, n_group: usize) -> usize {
    2.min(n_routed_experts / n_group.max(1))
}

/// Reads values by key, with errors that name file and key.
struct Keys<'a> {
    json: &'a Value,
    path: &'a Path,
    prefix: &'a str,
}

impl Keys<'_> {
    fn wrong<T>(&self, key: &str, expected: &str) -> Result<T, ConfigError> {
        let found = match self.json.get(key) {
            None => "nothing".to_owned(),
            Some(value) => shorten(&value.to_string(), VALUE),
        };
        let place = format!("{}{key}", self.prefix);
        Err(ConfigError::Value {
            path: self.path.to_owned(),
            place,
            expected: expected.into(),
            found,
        })
    }

    fn must_be(&self, key: &str, expected: &str, allowed: &[Value]) -> Result<(), ConfigError> {
        let found = self.json.get(key).unwrap_or(&Value::Null);
        if allowed.contains(found) { Ok(()) } else { self.wrong(key, expected) }
    }

    fn opt_usize(&self, key: &str) -> Result<Option<usize>, ConfigError> {
        match self.json.get(key).unwrap_or(&Value::Null) {
            Value::Null => Ok(None),
            value => match value.as_u64() {
                Some(n) => Ok(Some(n as usize)),
                None => self.wrong(key, "a whole number"),
            },
        }
    }

    fn usize(&self, key: &str) -> Result<usize, ConfigError> {
        self.opt_usize(key)?.map_or_else(|| self.wrong(key, "a whole number"), Ok)
    }

    fn usize_or(&self, key: &str, default: usize) -> Result<usize, ConfigError> {
        Ok(self.opt_usize(key)?.unwrap_or(default))
    }

    fn opt_f64(&self, key: &str) -> Result<Option<f64>, ConfigError> {
        match self.json.get(key).unwrap_or(&Value::Null) {
            Value::Null => Ok(None),
            value => value.as_f64().map_or_else(|| self.wrong(key, "a number"), |x| Ok(Some(x))),
        }
    }

    fn f64_or(&self, key: &str, default: f64) -> Result<f64, ConfigError> {
        Ok(self.opt_f64(key)?.unwrap_or(default))
    }

    /// One token id, several, or none.
    fn token_ids(&self, key: &str) -> Result<Vec<u32>, ConfigError> {
        let values = match self.json.get(key).unwrap_or(&Value::Null) {
            Value::Null => &[],
            Value::Array(several) => &several[..],
            one => std::slice::from_ref(one),
        };
        let id = |value: &Value| u32::try_from(value.as_u64()?).ok();
        match values.iter().map(id).collect() {
            Some(ids) => Ok(ids),
            None => self.wrong(key, "a token id, a list of them, or null"),
        }
    }

    fn bool_or(&self, key: &str, default: bool) -> Result<bool, ConfigError> {
        match self.json.get(key).unwrap_or(&Value::Null) {
            Value::Null => Ok(default),
            value => value.as_bool().map_or_else(|| self.wrong(key, "true or false"), Ok),
        }
    }

    /// Both spellings: `rope_parameters` of transformers 5, or `rope_theta` and `rope_scaling`.
    fn rope(&self) -> Result<RopeConfig, ConfigError> {
        let interleaved = self.bool_or("rope_interleave", true)?;
        let (key, prefix) = match self.json.get("rope_parameters") {
            Some(Value::Object(_)) => ("rope_parameters", "rope_parameters."),
            _ => ("rope_scaling", "rope_scaling."),
        };
        let outer = self.opt_f64("rope_theta")?;
        let json = self.json.get(key).unwrap_or(&Value::Null);
        let inner = Keys { json, path: self.path, prefix };
        let theta = inner.opt_f64("rope_theta")?.or(outer).unwrap_or(10000.0);
        let kind = json.get("rope_type").or_else(|| json.get("type")).unwrap_or(&Value::Null);
        let yarn = match kind.as_str() {
            None | Some("default") => None,
            Some("yarn") => Some(inner.yarn(self.usize_or("max_position_embeddings", 4096)?)?),
            Some(_) => return inner.wrong("rope_type", "default or yarn"),
        };
        Ok(RopeConfig { theta, interleaved, yarn })
    }

    fn yarn(&self, max_position_embeddings: usize) -> Result<Yarn, ConfigError> {
        let original = self.opt_usize("original_max_position_embeddings")?;
        let original = original.unwrap_or(max_position_embeddings);
        let ratio = max_position_embeddings as f64 / original as f64;
        Ok(Yarn {
            factor: self.f64_or("factor", ratio)?,
            original_max_position_embeddings: original,
            beta_fast: self.f64_or("beta_fast", 32.0)?,
            beta_slow: self.f64_or("beta_slow", 1.0)?,
            mscale: self.opt_f64("mscale")?,
            mscale_all_dim: self.opt_f64("mscale_all_dim")?,
            attention_factor: self.opt_f64("attention_factor")?,
            truncate: self.bool_or("truncate", true)?,
        })
    }
}
