//! Properties of the kernel-time model: more hardware is never slower, parts add up, records of any
//! backend are timed.

use fathom_config::Gpu;
use fathom_simulator::config::WhatIf;
use fathom_simulator::kernel_time::{
    AttentionShape, Constants, GemmKind, GemmShape, KernelModel, MemoryClass,
};
use proptest::prelude::*;

fn model(gpu: &str) -> KernelModel {
    let gpu = Gpu::preset(gpu).unwrap();
    KernelModel::alone(&gpu, Constants::FITTED, &WhatIf::default())
}

const KINDS: [GemmKind; 4] =
    [GemmKind::Fp8OneTwo, GemmKind::Fp8OneOne, GemmKind::Bf16, GemmKind::Bf16Accumulate];

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn faster_hardware_is_never_slower(
        m in 1u64..40_000, n in 1u64..40_000, k in 1u64..40_000, kind in 0usize..4,
        faster in 1.0f64..4.0, which in 0usize..5,
    ) {
        let base = model("h800");
        let mut better = base.clone();
        match which {
            0 => better.gpu.fp8_flops *= faster,
            1 => better.gpu.bf16_flops *= faster,
            2 => better.gpu.memory_bytes_per_s *= faster,
            3 => better.gpu.l2_bytes_per_s *= faster,
            _ => better.gpu.clock_hz *= faster,
        }
        let shape = GemmShape::new(m, n, k);
        let time = |x: &KernelModel| x.gemm(&shape, KINDS[kind]).seconds;
        prop_assert!(time(&better) <= time(&base) * (1.0 + 1e-12));
        prop_assert!(base.gemm_best_block(&shape, KINDS[kind]).seconds <= time(&base));
        // No kernel beats the peak of its tensor cores or of its memory.
        let peak = if KINDS[kind].operand_bytes() == 1.0 { base.gpu.fp8_flops } else { base.gpu.bf16_flops };
        prop_assert!(time(&base) >= shape.flops() / peak);
        prop_assert!(time(&base) >= shape.bytes(KINDS[kind]) / base.gpu.memory_bytes_per_s);
    }

    /// Growing a GEMM never makes it faster; nor does a neighbour on the chip.
    #[test]
    fn more_work_or_company_takes_longer(
        m in 1u64..20_000, n in 1u64..20_000, k in 1u64..20_000, more in 0u64..10_000, kind in 0usize..4,
    ) {
        let alone = model("h800");
        let time = |x: &KernelModel, m, n, k| x.gemm(&GemmShape::new(m, n, k), KINDS[kind]).seconds;
        let base = time(&alone, m, n, k);
        for (m, n, k) in [(m + more, n, k), (m, n + more, k), (m, n, k + more)] {
            prop_assert!(time(&alone, m, n, k) >= base * (1.0 - 1e-12));
        }
        let gpu = Gpu::preset("h800").unwrap();
        let beside = KernelModel::beside_communication(&gpu, Constants::FITTED, &WhatIf::default(), 20);
        let compute = |x: &KernelModel| x.gemm(&GemmShape::new(m, n, k), GemmKind::Bf16);
        let (a, b) = (compute(&alone), compute(&beside));
        prop_assert!(b.memory_bound || b.waves >= a.waves);
    }

    /// Groups of equal rows that fill whole tiles cost what one GEMM of all rows costs.
    #[test]
    fn grouping_whole_tiles_is_free(tiles in 1u64..64, groups in 1usize..16, n in 1u64..64, k in 1u64..64) {
        let x = model("h800");
        let rows = vec![128 * tiles; groups];
        let (n, k) = (128 * n, 128 * k);
        let all = GemmShape::new(128 * tiles * groups as u64, n, k);
        let grouped = x.gemm(&GemmShape::grouped_m(rows, n, k), GemmKind::Fp8OneTwo);
        let plain = x.gemm(&all, GemmKind::Fp8OneTwo);
        prop_assert_eq!(grouped.waves, plain.waves);
        if !grouped.memory_bound && !plain.memory_bound {
            prop_assert!((grouped.seconds - plain.seconds).abs() <= 1e-12);
        }
    }

    #[test]
    fn attention_and_bytes_scale(heads in 1u64..256, blocks in 1u64..64, bytes in 1e3f64..1e10) {
        let x = model("h100");
        let shape = AttentionShape {
            heads, queries: 128 * blocks, keys: 128 * blocks, qk_dim: 128, v_dim: 128, causal: true,
        };
        let forward = x.attention(&shape, false);
        prop_assert!(x.attention(&shape, true) > forward);
        prop_assert!(forward >= shape.flops(false) / x.gpu.bf16_flops);
        let times = [MemoryClass::Stream, MemoryClass::Convert, MemoryClass::Row]
            .map(|c| x.memory(bytes, c, None));
        prop_assert!(times[0] <= times[1] && times[1] <= times[2]);
        prop_assert!(x.memory(bytes, MemoryClass::Row, Some(4)) >= times[2]);
        prop_assert!(times[0] >= bytes / x.gpu.memory_bytes_per_s);
    }
}

/// Rows without a tile, groups without a row, and every preset that has the format.
#[test]
fn edges() {
    for (name, _) in fathom_config::presets::GPUS {
        let x = model(name);
        let t = x.gemm_best_block(&GemmShape::new(1, 1, 1), GemmKind::Bf16);
        assert!(t.seconds > 0.0 && t.seconds < 1e-4, "{name}: {t:?}");
        let none = x.gemm(&GemmShape::grouped_m(vec![0, 0], 4096, 4096), GemmKind::Bf16);
        assert_eq!((none.waves, none.seconds), (0.0, Constants::FITTED.ramp_s));
    }
}
