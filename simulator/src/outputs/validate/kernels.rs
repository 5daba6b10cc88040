//! Kernels: GEMMs and attention of the profiled chunk, DeepGEMM on the whole chip, DeepEP's
//! all-to-all.

use super::{Role, Row};
use crate::calibrate::{PROFILE_FITTING_GEMMS, parse_table};
use crate::config::WhatIf;
use crate::error::SimError;
use crate::first_principles::FirstPrinciples;
use crate::hardware;
use crate::kernel_time::{AttentionShape, GemmKind, GemmShape, KernelModel, MemoryClass};
use crate::network::alltoall::{AllToAll, AllToAllModel, Exchange};
use crate::network::low_latency::low_latency_s;
use fathom_config::{Gpu, ModelConfig, MoeConfig};

const FITTING: &str = "Profiled chunk: GEMMs of the fitting half";
const OTHER: &str = "Profiled chunk: the other GEMMs";
const ATTENTION: &str = "Profiled chunk: attention";
const DEEPGEMM: &str = "DeepGEMM on H800, whole chip";
const DEEPEP: &str = "DeepEP on H800, alone";
const LATENCY: &str = "DeepEP on H800, low latency";

/// The other half of the profile's GEMMs.
const TEST_GEMMS: &str = include_str!("../../../presets/measured/h800-profile-test.csv");

/// Rows per expert of rank 0, by layer, in the profile's forward chunk and its backward chunk: a
/// quarter of the padded rows that the kernels' grids show.
const FORWARD_ROWS: [u64; 4] = [31104 / 4, 30976 / 4, 36864 / 4, 31104 / 4];
const BACKWARD_ROWS: [u64; 4] = [34688 / 4, 32512 / 4, 32896 / 4, 28416 / 4];

/// All kernel rows.
pub(super) fn rows(cost: &FirstPrinciples) -> Result<Vec<Row>, SimError> {
    let gpu = Gpu::preset("h800")?;
    let none = WhatIf::default();
    let beside = KernelModel::beside_communication(&gpu, cost.constants, &none, 20);
    let alone = KernelModel::alone(&gpu, cost.constants, &none);
    let mut rows = profile_gemms(&beside)?;
    rows.extend(attention(&beside));
    rows.extend(deep_gemm(&alone));
    rows.extend(flash_mla(&alone));
    rows.extend(deep_ep(cost)?);
    Ok(rows)
}

/// Mean over the layers of a grouped GEMM, microseconds.
fn grouped(
    model: &KernelModel,
    rows: [u64; 4],
    shape: impl Fn(Vec<u64>) -> GemmShape,
    kind: GemmKind,
) -> f64 {
    rows.iter().map(|&r| model.gemm(&shape(vec![r; 4]), kind).seconds * 1e6).sum::<f64>() / 4.0
}

fn profile_gemms(model: &KernelModel) -> Result<Vec<Row>, SimError> {
    let (two, one) = (GemmKind::Fp8OneTwo, GemmKind::Fp8OneOne);
    let by_m = |n, k| move |r| GemmShape::grouped_m(r, n, k);
    let by_k = |m, n| move |r| GemmShape::grouped_k(m, n, r);
    let plain = |section, text: &str| -> Result<Vec<Row>, SimError> {
        let table = parse_table("measured GEMMs", text)?;
        Ok(table
            .iter()
            .map(|g| {
                let ours = model.gemm(&GemmShape::new(g.m, g.n, g.k), g.kind).seconds * 1e6;
                Row::new(
                    section,
                    format!("{} {}x{}x{}", g.name, g.m, g.n, g.k),
                    "us",
                    g.mean_us,
                    ours,
                )
            })
            .collect())
    };
    let mut rows: Vec<Row> =
        plain(FITTING, PROFILE_FITTING_GEMMS)?.into_iter().map(Row::fitted).collect();
    for (name, mean, ours) in [
        ("expert_w13 fwd", 1862.5, grouped(model, FORWARD_ROWS, by_m(4096, 7168), two)),
        ("expert_w2 dgrad", 864.5, grouped(model, BACKWARD_ROWS, by_m(2048, 7168), two)),
        ("expert_w2 wgrad", 1276.0, grouped(model, BACKWARD_ROWS, by_k(7168, 2048), one)),
    ] {
        rows.push(Row::new(FITTING, format!("{name}, 4 experts"), "us", mean, ours));
    }
    let mut other = plain(OTHER, TEST_GEMMS)?;
    for (name, mean, ours) in [
        ("expert_w2 fwd", 1035.25, grouped(model, FORWARD_ROWS, by_m(7168, 2048), two)),
        ("expert_w13 dgrad", 1969.25, grouped(model, BACKWARD_ROWS, by_m(7168, 4096), two)),
        ("expert_w13 wgrad", 2657.75, grouped(model, BACKWARD_ROWS, by_k(4096, 7168), one)),
    ] {
        other.push(Row::new(OTHER, format!("{name}, 4 experts"), "us", mean, ours));
    }
    let mean = other.iter().map(|r| r.error.abs()).sum::<f64>() / other.len() as f64;
    rows.extend(other);
    rows.push(
        Row::new(OTHER, "mean absolute error", "%", 0.0, mean * 100.0).points(Role::Tested, 8.0),
    );
    Ok(rows)
}

