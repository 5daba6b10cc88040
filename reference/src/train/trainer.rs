//! The trainer: everything that a step changes, and the step.

use std::time::Instant;

use fathom_config::KeyError;
use fathom_trace::Parallel;
use serde::{Deserialize, Serialize};

use super::amax::AmaxHistory;
use super::config::{Plan, Schedules, TrainConfig};
use super::divergence::{self, Divergence};
use super::schedule::Point;
use super::shards::accumulate;
use super::{TrainConfigError, TrainError};
use crate::Tensor;
use crate::backend::{Backend, Result as OpResult};
use crate::checkpoint::HfCheckpoint;
use crate::data::Loader;
use crate::layers::delayed::StepScales;
use crate::layers::{Balance, BalanceKind};
use crate::model::routing::max_violation;
use crate::model::{Batch, Model, ParamSpec, Params, StepReport, StepSettings};
use crate::optim::ema::Ema;
use crate::optim::{NonFinite, Optimizer, scalar};

/// A run in memory: everything that a step changes, and what the step needs.
pub struct Trainer<B: Backend> {
    /// The backend that executes the ops.
    pub backend: B,
    /// The run's configuration.
    pub config: TrainConfig,
    /// The model on this rank; it holds no values.
    pub model: Model,
    /// Master weights by parameter.
    pub params: Params<B>,
    /// The optimizer with its moments.
    pub optimizer: Optimizer<B>,
    /// Average of the weights, where the run keeps one.
    pub ema: Option<Ema>,
    /// The histories of delayed scales, where the recipe has them.
    pub amax: Option<AmaxHistory>,
    /// The data, at the place from which the next step reads.
    pub loader: Loader,
    /// Optimizer steps done, skipped ones included.
    pub steps: u64,
    /// Tokens trained on so far.
    pub tokens: u64,
    /// Micro-batches of what is held out; none where nothing is.
    validation: Vec<Batch>,
    schedules: Schedules,
}

/// The loss on what is held out: a line of `train.jsonl`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct ValidationLog {
    /// Steps done when it was measured.
    pub step: u64,
    /// Mean cross-entropy of the main model, in nats per token.
    pub loss: f64,
    /// Mean cross-entropy of each MTP module.
    pub mtp_loss: Vec<f64>,
    /// Predicted tokens: the rows that the mean is over.
    pub predicted: usize,
    /// Seconds that the measurement took.
    pub seconds: f64,
}

/// What a step reports: a line of `train.jsonl`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct StepLog {
    /// The step, counted from 1.
    pub step: u64,
    /// Tokens trained on, this step's included.
    pub tokens: u64,
    /// Mean cross-entropy of the main model, in nats per token.
    pub loss: f64,
    /// Mean cross-entropy of each MTP module.
    pub mtp_loss: Vec<f64>,
    /// Sum of the balance losses, with their weight.
    pub balance_loss: f64,
    /// Global norm of the gradient before clipping.
    pub gradient_norm: f64,
    /// Learning rate of the update.
    pub learning_rate: f64,
    /// Sequences of the step.
    pub batch: usize,
    /// Gamma: how far the step moves the selection biases.
    pub bias_update_speed: f64,
    /// Lambda: weight of the mean of the MTP modules' losses.
    pub mtp_lambda: f64,
    /// Of each MoE layer: largest load over the mean, less one.
    pub max_violation: Vec<f64>,
    /// Of each MoE layer: its index and the rows that each expert got.
    pub expert_load: Vec<(usize, Vec<u64>)>,
    /// Whether the update was left out because loss or gradient was not finite.
    pub skipped: bool,
    /// Seconds that the step took.
    pub seconds: f64,
    /// Tokens per second: the step's tokens over its seconds.
    pub tokens_per_second: f64,
    /// Seconds that a rank waited for neighbouring stages, the pipeline's bubble; mean over ranks,
    /// none in one process.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bubble_seconds: Option<f64>,
    /// Seconds that a rank waited in all other exchanges, communication that nothing hid; mean over
    /// ranks, none in one process.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exposed_seconds: Option<f64>,
}

/// How a step ended.
#[derive(Clone, Debug, PartialEq)]
pub enum StepOutcome {
    /// The update was done.
    Done(Box<StepLog>),
    /// The update was left out because loss or gradient was not finite, and the run may go on.
    Skipped(Box<StepLog>, Box<Divergence>),
    /// The step was interrupted before anything changed.
    Interrupted,
}

/// A step's micro-batches, by shard, and what its losses are divided by.
pub(super) struct StepBatches {
    pub shards: Vec<Vec<Batch>>,
    pub settings: StepSettings,
    pub counts: Counts,
}

