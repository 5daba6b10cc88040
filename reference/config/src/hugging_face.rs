//! Hugging Face's `config.json`, read and written; the only place that knows its keys.

use std::path::Path;

use fathom_trace::input::{self, MESSAGE, VALUE, shorten};
use serde_json::Value;

use crate::{
    AttentionConfig, ConfigError, ModelConfig, MoeConfig, MtpKind, RopeConfig, Score, Yarn,
};

/// Our keys that Hugging Face's configuration names otherwise.
const NAMES: &[(&str, &str)] = &[
    ("layers", "num_hidden_layers"),
    ("heads", "num_attention_heads"),
    ("mtp_depth", "num_nextn_predict_layers"),
    ("attention.kv_heads", "num_key_value_heads"),
    ("moe.intermediate_size", "moe_intermediate_size"),
    ("moe.top_k", "num_experts_per_tok"),
    ("rope.theta", "rope_theta"),
];

/// What transformers takes where a `deepseek_v3` configuration leaves a key out.
const DEEPSEEK_V3: &[(&str, f64)] = &[
    ("first_k_dense_replace", 3.0),
    ("kv_lora_rank", 512.0),
    ("moe_intermediate_size", 2048.0),
    ("n_group", 8.0),
    ("n_routed_experts", 256.0),
    ("n_shared_experts", 1.0),
    ("num_experts_per_tok", 8.0),
    ("qk_nope_head_dim", 128.0),
    ("qk_rope_head_dim", 64.0),
    ("routed_scaling_factor", 2.5),
    ("topk_group", 4.0),
    ("v_head_dim", 128.0),
];

impl ModelConfig {
    /// Reads a `config.json` whose weights the checkpoint reader knows: DeepSeek-V3's kind.
    ///
    /// # Errors
    /// [`ConfigError`] naming file and key.
    pub fn from_hf_file(path: &Path) -> Result<ModelConfig, ConfigError> {
        ModelConfig::from_hf(&read_json(path)?, path)
    }

    /// As [`ModelConfig::from_hf_file`], from JSON; `path` is only named in errors.
    ///
    /// # Errors
    /// [`ConfigError::Value`] naming the key.
    pub fn from_hf(json: &Value, path: &Path) -> Result<ModelConfig, ConfigError> {
        let keys = Keys::new(json, path);
        keys.must_be("model_type", "deepseek_v3", &[Value::from("deepseek_v3")])?;
        keys.must_be("hidden_act", "silu", &[Value::from("silu"), Value::Null])?;
        keys.must_be("attention_bias", "false", &[Value::from(false), Value::Null])?;
        keys.must_be("moe_layer_freq", "1", &[Value::from(1), Value::Null])?;
        keys.must_be("scoring_func", "sigmoid", &[Value::from("sigmoid"), Value::Null])?;
        keys.must_be("topk_method", "noaux_tc", &[Value::from("noaux_tc"), Value::Null])?;
        keys.known_rope()?;
        keys.model()
    }

    /// Reads the shape that a `config.json` of any decoder gives: dense or with experts,
    /// multi-head, grouped-query, multi-query or latent attention. What does not change a shape
    /// (biases, norms of queries and keys, other extensions of the rotary embedding) is not read.
    ///
    /// # Errors
    /// [`ConfigError`] naming file and key.
    pub fn shape_from_hf_file(path: &Path) -> Result<ModelConfig, ConfigError> {
        ModelConfig::shape_from_hf(&read_json(path)?, path)
    }

    /// As [`ModelConfig::shape_from_hf_file`], from JSON; `path` is only named in errors.
    ///
    /// # Errors
    /// [`ConfigError::Value`] naming the key.
    pub fn shape_from_hf(json: &Value, path: &Path) -> Result<ModelConfig, ConfigError> {
        // Multimodal wrappers keep the language model's shape in `text_config`.
        let inner = json.get("text_config").filter(|v| v.is_object());
        Keys::new(inner.unwrap_or(json), path).model()
    }

    /// The `config.json` of this architecture, as `deepseek_v3`.
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
            Some(moe) => *moe,
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
            "_name_or_path": self.name,
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
}

/// The JSON of a `config.json`.
///
/// # Errors
/// [`ConfigError`] naming the file.
fn read_json(path: &Path) -> Result<Value, ConfigError> {
    let io = |source| ConfigError::Io { path: path.to_owned(), source };
    let text = input::read_text(path, input::CONFIG_BYTES).map_err(io)?;
    serde_json::from_str(&text).map_err(|e| ConfigError::Value {
        path: path.to_owned(),
        place: "the file".into(),
        expected: "JSON".into(),
        found: shorten(&e.to_string(), MESSAGE),
    })
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
    /// What stands for a key that is left out.
    defaults: &'static [(&'static str, f64)],
}

