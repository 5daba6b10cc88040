// Copies of boxes between global and shared memory by tensor map (PTX ISA, "cp.async.bulk.tensor").
// x is the innermost coordinate, in elements. What lies outside the tensor reads as zero and is
// not written; a load completes with the bytes of the whole box all the same.
#ifndef FATHOM_PTX_TMA_CUH
#define FATHOM_PTX_TMA_CUH

#include "common/types.cuh"

// CUtensorMap, opaque.
struct alignas(64) TensorMap {
    u64 words[16];
};

FATHOM_DEVICE void tma_prefetch(const TensorMap* map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

FATHOM_DEVICE void tma_load(u32 to, const TensorMap* map, u32 x, u32 y, u32 barrier) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
        " [%0], [%1, {%2, %3}], [%4];" ::"r"(to),
        "l"(map), "r"(x), "r"(y), "r"(barrier)
        : "memory");
}

// A box of three dimensions.
FATHOM_DEVICE void tma_load(u32 to, const TensorMap* map, u32 x, u32 y, u32 z, u32 barrier) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes"
        " [%0], [%1, {%2, %3, %4}], [%5];" ::"r"(to),
        "l"(map), "r"(x), "r"(y), "r"(z), "r"(barrier)
        : "memory");
}

// A box of two into every CTA of the cluster whose bit is set, at the same offsets in each.
FATHOM_DEVICE void tma_load_multicast(u32 to, const TensorMap* map, u32 x, u32 y, u32 barrier,
                                      u16 ctas) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
        ".multicast::cluster [%0], [%1, {%2, %3}], [%4], %5;" ::"r"(to),
        "l"(map), "r"(x), "r"(y), "r"(barrier), "h"(ctas)
        : "memory");
}

FATHOM_DEVICE void tma_store(const TensorMap* map, u32 x, u32 y, u32 from) {
    asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%1, %2}], [%3];" ::"l"(map),
                 "r"(x), "r"(y), "r"(from)
                 : "memory");
}

FATHOM_DEVICE void tma_store_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }

// Waits until this thread's stores have read shared memory.
FATHOM_DEVICE void tma_store_wait_read() {
    asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
}

// Waits until this thread's stores are done.
FATHOM_DEVICE void tma_store_wait() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }

// Orders this thread's writes to shared memory before later reads by TMA.
FATHOM_DEVICE void fence_async_shared() {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

#endif
