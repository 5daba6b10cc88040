// The gradient of RMSNorm of columns offset .. offset + width of every row of x, and the cast of it, to the bit the
// ops rms_norm_backward and rms_norm_backward_quantize of the reference (reference/src/ops/rms_norm.rs):
//
//   m = sum((dy_i w_i) (x_i r)) / width; dx_i = r (dy_i w_i - (x_i r) m), plus residual_i, rounded to dx's type
//   q, scale  the cast of dx with a scale for every 1 x TILE: quant/tile.cuh
//
// CONSTANTS
//   X_BF16, DX_BF16, DY_BF16, R_BF16  1: x, dx, dy, residual are bf16, 0: f32
//   STAGED  1: rows and weights lie in shared memory; 0: they are too long for that, and read twice
//   TILE    0: no cast; else as in quant/tile.cuh, with FORMAT and SCALE
// LAUNCH
//   As norm/rms_norm.cu; staged, dynamic shared memory: width floats, up to a bound of 128 bytes, `each` rows
//   of x_stride elements of x, then `each` of dy_stride of dy.
#include "norm/staged.cuh"
#if TILE
#include "quant/tile.cuh"
constexpr u32 CHUNK = TILE;
#else
constexpr u32 CHUNK = 128;
#endif

using X = Float<X_BF16>;
using DX = Float<DX_BF16>;
using DY = Float<DY_BF16>;
using R = Float<R_BF16>;

extern "C" __global__ void __launch_bounds__(1024)
    rms_norm_backward(const DY* __restrict__ dy, const X* __restrict__ x, const float* __restrict__ weight,
                      const float* __restrict__ rstd, const R* __restrict__ residual, DX* __restrict__ dx,
                      u8* __restrict__ q, float* __restrict__ scale, u32 rows, u32 columns, u32 offset,
                      u32 width, u32 x_stride, u32 dy_stride, u32 each, float amax_floor) {
    __shared__ float roots[MOST_ROWS], means[MOST_ROWS];
    const u32 warp = threadIdx.x / 32, warps = blockDim.x / 32;
    const u32 chunks = ceil_div(width, CHUNK);
#if STAGED
    extern __shared__ __align__(16) float weights[];
    X* const staged_x = (X*)(weights + ceil_div(width, 32u) * 32);
    DY* const staged_dy = (DY*)(staged_x + each * x_stride);
    for (u32 i = threadIdx.x; i < width; i += blockDim.x) weights[i] = weight[i];
#else
    const float* const weights = weight;
    x_stride = columns;
    dy_stride = width;
#endif
    for (u64 first = (u64)blockIdx.x * each; first < rows; first += (u64)gridDim.x * each) {
        const u32 here = rows - first < each ? (u32)(rows - first) : each;
        const X* kept_x = x + first * columns + offset;
        const DY* kept_dy = dy + first * width;
#if STAGED
        stage_rows(kept_x, (u64)columns, staged_x, x_stride, here, width);
        stage_rows(kept_dy, (u64)width, staged_dy, dy_stride, here, width);
        kept_x = staged_x;
        kept_dy = staged_dy;
#endif
        __syncthreads();
        if (warp < ceil_div(each, 2u)) {
            const u32 row = threadIdx.x / ROW_LANES;
            const X* own_x = kept_x + (u64)row * x_stride;
            const DY* own_dy = kept_dy + (u64)row * dy_stride;
            const float r = row < here ? rstd[first + row] : 0.0f;
            float dot = row_sum(row < here ? width : 0, [&](u32 i) {
                return __fmul_rn(__fmul_rn(load(own_dy + i), weights[i]), __fmul_rn(load(own_x + i), r));
            });
            if (half_warp_lane() == 0) {
                roots[row] = r;
                means[row] = __fdiv_rn(dot, (float)width);
            }
        }
        __syncthreads();
        for (u32 at = warp; at < here * chunks; at += warps) {
            const u32 row = at / chunks;
            const u32 begin = at % chunks * CHUNK;
            const u32 n = width - begin < CHUNK ? width - begin : CHUNK;
            const float r = roots[row], mean = means[row];
            const X* own_x = kept_x + (u64)row * x_stride + begin;
            const DY* own_dy = kept_dy + (u64)row * dy_stride + begin;
            const u64 to = (first + row) * width + begin;
            auto gradient = [&](u32 i) {
                float g = __fmul_rn(load(own_dy + i), weights[begin + i]);
                float h = __fmul_rn(load(own_x + i), r);
                float d = __fmul_rn(r, __fsub_rn(g, __fmul_rn(h, mean)));
                if (residual != nullptr) d = __fadd_rn(d, load(residual + to + i));
                DX v;
                store(&v, d);
                dx[to + i] = v;
                return load(&v);
            };
#if TILE
            u8* codes = q + (first + row) * code_bytes(width) + code_bytes(begin);
            cast_tile(n, amax_floor, codes, scale + (first + row) * chunks + at % chunks, gradient);
#else
#pragma unroll
            for (u32 i = threadIdx.x % 32; i < CHUNK; i += 32) {
                if (i < n) gradient(i);
            }
#endif
        }
        // The next rows take the place of these.
        __syncthreads();
    }
}
