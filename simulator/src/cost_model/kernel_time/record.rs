//! Time of a kernel from what the emulator recorded of its launch: the largest of its demands on
//! the chip.

use fathom_trace::KernelRecord;

use super::KernelModel;

/// Warp instructions that an SM issues per cycle.
const ISSUE_PER_CYCLE: f64 = 4.0;

impl KernelModel {
    /// Seconds of the launch that `record` describes: its tensor-core work, its instructions, its
    /// shared-memory requests with their bank conflicts, its bytes; each on the SMs that its grid
    /// can fill.
    pub fn kernel_record(&self, record: &KernelRecord) -> f64 {
        let c = &self.constants;
        let ctas = record.grid.iter().map(|&g| f64::from(g)).product::<f64>().max(1.0);
        let sms = ctas.min(self.sms as f64);
        let share = sms / self.gpu.sms as f64;
        let fp8 = record.tensor_core.keys().any(|k| {
            let k = k.to_ascii_lowercase();
            k.contains("e4m3") || k.contains("e5m2")
        });
        let peak =
            if fp8 && self.gpu.fp8_flops > 0.0 { self.gpu.fp8_flops } else { self.gpu.bf16_flops };
        let tensor_s = record.tensor_core_flops as f64 / (peak * share * c.mma_efficiency);
        let cycles_s = 1.0 / (sms * self.gpu.clock_hz);
        let issue_s = record.warp_instructions as f64 / ISSUE_PER_CYCLE * cycles_s;
        let shared_s = (record.shared_requests + record.bank_conflicts) as f64 * cycles_s;
        let bytes = record.global_bytes_read
            + record.global_bytes_written
            + record.tma_bytes_read
            + record.tma_bytes_written;
        let memory_s = bytes as f64 / (self.stream_bytes_per_s() * share.max(0.1));
        let busy = tensor_s.max(issue_s).max(shared_s).max(memory_s);
        c.ramp_s + self.slowdown() * busy
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::WhatIf;
    use crate::kernel_time::Constants;
    use fathom_config::Gpu;

    #[test]
    fn the_scarcest_resource_sets_the_time() {
        let gpu = Gpu::preset("h800").unwrap();
        let model = KernelModel::alone(&gpu, Constants::FITTED, &WhatIf::default());
        let ramp = Constants::FITTED.ramp_s;
        let full = KernelRecord { grid: [132, 1, 1], ..KernelRecord::default() };
        assert_eq!(model.kernel_record(&full), ramp);
        let copy = KernelRecord { global_bytes_read: 1 << 30, ..full.clone() };
        let expected = (1u64 << 30) as f64 / (3.35e12 * Constants::FITTED.stream_efficiency);
        assert!((model.kernel_record(&copy) - ramp - expected).abs() < 1e-12);
        // One SM does the same arithmetic 132 times slower.
        let mma = KernelRecord { tensor_core_flops: 1 << 40, ..full.clone() };
        let narrow = KernelRecord { grid: [1, 1, 1], ..mma.clone() };
        let ratio = (model.kernel_record(&narrow) - ramp) / (model.kernel_record(&mma) - ramp);
        assert!((ratio - 132.0).abs() < 1e-9);
        // FP8 runs at twice the rate.
        let fp8 = KernelRecord {
            tensor_core: [("wgmma.m64n128k32.e4m3".to_string(), 1)].into(),
            ..mma.clone()
        };
        let ratio = (model.kernel_record(&mma) - ramp) / (model.kernel_record(&fp8) - ramp);
        assert!((ratio - 2.0).abs() < 1e-9);
    }
}
