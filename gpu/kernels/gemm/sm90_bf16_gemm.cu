// d = a b (+ c) on BF16, to the bit the ops gemm and grouped_gemm of the reference: every element is one chain
// of the tensor core's steps over k, from +0 or from c, in groups of 16 that start anew with each range of
// k; the result is rounded to D's type once.
//
// CONSTANTS
//   LAYOUT    0 nt: a[m, k] b[n, k];  1 nn: a[m, k] b[k, n];  2 tn: a[k, m] b[k, n]
//   GROUPING  what `bounds` bound (gemm/work.cuh); DEPTH of several ranges and GROUP_DEPTH go with tn,
//             GROUP_ROWS with nt and nn
//   OUT_BF16  1: d is bf16, 0: d is f32
//   STAGES    of the pipeline; a stage is 32,768 bytes
// LAUNCH
//   384 threads, SHARED_BYTES below, a CTA for every 128 x 128 of every d.
// TENSOR MAPS (bf16, innermost dimension first, 128-byte swizzle)
//   a   nt, nn: [k, m], box 64 x 128;  tn: [m, k], box 64 x 64
//   b   nt: [k, n, all experts one below the other], box 64 x 128;  nn, tn: [n, k, likewise], box 64 x 64
// NOTES
// - Operands lie in shared memory as they do in global memory: wgmma reads those whose rows run along k
//   K-major, the others MN-major.
// - What a block of k has behind the end of its range must be zeros in both operands, since the exponent of
//   zero times a large number counts (docs/numerics.md, 3). Behind the end of the tensor TMA fills in
//   zeros; elsewhere the consumers do. Only MN-major operands go on there.
// - c is null or of d's shape; it may be d where d is f32.
#include "common/float.cuh"
#include "common/types.cuh"
#include "gemm/ring.cuh"
#include "gemm/work.cuh"
#include "mma/wgmma.cuh"
#include "ptx/barrier.cuh"
#include "ptx/tma.cuh"

constexpr bool A_MN = LAYOUT == 2;
constexpr bool B_MN = LAYOUT != 0;

constexpr u32 BLOCK = 128;  // of M and N
constexpr u32 BLOCK_K = 64;
constexpr u32 WARPGROUP = 128;
constexpr u32 CONSUMERS = 2;

constexpr u32 BOX_BYTES = 64 * 128;  // 64 rows of 128 bytes
constexpr u32 OPERAND_BYTES = 2 * BOX_BYTES;
constexpr u32 STAGE_BYTES = 2 * OPERAND_BYTES;
constexpr u32 FULL_AT = STAGES * STAGE_BYTES;
constexpr u32 EMPTY_AT = FULL_AT + STAGES * 8;
constexpr u32 SHARED_BYTES = EMPTY_AT + STAGES * 8;
static_assert(SHARED_BYTES <= 227 * 1024, "too many stages");

// 16 of k further along an operand, in units of its descriptor.
constexpr u32 STEP_K_MAJOR = 32 / 16;
constexpr u32 STEP_MN_MAJOR = 16 * 128 / 16;

// The ranges of k of this CTA's tile: of experts' rows it is all of k, or nothing.
struct Ranges {
    const int* bounds;
    u32 first, end;
    bool whole;
    u32 k;
    __device__ __forceinline__ u32 from(u32 part) const { return whole ? 0 : bounds[part]; }
    __device__ __forceinline__ u32 to(u32 part) const { return whole ? k : bounds[part + 1]; }
};

// 128 of M or N by 64 of k, into the operand's place of a stage.
template <bool MN>
FATHOM_DEVICE void load_operand(u32 to, const TensorMap* map, u32 mn, u32 k, u32 full) {
    if (MN) {
        tma_load(to, map, mn, k, full);
        tma_load(to + BOX_BYTES, map, mn + 64, k, full);
    } else {
        tma_load(to, map, k, mn, full);
    }
}

// One thread: fills the stages as they become free. b_mn and b_k are where this expert's b starts.
FATHOM_DEVICE void produce(u32 shared, const TensorMap* a, const TensorMap* b, const Work& work,
                           const Ranges& ranges, u32 b_mn, u32 b_k) {
    Ring ring;
    for (u32 part = ranges.first; part < ranges.end; part++) {
        for (u32 k = ranges.from(part); k < ranges.to(part); k += BLOCK_K) {
            const u32 full = shared + FULL_AT + ring.stage * 8;
            const u32 stage = shared + ring.stage * STAGE_BYTES;
            mbarrier_wait(shared + EMPTY_AT + ring.stage * 8, ring.parity ^ 1);
            mbarrier_arrive_expect(full, STAGE_BYTES);
            load_operand<A_MN>(stage, a, work.row, k, full);
            load_operand<B_MN>(stage + OPERAND_BYTES, b, work.column + b_mn, k + b_k, full);
            ring.advance();
        }
    }
}

