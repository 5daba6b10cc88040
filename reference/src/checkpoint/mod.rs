//! Checkpoints of other programs: Hugging Face folders, and safetensors files as such.

pub mod hf;
mod mapped;
pub mod tensors;

pub use hf::{HfCheckpoint, HfError};
