// What the kernels of attention_backward share (the op of the reference): probabilities and their gradients
// from scores.
#ifndef FATHOM_ATTENTION_BACKWARD_CUH
#define FATHOM_ATTENTION_BACKWARD_CUH

#include "attention/block.cuh"
#include "common/elementary.cuh"
#include "common/types.cuh"

// p = exp(s scale - lse)
FATHOM_DEVICE float probability(float s, float scale, float lse) {
    return fathom_exp(__fsub_rn(__fmul_rn(s, scale), lse));
}

// ds = p (dp - delta) scale
FATHOM_DEVICE float score_gradient(float p, float dp, float delta, float scale) {
    return __fmul_rn(__fmul_rn(p, __fsub_rn(dp, delta)), scale);
}

// The first block of queries that sees a key.
FATHOM_DEVICE u32 first_query(const Segment& segment, u32 key) {
    return key <= segment.before() ? 0 : (key - segment.before()) / BLOCK_Q * BLOCK_Q;
}

#endif
