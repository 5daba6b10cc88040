// Products on CUDA cores in the order of the in-order GEMM (fathom_numerics::gemm::inorder): every element
// is one chain of fma, k ascending, and nothing is added to it that is not an element: a step with zeros would
// turn -0 into +0.
//
// 256 threads work on a tile of 64 x 64; thread t holds rows 4(t / 16) .. + 3 and columns 4(t % 16) .. + 3.
// Operands lie in shared memory by k: element (row, k) at k * FMA_PITCH + row.
#ifndef FATHOM_MMA_FMA_CUH
#define FATHOM_MMA_FMA_CUH

#include "common/types.cuh"

constexpr u32 FMA_TILE = 64;
constexpr u32 FMA_THREADS = 256;
constexpr u32 FMA_PITCH = FMA_TILE + 4;  // rows of 16-byte multiples
constexpr u32 FMA_TILE_FLOATS = FMA_TILE * FMA_PITCH;

FATHOM_DEVICE u32 fma_row() { return threadIdx.x / 16 * 4; }
FATHOM_DEVICE u32 fma_column() { return threadIdx.x % 16 * 4; }

FATHOM_DEVICE void fma_step(float (&sum)[4][4], const float* a, const float* b) {
    float4 x = *(const float4*)a;
    float4 y = *(const float4*)b;
    float rows[4] = {x.x, x.y, x.z, x.w};
    float columns[4] = {y.x, y.y, y.z, y.w};
#pragma unroll
    for (u32 i = 0; i < 4; i++) {
#pragma unroll
        for (u32 j = 0; j < 4; j++) sum[i][j] = __fmaf_rn(rows[i], columns[j], sum[i][j]);
    }
}

// sum = a b^T + sum over k < depth.
FATHOM_DEVICE void fma_tile(float (&sum)[4][4], const float* a, const float* b, u32 depth) {
    a += fma_row();
    b += fma_column();
    u32 k = 0;
    for (; k + 8 <= depth; k += 8) {
#pragma unroll
        for (u32 i = 0; i < 8; i++) fma_step(sum, a + (k + i) * FMA_PITCH, b + (k + i) * FMA_PITCH);
    }
    for (; k < depth; k++) fma_step(sum, a + k * FMA_PITCH, b + k * FMA_PITCH);
}

// Copies a tile: element (row, k) from from[row * stride + k] (K_INNER) or from[k * stride + row];
// zeros from `rows` and `depth` on. Where k runs in memory, a warp takes 4 rows of 8 k: whole sectors of
// global memory, and every bank of shared memory once.
template <bool K_INNER>
FATHOM_DEVICE void fma_load(float* to, const float* from, u64 stride, u32 rows, u32 depth) {
    constexpr u32 AT_ONCE = FMA_THREADS / FMA_TILE;
    static_assert(AT_ONCE == 4, "eight lanes along k leave four rows of a warp");
#pragma unroll 4
    for (u32 step = 0; step < FMA_TILE; step += AT_ONCE) {
        const u32 row = K_INNER ? step + threadIdx.x / 8 % AT_ONCE : threadIdx.x % FMA_TILE;
        const u32 k = K_INNER ? threadIdx.x / 32 * 8 + threadIdx.x % 8 : step + threadIdx.x / FMA_TILE;
        const bool there = row < rows && k < depth;
        to[k * FMA_PITCH + row] = there ? from[K_INNER ? row * stride + k : k * stride + row] : 0.0f;
    }
}

#endif