/// What the losses of a step are means over.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Counts {
    /// Rows with a target.
    pub predicted: usize,
    /// The same of each MTP module.
    pub predicted_mtp: Vec<usize>,
    /// Segments that attention stays inside.
    pub segments: usize,
    /// Micro-batches of the step.
    pub micro_batches: usize,
    /// Tokens that the step trains on.
    pub tokens: u64,
}

impl Counts {
    /// Adds a micro-batch of a model of that many MTP modules.
    pub fn add(&mut self, batch: &Batch, depth: usize) {
        self.predicted += batch.predicted();
        self.predicted_mtp.resize(depth, 0);
        for (d, n) in self.predicted_mtp.iter_mut().enumerate() {
            *n += batch.predicted_mtp(d + 1);
        }
        self.segments += batch.segments.len();
        self.micro_batches += 1;
        self.tokens += batch.tokens.len() as u64;
    }

    /// Normalisers and weights of the losses of step `step`.
    pub fn settings(&self, config: &TrainConfig, plan: Plan, step: u64) -> StepSettings {
        let over = |weight: f64, n: usize| if n == 0 { 0.0 } else { weight / n as f64 };
        let kind = config.schedule.balance_kind;
        let groups = match kind {
            BalanceKind::Batch => self.micro_batches,
            BalanceKind::Sequence | BalanceKind::Expert | BalanceKind::Device { .. } => {
                self.segments
            }
        };
        let alpha = plan.balance_loss;
        let depth = self.predicted_mtp.len() as f64;
        let mtp = |&n: &usize| over(plan.mtp_lambda / depth, n);
        StepSettings {
            step,
            micro_batch: None,
            main_scale: over(1.0, self.predicted),
            mtp_scales: self.predicted_mtp.iter().map(mtp).collect(),
            balance: (alpha > 0.0)
                .then(|| Balance { kind, weight: over(alpha, groups) })
                .into_iter()
                .collect(),
            capacity: config.schedule.capacity.clone(),
        }
    }

    /// The log of a step with these losses and loads; `before` are the tokens trained on before it.
    pub fn log(&self, plan: Plan, step: u64, before: u64, report: &StepReport) -> StepLog {
        let mean = |sum: f64, n: usize| if n == 0 { 0.0 } else { sum / n as f64 };
        let mtp = report.mtp.iter().zip(&self.predicted_mtp);
        let wide = |loads: &[usize]| loads.iter().map(|&n| n as u64).collect::<Vec<u64>>();
        let loads: Vec<(usize, Vec<u64>)> =
            report.loads.iter().map(|(layer, loads)| (*layer, wide(loads))).collect();
        StepLog {
            step,
            tokens: before + self.tokens,
            loss: mean(report.main, self.predicted),
            mtp_loss: mtp.map(|(&sum, &n)| mean(sum, n)).collect(),
            balance_loss: report.balance,
            learning_rate: plan.learning_rate,
            batch: plan.batch,
            bias_update_speed: plan.bias_update_speed,
            mtp_lambda: plan.mtp_lambda,
            max_violation: loads.iter().map(|(_, loads)| max_violation(loads)).collect(),
            expert_load: loads,
            ..StepLog::default()
        }
    }
}

impl StepLog {
    /// Whether losses and gradient norm are finite, so that the update can be done.
    pub(super) fn finite(&self) -> bool {
        let numbers = [self.loss, self.balance_loss, self.gradient_norm];
        numbers.iter().chain(&self.mtp_loss).all(|x| x.is_finite())
    }
}

/// The loss on held-out micro-batches; `None` where there are none. Step and seconds are left open.
pub(super) fn validate<B: Backend>(
    model: &Model,
    backend: &B,
    params: &Params<B>,
    held_out: &[Batch],
) -> OpResult<Option<ValidationLog>> {
    if held_out.is_empty() {
        return Ok(None);
    }
    let weights = model.weights(backend, params)?;
    let depth = model.mtp.len();
    let (mut main, mut predicted) = (0.0, 0);
    let mut mtp = vec![(0.0, 0); depth];
    for batch in held_out {
        let device = model.batch(backend, batch)?;
        let settings = StepSettings::of(batch, depth, 0.0);
        let forward = model.forward(backend, &weights, &device, &settings, false)?;
        let report = model.report(backend, &forward)?;
        main += report.main;
        predicted += batch.predicted();
        for (d, (sum, rows)) in mtp.iter_mut().enumerate() {
            *sum += report.mtp[d];
            *rows += batch.predicted_mtp(d + 1);
        }
    }
    let mean = |sum: f64, n: usize| if n == 0 { 0.0 } else { sum / n as f64 };
    Ok(Some(ValidationLog {
        loss: mean(main, predicted),
        mtp_loss: mtp.into_iter().map(|(sum, n)| mean(sum, n)).collect(),
        predicted,
        ..ValidationLog::default()
    }))
}

