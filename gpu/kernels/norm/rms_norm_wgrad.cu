// The gradient of RMSNorm's weight, of columns offset .. offset + width of every row of x, to the bit the op
// rms_norm_wgrad of the reference (reference/src/ops/rms_norm.rs):
//
//   dw_i = dw_i + dy_i (x_i r), row after row
//
// CONSTANTS
//   X_BF16, DY_BF16  1: x, dy are bf16, 0: f32
// LAUNCH
//   a thread a column, which walks the rows, so that the order of additions is theirs.
#include "common/float.cuh"

using X = Float<X_BF16>;
using DY = Float<DY_BF16>;

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
