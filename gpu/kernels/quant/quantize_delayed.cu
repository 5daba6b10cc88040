// The cast of delayed per-tensor scaling, to the bit the op quantize_delayed of the reference
// (fathom_numerics::quant::delayed).
//
//   cast_delayed   q = x * scale, to nearest even, saturating; the largest |x| of each CTA, NaNs left out
//   next_scale     amax of all CTAs enters the history in front, the oldest leaves, and the scale of the next
//                  step follows: (max / a) / 2^margin with a the history's largest or newest; as it is where a
//                  is zero or not finite, the largest finite f32 where it would be infinite
//
// CONSTANTS
//   X_BF16  1: x is bf16, 0: f32
//   FORMAT  as in quant/cast.cuh
//   NEWEST  1: the newest amax counts, 0: the history's largest
// LAUNCH
//   cast_delayed: any grid of 256 threads. next_scale: one CTA of 32 threads.
#include "common/reduce.cuh"
#define SCALE 0
#include "quant/cast.cuh"

constexpr u32 THREADS = 256;

using X = Float<X_BF16>;

extern "C" __global__ void __launch_bounds__(THREADS)
    cast_delayed(const X* __restrict__ x, const float* __restrict__ scale, u8* __restrict__ q,
                 float* __restrict__ maxima, u64 n) {
    __shared__ float warps[THREADS / 32];
    const float factor = *scale;
    float amax = 0.0f;
    for (u64 i = thread_index(); i < n; i += (u64)gridDim.x * THREADS) {
        float value = load(x + i);
        amax = fmaxf(amax, fabsf(value));
        q[i] = to_fp8(__fmul_rn(value, factor));
    }
    amax = fathom_warp_max(amax);
    if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = amax;
    __syncthreads();
    if (threadIdx.x != 0) return;
    for (u32 warp = 0; warp < THREADS / 32; warp++) amax = fmaxf(amax, warps[warp]);
    maxima[blockIdx.x] = amax;
}

// power is 2^margin.
extern "C" __global__ void __launch_bounds__(32)
    next_scale(const float* __restrict__ maxima, const float* __restrict__ history,
               const float* __restrict__ scale, float* __restrict__ new_history,
               float* __restrict__ new_scale, float* __restrict__ scale_inv, u32 ctas, u32 steps,
               float power) {
    const u32 lane = threadIdx.x;
    float amax = 0.0f;
    for (u32 i = lane; i < ctas; i += 32) amax = fmaxf(amax, maxima[i]);
    amax = fathom_warp_max(amax);
    float largest = amax;
    for (u32 i = lane; i + 1 < steps; i += 32) {
        new_history[i + 1] = history[i];
        largest = fmaxf(largest, history[i]);
    }
    largest = fathom_warp_max(largest);
    if (lane != 0) return;
    new_history[0] = amax;
    float a = NEWEST ? amax : largest;
    float next = __fdiv_rn(__fdiv_rn(FORMAT_MAX, a), power);
    if (next > __uint_as_float(0x7F7FFFFFu)) next = __uint_as_float(0x7F7FFFFFu);
    bool usable = a > 0.0f && a <= __uint_as_float(0x7F7FFFFFu);
    *new_scale = usable ? next : *scale;
    *scale_inv = __fdiv_rn(1.0f, *scale);
}
