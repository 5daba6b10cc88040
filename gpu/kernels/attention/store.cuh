// What a warpgroup holds of a product (mma/wgmma.cuh) to rows of BF16 in global memory.
#ifndef FATHOM_ATTENTION_STORE_CUH
#define FATHOM_ATTENTION_STORE_CUH

#include "attention/boxes.cuh"
#include "common/float.cuh"
#include "common/types.cuh"

// Two neighbouring elements of a row, of which `left` are its own; in one piece where every row begins at a
// multiple of four bytes.
FATHOM_DEVICE void store_pair(bf16* to, float low, float high, u32 left, bool even) {
    if (even) {
        u32 pair;
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
        if (left > 0) *(u32*)to = pair;
    } else {
        if (left > 0) store(to, low);
        if (left > 1) store(to + 1, high);
    }
}

// Rows below `rows` of a block's sums, columns below `columns`; `to` is its first element.
template <u32 BOXES>
FATHOM_DEVICE void store_rows(const float (&sum)[BOXES][32], bf16* to, u64 row_to, u32 rows, u32 columns) {
    const bool even = row_to % 2 == 0 && columns % 2 == 0;
#pragma unroll
    for (u32 e = 0; e < BOXES * 32; e += 2) {
        const u32 row = sum_row() + e / 2 % 2 * 8, column = e / 4 * 8 + sum_column();
        if (row >= rows) continue;
        const u32 left = column < columns ? columns - column : 0;
        store_pair(to + row * row_to + column, sum[e / 32][e % 32], sum[e / 32][e % 32 + 1], left, even);
    }
}

#endif
