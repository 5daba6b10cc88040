//! Models from a Hugging Face `config.json`; the only place where its names appear.

use serde_json::Value;

use super::model::{Attention, Model, Moe};
use crate::error::SimError;

/// Reads keys of one configuration and says which one is missing or wrong.
struct Keys<'a> {
    file: &'a str,
    root: &'a Value,
}

impl Keys<'_> {
    /// The first of `names` that is present and not null.
    fn optional(&self, names: &[&str]) -> Result<Option<u64>, SimError> {
        let found =
            names.iter().find_map(|n| self.root.get(n).filter(|v| !v.is_null()).map(|v| (n, v)));
        let Some((name, v)) = found else { return Ok(None) };
        match v.as_u64().filter(|&u| u <= 1 << 32) {
            Some(u) => Ok(Some(u)),
            None => Err(SimError::input(
                self.file,
                format!("key '{name}': expected a non-negative whole number, found {v}"),
            )),
        }
    }

    /// As [`Keys::optional`], but at least 1 and required.
    fn required(&self, names: &[&str]) -> Result<u64, SimError> {
        match self.optional(names)? {
            Some(0) => Err(SimError::input(self.file, format!("key '{}' is 0", names[0]))),
            Some(u) => Ok(u),
            None => Err(SimError::input(
                self.file,
                format!("key '{}' is missing (looked for {})", names[0], names.join(", ")),
            )),
        }
    }
}

impl Model {
    /// A model from the text of a Hugging Face `config.json`: dense or MoE, MHA, GQA, MQA or MLA,
    /// SwiGLU FFN.
    ///
    /// # Errors
    /// Names `file` and the key that is missing or has the wrong type.
    pub fn from_hf_config(file: &str, text: &str) -> Result<Model, SimError> {
        let root: Value = serde_json::from_str(text)
            .map_err(|e| SimError::input(file, format!("not JSON: {e}")))?;
        // Multimodal wrappers keep the language model's shape in `text_config`.
        let root = root.get("text_config").filter(|v| v.is_object()).unwrap_or(&root);
        let k = Keys { file, root };
        let hidden = k.required(&["hidden_size", "n_embd", "d_model"])?;
        let n_heads = k.required(&["num_attention_heads", "n_head"])?;
        let attention = match k.optional(&["kv_lora_rank"])? {
            Some(kv_lora_rank) => Attention::Mla {
                q_lora_rank: k.optional(&["q_lora_rank"])?.unwrap_or(0),
                kv_lora_rank,
                qk_nope_head_dim: k.required(&["qk_nope_head_dim"])?,
                qk_rope_head_dim: k.required(&["qk_rope_head_dim"])?,
                v_head_dim: k.required(&["v_head_dim"])?,
            },
            None => Attention::Gqa {
                n_kv_heads: k.optional(&["num_key_value_heads"])?.unwrap_or(n_heads),
                head_dim: match k.optional(&["head_dim"])? {
                    Some(d) => d,
                    None if hidden.is_multiple_of(n_heads) => hidden / n_heads,
                    None => {
                        return Err(SimError::input(
                            file,
                            format!(
                                "no 'head_dim', and hidden_size {hidden} is no multiple of {n_heads} heads"
                            ),
                        ));
                    }
                },
            },
        };
        let n_layers = k.required(&["num_hidden_layers", "n_layer"])?;
        let moe = moe(&k, n_layers)?;
        let name = root
            .get("_name_or_path")
            .or_else(|| root.get("model_type"))
            .and_then(Value::as_str)
            .unwrap_or("model");
        Ok(Model {
            name: name.to_string(),
            n_layers,
            hidden,
            n_heads,
            intermediate: k.required(&[
                "intermediate_size",
                "n_inner",
                "ffn_dim",
                "moe_intermediate_size",
            ])?,
            vocab_size: k.required(&["vocab_size"])?,
            n_mtp_layers: k.optional(&["num_nextn_predict_layers"])?.unwrap_or(0),
            tied_embeddings: root
                .get("tie_word_embeddings")
                .and_then(Value::as_bool)
                .unwrap_or(false),
            attention,
            moe,
        })
    }
}

