// The gradients of RMSNorm of columns offset .. offset + width of every row of x, to the bit the ops
// rms_norm_backward and rms_norm_wgrad of the reference (reference/src/ops/rms_norm.rs).
//
//   backward  m = sum((dy_i w_i) (x_i r)) / width; dx_i = r (dy_i w_i - (x_i r) m), plus residual_i
//   wgrad     dw_i = dw_i + dy_i (x_i r), row after row
//
// CONSTANTS
//   X_BF16, DX_BF16, DY_BF16, R_BF16  1: x, dx, dy, residual are bf16, 0: f32
// LAUNCH
//   rms_norm_backward: half a warp a row, 256 threads. rms_norm_wgrad: a thread a column, which walks the rows,
//   so that the order of additions is theirs.
#include "common/float.cuh"
#include "common/lanes.cuh"

using X = Float<X_BF16>;
using DX = Float<DX_BF16>;
using DY = Float<DY_BF16>;
using R = Float<R_BF16>;

extern "C" __global__ void __launch_bounds__(256)
    rms_norm_backward(const DY* __restrict__ dy, const X* __restrict__ x, const float* __restrict__ weight,
                      const float* __restrict__ rstd, const R* __restrict__ residual, DX* __restrict__ dx,
                      u32 rows, u32 columns, u32 offset, u32 width) {
    const u64 row = half_warp_row();
    const u32 n = row < rows ? width : 0;
    const float r = row < rows ? rstd[row] : 0.0f;
    x += row * columns + offset;
    dy += row * width;
    float dot = row_sum(n, [&](u32 i) {
        return __fmul_rn(__fmul_rn(load(dy + i), weight[i]), __fmul_rn(load(x + i), r));
    });
    float mean = __fdiv_rn(dot, (float)width);
    for (u32 i = half_warp_lane(); i < n; i += ROW_LANES) {
        float g = __fmul_rn(load(dy + i), weight[i]);
        float h = __fmul_rn(load(x + i), r);
        float d = __fmul_rn(r, __fsub_rn(g, __fmul_rn(h, mean)));
        if (residual != nullptr) d = __fadd_rn(d, load(residual + row * width + i));
        store(dx + row * width + i, d);
    }
}

extern "C" __global__ void __launch_bounds__(256)
    rms_norm_wgrad(const DY* __restrict__ dy, const X* __restrict__ x, const float* __restrict__ rstd,
                   float* dw, u32 rows, u32 columns, u32 offset, u32 width) {
    u32 i = (u32)thread_index();
    if (i >= width) return;
    float sum = dw[i];
    for (u64 row = 0; row < rows; row++) {
        float h = __fmul_rn(load(x + row * columns + offset + i), rstd[row]);
        sum = __fadd_rn(sum, __fmul_rn(load(dy + row * width + i), h));
    }
    store(dw + i, sum);
}
