//! A whole run in a folder: steps, logs, samples, checkpoints, and the final model.
//!
//! ```text
//! OUT/run.toml             the configuration, complete
//! OUT/run.lock             who is at work here; empty while nobody is
//! OUT/tokenizer.json
//! OUT/train.jsonl          one line per step
//! OUT/tensorboard/         event files
//! OUT/checkpoints/         step-NNNNNNNN/
//! OUT/model/               the final weights in Hugging Face's layout, with tokenizer.json
//! OUT/model-average/       their average, where the run keeps one
//! ```

use std::io::Write;
use std::path::{Path, PathBuf};

use serde_json::json;

use super::event::{Event, Summary};
use super::folder::{CONFIG, RunFolder, in_folder};
use super::lock::Lock;
use super::log::Logs;
use super::runner::Runner;
use super::{StepOutcome, TrainConfig, TrainError, Trainer};
use crate::backend::Backend;
use crate::checkpoint::{hf, training};
use crate::generate::{Sampling, Settings, generate};
use crate::{files, memory};

/// Runs `config` to its end or until `stop` says so; either way a checkpoint is written. `tell` is
/// called with every [`Event`].
///
/// # Errors
/// [`TrainError`]. Until the first step nothing of a run that the folder holds is changed.
pub fn run<B: Backend>(
    config: TrainConfig,
    backend: B,
    folder: &RunFolder,
    stop: &dyn Fn() -> bool,
    tell: &mut dyn FnMut(&Event),
) -> Result<Summary, TrainError> {
    memory::training(&config)?.check()?;
    let (claimed, saved) = folder.claim(tell)?;
    let resumed_from = saved.as_ref().map(|s| s.step);
    let trainer = match saved {
        Some(saved) => Trainer::resume(config, backend, saved)?,
        None => Trainer::new(config, backend)?,
    };
    let lock = claimed.hold(folder, tell)?;
    go(trainer, folder, resumed_from, Some(lock), stop, tell)
}

/// A trainer's steps, logs and checkpoints to the end of its run.
///
/// # Errors
/// [`TrainError`].
pub(super) fn go<T: Runner>(
    trainer: T,
    folder: &RunFolder,
    resumed_from: Option<u64>,
    lock: Option<Lock>,
    stop: &dyn Fn() -> bool,
    tell: &mut dyn FnMut(&Event),
) -> Result<Summary, TrainError> {
    let mut run = Run::start(trainer, folder, resumed_from, lock)?;
    let event = Event::Start {
        step: run.trainer.progress().0,
        steps: run.trainer.config().steps,
        parameters: run.summary.parameters,
        data: run.trainer.data_digest(),
    };
    tell(&event);
    run.steps(stop, tell)?;
    run.end(tell)
}

struct Run<T: Runner> {
    trainer: T,
    /// None on a rank that does not speak.
    logs: Option<Logs>,
    summary: Summary,
    losses: Vec<f64>,
    /// The step of the newest checkpoint.
    saved: Option<u64>,
    /// The step of the newest validation.
    measured: Option<u64>,
    /// The loss that it told.
    validated: Option<f64>,
    /// The folder is this run's until the end.
    _lock: Option<Lock>,
}

