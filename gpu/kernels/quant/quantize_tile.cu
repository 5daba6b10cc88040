// Casts x[rows, k] to E4M3 with a scale for every 1 x 128 tile, to the bit the op quantize_tile of
// the reference (docs/numerics.md; fathom_numerics::quant):
//
//   amax  = largest |x| of the tile, NaNs left out
//   scale = max(amax, floor) / 448, one IEEE division; the next power of two with POW2
//   q     = x / scale, one IEEE division, to nearest even, saturating at 448; NaN gives 0x7F
//
// CONSTANTS
//   INPUT_BF16  1: x is bf16, 0: x is f32
//   POW2        1: scales are powers of two, rounded up
// LAUNCH
//   any grid of 128 threads; a warp casts one tile at a time and strides over the tiles.
#include "common/types.cuh"

constexpr u32 TILE = 128;
constexpr u32 LANES = 32;
constexpr float E4M3_MAX = 448.0f;

#if POW2
// The smallest power of two not below x > 0; infinity stays.
FATHOM_DEVICE float next_power_of_two(float x) {
    u32 bits = __float_as_uint(x);
    if (bits >= 0x7F800000u) return x;
    if (bits >= 0x00800000u) return __uint_as_float((bits + 0x007FFFFFu) & 0x7F800000u);
    // A subnormal's code is its value in units of 2^-149.
    return bits <= 1u ? x : __uint_as_float(1u << (32 - __clz(bits - 1u)));
}
#endif

FATHOM_DEVICE float load(const void* x, u64 index) {
#if INPUT_BF16
    return __uint_as_float((u32)((const u16*)x)[index] << 16);
#else
    return ((const float*)x)[index];
#endif
}

// The codes of high and low, in the two bytes of the result.
FATHOM_DEVICE u16 to_e4m3x2(float high, float low) {
    u16 codes;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(codes) : "f"(high), "f"(low));
    return codes;
}

// Element i of a lane is column i * 32 + lane: each load of a warp is one dense row segment.
FATHOM_DEVICE void cast_tile(const void* x, u64 start, u32 width, float amax_floor, u8* q,
                             float* scale_out) {
    const u32 lane = threadIdx.x % LANES;
    float v[TILE / LANES];
    float amax = 0.0f;
#pragma unroll
    for (u32 i = 0; i < TILE / LANES; i++) {
        u32 column = i * LANES + lane;
        v[i] = column < width ? load(x, start + column) : 0.0f;
        amax = fmaxf(amax, fabsf(v[i]));  // fmaxf(a, NaN) is a
    }
#pragma unroll
    for (u32 distance = LANES / 2; distance > 0; distance /= 2) {
        amax = fmaxf(amax, __shfl_xor_sync(0xFFFFFFFFu, amax, distance));
    }
    float scale = __fdiv_rn(fmaxf(amax, amax_floor), E4M3_MAX);
#if POW2
    scale = next_power_of_two(scale);
#endif
#pragma unroll
    for (u32 i = 0; i < TILE / LANES; i += 2) {
        u32 column = i * LANES + lane;
        float low = __fdiv_rn(v[i], scale);
        float high = __fdiv_rn(v[i + 1], scale);
        u16 codes = to_e4m3x2(high, low);
        if (column < width) q[column] = (u8)(codes & 0xFFu);
        if (column + LANES < width) q[column + LANES] = (u8)(codes >> 8);
    }
    if (lane == 0) *scale_out = scale;
}

// x[rows, k] -> q[rows, k] and scale[rows, ceil(k / 128)].
extern "C" __global__ void __launch_bounds__(128)
    quantize_tile(const void* __restrict__ x, u8* __restrict__ q, float* __restrict__ scale, u32 rows,
                  u32 k, float amax_floor) {
    const u32 tiles = ceil_div(k, TILE);
    const u64 total = (u64)rows * tiles;
    const u64 warps = (u64)gridDim.x * (blockDim.x / LANES);
    u64 at = (u64)blockIdx.x * (blockDim.x / LANES) + threadIdx.x / LANES;
    for (; at < total; at += warps) {
        u64 row = at / tiles;
        u32 column = (u32)(at % tiles) * TILE;
        u32 width = k - column < TILE ? k - column : TILE;
        u64 start = row * k + column;
        cast_tile(x, start, width, amax_floor, q + start, scale + at);
    }
}
