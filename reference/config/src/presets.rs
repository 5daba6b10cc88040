//! The architectures and GPUs that come with the project: TOML data with the source of its figures.

use std::path::Path;

use crate::{ConfigError, ModelConfig, unknown_name};

macro_rules! presets {
    ($folder:literal: $($name:literal),* $(,)?) => {
        &[$(($name, include_str!(concat!("../presets/", $folder, "/", $name, ".toml")))),*]
    };
}

/// Every architecture: its name and its TOML.
pub const MODELS: &[(&str, &str)] = presets!(
    "models": "deepseek-v3", "deepseek-v2", "kimi-k2", "llama-3.1-405b", "llama-3.1-70b", "llama-3.1-8b",
    "mixtral-8x22b", "qwen2.5-72b", "qwen3-235b-a22b", "qwen3-30b-a3b", "small",
);

/// Every GPU: its name and its TOML.
pub const GPUS: &[(&str, &str)] = presets!(
    "gpus": "h800", "h100", "h200", "h20", "b200", "gb200", "b300", "gb300", "rtx-pro-6000", "a100",
    "mi300x", "mi355x",
);

/// Names that architectures had in version 0.1.
const FORMER: &[(&str, &str)] =
    &[("llama-3.1-405b-gqa", "llama-3.1-405b"), ("qwen2.5-72b-gqa", "qwen2.5-72b")];

/// The names of the architectures.
pub fn model_names() -> Vec<&'static str> {
    MODELS.iter().map(|(name, _)| *name).collect()
}

/// The TOML of an architecture by its name, or by the name that it had in version 0.1.
///
/// # Errors
/// The message for an unknown name, which lists the known ones.
pub fn model_text(name: &str) -> Result<&'static str, String> {
    let name = FORMER.iter().find(|(former, _)| *former == name).map_or(name, |(_, now)| now);
    let found = MODELS.iter().find(|(known, _)| *known == name);
    found.map(|(_, text)| *text).ok_or_else(|| unknown_name(name, &model_names()))
}

/// The TOML of a GPU by its name.
///
/// # Errors
/// The message for an unknown name, which lists the known ones.
pub fn gpu_text(name: &str) -> Result<&'static str, String> {
    let known: Vec<&str> = GPUS.iter().map(|(name, _)| *name).collect();
    let found = GPUS.iter().find(|(known, _)| *known == name);
    found.map(|(_, text)| *text).ok_or_else(|| unknown_name(name, &known))
}

impl ModelConfig {
    /// An architecture that comes with the project, by its name in [`MODELS`].
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
    use crate::Gpu;

    #[test]
    fn every_preset_reads_and_makes_sense() {
        for (name, _) in GPUS {
            let gpu = Gpu::preset(name).unwrap_or_else(|e| panic!("{name}: {e}"));
            assert!(gpu.bf16_flops > 1e14 && (0.3..1.0).contains(&gpu.bf16_achievable), "{name}");
            assert!(gpu.fp8_flops == 0.0 || gpu.fp8_flops / gpu.bf16_flops > 1.9, "{name}");
            // The driver counts a little more than the data sheet's round number, or less.
            let reported =
                gpu.cuda.map_or(1.0, |c| c.memory_bytes as f64 / gpu.memory_bytes as f64);
            assert!((0.9..1.1).contains(&reported), "{name}");
        }
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
