//! The embedded presets, and how a cluster file that names its GPU is resolved.

use super::cluster::Cluster;
use crate::error::SimError;
use fathom_config::presets::gpu_text;
use fathom_config::unknown_name;

/// `(name, TOML)` of a preset.
type Preset = (&'static str, &'static str);

macro_rules! presets {
    ($folder:literal: $($name:literal),* $(,)?) => {
        &[$(($name, include_str!(concat!("../../../presets/", $folder, "/", $name, ".toml")))),*]
    };
}

/// The clusters that come with the project: name and TOML.
pub const CLUSTERS: &[Preset] = presets!(
    "clusters": "h800-2048", "h800-64", "h100-16384", "h200-2048", "b200-2048", "b300-2048",
    "gb200-nvl72-1152", "gb300-nvl72-1152", "a100-2048", "mi300x-1024", "mi355x-1024",
);

/// The TOML of preset `name` of `table`, a table of `what`s; the error lists what there is.
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

/// The cluster of preset `name`, its GPU resolved.
pub fn cluster(name: &str) -> Result<Cluster, SimError> {
    cluster_from_toml(&format!("cluster preset '{name}'"), preset_text(CLUSTERS, "cluster", name)?)
}

/// A cluster from TOML text, which errors call `file`; `gpu` is the name of a GPU preset or a table
/// of its own.
pub fn cluster_from_toml(file: &str, text: &str) -> Result<Cluster, SimError> {
    let mut value = table(file, text)?;
    if let Some(slot) = value.get_mut("gpu")
        && let Some(name) = slot.as_str()
    {
        *slot = table(name, gpu_text(name).map_err(|message| SimError::input(file, message))?)?;
    }
    parse(file, value)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_preset_reads_and_makes_sense() {
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
