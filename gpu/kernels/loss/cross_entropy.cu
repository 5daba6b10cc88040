// Cross-entropy over rows of logits, to the bit the ops cross_entropy and cross_entropy_backward of the reference
// (reference/src/ops/cross_entropy.rs). The logits of 128 rows are there at a time, made by the GEMM.
//
//   row_losses   m = max z; lse = m + ln(sum exp(z - m)); loss = lse - z_target, 0 without a target
//   row_slopes   dz = (exp(z - lse) - [target]) * scale, 0 in a row without a target
//
// CONSTANTS
//   DZ_BF16  row_slopes: 1: dz is bf16, 0: f32
// LAUNCH
//   row_losses: half a warp a row, 256 threads. row_slopes: a thread an element.
// NOTES
// - A target beyond the vocabulary ends the grid (trap); the reference refuses it.
#include "common/float.cuh"
#include "common/lanes.cuh"

extern "C" __global__ void __launch_bounds__(256)
    row_losses(const float* __restrict__ z, const int* __restrict__ targets, float* __restrict__ loss,
               float* __restrict__ lse, u32 rows, u32 vocab) {
    const u64 row = half_warp_row();
    const u32 n = row < rows ? vocab : 0;
    z += row * vocab;
    float m = __uint_as_float(0xFF800000u);
    for (u32 i = half_warp_lane(); i < n; i += ROW_LANES) m = fmaxf(m, z[i]);
    m = lanes_max(m);
    float sum = row_sum(n, [&](u32 i) { return fathom_exp(__fsub_rn(z[i], m)); });
    if (row >= rows || half_warp_lane() != 0) return;
    float total = __fadd_rn(m, fathom_log(sum));
    int target = targets[row];
    if (target >= (int)vocab) __trap();
    store(lse + row, total);
    store(loss + row, target < 0 ? 0.0f : __fsub_rn(total, z[target]));
}

using DZ = Float<DZ_BF16>;

extern "C" __global__ void row_slopes(const float* __restrict__ z, const int* __restrict__ targets,
                                      const float* __restrict__ lse, DZ* __restrict__ dz, u64 n, u32 vocab,
                                      float scale) {
    u64 at = thread_index();
    if (at >= n) return;
    u64 row = at / vocab;
    int target = targets[row];
    if (target >= (int)vocab) __trap();
    float p = fathom_exp(__fsub_rn(z[at], lse[row]));
    if ((u64)target == at % vocab) p = __fsub_rn(p, 1.0f);
    store(dz + at, target < 0 ? 0.0f : __fmul_rn(p, scale));
}
