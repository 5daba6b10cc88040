// Reductions in fixed order: the trees of fathom_numerics::reduce (reference/numerics/src/reduce.rs),
// to the bit. A NaN sum is 0x7FFFFFFF.
//
// NOTES
// - All threads of the warp or CTA take part; a lane without elements brings +0. Every lane gets the
//   result.
// - The butterfly gives every lane the same bits, because IEEE addition is commutative.
// - Maxima need no tree: fmaxf is associative and commutative (a NaN loses, +0 is above -0), so
//   shuffles in any order give reduce::max_num.
#ifndef FATHOM_COMMON_REDUCE_CUH
#define FATHOM_COMMON_REDUCE_CUH

#include "common/elementary.cuh"

// tree_sum over WIDTH neighbouring lanes, WIDTH a power of two of at most 32; NaN not yet canonical.
template <int WIDTH>
FATHOM_FN float fathom_butterfly(float v) {
    static_assert(WIDTH >= 1 && WIDTH <= 32 && (WIDTH & (WIDTH - 1)) == 0,
                  "a butterfly spans a power of two of the lanes of a warp");
#pragma unroll
    for (int offset = WIDTH / 2; offset > 0; offset /= 2) {
        v = __fadd_rn(v, __shfl_xor_sync(0xFFFFFFFFu, v, offset));
    }
    return v;
}

// RowTree::WARP's tree: the sum over the lanes of a warp.
FATHOM_FN float fathom_warp_sum(float v) {
    v = fathom_butterfly<32>(v);
    return fathom_nan_if(v != v, v);
}

// RowTree::cta(THREADS)'s trees: in each warp, then over the warps. `scratch` holds THREADS / 32
// floats in shared memory and is free again on return.
template <int THREADS>
FATHOM_FN float fathom_cta_sum(float v, float* scratch) {
    static_assert(THREADS >= 32 && THREADS <= 1024 && (THREADS & (THREADS - 1)) == 0,
                  "a CTA's tree has a power of two of threads, whole warps");
    v = fathom_butterfly<32>(v);
    if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = v;
    __syncthreads();
    v = scratch[threadIdx.x % (THREADS / 32)];
    __syncthreads();
    v = fathom_butterfly<THREADS / 32>(v);
    return fathom_nan_if(v != v, v);
}

// What lane `lane` of LANES adds up of a row, with loads of VECTOR elements: element i belongs to
// lane (i / VECTOR) % LANES, ascending from +0. The loads are the caller's to widen.
template <int LANES, int VECTOR>
FATHOM_FN float fathom_lane_sum(const float* row, int length, int lane) {
    float sum = 0.0f;
    for (int start = lane * VECTOR; start < length; start += LANES * VECTOR) {
#pragma unroll
        for (int i = start; i < start + VECTOR; i++) {
            if (i < length) sum = __fadd_rn(sum, row[i]);
        }
    }
    return sum;
}

// reduce::max_num over the lanes of a warp.
FATHOM_FN float fathom_warp_max(float v) {
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) {
        v = fmaxf(v, __shfl_xor_sync(0xFFFFFFFFu, v, offset));
    }
    return v;
}

#endif  // FATHOM_COMMON_REDUCE_CUH
