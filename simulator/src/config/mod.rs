//! What a simulation is asked: the scenario, read from TOML with errors that name file, line, key
//! and nearest name.
//!
//! A scenario file has the keys of [`Scenario`]. `preset` starts from an embedded scenario;
//! `[model]`, `[cluster]` and `[cluster.gpu]` may start from a preset of theirs (`preset =
//! "deepseek-v3"`), a model also from a Hugging Face `file = "config.json"`. Every other key
//! overrides what the preset says.

use fathom_schedule::ScheduleKind;
use std::path::Path;

use fathom_config::layered::{Setting, Source};
use fathom_config::{Gpu, ModelConfig};
use serde::{Deserialize, Serialize};

use crate::cost::Pricing;
use crate::error::{SimError, read_text};
use crate::hardware::cluster::Cluster;
use crate::reliability::Reliability;

mod expert_load;
mod fine_tuning;
pub mod hardware;
pub(crate) mod limits;
pub(crate) mod read;
mod search_space;
mod stack;

pub use expert_load::ExpertLoad;
pub use fine_tuning::{Lora, LoraTarget, Offload};
pub use read::SCENARIOS;
pub use search_space::SearchSpace;
pub use stack::{ContextForm, ExpertOverlap, Graphs, STACKS, Stack, StageSplit};

/// Degrees of parallelism. `tp * cp * pp * dp` ranks in all; expert parallelism spans ranks of `dp
/// * cp * tp`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Parallel {
    /// Tensor-parallel ranks (with sequence parallelism of the norms).
    #[serde(default = "one")]
    pub tp: u64,
    /// Context-parallel ranks, which split every sequence.
    #[serde(default = "one")]
    pub cp: u64,
    /// Pipeline-parallel ranks, which split the layers.
    #[serde(default = "one")]
    pub pp: u64,
    /// Data-parallel ranks, which split the batch.
    #[serde(default = "one")]
    pub dp: u64,
    /// Expert-parallel ranks, which split the routed experts.
    #[serde(default = "one")]
    pub ep: u64,
    /// ZeRO stage: 0 nothing, 1 optimizer state, 2 gradients, 3 parameters are sharded over dp.
    #[serde(default)]
    pub zero: u8,
}

fn one() -> u64 {
    1
}

fn two() -> u64 {
    2
}

fn twenty() -> u64 {
    20
}

fn trillion() -> f64 {
    1e12
}

/// Arithmetic of the GEMMs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Precision {
    /// FP8 E4M3 with 1x128 and 128x128 scales, BF16 elsewhere.
    Fp8,
    /// FP8 E4M3 with one FP32 scale a tensor, of the largest element that the cast itself looks for
    /// (current scaling): no sums are scaled on the way.
    #[serde(rename = "fp8-tensor")]
    Fp8Tensor,
    /// Every product and every exchange in BF16.
    Bf16,
    /// FP8 E4M3 with an E8M0 scale for every 32 elements (OCP MX 1.0), applied in the tensor core.
    Mxfp8,
    /// FP4 E2M1 with an E4M3 scale for every 16 elements and one FP32 scale a tensor, for which a
    /// cast reads its input twice (arXiv 2509.25149).
    Nvfp4,
    /// FP4 E2M1 with an E8M0 scale for every 32 elements (OCP MX 1.0).
    Mxfp4,
}

impl Precision {
    /// Whether the products of Linears read narrower operands than BF16.
    pub fn is_quantised(self) -> bool {
        self != Precision::Bf16
    }

    /// Times that a cast reads its input: once more where a whole tensor's largest element sets the
    /// scale.
    pub fn cast_reads(self) -> u64 {
        if matches!(self, Precision::Fp8Tensor | Precision::Nvfp4) { 2 } else { 1 }
    }

    /// Bytes of an element of a Linear's operand, without its scale.
    pub fn element_bytes(self) -> f64 {
        match self {
            Precision::Bf16 => 2.0,
            Precision::Fp8 | Precision::Fp8Tensor | Precision::Mxfp8 => 1.0,
            Precision::Nvfp4 | Precision::Mxfp4 => 0.5,
        }
    }

