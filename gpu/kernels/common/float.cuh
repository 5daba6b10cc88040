// Elements of tensors as the ops of the reference read and write them (reference/src/op/compute_type.rs): F32
// as it is, BF16 widened on load and rounded to nearest even on store. A NaN is stored as 0x7FFFFFFF or
// 0x7FFF, whatever it was.
#ifndef FATHOM_COMMON_FLOAT_CUH
#define FATHOM_COMMON_FLOAT_CUH

#include "common/elementary.cuh"
#include "common/types.cuh"

// Sixteen bits of a BF16; a type of its own, so that load and store know it from an integer.
struct bf16 {
    u16 bits;
};

template <bool BF16>
struct FloatOf {
    using Type = float;
};

template <>
struct FloatOf<true> {
    using Type = bf16;
};

// float or bf16, by a constant that the host gives.
template <bool BF16>
using Float = typename FloatOf<BF16>::Type;

FATHOM_DEVICE float widen(float x) { return x; }

FATHOM_DEVICE float widen(bf16 x) { return __uint_as_float((u32)x.bits << 16); }

// x rounded to nearest even; cvt gives 0x7FFF for any NaN.
FATHOM_DEVICE bf16 to_bf16(float x) {
    bf16 y;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
    return y;
}

template <typename T>
FATHOM_DEVICE float load(const T* p) {
    return widen(*p);
}

FATHOM_DEVICE void store(float* p, float x) { *p = fathom_nan_if(x != x, x); }

FATHOM_DEVICE void store(bf16* p, float x) { *p = to_bf16(x); }

// The thread's number in a grid of one dimension.
FATHOM_DEVICE u64 thread_index() { return (u64)blockIdx.x * blockDim.x + threadIdx.x; }

#endif  // FATHOM_COMMON_FLOAT_CUH
