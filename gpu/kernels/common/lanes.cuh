// The reference's tree over a row (reference/src/op/compute_type.rs, `tree_sum`): 16 lanes, element i belongs to
// lane i mod 16 and is added in ascending order from +0, then the halving tree over the lanes. Half a warp
// takes a row, so a warp takes two.
#ifndef FATHOM_COMMON_LANES_CUH
#define FATHOM_COMMON_LANES_CUH

#include "common/reduce.cuh"
#include "common/types.cuh"

constexpr u32 ROW_LANES = 16;

// The row of this half warp, and the lane in it.
FATHOM_DEVICE u64 half_warp_row() {
    return ((u64)blockIdx.x * blockDim.x + threadIdx.x) / ROW_LANES;
}

FATHOM_DEVICE u32 half_warp_lane() { return threadIdx.x % ROW_LANES; }

// The tree over what the lanes of each half warp hold. All lanes of the warp take part.
FATHOM_DEVICE float lanes_sum(float v) {
    v = fathom_butterfly<ROW_LANES>(v);
    return fathom_nan_if(v != v, v);
}

// The largest that the lanes of each half warp hold; a NaN loses against a number.
FATHOM_DEVICE float lanes_max(float v) {
#pragma unroll
    for (int offset = ROW_LANES / 2; offset > 0; offset /= 2) {
        v = fmaxf(v, __shfl_xor_sync(0xFFFFFFFFu, v, offset));
    }
    return v;
}

// The tree over term(i), i < n.
template <typename F>
FATHOM_DEVICE float row_sum(u32 n, F term) {
    float sum = 0.0f;
    for (u32 i = half_warp_lane(); i < n; i += ROW_LANES) sum = __fadd_rn(sum, term(i));
    return lanes_sum(sum);
}

#endif  // FATHOM_COMMON_LANES_CUH
