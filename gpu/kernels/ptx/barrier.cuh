// mbarriers, named barriers, clusters and register hand-over (PTX ISA, "Parallel Synchronization").
// Shared-memory addresses are 32-bit, in the window of shared::cta.
#ifndef FATHOM_PTX_BARRIER_CUH
#define FATHOM_PTX_BARRIER_CUH

#include "common/types.cuh"

FATHOM_DEVICE u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

FATHOM_DEVICE void mbarrier_init(u32 barrier, u32 arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

// Makes the barriers' initial state visible to the cluster and to TMA.
FATHOM_DEVICE void mbarrier_init_fence() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// Arrives, and adds to the bytes that this phase waits for.
FATHOM_DEVICE void mbarrier_arrive_expect(u32 barrier, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
                 : "memory");
}

// Arrives at a barrier of this CTA.
FATHOM_DEVICE void mbarrier_arrive(u32 barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// The address in the cluster's window of what CTA `rank` has at `address`; linear in the address.
FATHOM_DEVICE u32 mapa(u32 address, u32 rank) {
    u32 remote;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(address), "r"(rank));
    return remote;
}

// Arrives at a barrier of the cluster (`mapa`). It says that this thread's reads are over and releases
// no writes to the other CTA: the scope is the default, the CTA, which costs no memory barrier.
FATHOM_DEVICE void mbarrier_arrive_cluster(u32 barrier) {
    asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// Waits until the phase of this parity is over, and sees what TMA wrote for it.
FATHOM_DEVICE void mbarrier_wait(u32 barrier, u32 parity) {
    u32 done;
    do {
        asm volatile(
            "{\n"
            ".reg .pred done;\n"
            "mbarrier.try_wait.parity.shared::cta.b64 done, [%1], %2;\n"
            "selp.u32 %0, 1, 0, done;\n"
            "}"
            : "=r"(done)
            : "r"(barrier), "r"(parity)
            : "memory");
    } while (!done);
}

// The threads that share barrier `id`; 0 is __syncthreads'.
FATHOM_DEVICE void named_barrier(u32 id, u32 threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

FATHOM_DEVICE u32 cluster_rank() {
    u32 rank;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}

FATHOM_DEVICE void cluster_sync() {
    asm volatile(
        "barrier.cluster.arrive.release.aligned;\n"
        "barrier.cluster.wait.acquire.aligned;" ::
            : "memory");
}

template <u32 REGISTERS>
FATHOM_DEVICE void registers_give() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

template <u32 REGISTERS>
FATHOM_DEVICE void registers_take() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

// Programmatic dependent launch; nothing where the launch does not ask for it.
FATHOM_DEVICE void wait_for_previous_grid() {
    asm volatile("griddepcontrol.wait;" ::: "memory");
}
FATHOM_DEVICE void let_next_grid_start() {
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}

#endif
