//! GEMM time by tiles and waves.
//!
//! A persistent kernel gives every SM a share of the output tiles. Per step of 128 in K an SM
//! spends the time of its tensor cores and, for FP8 on Hopper, of the promotion of the partial sums
//! on its vector lanes (`docs/numerics.md`, section 5); at the end of a tile it writes the
//! output while the next tile's main loop does not run yet. All SMs write together, so the epilogue
//! goes at the memory's speed. Memory and L2 bandwidth bound the whole from below.

use serde::{Deserialize, Serialize};

use super::KernelModel;

/// What the operands are and how the result is kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum GemmKind {
    /// FP8, 1x128 scales on one operand and 128x128 on the other; BF16 out (fprop, dgrad).
    Fp8OneTwo,
    /// FP8, 1x128 scales on both operands; accumulated into FP32 (wgrad).
    Fp8OneOne,
    /// BF16 in and out.
    Bf16,
    /// BF16 in, accumulated into FP32 (wgrad).
    Bf16Accumulate,
    /// FP8 with one scale a tensor, BF16 out (fprop, dgrad).
    Fp8,
    /// FP8 with one scale a tensor, accumulated into FP32 (wgrad).
    Fp8Accumulate,
    /// FP4 with block scales, BF16 out (fprop, dgrad).
    Fp4,
    /// FP4 with block scales, accumulated into FP32 (wgrad).
    Fp4Accumulate,
}

impl GemmKind {
    /// Bytes of an element of an operand.
    pub fn operand_bytes(self) -> f64 {
        match self {
            GemmKind::Bf16 | GemmKind::Bf16Accumulate => 2.0,
            GemmKind::Fp4 | GemmKind::Fp4Accumulate => 0.5,
            _ => 1.0,
        }
    }

    /// Bytes moved per element of the output; accumulation reads it too.
    pub fn output_bytes(self) -> f64 {
        match self {
            GemmKind::Fp8OneTwo | GemmKind::Fp8 | GemmKind::Bf16 | GemmKind::Fp4 => 2.0,
            _ => 8.0,
        }
    }

    /// Vector operations an accumulator element takes per 128 of K: scale and add, or one fused
    /// step.
    fn promotion_ops(self) -> f64 {
        match self {
            GemmKind::Fp8OneTwo => 1.0,
            GemmKind::Fp8OneOne => 2.0,
            _ => 0.0,
        }
    }
}

/// Which dimension the groups of a grouped GEMM cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum GroupedBy {
    /// The `m` of every group, in one launch for all.
    M,
    /// The `k` of every group (weight gradients), in launches that follow each other on two
    /// streams.
    K,
}

/// A GEMM `[m, k] x [k, n]`, possibly grouped.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct GemmShape {
    /// Rows of the output; 0 where `groups` cut it.
    pub m: u64,
    /// Columns of the output.
    pub n: u64,
    /// Inner dimension; 0 where `groups` cut it.
    pub k: u64,
    /// Sizes of the groups along `grouped_by`; empty for a plain GEMM.
    pub groups: Vec<u64>,
    /// Dimension that `groups` cut.
    pub grouped_by: GroupedBy,
}

impl GemmShape {
    /// A plain GEMM, without groups.
    pub fn new(m: u64, n: u64, k: u64) -> GemmShape {
        GemmShape { m, n, k, groups: Vec::new(), grouped_by: GroupedBy::M }
    }

    /// A GEMM of experts: `rows` of each, one launch.
    pub fn grouped_m(rows: Vec<u64>, n: u64, k: u64) -> GemmShape {
        GemmShape { m: 0, n, k, groups: rows, grouped_by: GroupedBy::M }
    }

    /// Weight gradients of experts: `[m, rows_g] x [rows_g, n]` for each.
    pub fn grouped_k(m: u64, n: u64, rows: Vec<u64>) -> GemmShape {
        GemmShape { m, n, k: 0, groups: rows, grouped_by: GroupedBy::K }
    }

