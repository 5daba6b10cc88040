//! Public results of other models and GPUs, none of which was fitted.

use fathom_schedule::ScheduleKind;

use super::Row;
use crate::config::{Parallel, Precision, Recompute, Scenario, Stack, Training};
use crate::error::SimError;
use crate::events::Detail;
use crate::first_principles::FirstPrinciples;
use crate::hardware;
use crate::step::{StepReport, simulate};
use fathom_config::{AttentionConfig, ModelConfig};

const META: &str = "LLaMA-3.1-405B on H100 (arXiv 2407.21783, table 4)";
const V2: &str = "DeepSeek-V2 on H800 (arXiv 2405.04434, section 3.2.3)";
const KORTHIKANTI: &str = "GPT on A100 (arXiv 2205.05198, table 5)";

/// One public training run.
struct Public {
    name: &'static str,
    cluster: &'static str,
    model: &'static str,
    /// `tp, cp, pp, dp, ep`.
    layout: [u64; 5],
    interleave: u64,
    global_batch: u64,
    seq_len: u64,
    recompute: Recompute,
}

impl Public {
    fn scenario(&self, model: Option<ModelConfig>) -> Result<Scenario, SimError> {
        let [tp, cp, pp, dp, ep] = self.layout;
        let mut s = Scenario::preset("llama-3.1-405b-h100-16384", &[])?;
        s.name = self.name.to_string();
        s.model = match model {
            Some(m) => m,
            None => ModelConfig::preset(self.model)?,
        };
        s.cluster = hardware::cluster(self.cluster)?;
        s.cluster.gpus = tp * cp * pp * dp;
        s.parallel = Parallel { tp, cp, pp, dp, ep, zero: 1 };
        s.interleave = self.interleave;
        s.schedule =
            if self.interleave > 1 { ScheduleKind::Interleaved } else { ScheduleKind::OneFOneB };
        s.training = Training {
            seq_len: self.seq_len,
            micro_batch: 1,
            global_batch: self.global_batch,
            precision: Precision::Bf16,
            recompute: self.recompute,
            total_tokens: 1e12,
        };
        s.stack = Stack::default();
        Ok(s)
    }

    fn run(
        &self,
        cost: &FirstPrinciples,
        model: Option<ModelConfig>,
    ) -> Result<StepReport, SimError> {
        Ok(simulate(&self.scenario(model)?, cost, Detail::Totals)?.report)
    }
}

/// The rows of this table: published, simulated, and how far apart.
pub(super) fn rows(cost: &FirstPrinciples) -> Result<Vec<Row>, SimError> {
    let mut rows = meta(cost)?;
    rows.extend(korthikanti(cost)?);
    rows.push(deepseek_v2(cost)?);
    Ok(rows)
}

/// DeepSeek-V2 in BF16: pipelines of 16 with zero bubbles, experts over 8 GPUs, ZeRO-1 (section
/// 3.1.3), batches of 9216 sequences of 4096.
fn deepseek_v2(cost: &FirstPrinciples) -> Result<Row, SimError> {
    let run = Public {
        name: "DeepSeek-V2",
        cluster: "h800-2048",
        model: "deepseek-v2",
        layout: [1, 1, 16, 64, 8],
        interleave: 1,
        global_batch: 9216,
        seq_len: 4096,
        recompute: Recompute::Selective,
    };
    let s = Scenario { schedule: ScheduleKind::Zb1p, ..run.scenario(None)? };
    let ours = simulate(&s, cost, Detail::Totals)?.report.gpu_hours_per_trillion_tokens;
    let figure = "GPU-hours a trillion tokens, PP16 EP8";
    Ok(Row::new(V2, figure, "1e3", 172.8, ours / 1e3)
        .of_run(&s, false)
        .note("unpublished, and taken: 1024 GPUs, selective recomputation, even loads"))
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
            model: "llama-3.1-405b",
            layout,
            interleave: 2,
            global_batch: batch,
            seq_len,
            recompute: Recompute::None,
        };
        let report = run.run(cost, None)?;
        let row = Row::new(META, name, "TFLOPS", tflops, report.mfu_causal * 989.5);
        rows.push(row.of_run(&run.scenario(None)?, true));
    }
    Ok(rows)
}

/// GPT-3 style models: GELU of width 4h counted as a SwiGLU of the same multiplications.
fn korthikanti(cost: &FirstPrinciples) -> Result<Vec<Row>, SimError> {
    let mut rows = Vec::new();
    let llama = ModelConfig::preset("llama-3.1-405b")?;
    for (name, layers, hidden, heads, pp, interleave, batch, seconds) in [
        ("22B, 8 GPUs", 48, 6144, 64, 1, 1, 4, 1.10),
        ("175B, 64 GPUs", 96, 12288, 96, 8, 3, 64, 13.75),
        ("530B, 280 GPUs", 105, 20480, 128, 35, 3, 280, 37.83),
        ("1T, 512 GPUs", 128, 25600, 160, 64, 1, 512, 71.49),
    ] {
        let model = ModelConfig {
            name: name.to_string(),
            layers,
            hidden_size: hidden,
            heads,
            intermediate_size: (8 * hidden / 3usize).next_multiple_of(64),
            vocab_size: 51200,
            tie_word_embeddings: true,
            attention: AttentionConfig::Gqa { kv_heads: heads, head_dim: hidden / heads },
            ..llama.clone()
        };
        let run = Public {
            name,
            cluster: "a100-2048",
            model: "",
            layout: [8, 1, pp, 1, 1],
            interleave,
            global_batch: batch,
            seq_len: 2048,
            recompute: Recompute::None,
        };
        let ours = run.run(cost, Some(model.clone()))?.step_time_s;
        rows.push(
            Row::new(KORTHIKANTI, name, "s a step", seconds, ours)
                .of_run(&run.scenario(Some(model))?, false)
                .note("published without flash attention, which ours has"),
        );
    }
    Ok(rows)
}
