// d = a b (+ c) in FP32, to the bit the ops gemm and grouped_gemm of the reference on F32: every element is
// one chain of fma over ascending k, from +0 or from c.
//
// CONSTANTS
//   LAYOUT    0 nt: a[m, k] b[n, k];  1 nn: a[m, k] b[k, n];  2 tn: a[k, m] b[k, n]
//   GROUPING  what `bounds` bound (gemm/work.cuh); DEPTH and GROUP_DEPTH go with any layout, GROUP_ROWS with
//             nt and nn
// LAUNCH
//   256 threads, a CTA for every 64 x 64 of every d.
// NOTES
// - c is null or of d's shape; it may be d.
#include "common/float.cuh"
#include "common/types.cuh"
#include "gemm/work.cuh"
#include "mma/fma.cuh"

constexpr bool A_K_INNER = LAYOUT != 2;
constexpr bool B_K_INNER = LAYOUT == 0;

// One range of k into the sums of a tile.
FATHOM_DEVICE void chain(float (&sum)[4][4], float* shared, const float* a, const float* b,
                         const Work& work, u32 from, u32 to, u32 m, u32 n, u32 k) {
    const u64 lda = A_K_INNER ? k : m;
    const u64 ldb = B_K_INNER ? k : n;
    float* tile_b = shared + FMA_TILE_FLOATS;
    for (u32 at = from; at < to; at += FMA_TILE) {
        const u32 depth = to - at < FMA_TILE ? to - at : FMA_TILE;
        const float* part_a = a + (A_K_INNER ? work.row * lda + at : at * lda + work.row);
        const float* part_b = b + (B_K_INNER ? work.column * ldb + at : at * ldb + work.column);
        __syncthreads();
        fma_load<A_K_INNER>(shared, part_a, lda, work.end_row - work.row, depth);
        fma_load<B_K_INNER>(tile_b, part_b, ldb, n - work.column, depth);
        __syncthreads();
        fma_tile(sum, shared, tile_b, depth);
    }
}

extern "C" __global__ void __launch_bounds__(256, 1)
    fp32_gemm(const float* __restrict__ a, const float* __restrict__ b, const float* c, float* d,
              const int* __restrict__ bounds, u32 groups, u32 m, u32 n, u32 k) {
    __shared__ __align__(16) float shared[2 * FMA_TILE_FLOATS];
    const Work work = work_of<FMA_TILE, FMA_TILE>(bounds, groups, m, n);
    const u32 row = work.row + fma_row();
    const u32 column = work.column + fma_column();
    const u64 out = (GROUPING == GROUP_DEPTH ? (u64)work.group * m * n : 0) + (u64)row * n + column;

    float sum[4][4] = {};
#pragma unroll
    for (u32 i = 0; i < 4; i++) {
#pragma unroll
        for (u32 j = 0; j < 4; j++) {
            const bool there = row + i < work.end_row && column + j < n;
            if (c && there) sum[i][j] = c[out + (u64)i * n + j];
        }
    }
    if (GROUPING == GROUP_ROWS) {
        const float* own = b + (u64)work.group * n * k;
        if (!work.empty) chain(sum, shared, a, own, work, 0, k, m, n, k);
    } else {
        for (u32 part = work.part; part < work.end_part; part++) {
            chain(sum, shared, a, b, work, bounds[part], bounds[part + 1], m, n, k);
        }
    }
#pragma unroll
    for (u32 i = 0; i < 4; i++) {
#pragma unroll
        for (u32 j = 0; j < 4; j++) {
            const bool there = row + i < work.end_row && column + j < n;
            if (there) store(d + out + (u64)i * n + j, sum[i][j]);
        }
    }
}