    /// `(m, k)` of every group.
    fn parts(&self) -> impl Iterator<Item = (u64, u64)> + '_ {
        let plain = self.groups.is_empty().then_some((self.m, self.k));
        let cut = move |&g: &u64| match self.grouped_by {
            GroupedBy::M => (g, self.k),
            GroupedBy::K => (self.m, g),
        };
        plain.into_iter().chain(self.groups.iter().map(cut))
    }

    /// Sizes as tables of measured times name them: `4096x7168x2048`, with the number and sum of
    /// groups where the dimension is cut: `(4:32768)x4096x7168`.
    pub fn name(&self) -> String {
        if self.groups.is_empty() {
            return format!("{}x{}x{}", self.m, self.n, self.k);
        }
        let cut = format!("({}:{})", self.groups.len(), self.groups.iter().sum::<u64>());
        match self.grouped_by {
            GroupedBy::M => format!("{cut}x{}x{}", self.n, self.k),
            GroupedBy::K => format!("{}x{}x{cut}", self.m, self.n),
        }
    }

    /// Floating-point operations, a multiply-add counted as two.
    pub fn flops(&self) -> f64 {
        self.parts().map(|(m, k)| 2.0 * m as f64 * self.n as f64 * k as f64).sum()
    }

    /// Bytes that must cross the memory bus at least once.
    pub fn bytes(&self, kind: GemmKind) -> f64 {
        let n = self.n as f64;
        self.parts()
            .map(|(m, k)| {
                let (m, k) = (m as f64, k as f64);
                kind.operand_bytes() * (m * k + k * n) + kind.output_bytes() * m * n
            })
            .sum()
    }
}

/// Rows of an output tile and K of a step, fixed by the instruction and the block scales.
const BLOCK_M: u64 = 128;
const BLOCK_K: u64 = 128;

/// The tile widths that a library for BF16 chooses from; the last two where accumulators lie in a
/// memory of their own.
const LIBRARY_BLOCK_N: [u64; 13] = [64, 72, 80, 88, 96, 104, 112, 120, 128, 144, 160, 192, 256];

/// Where the time of a GEMM goes; the parts do not overlap.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct GemmTime {
    /// Duration of the kernel, seconds.
    pub seconds: f64,
    /// Seconds of it in MMAs.
    pub mma_s: f64,
    /// Seconds of it in the promotion of partial sums.
    pub promotion_s: f64,
    /// Seconds of it between main loops: output, set-up.
    pub epilogue_s: f64,
    /// Width of an output tile, columns.
    pub block_n: u64,
    /// Waves of tiles over the SMs.
    pub waves: f64,
    /// Whether memory or L2 bandwidth, not the SMs, sets the time.
    pub memory_bound: bool,
}

impl KernelModel {
    /// Time of a GEMM with tiles 128 wide, as the profiled kernels have.
    pub fn gemm(&self, shape: &GemmShape, kind: GemmKind) -> GemmTime {
        self.gemm_with_block(shape, kind, 128)
    }

    /// Time of a GEMM with the best tile width that a library has.
    pub fn gemm_best_block(&self, shape: &GemmShape, kind: GemmKind) -> GemmTime {
        let widest = if self.gpu.architecture == "blackwell" { 256 } else { 160 };
        LIBRARY_BLOCK_N
            .iter()
            .filter(|&&block_n| block_n <= widest)
            .map(|&block_n| self.gemm_with_block(shape, kind, block_n))
            .min_by(|a, b| a.seconds.total_cmp(&b.seconds))
            .expect("the list of widths is not empty")
    }

    /// Time of a GEMM as the libraries tile it: by the scales' blocks of 128 where sums are
    /// promoted block by block, else they choose.
    pub fn gemm_of_library(&self, shape: &GemmShape, kind: GemmKind) -> GemmTime {
        let promoted = self.gpu.fp8_promotion && kind.promotion_ops() > 0.0;
        if promoted { self.gemm(shape, kind) } else { self.gemm_best_block(shape, kind) }
    }

    /// Seconds of a GEMM by its tiles of 128 x `block_n` alone, no bandwidth or power limit: linear
    /// in the constants that calibration fits.
    pub(crate) fn gemm_unbounded(&self, shape: &GemmShape, kind: GemmKind, block_n: u64) -> f64 {
        let mut free = self.clone();
        free.gpu.fp8_achievable = f64::INFINITY;
        free.gpu.bf16_achievable = f64::INFINITY;
        free.gpu.fp4_achievable = f64::INFINITY;
        let t = free.gemm_with_block(shape, kind, block_n);
        self.constants.ramp_s + t.mma_s + t.promotion_s + t.epilogue_s
    }

