//! What a cluster is made of, as data: GPUs, nodes, networks, and the models that run on it.
//!
//! Presets are TOML files in `simulator/presets/`, embedded in the binary, every figure with its
//! source.

pub mod cluster;
mod hf;
pub mod model;
mod presets;

pub use presets::{CLUSTERS, GPUS, MODELS, cluster, cluster_from_toml, gpu, model, preset_text};