fn moe(k: &Keys, n_layers: u64) -> Result<Option<Moe>, SimError> {
    let Some(experts) = k.optional(&["n_routed_experts", "num_local_experts", "num_experts"])?
    else {
        return Ok(None);
    };
    if experts < 2 {
        return Ok(None);
    }
    let n_activated_experts = k.required(&["num_experts_per_tok", "moe_topk"])?;
    let groups = k.optional(&["n_group"])?.unwrap_or(1).max(1);
    let limited = k.optional(&["topk_group"])?.unwrap_or(groups).clamp(1, groups);
    if n_activated_experts > experts || !experts.is_multiple_of(groups) {
        return Err(SimError::input(
            k.file,
            format!(
                "{n_activated_experts} of {experts} experts in {groups} groups cannot be routed"
            ),
        ));
    }
    let intermediate = k.required(&["moe_intermediate_size", "intermediate_size"])?;
    // Qwen names the width of its one shared expert instead of a count.
    let shared_width = k.optional(&["shared_expert_intermediate_size"])?.unwrap_or(0);
    Ok(Some(Moe {
        n_routed_experts: experts,
        n_activated_experts,
        n_shared_experts: k.optional(&["n_shared_experts"])?.unwrap_or(shared_width / intermediate),
        moe_intermediate: intermediate,
        n_expert_groups: groups,
        n_limited_groups: limited,
        n_dense_layers: k.optional(&["first_k_dense_replace"])?.unwrap_or(0).min(n_layers),
    }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hardware::model;

    #[test]
    fn deepseek_v3_equals_its_preset() {
        let text = r#"{"model_type": "deepseek_v3", "hidden_size": 7168, "num_attention_heads": 128,
            "num_hidden_layers": 61, "intermediate_size": 18432, "vocab_size": 129280, "q_lora_rank": 1536,
            "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
            "n_routed_experts": 256, "num_experts_per_tok": 8, "n_shared_experts": 1,
            "moe_intermediate_size": 2048, "n_group": 8, "topk_group": 4, "first_k_dense_replace": 3,
            "num_nextn_predict_layers": 1, "tie_word_embeddings": false, "num_key_value_heads": 128}"#;
        let read = Model::from_hf_config("config.json", text).unwrap();
        let preset = Model { name: read.name.clone(), ..model("deepseek-v3").unwrap() };
        assert_eq!(read, preset);
    }

    #[test]
    fn gqa_and_mixtral_names() {
        let text = r#"{"hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8,
            "num_hidden_layers": 32, "intermediate_size": 14336, "vocab_size": 32000,
            "num_local_experts": 8, "num_experts_per_tok": 2}"#;
        let m = Model::from_hf_config("config.json", text).unwrap();
        assert_eq!(m.attention, Attention::Gqa { n_kv_heads: 8, head_dim: 128 });
        assert_eq!(m.moe.unwrap().moe_intermediate, 14336);
        // Mixtral 8x7B: 46.7 B parameters, 12.9 B active.
        let p = m.parameters();
        assert_eq!(format!("{:.1}", p.total as f64 / 1e9), "46.7");
        assert_eq!(format!("{:.1}", (p.active + p.embedding) as f64 / 1e9), "12.9");
    }

    #[test]
    fn errors_name_file_and_key() {
        for (text, part) in [
            ("{", "not JSON"),
            (r#"{"hidden_size": "x"}"#, "hidden_size"),
            (r#"{"hidden_size": 8, "num_attention_heads": 0}"#, "num_attention_heads"),
            (r#"{"hidden_size": 9, "num_attention_heads": 4}"#, "head_dim"),
        ] {
            let e = Model::from_hf_config("c.json", text).unwrap_err().to_string();
            assert!(e.starts_with("c.json") && e.contains(part), "{e}");
        }
    }
}
