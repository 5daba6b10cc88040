// wgmma with sums in FP32 (PTX ISA, "Asynchronous Warpgroup Level Matrix Instructions"): operands of E4M3
// and E5M2 (k = 32) and BF16 (k = 16), in shared memory, or A in registers.
//
// Thread t of the warpgroup holds, of d[64, N] and for j in 0..N / 8, columns 8j + 2(t % 4) + {0, 1} of row
// t / 32 * 16 + t % 32 / 4 in d[4j], d[4j + 1], and of that row + 8 in d[4j + 2], d[4j + 3].
#ifndef FATHOM_MMA_WGMMA_CUH
#define FATHOM_MMA_WGMMA_CUH

#include "common/types.cuh"

// Operands lie in boxes of 128-byte rows under the 128-byte swizzle; 8 rows are 1024 bytes, and the next 8
// follow. K-major: a row is 128 bytes along K. MN-major (BF16): a row is 64 elements along M or N of one k,
// and the next 64 lie LEADING bytes further. Bits 0-13 address / 16, 16-29 leading / 16, 32-45 stride / 16,
// 62-63 swizzle (1: 128 bytes). The upper half is the same for all operands; in the lower half addresses
// below 256 KiB add without carry: 32 bytes further along K of a K-major operand is 2 more, 16 rows
// further along K of an MN-major one 128.
template <u32 LEADING>
FATHOM_DEVICE u32 wgmma_descriptor_low(u32 address) {
    return (LEADING / 16) << 16 | (address & 0x3FFFF) >> 4;
}
// K-major operands do not use the leading offset.
FATHOM_DEVICE u32 wgmma_descriptor_low(u32 address) { return wgmma_descriptor_low<16>(address); }
FATHOM_DEVICE u64 wgmma_descriptor(u32 low) { return ((u64)(1u << 30 | 1024 >> 4) << 32) | low; }

FATHOM_DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
FATHOM_DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

#define FATHOM_SUMS_8(d, i)                                                                       \
    "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]),   \
        "+f"(d[i + 6]), "+f"(d[i + 7])
#define FATHOM_SUMS_32(d, i)                                                                      \
    FATHOM_SUMS_8(d, i), FATHOM_SUMS_8(d, i + 8), FATHOM_SUMS_8(d, i + 16), FATHOM_SUMS_8(d, i + 24)
#define FATHOM_NAMES_32                                                                           \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, "   \
    "%20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define FATHOM_NAMES_64                                                                           \
    FATHOM_NAMES_32                                                                               \
    ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, " \
    "%50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"

// name(d, a, b): d[64, 128] = a b^T, plus d unless FROM_ZERO, on FP8; a and b are lower halves of descriptors.
#define FATHOM_WGMMA_FP8(name, types)                                                             \
    template <bool FROM_ZERO>                                                                     \
    FATHOM_DEVICE void name(float (&d)[64], u32 a, u32 b) {                                       \
        asm volatile(                                                                             \
            "{\n"                                                                                 \
            ".reg .pred add;\n"                                                                   \
            "setp.ne.b32 add, %66, 0;\n"                                                          \
            "wgmma.mma_async.sync.aligned.m64n128k32.f32." types " {" FATHOM_NAMES_64             \
            "}, %64, %65, add, 1, 1;\n"                                                           \
            "}"                                                                                   \
            : FATHOM_SUMS_32(d, 0), FATHOM_SUMS_32(d, 32)                                         \
            : "l"(wgmma_descriptor(a)), "l"(wgmma_descriptor(b)), "n"(FROM_ZERO ? 0 : 1));        \
    }

FATHOM_WGMMA_FP8(wgmma_m64n128k32_e4m3, "e4m3.e4m3")
FATHOM_WGMMA_FP8(wgmma_m64n128k32_e4m3_e5m2, "e4m3.e5m2")
FATHOM_WGMMA_FP8(wgmma_m64n128k32_e5m2_e4m3, "e5m2.e4m3")
FATHOM_WGMMA_FP8(wgmma_m64n128k32_e5m2, "e5m2.e5m2")

// d[64, 128] += a b^T on BF16; an operand is MN-major where its flag is set.
template <bool A_MN, bool B_MN>
FATHOM_DEVICE void wgmma_m64n128k16_bf16(float (&d)[64], u32 a, u32 b) {
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {" FATHOM_NAMES_64
        "}, %64, %65, 1, 1, 1, %66, %67;"
        : FATHOM_SUMS_32(d, 0), FATHOM_SUMS_32(d, 32)
        : "l"(wgmma_descriptor(a)), "l"(wgmma_descriptor(b)), "n"(A_MN ? 1 : 0), "n"(B_MN ? 1 : 0));
}

// d[64, 64] = a b^T, plus d unless FROM_ZERO, on BF16, both K-major.
template <bool FROM_ZERO>
FATHOM_DEVICE void wgmma_m64n64k16_bf16(float (&d)[32], u32 a, u32 b) {
    asm volatile(
        "{\n"
        ".reg .pred add;\n"
        "setp.ne.b32 add, %34, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {" FATHOM_NAMES_32
        "}, %32, %33, add, 1, 1, 0, 0;\n"
        "}"
        : FATHOM_SUMS_32(d, 0)
        : "l"(wgmma_descriptor(a)), "l"(wgmma_descriptor(b)), "n"(FROM_ZERO ? 0 : 1));
}

// d[64, 64] += a b on BF16, a in registers (as columns 16s .. 16s + 15 of a d of 64 columns lie, in
// pairs: d[8s], d[8s + 1]; d[8s + 2], d[8s + 3]; ...), b MN-major: 64 columns, 16 rows of k.
FATHOM_DEVICE void wgmma_m64n64k16_bf16(float (&d)[32], const u32* a, u32 b) {
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {" FATHOM_NAMES_32
        "}, {%32, %33, %34, %35}, %36, 1, 1, 1, 1;"
        : FATHOM_SUMS_32(d, 0)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(wgmma_descriptor(b)));
}

// Keeps writes of sums and of an operand in registers in front of the wgmma_fence that follows.
FATHOM_DEVICE void wgmma_pin(float (&d)[64]) {
    asm volatile("" : FATHOM_SUMS_32(d, 0), FATHOM_SUMS_32(d, 32) : : "memory");
}
FATHOM_DEVICE void wgmma_pin(float (&d)[32]) { asm volatile("" : FATHOM_SUMS_32(d, 0) : : "memory"); }
FATHOM_DEVICE void wgmma_pin(u32 (&a)[16]) {
#pragma unroll
    for (u32 i = 0; i < 16; i++) asm volatile("" : "+r"(a[i]) : : "memory");
}

// Waits for all of this warpgroup's groups; the sums cannot be read before.
FATHOM_DEVICE void wgmma_wait(float (&d)[64]) {
    asm volatile("wgmma.wait_group.sync.aligned 0;"
                 : FATHOM_SUMS_32(d, 0), FATHOM_SUMS_32(d, 32)
                 :
                 : "memory");
}

// Waits until only the last LEFT groups are not done; the sums of one before cannot be read earlier.
template <u32 LEFT>
FATHOM_DEVICE void wgmma_wait(float (&d)[32]) {
    asm volatile("wgmma.wait_group.sync.aligned %32;" : FATHOM_SUMS_32(d, 0) : "n"(LEFT) : "memory");
}
template <u32 LEFT, u32 BOXES>
FATHOM_DEVICE void wgmma_wait(float (&d)[BOXES][32]) {
    wgmma_wait<LEFT>(d[0]);
#pragma unroll
    for (u32 box = 1; box < BOXES; box++) wgmma_pin(d[box]);
}

#endif
