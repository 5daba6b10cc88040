// RMSNorm of columns offset .. offset + width of every row of x, with a sum before it and the cast of what it gives
// behind it, to the bit the ops rms_norm, rms_norm_quantize, add_rms_norm and add_rms_norm_quantize of the
// reference (reference/src/ops/rms_norm.rs, add_rms_norm.rs):
//
//   h = (x + b) + c, rounded to h's type, is what is normalised where there is a sum
//   r = 1 / sqrt(sum(x_i^2) / width + eps); y_i = (x_i r) w_i, rounded to y's type
//   q, scale  the cast of y with a scale for every 1 x TILE: quant/tile.cuh
//
// CONSTANTS
//   X_BF16, Y_BF16  1: x, y are bf16, 0: f32
//   ADD             1: x is a sum's first term, and B_BF16, C_BF16, H_BF16 are the types of b, c and h; c may
//                   be null, and h has the normalised columns only
//   STAGED          1: rows and weights lie in shared memory; 0: they are too long for that, and read twice
//   TILE            0: no cast; else as in quant/tile.cuh, with FORMAT and SCALE
//   KEEP            1: y is written
// LAUNCH
//   Any grid of whole warps, half a warp for each of the `each` rows (at most 16) that a CTA takes at a time; it
//   strides over the rows. Staged, dynamic shared memory: width floats, up to a bound of 128 bytes, then `each`
//   rows of `stride` elements of what is normalised.
// NOTES
// - Half a warp adds up a row, in the order of common/lanes.cuh; what is behind that all warps of the CTA share
//   out, a tile at a time.
// - The stride is chosen so that the two half warps that add up read different banks.
#include "norm/staged.cuh"
#if TILE
#include "quant/tile.cuh"
constexpr u32 CHUNK = TILE;
#else
constexpr u32 CHUNK = 128;
#endif

using X = Float<X_BF16>;
using Y = Float<Y_BF16>;
#if ADD
using H = Float<H_BF16>;
using B = Float<B_BF16>;
using C = Float<C_BF16>;
#else
using H = X;
using B = X;
using C = X;
#endif

extern "C" __global__ void __launch_bounds__(1024)
    rms_norm(const X* __restrict__ x, const B* __restrict__ b, const C* __restrict__ c,
             const float* __restrict__ weight, H* h, Y* __restrict__ y, u8* __restrict__ q,
             float* __restrict__ scale, float* __restrict__ rstd, u32 rows, u32 columns, u32 offset, u32 width,
             u32 stride, u32 each, float eps, float amax_floor) {
    __shared__ float roots[MOST_ROWS];
    const u32 warp = threadIdx.x / 32, warps = blockDim.x / 32;
    const u32 chunks = ceil_div(width, CHUNK);
#if STAGED
    extern __shared__ __align__(16) float weights[];
    H* const staged = (H*)(weights + ceil_div(width, 32u) * 32);
    for (u32 i = threadIdx.x; i < width; i += blockDim.x) weights[i] = weight[i];
#else
    const float* const weights = weight;
    H* const staged = nullptr;
    stride = ADD ? width : columns;
#endif
    for (u64 first = (u64)blockIdx.x * each; first < rows; first += (u64)gridDim.x * each) {
        const u32 here = rows - first < each ? (u32)(rows - first) : each;
#if ADD
        for (u32 row = 0; row < here; row++) {
            for (u32 i = threadIdx.x; i < width; i += blockDim.x) {
                const u64 at = (first + row) * columns + i;
                float sum = __fadd_rn(load(x + at), load(b + at));
                if (c != nullptr) sum = __fadd_rn(sum, load(c + at));
                H v;
                store(&v, sum);
                h[at] = v;
                if (STAGED) staged[row * stride + i] = v;
            }
        }
        const H* kept = STAGED ? staged : h + first * columns;
#else
        const H* kept = x + first * columns + offset;
#if STAGED
        stage_rows(kept, (u64)columns, staged, stride, here, width);
        kept = staged;
#endif
#endif
        __syncthreads();
        if (warp < ceil_div(each, 2u)) {
            const u32 row = threadIdx.x / ROW_LANES;
            const H* from = kept + (u64)row * stride;
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
        for (u32 at = warp; at < here * chunks; at += warps) {
            const u32 row = at / chunks;
            const u32 begin = at % chunks * CHUNK;
            const u32 n = width - begin < CHUNK ? width - begin : CHUNK;
            const float r = roots[row];
            const H* from = kept + (u64)row * stride + begin;
            Y* to = y + (first + row) * width + begin;
            auto normed = [&](u32 i) {
                Y v;
                store(&v, __fmul_rn(__fmul_rn(load(from + i), r), weights[begin + i]));
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
        // The next rows take the place of these.
        __syncthreads();
    }
}
