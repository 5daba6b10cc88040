// Products of blocks of F32 heads on CUDA cores, for the attention kernels: 64 rows by 64 columns at a time, by
// 256 threads (mma/fma.cuh).
#ifndef FATHOM_ATTENTION_FP32_BLOCKS_CUH
#define FATHOM_ATTENTION_FP32_BLOCKS_CUH

#include "common/types.cuh"
#include "mma/fma.cuh"

// dot(rows of a, rows of b) over `columns`, both row-major: a chain over ascending columns.
FATHOM_DEVICE void dots(float (&sum)[4][4], float* tile_a, float* tile_b, const float* a, u64 row_a, u32 rows_a,
                        const float* b, u64 row_b, u32 rows_b, u32 columns) {
    for (u32 at = 0; at < columns; at += FMA_TILE) {
        const u32 depth = columns - at < FMA_TILE ? columns - at : FMA_TILE;
        __syncthreads();
        fma_load<true>(tile_a, a + at, row_a, rows_a, depth);
        fma_load<true>(tile_b, b + at, row_b, rows_b, depth);
        __syncthreads();
        fma_tile(sum, tile_a, tile_b, depth);
    }
}

// The sums as an operand of the next product, of which their columns are k.
FATHOM_DEVICE void store_operand(float* tile, const float (&sum)[4][4]) {
#pragma unroll
    for (u32 j = 0; j < 4; j++) {
        float4 column = {sum[0][j], sum[1][j], sum[2][j], sum[3][j]};
        *(float4*)(tile + (fma_column() + j) * FMA_PITCH + fma_row()) = column;
    }
}

#endif
