//! What a run is: the TOML file of `fathom train`, its presets, and the schedules behind it.
//!
//! Sections: `[model]` (`preset`, `path` to a `config.json` or a folder, or every key inline),
//! `[recipe]` (precision), `[data]`, `[optim]`, `[schedule]`, `[parallel]`, `[checkpoint]`,
//! `[log]`. What a file leaves out comes from its `preset`, `tiny` where it names none. `read.rs`
//! reads it.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::parallel::ParallelConfig;
use super::schedule::{Point, Resolved, Schedule};
use crate::data::DataConfig;
use crate::layers::{BalanceKind, Capacity};
use crate::model::SequenceParts;
use crate::optim::OptimConfig;
use crate::precision::{Mode, Recipe};
use fathom_config::{KeyError, ModelConfig};
use fathom_numerics::quant::ScaleKind;

/// Why a run's configuration cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TrainConfigError {
    /// The file cannot be read.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file that the error is about.
        path: PathBuf,
        /// The system's answer.
        source: std::io::Error,
    },
    /// A key is wrong.
    #[error(transparent)]
    Key(#[from] KeyError),
}

/// A run of `fathom train`: everything that decides its bits.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TrainConfig {
    /// A name for people: logs, and groups of [`compare`](super::compare).
    pub name: String,
    /// Seed of the initial weights and of the order of the data.
    pub seed: u64,
    /// Steps of the run; none where `tokens` ends it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub steps: Option<u64>,
    /// The run ends with the step that reaches this many tokens.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tokens: Option<f64>,
    /// Tokens of a sequence; at least 2, at most `model.max_position_embeddings`.
    pub seq_len: usize,
    /// Sequences of a micro-batch; for routed experts in `fp8` and `bf16` it is part of the result.
    pub micro_batch: usize,
    /// Logical shards over which the gradient is defined; every batch is a multiple of it.
    pub grad_shards: usize,
    /// Equal parts in which every sequence lies, each with accumulators of its own for the weights
    /// that tokens pass one by one: a multiple of `parallel.cp`, which it is where it is not set.
    /// It is part of the result.
    #[serde(default = "one")]
    pub context_shards: usize,
    /// Neighbouring shards whose j-th micro-batches are one call of the routed experts: a multiple
    /// of `parallel.ep` over `parallel.cp`, which it is where it is not set. It is part of the
    /// result.
    #[serde(default = "one")]
    pub expert_union: usize,
    /// The architecture to train.
    pub model: ModelConfig,
    /// Precision mode, formats and scales, and what is kept for backward.
    pub recipe: Recipe,
    /// What the run trains on, its tokenizer, and what is held out.
    #[serde(default)]
    pub data: DataConfig,
    /// AdamW, clipping, precision of moments, and the average of the weights.
    #[serde(default)]
    pub optim: OptimConfig,
    /// Learning rate, batch, and weights of the losses over the run.
    pub schedule: ScheduleConfig,
    /// On how many ranks the run lies, and how; but for `tp` it changes no bit.
    #[serde(default)]
    pub parallel: ParallelConfig,
    /// When checkpoints are written, and how.
    #[serde(default)]
    pub checkpoint: CheckpointConfig,
    /// What is logged, and when.
    #[serde(default)]
    pub log: LogConfig,
}

fn one() -> usize {
    1
}

/// What changes over the run: TOML section `[schedule]`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ScheduleConfig {
    /// Learning rate of the optimizer.
    pub learning_rate: Schedule,
    /// Sequences of a step: a multiple of `grad_shards`, to which the values along a ramp are
    /// rounded.
    pub batch: Schedule,
    /// Gamma: how far a step moves the selection biases.
    #[serde(default = "gamma")]
    pub bias_update_speed: Schedule,
    /// Alpha: weight of the balance loss; 0: none.
    #[serde(default = "alpha")]
    pub balance_loss: Schedule,
    /// How balance is measured: over each sequence or the batch, by expert or by device.
    #[serde(default = "sequence")]
    pub balance_kind: BalanceKind,
    /// Room for tokens on each device; choices beyond it are dropped, as V2 was trained. None: no
    /// token is dropped.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub capacity: Option<Capacity>,
    /// Lambda: weight of the mean of the MTP modules' losses (DeepSeek-V3 report, equation 25).
    #[serde(default = "lambda")]
    pub mtp_lambda: Schedule,
}