fn attention(model: &KernelModel) -> Vec<Row> {
    let shape = AttentionShape {
        heads: 128,
        queries: 4096,
        keys: 4096,
        qk_dim: 192,
        v_dim: 128,
        causal: true,
    };
    let rate = |backward| shape.flops(backward) / model.attention(&shape, backward) / 1e12;
    vec![
        Row::new(ATTENTION, "forward", "TFLOPS", 556.0, rate(false)).fitted(),
        Row::new(ATTENTION, "backward (420 to 473 by layer)", "TFLOPS", 446.5, rate(true)).fitted(),
    ]
}

fn deep_gemm(model: &KernelModel) -> Vec<Row> {
    let mut rows = Vec::new();
    for (n, k, tflops) in [
        (2112, 7168, 1009.0),
        (24576, 1536, 1125.0),
        (32768, 512, 751.0),
        (7168, 16384, 1426.0),
        (4096, 7168, 1265.0),
        (7168, 2048, 1168.0),
    ] {
        let shape = GemmShape::new(4096, n, k);
        let t = model.deep_gemm(&shape);
        let figure = format!("4096x{n}x{k} (tiles {} wide)", t.block_n);
        rows.push(Row::new(DEEPGEMM, figure, "TFLOPS", tflops, shape.flops() / t.seconds / 1e12));
    }
    for (n, k, tflops) in [(4096, 7168, 1346.0), (7168, 2048, 1214.0)] {
        let shape = GemmShape::grouped_m(vec![8192; 4], n, k);
        let t = model.deep_gemm(&shape);
        let figure = format!("4 groups of 8192x{n}x{k} (tiles {} wide)", t.block_n);
        rows.push(Row::new(DEEPGEMM, figure, "TFLOPS", tflops, shape.flops() / t.seconds / 1e12));
    }
    rows.into_iter().map(|r| r.goal(Role::Tested, 0.10)).collect()
}

fn flash_mla(model: &KernelModel) -> Vec<Row> {
    const SECTION: &str = "FlashMLA decode on H800";
    // 128 query heads of 128 sequences against long caches, the latent as key and value.
    let shape = AttentionShape {
        heads: 128,
        queries: 128,
        keys: 8192,
        qk_dim: 576,
        v_dim: 512,
        causal: false,
    };
    let tflops = shape.flops(false) / model.attention(&shape, false) / 1e12;
    let bytes = 1e9;
    let rate = bytes / model.memory(bytes, MemoryClass::Stream, None) / 1e9;
    vec![
        Row::new(SECTION, "compute-bound", "TFLOPS", 660.0, tflops)
            .note("its softmax splits over two warpgroups; ours is the training kernel's"),
        Row::new(SECTION, "memory-bound", "GB/s", 3000.0, rate),
    ]
}

/// DeepEP's benchmark: 4096 tokens, groups are nodes, at most four of them per token.
fn deep_ep(cost: &FirstPrinciples) -> Result<Vec<Row>, SimError> {
    let cluster = hardware::cluster("h800-2048")?;
    let v3 = ModelConfig::preset("deepseek-v3")?.moe.expect("DeepSeek-V3 has experts");
    let model = AllToAllModel::new(&cluster, cost.constants, WhatIf::default());
    let routed = |ep: u64| {
        let nodes = (ep / 8).max(1) as usize;
        MoeConfig { n_group: nodes, topk_group: nodes.min(4), ..v3 }
    };
    let run = |ep: u64, exchange: Exchange, token_bytes: f64| {
        let op = AllToAll { exchange, ep, tokens: 4096, token_bytes, load: 1.0, sms: 20 };
        model.alone(&routed(ep), &op).logical_bytes_per_s / 1e9
    };
    let mut rows = Vec::new();
    for (ep, figures) in
        [(8, [153.0, 158.0]), (16, [43.0, 43.0]), (32, [58.0, 57.0]), (64, [51.0, 50.0])]
    {
        for ((what, exchange, bytes), figure) in
            [("dispatch", Exchange::Dispatch, 7392.0), ("combine", Exchange::Combine, 14336.0)]
                .into_iter()
                .zip(figures)
        {
            let ours = run(ep, exchange, bytes);
            let row = Row::new(DEEPEP, format!("EP{ep} {what}"), "GB/s", figure, ours);
            rows.push(match ep {
                8 => row.note("other kernels than between nodes"),
                16 => row.fitted(),
                _ => row.goal(Role::Tested, 0.10),
            });
        }
    }
    for (ep, figures) in [
        (8, [77.0, 114.0]),
        (16, [118.0, 195.0]),
        (32, [155.0, 273.0]),
        (64, [173.0, 314.0]),
        (128, [192.0, 369.0]),
        (256, [194.0, 360.0]),
    ] {
        for ((what, bytes), figure) in
            [("dispatch", 7392.0), ("combine", 14336.0)].into_iter().zip(figures)
        {
            let ours = low_latency_s(&cluster, ep, (128 * v3.top_k) as f64, bytes) * 1e6;
            let row = Row::new(LATENCY, format!("EP{ep} {what}, 128 tokens"), "us", figure, ours);
            rows.push(match ep {
                8 => row.note("bytes and latency alone"),
                _ => row.note(
                    "bytes at the 40 GB/s a NIC that arXiv 2505.09343 counts for small messages",
                ),
            });
        }
    }
    Ok(rows)
}
