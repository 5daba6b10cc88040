//! Figures that follow from shapes and counts: parameters, FLOPs, KV cache, networks, bounds.

use fathom_schedule::ScheduleKind;
use fathom_schedule::compare::bubble_formula;
use fathom_schedule::timeline::{ChunkDurations, play};
use fathom_schedule::{Schedule, ScheduleShape};

use super::Row;
use crate::error::SimError;
use crate::first_principles::FirstPrinciples;
use crate::hardware::cluster::TopologyKind;
use crate::network::collectives::decode_all_to_all_s;
use crate::network::topology::{NetworkPrices, largest};
use fathom_config::ModelConfig;

const MODEL: &str = "Model";
const NETWORK: &str = "Network";
const SCHEDULE: &str = "Schedules";

/// By hand: 80 layers of 2 * 8192^2 + 2 * 8192 * 1024 + 3 * 8192 * 29568 weights are 70.21e9, the
/// head 1.25e9; causal attention at 4096 is 12 * 80 * 8192 * 2048 FLOP. With a feed-forward of
/// 24,576 (Qwen-72B, the row's name) the layers are 60.40e9.
const QWEN_NOTE: &str = "the layers' 70.2e9 weights alone are 421, head 7.5, causal attention 16.1: \
    394 is below the layers, so it is of other sizes; Qwen-72B's feed-forward of 24,576 with \
    embedding and head would be 393.4";
/// By hand: 126 layers of 401.65e9 weights are 2409.9, the head 12.6, causal attention 50.7.
const LLAMA_NOTE: &str = "layers 2410, head 12.6, causal attention 50.7: the published lies between \
    layers alone and layers with attention (2461), its convention is not stated";

/// The rows of model, network and schedules.
pub(super) fn rows(_cost: &FirstPrinciples) -> Result<Vec<Row>, SimError> {
    let mut rows = model_rows()?;
    rows.extend(network_rows());
    rows.extend(schedule_rows()?);
    Ok(rows)
}

fn model_rows() -> Result<Vec<Row>, SimError> {
    let v3 = ModelConfig::preset("deepseek-v3")?.parameters();
    let billion = |x: u64| x as f64 / 1e9;
    let mut rows = vec![
        Row::new(MODEL, "DeepSeek-V3 parameters", "1e9", 671.03, billion(v3.total)).digits(2),
        Row::new(MODEL, "active, without the embedding", "1e9", 36.62, billion(v3.active))
            .digits(2),
        Row::new(
            MODEL,
            "active, with the embedding",
            "1e9",
            37.55,
            billion(v3.active + v3.embedding),
        )
        .digits(2),
    ];
    for (name, figure, kb) in [
        ("deepseek-v3", "KV cache a token, DeepSeek-V3", 70.272),
        ("qwen2.5-72b", "KV cache a token, Qwen2.5-72B", 327.68),
        ("llama-3.1-405b", "KV cache a token, LLaMA-3.1-405B", 516.096),
    ] {
        let ours = ModelConfig::preset(name)?.kv_bytes_per_token(2) as f64 / 1e3;
        rows.push(Row::new(MODEL, figure, "KB", kb, ours).digits(3));
    }
    for (name, figure, gflop, note) in [
        ("deepseek-v2", "training a token, DeepSeek-V2", 155.0, ""),
        ("deepseek-v3", "training a token, DeepSeek-V3", 250.0, ""),
        ("qwen2.5-72b", "training a token, Qwen2.5-72B", 394.0, QWEN_NOTE),
        ("llama-3.1-405b", "training a token, LLaMA-3.1-405B", 2448.0, LLAMA_NOTE),
    ] {
        let ours = ModelConfig::preset(name)?.train_flops_per_token(4096, true) / 1e9;
        let row = Row::new(MODEL, figure, "GFLOP", gflop, ours);
        rows.push(if note.is_empty() { row.digits(0) } else { row.note(note) });
    }
    Ok(rows)
}

fn network_rows() -> Vec<Row> {
    let mut rows = Vec::new();
    for (kind, name, planes, endpoints, switches, musd) in [
        (TopologyKind::Mpft, "multi-plane fat tree", 8, 16384.0, 768.0, 72.0),
        (TopologyKind::FatTree3, "three-layer fat tree", 1, 65536.0, 5120.0, 491.0),
        (TopologyKind::Dragonfly, "dragonfly", 1, 261_632.0, 16352.0, 1522.0),
    ] {
        let size = largest(kind, 64, planes);
        let cost = NetworkPrices::PUBLISHED.cost_usd(size) / 1e6;
        rows.push(
            Row::new(NETWORK, format!("{name}: endpoints"), "", endpoints, size.endpoints as f64)
                .digits(0),
        );
        rows.push(
            Row::new(NETWORK, format!("{name}: switches"), "", switches, size.switches as f64)
                .digits(0),
        );
        let row = Row::new(NETWORK, format!("{name}: cost"), "M$", musd, cost);
        rows.push(if kind == TopologyKind::Dragonfly {
            row.note("prices of a switch and a link from the two trees' rows")
        } else {
            row.fitted()
        });
    }
    let layer = decode_all_to_all_s(32, 9, 7000, 50e9);
    rows.push(
        Row::new(
            NETWORK,
            "decode bound: dispatch and combine of a layer",
            "us",
            120.96,
            layer * 1e6,
        )
        .digits(2),
    );
    rows.push(
        Row::new(NETWORK, "decode bound: a token", "ms", 14.76, layer * 2.0 * 61.0 * 1e3).digits(2),
    );
    rows
}

/// Bubbles of the DualPipe repository's table, with F = input backward = W = 1 and F&B = F + B, by
/// playing the streams.
fn schedule_rows() -> Result<Vec<Row>, SimError> {
    let d = ChunkDurations { f: 1.0, b: 2.0, w: 1.0, fb: 3.0 };
    let mut rows = Vec::new();
    for (kind, stages, micro_batches) in [
        (ScheduleKind::OneFOneB, 16, 64),
        (ScheduleKind::Zb1p, 16, 64),
        (ScheduleKind::DualPipe, 16, 64),
        (ScheduleKind::DualPipeV, 16, 32),
    ] {
        let schedule = Schedule::new(kind, ScheduleShape { stages, micro_batches, interleave: 2 })?;
        let ranks = schedule.ranks.len();
        let (formula, bubble) = bubble_formula(kind, stages, ranks, d);
        let timeline =
            play(&schedule, d).map_err(|e| SimError::Layout(format!("{}: {e}", kind.name())))?;
        let ours = timeline.mean_bubble();
        let figure = format!("bubble of {}, {formula}, 16 stages, F = Bi = W = 1", kind.name());
        rows.push(Row::new(SCHEDULE, figure, "F", bubble, ours).digits(6));
    }
    Ok(rows)
}