fn gamma() -> Schedule {
    Schedule::Constant(1e-3)
}

fn alpha() -> Schedule {
    Schedule::Constant(1e-4)
}

fn sequence() -> BalanceKind {
    BalanceKind::Sequence
}

fn lambda() -> Schedule {
    Schedule::Constant(0.3)
}

/// How checkpoints are written: TOML section `[checkpoint]`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct CheckpointConfig {
    /// Steps between two; 0: only when the run ends or is stopped.
    pub every: u64,
    /// How many of the newest checkpoints are kept; older ones are removed.
    pub keep: usize,
    /// Largest size of a file of tensors, in bytes.
    pub shard_bytes: usize,
    /// Whether the final model, and the average where one is kept, is written in Hugging Face's
    /// layout.
    pub export: bool,
    /// A folder in Hugging Face's layout whose weights the run begins with.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub initial: Option<PathBuf>,
}

impl Default for CheckpointConfig {
    fn default() -> Self {
        CheckpointConfig { every: 100, keep: 2, shard_bytes: 1 << 30, export: true, initial: None }
    }
}

/// What a run logs: TOML section `[log]`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LogConfig {
    /// Whether `train.jsonl` is written.
    pub jsonl: bool,
    /// Whether TensorBoard's event files are written.
    pub tensorboard: bool,
    /// Steps between two samples of the model's text; 0: none.
    pub sample_every: u64,
    /// Tokens of such a sample, its prompt not counted.
    pub sample_tokens: usize,
    /// Text that a sample goes on from.
    pub sample_prompt: String,
    /// Temperature: what logits are divided by; 0: always the most probable token.
    pub sample_temperature: f64,
    /// Nucleus sampling: share of the probability from which tokens are drawn, the most probable
    /// first.
    pub sample_top_p: f64,
}

impl Default for LogConfig {
    fn default() -> Self {
        LogConfig {
            jsonl: true,
            tensorboard: true,
            sample_every: 100,
            sample_tokens: 48,
            sample_prompt: "The".into(),
            sample_temperature: 0.8,
            sample_top_p: 0.95,
        }
    }
}

/// The schedules of a run, checked, their shares of the run turned into steps.
#[derive(Clone, Debug)]
pub struct Schedules {
    learning_rate: Resolved,
    batch: Resolved,
    bias_update_speed: Resolved,
    balance_loss: Resolved,
    mtp_lambda: Resolved,
    grad_shards: usize,
}

/// What the schedules say of one step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Plan {
    /// Learning rate of the optimizer.
    pub learning_rate: f64,
    /// Sequences of the step: a multiple of `grad_shards`.
    pub batch: usize,
    /// Gamma: how far the step moves the selection biases.
    pub bias_update_speed: f64,
    /// Alpha: weight of the balance loss.
    pub balance_loss: f64,
    /// Lambda: weight of the mean of the MTP modules' losses.
    pub mtp_lambda: f64,
}

impl Schedules {
    /// What the schedules say at a point of the run; the batch is rounded to a multiple of
    /// `grad_shards`, at least one sequence per shard.
    pub fn at(&self, point: Point) -> Plan {
        let shards = self.grad_shards as f64;
        let per_shard = (self.batch.at(point) / shards).round().max(1.0);
        Plan {
            learning_rate: self.learning_rate.at(point),
            batch: (per_shard * shards) as usize,
            bias_update_speed: self.bias_update_speed.at(point),
            balance_loss: self.balance_loss.at(point),
            mtp_lambda: self.mtp_lambda.at(point),
        }
    }
}

impl TrainConfig {
    /// The configuration as checkpoints hold it: without `recipe.fused`, which changes no bit.
    pub(super) fn saved(&self) -> TrainConfig {
        TrainConfig { recipe: Recipe { fused: None, ..self.recipe.clone() }, ..self.clone() }
    }