    /// Time of a GEMM with tiles of 128 x `block_n`.
    pub fn gemm_with_block(&self, shape: &GemmShape, kind: GemmKind, block_n: u64) -> GemmTime {
        let c = &self.constants;
        let sms = self.sms as f64;
        let step = self.step(kind, block_n);
        let memory = self.stream_bytes_per_s();
        let tile_bytes = kind.output_bytes() * (BLOCK_M * block_n) as f64;
        let tile_s = c.tile_cycles / self.gpu.clock_hz + tile_bytes * sms / memory;
        let columns = shape.n.div_ceil(block_n);
        let (mut tiles, mut steps) = (0.0, 0.0);
        for (m, k) in shape.parts().filter(|&(m, k)| m > 0 && k > 0) {
            let t = (m.div_ceil(BLOCK_M) * columns) as f64;
            tiles += t;
            steps += t * k.div_ceil(BLOCK_K) as f64;
        }
        if tiles == 0.0 {
            return GemmTime {
                seconds: c.ramp_s,
                mma_s: 0.0,
                promotion_s: 0.0,
                epilogue_s: 0.0,
                block_n,
                waves: 0.0,
                memory_bound: false,
            };
        }
        // One launch: the last wave holds all SMs as long as a full one. Launches on two streams
        // fill each other's last waves.
        let waves = match shape.grouped_by {
            GroupedBy::K if !shape.groups.is_empty() => (tiles / sms).max(1.0),
            _ => (tiles / sms).ceil(),
        };
        let wave_steps = steps / tiles * waves;
        let (mma_s, promotion_s) = (wave_steps * step.mma_s, wave_steps * step.promotion_s);
        let epilogue_s = waves * tile_s;
        let busy = mma_s + promotion_s + epilogue_s;
        let bytes = (BLOCK_M + block_n) as f64 * BLOCK_K as f64 * kind.operand_bytes();
        // Clusters of two share one operand by multicast.
        let l2 = steps * 0.75 * bytes / self.gpu.l2_bytes_per_s;
        let bound = (shape.bytes(kind) / memory).max(l2);
        GemmTime {
            seconds: c.ramp_s + self.slowdown() * busy.max(bound),
            mma_s: self.slowdown() * mma_s,
            promotion_s: self.slowdown() * promotion_s,
            epilogue_s: self.slowdown() * epilogue_s,
            block_n,
            waves,
            memory_bound: bound > busy,
        }
    }

    /// Seconds of an SM for a tile's step of 128 in K.
    fn step(&self, kind: GemmKind, block_n: u64) -> Step {
        let c = &self.constants;
        let bf16 = (self.gpu.bf16_flops, self.gpu.bf16_achievable);
        let (peak, achievable) = match kind {
            GemmKind::Bf16 | GemmKind::Bf16Accumulate => bf16,
            GemmKind::Fp4 | GemmKind::Fp4Accumulate if self.gpu.fp4_flops > 0.0 => {
                (self.gpu.fp4_flops, self.gpu.fp4_achievable)
            }
            _ if self.gpu.fp8_flops > 0.0 => (self.gpu.fp8_flops, self.gpu.fp8_achievable),
            _ => bf16,
        };
        let flops = 2.0 * (BLOCK_M * block_n * BLOCK_K) as f64;
        let ideal_s = flops / (peak / self.gpu.sms as f64);
        let promoted = self.gpu.fp8_promotion && !self.no_promotion;
        let ops = if promoted { kind.promotion_ops() } else { 0.0 };
        let lanes = 128.0;
        let cycles = c.promotion_cycles * ops * (BLOCK_M * block_n) as f64 / lanes;
        let promotion_s = cycles / self.gpu.clock_hz;
        // The power limit bounds the mean rate; with promotion in between the tensor cores rest
        // enough.
        let mma_s = (ideal_s / c.mma_efficiency).max(ideal_s / achievable - promotion_s);
        Step { mma_s, promotion_s }
    }
}

/// DeepGEMM as published in March 2025, the version that its table of rates was measured with
/// (github.com/deepseek-ai/DeepGEMM, `jit_kernels/gemm.py` and `fp8_gemm.cuh` of 25 March 2025).
pub mod deep_gemm {
    /// SMs that the kernel may leave idle where fewer hold all waves.
    pub const SPARE_SMS: u64 = 8;
    /// Bytes that shared memory takes or gives per cycle.
    pub const SHARED_BYTES_PER_CYCLE: f64 = 128.0;

    /// Tile widths: 16 to 128 by 8, and two wider ones.
    pub fn widths() -> impl Iterator<Item = u64> {
        (16..=128).step_by(8).chain([144, 160])
    }

    /// How often the eight rows of 16 bytes of a matrix store fall on the same banks, for rows of
    /// `block_n` BF16 elements.
    pub fn bank_conflicts(block_n: u64) -> f64 {
        let mut slots: Vec<u64> = (0..8).map(|row| row * 2 * block_n / 16 % 8).collect();
        slots.sort_unstable();
        slots.dedup();
        8.0 / slots.len() as f64
    }

    /// Whether the place where the weight's scale changes inside a tile is known at compile time:
    /// it has few positions.
    pub fn scales_are_constant(block_n: u64) -> bool {
        let (mut a, mut b) = (128, block_n);
        while b > 0 {
            (a, b) = (b, a % b);
        }
        128 / a <= 4
    }
}

