// SwiGLU of x[rows, 2 i] and its gradient with the casts around them, to the bit the ops swiglu_quantize and
// swiglu_backward_quantize of the reference (reference/src/ops/swiglu_quantize.rs): x's values, where it is
// kept as codes; what norm/swiglu.cu computes; the cast of that with a scale for every 1 x TILE.
//
// CONSTANTS
//   KIND                 as in quant/kept.cuh; the values of codes are rounded to V_BF16's type
//   V_BF16, Y_BF16, DY_BF16  1: values of codes, y (or dx), dy are bf16, 0: f32
//   TILE, FORMAT, SCALE  as in quant/tile.cuh
// LAUNCH
//   swiglu_quantize: any grid of 128 threads; a warp takes a tile at a time and strides over the tiles.
//   swiglu_backward_quantize: two rows a CTA, whole warps, at most 256 threads. Dynamic shared memory: two rows
//   of dx and, where there are weights, as many floats as dy has in them.
// NOTES
// - In the backward a row of dx lies in shared memory when its tiles are cast, which may reach from the gate's
//   part into up's; so do the terms of dweight, which half a warp adds up in the order of common/lanes.cuh.
#include "common/lanes.cuh"
#include "quant/kept.cuh"
#include "quant/tile.cuh"

using V = Float<V_BF16>;
using Y = Float<Y_BF16>;
using DY = Float<DY_BF16>;

// The value of x that SwiGLU reads.
FATHOM_DEVICE float value_at(const Kept& x, u64 row, u32 column) {
    float value = kept_at(x, row, column);
#if KIND >= 2
    V rounded;
    store(&rounded, value);
    value = load(&rounded);
#endif
    return value;
}

extern "C" __global__ void __launch_bounds__(128)
    swiglu_quantize(const void* __restrict__ codes, const float* __restrict__ scales, u32 x_columns,
                    u32 block_rows, u32 block_columns, const float* __restrict__ weight, u8* __restrict__ q,
                    float* __restrict__ scale, u32 rows, u32 columns, float amax_floor) {
    const Kept x = {codes, scales, x_columns, block_rows, block_columns};
    const u32 tiles = ceil_div(columns, (u32)TILE);
    const u64 total = (u64)rows * tiles;
    const u64 warps = (u64)gridDim.x * (blockDim.x / LANES);
    u64 at = (u64)blockIdx.x * (blockDim.x / LANES) + threadIdx.x / LANES;
    for (; at < total; at += warps) {
        u64 row = at / tiles;
        u32 begin = (u32)(at % tiles) * TILE;
        u32 width = columns - begin < TILE ? columns - begin : TILE;
        float w = weight == nullptr ? 1.0f : weight[row];
        cast_tile(width, amax_floor, q + row * code_bytes(columns) + code_bytes(begin), scale + at, [&](u32 i) {
            float gate = value_at(x, row, begin + i);
            float up = value_at(x, row, columns + begin + i);
            Y y;
            store(&y, __fmul_rn(__fmul_rn(__fmul_rn(gate, fathom_sigmoid(gate)), up), w));
            return load(&y);
        });
    }
}

extern "C" __global__ void __launch_bounds__(256)
    swiglu_backward_quantize(const DY* __restrict__ dy, const void* __restrict__ codes,
                             const float* __restrict__ scales, u32 x_columns, u32 block_rows, u32 block_columns,
                             const float* __restrict__ weight, Y* __restrict__ dx, u8* __restrict__ q,
                             float* __restrict__ scale, float* __restrict__ dweight, u32 rows, u32 columns,
                             float amax_floor) {
    constexpr u32 ROWS = 2;
    extern __shared__ float terms[];
    const Kept x = {codes, scales, x_columns, block_rows, block_columns};
    Y* kept = (Y*)(terms + (weight == nullptr ? 0 : ROWS * columns));
    const u64 first = (u64)blockIdx.x * ROWS;
    const u32 here = rows - first < ROWS ? (u32)(rows - first) : ROWS;
    for (u32 at = threadIdx.x; at < here * columns; at += blockDim.x) {
        const u32 own = at / columns, i = at % columns;
        const u64 row = first + own;
        float g = value_at(x, row, i), u = value_at(x, row, columns + i), d = load(dy + row * columns + i);
        float z = fathom_sigmoid(g);
        float scaled = weight == nullptr ? d : __fmul_rn(d, weight[row]);
        float gz = __fmul_rn(g, z);
        float slope = __fadd_rn(1.0f, __fmul_rn(g, __fsub_rn(1.0f, z)));
        Y* to = kept + own * 2 * columns + i;
        store(to, __fmul_rn(__fmul_rn(scaled, u), __fmul_rn(z, slope)));
        store(to + columns, __fmul_rn(scaled, gz));
        if (weight != nullptr) terms[at] = __fmul_rn(d, __fmul_rn(gz, u));
    }
    __syncthreads();
    if (weight != nullptr && threadIdx.x < ROWS * ROW_LANES) {
        const u32 own = threadIdx.x / ROW_LANES;
        float sum = row_sum(own < here ? columns : 0, [&](u32 i) { return terms[own * columns + i]; });
        if (own < here && half_warp_lane() == 0) store(dweight + first + own, sum);
    }
    const u32 width = 2 * columns;
    const u32 tiles = ceil_div(width, (u32)TILE);
    for (u32 at = threadIdx.x / LANES; at < here * tiles; at += blockDim.x / LANES) {
        const u32 own = at / tiles;
        const u64 row = first + own;
        const u32 begin = at % tiles * TILE;
        const u32 n = width - begin < TILE ? width - begin : TILE;
        const Y* from = kept + own * width + begin;
        Y* to = dx + row * width + begin;
        cast_tile(n, amax_floor, q + row * code_bytes(width) + code_bytes(begin), scale + row * tiles + at % tiles,
                  [&](u32 i) {
                      to[i] = from[i];
                      return load(from + i);
                  });
    }
}
