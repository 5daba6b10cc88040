// Blocks of rows of BF16 heads in shared memory as wgmma reads them, and what warpgroups hold of their
// products: boxes of 64 rows of 128 bytes under the 128-byte swizzle, one behind the other for every 64
// columns.
//
// A box is read K-major where its columns are the products' k, and MN-major where its rows are.
#ifndef FATHOM_ATTENTION_BOXES_CUH
#define FATHOM_ATTENTION_BOXES_CUH

#include "common/types.cuh"
#include "mma/wgmma.cuh"

constexpr u32 BOX = 64;  // rows and columns
constexpr u32 BOX_BYTES = BOX * 128;
constexpr u32 WARPGROUP = 128;

// Eight columns of a row from `column` on; zeros from `columns` on.
FATHOM_DEVICE uint4 load_eight(const u16* row, u32 column, u32 columns) {
#if ALIGNED
    return column < columns ? *(const uint4*)(row + column) : make_uint4(0, 0, 0, 0);
#else
    u32 words[4];
#pragma unroll
    for (u32 i = 0; i < 4; i++) {
        const u32 low = column + 2 * i < columns ? row[column + 2 * i] : 0;
        const u32 high = column + 2 * i + 1 < columns ? row[column + 2 * i + 1] : 0;
        words[i] = high << 16 | low;
    }
    return make_uint4(words[0], words[1], words[2], words[3]);
#endif
}

// `boxes` boxes of the 64 rows at `from`; zeros from `rows` and `columns` on. By the whole warpgroup.
FATHOM_DEVICE void load_boxes(u32 to, const u16* from, u64 stride, u32 rows, u32 columns, u32 boxes) {
    const u32 chunk = threadIdx.x % 8;
    for (u32 box = 0; box < boxes; box++) {
#pragma unroll
        for (u32 row = threadIdx.x / 8; row < BOX; row += WARPGROUP / 8) {
            uint4 eight = make_uint4(0, 0, 0, 0);
            if (row < rows) eight = load_eight(from + row * stride, box * BOX + chunk * 8, columns);
            const u32 place = to + box * BOX_BYTES + row * 128 + (chunk ^ row % 8) * 16;
            asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(place), "r"(eight.x), "r"(eight.y),
                         "r"(eight.z), "r"(eight.w)
                         : "memory");
        }
    }
}

// d[64, 64] = the rows of a times the rows of b, over the columns of `boxes` boxes; waits.
FATHOM_DEVICE void dots(float (&d)[32], u32 a, u32 b, u32 boxes) {
#pragma unroll
    for (u32 i = 0; i < 32; i++) d[i] = 0.0f;
    const u32 left = wgmma_descriptor_low(a), right = wgmma_descriptor_low(b);
    wgmma_pin(d);
    wgmma_fence();
#pragma unroll
    for (u32 box = 0; box < boxes; box++) {
#pragma unroll
        for (u32 step = 0; step < BOX / 16; step++) {
            const u32 at = box * (BOX_BYTES / 16) + step * 2;
            wgmma_m64n64k16_bf16(d, left + at, right + at);
        }
    }
    wgmma_commit();
    wgmma_wait(d);
}

// The sums as an A operand: rounded to BF16, in pairs.
FATHOM_DEVICE void to_operand(u32 (&a)[16], const float (&d)[32]) {
#pragma unroll
    for (u32 i = 0; i < 16; i++) {
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(a[i]) : "f"(d[2 * i + 1]), "f"(d[2 * i]));
    }
}

// d[64, 64 BOXES] += a times b, whose rows are k; waits.
template <u32 BOXES>
FATHOM_DEVICE void chain(float (&d)[BOXES][32], u32 (&a)[16], u32 b) {
    const u32 right = wgmma_descriptor_low(b);
    wgmma_pin(a);
#pragma unroll
    for (u32 box = 0; box < BOXES; box++) wgmma_pin(d[box]);
    wgmma_fence();
#pragma unroll
    for (u32 box = 0; box < BOXES; box++) {
#pragma unroll
        for (u32 step = 0; step < BOX / 16; step++) {
            const u32 at = box * (BOX_BYTES / 16) + step * (16 * 128 / 16);
            wgmma_m64n64k16_bf16(d[box], a + 4 * step, right + at);
        }
    }
    wgmma_commit();
#pragma unroll
    for (u32 box = 0; box < BOXES; box++) wgmma_wait(d[box]);
}

// Row and column of this thread's first sum; the others are at + 8 rows and + 8j + {0, 1} columns
// (mma/wgmma.cuh).
FATHOM_DEVICE u32 sum_row() { return threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4; }
FATHOM_DEVICE u32 sum_column() { return threadIdx.x % 4 * 2; }

#endif
