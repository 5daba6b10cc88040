// The cast of one tile by a warp, to the bit the op quantize_tile of the reference (docs/numerics.md;
// fathom_numerics::quant):
//
//   amax  = largest |x| of the tile, NaNs left out
//   scale = max(amax, floor) / max, one IEEE division; other rules of SCALE
//   q     = x / scale, one IEEE division, to nearest even, saturating; NaN gives the format's NaN
//
// CONSTANTS
//   TILE           elements that share a scale; a multiple of 8 for E5M6
//   FORMAT, SCALE  as in quant/cast.cuh
// NOTES
// - E5M6: eight codes of 12 bits are three words, the first code in the top bits of the first word; a row has
//   ceil(k / 8) * 3 words, its tail filled with zero codes. A lane assembles a word from its neighbours' codes.
#ifndef FATHOM_QUANT_TILE_CUH
#define FATHOM_QUANT_TILE_CUH

#include "quant/cast.cuh"

constexpr u32 LANES = 32;
constexpr u32 EACH = (TILE + LANES - 1) / LANES;
static_assert(FORMAT != 2 || TILE % 8 == 0, "eight codes of E5M6 lie together, so a tile holds whole eights");

// Bytes of the codes of a row, or of what stands before a tile in it.
FATHOM_DEVICE u32 code_bytes(u32 columns) {
    return FORMAT == 2 ? ceil_div(columns, 8u) * 12 : columns;
}

#if FORMAT == 2
// Word `word` of the three that hold codes first .. first + 7 of the warp's lanes.
FATHOM_DEVICE u32 packed_word(u32 code, u32 first, u32 word) {
    u32 out = 0;
#pragma unroll
    for (int j = 0; j < 8; j++) {
        u32 c = __shfl_sync(0xFFFFFFFFu, code, first + j);
        int shift = 84 - 12 * j - 32 * (2 - (int)word);
        if (shift > -12 && shift < 32) out |= shift >= 0 ? c << shift : c >> -shift;
    }
    return out;
}
#endif

// The tile of value(0 .. width - 1), each asked for once; q is where its codes begin. Element i of a lane is
// column i * 32 + lane: what a warp loads at once is one dense segment of a row.
template <typename F>
FATHOM_DEVICE void cast_tile(u32 width, float amax_floor, u8* q, float* scale_out, F value) {
    const u32 lane = threadIdx.x % LANES;
    float v[EACH];
    float amax = 0.0f;
#pragma unroll
    for (u32 i = 0; i < EACH; i++) {
        u32 column = i * LANES + lane;
        v[i] = column < width ? value(column) : 0.0f;
        amax = fmaxf(amax, fabsf(v[i]));  // fmaxf(a, NaN) is a
    }
#pragma unroll
    for (u32 distance = LANES / 2; distance > 0; distance /= 2) {
        amax = fmaxf(amax, __shfl_xor_sync(0xFFFFFFFFu, amax, distance));
    }
    float scale = scale_for(amax, amax_floor);
    if (lane == 0) *scale_out = scale;
#if FORMAT == 2
#pragma unroll
    for (u32 i = 0; i < EACH; i++) {
        u32 column = i * LANES + lane;
        u32 code = column < width ? to_e5m6(__fdiv_rn(v[i], scale)) : 0u;
        u32 eight = lane / 3 % 4;
        u32 word = packed_word(code, eight * 8, lane % 3);
        if (lane < 12 && i * LANES + eight * 8 < width) {
            ((u32*)q)[(i * 4 + eight) * 3 + lane % 3] = word;
        }
    }
#else
#pragma unroll
    for (u32 i = 0; i < EACH; i += 2) {
        u32 column = i * LANES + lane;
        float high = i + 1 < EACH ? __fdiv_rn(v[i + 1 < EACH ? i + 1 : i], scale) : 0.0f;
        u16 codes = to_fp8x2(__fdiv_rn(v[i], scale), high);
        if (column < width) q[column] = (u8)(codes & 0xFFu);
        if (i + 1 < EACH && column + LANES < width) q[column + LANES] = (u8)(codes >> 8);
    }
#endif
}

#endif  // FATHOM_QUANT_TILE_CUH
