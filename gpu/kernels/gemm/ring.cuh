// The ring of shared-memory stages through which a producer warp hands operands to the warpgroups
// that multiply. The constant STAGES is its length; a kernel has a pair of mbarriers a stage, full
// and empty.
#ifndef FATHOM_GEMM_RING_CUH
#define FATHOM_GEMM_RING_CUH

#include "common/types.cuh"

// A position in the ring of stages, with the parity of its round.
struct Ring {
    u32 stage = 0, parity = 0;
    __device__ __forceinline__ void advance() {
        stage += 1;
        if (stage == STAGES) {
            stage = 0;
            parity ^= 1;
        }
    }
};

#endif
