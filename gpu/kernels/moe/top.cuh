// The largest of some values, largest first, ties to the lowest index, NaN last (reference/src/ops/router.rs,
// `top`): a warp takes the best that is left, again and again.
#ifndef FATHOM_MOE_TOP_CUH
#define FATHOM_MOE_TOP_CUH

#include "common/float.cuh"

// A number that orders as `top` does: 1 for NaN, then ascending, zeros of both signs alike; 0 is for what was
// taken.
FATHOM_DEVICE u32 order_of(float x) {
    if (x != x) return 1u;
    u32 bits = __float_as_uint(__fadd_rn(x, 0.0f));
    return bits >> 31 ? ~bits : bits | 0x80000000u;
}

constexpr u32 TAKEN = 0u;

// The index of the largest of order[0..n] with its order, the lowest of equals; all lanes of the warp take part
// and get it.
FATHOM_DEVICE u32 take_best(u32* order, u32 n) {
    u32 best = TAKEN, at = 0;
    for (u32 i = threadIdx.x % 32; i < n; i += 32) {
        if (order[i] > best) {
            best = order[i];
            at = i;
        }
    }
#pragma unroll
    for (u32 distance = 16; distance > 0; distance /= 2) {
        u32 other = __shfl_xor_sync(0xFFFFFFFFu, best, distance);
        u32 other_at = __shfl_xor_sync(0xFFFFFFFFu, at, distance);
        if (other > best || (other == best && other_at < at)) {
            best = other;
            at = other_at;
        }
    }
    __syncwarp();
    if (threadIdx.x % 32 == 0) order[at] = TAKEN;
    __syncwarp();
    return at;
}

#endif  // FATHOM_MOE_TOP_CUH
