//! One overlapped forward-backward pair of a DualPipe step by itself: the span, its ten phases,
//! what is hidden.

use fathom_trace::{Component, Phase};
use serde::{Deserialize, Serialize};

use crate::config::{Parallel, Precision, Recompute, Scenario, Training, WhatIf};
use crate::error::SimError;
use crate::events::chunk::{PartSpan, Side, pair};
use crate::first_principles::FirstPrinciples;
use crate::hardware::cluster::Cluster;
use crate::kernel_time::Work;
use crate::lowering::Kernel;
use crate::parallel::check;
use crate::times::{LayerKind, LayerTimes};
use crate::workload::LayerContext;
use fathom_config::ModelConfig;

/// One overlapped pair to be simulated: model, hardware, and the load of every layer.
#[derive(Debug, Clone, PartialEq)]
pub struct ChunkQuestion {
    /// The model; its first MoE layer (or dense layer) stands for all.
    pub model: ModelConfig,
    /// The cluster, of which one expert-parallel group is used.
    pub cluster: Cluster,
    /// Tokens of the micro-batch on a rank.
    pub tokens: u64,
    /// How many expert-parallel ranks exchange tokens.
    pub ep: u64,
    /// SMs that the communication kernels hold.
    pub comm_sms: u64,
    /// Arithmetic of the GEMMs.
    pub precision: Precision,
    /// Wishes of the report granted to the hardware.
    pub what_if: WhatIf,
    /// Routed load of this rank relative to the mean, by layer: of the forward chunk, and of the
    /// backward chunk in the order in which its layers run.
    pub loads: Vec<(f64, f64)>,
}

/// The ten phases of a pair's layer in the order of the published profile.
pub const PHASES: [(&str, Component, Phase); 10] = [
    ("combine(B)", Component::Combine, Phase::B),
    ("attn(F)", Component::Attention, Phase::F),
    ("mlp(B)", Component::Mlp, Phase::B),
    ("dispatch(F)", Component::Dispatch, Phase::F),
    ("dispatch(B)", Component::Dispatch, Phase::B),
    ("mlp(W)", Component::Mlp, Phase::W),
    ("mlp(F)", Component::Mlp, Phase::F),
    ("attn(B)", Component::Attention, Phase::B),
    ("attn(W)", Component::Attention, Phase::W),
    ("combine(F)", Component::Combine, Phase::F),
];

/// The mean duration of one phase over the layers.
#[derive(Debug, Clone, Serialize, Deserialize, PartialEq)]
pub struct PhaseMean {
    /// Name as in the profile's annotations: `attn(F)`.
    pub phase: String,
    /// Mean duration, seconds.
    pub mean_s: f64,
}

/// What an overlapped pair takes.
#[derive(Debug, Clone, Serialize, Deserialize, PartialEq)]
pub struct ChunkReport {
    /// From the first to the last kernel, seconds.
    pub span_s: f64,
    /// Seconds in which the compute stream runs kernels.
    pub compute_busy_s: f64,
    /// Seconds of the gaps between its kernels.
    pub gaps_s: f64,
    /// Seconds in which the communication stream runs.
    pub communication_s: f64,
    /// Share of the communication under which the compute stream works.
    pub hidden_fraction: f64,
    /// SMs that compute, the others being left to communication.
    pub compute_sms: u64,
    /// Means of the ten phases, in the order of [`PHASES`].
    pub phases: Vec<PhaseMean>,
    /// Every part on its stream, times from the start of the pair.
    #[serde(skip)]
    pub parts: Vec<PartSpan>,
}

impl ChunkQuestion {
    /// The published scenario with one group of `ep` ranks and no pipeline.
    fn scenario(&self) -> Result<Scenario, SimError> {
        let base = Scenario::preset("deepseek-v3-h800-2048", &[])?;
        let ep = if self.model.moe.is_some() { self.ep } else { 1 };
        let gpus_per_node = self.cluster.gpus_per_node.min(self.ep);
        let s = Scenario {
            name: "chunk".to_string(),
            model: self.model.clone(),
            cluster: Cluster { gpus: self.ep, gpus_per_node, ..self.cluster.clone() },
            parallel: Parallel { tp: 1, cp: 1, pp: 1, dp: self.ep, ep, zero: 1 },
            comm_sms: self.comm_sms,
            training: Training {
                seq_len: self.tokens,
                micro_batch: 1,
                global_batch: self.ep,
                precision: self.precision,
                recompute: Recompute::Selective,
                total_tokens: 0.0,
            },
            what_if: self.what_if,
            ..base
        };
        check(&s)?;
        Ok(s)
    }

