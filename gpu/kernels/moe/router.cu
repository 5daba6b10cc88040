// The router and its gradient, to the bit the ops router and router_backward of the reference
// (reference/src/ops/router.rs): affinities, group-limited top-k with a selection bias, gate values.
//
// CONSTANTS
//   SOFTMAX    1: affinities are a softmax over the experts, 0: sigmoids
//   NORMALIZE  1: gate values are divided by their sum
// LAUNCH
//   a CTA of 32 threads a token. router takes 8 bytes an expert and a group of dynamic shared memory.
// NOTES
// - The two halves of the warp hold the same 16 lanes of the reference's tree over the experts.
// - An index that names no expert ends the grid (trap); the reference refuses it.
#include "common/lanes.cuh"
#include "moe/top.cuh"

constexpr u32 LANES = 32;

// The sum over the chosen in order of choice, and what is added so that it is not zero.
FATHOM_DEVICE float gate_sum(const float* scores, const int* chosen, u32 top_k) {
    if (!NORMALIZE) return 1.0f;
    float sum = 0.0f;
    for (u32 j = 0; j < top_k; j++) sum = __fadd_rn(sum, scores[chosen[j]]);
    return __fadd_rn(sum, 1e-20f);
}

// The affinities of a token's logits.
FATHOM_DEVICE void affinities(const float* logits, float* scores, u32 experts) {
    const u32 lane = threadIdx.x;
#if SOFTMAX
    float m = __uint_as_float(0xFF800000u);
    for (u32 e = lane; e < experts; e += LANES) m = fmaxf(m, logits[e]);
    m = fathom_warp_max(m);
    for (u32 e = lane; e < experts; e += LANES) scores[e] = fathom_exp(__fsub_rn(logits[e], m));
    __syncwarp();
    float sum = row_sum(experts, [&](u32 e) { return scores[e]; });
    __syncwarp();
    for (u32 e = lane; e < experts; e += LANES) store(scores + e, __fdiv_rn(scores[e], sum));
#else
    for (u32 e = lane; e < experts; e += LANES) scores[e] = fathom_sigmoid(logits[e]);
#endif
    __syncwarp();
}

extern "C" __global__ void __launch_bounds__(LANES)
    router(const float* __restrict__ logits, const float* __restrict__ bias, float* scores, int* indices,
           float* __restrict__ weights, u32 experts, u32 top_k, u32 groups, u32 kept_groups, u32 group_top,
           float scale) {
    extern __shared__ u32 shared[];
    u32* order = shared;
    float* biased = (float*)(shared + experts);
    u32* group_order = shared + 2 * experts;
    u32* kept = group_order + groups;
    const u32 lane = threadIdx.x;
    logits += (u64)blockIdx.x * experts;
    scores += (u64)blockIdx.x * experts;
    indices += (u64)blockIdx.x * top_k;
    weights += (u64)blockIdx.x * top_k;
    affinities(logits, scores, experts);
    for (u32 e = lane; e < experts; e += LANES) {
        biased[e] = bias == nullptr ? scores[e] : __fadd_rn(scores[e], bias[e]);
        order[e] = order_of(biased[e]);
    }
    __syncwarp();
    if (groups > 1) {
        const u32 width = experts / groups;
        for (u32 g = 0; g < groups; g++) {
            float sum = 0.0f;
            for (u32 j = 0; j < group_top; j++) {
                u32 best = take_best(order + g * width, width);
                sum = __fadd_rn(sum, biased[g * width + best]);
            }
            if (lane == 0) {
                group_order[g] = order_of(sum);
                kept[g] = 0;
            }
        }
        __syncwarp();
        for (u32 j = 0; j < kept_groups; j++) {
            u32 g = take_best(group_order, groups);
            if (lane == 0) kept[g] = 1;
        }
        __syncwarp();
        // Experts of the other groups count as -inf.
        for (u32 e = lane; e < experts; e += LANES) {
            order[e] = order_of(kept[e / width] ? biased[e] : __uint_as_float(0xFF800000u));
        }
        __syncwarp();
    }
    for (u32 j = 0; j < top_k; j++) {
        u32 best = take_best(order, experts);
        if (lane == 0) indices[j] = (int)best;
    }
    __syncwarp();
    float sum = gate_sum(scores, indices, top_k);
    for (u32 j = lane; j < top_k; j += LANES) {
        store(weights + j, __fmul_rn(__fdiv_rn(scores[indices[j]], sum), scale));
    }
}

// dscores may be null.
extern "C" __global__ void __launch_bounds__(LANES)
    router_backward(const float* __restrict__ dweights, const float* __restrict__ scores,
                    const int* __restrict__ indices, const float* __restrict__ dscores, float* dlogits,
                    u32 experts, u32 top_k, float scale) {
    const u32 lane = threadIdx.x;
    dweights += (u64)blockIdx.x * top_k;
    indices += (u64)blockIdx.x * top_k;
    scores += (u64)blockIdx.x * experts;
    float* ds = dlogits + (u64)blockIdx.x * experts;
    for (u32 e = lane; e < experts; e += LANES) {
        ds[e] = dscores == nullptr ? 0.0f : dscores[(u64)blockIdx.x * experts + e];
    }
    for (u32 j = lane; j < top_k; j += LANES) {
        if ((u32)indices[j] >= experts) __trap();
    }
    __syncwarp();
    if (lane == 0) {
        float sum = gate_sum(scores, indices, top_k);
        float inner = 0.0f;
        for (u32 j = 0; NORMALIZE && j < top_k; j++) {
            inner = __fadd_rn(inner, __fmul_rn(dweights[j], __fdiv_rn(scores[indices[j]], sum)));
        }
        for (u32 j = 0; j < top_k; j++) {
            float d = __fdiv_rn(__fsub_rn(dweights[j], inner), sum);
            ds[indices[j]] = __fadd_rn(ds[indices[j]], __fmul_rn(scale, d));
        }
    }
    __syncwarp();
#if SOFTMAX
    float dot = row_sum(experts, [&](u32 e) { return __fmul_rn(ds[e], scores[e]); });
    __syncwarp();
    for (u32 e = lane; e < experts; e += LANES) store(ds + e, __fmul_rn(scores[e], __fsub_rn(ds[e], dot)));
#else
    for (u32 e = lane; e < experts; e += LANES) {
        store(ds + e, __fmul_rn(ds[e], __fmul_rn(scores[e], __fsub_rn(1.0f, scores[e]))));
    }
#endif
}
