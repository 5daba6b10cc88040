//! The software that runs a step, as data: what overlaps, what is fused, what the host costs.

use fathom_config::unknown_name;
use serde::{Deserialize, Serialize};

use crate::error::SimError;

/// Which exchanges of experts run beside computation in chunks that are in no overlapped pair.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ExpertOverlap {
    /// None: every exchange is waited for.
    None,
    /// In a full backward, under the weight gradients.
    Wgrad,
    /// Under the other chunk of a forward and a backward that run side by side (1F1B with
    /// batch-level overlap and delayed weight gradients).
    Batch,
}

/// What of a step is replayed as CUDA graphs, without the host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Graphs {
    /// Nothing: the host launches every kernel.
    None,
    /// All but the routed experts' half of a layer, whose shapes change.
    Dense,
    /// All kernels, those of the routed experts too.
    Full,
}

/// How context parallelism brings keys and queries together.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ContextForm {
    /// Keys and values pass around a ring, under the attention of the part before.
    Ring,
    /// Two exchanges turn parts of the sequence into parts of the heads and back.
    AllToAll,
    /// All-to-all inside a node, a ring between nodes.
    Hybrid,
    /// Keys and values, repeated for every query head, are gathered from all ranks at once, under
    /// the attention of the own part; kernels of their own merge the parts in FP32, and the
    /// gradients of keys and values go around a ring in FP32. What PyTorch does
    /// (`torch/distributed/tensor/experimental/_attention.py`, rotation `ALL_GATHER`).
    Gather,
    /// The same inside `torch.compile`: a traced exchange is waited for where it stands
    /// (`_maybe_wrap_tensor` in `torch/distributed/_functional_collectives.py`), so that no
    /// attention runs beside it, and what merges two parts is one kernel.
    GatherCompiled,
}

/// How transformer layers are dealt to pipeline stages that the scenario does not list.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum StageSplit {
    /// So that the step is shortest.
    Balanced,
    /// As many to each, whatever else a stage holds.
    Even,
}

/// The software of a run: TOML table `[stack]`. The default is what the published DeepSeek-V3
/// profile shows; `preset` starts from one of [`STACKS`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Stack {
    /// A name for reports.
    pub name: String,
    /// Time of the host for one kernel that it launches, with the framework's part, microseconds.
    pub launch_us: f64,
    /// What is replayed without the host.
    pub graphs: Graphs,
    /// Memory traffic and launches of norms, activations and sums against fused kernels.
    pub elementwise_passes: f64,
    /// Tensor-parallel exchanges run under the GEMMs beside them, in as many parts as ranks.
    pub tp_overlap: bool,
    /// Gradients are reduced under the last backward, parameters gathered under the next forward.
    pub dp_overlap: bool,
    /// Sharded parameters are gathered ahead and gradients reduced behind the computation.
    pub fsdp_prefetch: bool,
    /// Exchanges of experts beside computation.
    pub ep_overlap: ExpertOverlap,
    /// The form of context parallelism.
    pub context: ContextForm,
    /// A column-parallel product's input is gathered once more in the backward, since each rank
    /// keeps its part of the sequence only.
    pub tp_regather: bool,
    /// Time of attention against FlashAttention-3's: of its forward, of its backward.
    pub attention_time: [f64; 2],
    /// Scores, choice and weights of the router are one kernel in each direction.
    pub fused_router: bool,
    /// One kernel casts an operand and its transpose: the value is read once for the two.
    pub casts_both_ways: bool,
    /// SwiGLU's input is kept for the backward in FP8 and the attention's output in twelve bits, as
    /// the DeepSeek-V3 report does; BF16 otherwise, and no casts for it.
    pub kept_in_fp8: bool,
    /// The experts' grouped products apply SwiGLU and its gradient themselves and write operands as
    /// the next product reads them.
    pub fused_experts: bool,
    /// Both products of attention read FP8.
    pub fp8_attention: bool,
    /// A token is sent once for each of its experts, not once for each rank that has any.
    pub expert_copies: bool,
    /// How layers are dealt to stages.
    pub stages: StageSplit,
}

impl Default for Stack {
    fn default() -> Self {
        Stack {
            name: "as profiled".into(),
            launch_us: 0.0,
            graphs: Graphs::Full,
            elementwise_passes: 1.0,
            tp_overlap: false,
            dp_overlap: false,
            fsdp_prefetch: true,
            ep_overlap: ExpertOverlap::Wgrad,
            context: ContextForm::Ring,
            tp_regather: false,
            attention_time: [1.0, 1.0],
            fused_router: false,
            casts_both_ways: false,
            kept_in_fp8: true,
            fused_experts: false,
            fp8_attention: false,
            expert_copies: false,
            stages: StageSplit::Balanced,
        }
    }
}

macro_rules! stacks {
    ($($name:literal),* $(,)?) => {
        &[$(($name, include_str!(concat!("../../presets/stacks/", $name, ".toml")))),*]
    };
}

/// The embedded stacks: `(name, TOML)`.
pub const STACKS: &[(&str, &str)] = stacks!(
    "hai-llm",
    "megatron-core",
    "megatron-core-tuned",
    "nemo-automodel",
    "primus",
    "torchtitan",
    "torchtitan-compiled"
);

impl Stack {
    /// The embedded stack `name`.
    ///
    /// # Errors
    /// [`SimError::Input`] with the nearest name.
    pub fn preset(name: &str) -> Result<Stack, SimError> {
        let Some((_, text)) = STACKS.iter().find(|(n, _)| *n == name) else {
            let names: Vec<&str> = STACKS.iter().map(|(n, _)| *n).collect();
            return Err(SimError::input("stack preset", unknown_name(name, &names)));
        };
        toml::from_str(text)
            .map_err(|e| SimError::input(format!("stack preset {name}"), e.to_string()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_embedded_stack_reads() {
        for (name, _) in STACKS {
            let stack = Stack::preset(name).unwrap();
            assert!(stack.launch_us >= 0.0 && stack.elementwise_passes >= 1.0, "{name}");
        }
        let e = Stack::preset("megatron").unwrap_err().to_string();
        assert!(e.contains("megatron-core"), "{e}");
    }
}