impl<T: Runner> Run<T> {
    fn start(
        trainer: T,
        folder: &RunFolder,
        resumed_from: Option<u64>,
        mut lock: Option<Lock>,
    ) -> Result<Run<T>, TrainError> {
        let out = folder.out.clone();
        let (steps, tokens) = trainer.progress();
        let parameters = trainer.model().specs.iter().map(|s| s.elements()).sum();
        let mut logs = None;
        if trainer.speaks() {
            lock.iter_mut().for_each(Lock::begin);
            files::sweep(&out).map_err(|e| in_folder(&out, &e))?;
            let (toml, text) = (out.join(CONFIG), trainer.config().to_toml());
            files::replace(&toml, |file, _| file.write_all(text.as_bytes()))
                .map_err(|e| in_folder(&toml, &e))?;
            trainer.tokenizer().save(&out.join("tokenizer.json"))?;
            let mut open = Logs::open(&out, &trainer.config().log, steps).map_err(log_error)?;
            let start = json!({
                "from_step": steps,
                "parameters": parameters,
                "data": trainer.data_digest(),
                "tokenizer": trainer.tokenizer().digest(),
                "backend": trainer.backend().name(),
                "version": env!("CARGO_PKG_VERSION"),
                "config": trainer.config(),
            });
            open.line("start", start).map_err(log_error)?;
            logs = Some(open);
        }
        let summary = Summary {
            out,
            steps,
            tokens,
            resumed_from,
            stopped: false,
            parameters,
            first_loss: None,
            last_loss: None,
            validation_loss: None,
            seconds: 0.0,
            tokens_per_second: 0.0,
            skipped: 0,
            checkpoint: None,
            model: None,
        };
        Ok(Run {
            trainer,
            logs,
            summary,
            losses: Vec::new(),
            saved: resumed_from,
            measured: None,
            validated: None,
            _lock: lock,
        })
    }

    fn line(&mut self, kind: &str, fields: serde_json::Value) -> Result<(), TrainError> {
        match &mut self.logs {
            Some(logs) => logs.line(kind, fields).map_err(log_error),
            None => Ok(()),
        }
    }

    fn steps(
        &mut self,
        stop: &dyn Fn() -> bool,
        tell: &mut dyn FnMut(&Event),
    ) -> Result<(), TrainError> {
        let begin = self.trainer.progress().1;
        while !self.trainer.finished() {
            let outcome = match self.trainer.step(stop) {
                Err(TrainError::Diverged(found)) => {
                    let line = json!({ "step": found.step, "reason": found.to_string() });
                    self.line("diverged", line)?;
                    return Err(TrainError::Diverged(found));
                }
                outcome => outcome?,
            };
            let log = match outcome {
                StepOutcome::Interrupted => {
                    self.summary.stopped = true;
                    break;
                }
                StepOutcome::Done(log) => {
                    self.losses.push(log.loss);
                    log
                }
                StepOutcome::Skipped(log, found) => {
                    self.summary.skipped += 1;
                    let line = json!({ "step": found.step, "reason": found.to_string() });
                    self.line("diverged", line)?;
                    tell(&Event::Skipped(found));
                    log
                }
            };
            self.summary.seconds += log.seconds;
            if let Some(logs) = &mut self.logs {
                logs.step(&log).map_err(log_error)?;
            }
            let config = self.trainer.config();
            let due = |every: u64| every > 0 && log.step.is_multiple_of(every);
            let (sample, checkpoint) = (due(config.log.sample_every), due(config.checkpoint.every));
            let validation = due(config.data.validation.every);
            tell(&Event::Step(log));
            if validation {
                self.validate(tell)?;
            }
            if sample {
                self.sample(tell)?;
            }
            if checkpoint {
                self.checkpoint(tell)?;
            }
        }
        let trained = (self.trainer.progress().1 - begin) as f64;
        self.summary.tokens_per_second = trained / self.summary.seconds.max(1e-9);
        Ok(())
    }

    fn validate(&mut self, tell: &mut dyn FnMut(&Event)) -> Result<(), TrainError> {
        // Every rank takes part, also those that are told no loss.
        self.measured = Some(self.trainer.progress().0);
        let Some(log) = self.trainer.validate()? else { return Ok(()) };
        if let Some(logs) = &mut self.logs {
            logs.validation(&log).map_err(log_error)?;
        }
        self.validated = Some(log.loss);
        tell(&Event::Validation(log));
        Ok(())
    }

