//! What an op record asks of a GPU: a GEMM, attention, bytes, or nothing but launches.

use fathom_trace::{DType, OpRecord, Phase};
use serde_json::Value;

use super::{AttentionShape, GemmKind, GemmShape, GroupedBy, KernelModel, MemoryClass};
use crate::config::WhatIf;

/// The work of one op on one GPU.
#[derive(Debug, Clone, PartialEq)]
pub enum Work {
    /// A matrix multiplication.
    Gemm(GemmShape, GemmKind),
    /// Attention; `true` for its backward.
    Attention(AttentionShape, bool),
    /// Memory-bound kernels that move `bytes` in all.
    Memory {
        /// Reads and writes.
        bytes: f64,
        /// How they touch memory.
        class: MemoryClass,
        /// Kernels launched.
        launches: u64,
        /// SMs that they can use; `None` for all.
        max_sms: Option<u64>,
    },
    /// Communication: timed by the network model.
    Collective,
}

/// Memory classes by op name; what is not listed streams.
const CLASSES: [(&str, MemoryClass); 12] = [
    ("rms_norm", MemoryClass::Row),
    ("rope", MemoryClass::Row),
    ("quantize_e5m6", MemoryClass::Row),
    ("dequantize_e5m6", MemoryClass::Row),
    ("top_k", MemoryClass::Row),
    ("expert_index", MemoryClass::Row),
    ("softmax", MemoryClass::Row),
    ("cross_entropy", MemoryClass::Row),
    ("quantize", MemoryClass::Convert),
    ("dequantize", MemoryClass::Convert),
    ("swiglu", MemoryClass::Convert),
    ("broadcast", MemoryClass::Convert),
];

fn class_of(op: &str) -> MemoryClass {
    CLASSES.iter().find(|(name, _)| op.starts_with(name)).map_or(MemoryClass::Stream, |(_, c)| *c)
}

impl Work {
    /// Reads the work off a record: `params` say sizes where the op is known, FLOPs and bytes where
    /// it is not.
    pub fn of(record: &OpRecord) -> Work {
        let size = |key: &str| record.params.get(key).and_then(Value::as_u64);
        if record.group.is_some_and(|g| g.size > 1) {
            return Work::Collective;
        }
        if record.op.starts_with("gemm") || record.op.starts_with("grouped_gemm") {
            if let Some((m, n, k)) = sizes(record) {
                return Work::Gemm(gemm_shape(record, m, n, k), gemm_kind(record));
            }
        } else if matches!(record.op.as_str(), "attention" | "attention_backward")
            && let (Some(heads), Some(queries), Some(qk_dim), Some(v_dim)) =
                (size("heads"), size("queries"), size("qk_dim"), size("v_dim"))
        {
            let keys = size("keys").unwrap_or(queries);
            let causal = record.params.get("causal").and_then(Value::as_bool).unwrap_or(true);
            let shape = AttentionShape { heads, queries, keys, qk_dim, v_dim, causal };
            return Work::Attention(shape, record.op.starts_with("attention_backward"));
        }
        Work::Memory {
            bytes: (record.bytes_read + record.bytes_written) as f64,
            class: class_of(&record.op),
            launches: size("launches").unwrap_or(1),
            max_sms: size("max_sms"),
        }
    }
}

/// `m, n, k` from the params, or from the shapes of operands `a [.., m, k]` and `b [.., n, k]`.
fn sizes(record: &OpRecord) -> Option<(u64, u64, u64)> {
    let size = |key: &str| record.params.get(key).and_then(Value::as_u64);
    if let (Some(m), Some(n), Some(k)) = (size("m"), size("n"), size("k")) {
        return Some((m, n, k));
    }
    let shape = |role: &str| record.inputs.iter().find(|t| t.role == role).map(|t| &t.shape);
    let last_two = |s: &Vec<usize>| match s.as_slice() {
        [.., x, y] => Some((*x as u64, *y as u64)),
        _ => None,
    };
    let ((m, k), (n, k2)) = (last_two(shape("a")?)?, last_two(shape("b")?)?);
    (k == k2).then_some((m, n, k))
}

fn gemm_shape(record: &OpRecord, m: u64, n: u64, k: u64) -> GemmShape {
    let groups: Vec<u64> = match record.params.get("groups") {
        Some(Value::Array(list)) => list.iter().filter_map(Value::as_u64).collect(),
        _ => Vec::new(),
    };
    if groups.is_empty() {
        return GemmShape::new(m, n, k);
    }
    let grouped_by = if record.phase == Phase::W { GroupedBy::K } else { GroupedBy::M };
    GemmShape { m, n, k, groups, grouped_by }
}

fn gemm_kind(record: &OpRecord) -> GemmKind {
    let fp8 = record.op.contains("fp8")
        || record.inputs.first().is_some_and(|t| matches!(t.dtype, DType::F8E4M3 | DType::F8E5M2));
    match (fp8, record.phase) {
        (true, Phase::W) => GemmKind::Fp8OneOne,
        (true, _) => GemmKind::Fp8OneTwo,
        (false, Phase::W) => GemmKind::Bf16Accumulate,
        (false, _) => GemmKind::Bf16,
    }
}