// Zeros in the rows of an MN-major operand from `depth` on: this warpgroup's box of it.
FATHOM_DEVICE void clear_behind(u32 operand, u32 warpgroup, u32 depth) {
    const u32 box = operand + warpgroup * BOX_BYTES;
    for (u32 at = depth * 128 + threadIdx.x % WARPGROUP * 16; at < BOX_BYTES; at += WARPGROUP * 16) {
        asm volatile("st.shared.v4.u32 [%0], {%1, %1, %1, %1};" ::"r"(box + at), "r"(0) : "memory");
    }
}

// One block of k of a warpgroup.
FATHOM_DEVICE void accumulate(float (&sum)[64], u32 shared, const Ring& ring, u32 warpgroup, u32 depth) {
    const u32 stage = shared + ring.stage * STAGE_BYTES;
    mbarrier_wait(shared + FULL_AT + ring.stage * 8, ring.parity);
    if (B_MN && depth < BLOCK_K) {
        if (A_MN) clear_behind(stage, warpgroup, depth);
        clear_behind(stage + OPERAND_BYTES, warpgroup, depth);
        fence_async_shared();
        named_barrier(1, CONSUMERS * WARPGROUP);
    }
    u32 a = wgmma_descriptor_low(stage + warpgroup * BOX_BYTES);
    u32 b = wgmma_descriptor_low<BOX_BYTES>(stage + OPERAND_BYTES);
    wgmma_pin(sum);
    wgmma_fence();
#pragma unroll
    for (u32 step = 0; step < BLOCK_K / 16; step++) {
        wgmma_m64n128k16_bf16<A_MN, B_MN>(sum, a + step * (A_MN ? STEP_MN_MAJOR : STEP_K_MAJOR),
                                          b + step * (B_MN ? STEP_MN_MAJOR : STEP_K_MAJOR));
    }
    wgmma_commit();
    wgmma_wait(sum);
    if (threadIdx.x % WARPGROUP == 0) mbarrier_arrive(shared + EMPTY_AT + ring.stage * 8);
}

extern "C" __global__ void __launch_bounds__(384, 1)
    bf16_gemm(const __grid_constant__ TensorMap map_a, const __grid_constant__ TensorMap map_b,
              const float* c, void* d, const int* __restrict__ bounds, u32 groups, u32 m, u32 n, u32 k) {
    extern __shared__ __align__(1024) u8 memory[];
    const u32 shared = shared_address(memory);
    const u32 warpgroup = __shfl_sync(0xFFFFFFFFu, threadIdx.x / WARPGROUP, 0);
    const Work work = work_of<BLOCK, BLOCK>(bounds, groups, m, n);
    const bool whole = GROUPING == GROUP_ROWS;
    const Ranges ranges = {bounds, whole ? 0 : work.part, whole ? !work.empty : work.end_part, whole, k};

    if (threadIdx.x == 0) {
        tma_prefetch(&map_a);
        tma_prefetch(&map_b);
        for (u32 stage = 0; stage < STAGES; stage++) {
            mbarrier_init(shared + FULL_AT + stage * 8, 1);
            mbarrier_init(shared + EMPTY_AT + stage * 8, CONSUMERS);
        }
        mbarrier_init_fence();
    }
    __syncthreads();

    if (warpgroup == CONSUMERS) {
        registers_give<40>();
        const u32 expert = whole ? work.group : 0;
        if (threadIdx.x == CONSUMERS * WARPGROUP) {
            produce(shared, &map_a, &map_b, work, ranges, B_MN ? 0 : expert * n, B_MN ? expert * k : 0);
        }
        return;
    }
    registers_take<232>();
    const u32 thread = threadIdx.x % WARPGROUP;
    const u32 row = work.row + warpgroup * 64 + thread / 32 * 16 + thread % 32 / 4;
    const u32 column = work.column + thread % 4 * 2;
    const u64 out = (GROUPING == GROUP_DEPTH ? (u64)work.group * m * n : 0) + (u64)row * n + column;

    float sum[64] = {};
    if (c) {
#pragma unroll
        for (u32 j = 0; j < 64; j++) {
            const u32 down = j / 2 % 2 * 8, right = j / 4 * 8 + j % 2;
            const bool there = row + down < work.end_row && column + right < n;
            if (there) sum[j] = c[out + (u64)down * n + right];
        }
    }
    Ring ring;
    for (u32 part = ranges.first; part < ranges.end; part++) {
        for (u32 at = ranges.from(part); at < ranges.to(part); at += BLOCK_K) {
            accumulate(sum, shared, ring, warpgroup, ranges.to(part) - at);
            ring.advance();
        }
    }
#pragma unroll
    for (u32 j = 0; j < 64; j++) {
        const u32 down = j / 2 % 2 * 8, right = j / 4 * 8 + j % 2;
        const bool there = row + down < work.end_row && column + right < n;
        if (there) store((Float<OUT_BF16>*)d + out + (u64)down * n + right, sum[j]);
    }
}
