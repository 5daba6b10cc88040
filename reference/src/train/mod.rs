//! Training: a run's configuration, its schedules, the step, divergence, checkpoints, logs.
//!
//! [`Trainer`] holds everything that a step changes; [`Trainer::step`] is one optimizer step over
//! any backend. [`run::run`] is a whole run with checkpoints and logs in a folder: what
//! `fathom train` does; [`compare`] sets finished runs beside each other.
//!
//! # Determinism
//!
//! A step's sequences are split evenly over `grad_shards`, in order. Within a shard micro-batches
//! chain into one accumulator; shards are added by the binary tree of neighbours
//! (`docs/numerics.md`, section 8). With `context_shards` every sequence lies in so many parts,
//! whose accumulators are leaves below the shard's. `expert_union` neighbouring shards bring their
//! micro-batches to the routed experts together. Normalisers of all losses are the whole step's. A
//! step is a function of (configuration, weights, moments, place in the data): nothing else is
//! random.

mod amax;
pub mod compare;
mod config;
pub mod divergence;
mod event;
mod folder;
pub mod lock;
pub mod log;
pub mod parallel;
mod plot;
pub mod ranks;
mod read;
pub mod run;
mod runner;
pub mod schedule;
pub(crate) mod shards;
pub mod state;
pub mod sweep;
mod taken;
pub mod tensorboard;
mod trainer;

pub use amax::AmaxHistory;
pub use config::{
    CheckpointConfig, LogConfig, Plan, ScheduleConfig, Schedules, TrainConfig, TrainConfigError,
};
pub use divergence::Divergence;
pub use event::{Event, Summary};
pub use fathom_config::layered::Setting;
pub use folder::{CONFIG, RunFolder, resumed_config};
pub use parallel::ParallelConfig;
pub use read::PRESETS;
pub use runner::Runner;
pub use trainer::{StepLog, StepOutcome, Trainer, ValidationLog};

use std::path::PathBuf;

use crate::EngineError;
use crate::checkpoint::HfError;
use crate::checkpoint::training::CheckpointError;
use crate::data::DataError;
use crate::exchange::ExchangeError;
use crate::exchange::store::MeetingError;
use crate::generate::GenerateError;
use crate::memory::MemoryError;
use crate::memory::room::NoRoom;
use crate::model::BuildError;

/// Why training cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum TrainError {
    /// The run's configuration cannot be used.
    #[error(transparent)]
    Config(#[from] TrainConfigError),
    /// A setting does not fit another, or the checkpoint.
    #[error("{key}: {message}")]
    Setting {
        /// The dotted key.
        key: String,
        /// What is expected and what was found.
        message: String,
    },
    /// The model cannot be laid out.
    #[error(transparent)]
    Build(#[from] BuildError),
    /// The data, or the tokenizer, cannot be read.
    #[error(transparent)]
    Data(#[from] DataError),
    /// An op refused its inputs, or the backend failed.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// A sample of the model's text cannot be drawn.
    #[error(transparent)]
    Generate(#[from] GenerateError),
    /// A training checkpoint cannot be written or read.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// A checkpoint in Hugging Face's layout cannot be written or read.
    #[error(transparent)]
    Hf(#[from] HfError),
    /// Loss or gradient is not finite.
    #[error(transparent)]
    Diverged(Box<Divergence>),
    /// What the run holds in memory cannot be told.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// Ranks cannot exchange.
    #[error(transparent)]
    Exchange(#[from] ExchangeError),
    /// Ranks that are processes do not meet.
    #[error(transparent)]
    Meeting(#[from] MeetingError),
    /// Ranks ended with errors, or not at all.
    #[error("{}", .0.join("\n"))]
    Ranks(Vec<String>),
    /// The machine has less memory than the run needs.
    #[error(transparent)]
    NoRoom(#[from] NoRoom),
    /// The run's folder cannot be used, or one of its files.
    #[error("{}: {message}", path.display())]
    Folder {
        /// The folder or file.
        path: PathBuf,
        /// What is wrong, and what to do.
        message: String,
    },
}