    /// The schedules, checked, with their shares of the run turned into steps.
    ///
    /// # Errors
    /// The dotted key and what is wrong with it.
    pub fn schedules(&self) -> Result<Schedules, (String, String)> {
        let resolve = |name: &str, schedule: &Schedule| {
            schedule.resolve(self.steps).map_err(|(piece, message)| {
                (format!("schedule.{name}"), format!("piece {}: {message}", piece + 1))
            })
        };
        let s = &self.schedule;
        Ok(Schedules {
            learning_rate: resolve("learning_rate", &s.learning_rate)?,
            batch: resolve("batch", &s.batch)?,
            bias_update_speed: resolve("bias_update_speed", &s.bias_update_speed)?,
            balance_loss: resolve("balance_loss", &s.balance_loss)?,
            mtp_lambda: resolve("mtp_lambda", &s.mtp_lambda)?,
            grad_shards: self.grad_shards,
        })
    }

    /// Where sequences lie in parts: into how many, and how long sequences are.
    pub fn sequence_parts(&self) -> SequenceParts {
        SequenceParts { count: self.context_shards, length: self.seq_len }
    }

    /// Refuses parts into which sequences do not fall, and what is over the choices of a whole
    /// sequence's tokens.
    fn check_context(&self) -> Result<(), (String, String)> {
        let (shards, length) = (self.context_shards, self.seq_len);
        if shards == 1 {
            return Ok(());
        }
        let wrong = |key: &str, message: String| Err((key.to_owned(), message));
        if !length.is_multiple_of(shards) {
            let message = format!("expected a divisor of seq_len = {length}, found {shards}");
            return wrong("context_shards", message);
        }
        if self.schedule.capacity.is_some() {
            let message = format!(
                "expected none with context_shards = {shards}: room is dealt out among the choices \
                 of whole sequences"
            );
            return wrong("schedule.capacity", message);
        }
        match self.schedule.balance_kind {
            BalanceKind::Sequence | BalanceKind::Batch => Ok(()),
            kind @ (BalanceKind::Expert | BalanceKind::Device { .. }) => {
                let message = format!(
                    "expected \"sequence\" or \"batch\" with context_shards = {shards}, found \
                     {kind:?}: it counts the choices of whole sequences"
                );
                wrong("schedule.balance_kind", message)
            }
        }
    }

    /// Refuses an `expert_union` that shards cannot form, or whose rows cannot be joined.
    fn check_union(&self) -> Result<(), (String, String)> {
        let TrainConfig { expert_union, context_shards, grad_shards, recipe, .. } = self;
        if !grad_shards.is_multiple_of(*expert_union) {
            let message =
                format!("expected a divisor of grad_shards = {grad_shards}, found {expert_union}");
            return Err(("expert_union".to_owned(), message));
        }
        let whole = [
            ("activation_block", recipe.fp8.activation_block),
            ("gradient_block", recipe.fp8.gradient_block),
        ];
        let spans_rows = |(_, block): &&(_, [Option<usize>; 2])| block[0].is_none();
        match whole.iter().find(spans_rows) {
            Some((key, _)) if *expert_union > 1 && recipe.mode == Mode::Fp8 => {
                let message = format!(
                    "expected 1, found {expert_union}: with recipe.fp8.{key} over all rows a scale \
                     would span rows of several micro-batches"
                );
                Err(("expert_union".to_owned(), message))
            }
            Some((key, _)) if *context_shards > 1 && recipe.mode == Mode::Fp8 => {
                let message = format!(
                    "expected 1, found {context_shards}: with recipe.fp8.{key} over all rows a \
                     scale would span rows of several parts"
                );
                Err(("context_shards".to_owned(), message))
            }
            _ => Ok(()),
        }
    }

