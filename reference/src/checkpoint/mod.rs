//! Checkpoints of other programs: Hugging Face folders, and safetensors files as such.

pub mod hf;
mod mapped;
mod save;
pub mod tensors;

pub use hf::{HfCheckpoint, HfError};
