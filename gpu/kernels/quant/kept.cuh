// The values of a matrix that is kept as plain floats or as codes with scales, in f32: q * scale, one
// multiplication (reference/src/op/codes.rs, `values`).
//
// CONSTANTS
//   KIND  0: f32, 1: bf16, 2: E4M3, 3: E5M2, 4: E5M6, packed as in quant/quantize_tile.cu
#ifndef FATHOM_QUANT_KEPT_CUH
#define FATHOM_QUANT_KEPT_CUH

#include "common/float.cuh"

// A kept matrix: codes or floats, and where they are codes a scale for every block of block_rows x
// block_columns.
struct Kept {
    const void* codes;
    const float* scales;
    u32 columns;
    u32 block_rows;
    u32 block_columns;
};

FATHOM_DEVICE float half_to_float(u16 bits) {
    float x;
    asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
    return x;
}

// Element i of a row of packed E5M6, whose exponent is binary16's.
FATHOM_DEVICE float e5m6_at(const u32* row, u32 i) {
    const u32* words = row + i / 8 * 3;
    u32 bit = i % 8 * 12;
    u64 two = (u64)words[bit / 32] << 32 | (bit % 32 > 20 ? words[bit / 32 + 1] : 0u);
    u32 code = (u32)(two >> (52 - bit % 32)) & 0xFFFu;
    return half_to_float((u16)((code & 0x800u) << 4 | (code & 0x7FFu) << 4));
}

FATHOM_DEVICE float kept_at(const Kept& x, u64 row, u32 column) {
#if KIND == 0
    return ((const float*)x.codes)[row * x.columns + column];
#elif KIND == 1
    return load((const bf16*)x.codes + row * x.columns + column);
#else
    float value;
#if KIND == 4
    value = e5m6_at((const u32*)x.codes + row * (ceil_div(x.columns, 8u) * 3), column);
#else
    u16 code = ((const u8*)x.codes)[row * x.columns + column];
    u32 pair;
#if KIND == 2
    asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(pair) : "h"(code));
#else
    asm("cvt.rn.f16x2.e5m2x2 %0, %1;" : "=r"(pair) : "h"(code));
#endif
    value = half_to_float((u16)(pair & 0xFFFFu));
#endif
    u64 tile = row / x.block_rows * ceil_div(x.columns, x.block_columns) + column / x.block_columns;
    return __fmul_rn(value, x.scales[tile]);
#endif
}

#endif  // FATHOM_QUANT_KEPT_CUH