    fn end(mut self, tell: &mut dyn FnMut(&Event)) -> Result<Summary, TrainError> {
        let (steps, tokens) = self.trainer.progress();
        if self.saved != Some(steps) {
            self.checkpoint(tell)?;
        } else if self.trainer.speaks() {
            // A run killed between writing its last checkpoint and removing the oldest.
            let keep = self.trainer.config().checkpoint.keep;
            training::rotate(&self.summary.out.join("checkpoints"), keep)?;
        }
        if !self.summary.stopped && self.measured != Some(steps) {
            self.validate(tell)?;
        }
        self.summary.validation_loss = self.validated;
        let last = &self.losses[self.losses.len().saturating_sub(50)..];
        self.summary.first_loss = self.losses.first().copied();
        self.summary.last_loss =
            (!last.is_empty()).then(|| last.iter().sum::<f64>() / last.len() as f64);
        (self.summary.steps, self.summary.tokens) = (steps, tokens);
        if self.trainer.config().checkpoint.export && !self.summary.stopped {
            let model = self.summary.out.join("model");
            self.export(&model, false)?;
            if self.trainer.averages() {
                self.export(&self.summary.out.join("model-average"), true)?;
            }
            self.summary.model = Some(model);
        }
        self.trainer.end()?;
        let end = json!({ "summary": self.summary });
        self.line("end", end)?;
        Ok(self.summary)
    }

    fn checkpoint(&mut self, tell: &mut dyn FnMut(&Event)) -> Result<(), TrainError> {
        let checkpoints = self.summary.out.join("checkpoints");
        tell(&Event::Saving);
        let path = self.trainer.checkpoint(&checkpoints)?;
        let step = self.trainer.progress().0;
        if self.trainer.speaks() {
            training::rotate(&checkpoints, self.trainer.config().checkpoint.keep)?;
            self.line("checkpoint", json!({ "step": step, "path": path }))?;
        }
        tell(&Event::Checkpoint { step, path: path.clone() });
        (self.saved, self.summary.checkpoint) = (Some(step), Some(path));
        Ok(())
    }

    /// A text behind the prompt. It is drawn with the run's seed and the step, so that a resumed
    /// run writes the same.
    fn sample(&mut self, tell: &mut dyn FnMut(&Event)) -> Result<(), TrainError> {
        let Some(params) = self.trainer.whole_params(false)? else { return Ok(()) };
        let (tokenizer, config) = (self.trainer.tokenizer(), self.trainer.config());
        let (model, backend) = (self.trainer.model(), self.trainer.backend());
        let step = self.trainer.progress().0;
        let mut tokens = tokenizer.encode(&config.log.sample_prompt)?;
        if tokens.is_empty() {
            tokens.push(tokenizer.eos());
        }
        let weights = model.weights(backend, &params)?;
        let settings = Settings {
            tokens: config.log.sample_tokens,
            sampling: Sampling {
                temperature: config.log.sample_temperature,
                top_p: config.log.sample_top_p,
                seed: config.seed.wrapping_add(step),
            },
            speculative: false,
            stop: vec![tokenizer.eos()],
        };
        let generation = generate(model, backend, &weights, &tokens, &settings, &mut |_| ())?;
        tokens.extend(generation.tokens);
        let text = tokenizer.decode(&tokens);
        if let Some(logs) = &mut self.logs {
            logs.sample(step, &text).map_err(log_error)?;
        }
        tell(&Event::Sample { step, text });
        Ok(())
    }

    fn export(&mut self, path: &Path, average: bool) -> Result<(), TrainError> {
        let Some(params) = self.trainer.whole_params(average)? else { return Ok(()) };
        let (model, backend) = (self.trainer.model(), self.trainer.backend());
        let config = self.trainer.config();
        if path.exists() {
            files::sweep(path).map_err(|e| in_folder(path, &e))?;
        }
        hf::save(path, model, backend, &params, config.checkpoint.shard_bytes)?;
        Ok(hf::save_tokenizer(path, self.trainer.tokenizer(), &config.model)?)
    }
}

fn log_error((path, error): (PathBuf, std::io::Error)) -> TrainError {
    in_folder(&path, &error)
}
