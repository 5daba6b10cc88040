// Keys and values of multi-head latent attention from the up-projected latent and the shared key, and the
// gradient, to the bit the ops mla_kv and mla_kv_backward of the reference (reference/src/ops/mla_kv.rs).
//
//   mla_kv           k = each head's own columns, then the shared key, rotated; v = each head's value
//   mla_kv_backward  dkv = the same columns back; dshared = sum over heads, ascending, rotated back
//
// CONSTANTS
//   X_BF16       1: all tensors are bf16, 0: f32
//   INTERLEAVED  1: rotated pairs are neighbours
// LAUNCH
//   mla_kv, mla_kv_backward: a thread an element of kv. shared_key: `parts` CTAs a token, which share out the
//   rotated columns of its heads' keys. shared_gradient: a thread for every pair of dshared, and a last column
//   without a partner.
// NOTES
// - A CTA of shared_key has one token, so that its key and its angles are fetched once a CTA.
#include "attention/rotate.cuh"

using X = Float<X_BF16>;

// A head's columns of kv to k and v.
extern "C" __global__ void mla_kv(const X* __restrict__ kv, X* __restrict__ k, X* __restrict__ v, u64 n,
                                  u32 nope, u32 rope, u32 v_dim) {
    u64 at = thread_index();
    if (at >= n) return;
    u32 column = (u32)(at % (nope + v_dim));
    u64 head = at / (nope + v_dim);
    X* to = column < nope ? k + head * (nope + rope) + column : v + head * v_dim + (column - nope);
    store(to, load(kv + at));
}

// The rotated shared key behind every head's own columns.
extern "C" __global__ void shared_key(const X* __restrict__ latent, const float* __restrict__ cos,
                                      const float* __restrict__ sin, const int* __restrict__ positions,
                                      X* __restrict__ k, u32 parts, u32 heads, u32 nope, u32 rope, u32 offset,
                                      u32 wide, u32 length) {
    const u64 token = blockIdx.x / parts;
    const u32 half = rope / 2;
    const u64 row = table_row(positions, token, length);
    const X* x = latent + token * wide + offset;
    k += token * heads * (nope + rope);
    for (u32 at = blockIdx.x % parts * blockDim.x + threadIdx.x; at < heads * rope; at += parts * blockDim.x) {
        const u32 column = at % rope;
        float y = load(x + column);
        if (column < 2 * half) {
            u32 pair = INTERLEAVED ? column / 2 : column % half;
            float c = cos[row * half + pair], s = sin[row * half + pair];
            float y0, y1;
            u32 first = first_of_pair(pair);
            rotate_pair(load(x + first), load(x + second_of_pair(pair, half)), c, s, &y0, &y1);
            y = column == first ? y0 : y1;
        }
        store(k + (u64)(at / rope) * (nope + rope) + nope + column, y);
    }
}

// Gradients of k and v to a head's columns of dkv.
extern "C" __global__ void mla_kv_backward(const X* __restrict__ dk, const X* __restrict__ dv,
                                           X* __restrict__ dkv, u64 n, u32 nope, u32 rope, u32 v_dim) {
    u64 at = thread_index();
    if (at >= n) return;
    u32 column = (u32)(at % (nope + v_dim));
    u64 head = at / (nope + v_dim);
    const X* from = column < nope ? dk + head * (nope + rope) + column : dv + head * v_dim + (column - nope);
    store(dkv + at, load(from));
}

extern "C" __global__ void shared_gradient(const X* __restrict__ dk, const float* __restrict__ cos,
                                           const float* __restrict__ sin, const int* __restrict__ positions,
                                           X* __restrict__ dshared, u64 n, u32 heads, u32 nope, u32 rope,
                                           u32 length) {
    u64 at = thread_index();
    if (at >= n) return;
    const u32 half = rope / 2;
    const u32 units = half + rope % 2;
    u32 pair = (u32)(at % units);
    u64 token = at / units;
    u32 row = table_row(positions, token, length);
    auto sum_over_heads = [&](u32 column) {
        float sum = 0.0f;
        for (u32 head = 0; head < heads; head++) {
            sum = __fadd_rn(sum, load(dk + (token * heads + head) * (nope + rope) + nope + column));
        }
        return sum;
    };
    X* out = dshared + token * rope;
    if (pair == half) {
        store(out + rope - 1, sum_over_heads(rope - 1));
        return;
    }
    u32 first = first_of_pair(pair), second = second_of_pair(pair, half);
    float y0, y1;
    float c = cos[(u64)row * half + pair], s = sin[(u64)row * half + pair];
    rotate_pair(sum_over_heads(first), sum_over_heads(second), c, -s, &y0, &y1);
    store(out + first, y0);
    store(out + second, y1);
}
