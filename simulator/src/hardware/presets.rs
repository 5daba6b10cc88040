//! The embedded presets, and how a cluster file that names its GPU is resolved.

use super::cluster::{Cluster, Gpu};
use crate::error::SimError;
use fathom_config::unknown_name;

/// `(name, TOML)` of a preset.
type Preset = (&'static str, &'static str);

macro_rules! presets {
    ($folder:literal: $($name:literal),* $(,)?) => {
        &[$(($name, include_str!(concat!("../../presets/", $folder, "/", $name, ".toml")))),*]
    };
}

/// GPUs by name.
pub const GPUS: &[Preset] =
    presets!("gpus": "h800", "h100", "h200", "b200", "gb200", "a100", "mi300x");

/// Clusters by name.
pub const CLUSTERS: &[Preset] = presets!(
    "clusters": "h800-2048", "h800-64", "h100-16384", "h200-2048", "b200-2048", "gb200-nvl72-1152",
    "a100-2048", "mi300x-1024",
);

/// The text of preset `name` of `table`; the error lists what there is.
pub fn preset_text(table: &[Preset], what: &str, name: &str) -> Result<&'static str, SimError> {
    table.iter().find(|(n, _)| *n == name).map(|(_, text)| *text).ok_or_else(|| {
        let known: Vec<&str> = table.iter().map(|(n, _)| *n).collect();
        SimError::input(format!("{what} preset"), unknown_name(name, &known))
    })
}

fn parse<T: serde::de::DeserializeOwned>(file: &str, value: toml::Value) -> Result<T, SimError> {
    serde_path_to_error::deserialize(value)
        .map_err(|e| SimError::input(file, format!("{}: {}", e.path(), e.inner())))
}

fn table(file: &str, text: &str) -> Result<toml::Value, SimError> {
    text.parse::<toml::Table>()
        .map(toml::Value::Table)
        .map_err(|e| SimError::input(file, e.to_string()))
}

/// The GPU preset `name`.
pub fn gpu(name: &str) -> Result<Gpu, SimError> {
    let file = format!("GPU preset '{name}'");
    parse(&file, table(&file, preset_text(GPUS, "GPU", name)?)?)
}

/// The cluster preset `name`.
pub fn cluster(name: &str) -> Result<Cluster, SimError> {
    cluster_from_toml(&format!("cluster preset '{name}'"), preset_text(CLUSTERS, "cluster", name)?)
}

/// A cluster from TOML text; `gpu` is the name of a GPU preset or a table of its own.
pub fn cluster_from_toml(file: &str, text: &str) -> Result<Cluster, SimError> {
    let mut value = table(file, text)?;
    if let Some(slot) = value.get_mut("gpu")
        && let Some(name) = slot.as_str()
    {
        *slot = table(name, preset_text(GPUS, "GPU", name)?)?;
    }
    parse(file, value)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_preset_reads_and_makes_sense() {
        for (name, _) in GPUS {
            let g = gpu(name).unwrap();
            assert!(g.bf16_flops > 1e14 && g.bf16_achievable > 0.3 && g.bf16_achievable < 1.0);
            assert!(g.fp8_flops == 0.0 || g.fp8_flops / g.bf16_flops > 1.9, "{name}");
        }
        for (name, _) in CLUSTERS {
            let c = cluster(name).unwrap();
            assert_eq!(c.gpus % c.gpus_per_node, 0, "{name}");
        }
    }

    #[test]
    fn an_unknown_name_lists_the_known_ones() {
        let e = cluster("h900").unwrap_err().to_string();
        assert!(e.contains("h800-2048") && e.contains("h900"), "{e}");
    }
}
