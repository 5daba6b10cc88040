// SwiGLU of x[rows, 2 i], gate beside up, with an optional weight a row, and its gradient, to the bit the ops
// swiglu and swiglu_backward of the reference (reference/src/ops/swiglu.rs). With z = sigmoid(g):
//
//   forward   y = ((g z) u) w
//   backward  d = dy w; du = d (g z); dg = (d u) (z (1 + g (1 - z))); dw = sum(dy ((g z) u))
//
// CONSTANTS
//   X_BF16, Y_BF16, DY_BF16  1: x, y (or dx), dy are bf16, 0: f32
// LAUNCH
//   swiglu: a thread an element of y. swiglu_backward: half a warp a row, 256 threads.
#include "common/float.cuh"
#include "common/lanes.cuh"

using X = Float<X_BF16>;
using Y = Float<Y_BF16>;
using DY = Float<DY_BF16>;

extern "C" __global__ void swiglu(const X* __restrict__ x, const float* __restrict__ weight,
                                  Y* __restrict__ y, u64 n, u32 columns) {
    u64 at = thread_index();
    if (at >= n) return;
    u64 row = at / columns;
    const X* g = x + row * 2 * columns + at % columns;
    float gate = load(g);
    float up = load(g + columns);
    float w = weight == nullptr ? 1.0f : weight[row];
    store(y + at, __fmul_rn(__fmul_rn(__fmul_rn(gate, fathom_sigmoid(gate)), up), w));
}

extern "C" __global__ void __launch_bounds__(256)
    swiglu_backward(const DY* __restrict__ dy, const X* __restrict__ x, const float* __restrict__ weight,
                    Y* __restrict__ dx, float* __restrict__ dweight, u32 rows, u32 columns) {
    const u64 row = half_warp_row();
    const u32 n = row < rows ? columns : 0;
    x += row * 2 * columns;
    dx += row * 2 * columns;
    dy += row * columns;
    float w = weight == nullptr || row >= rows ? 1.0f : weight[row];
    float sum = row_sum(n, [&](u32 i) {
        float g = load(x + i), u = load(x + columns + i), d = load(dy + i);
        float z = fathom_sigmoid(g);
        float scaled = __fmul_rn(d, w);
        float gz = __fmul_rn(g, z);
        store(dx + columns + i, __fmul_rn(scaled, gz));
        float slope = __fadd_rn(1.0f, __fmul_rn(g, __fsub_rn(1.0f, z)));
        store(dx + i, __fmul_rn(__fmul_rn(scaled, u), __fmul_rn(z, slope)));
        return __fmul_rn(d, __fmul_rn(gz, u));
    });
    if (weight != nullptr && row < rows && half_warp_lane() == 0) store(dweight + row, sum);
}
