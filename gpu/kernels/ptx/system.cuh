// Words by which devices tell each other how far they are (PTX ISA, "Memory Consistency Model"): a release
// and the acquire that reads it order what stands before the one before what stands behind the other, on
// whichever device.
#ifndef FATHOM_PTX_SYSTEM_CUH
#define FATHOM_PTX_SYSTEM_CUH

#include "common/types.cuh"

FATHOM_DEVICE void store_release_system(u64* at, u64 value) {
    asm volatile("st.release.sys.global.u64 [%0], %1;" ::"l"(at), "l"(value) : "memory");
}

FATHOM_DEVICE u64 load_acquire_system(const u64* at) {
    u64 value;
    asm volatile("ld.acquire.sys.global.u64 %0, [%1];" : "=l"(value) : "l"(at) : "memory");
    return value;
}

#endif
