//! Public results of other models and GPUs, none of which was fitted.

use super::Row;
use crate::config::{Parallel, Precision, Recompute, Scenario, Training};
use crate::error::SimError;
use crate::events::Detail;
use crate::first_principles::FirstPrinciples;
use crate::hardware::{self, model::Attention, model::Model};
use crate::schedules::ScheduleKind;
use crate::step::{StepReport, simulate};

const META: &str = "LLaMA-3.1-405B on H100 (arXiv 2407.21783, table 4)";
const NEMO: &str = "NVIDIA Megatron Bridge 25.11 (its performance summary)";
const KORTHIKANTI: &str = "GPT on A100 (arXiv 2205.05198, table 5)";

/// One public training run.
struct Public {
    name: &'static str,
    cluster: &'static str,
    gpus_per_node: u64,
    model: &'static str,
    /// `tp, cp, pp, dp, ep`.
    layout: [u64; 5],
    interleave: u64,
    global_batch: u64,
    seq_len: u64,
    precision: Precision,
    recompute: Recompute,
    /// Per-tensor scales: no promotion by blocks.
    per_tensor: bool,
}

impl Public {
    fn scenario(&self, model: Option<Model>) -> Result<Scenario, SimError> {
        let [tp, cp, pp, dp, ep] = self.layout;
        let mut s = Scenario::preset("llama-3.1-405b-h100-16384", &[])?;
        s.name = self.name.to_string();
        s.model = match model {
            Some(m) => m,
            None => hardware::model(self.model)?,
        };
        s.cluster = hardware::cluster(self.cluster)?;
        s.cluster.gpus = tp * cp * pp * dp;
        if self.gpus_per_node != s.cluster.gpus_per_node {
            s.cluster.network.nics_per_node = self.gpus_per_node;
            s.cluster.gpus_per_node = self.gpus_per_node;
        }
        s.parallel = Parallel { tp, cp, pp, dp, ep, zero: 1 };
        s.interleave = self.interleave;
        s.schedule =
            if self.interleave > 1 { ScheduleKind::Interleaved } else { ScheduleKind::OneFOneB };
        s.training = Training {
            seq_len: self.seq_len,
            micro_batch: 1,
            global_batch: self.global_batch,
            precision: self.precision,
            recompute: self.recompute,
            total_tokens: 1e12,
        };
        s.what_if.wide_accumulation = self.per_tensor;
        Ok(s)
    }

    fn run(&self, cost: &FirstPrinciples, model: Option<Model>) -> Result<StepReport, SimError> {
        Ok(simulate(&self.scenario(model)?, cost, Detail::Totals)?.report)
    }
}

/// All rows.
pub(super) fn rows(cost: &FirstPrinciples) -> Result<Vec<Row>, SimError> {
    let mut rows = meta(cost)?;
    rows.extend(megatron_bridge(cost)?);
    rows.extend(korthikanti(cost)?);
    Ok(rows)
}

fn meta(cost: &FirstPrinciples) -> Result<Vec<Row>, SimError> {
    let mut rows = Vec::new();
    for (name, layout, batch, seq_len, tflops) in [
        ("8192 GPUs, sequences of 8192", [8, 1, 16, 64, 1], 2048, 8192, 430.0),
        ("16384 GPUs, sequences of 8192", [8, 1, 16, 128, 1], 2048, 8192, 400.0),
        ("16384 GPUs, CP16, sequences of 131072", [8, 16, 16, 8, 1], 128, 131_072, 380.0),
    ] {
        let run = Public {
            name,
            cluster: "h100-16384",
            gpus_per_node: 8,
            model: "llama-3.1-405b",
            layout,
            interleave: 2,
            global_batch: batch,
            seq_len,
            precision: Precision::Bf16,
            recompute: Recompute::None,
            per_tensor: false,
        };
        let report = run.run(cost, None)?;
        rows.push(Row::new(META, name, "TFLOPS", tflops, report.mfu_causal * 989.5));
    }
    Ok(rows)
}

