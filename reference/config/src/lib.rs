//! What a model is, what a GPU is, how a configuration is read: said once, for every other room.
//!
//! - [`ModelConfig`]: the architecture of a transformer, in our own names; its sizes counted
//!   ([`Parameters`]), its limits checked, read from and written to Hugging Face's `config.json`.
//! - [`Gpu`]: a GPU's data sheet, and what CUDA reports of it.
//! - [`presets`]: the architectures and GPUs that come with the project, as TOML data.
//! - [`layered`]: TOML in layers (a preset, a file over it, `--set` over both) with errors that
//!   point at the line or the flag that made a value.
//! - [`names`]: the nearest known name to one that is unknown.
//!
//! This room reads text; it computes nothing with a model and knows no op, no emulator and no
//! simulator.
#![forbid(unsafe_code)]

mod architecture;
mod counts;
mod error;
mod gpu;
mod hugging_face;
pub mod layered;
mod limits;
pub mod names;
pub mod presets;

pub use architecture::{AttentionConfig, ModelConfig, MoeConfig, MtpKind, RopeConfig, Score, Yarn};
pub use counts::Parameters;
pub use error::{ConfigError, KeyError};
pub use gpu::{CudaDevice, Gpu};
pub use names::{nearest, unknown_name};
