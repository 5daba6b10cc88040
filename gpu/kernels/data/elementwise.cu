// Ops that compute an element from the elements in its place, each to the bit its op of the reference
// (reference/src/ops/add.rs, cast.rs).
//
//   add   y = (a + b) + c, in f32, rounded once; c may be absent
//   cast  y = x in another element type, rounded once
//
// CONSTANTS
//   X_BF16, B_BF16, C_BF16, Y_BF16  1: that tensor is bf16, 0: f32 (x is a)
// LAUNCH
//   a thread an element.
#include "common/float.cuh"

using X = Float<X_BF16>;
using Y = Float<Y_BF16>;

extern "C" __global__ void cast(const X* __restrict__ x, Y* __restrict__ y, u64 n) {
    u64 i = thread_index();
    if (i < n) store(y + i, load(x + i));
}

#ifdef B_BF16
using B = Float<B_BF16>;
using C = Float<C_BF16>;

extern "C" __global__ void add(const X* __restrict__ a, const B* __restrict__ b,
                               const C* __restrict__ c, Y* __restrict__ y, u64 n) {
    u64 i = thread_index();
    if (i >= n) return;
    float sum = __fadd_rn(load(a + i), load(b + i));
    if (c != nullptr) sum = __fadd_rn(sum, load(c + i));
    store(y + i, sum);
}
#endif