fn megatron_bridge(cost: &FirstPrinciples) -> Result<Vec<Row>, SimError> {
    use Precision::{Bf16, Fp8};
    use Recompute::{None as Keep, Selective};
    let run = |name,
               cluster,
               gpus_per_node,
               model,
               layout,
               interleave,
               global_batch,
               seq_len,
               precision,
               recompute,
               per_tensor| Public {
        name,
        cluster,
        gpus_per_node,
        model,
        layout,
        interleave,
        global_batch,
        seq_len,
        precision,
        recompute,
        per_tensor,
    };
    let (v3, l405, l70) = ("deepseek-v3", "llama-3.1-405b", "llama-3.1-70b");
    let (gb200, b200, h100) = ("gb200-nvl72-1152", "b200-2048", "h100-16384");
    let runs = [
        (
            run(
                "LLaMA-3-70B, 64 H100, FP8 per tensor",
                h100,
                8,
                l70,
                [4, 1, 8, 2, 1],
                5,
                128,
                8192,
                Fp8,
                Keep,
                true,
            ),
            1602.0,
        ),
        (
            run(
                "LLaMA-3.1-405B, 1024 H100, FP8 per tensor",
                h100,
                8,
                l405,
                [8, 2, 8, 8, 1],
                8,
                512,
                8192,
                Fp8,
                Keep,
                true,
            ),
            292.0,
        ),
        (
            run(
                "LLaMA-3.1-405B, 256 GB200, FP8 per tensor",
                gb200,
                64,
                l405,
                [4, 1, 16, 4, 1],
                4,
                1536,
                8192,
                Fp8,
                Keep,
                true,
            ),
            813.0,
        ),
        (
            run(
                "LLaMA-3.1-405B, 128 B200, FP8 per tensor",
                b200,
                8,
                l405,
                [4, 2, 8, 2, 1],
                8,
                64,
                8192,
                Fp8,
                Keep,
                true,
            ),
            661.0,
        ),
        (
            run(
                "DeepSeek-V3, 256 GB200, BF16",
                gb200,
                64,
                v3,
                [1, 1, 4, 64, 64],
                4,
                4096,
                4096,
                Bf16,
                Selective,
                false,
            ),
            3139.0,
        ),
        (
            run(
                "DeepSeek-V3, 256 GB200, MXFP8",
                gb200,
                64,
                v3,
                [1, 1, 8, 32, 32],
                4,
                4096,
                4096,
                Fp8,
                Selective,
                false,
            ),
            4018.0,
        ),
        (
            run(
                "DeepSeek-V3, 256 B200, MXFP8",
                b200,
                8,
                v3,
                [1, 1, 16, 16, 8],
                1,
                2048,
                4096,
                Fp8,
                Selective,
                false,
            ),
            2139.0,
        ),
    ];
    let mut rows = Vec::new();
    for (public, tokens) in runs {
        let ours = public.run(cost, None)?.tokens_per_s_per_gpu;
        let row = Row::new(NEMO, public.name, "tokens/s/GPU", tokens, ours);
        rows.push(if public.model == v3 {
            row.note("casts and transposes timed as H800's; Blackwell's libraries fuse them")
        } else {
            row
        });
    }
    Ok(rows)
}

/// GPT-3 style models: GELU of width 4h counted as a SwiGLU of the same multiplications.
fn korthikanti(cost: &FirstPrinciples) -> Result<Vec<Row>, SimError> {
    let mut rows = Vec::new();
    for (name, layers, hidden, heads, pp, interleave, batch, seconds) in [
        ("22B, 8 GPUs", 48, 6144, 64, 1, 1, 4, 1.10),
        ("175B, 64 GPUs", 96, 12288, 96, 8, 3, 64, 13.75),
        ("530B, 280 GPUs", 105, 20480, 128, 35, 3, 280, 37.83),
        ("1T, 512 GPUs", 128, 25600, 160, 64, 1, 512, 71.49),
    ] {
        let model = Model {
            name: name.to_string(),
            n_layers: layers,
            hidden,
            n_heads: heads,
            intermediate: (8 * hidden / 3).next_multiple_of(64),
            vocab_size: 51200,
            n_mtp_layers: 0,
            tied_embeddings: true,
            attention: Attention::Gqa { n_kv_heads: heads, head_dim: hidden / heads },
            moe: None,
        };
        let run = Public {
            name,
            cluster: "a100-2048",
            gpus_per_node: 8,
            model: "",
            layout: [8, 1, pp, 1, 1],
            interleave,
            global_batch: batch,
            seq_len: 2048,
            precision: Precision::Bf16,
            recompute: Recompute::None,
            per_tensor: false,
        };
        let ours = run.run(cost, Some(model))?.step_time_s;
        rows.push(
            Row::new(KORTHIKANTI, name, "s a step", seconds, ours)
                .note("published without flash attention, which ours has"),
        );
    }
    Ok(rows)
}
