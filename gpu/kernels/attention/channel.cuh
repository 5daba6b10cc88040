// What passes through the ring of stages of an attention kernel: blocks of 64 rows that the producer's thread
// loads by TMA and the consumers' warps read.
#ifndef FATHOM_ATTENTION_CHANNEL_CUH
#define FATHOM_ATTENTION_CHANNEL_CUH

#include "common/types.cuh"
#include "gemm/ring.cuh"
#include "ptx/barrier.cuh"

// Addresses of stage 0, the others behind it: who fills a stage arrives at `full`, who has read it at `empty`.
struct Channel {
    u32 data, bytes;
    u32 full, empty;

    __device__ __forceinline__ u32 at(const Ring& ring) const { return data + ring.stage * bytes; }

    // By one thread; `warps` read each stage.
    __device__ __forceinline__ void init(u32 warps) const {
        for (u32 stage = 0; stage < STAGES; stage++) {
            mbarrier_init(full + stage * 8, 1);
            mbarrier_init(empty + stage * 8, warps);
        }
    }

    // The producer waits until the stage is free and announces what comes: gives where it arrives.
    __device__ __forceinline__ u32 fill(const Ring& ring, u32 announced) const {
        mbarrier_wait(empty + ring.stage * 8, ring.parity ^ 1);
        mbarrier_arrive_expect(full + ring.stage * 8, announced);
        return full + ring.stage * 8;
    }

    // A consumer waits until the stage is full.
    __device__ __forceinline__ void wait(const Ring& ring) const {
        mbarrier_wait(full + ring.stage * 8, ring.parity);
    }

    // A consumer's warp has read the stage.
    __device__ __forceinline__ void leave(const Ring& ring) const {
        __syncwarp();
        if (threadIdx.x % 32 == 0) mbarrier_arrive(empty + ring.stage * 8);
    }
};

#endif
