// A balance loss and its gradient, to the bit the op balance_loss of the reference (reference/src/ops/balance.rs).
// For every segment of T tokens: p = s / sum(s) of a token, P_i the mean of p_i, f_i from how many tokens chose
// expert i, loss = weight * sum(f_i P_i); f is a constant for the gradient.
//
//   own_choice   the top_k of each token's affinities
//   token_sums   sum(s) of each token
//   shares       of each segment and expert: how many chose it, and the sum of p over the tokens in order
//   fractions    f of each segment and expert, from the counts of its block of experts
//   losses       of each segment
//   gradients    of each token
//
// LAUNCH
//   own_choice: a CTA of 32 threads a token, 4 bytes an expert of dynamic shared memory. token_sums,
//   gradients: half a warp a token, 256 threads. shares, fractions: a thread a segment and expert. losses: half
//   a warp a segment.
// NOTES
// - bounds holds each segment's first token, and the end of the last; segment_of the segment of each token.
// - f and the count's share are computed in f64, as in the reference, and rounded once.
// - An index that names no expert ends the grid (trap); the reference refuses it.
#include "common/lanes.cuh"
#include "moe/top.cuh"

extern "C" __global__ void __launch_bounds__(32)
    own_choice(const float* __restrict__ scores, int* __restrict__ indices, u32 experts, u32 top_k) {
    extern __shared__ u32 order[];
    scores += (u64)blockIdx.x * experts;
    for (u32 e = threadIdx.x; e < experts; e += 32) order[e] = order_of(scores[e]);
    __syncwarp();
    for (u32 j = 0; j < top_k; j++) {
        // Fewer experts than choices: the rest chooses nobody.
        u32 best = j < experts ? take_best(order, experts) : experts;
        if (threadIdx.x == 0) indices[(u64)blockIdx.x * top_k + j] = (int)best;
    }
}

extern "C" __global__ void __launch_bounds__(256)
    token_sums(const float* __restrict__ scores, float* __restrict__ sums, u32 tokens, u32 experts) {
    const u64 token = half_warp_row();
    scores += token * experts;
    float sum = row_sum(token < tokens ? experts : 0, [&](u32 e) { return scores[e]; });
    if (token < tokens && half_warp_lane() == 0) sums[token] = sum;
}

// own: whether indices may name `experts`, which nobody owns.
extern "C" __global__ void shares(const float* __restrict__ scores, const float* __restrict__ sums,
                                  const int* __restrict__ indices, const int* __restrict__ bounds,
                                  int* __restrict__ counts, float* __restrict__ means, u32 segments,
                                  u32 experts, u32 top_k, u32 own) {
    u32 at = (u32)thread_index();
    if (at >= segments * experts) return;
    u32 segment = at / experts, expert = at % experts;
    int count = 0;
    float mean = 0.0f;
    for (u32 token = (u32)bounds[segment]; token < (u32)bounds[segment + 1]; token++) {
        for (u32 j = 0; j < top_k; j++) {
            u32 index = (u32)indices[(u64)token * top_k + j];
            if (!own && index >= experts) __trap();
            count += index == expert;
        }
        mean = __fadd_rn(mean, __fdiv_rn(scores[(u64)token * experts + expert], sums[token]));
    }
    counts[at] = count;
    means[at] = mean;
}

extern "C" __global__ void fractions(const int* __restrict__ counts, const int* __restrict__ bounds,
                                     float* __restrict__ f, u32 segments, u32 experts, u32 top_k, u32 share) {
    u32 at = (u32)thread_index();
    if (at >= segments * experts) return;
    u32 segment = at / experts;
    u32 block = at - at % share;
    int count = 0;
    for (u32 e = block; e < block + share; e++) count += counts[e];
    double tokens = (double)(bounds[segment + 1] - bounds[segment]);
    double of = __dmul_rn(__dmul_rn((double)top_k, tokens), (double)share);
    f[at] = __double2float_rn(__ddiv_rn(__dmul_rn((double)count, (double)experts), of));
}

extern "C" __global__ void __launch_bounds__(256)
    losses(const float* __restrict__ f, const float* __restrict__ means, const int* __restrict__ bounds,
           float* __restrict__ loss, u32 segments, u32 experts, float weight) {
    const u64 segment = half_warp_row();
    bool there = segment < segments;
    float tokens = there ? (float)(bounds[segment + 1] - bounds[segment]) : 1.0f;
    f += segment * experts;
    means += segment * experts;
    float sum = row_sum(there ? experts : 0, [&](u32 e) { return __fmul_rn(f[e], __fdiv_rn(means[e], tokens)); });
    if (there && half_warp_lane() == 0) store(loss + segment, __fmul_rn(weight, sum));
}

extern "C" __global__ void __launch_bounds__(256)
    gradients(const float* __restrict__ scores, const float* __restrict__ sums, const float* __restrict__ f,
              const int* __restrict__ bounds, const int* __restrict__ segment_of, float* __restrict__ dscores,
              u32 tokens, u32 experts, float weight) {
    const u64 token = half_warp_row();
    bool there = token < tokens;
    u32 segment = there ? (u32)segment_of[token] : 0;
    float length = there ? (float)(bounds[segment + 1] - bounds[segment]) : 1.0f;
    float sum = there ? sums[token] : 1.0f;
    scores += token * experts;
    f += (u64)segment * experts;
    const u32 n = there ? experts : 0;
    float dot = row_sum(n, [&](u32 e) { return __fmul_rn(f[e], __fdiv_rn(scores[e], sum)); });
    float per_token = __fdiv_rn(weight, length);
    for (u32 e = half_warp_lane(); e < n; e += ROW_LANES) {
        store(dscores + token * experts + e, __fmul_rn(per_token, __fdiv_rn(__fsub_rn(f[e], dot), sum)));
    }
}
