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

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};

use serde::Serialize;
use serde_json::json;

use super::lock::Lock;
use super::log::Logs;
use super::{Divergence, StepLog, StepOutcome, TrainConfig, TrainError, Trainer, ValidationLog};
use crate::backend::Backend;
use crate::checkpoint::{hf, training};
use crate::generate::{Sampling, Settings, generate};
use crate::model::Params;
use crate::{Tensor, files, memory};

/// What a run tells its caller while it goes on.
#[derive(Debug)]
pub enum Event<'a> {
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
        /// The claim, as [`Lock::stale`] holds it.
        claim: &'a str,
    },
    /// A checkpoint that cannot be used; the one before it is tried.
    Refused {
        /// The checkpoint's folder.
        path: &'a Path,
        /// What is wrong with it.
        reason: String,
    },
    /// A step was done; also told after [`Event::Skipped`].
    Step(&'a StepLog),
    /// A step's update was left out because loss or gradient was not finite.
    Skipped(&'a Divergence),
    /// The loss on what is held out was measured.
    Validation(&'a ValidationLog),
    /// A sample of the model's text was drawn.
    Sample {
        /// Steps done when it was drawn.
        step: u64,
        /// The text, prompt included.
        text: &'a str,
    },
    /// A checkpoint is about to be written.
    Saving,
    /// A checkpoint was written.
    Checkpoint {
        /// Steps done when it was written.
        step: u64,
        /// The checkpoint's folder.
        path: &'a Path,
    },
}

/// The folder of a run, and whether it goes on there.
#[derive(Clone, Debug)]
pub struct Place {
    /// The run's folder.
    pub out: PathBuf,
    /// Go on from its newest checkpoint, where there is one.
    pub resume: bool,
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

/// Runs `config` to its end or until `stop` says so; either way a checkpoint is written. `tell` is
/// called with every [`Event`].
///
/// # Errors
/// [`TrainError`]. Until the first step nothing of a run that the folder holds is changed.
pub fn run<B: Backend>(
    config: TrainConfig,
    backend: B,
    place: &Place,
    stop: &dyn Fn() -> bool,
    tell: &mut dyn FnMut(&Event<'_>),
) -> Result<Summary, TrainError> {
    memory::training(&config)?.check()?;
    let out = &place.out;
    // Bad data or a bad model leaves no folder behind: a new one is made once the trainer stands.
    let lock = match out.is_dir() {
        true => Some(Lock::acquire(out)?),
        false => None,
    };
    let saved = match place.resume {
        true => training::latest(&out.join("checkpoints"), &mut |path, reason| {
            tell(&Event::Refused { path, reason: reason.to_string() });
        })?,
        false => {
            expect_no_run(out)?;
            None
        }
    };
    let resumed_from = saved.as_ref().map(|s| s.step);
    let trainer = match saved {
        Some(saved) => Trainer::resume(config, backend, saved)?,
        None => Trainer::new(config, backend)?,
    };
    let lock = match lock {
        Some(lock) => lock,
        None => {
            fs::create_dir_all(out).map_err(|e| folder(out, &e))?;
            let lock = Lock::acquire(out)?;
            expect_no_run(out)?;
            lock
        }
    };
    if let Some(claim) = &lock.stale {
        tell(&Event::TakenOver { claim });
    }
    let mut run = Run::start(trainer, place, resumed_from, lock)?;
    let event = Event::Start {
        step: run.trainer.steps,
        steps: run.trainer.config.steps,
        parameters: run.summary.parameters,
        data: run.trainer.loader.digest(),
    };
    tell(&event);
    run.steps(stop, tell)?;
    run.end(tell)
}

/// Refuses a folder that holds a run, which a new one would overwrite.
fn expect_no_run(out: &Path) -> Result<(), TrainError> {
    let holds = match training::list(&out.join("checkpoints"))?.first() {
        Some((step, _)) => format!("a run's checkpoints up to step {step}"),
        None if out.join(CONFIG).exists() => format!("a run ({CONFIG}, no checkpoint yet)"),
        None => return Ok(()),
    };
    let message = format!("holds {holds}; go on with --resume or name another folder with --out");
    Err(TrainError::Folder { path: out.to_owned(), message })
}

/// Name of the configuration in a run's folder.
pub const CONFIG: &str = "run.toml";

/// The configuration with which the run in `out` goes on: that of its `run.toml`, `None` where
/// there is none. `asked` makes the configuration that the caller asks for from it; it must be the
/// same.
///
/// # Errors
/// [`TrainError::Folder`] with every key that differs and both values.
pub fn resumed_config(
    out: &Path,
    asked: impl FnOnce(&TrainConfig) -> Result<TrainConfig, TrainError>,
) -> Result<Option<TrainConfig>, TrainError> {
    let path = out.join(CONFIG);
    if !path.exists() {
        return Ok(None);
    }
    let config = TrainConfig::read(&path, &[])?;
    let differences = config.differences(&asked(&config)?);
    if differences.is_empty() {
        return Ok(Some(config));
    }
    let words = differences
        .iter()
        .map(|(key, own, asked)| format!("{key} is {own} there and {asked} on the command line"));
    let message = format!(
        "--resume goes on with this file, but {}; leave the flags out, or edit the file to change \
         the run",
        words.collect::<Vec<_>>().join(", ")
    );
    Err(TrainError::Folder { path, message })
}

struct Run<B: Backend> {
    trainer: Trainer<B>,
    logs: Logs,
    summary: Summary,
    losses: Vec<f64>,
    /// The step of the newest checkpoint.
    saved: Option<u64>,
    /// Step and loss of the newest validation.
    validated: Option<(u64, f64)>,
    /// The folder is this run's until the end.
    _lock: Lock,
}

impl<B: Backend> Run<B> {
    fn start(
        trainer: Trainer<B>,
        place: &Place,
        resumed_from: Option<u64>,
        mut lock: Lock,
    ) -> Result<Run<B>, TrainError> {
        let out = place.out.clone();
        lock.begin();
        files::sweep(&out).map_err(|e| folder(&out, &e))?;
        let (toml, text) = (out.join(CONFIG), trainer.config.to_toml());
        files::replace(&toml, |file, _| file.write_all(text.as_bytes()))
            .map_err(|e| folder(&toml, &e))?;
        trainer.loader.tokenizer().save(&out.join("tokenizer.json"))?;
        let parameters = trainer.model.specs.iter().map(|s| s.elements()).sum();
        let mut logs = Logs::open(&out, &trainer.config.log, trainer.steps).map_err(log_error)?;
        let start = json!({
            "from_step": trainer.steps,
            "parameters": parameters,
            "data": trainer.loader.digest(),
            "tokenizer": trainer.loader.tokenizer().digest(),
            "backend": trainer.backend.name(),
            "version": env!("CARGO_PKG_VERSION"),
            "config": trainer.config,
        });
        logs.line("start", start).map_err(log_error)?;
        let summary = Summary {
            out,
            steps: trainer.steps,
            tokens: trainer.tokens,
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
            validated: None,
            _lock: lock,
        })
    }

    fn steps(
        &mut self,
        stop: &dyn Fn() -> bool,
        tell: &mut dyn FnMut(&Event<'_>),
    ) -> Result<(), TrainError> {
        let begin = self.trainer.tokens;
        while !self.trainer.finished() {
            let outcome = match self.trainer.step(stop) {
                Err(TrainError::Diverged(found)) => {
                    let line = json!({ "step": found.step, "reason": found.to_string() });
                    self.logs.line("diverged", line).map_err(log_error)?;
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
                    self.logs.line("diverged", line).map_err(log_error)?;
                    tell(&Event::Skipped(&found));
                    log
                }
            };
            self.summary.seconds += log.seconds;
            self.logs.step(&log).map_err(log_error)?;
            tell(&Event::Step(&log));
            let config = &self.trainer.config;
            let due = |every: u64| every > 0 && log.step.is_multiple_of(every);
            let (sample, checkpoint) = (due(config.log.sample_every), due(config.checkpoint.every));
            if due(config.data.validation.every) {
                self.validate(tell)?;
            }
            if sample {
                self.sample(tell)?;
            }
            if checkpoint {
                self.checkpoint(tell)?;
            }
        }
        let trained = (self.trainer.tokens - begin) as f64;
        self.summary.tokens_per_second = trained / self.summary.seconds.max(1e-9);
        Ok(())
    }

    fn validate(&mut self, tell: &mut dyn FnMut(&Event<'_>)) -> Result<(), TrainError> {
        let Some(log) = self.trainer.validate()? else { return Ok(()) };
        self.logs.validation(&log).map_err(log_error)?;
        tell(&Event::Validation(&log));
        self.validated = Some((log.step, log.loss));
        Ok(())
    }

    fn end(mut self, tell: &mut dyn FnMut(&Event<'_>)) -> Result<Summary, TrainError> {
        if self.saved == Some(self.trainer.steps) {
            // A run killed between writing its last checkpoint and removing the oldest.
            let keep = self.trainer.config.checkpoint.keep;
            training::rotate(&self.summary.out.join("checkpoints"), keep)?;
        } else {
            self.checkpoint(tell)?;
        }
        if !self.summary.stopped && self.validated.map(|v| v.0) != Some(self.trainer.steps) {
            self.validate(tell)?;
        }
        self.summary.validation_loss = self.validated.map(|v| v.1);
        let trainer = &self.trainer;
        let last = &self.losses[self.losses.len().saturating_sub(50)..];
        self.summary.first_loss = self.losses.first().copied();
        self.summary.last_loss =
            (!last.is_empty()).then(|| last.iter().sum::<f64>() / last.len() as f64);
        (self.summary.steps, self.summary.tokens) = (trainer.steps, trainer.tokens);
        if trainer.config.checkpoint.export && !self.summary.stopped {
            let model = self.summary.out.join("model");
            self.export(&model, None)?;
            if let Some(ema) = &trainer.ema {
                self.export(&self.summary.out.join("model-average"), Some(ema.read()))?;
            }
            self.summary.model = Some(model);
        }
        let end = json!({ "summary": self.summary });
        self.logs.line("end", end).map_err(log_error)?;
        Ok(self.summary)
    }

    fn checkpoint(&mut self, tell: &mut dyn FnMut(&Event<'_>)) -> Result<(), TrainError> {
        let config = &self.trainer.config.checkpoint;
        let checkpoints = self.summary.out.join("checkpoints");
        tell(&Event::Saving);
        let saved = self.trainer.save()?;
        let path = training::write(&checkpoints, &saved, config.shard_bytes)?;
        training::rotate(&checkpoints, config.keep)?;
        let step = self.trainer.steps;
        let line = json!({ "step": step, "path": path });
        self.logs.line("checkpoint", line).map_err(log_error)?;
        tell(&Event::Checkpoint { step, path: &path });
        (self.saved, self.summary.checkpoint) = (Some(step), Some(path));
        Ok(())
    }

    /// A text behind the prompt. It is drawn with the run's seed and the step, so that a resumed
    /// run writes the same.
    fn sample(&mut self, tell: &mut dyn FnMut(&Event<'_>)) -> Result<(), TrainError> {
        let Trainer { backend, model, params, config, loader, .. } = &self.trainer;
        let tokenizer = loader.tokenizer();
        let mut tokens = tokenizer.encode(&config.log.sample_prompt)?;
        if tokens.is_empty() {
            tokens.push(tokenizer.eos());
        }
        let weights = model.weights(backend, params)?;
        let settings = Settings {
            tokens: config.log.sample_tokens,
            sampling: Sampling {
                temperature: config.log.sample_temperature,
                top_p: config.log.sample_top_p,
                seed: config.seed.wrapping_add(self.trainer.steps),
            },
            speculative: false,
            stop: vec![tokenizer.eos()],
        };
        let generation = generate(model, backend, &weights, &tokens, &settings, &mut |_| ())?;
        tokens.extend(generation.tokens);
        let (text, step) = (tokenizer.decode(&tokens), self.trainer.steps);
        self.logs.sample(step, &text).map_err(log_error)?;
        tell(&Event::Sample { step, text: &text });
        Ok(())
    }

    fn export(&self, path: &Path, values: Option<Vec<Tensor>>) -> Result<(), TrainError> {
        let Trainer { backend, model, params, config, loader, .. } = &self.trainer;
        let shard_bytes = config.checkpoint.shard_bytes;
        if path.exists() {
            files::sweep(path).map_err(|e| folder(path, &e))?;
        }
        match values {
            None => hf::save(path, model, backend, params, shard_bytes)?,
            Some(values) => {
                let upload = |t| backend.upload(t);
                let buffers = values.into_iter().map(upload).collect::<Result<_, _>>()?;
                hf::save(path, model, backend, &Params::<B> { buffers }, shard_bytes)?;
            }
        }
        Ok(hf::save_tokenizer(path, loader.tokenizer(), &config.model)?)
    }
}

fn folder(path: &Path, error: &std::io::Error) -> TrainError {
    TrainError::Folder { path: path.to_owned(), message: error.to_string() }
}

fn log_error((path, error): (PathBuf, std::io::Error)) -> TrainError {
    folder(&path, &error)
}
