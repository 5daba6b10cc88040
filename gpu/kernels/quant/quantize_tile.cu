// Casts x[rows, k] to FP8 or E5M6 with a scale for every 1 x TILE, to the bit the op quantize_tile of the
// reference: quant/tile.cuh.
//
// CONSTANTS
//   X_BF16               1: x is bf16, 0: x is f32
//   TILE, FORMAT, SCALE  as in quant/tile.cuh
// LAUNCH
//   any grid of 128 threads; a warp casts one tile at a time and strides over the tiles.
#include "quant/tile.cuh"

using X = Float<X_BF16>;

// x[rows, k] -> codes q and scale[rows, ceil(k / TILE)].
extern "C" __global__ void __launch_bounds__(128)
    quantize_tile(const X* __restrict__ x, u8* __restrict__ q, float* __restrict__ scale, u32 rows, u32 k,
                  float amax_floor) {
    const u32 tiles = ceil_div(k, (u32)TILE);
    const u64 total = (u64)rows * tiles;
    const u64 warps = (u64)gridDim.x * (blockDim.x / LANES);
    u64 at = (u64)blockIdx.x * (blockDim.x / LANES) + threadIdx.x / LANES;
    for (; at < total; at += warps) {
        u64 row = at / tiles;
        u32 column = (u32)(at % tiles) * TILE;
        u32 width = k - column < TILE ? k - column : TILE;
        const X* from = x + row * k + column;
        cast_tile(width, amax_floor, q + row * code_bytes(k) + code_bytes(column), scale + at,
                  [&](u32 i) { return load(from + i); });
    }
}