    /// The same with its share of the block's scale.
    pub fn operand_bytes(self) -> f64 {
        let scale = match self {
            Precision::Bf16 | Precision::Fp8Tensor => 0.0,
            Precision::Fp8 => 4.0 / 128.0,
            Precision::Mxfp8 | Precision::Mxfp4 => 1.0 / 32.0,
            Precision::Nvfp4 => 1.0 / 16.0,
        };
        self.element_bytes() + scale
    }

    /// What `gpu` lacks for it, and what to use instead.
    pub fn refusal(self, gpu: &Gpu) -> Option<String> {
        let missing = match self {
            Precision::Fp8 | Precision::Fp8Tensor | Precision::Mxfp8 if gpu.fp8_flops == 0.0 => {
                "FP8 tensor cores: use precision = \"bf16\""
            }
            Precision::Mxfp8 if gpu.fp4_flops == 0.0 => {
                "tensor cores that take block scales: use precision = \"fp8\""
            }
            Precision::Nvfp4 | Precision::Mxfp4 if gpu.fp4_flops == 0.0 => {
                "FP4 tensor cores: use precision = \"fp8\" or \"bf16\""
            }
            _ => return None,
        };
        Some(format!("{} has no {missing}", gpu.name))
    }
}

/// What is recomputed in the backward pass instead of kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Recompute {
    /// Nothing is recomputed.
    None,
    /// Norms, MLA up-projections and SwiGLU: the report's policy (sections 3.2.3 and 3.3.3).
    Selective,
    /// The same, and every second product of a layer: TorchTitan's selective policy by op
    /// (pytorch/torchtitan, `_apply_ac_to_transformer_block`).
    Alternate,
    /// The whole layer, from its input.
    Full,
}

/// The training run: TOML table `[training]`.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Training {
    /// Tokens of a sequence.
    pub seq_len: u64,
    /// Sequences of a micro-batch.
    pub micro_batch: u64,
    /// Sequences of a step, over all data-parallel ranks.
    pub global_batch: u64,
    /// Arithmetic of the GEMMs.
    pub precision: Precision,
    /// What is recomputed in the backward instead of kept.
    pub recompute: Recompute,
    /// Tokens of the whole run, of which duration and cost follow; a trillion where absent.
    #[serde(default = "trillion")]
    pub total_tokens: f64,
}

/// Growth of the batch from `start_batch` to the training's `global_batch`, linear in tokens.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Ramp {
    /// Sequences of the first step.
    pub start_batch: u64,
    /// Tokens until the whole batch is reached.
    pub tokens: f64,
    /// Schedule while a batch gives the scenario's own too few micro-batches: an assumption, since
    /// no report says what ran then.
    pub fallback_schedule: ScheduleKind,
}

/// A complete question to the simulator: one training step of a model on a cluster, and the run
/// that it is part of.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Scenario {
    /// A name for reports.
    pub name: String,
    /// The model that is trained.
    pub model: ModelConfig,
    /// The cluster that it is trained on.
    pub cluster: Cluster,
    /// How model and batch are split over the ranks.
    pub parallel: Parallel,
    /// Pipeline schedule of a step.
    pub schedule: ScheduleKind,
    /// SMs that the communication kernels hold while chunks overlap; DeepSeek-V3's 20 where absent.
    #[serde(default = "twenty")]
    pub comm_sms: u64,
    /// Share of a GPU's memory that is to stay free, for what an allocator cannot use.
    #[serde(default)]
    pub memory_headroom: f64,
    /// Sizes of sequence, micro-batch, batch and run.
    pub training: Training,
    /// Stages that a rank holds in the interleaved schedule.
    #[serde(default = "two")]
    pub interleave: u64,
    /// Transformer layers of every pipeline stage; balanced by their cost where absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stage_layers: Option<Vec<u64>>,
    /// The software that runs it.
    #[serde(default)]
    pub stack: Stack,
    /// Adapters that are trained instead of the model's weights.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lora: Option<Lora>,
    /// What lies in the hosts' memory.
    #[serde(default)]
    pub offload: Offload,
    /// How unevenly tokens fall on experts.
    #[serde(default)]
    pub expert_load: ExpertLoad,
    /// Mean times between failures, and times of checkpoint and restart.
    #[serde(default)]
    pub reliability: Reliability,
    /// Prices beyond the cluster's rent.
    #[serde(default)]
    pub pricing: Pricing,
    /// Growth of the batch at the beginning of the run.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ramp: Option<Ramp>,
    /// The layouts and settings that `fathom search` varies.
    #[serde(default)]
    pub search: SearchSpace,
    /// Wishes of the report granted to the hardware.
    #[serde(default)]
    pub what_if: WhatIf,
}

