//! What a run tells its caller while it goes on, and how it ended.

use std::path::PathBuf;

use serde::Serialize;

use super::{Divergence, StepLog, ValidationLog};

/// What a run tells its caller while it goes on.
#[derive(Clone, Debug)]
pub enum Event {
    /// It begins or goes on after `step`.
    Start {
        /// Steps already done.
        step: u64,
        /// Steps of the run, where it is known in steps.
        steps: Option<u64>,
        /// Parameters of the model, in elements.
        parameters: usize,
        /// Hash of the data's contents, in hexadecimal digits.
        data: String,
    },
    /// The folder was claimed by a run that was killed (`process 12 on host`).
    TakenOver {
        /// The claim, as [`Lock::stale`](super::lock::Lock::stale) holds it.
        claim: String,
    },
    /// A checkpoint that cannot be used; the one before it is tried.
    Refused {
        /// The checkpoint's folder.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// A step was done; also told after [`Event::Skipped`].
    Step(Box<StepLog>),
    /// A step's update was left out because loss or gradient was not finite.
    Skipped(Box<Divergence>),
    /// The loss on what is held out was measured.
    Validation(ValidationLog),
    /// A sample of the model's text was drawn.
    Sample {
        /// Steps done when it was drawn.
        step: u64,
        /// The text, prompt included.
        text: String,
    },
    /// A checkpoint is about to be written.
    Saving,
    /// A checkpoint was written.
    Checkpoint {
        /// Steps done when it was written.
        step: u64,
        /// The checkpoint's folder.
        path: PathBuf,
    },
}

/// How a run ended.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Summary {
    /// The run's folder.
    pub out: PathBuf,
    /// Steps done in all, those before a resumption included.
    pub steps: u64,
    /// Tokens trained on in all, those before a resumption included.
    pub tokens: u64,
    /// The step of the checkpoint that the run went on from; none for a new run.
    pub resumed_from: Option<u64>,
    /// Whether it was stopped before its end.
    pub stopped: bool,
    /// Parameters of the model, in elements.
    pub parameters: usize,
    /// Main loss of the first step done by this process.
    pub first_loss: Option<f64>,
    /// Mean main loss of the last 50 steps done by this process.
    pub last_loss: Option<f64>,
    /// Loss on what is held out, at the end.
    pub validation_loss: Option<f64>,
    /// Seconds that the steps of this process took, without checkpoints, samples and validation.
    pub seconds: f64,
    /// Tokens per second over all steps done by this process.
    pub tokens_per_second: f64,
    /// Updates left out because loss or gradient was not finite.
    pub skipped: u64,
    /// The newest checkpoint that this process wrote.
    pub checkpoint: Option<PathBuf>,
    /// The exported model's folder; none where nothing was exported.
    pub model: Option<PathBuf>,
}
