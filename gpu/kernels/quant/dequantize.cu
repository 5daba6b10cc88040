// The values of codes, q * scale rounded to y's type, to the bit the op dequantize of the reference.
//
// CONSTANTS
//   KIND    as in quant/kept.cuh
//   Y_BF16  1: y is bf16, 0: f32
// LAUNCH
//   a thread an element.
#include "quant/kept.cuh"

using Y = Float<Y_BF16>;

extern "C" __global__ void dequantize(const void* __restrict__ q, const float* __restrict__ scale,
                                      Y* __restrict__ y, u64 n, u32 columns, u32 block_rows,
                                      u32 block_columns) {
    u64 i = thread_index();
    if (i >= n) return;
    Kept x = {q, scale, columns, block_rows, block_columns};
    store(y + i, kept_at(x, i / columns, (u32)(i % columns)));
}
