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
use crate::checkpoint::training::Saved;
use crate::checkpoint::{hf, training};
use crate::data::Tokenizer;
use crate::generate::{Sampling, Settings, generate};
use crate::model::{Model, Params};
use crate::{files, memory};

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
        /// The claim, as [`Lock::stale`] holds it.
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
    tell: &mut dyn FnMut(&Event),
) -> Result<Summary, TrainError> {
    memory::training(&config)?.check()?;
    let (claimed, saved) = claim(place, tell)?;
    let resumed_from = saved.as_ref().map(|s| s.step);
    let trainer = match saved {
        Some(saved) => Trainer::resume(config, backend, saved)?,
        None => Trainer::new(config, backend)?,
    };
    let lock = Claim::hold(claimed, place, tell)?;
    go(trainer, place, resumed_from, Some(lock), stop, tell)
}

/// A run's folder before the run stands: locked where it is there.
pub(super) struct Claim(Option<Lock>);

/// Claims the folder of a run where it is there, and reads the checkpoint to go on from.
///
/// # Errors
/// [`TrainError`]; bad data or a bad model leaves no folder behind: a new one is made once the
/// trainer stands ([`Claim::hold`]).
pub(super) fn claim(
    place: &Place,
    tell: &mut dyn FnMut(&Event),
) -> Result<(Claim, Option<Saved>), TrainError> {
    let out = &place.out;
    let lock = match out.is_dir() {
        true => Some(Lock::acquire(out)?),
        false => None,
    };
    let saved = match place.resume {
        true => training::latest(&out.join("checkpoints"), &mut |path, reason| {
            tell(&Event::Refused { path: path.to_owned(), reason: reason.to_string() });
        })?,
        false => {
            expect_no_run(out)?;
            None
        }
    };
    Ok((Claim(lock), saved))
}

impl Claim {
    /// Makes the folder where there is none yet, and locks it.
    pub(super) fn hold(
        self,
        place: &Place,
        tell: &mut dyn FnMut(&Event),
    ) -> Result<Lock, TrainError> {
        let out = &place.out;
        let lock = match self.0 {
            Some(lock) => lock,
            None => {
                fs::create_dir_all(out).map_err(|e| folder(out, &e))?;
                let lock = Lock::acquire(out)?;
                expect_no_run(out)?;
                lock
            }
        };
        if let Some(claim) = &lock.stale {
            tell(&Event::TakenOver { claim: claim.clone() });
        }
        Ok(lock)
    }
}

/// A trainer's steps, logs and checkpoints to the end of its run.
///
/// # Errors
/// [`TrainError`].
pub(super) fn go<T: Runner>(
    trainer: T,
    place: &Place,
    resumed_from: Option<u64>,
    lock: Option<Lock>,
    stop: &dyn Fn() -> bool,
    tell: &mut dyn FnMut(&Event),
) -> Result<Summary, TrainError> {
    let mut run = Run::start(trainer, place, resumed_from, lock)?;
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

/// What a run asks of its trainer: one in one process, or one of many ranks, which all go through
/// the same run and of which one speaks.
pub trait Runner {
    /// What executes its ops.
    type Backend: Backend;

    /// The backend.
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
/// same but for the layout, which is that asked for.
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
    let asked = asked(&config)?;
    // The layout changes no bit, so a run may go on on another.
    let config = TrainConfig { parallel: asked.parallel.clone(), ..config };
    let differences = config.differences(&asked);
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
        place: &Place,
        resumed_from: Option<u64>,
        mut lock: Option<Lock>,
    ) -> Result<Run<T>, TrainError> {
        let out = place.out.clone();
        let (steps, tokens) = trainer.progress();
        let parameters = trainer.model().specs.iter().map(|s| s.elements()).sum();
        let mut logs = None;
        if trainer.speaks() {
            lock.iter_mut().for_each(Lock::begin);
            files::sweep(&out).map_err(|e| folder(&out, &e))?;
            let (toml, text) = (out.join(CONFIG), trainer.config().to_toml());
            files::replace(&toml, |file, _| file.write_all(text.as_bytes()))
                .map_err(|e| folder(&toml, &e))?;
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
            files::sweep(path).map_err(|e| folder(path, &e))?;
        }
        hf::save(path, model, backend, &params, config.checkpoint.shard_bytes)?;
        Ok(hf::save_tokenizer(path, self.trainer.tokenizer(), &config.model)?)
    }
}

fn folder(path: &Path, error: &std::io::Error) -> TrainError {
    TrainError::Folder { path: path.to_owned(), message: error.to_string() }
}

fn log_error((path, error): (PathBuf, std::io::Error)) -> TrainError {
    folder(&path, &error)
}
