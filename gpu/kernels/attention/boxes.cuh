// Blocks of 64 rows of BF16 heads in shared memory as wgmma reads them, and what warpgroups do with them:
// boxes of 64 rows of 128 bytes under the 128-byte swizzle, one behind the other for every 64 columns.
//
// A box is read K-major where its columns are the products' k, and MN-major where its rows are.
#ifndef FATHOM_ATTENTION_BOXES_CUH
#define FATHOM_ATTENTION_BOXES_CUH

#include "common/types.cuh"
#include "mma/wgmma.cuh"
#include "ptx/barrier.cuh"
#include "ptx/tma.cuh"

constexpr u32 BOX = 64;  // rows and columns
constexpr u32 BOX_BYTES = BOX * 128;
constexpr u32 WARPGROUP = 128;

// BOXES boxes of a block of head `head`, from column `column` and row `row` of its tensor on. By one thread.
template <u32 BOXES>
FATHOM_DEVICE void load_boxes(u32 to, const TensorMap* map, u32 column, u32 head, u32 row, u32 full) {
#pragma unroll
    for (u32 box = 0; box < BOXES; box++) {
        tma_load(to + box * BOX_BYTES, map, column + box * BOX, head, row, full);
    }
}

// A block's boxes once more at `to`, with zeros in the rows from `rows` on, for products whose k are its
// rows: the exponent of zero times a large number counts. By a warpgroup, whose barrier this is.
template <u32 BOXES>
FATHOM_DEVICE void copy_rows(u32 to, u32 from, u32 rows, u32 barrier) {
    named_barrier(barrier, WARPGROUP);  // nobody reads what is at `to`
    for (u32 at = threadIdx.x % WARPGROUP * 16; at < BOXES * BOX_BYTES; at += WARPGROUP * 16) {
        uint4 x = make_uint4(0, 0, 0, 0);
        if (at % BOX_BYTES < rows * 128) {
            asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                         : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
                         : "r"(from + at)
                         : "memory");
        }
        asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(to + at), "r"(x.x), "r"(x.y), "r"(x.z),
                     "r"(x.w)
                     : "memory");
    }
    fence_async_shared();
    named_barrier(barrier, WARPGROUP);
}

// d[64, 64] = the rows of a times the rows of b, over the columns of BOXES boxes: a group that runs on.
template <u32 BOXES>
FATHOM_DEVICE void dots(float (&d)[32], u32 a, u32 b) {
    u32 left = wgmma_descriptor_low(a), right = wgmma_descriptor_low(b);
    // Opaque: those of every step, ahead of a loop, would fill the registers.
    if (BOXES > 4) asm volatile("" : "+r"(left), "+r"(right));
    wgmma_pin(d);
    wgmma_fence();
    wgmma_m64n64k16_bf16<true>(d, left, right);
#pragma unroll
    for (u32 step = 1; step < BOXES * BOX / 16; step++) {
        const u32 at = step / 4 * (BOX_BYTES / 16) + step % 4 * 2;
        wgmma_m64n64k16_bf16<false>(d, left + at, right + at);
    }
    wgmma_commit();
}

// The sums as an A operand: rounded to BF16, in pairs.
FATHOM_DEVICE void to_operand(u32 (&a)[16], const float (&d)[32]) {
#pragma unroll
    for (u32 i = 0; i < 16; i++) {
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(a[i]) : "f"(d[2 * i + 1]), "f"(d[2 * i]));
    }
}

// d[64, 64 BOXES] += a times b, whose rows are k: a group that runs on.
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
}

// Row and column of this thread's first sum; the others are at + 8 rows and + 8j + {0, 1} columns
// (mma/wgmma.cuh).
FATHOM_DEVICE u32 sum_row() { return threadIdx.x % WARPGROUP / 32 * 16 + threadIdx.x % 32 / 4; }
FATHOM_DEVICE u32 sum_column() { return threadIdx.x % 4 * 2; }

#endif
