// Rotary position embedding of the last columns of every head, in place, to the bit the op rope of the reference.
//
// CONSTANTS
//   X_BF16       1: x is bf16, 0: f32
//   INTERLEAVED  1: pairs are neighbours, 0: half a rotation width apart
//   INVERSE      1: rotate back
// LAUNCH
//   a thread for every column that is not rotated, every pair, and a last column without a partner, of every
//   head: `units` a head.
#include "attention/rotate.cuh"

using X = Float<X_BF16>;

extern "C" __global__ void rope(X* x, const float* __restrict__ cos, const float* __restrict__ sin,
                                const int* __restrict__ positions, u64 n, u32 heads, u32 head_dim, u32 start,
                                u32 half, u32 units, u32 length) {
    u64 at = thread_index();
    if (at >= n) return;
    u32 unit = (u32)(at % units);
    u64 head = at / units;
    u64 token = head / heads;
    x += head * head_dim;
    u32 row = table_row(positions, token, length);
    if (unit < start || unit >= start + half) {
        u32 column = unit < start ? unit : head_dim - 1;
        store(x + column, load(x + column));
        return;
    }
    u32 pair = unit - start;
    X* x0 = x + start + first_of_pair(pair);
    X* x1 = x + start + second_of_pair(pair, half);
    float s = sin[(u64)row * half + pair];
    float y0, y1;
    rotate_pair(load(x0), load(x1), cos[(u64)row * half + pair], INVERSE ? -s : s, &y0, &y1);
    store(x0, y0);
    store(x1, y1);
}
