//! What a configuration may say: limits by key, so that nothing absurd is built and every size,
//! byte and FLOP of what is built can be counted.

use std::path::Path;

use crate::{AttentionConfig, ConfigError, ModelConfig, MoeConfig};

/// Most parameters: 26 times DeepSeek-V3's; what their bytes come to over all ranks is countable.
const MOST_PARAMETERS: u128 = 1 << 44;

/// Most expert weights of all layers together: each has a name.
const MOST_EXPERTS: usize = 1 << 20;

/// A dotted key, its value, and the least and the most that it may be.
type Limited<T> = (&'static str, T, T, T);

impl ModelConfig {
    /// Refuses sizes and numbers out of their limits, and sizes that contradict each other; `path`
    /// is only named in errors.
    ///
    /// # Errors
    /// [`ConfigError::Value`] with the dotted key.
    pub fn check(&self, path: &Path) -> Result<(), ConfigError> {
        let wrong = |(place, expected, found): Refusal| ConfigError::Value {
            path: path.to_owned(),
            place: place.to_owned(),
            expected,
            found,
        };
        self.refusal().map_or(Ok(()), |refusal| Err(wrong(refusal)))
    }

    /// The first number out of its limits, or the first two that contradict each other.
    pub fn refusal(&self) -> Option<Refusal> {
        let outside = |(name, value, least, most): Limited<usize>| {
            let expected = match value {
                _ if value < least => format!("at least {least}"),
                _ if value > most => format!("at most {most}"),
                _ => return None,
            };
            Some((name, expected, value.to_string()))
        };
        let outside_numbers = |(name, value, least, most): Limited<f64>| {
            let within = (least..=most).contains(&value);
            (!within).then(|| (name, format!("{least:?} to {most:?}"), format!("{value:?}")))
        };
        let sizes = self.sizes().into_iter().find_map(outside);
        sizes
            .or_else(|| self.numbers().into_iter().find_map(outside_numbers))
            .or_else(|| self.contradiction())
            .or_else(|| {
                let parameters = self.parameters_at_most();
                let expected = format!("at most {MOST_PARAMETERS} parameters in all");
                let found = format!("{parameters}, by the sizes");
                (parameters > MOST_PARAMETERS).then_some(("the model", expected, found))
            })
    }

    fn sizes(&self) -> Vec<Limited<usize>> {
        const WIDTH: usize = 1 << 20;
        let mut sizes = vec![
            ("vocab_size", self.vocab_size, 1, 1 << 24),
            ("hidden_size", self.hidden_size, 1, WIDTH),
            ("layers", self.layers, 1, 4096),
            ("heads", self.heads, 1, 1 << 14),
            ("intermediate_size", self.intermediate_size, 1, WIDTH),
            ("max_position_embeddings", self.max_position_embeddings, 1, 1 << 30),
            ("mtp_depth", self.mtp_depth, 0, 64),
        ];
        match self.attention {
            AttentionConfig::Mla {
                q_lora_rank,
                kv_lora_rank,
                qk_nope_head_dim,
                qk_rope_head_dim,
                v_head_dim,
            } => sizes.extend([
                ("attention.q_lora_rank", q_lora_rank.unwrap_or(1), 1, WIDTH),
                ("attention.kv_lora_rank", kv_lora_rank, 1, WIDTH),
                ("attention.qk_nope_head_dim", qk_nope_head_dim, 1, 1 << 14),
                ("attention.qk_rope_head_dim", qk_rope_head_dim, 2, 1 << 14),
                ("attention.v_head_dim", v_head_dim, 1, 1 << 14),
            ]),
            AttentionConfig::Gqa { kv_heads, head_dim } => sizes.extend([
                ("attention.kv_heads", kv_heads, 1, 1 << 14),
                ("attention.head_dim", head_dim, 2, 1 << 14),
            ]),
        }
        if let Some(moe) = &self.moe {
            let every_layer =
                MOST_EXPERTS / self.layers.saturating_add(self.mtp_depth).clamp(1, 4096 + 64);
            sizes.extend([
                ("moe.n_routed_experts", moe.n_routed_experts, 1, every_layer.min(1 << 16)),
                ("moe.n_shared_experts", moe.n_shared_experts, 0, 1024),
                ("moe.intermediate_size", moe.intermediate_size, 1, WIDTH),
                ("moe.n_group", moe.n_group, 1, moe.n_routed_experts),
                ("moe.topk_group", moe.topk_group, 1, moe.n_group),
                ("moe.group_top", moe.group_top, 1, moe.n_routed_experts),
            ]);
        }
        sizes
    }

    fn numbers(&self) -> Vec<Limited<f64>> {
        // Numbers that are multiplied and divided by: far from the ends of F32.
        let factor = |name, value| (name, value, 1e-9, 1e9);
        let mut numbers = vec![
            ("rms_norm_eps", self.rms_norm_eps, 0.0, 1.0),
            ("initializer_range", self.initializer_range, 0.0, 1e9),
            ("rope.theta", self.rope.theta, 1.0, 1e15),
        ];
        if let Some(moe) = &self.moe {
            numbers.push(factor("moe.routed_scaling_factor", moe.routed_scaling_factor));
        }
        if let Some(yarn) = &self.rope.yarn {
            let original = yarn.original_max_position_embeddings as f64;
            numbers.extend([
                factor("rope.yarn.factor", yarn.factor),
                ("rope.yarn.original_max_position_embeddings", original, 1.0, 1e9),
                factor("rope.yarn.beta_fast", yarn.beta_fast),
                factor("rope.yarn.beta_slow", yarn.beta_slow),
                ("rope.yarn.mscale", yarn.mscale.unwrap_or(1.0), -1e9, 1e9),
                ("rope.yarn.mscale_all_dim", yarn.mscale_all_dim.unwrap_or(1.0), -1e9, 1e9),
                factor("rope.yarn.attention_factor", yarn.attention_factor.unwrap_or(1.0)),
            ]);
        }
        numbers
    }

    /// Sizes that are each possible, but not together.
    fn contradiction(&self) -> Option<Refusal> {
        let (place, expected, found) = match self.attention {
            AttentionConfig::Mla { qk_rope_head_dim, .. } if qk_rope_head_dim % 2 != 0 => {
                ("attention.qk_rope_head_dim", "an even number".into(), qk_rope_head_dim)
            }
            AttentionConfig::Gqa { head_dim, .. } if head_dim % 2 != 0 => {
                ("attention.head_dim", "an even number".into(), head_dim)
            }
            AttentionConfig::Gqa { kv_heads, .. } if !self.heads.is_multiple_of(kv_heads) => {
                ("attention.kv_heads", format!("a divisor of {}", self.heads), kv_heads)
            }
            _ => return self.moe.as_ref().and_then(groups),
        };
        Some((place, expected, found.to_string()))
    }

    /// The parameters of all layers, each counted as if it were dense and routed at once.
    fn parameters_at_most(&self) -> u128 {
        self.bound(|moe| moe.n_routed_experts)
    }

    /// Upper bound of the parameters that one token is multiplied by, from the sizes alone.
    pub fn active_at_most(&self) -> u128 {
        self.bound(|moe| moe.top_k)
    }

    fn bound(&self, routed: impl Fn(&MoeConfig) -> usize) -> u128 {
        let hidden = self.hidden_size as u128;
        let heads = self.heads as u128;
        let attention = match self.attention {
            AttentionConfig::Mla {
                q_lora_rank,
                kv_lora_rank,
                qk_nope_head_dim,
                qk_rope_head_dim,
                v_head_dim,
            } => {
                let [kv, nope, rope, v] =
                    [kv_lora_rank, qk_nope_head_dim, qk_rope_head_dim, v_head_dim]
                        .map(|n| n as u128);
                let q = match q_lora_rank {
                    Some(rank) => rank as u128 * (hidden + heads * (nope + rope)),
                    None => hidden * heads * (nope + rope),
                };
                q + hidden * (kv + rope) + kv * heads * (nope + v) + heads * v * hidden
            }
            AttentionConfig::Gqa { kv_heads, head_dim } => {
                2 * hidden * head_dim as u128 * (heads + kv_heads as u128)
            }
        };
        let feed_forward = |width: usize| 3 * hidden * width as u128;
        let experts = self.moe.as_ref().map_or(0, |moe| {
            let experts = (routed(moe) + moe.n_shared_experts) as u128;
            experts * (feed_forward(moe.intermediate_size) + hidden)
        });
        let layer = attention + feed_forward(self.intermediate_size) + experts;
        let depth = self.mtp_depth as u128;
        let tables = 2 * self.vocab_size as u128 * hidden;
        (self.layers as u128 + depth) * layer + tables + depth * 2 * hidden * hidden
    }
}

/// A dotted key, what was expected there, what was found.
pub(crate) type Refusal = (&'static str, String, String);

fn groups(moe: &MoeConfig) -> Option<Refusal> {
    let (e, g) = (moe.n_routed_experts, moe.n_group);
    if e % g != 0 {
        return Some(("moe.n_group", format!("a divisor of n_routed_experts {e}"), g.to_string()));
    }
    let reachable = e / g * moe.topk_group.min(g);
    let expected = format!("1 to {reachable}, the experts of {} groups", moe.topk_group);
    let reached = (1..=reachable).contains(&moe.top_k);
    (!reached).then(|| ("moe.top_k", expected, moe.top_k.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every preset is within the limits, and each size and number just outside is refused by its
    /// name.
    #[test]
    fn what_is_outside_its_limits_is_refused_by_key() {
        for name in crate::presets::model_names() {
            ModelConfig::preset(name).unwrap();
        }
        type Set = fn(&mut ModelConfig);
        let cases: [(&str, Set); 12] = [
            ("'layers': expected at most 4096, found 1000000000", |c| c.layers = 1_000_000_000),
            ("'vocab_size'", |c| c.vocab_size = usize::MAX),
            ("'mtp_depth'", |c| c.mtp_depth = usize::MAX),
            ("'moe.n_routed_experts'", |c| c.moe.as_mut().unwrap().n_routed_experts = 1 << 60),
            ("'moe.topk_group': expected at most 8", |c| c.moe.as_mut().unwrap().topk_group = 9),
            ("'rms_norm_eps': expected 0.0 to 1.0, found NaN", |c| c.rms_norm_eps = f64::NAN),
            ("'rms_norm_eps': expected 0.0 to 1.0, found -1e-6", |c| c.rms_norm_eps = -1e-6),
            ("'rope.theta': expected 1.0", |c| c.rope.theta = 0.0),
            ("'moe.routed_scaling_factor'", |c| {
                c.moe.as_mut().unwrap().routed_scaling_factor = f64::INFINITY;
            }),
            ("'heads': expected at least 1, found 0", |c| c.heads = 0),
            ("'the model': expected at most 17592186044416 parameters", |c| {
                c.hidden_size = 1 << 20;
                c.intermediate_size = 1 << 20;
            }),
            ("'moe.top_k'", |c| c.moe.as_mut().unwrap().top_k = usize::MAX),
        ];
        for (part, set) in cases {
            let mut config = ModelConfig::preset("deepseek-v3").unwrap();
            set(&mut config);
            let said = config.check(Path::new("config.json")).unwrap_err().to_string();
            assert!(said.contains(part), "{said}: {part}");
        }
    }

    /// The bound of the parameters is no less than what the model has.
    #[test]
    fn the_bound_holds_every_presets_parameters() {
        let config = ModelConfig::preset("deepseek-v3").unwrap();
        let bound = config.parameters_at_most();
        assert!((671_026_419_200..800_000_000_000).contains(&bound), "{bound}");
    }
}
