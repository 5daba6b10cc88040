// The absorbed projections of multi-head latent attention for decoding, to the bit the ops mla_absorb_query and
// mla_absorb_value of the reference: chains of fma over ascending k from +0, rounded once.
//
// CONSTANTS
//   X_BF16  1: q, o and y are bf16, 0: f32
// LAUNCH
//   a thread an element of y.
#include "common/float.cuh"

using X = Float<X_BF16>;

// q[t, heads (nope + rope)], w[heads (nope + v), r] -> y[t, heads (r + rope)]: q_nope W_key beside the rotated
// columns.
extern "C" __global__ void mla_absorb_query(const X* __restrict__ q, const float* __restrict__ w,
                                            X* __restrict__ y, u64 n, u32 heads, u32 nope, u32 rope, u32 v,
                                            u32 r) {
    u64 at = thread_index();
    if (at >= n) return;
    u32 column = (u32)(at % (r + rope));
    u64 head = at / (r + rope);
    q += head * (nope + rope);
    if (column >= r) {
        store(y + at, load(q + nope + (column - r)));
        return;
    }
    w += head % heads * (nope + v) * r + column;
    float sum = 0.0f;
    for (u32 k = 0; k < nope; k++) sum = __fmaf_rn(load(q + k), w[(u64)k * r], sum);
    store(y + at, sum);
}

// o[t, heads r] -> y[t, heads v]: o W_value.
extern "C" __global__ void mla_absorb_value(const X* __restrict__ o, const float* __restrict__ w,
                                            X* __restrict__ y, u64 n, u32 heads, u32 nope, u32 v, u32 r) {
    u64 at = thread_index();
    if (at >= n) return;
    u64 head = at / v;
    o += head * r;
    w += (head % heads * (nope + v) + nope + at % v) * r;
    float sum = 0.0f;
    for (u32 k = 0; k < r; k++) sum = __fmaf_rn(load(o + k), w[k], sum);
    store(y + at, sum);
}
