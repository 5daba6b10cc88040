//! The architectures that come with the project: TOML data with the source of its figures.

use std::path::Path;

use crate::{ConfigError, ModelConfig, unknown_name};

macro_rules! models {
    ($($name:literal),* $(,)?) => {
        &[$(($name, include_str!(concat!("../presets/models/", $name, ".toml")))),*]
    };
}

/// Every architecture: its name and its TOML.
pub const MODELS: &[(&str, &str)] = models!(
    "deepseek-v3",
    "deepseek-v2",
    "llama-3.1-405b",
    "llama-3.1-70b",
    "qwen2.5-72b",
    "qwen3-235b-a22b",
    "small",
);

/// Names that architectures had in version 0.1.
const FORMER: &[(&str, &str)] =
    &[("llama-3.1-405b-gqa", "llama-3.1-405b"), ("qwen2.5-72b-gqa", "qwen2.5-72b")];

/// The names of the architectures.
pub fn model_names() -> Vec<&'static str> {
    MODELS.iter().map(|(name, _)| *name).collect()
}

/// The TOML of an architecture.
///
/// # Errors
/// The message for an unknown name, which lists the known ones.
pub fn model_text(name: &str) -> Result<&'static str, String> {
    let name = FORMER.iter().find(|(former, _)| *former == name).map_or(name, |(_, now)| now);
    let found = MODELS.iter().find(|(known, _)| *known == name);
    found.map(|(_, text)| *text).ok_or_else(|| unknown_name(name, &model_names()))
}

impl ModelConfig {
    /// An architecture that comes with the project.
    ///
    /// # Errors
    /// [`ConfigError::Preset`].
    pub fn preset(name: &str) -> Result<ModelConfig, ConfigError> {
        let text = model_text(name).map_err(ConfigError::Preset)?;
        let config: ModelConfig = toml::from_str(text).map_err(|e| ConfigError::Value {
            path: name.into(),
            place: "preset".into(),
            expected: "a model".into(),
            found: e.to_string(),
        })?;
        config.check(Path::new(name))?;
        Ok(config)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_preset_reads() {
        for (name, _) in MODELS {
            let config = ModelConfig::preset(name).unwrap_or_else(|e| panic!("{name}: {e}"));
            assert!(!config.name.is_empty() && config.layers > 1, "{name}");
        }
    }

    #[test]
    fn an_unknown_name_lists_the_known_ones() {
        let said = ModelConfig::preset("deepseek-v4").unwrap_err().to_string();
        assert!(said.contains("qwen2.5-72b") && said.contains("mean 'deepseek-v3'?"), "{said}");
    }
}
