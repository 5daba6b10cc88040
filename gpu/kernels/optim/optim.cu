// The optimizer, to the bit the ops adamw, ema, sum_of_squares and clip_factor of the reference (reference/src/ops):
// every operation rounded by itself, no fma but in the chains of the squares.
//
//   adamw           g = grad * factor; m' = beta1 m + (1 - beta1) g; v' = beta2 v + (1 - beta2) (g g);
//                   w' = decay w - step_size (m' / (sqrt(v') / correction + eps))
//   ema             e' = e + rate (w - e)
//   block_squares   the squares of 65,536 elements over 256 lanes of 4, chains of fma, then trees
//   tree            sum of n numbers by the halving tree of fathom_numerics::reduce, to one number
//   factor          norm = sqrt(sum); factor = min(1, max_norm / (norm + 1e-6))
//
// CONSTANTS
//   M_BF16, V_BF16  adamw: 1: that moment is bf16, 0: f32
// LAUNCH
//   adamw, ema: a thread an element. block_squares: a CTA of 256 threads a block. tree: one CTA of 1024
//   threads, which overwrites the numbers. factor: one thread.
#include "common/float.cuh"
#include "common/reduce.cuh"

using M = Float<M_BF16>;
using V = Float<V_BF16>;

extern "C" __global__ void adamw(float* w, M* m, V* v, const float* __restrict__ grad,
                                 const float* __restrict__ factor, u64 n, float beta1, float new1, float beta2,
                                 float new2, float eps, float decay, float step_size, float correction) {
    u64 i = thread_index();
    if (i >= n) return;
    float g = __fmul_rn(grad[i], *factor);
    float m1 = __fadd_rn(__fmul_rn(beta1, load(m + i)), __fmul_rn(new1, g));
    float v1 = __fadd_rn(__fmul_rn(beta2, load(v + i)), __fmul_rn(new2, __fmul_rn(g, g)));
    float root = __fadd_rn(__fdiv_rn(__fsqrt_rn(v1), correction), eps);
    float w1 = __fsub_rn(__fmul_rn(decay, w[i]), __fmul_rn(step_size, __fdiv_rn(m1, root)));
    store(w + i, w1);
    store(m + i, m1);
    store(v + i, v1);
}

extern "C" __global__ void ema(float* e, const float* __restrict__ w, u64 n, float rate) {
    u64 i = thread_index();
    if (i >= n) return;
    float old = e[i];
    store(e + i, __fadd_rn(old, __fmul_rn(rate, __fsub_rn(w[i], old))));
}

extern "C" __global__ void __launch_bounds__(256)
    block_squares(const float* __restrict__ x, float* __restrict__ sums, u64 n) {
    constexpr u64 BLOCK = 65536;
    constexpr u32 VECTOR = 4;
    __shared__ float scratch[8];
    const u64 begin = blockIdx.x * BLOCK;
    const u64 end = begin + BLOCK < n ? begin + BLOCK : n;
    float sum = 0.0f;
    for (u64 start = begin + threadIdx.x * VECTOR; start < end; start += 256 * VECTOR) {
#pragma unroll
        for (u64 i = start; i < start + VECTOR; i++) {
            if (i < end) sum = __fmaf_rn(x[i], x[i], sum);
        }
    }
    sum = fathom_cta_sum<256>(sum, scratch);
    if (threadIdx.x == 0) sums[blockIdx.x] = sum;
}

// The sum of nothing is +0.
extern "C" __global__ void __launch_bounds__(1024) tree(float* values, float* sum, u32 n) {
    u32 width = 1;
    while (width < n) width *= 2;
    while (width > 1) {
        width /= 2;
        for (u32 i = threadIdx.x; i < width; i += blockDim.x) {
            float other = i + width < n ? values[i + width] : 0.0f;
            float own = i < n ? values[i] : 0.0f;
            values[i] = __fadd_rn(own, other);
        }
        n = n < width ? n : width;
        __syncthreads();
    }
    if (threadIdx.x == 0) store(sum, n == 0 ? 0.0f : values[0]);
}

extern "C" __global__ void factor(const float* __restrict__ sum, float* __restrict__ norm,
                                  float* __restrict__ result, float max_norm, u32 clips) {
    float root = __fsqrt_rn(*sum);
    store(norm, root);
    float f = __fdiv_rn(max_norm, __fadd_rn(root, 1e-6f));
    if (f > 1.0f) f = 1.0f;
    store(result, clips ? f : root != root ? root : 1.0f);
}
