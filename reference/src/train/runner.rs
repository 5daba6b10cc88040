//! What a run asks of its trainer, be it one in one process or one of many ranks.

use std::path::{Path, PathBuf};

use super::{StepOutcome, TrainConfig, TrainError, Trainer, ValidationLog};
use crate::backend::Backend;
use crate::checkpoint::training;
use crate::data::Tokenizer;
use crate::model::{Model, Params};

/// What a run asks of its trainer: one in one process, or one of many ranks, which all go through
/// the same run and of which one speaks.
pub trait Runner {
    /// What executes its ops.
    type Backend: Backend;

    /// What executes its ops on this rank.
    fn backend(&self) -> &Self::Backend;
    /// The run's configuration.
    fn config(&self) -> &TrainConfig;
    /// The whole model.
    fn model(&self) -> &Model;
    /// Steps done and tokens trained on.
    fn progress(&self) -> (u64, u64);
    /// The tokenizer of the data.
    fn tokenizer(&self) -> &Tokenizer;
    /// Hash of the data's contents.
    fn data_digest(&self) -> String;
    /// Whether this rank writes logs and the final model, and tells of events.
    fn speaks(&self) -> bool;

    /// Whether the run has reached its number of steps or of tokens.
    fn finished(&self) -> bool {
        let ((steps, tokens), config) = (self.progress(), self.config());
        let done = config.steps.is_some_and(|n| steps >= n);
        done || config.tokens.is_some_and(|n| tokens as f64 >= n)
    }

    /// One optimizer step, given up where `stop` says so.
    ///
    /// # Errors
    /// [`TrainError`]; [`TrainError::Diverged`] where loss or gradient is not finite and the run is
    /// to stop.
    fn step(&mut self, stop: &dyn Fn() -> bool) -> Result<StepOutcome, TrainError>;

    /// The loss on what is held out; none where nothing is, and on ranks that do not speak.
    ///
    /// # Errors
    /// [`TrainError`].
    fn validate(&mut self) -> Result<Option<ValidationLog>, TrainError>;

    /// Whether the run keeps an average of the weights.
    fn averages(&self) -> bool;

    /// The parameters of the whole model, or their `average`; none on ranks that do not speak.
    ///
    /// # Errors
    /// [`TrainError`].
    fn whole_params(&mut self, average: bool) -> Result<Option<Params<Self::Backend>>, TrainError>;

    /// Writes a checkpoint into the folder of checkpoints, and gives its path.
    ///
    /// # Errors
    /// [`TrainError`].
    fn checkpoint(&mut self, folder: &Path) -> Result<PathBuf, TrainError>;

    /// Called at the end of the run: what the trainer itself writes.
    ///
    /// # Errors
    /// [`TrainError`].
    fn end(&mut self) -> Result<(), TrainError> {
        Ok(())
    }
}

impl<B: Backend> Runner for Trainer<B> {
    type Backend = B;

    fn backend(&self) -> &B {
        &self.backend
    }

    fn config(&self) -> &TrainConfig {
        &self.config
    }

    fn model(&self) -> &Model {
        &self.model
    }

    fn progress(&self) -> (u64, u64) {
        (self.steps, self.tokens)
    }

    fn tokenizer(&self) -> &Tokenizer {
        self.loader.tokenizer()
    }

    fn data_digest(&self) -> String {
        self.loader.digest()
    }

    fn speaks(&self) -> bool {
        true
    }

    fn step(&mut self, stop: &dyn Fn() -> bool) -> Result<StepOutcome, TrainError> {
        Trainer::step(self, stop)
    }

    fn validate(&mut self) -> Result<Option<ValidationLog>, TrainError> {
        Trainer::validate(self)
    }

    fn averages(&self) -> bool {
        self.ema.is_some()
    }

    fn whole_params(&mut self, average: bool) -> Result<Option<Params<B>>, TrainError> {
        let Some(ema) = self.ema.as_ref().filter(|_| average) else {
            return Ok(Some(Params { buffers: self.params.buffers.clone() }));
        };
        let upload = |t| self.backend.upload(t);
        let buffers = ema.read().into_iter().map(upload).collect::<Result<_, _>>()?;
        Ok(Some(Params { buffers }))
    }

    fn checkpoint(&mut self, folder: &Path) -> Result<PathBuf, TrainError> {
        Ok(training::write(folder, &self.save()?, self.config.checkpoint.shard_bytes)?)
    }
}