    /// Simulates the pair with the times of `cost`; a layout that is refused, and an op that has no
    /// kernels, are a [`SimError`].
    pub fn simulate(&self, cost: &FirstPrinciples) -> Result<ChunkReport, SimError> {
        let s = self.scenario()?;
        let kind = if self.model.moe.is_some() { LayerKind::Moe } else { LayerKind::Dense };
        let layer = |load: (f64, f64)| -> Result<[LayerTimes; 2], SimError> {
            let ctx = LayerContext { load, ..FirstPrinciples::context(&s) };
            cost.layer(&s, &ctx, kind)
        };
        let (mut f, mut b) = ((Vec::new(), Vec::new()), (Vec::new(), Vec::new()));
        for &(lf, lb) in &self.loads {
            let [alone, overlapped] = layer((lf, lb))?;
            f.0.push(alone);
            f.1.push(overlapped);
            b.0.push(alone);
            b.1.push(overlapped);
        }
        // The backward runs from the deepest layer up.
        b.0.reverse();
        b.1.reverse();
        let mut parts = Vec::new();
        let forward = Side { overlapped: &f.1, alone: &f.0, load: &[] };
        let backward = Side { overlapped: &b.1, alone: &b.0, load: &[] };
        let (time, _) = pair(forward, backward, cost.constants.gap_s, Some(&mut parts));
        let n = self.loads.len().max(1) as f64;
        let mean = |component, phase| {
            let of = |p: &&PartSpan| p.component == component && p.phase == phase;
            parts.iter().filter(of).map(|p| p.end_s - p.start_s).sum::<f64>() / n
        };
        // Between two kernels the compute stream is idle for a moment, with communication beside it
        // or not.
        let ctx = FirstPrinciples::context(&s);
        let kernels = cost.kernels_of(&s.model, &ctx)?;
        let gaps_s = n * cost.constants.gap_s * launches(kernels.of(kind));
        let beside = time.comm_s / time.span_s;
        let hidden = 1.0 - (time.exposed_s + gaps_s * beside) / time.comm_s;
        Ok(ChunkReport {
            span_s: time.span_s,
            compute_busy_s: time.compute_s - gaps_s,
            gaps_s,
            communication_s: time.comm_s,
            hidden_fraction: if time.comm_s > 0.0 { hidden } else { 1.0 },
            compute_sms: if self.what_if.comm_off_sms {
                self.cluster.gpu.sms
            } else {
                self.cluster.gpu.sms - self.comm_sms
            },
            phases: PHASES
                .iter()
                .map(|&(name, c, p)| PhaseMean { phase: name.to_string(), mean_s: mean(c, p) })
                .collect(),
            parts,
        })
    }
}

/// Kernels that are launched on the compute stream.
fn launches(kernels: &[Kernel]) -> f64 {
    let count = |k: &Kernel| match k.work {
        Work::Collective { .. } => 0,
        Work::Memory { launches, .. } => launches,
        _ => 1,
    };
    let on_compute = |k: &&Kernel| k.component != Component::Combine;
    kernels.iter().filter(on_compute).map(count).sum::<u64>() as f64
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hardware;
    use crate::model_code::ModelCode;

    /// The profiled chunk (FIGURES section 2): loads of rank 0 by layer as its kernels' grids show
    /// them.
    fn profiled() -> ChunkQuestion {
        ChunkQuestion {
            model: ModelConfig::preset("deepseek-v3").unwrap(),
            cluster: hardware::cluster("h800-64").unwrap(),
            tokens: 4096,
            ep: 64,
            comm_sms: 20,
            precision: Precision::Fp8,
            what_if: WhatIf::default(),
            loads: vec![(0.9615, 1.0655), (0.9573, 0.9968), (1.1327, 1.0146), (0.9663, 0.8822)],
        }
    }

    #[test]
    fn the_profiled_chunk_is_met() {
        let r = profiled().simulate(&FirstPrinciples::new(ModelCode)).unwrap();
        assert!((r.span_s / 0.1290 - 1.0).abs() < 0.05, "span {}", r.span_s);
        assert!((r.hidden_fraction - 0.963).abs() < 0.02, "hidden {}", r.hidden_fraction);
        let sums: f64 = r.phases.iter().map(|p| p.mean_s).sum();
        assert!((4.0 * sums - (r.compute_busy_s + r.gaps_s + r.communication_s)).abs() < 1e-9);
    }

    #[test]
    fn communication_off_the_sms_helps() {
        let base = profiled().simulate(&FirstPrinciples::new(ModelCode)).unwrap();
        let what_if = WhatIf { comm_off_sms: true, ..WhatIf::default() };
        let free = ChunkQuestion { what_if, ..profiled() }
            .simulate(&FirstPrinciples::new(ModelCode))
            .unwrap();
        assert!(free.span_s < base.span_s && free.compute_sms == 132);
    }
}
