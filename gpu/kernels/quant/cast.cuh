// Scales and codes of casts to FP8 and E5M6, to the bit fathom_numerics::quant (docs/numerics.md, section 4).
//
// CONSTANTS
//   FORMAT  0: E4M3, 1: E5M2, 2: E5M6
//   SCALE   0: any f32, 1: powers of two, 2: the rule of the MX formats
#ifndef FATHOM_QUANT_CAST_CUH
#define FATHOM_QUANT_CAST_CUH

#include "common/float.cuh"

constexpr float FORMAT_MAX = FORMAT == 0 ? 448.0f : FORMAT == 1 ? 57344.0f : 65024.0f;

// The smallest power of two not below x > 0; infinity stays.
FATHOM_DEVICE float next_power_of_two(float x) {
    u32 bits = __float_as_uint(x);
    if (bits >= 0x7F800000u) return x;
    if (bits >= 0x00800000u) return __uint_as_float((bits + 0x007FFFFFu) & 0x7F800000u);
    // A subnormal's code is its value in units of 2^-149.
    return bits <= 1u ? x : __uint_as_float(1u << (32 - __clz(bits - 1u)));
}

// floor(log2 x) of a finite x >= 0; far below every exponent for zero.
FATHOM_DEVICE int exponent_of(float x) {
    u32 bits = __float_as_uint(x);
    if (bits >= 0x00800000u) return (int)(bits >> 23) - 127;
    return bits == 0 ? -1000 : (31 - __clz(bits)) - 149;
}

// OCP Microscaling v1.0, section 6.3: the power of two by which amax is brought to the format's exponent.
FATHOM_DEVICE float mx_scale(float amax) {
    if (__float_as_uint(amax) >= 0x7F800000u) return __uint_as_float(0x7FFFFFFFu);
    int power = exponent_of(amax) - exponent_of(FORMAT_MAX);
    return power <= -127 ? __uint_as_float(0x00400000u) : __uint_as_float((u32)(power + 127) << 23);
}

// The scale of a block whose largest magnitude is amax.
FATHOM_DEVICE float scale_for(float amax, float amax_floor) {
    if (SCALE == 2) return mx_scale(amax);
    float scale = __fdiv_rn(fmaxf(amax, amax_floor), FORMAT_MAX);
    return SCALE == 1 ? next_power_of_two(scale) : scale;
}

// The FP8 codes of low and high, low in the lower byte: to nearest even, saturating, NaN 0x7F.
FATHOM_DEVICE u16 to_fp8x2(float low, float high) {
    u16 codes;
#if FORMAT == 1
    asm("cvt.rn.satfinite.e5m2x2.f32 %0, %1, %2;" : "=h"(codes) : "f"(high), "f"(low));
#else
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(codes) : "f"(high), "f"(low));
#endif
    return codes;
}

FATHOM_DEVICE u8 to_fp8(float x) { return (u8)to_fp8x2(x, 0.0f); }

// The E5M6 code of x, 12 bits: to nearest even, saturating at 65024, NaN 0x7FF.
FATHOM_DEVICE u32 to_e5m6(float x) {
    u32 bits = __float_as_uint(x);
    u32 sign = bits >> 31 << 11;
    u32 magnitude = bits & 0x7FFFFFFFu;
    if (magnitude > 0x7F800000u) return 0x7FFu;
    if (magnitude >= __float_as_uint(FORMAT_MAX)) return sign | 0x7BFu;
    // Below 2^-14 the grid is that of 2^-20: adding a number of that grid's 24 bits rounds to it.
    if (magnitude < 0x38800000u) {
        float shifted = __fadd_rn(__uint_as_float(magnitude), 8.0f);
        return sign | (__float_as_uint(shifted) - 0x41000000u);
    }
    u32 rounded = magnitude + 0xFFFFu + (magnitude >> 17 & 1u);
    u32 code = (rounded >> 17) - ((127u - 15u) << 6);
    return sign | (code > 0x7BFu ? 0x7BFu : code);
}

#endif  // FATHOM_QUANT_CAST_CUH