/// Share of an op's bytes that is left when wishes of the report (section 3.5.2) are granted.
fn bytes_left(op: &str, wishes: &WhatIf) -> f64 {
    let mut left: f64 = 1.0;
    if op == "quantize_tile" {
        // Fused with the copy into shared memory, nothing is left; near memory, half the traffic;
        // with a warp-level
        // cast the producer quantises and only the FP8 write remains of read 2, write 1.
        for (granted, share) in [
            (wishes.fused_cast_tma, 0.0),
            (wishes.near_memory_cast, 0.5),
            (wishes.warp_level_cast, 1.0 / 3.0),
        ] {
            if granted {
                left = left.min(share);
            }
        }
    }
    if wishes.transposed_reads && (op == "transpose" || op == "quantize_channel") {
        left = 0.0;
    }
    left
}

impl KernelModel {
    /// Seconds that `record` holds its stream, with the gap to the next kernel; 0 for
    /// communication.
    pub fn record(&self, record: &OpRecord, wishes: &WhatIf) -> f64 {
        let gap = self.constants.gap_s;
        match Work::of(record) {
            // The FP8 kernels tile by the scales' blocks of 128, libraries for BF16 choose.
            Work::Gemm(shape, kind @ (GemmKind::Bf16 | GemmKind::Bf16Accumulate)) => {
                gap + self.gemm_best_block(&shape, kind).seconds
            }
            Work::Gemm(shape, kind) => gap + self.gemm(&shape, kind).seconds,
            Work::Attention(shape, backward) => gap + self.attention(&shape, backward),
            Work::Memory { bytes, class, launches, max_sms } => {
                let left = bytes_left(&record.op, wishes);
                if left == 0.0 {
                    return 0.0;
                }
                let extra = launches.saturating_sub(1) as f64 * (gap + self.constants.ramp_s);
                gap + extra + self.memory(bytes * left, class, max_sms)
            }
            Work::Collective => 0.0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Precision, Recompute};
    use crate::hardware;
    use crate::kernel_time::Constants;
    use crate::workload::{LayerContext, layer_records};
    use fathom_trace::Component;

    fn v3_layer() -> Vec<OpRecord> {
        let model = hardware::model("deepseek-v3").unwrap();
        let ctx = LayerContext {
            micro_batch: 1,
            seq_len: 4096,
            tp: 1,
            cp: 1,
            ep: 64,
            precision: Precision::Fp8,
            recompute: Recompute::Selective,
            load: (1.0, 1.0),
        };
        layer_records(&model, &ctx, 5)
    }

    /// FLOPs of the records against the closed form: 6 a parameter and token, attention of 2 + 5
    /// products, and the
    /// up-projections that are computed again.
    #[test]
    fn records_carry_the_models_flops() {
        let model = hardware::model("deepseek-v3").unwrap();
        let moe = model.moe.unwrap();
        let active = model.attention_params() + model.moe_ffn_params(&moe, 8);
        let recomputed = 2.0 * (1536.0 * 24576.0 + 512.0 * 32768.0);
        let attention = 128.0 * 4096.0 * ((192.0 + 128.0) + (3.0 * 192.0 + 2.0 * 128.0));
        let expected = 4096.0 * (6.0 * active as f64 + recomputed + attention);
        let counted: u64 = v3_layer().iter().map(|r| r.flops).sum();
        assert!((counted as f64 / expected - 1.0).abs() < 1e-9, "{counted} against {expected}");
    }

    #[test]
    fn wishes_only_take_time_away() {
        let gpu = hardware::gpu("h800").unwrap();
        let none = WhatIf::default();
        let records = v3_layer();
        let total = |w: &WhatIf| -> f64 {
            let k = KernelModel::beside_communication(&gpu, Constants::FITTED, w, 20);
            records.iter().map(|r| k.record(r, w)).sum()
        };
        let base = total(&none);
        for wish in [
            WhatIf { comm_off_sms: true, ..none },
            WhatIf { wide_accumulation: true, ..none },
            WhatIf { scaling_in_tensor_core: true, ..none },
            WhatIf { fused_cast_tma: true, ..none },
            WhatIf { warp_level_cast: true, ..none },
            WhatIf { near_memory_cast: true, ..none },
            WhatIf { transposed_reads: true, ..none },
        ] {
            assert!(total(&wish) < base, "{wish:?}");
        }
    }

    #[test]
    fn a_record_of_shapes_alone_is_a_gemm() {
        let mut r = v3_layer().into_iter().find(|r| r.op == "gemm_fp8").unwrap();
        let work = Work::of(&r);
        let size = |k: &str| r.params[k].as_u64().unwrap() as usize;
        let (m, n, k) = (size("m"), size("n"), size("k"));
        let meta = |role: &str, shape: Vec<usize>| fathom_trace::TensorMeta {
            role: role.to_string(),
            dtype: DType::F8E4M3,
            shape,
        };
        r.params.clear();
        r.inputs = vec![meta("a", vec![m, k]), meta("b", vec![n, k])];
        assert_eq!(Work::of(&r), work);
        // An op nobody knows is timed by its bytes.
        r.op = "mystery".to_string();
        assert!(matches!(Work::of(&r), Work::Memory { class: MemoryClass::Stream, .. }));
        assert_eq!(r.component, Component::Attention);
    }
}