impl<'a> Keys<'a> {
    fn new(json: &'a Value, path: &'a Path) -> Keys<'a> {
        let is_v3 = json.get("model_type").and_then(Value::as_str) == Some("deepseek_v3");
        Keys { json, path, prefix: "", defaults: if is_v3 { DEEPSEEK_V3 } else { &[] } }
    }

    fn model(&self) -> Result<ModelConfig, ConfigError> {
        let layers = self.usize(&["num_hidden_layers", "n_layer"])?;
        let mtp_depth = self.usize_or(&["num_nextn_predict_layers", "num_mtp_layers"], 0)?;
        let intermediate = ["intermediate_size", "n_inner", "ffn_dim", "moe_intermediate_size"];
        let name = self.json.get("_name_or_path").and_then(Value::as_str).unwrap_or("");
        let config = ModelConfig {
            name: shorten(name, VALUE),
            vocab_size: self.usize(&["vocab_size"])?,
            hidden_size: self.usize(&["hidden_size", "n_embd", "d_model"])?,
            layers,
            heads: self.usize(&["num_attention_heads", "n_head"])?,
            attention: self.attention()?,
            intermediate_size: self.usize(&intermediate)?,
            // MTP modules are layers behind the last.
            moe: self.moe()?.filter(|moe| moe.first_dense < layers.saturating_add(mtp_depth)),
            mtp_depth,
            mtp_kind: MtpKind::Sequential,
            rope: self.rope()?,
            max_position_embeddings: self.usize_or(&["max_position_embeddings"], 4096)?,
            rms_norm_eps: self.f64_or("rms_norm_eps", 1e-6)?,
            tie_word_embeddings: self.bool_or("tie_word_embeddings", false)?,
            initializer_range: self.f64_or("initializer_range", 0.02)?,
            bos_token_id: self.token_ids("bos_token_id")?.first().copied(),
            eos_token_ids: self.token_ids("eos_token_id")?,
        };
        match config.refusal() {
            None => Ok(config),
            Some((key, expected, found)) => {
                let path = self.path.to_owned();
                Err(ConfigError::Value { path, place: hf_name(key), expected, found })
            }
        }
    }

    fn attention(&self) -> Result<AttentionConfig, ConfigError> {
        if let Some(kv_lora_rank) = self.opt_usize(&["kv_lora_rank"])? {
            return Ok(AttentionConfig::Mla {
                q_lora_rank: self.opt_usize(&["q_lora_rank"])?,
                kv_lora_rank,
                qk_nope_head_dim: self.usize(&["qk_nope_head_dim"])?,
                qk_rope_head_dim: self.usize(&["qk_rope_head_dim"])?,
                v_head_dim: self.usize(&["v_head_dim"])?,
            });
        }
        let hidden = self.usize(&["hidden_size", "n_embd", "d_model"])?;
        let heads = self.usize(&["num_attention_heads", "n_head"])?;
        let kv_heads = self.usize_or(&["num_key_value_heads"], heads)?;
        let head_dim = match self.opt_usize(&["head_dim"])? {
            Some(given) => given,
            None if heads > 0 && hidden.is_multiple_of(heads) => hidden / heads,
            None => {
                let expected =
                    format!("a number, since hidden_size {hidden} is no multiple of {heads} heads");
                return self.wrong("head_dim", &expected);
            }
        };
        Ok(AttentionConfig::Gqa { kv_heads, head_dim })
    }

    fn moe(&self) -> Result<Option<MoeConfig>, ConfigError> {
        let experts = ["n_routed_experts", "num_local_experts", "num_experts"];
        let Some(n_routed_experts) = self.opt_usize(&experts)? else { return Ok(None) };
        if n_routed_experts == 0 {
            return Ok(None);
        }
        let intermediate_size = self.usize(&["moe_intermediate_size", "intermediate_size"])?;
        // Qwen names the width of its one shared expert instead of a count.
        let shared_width = self.usize_or(&["shared_expert_intermediate_size"], 0)?;
        let shared = shared_width / intermediate_size.max(1);
        let n_group = self.usize_or(&["n_group"], 1)?;
        let softmax = match self.json.get("scoring_func").and_then(Value::as_str) {
            Some(score) => score == "softmax",
            None => self.defaults.is_empty(),
        };
        let greedy =
            self.json.get("topk_method").and_then(Value::as_str) == Some("group_limited_greedy");
        Ok(Some(MoeConfig {
            n_routed_experts,
            n_shared_experts: self.usize_or(&["n_shared_experts"], shared)?,
            top_k: self.usize(&["num_experts_per_tok", "moe_topk"])?,
            intermediate_size,
            n_group,
            topk_group: self.usize_or(&["topk_group"], n_group)?,
            group_top: if greedy { 1 } else { group_top(n_routed_experts, n_group) },
            routed_scaling_factor: self.f64_or("routed_scaling_factor", 1.0)?,
            normalize: self.bool_or("norm_topk_prob", true)?,
            score: if softmax { Score::Softmax } else { Score::Sigmoid },
            first_dense: self.usize_or(&["first_k_dense_replace"], 0)?,
        }))
    }

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

    /// The first of `keys` that is there and not null, with its name.
    fn first<'k>(&self, keys: &[&'k str]) -> Option<(&'k str, &Value)> {
        let present = |key: &&'k str| Some((*key, self.json.get(*key).filter(|v| !v.is_null())?));
        keys.iter().find_map(present)
    }

    fn default(&self, key: &str) -> Option<f64> {
        self.defaults.iter().find(|(name, _)| *name == key).map(|(_, value)| *value)
    }

    /// The first of `keys`, its default, or the first of the other names.
    fn opt_usize(&self, keys: &[&str]) -> Result<Option<usize>, ConfigError> {
        if self.first(&keys[..1]).is_none()
            && let Some(default) = self.default(keys[0])
        {
            return Ok(Some(default as usize));
        }
        match self.first(keys) {
            None => Ok(None),
            Some((key, value)) => match value.as_u64() {
                Some(n) => Ok(Some(n as usize)),
                None => self.wrong(key, "a whole number"),
            },
        }
    }

    fn usize(&self, keys: &[&str]) -> Result<usize, ConfigError> {
        match (self.opt_usize(keys)?, keys) {
            (Some(n), _) => Ok(n),
            (None, [key]) => self.wrong(key, "a whole number"),
            (None, [key, others @ ..]) => {
                self.wrong(key, &format!("a whole number (also read: {})", others.join(", ")))
            }
            (None, []) => unreachable!("a key has a name"),
        }
    }

    fn usize_or(&self, keys: &[&str], default: usize) -> Result<usize, ConfigError> {
        Ok(self.opt_usize(keys)?.unwrap_or(default))
    }

    fn opt_f64(&self, key: &str) -> Result<Option<f64>, ConfigError> {
        match self.first(&[key]) {
            None => Ok(self.default(key)),
            Some((_, value)) => {
                value.as_f64().map_or_else(|| self.wrong(key, "a number"), |x| Ok(Some(x)))
            }
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

    /// Where the rotary embedding is described, in both spellings: `rope_parameters` of
    /// transformers 5, or `rope_theta` and `rope_scaling`; and what kind it is.
    fn rope_keys(&self) -> (Keys<'_>, Option<&str>) {
        let (key, prefix) = match self.json.get("rope_parameters") {
            Some(Value::Object(_)) => ("rope_parameters", "rope_parameters."),
            _ => ("rope_scaling", "rope_scaling."),
        };
        let json = self.json.get(key).unwrap_or(&Value::Null);
        let kind = json.get("rope_type").or_else(|| json.get("type"));
        (Keys { json, path: self.path, prefix, defaults: &[] }, kind.and_then(Value::as_str))
    }

    fn known_rope(&self) -> Result<(), ConfigError> {
        let (inner, kind) = self.rope_keys();
        match kind {
            None | Some("default" | "yarn") => Ok(()),
            Some(_) => inner.wrong("rope_type", "default or yarn"),
        }
    }

    fn rope(&self) -> Result<RopeConfig, ConfigError> {
        let (inner, kind) = self.rope_keys();
        let interleaved = self.bool_or("rope_interleave", true)?;
        let outer = self.opt_f64("rope_theta")?;
        let theta = inner.opt_f64("rope_theta")?.or(outer).unwrap_or(10000.0);
        let positions = self.usize_or(&["max_position_embeddings"], 4096)?;
        let yarn = if kind == Some("yarn") { Some(inner.yarn(positions)?) } else { None };
        Ok(RopeConfig { theta, interleaved, yarn })
    }

    fn yarn(&self, max_position_embeddings: usize) -> Result<Yarn, ConfigError> {
        let original = self.opt_usize(&["original_max_position_embeddings"])?;
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

/// The file's name of one of our dotted keys.
fn hf_name(key: &str) -> String {
    let named = NAMES.iter().find(|(ours, _)| *ours == key).map(|(_, theirs)| (*theirs).to_owned());
    named.unwrap_or_else(|| match key.strip_prefix("rope.yarn.") {
        Some(inner) => format!("rope_scaling.{inner}"),
        None => key.rsplit('.').next().unwrap_or(key).to_owned(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<ModelConfig, ConfigError> {
        ModelConfig::shape_from_hf(&serde_json::from_str(text).unwrap(), Path::new("config.json"))
    }

    #[test]
    fn deepseek_v3_has_the_shape_of_its_preset() {
        let text = r#"{"model_type": "deepseek_v3", "hidden_size": 7168, "num_attention_heads": 128,
            "num_hidden_layers": 61, "intermediate_size": 18432, "vocab_size": 129280,
            "q_lora_rank": 1536, "kv_lora_rank": 512, "qk_nope_head_dim": 128,
            "qk_rope_head_dim": 64, "v_head_dim": 128, "n_routed_experts": 256,
            "num_experts_per_tok": 8, "n_shared_experts": 1, "moe_intermediate_size": 2048,
            "n_group": 8, "topk_group": 4, "first_k_dense_replace": 3,
            "num_nextn_predict_layers": 1, "tie_word_embeddings": false,
            "num_key_value_heads": 128}"#;
        let read = read(text).unwrap();
        let preset = ModelConfig::preset("deepseek-v3").unwrap();
        assert_eq!((read.parameters(), read.attention), (preset.parameters(), preset.attention));
        assert_eq!((read.moe, read.layers), (preset.moe, preset.layers));
        let short = r#"{"model_type": "deepseek_v3", "hidden_size": 7168, "vocab_size": 129280,
            "num_attention_heads": 128, "num_hidden_layers": 61, "intermediate_size": 18432,
            "q_lora_rank": 1536}"#;
        assert_eq!(self::read(short).unwrap().moe, preset.moe, "transformers' own defaults");
    }

    #[test]
    fn grouped_queries_and_mixtrals_names() {
        let text = r#"{"hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8,
            "num_hidden_layers": 32, "intermediate_size": 14336, "vocab_size": 32000,
            "num_local_experts": 8, "num_experts_per_tok": 2}"#;
        let m = read(text).unwrap();
        assert_eq!(m.attention, AttentionConfig::Gqa { kv_heads: 8, head_dim: 128 });
        assert_eq!(m.moe.unwrap().intermediate_size, 14336);
        // Mixtral 8x7B: 46.7 B parameters, 12.9 B active.
        let p = m.parameters();
        assert_eq!(format!("{:.1}", p.total as f64 / 1e9), "46.7");
        assert_eq!(format!("{:.1}", (p.active + p.embedding) as f64 / 1e9), "12.9");
    }

    #[test]
    fn what_is_written_is_read_again() {
        for name in ["deepseek-v3", "small"] {
            let config = ModelConfig::preset(name).unwrap();
            let json = config.to_hf().unwrap();
            assert_eq!(ModelConfig::from_hf(&json, Path::new("config.json")).unwrap(), config);
        }
    }

    #[test]
    fn errors_name_file_and_key_in_the_files_own_words() {
        let whole = r#"{"hidden_size": 8, "num_hidden_layers": 1, "vocab_size": 8,
            "intermediate_size": 8, "#;
        for (text, part) in [
            (r#"{"num_hidden_layers": "x"}"#.to_owned(), "at 'num_hidden_layers'"),
            (format!(r#"{whole}"num_attention_heads": 0}}"#), "at 'head_dim'"),
            (format!(r#"{whole}"num_attention_heads": 3}}"#), "at 'head_dim'"),
            (
                format!(r#"{whole}"num_attention_heads": 4, "num_key_value_heads": 3}}"#),
                "at 'num_key_value_heads': expected a divisor of 4, found 3",
            ),
            (
                format!(r#"{whole}"num_attention_heads": 4, "num_experts": 4}}"#),
                "at 'num_experts_per_tok'",
            ),
            (
                format!(
                    r#"{whole}"num_attention_heads": 4, "num_experts": 4, "n_group": 3,
                "num_experts_per_tok": 2}}"#
                ),
                "at 'n_group'",
            ),
        ] {
            let e = read(&text).unwrap_err().to_string();
            assert!(e.starts_with("config.json, ") && e.contains(part), "{e}");
        }
    }
}
