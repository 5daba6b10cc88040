// Rotary position embedding of the last columns of every head, in place, to the bit the op rope of the reference.
//
// CONSTANTS
//   X_BF16       1: x is bf16, 0: f32
//   INTERLEAVED  1: pairs are neighbours, 0: half a rotation width apart
//   INVERSE      1: rotate back
// LAUNCH
//   `parts` CTAs a token, which share out its heads' units: every column that is not rotated, every pair, and a
//   last column without a partner, `units` a head.
// NOTES
// - A CTA has one token, so that its angles are fetched once a CTA, not once for every 256 threads.
#include "attention/rotate.cuh"

using X = Float<X_BF16>;

extern "C" __global__ void rope(X* x, const float* __restrict__ cos, const float* __restrict__ sin,
                                const int* __restrict__ positions, u32 parts, u32 heads, u32 head_dim,
                                u32 start, u32 half, u32 units, u32 length) {
    const u64 token = blockIdx.x / parts;
    const u64 row = table_row(positions, token, length);
    x += token * heads * head_dim;
    for (u32 at = blockIdx.x % parts * blockDim.x + threadIdx.x; at < heads * units; at += parts * blockDim.x) {
        const u32 unit = at % units;
        X* head = x + (u64)(at / units) * head_dim;
        if (unit < start || unit >= start + half) {
            X* column = head + (unit < start ? unit : head_dim - 1);
            store(column, load(column));
            continue;
        }
        u32 pair = unit - start;
        X* x0 = head + start + first_of_pair(pair);
        X* x1 = head + start + second_of_pair(pair, half);
        float s = sin[row * half + pair];
        float y0, y1;
        rotate_pair(load(x0), load(x1), cos[row * half + pair], INVERSE ? -s : s, &y0, &y1);
        store(x0, y0);
        store(x1, y1);
    }
}
