//! What a kernel asks of a GPU: a GEMM, attention, bytes, or nothing but the network; and how long
//! it takes.

use fathom_trace::Group;

use super::{AttentionShape, GemmKind, GemmShape, KernelModel, MemoryClass};
use crate::config::WhatIf;
use crate::lowering::{self, Kernel};

/// The work of one kernel on one GPU.
#[derive(Debug, Clone, PartialEq)]
pub enum Work {
    /// A matrix multiplication, plain or grouped.
    Gemm(GemmShape, GemmKind),
    /// Attention; `true` for its backward.
    Attention(AttentionShape, bool),
    /// Memory-bound kernels that move `bytes` in all.
    Memory {
        /// Bytes read and written by all launches together.
        bytes: f64,
        /// How the kernels touch memory.
        class: MemoryClass,
        /// Kernels that are launched.
        launches: u64,
        /// SMs that they can use; `None` for all.
        max_sms: Option<u64>,
    },
    /// Communication that computation waits for: timed by the network model.
    Collective {
        /// Its name in the op table.
        op: String,
        /// The ranks that take part.
        group: Group,
        /// Bytes of this rank's buffer; of a ring exchange, bytes that leave it.
        bytes: f64,
    },
}

/// Share of a kernel's bytes that is left when wishes of the report (section 3.5.2) are granted.
fn bytes_left(op: &str, wishes: &WhatIf) -> f64 {
    let mut left: f64 = 1.0;
    if op == lowering::CAST {
        // Fused with the copy into shared memory, nothing is left; near memory, half the traffic;
        // with a warp-level cast the producer quantises and only the FP8 write remains of read 2,
        // write 1.
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
    if wishes.transposed_reads && op == lowering::RETILING {
        left = 0.0;
    }
    left
}

impl KernelModel {
    /// Seconds that `kernel` holds its stream, with the gap to the next one; 0 for communication.
    pub fn kernel(&self, kernel: &Kernel, wishes: &WhatIf) -> f64 {
        let gap = self.constants.gap_s;
        match &kernel.work {
            Work::Gemm(shape, kind) => gap + self.gemm_of_library(shape, *kind).seconds,
            Work::Attention(shape, backward) => gap + self.attention(shape, *backward),
            Work::Memory { bytes, class, launches, max_sms } => {
                let left = bytes_left(&kernel.op, wishes);
                if left == 0.0 {
                    return 0.0;
                }
                let extra = launches.saturating_sub(1) as f64 * (gap + self.constants.ramp_s);
                gap + extra + self.memory(bytes * left, *class, *max_sms)
            }
            Work::Collective { .. } => 0.0,
        }
    }
}

#[cfg(test)]
mod tests {
    use fathom_config::ModelConfig;

    use super::*;
    use crate::kernel_time::Constants;
    use crate::model_code::ModelCode;
    use crate::times::LayerKind;
    use crate::workload::{LayerContext, LayerKernels};
    use fathom_config::Gpu;

    fn v3_layer() -> Vec<Kernel> {
        let model = ModelConfig::preset("deepseek-v3").unwrap();
        let ctx = LayerContext::of_tokens(4096, 64);
        let kernels = LayerKernels::record(&ModelCode, &model, &ctx).unwrap();
        kernels.of(LayerKind::Moe).to_vec()
    }

    /// FLOPs of the products against the closed form: 6 a parameter and token, the up-projections
    /// that are computed again, attention of 2 + 5 products.
    #[test]
    fn the_kernels_carry_the_models_flops() {
        let model = ModelConfig::preset("deepseek-v3").unwrap();
        let moe = model.moe.unwrap();
        let active = model.attention_params() + model.moe_ffn_params(&moe, 8);
        let recomputed = 2.0 * (1536.0 * 24576.0 + 512.0 * 32768.0);
        let attention = 128.0 * 4096.0 * ((192.0 + 128.0) + (3.0 * 192.0 + 2.0 * 128.0));
        let expected = 4096.0 * (6.0 * active as f64 + recomputed + attention);
        let flops = |k: &Kernel| match &k.work {
            Work::Gemm(shape, _) => shape.flops(),
            Work::Attention(shape, backward) => shape.flops(*backward),
            _ => 0.0,
        };
        let counted: f64 = v3_layer().iter().map(flops).sum();
        assert!((counted / expected - 1.0).abs() < 1e-9, "{counted} against {expected}");
    }

    #[test]
    fn wishes_only_take_time_away() {
        let gpu = Gpu::preset("h800").unwrap();
        let none = WhatIf::default();
        let kernels = v3_layer();
        let total = |w: &WhatIf| -> f64 {
            let k = KernelModel::beside_communication(&gpu, Constants::FITTED, w, 20);
            kernels.iter().map(|r| k.kernel(r, w)).sum()
        };
        let base = total(&none);
        for wish in [
            WhatIf { comm_off_sms: true, ..none },
            WhatIf { scaling_in_tensor_core: true, ..none },
            WhatIf { fused_cast_tma: true, ..none },
            WhatIf { warp_level_cast: true, ..none },
            WhatIf { near_memory_cast: true, ..none },
            WhatIf { transposed_reads: true, ..none },
        ] {
            assert!(total(&wish) < base, "{wish:?}");
        }
        // The blocks' scales are applied outside all the same.
        assert_eq!(total(&WhatIf { wide_accumulation: true, ..none }), base);
    }
}
