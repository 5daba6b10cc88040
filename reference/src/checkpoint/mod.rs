//! Checkpoints: of a run ([`training`]), of other programs (Hugging Face folders), and safetensors
//! files as such.

pub mod hf;
mod mapped;
mod save;
pub mod tensors;
pub mod training;

pub use hf::{HfCheckpoint, HfError};