/// The next shard of the data, `sequences` of it, as micro-batches.
pub(super) fn read_shard(
    loader: &mut Loader,
    config: &TrainConfig,
    sequences: usize,
) -> Result<Vec<Batch>, TrainError> {
    let mut micro_batches = Vec::new();
    let mut left = sequences;
    while left > 0 {
        let take = left.min(config.micro_batch);
        let sequences: Vec<Batch> = (0..take).map(|_| loader.next()).collect::<Result<_, _>>()?;
        left -= take;
        micro_batches.push(Batch::join(&sequences));
    }
    Ok(micro_batches)
}

impl<B: Backend> Trainer<B> {
    /// A run at its beginning: initial weights from `checkpoint.initial` or the seed, moments zero.
    ///
    /// # Errors
    /// [`TrainError`].
    pub fn new(config: TrainConfig, backend: B) -> Result<Trainer<B>, TrainError> {
        let mut trainer = Trainer::prepare(config, backend)?;
        trainer.params = match &trainer.config.checkpoint.initial {
            Some(folder) => HfCheckpoint::open(folder)?.load(&trainer.model, &trainer.backend)?,
            None => trainer.model.init(&trainer.backend, trainer.config.seed)?,
        };
        trainer.optimizer =
            Optimizer::new(&trainer.config.optim, &trainer.model, &trainer.backend)?;
        let weights = trainer.host_weights()?;
        trainer.start_ema(weights);
        Ok(trainer)
    }

    /// One step of a run on a backend that computes nothing: every op of it is asked for, with its
    /// parameters and shapes, on buffers without values. Gives the backend back.
    ///
    /// # Errors
    /// [`TrainError`].
    pub fn rehearse(config: TrainConfig, backend: B) -> Result<B, TrainError> {
        let mut trainer = Trainer::prepare(config, backend)?;
        let master = trainer.model.recipe.master();
        let zeros = |spec: &ParamSpec| trainer.backend.zeros(master, &spec.shape);
        let buffers = trainer.model.specs.iter().map(zeros).collect::<OpResult<_>>()?;
        trainer.params = Params { buffers };
        trainer.optimizer =
            Optimizer::new(&trainer.config.optim, &trainer.model, &trainer.backend)?;
        trainer.step(&|| false)?;
        Ok(trainer.backend)
    }

    /// A run without values: parameters and moments are still to be set.
    pub(super) fn prepare(mut config: TrainConfig, backend: B) -> Result<Trainer<B>, TrainError> {
        let place = format!("run '{}'", config.name);
        let key = |(key, message)| TrainConfigError::Key(KeyError { place, key, message });
        let schedules = config.schedules().map_err(key)?;
        let loader = Loader::open(&config.data, config.seq_len, config.seed)?;
        if loader.vocab_size() > config.model.vocab_size {
            let message = format!(
                "expected at least {}, the tokenizer's entries; found {}",
                loader.vocab_size(),
                config.model.vocab_size
            );
            return Err(TrainError::Setting { key: "model.vocab_size".into(), message });
        }
        let held_out = loader.held_out()?;
        let validation = held_out.chunks(config.micro_batch).map(Batch::join).collect();
        config.model.eos_token_ids = vec![loader.tokenizer().eos()];
        let recipe = config.recipe.clone();
        let model = Model::new(&config.model, recipe, Parallel::default(), 0)?;
        let params = Params { buffers: Vec::new() };
        let optim = config.optim.clone();
        let (first, second) = (Vec::new(), Vec::new());
        let optimizer = Optimizer { config: optim, updates: 0, first, second };
        let amax = AmaxHistory::new(&model);
        let (ema, steps, tokens) = (None, 0, 0);
        Ok(Trainer {
            backend,
            config,
            model,
            params,
            optimizer,
            ema,
            amax,
            loader,
            steps,
            tokens,
            validation,
            schedules,
        })
    }

    /// The loss on what is held out, with the present weights; `None` where nothing is held out.
    ///
    /// # Errors
    /// Those of the backend.
    pub fn validate(&self) -> Result<Option<ValidationLog>, TrainError> {
        let begin = Instant::now();
        let log = validate(&self.model, &self.backend, &self.params, &self.validation)?;
        let seconds = begin.elapsed().as_secs_f64();
        Ok(log.map(|log| ValidationLog { step: self.steps, seconds, ..log }))
    }

