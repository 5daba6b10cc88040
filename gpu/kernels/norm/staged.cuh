// Rows in shared memory, for kernels whose CTAs stay and take `each` neighbouring rows at a time: what they need
// for every row (weights) is read once a CTA, and a row once.
#ifndef FATHOM_NORM_STAGED_CUH
#define FATHOM_NORM_STAGED_CUH

#include "common/float.cuh"
#include "common/lanes.cuh"

// Most rows that a CTA takes at a time.
constexpr u32 MOST_ROWS = 16;

// Columns 0 .. width - 1 of `here` rows of x, `columns` apart, to rows `stride` apart: 16 bytes a thread where
// rows begin and end on such a bound, else an element. `staged` and its rows begin on one.
template <typename T>
FATHOM_DEVICE void stage_rows(const T* __restrict__ x, u64 columns, T* staged, u32 stride, u32 here, u32 width) {
    constexpr u32 PIECE = 16 / sizeof(T);
    if (((u64)x | columns * sizeof(T) | (u64)width * sizeof(T)) % 16 == 0) {
        const u32 pieces = width / PIECE;
#pragma unroll 4
        for (u32 at = threadIdx.x; at < here * pieces; at += blockDim.x) {
            const u32 row = at / pieces, i = at % pieces * PIECE;
            *(uint4*)(staged + row * stride + i) = *(const uint4*)(x + row * columns + i);
        }
        return;
    }
    for (u32 row = 0; row < here; row++) {
        for (u32 i = threadIdx.x; i < width; i += blockDim.x) staged[row * stride + i] = x[row * columns + i];
    }
}

#endif  // FATHOM_NORM_STAGED_CUH
