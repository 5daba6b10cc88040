// RMSNorm of columns offset .. offset + width of every row of x, and the cast of what it gives, to the bit the
// ops rms_norm and rms_norm_quantize of the reference (reference/src/ops/rms_norm.rs):
//
//   r = 1 / sqrt(sum(x_i^2) / width + eps); y_i = (x_i r) w_i, rounded to y's type
//   q, scale  the cast of y with a scale for every 1 x TILE: quant/tile.cuh
//
// CONSTANTS
//   X_BF16, Y_BF16  1: x, y are bf16, 0: f32
//   STAGED          1: two rows a CTA, which lie in shared memory from the sum to the result; 0: two rows a
//                   warp, short enough to be in the first-level cache when they are read again
//   TILE            0: no cast; else as in quant/tile.cuh, with FORMAT and SCALE
//   KEEP            1: y is written
// LAUNCH
//   256 threads, ROWS rows a CTA. Staged: ROWS * stride elements of x as dynamic shared memory.
// NOTES
// - Half a warp adds up a row, in the order of common/lanes.cuh; what is behind that all warps of the CTA share
//   out, a tile at a time.
// - The stride is chosen so that the two half warps that add up read different banks.
#include "common/float.cuh"
#include "common/lanes.cuh"
#if TILE
#include "quant/tile.cuh"
constexpr u32 CHUNK = TILE;
#else
constexpr u32 CHUNK = 128;
#endif

constexpr u32 THREADS = 256;
constexpr u32 WARPS = THREADS / 32;
constexpr u32 ROWS = STAGED ? 2 : 2 * WARPS;

using X = Float<X_BF16>;
using Y = Float<Y_BF16>;

extern "C" __global__ void __launch_bounds__(THREADS)
    rms_norm(const X* __restrict__ x, const float* __restrict__ weight, Y* __restrict__ y, u8* __restrict__ q,
             float* __restrict__ scale, float* __restrict__ rstd, u32 rows, u32 columns, u32 offset, u32 width,
             u32 stride, float eps, float amax_floor) {
    __shared__ float roots[ROWS];
    const u64 first = (u64)blockIdx.x * ROWS;
    const u32 here = rows - first < ROWS ? (u32)(rows - first) : ROWS;
    const X* kept = x + first * columns + offset;
#if STAGED
    extern __shared__ X staged[];
    for (u32 row = 0; row < here; row++) {
        for (u32 i = threadIdx.x; i < width; i += THREADS) staged[row * stride + i] = kept[row * columns + i];
    }
    __syncthreads();
    kept = staged;
#else
    stride = columns;
#endif
    if (threadIdx.x < ROWS * ROW_LANES) {
        const u32 row = threadIdx.x / ROW_LANES;
        const X* from = kept + row * stride;
        float sum = row_sum(row < here ? width : 0, [&](u32 i) {
            float v = load(from + i);
            return __fmul_rn(v, v);
        });
        float mean = __fdiv_rn(sum, (float)width);
        float r = __fdiv_rn(1.0f, __fsqrt_rn(__fadd_rn(mean, eps)));
        if (half_warp_lane() == 0) {
            roots[row] = r;
            if (row < here) store(rstd + first + row, r);
        }
    }
    __syncthreads();
    const u32 chunks = ceil_div(width, CHUNK);
    for (u32 at = threadIdx.x / 32; at < here * chunks; at += WARPS) {
        const u32 row = at / chunks;
        const u32 begin = at % chunks * CHUNK;
        const u32 n = width - begin < CHUNK ? width - begin : CHUNK;
        const float r = roots[row];
        const X* from = kept + row * stride + begin;
        Y* to = y + (first + row) * width + begin;
        auto normed = [&](u32 i) {
            Y v;
            store(&v, __fmul_rn(__fmul_rn(load(from + i), r), weight[begin + i]));
            if (KEEP) to[i] = v;
            return load(&v);
        };
#if TILE
        u8* codes = q + (first + row) * code_bytes(width) + code_bytes(begin);
        cast_tile(n, amax_floor, codes, scale + (first + row) * chunks + at % chunks, normed);
#else
#pragma unroll
        for (u32 i = threadIdx.x % 32; i < CHUNK; i += 32) {
            if (i < n) normed(i);
        }
#endif
    }
}