impl KernelModel {
    /// Time of an FP8 GEMM (1x128 and 128x128 scales) by DeepGEMM: the tile width with the fewest
    /// waves, then the fullest last wave; two groups of warps take turns, so that one promotes
    /// while the other multiplies and the power limit remains; the output goes through shared
    /// memory and is waited for.
    pub fn deep_gemm(&self, shape: &GemmShape) -> GemmTime {
        let kind = GemmKind::Fp8OneTwo;
        let rows: u64 = shape.parts().map(|(m, _)| m.div_ceil(BLOCK_M)).sum();
        let tiles = |block_n: u64| rows * shape.n.div_ceil(block_n);
        let key = |&block_n: &u64| {
            let tiles = tiles(block_n);
            let last = if tiles == 0 { 0 } else { (tiles - 1) % self.sms + 1 };
            (tiles.div_ceil(self.sms), self.sms - last, block_n)
        };
        let block_n = deep_gemm::widths().min_by_key(key).expect("the list is not empty");
        let waves = tiles(block_n).div_ceil(self.sms);
        let needed = tiles(block_n).div_ceil(waves.max(1));
        let sms = needed.max(self.sms.saturating_sub(deep_gemm::SPARE_SMS));
        let narrow = KernelModel { sms: sms.next_multiple_of(2).min(self.sms), ..self.clone() };
        narrow.deep_gemm_tiles(shape, kind, block_n, waves as f64)
    }

    fn deep_gemm_tiles(
        &self,
        shape: &GemmShape,
        kind: GemmKind,
        block_n: u64,
        waves: f64,
    ) -> GemmTime {
        let (c, clock) = (&self.constants, self.gpu.clock_hz);
        let elements = (BLOCK_M * block_n) as f64;
        let ideal_s = 2.0 * elements * BLOCK_K as f64 / (self.gpu.fp8_flops / self.gpu.sms as f64);
        let power_s = ideal_s / self.gpu.fp8_achievable;
        let mut mma_s = ideal_s / c.mma_efficiency;
        let mut promotion_s = 0.0;
        if !deep_gemm::scales_are_constant(block_n) && !self.no_promotion {
            // The scale is selected for every element at run time: another issue slot each, and no
            // room left under the other group's products.
            promotion_s = (c.promotion_cycles + 1.0) * elements / 128.0 / clock;
        }
        mma_s = mma_s.max(power_s - promotion_s);
        let out = kind.output_bytes() * elements;
        let shared = out / deep_gemm::SHARED_BYTES_PER_CYCLE * deep_gemm::bank_conflicts(block_n);
        let drain_s = out * self.sms as f64 / self.gpu.l2_bytes_per_s;
        let tile_s = (c.tile_cycles + shared) / clock + drain_s;
        let steps = waves * shape.k.div_ceil(BLOCK_K) as f64;
        let busy = steps * (mma_s + promotion_s) + waves * tile_s;
        let bound = shape.bytes(kind) / self.stream_bytes_per_s();
        let slow = self.slowdown();
        GemmTime {
            seconds: c.ramp_s + slow * busy.max(bound),
            mma_s: slow * steps * mma_s,
            promotion_s: slow * steps * promotion_s,
            epilogue_s: slow * waves * tile_s,
            block_n,
            waves,
            memory_bound: bound > busy,
        }
    }
}

struct Step {
    mma_s: f64,
    promotion_s: f64,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::WhatIf;
    use crate::kernel_time::Constants;
    use fathom_config::Gpu;

    /// The configurations that the published rule gives for its table's shapes on 132 SMs, worked
    /// out by hand: waves first, then the fullest last wave.
    #[test]
    fn deep_gemm_picks_its_tiles_by_waves() {
        let gpu = Gpu::preset("h800").unwrap();
        let model = KernelModel::alone(&gpu, Constants::FITTED, &WhatIf::default());
        for (n, k, block_n, waves) in [
            (2112, 7168, 144, 4.0),
            (24576, 1536, 160, 38.0),
            (32768, 512, 160, 50.0),
            (7168, 16384, 160, 11.0),
            (4096, 7168, 160, 7.0),
        ] {
            let t = model.deep_gemm(&GemmShape::new(4096, n, k));
            assert_eq!((t.block_n, t.waves), (block_n, waves), "{n}x{k}");
        }
    }

    #[test]
    fn bank_conflicts_follow_the_row_width() {
        assert_eq!(deep_gemm::bank_conflicts(128), 8.0);
        assert_eq!(deep_gemm::bank_conflicts(160), 4.0);
        assert_eq!(deep_gemm::bank_conflicts(144), 2.0);
        assert_eq!(deep_gemm::bank_conflicts(88), 1.0);
        assert!(deep_gemm::scales_are_constant(160) && !deep_gemm::scales_are_constant(144));
    }
}