impl Scenario {
    /// Reads a scenario file; `set` are overrides `key.path=value` that win over the file.
    ///
    /// # Errors
    /// [`SimError`] naming file, line and key, or the override.
    pub fn read(path: &Path, set: &[String]) -> Result<Self, SimError> {
        let text = read_text(path)?;
        let folder = path.parent().unwrap_or(Path::new("."));
        Scenario::from_toml(&path.display().to_string(), &text, Some(folder), set)
    }

    /// The embedded scenario `name` of [`SCENARIOS`], with `set` as in [`Scenario::read`].
    ///
    /// # Errors
    /// As [`Scenario::read`].
    pub fn preset(name: &str, set: &[String]) -> Result<Self, SimError> {
        let text = read::scenario_text(name)?;
        Scenario::from_toml(&format!("preset {name}"), text, None, set)
    }

    /// A scenario from text, which errors call `name`; files it refers to are searched in `folder`
    /// and refused where there is none.
    ///
    /// # Errors
    /// As [`Scenario::read`].
    pub fn from_toml(
        name: &str,
        text: &str,
        folder: Option<&Path>,
        set: &[String],
    ) -> Result<Self, SimError> {
        let set: Vec<Setting> = set.iter().map(|assignment| Setting::set(assignment)).collect();
        let (name, folder) = (name.to_owned(), folder.map(Path::to_owned));
        read::scenario(&Source { name, text, lines: true, folder, set: &set })
    }

    /// Micro-batches that a pipeline runs in a step.
    pub fn micro_batches(&self) -> u64 {
        self.training.global_batch
            / self.parallel.dp.saturating_mul(self.training.micro_batch).max(1)
    }

    /// Bytes of a GPU that a rank may fill.
    pub fn usable_memory_bytes(&self) -> f64 {
        self.cluster.gpu.memory_bytes as f64 * (1.0 - self.memory_headroom)
    }

    /// Tokens of a step, over the whole cluster.
    pub fn tokens_per_step(&self) -> f64 {
        self.training.global_batch as f64 * self.training.seq_len as f64
    }
}

/// Hardware wishes of the DeepSeek-V3 report (section 3.5) and of arXiv 2505.09343, each a switch.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct WhatIf {
    /// Communication runs off the SMs: all SMs compute while chunks overlap.
    pub comm_off_sms: bool,
    /// Accumulation wide enough that FP8 partial sums of one scale need no promotion. Where every
    /// 128 of K have scales of their own, the sums still leave the tensor core to be scaled, so
    /// that only precision is gained.
    pub wide_accumulation: bool,
    /// Tensor cores take the blocks' scales and accumulate to the end: no sums leave them in
    /// between.
    pub scaling_in_tensor_core: bool,
    /// The cast to FP8 is fused with the TMA copy: its memory traffic goes.
    pub fused_cast_tma: bool,
    /// A warp-level cast instruction: the producer quantises, and only the FP8 write remains.
    pub warp_level_cast: bool,
    /// The cast happens near memory: half of its traffic remains.
    pub near_memory_cast: bool,
    /// Transposed reads from shared memory before the MMA: no re-tiling for weight gradients.
    pub transposed_reads: bool,
    /// NVLink and InfiniBand act as one network.
    pub unified_network: bool,
    /// The network packs the BF16 of a combine into ten bits of LogFMT (arXiv 2505.09343, sections
    /// 3.2 and 6.5).
    pub compressed_combine: bool,
    /// Acquire and release in hardware: no counts and barriers go ahead of an exchange (arXiv
    /// 2505.09343, section 6.4).
    pub hardware_ordering: bool,
    /// Exchanges go first on the links and buses that they share: computation's memory traffic does
    /// not slow them down (arXiv 2505.09343, section 4.5).
    pub traffic_priority: bool,
}