    /// Refuses delayed scales where there is no one scale a tensor, or no one history.
    fn check_delayed(&self) -> Result<(), (String, String)> {
        let fp8 = &self.recipe.fp8;
        let Some(delayed) = fp8.delayed.filter(|_| self.recipe.mode == Mode::Fp8) else {
            return Ok(());
        };
        let wrong = |key: &str, message: &str| Err((key.to_owned(), message.to_owned()));
        if delayed.history == 0 {
            return wrong("recipe.fp8.delayed.history", "expected at least 1 step, found 0");
        }
        for (key, block) in [
            ("recipe.fp8.activation_block", fp8.activation_block),
            ("recipe.fp8.gradient_block", fp8.gradient_block),
        ] {
            if block != [None, None] {
                let message = "expected [\"all\", \"all\"] with recipe.fp8.delayed: a history is of a \
                               whole tensor's scale";
                return wrong(key, message);
            }
        }
        if fp8.scale != ScaleKind::F32 {
            let message = "expected \"f32\" with recipe.fp8.delayed, whose scales are any number";
            return wrong("recipe.fp8.scale", message);
        }
        let world = self.parallel.world();
        if world > 1 {
            let message = format!(
                "expected one rank with recipe.fp8.delayed, whose history one process keeps; found \
                 {world}"
            );
            return wrong("parallel", &message);
        }
        Ok(())
    }

    /// Refuses values out of range and settings that contradict each other.
    ///
    /// # Errors
    /// The dotted key and what is wrong with it.
    pub fn check(&self) -> Result<(), (String, String)> {
        let wrong = |key: &str, message: String| Err((key.to_owned(), message));
        if self.steps.is_none() && self.tokens.is_none() {
            return wrong("steps", "expected steps or tokens, found neither".into());
        }
        let longest = self.model.max_position_embeddings;
        if self.seq_len < 2 || self.seq_len > longest {
            let message = format!(
                "expected 2 to {longest} (model.max_position_embeddings), found {}",
                self.seq_len
            );
            return wrong("seq_len", message);
        }
        for (key, value) in [
            ("micro_batch", self.micro_batch),
            ("grad_shards", self.grad_shards),
            ("context_shards", self.context_shards),
            ("expert_union", self.expert_union),
        ] {
            if value == 0 {
                return wrong(key, "expected at least 1, found 0".into());
            }
        }
        self.check_context()?;
        self.check_union()?;
        self.check_delayed()?;
        if self.checkpoint.keep == 0 {
            return wrong("checkpoint.keep", "expected at least 1, found 0".into());
        }
        let o = &self.optim;
        let unit = [("beta1", o.beta1), ("beta2", o.beta2), ("ema_decay", o.ema_decay)];
        for (key, value) in unit {
            if !(0.0..1.0).contains(&value) {
                return wrong(&format!("optim.{key}"), format!("expected 0 to 1, found {value}"));
            }
        }
        for (key, value) in [("eps", o.eps), ("clip", o.clip), ("weight_decay", o.weight_decay)] {
            if !(value >= 0.0 && value.is_finite()) {
                return wrong(&format!("optim.{key}"), format!("expected >= 0, found {value}"));
            }
        }
        if let Some(tokens) = self.tokens
            && !(tokens > 0.0 && tokens.is_finite())
        {
            return wrong("tokens", format!("expected above 0, found {tokens}"));
        }
        let (t, p) = (self.log.sample_temperature, self.log.sample_top_p);
        if !(t >= 0.0 && t.is_finite()) {
            return wrong("log.sample_temperature", format!("expected >= 0, found {t}"));
        }
        if !(p > 0.0 && p <= 1.0) {
            return wrong("log.sample_top_p", format!("expected above 0, to 1, found {p}"));
        }
        self.schedules()?;
        let s = &self.schedule;
        for (key, schedule) in [
            ("learning_rate", &s.learning_rate),
            ("bias_update_speed", &s.bias_update_speed),
            ("balance_loss", &s.balance_loss),
            ("mtp_lambda", &s.mtp_lambda),
        ] {
            if let Some(x) = schedule.stated().into_iter().find(|x| *x < 0.0) {
                return wrong(&format!("schedule.{key}"), format!("expected >= 0, found {x}"));
            }
        }
        let shards = self.grad_shards as f64;
        let uneven = |x: &f64| *x < shards || x % shards != 0.0;
        if let Some(x) = s.batch.stated().into_iter().find(uneven) {
            let message = format!(
                "expected a multiple of grad_shards = {}, so that every shard gets as many \
                 sequences; found {x}",
                self.grad_shards
            );
            return wrong("schedule.batch", message);
        }
        self.check_parallel()
    }
}