    /// Whether the run has reached its number of steps or of tokens.
    pub fn finished(&self) -> bool {
        let steps = self.config.steps.is_some_and(|n| self.steps >= n);
        steps || self.config.tokens.is_some_and(|n| self.tokens as f64 >= n)
    }

    /// What the schedules say of the step to come.
    pub fn plan(&self) -> Plan {
        self.schedules.at(Point { step: self.steps + 1, tokens: self.tokens })
    }

    /// Starts the average of the weights from `average`, where the run keeps one.
    pub(super) fn start_ema(&mut self, average: Vec<Tensor>) {
        let decay = self.config.optim.ema_decay;
        self.ema = (decay > 0.0).then(|| Ema::new(average, decay));
    }

    /// The parameters on the host, in master precision, by [`ParamId`](crate::model::ParamId).
    ///
    /// # Errors
    /// Those of the backend.
    pub fn host_weights(&self) -> OpResult<Vec<Tensor>> {
        self.params.buffers.iter().map(|b| self.backend.download(b)).collect()
    }

    /// One optimizer step. `stop` is asked before every micro-batch; once it says yes the step is
    /// given up and leaves everything as it was.
    ///
    /// # Errors
    /// [`TrainError`]; [`TrainError::Diverged`] where loss or gradient is not finite and the run is
    /// to stop.
    pub fn step(&mut self, stop: &dyn Fn() -> bool) -> Result<StepOutcome, TrainError> {
        let begin = Instant::now();
        let plan = self.plan();
        let place = self.loader.state();
        let batches = self.batches(plan)?;
        let mut weights = self.model.weights(&self.backend, &self.params)?;
        weights.delayed = self.begin_scales(&self.backend)?;
        let model = &self.model;
        let sum = accumulate(&self.backend, model, &weights, &batches, &self.config, stop)?;
        let Some((gradients, report)) = sum else {
            self.loader.restore(&place)?;
            return Ok(StepOutcome::Interrupted);
        };
        let clip = self.optimizer.clip(&self.model, &self.backend, &gradients)?;
        let norm = scalar(&self.backend.download(&clip.norm)?);
        let (step, before) = (self.steps + 1, self.tokens);
        let mut log = batches.counts.log(plan, step, before, &report);
        log.gradient_norm = norm;
        if log.finite() {
            if let (Some(amax), Some(scales)) = (&mut self.amax, weights.delayed.take()) {
                amax.end(&scales.found(&self.backend)?);
            }
            // The weights' handles go first, so that the update may write in place.
            drop(weights);
            let rate = (&clip, plan.learning_rate);
            self.optimizer.update(&self.model, &self.backend, &mut self.params, gradients, rate)?;
            let gamma = plan.bias_update_speed as f32;
            if gamma != 0.0 {
                let loads = &log.expert_load;
                self.model.move_biases(&self.backend, &mut self.params, loads, gamma)?;
            }
            if let Some(ema) = &self.ema {
                ema.update(self.host_weights()?);
            }
            self.finish(&mut log, begin);
            return Ok(StepOutcome::Done(Box::new(log)));
        }
        let found = divergence::find(self, &batches, &log)?;
        match self.config.optim.non_finite {
            NonFinite::Stop => Err(TrainError::Diverged(Box::new(found))),
            NonFinite::Skip => {
                log.skipped = true;
                self.finish(&mut log, begin);
                Ok(StepOutcome::Skipped(Box::new(log), Box::new(found)))
            }
        }
    }

    /// The scales of the step to come, where they are delayed.
    pub(super) fn begin_scales<R: Backend>(&self, backend: &R) -> OpResult<Option<StepScales<R>>> {
        self.amax.as_ref().map(|amax| amax.begin(backend)).transpose()
    }

    fn finish(&mut self, log: &mut StepLog, begin: Instant) {
        let new = log.tokens - self.tokens;
        (self.steps, self.tokens) = (log.step, log.tokens);
        log.seconds = begin.elapsed().as_secs_f64();
        log.tokens_per_second = new as f64 / log.seconds;
    }

    /// The next sequences of the data, as shards of micro-batches.
    fn batches(&mut self, plan: Plan) -> Result<StepBatches, TrainError> {
        let TrainConfig { grad_shards, .. } = self.config;
        let mut shards = Vec::with_capacity(grad_shards);
        for _ in 0..grad_shards {
            shards.push(read_shard(&mut self.loader, &self.config, plan.batch / grad_shards)?);
        }
        let mut counts = Counts::default();
        shards.iter().flatten().for_each(|batch| counts.add(batch, self.model.mtp.len()));
        let settings = counts.settings(&self.config, plan, self.steps + 1);
        Ok(StepBatches { shards, settings, counts })
    }
}
