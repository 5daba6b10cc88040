//! What a cluster is made of, as data: GPUs, nodes, networks.
//!
//! Presets are TOML files in `simulator/presets/`, embedded in the binary, every figure with its
//! source.

pub mod cluster;
mod presets;

pub use presets::{CLUSTERS, cluster, cluster_from_toml, preset_text};
