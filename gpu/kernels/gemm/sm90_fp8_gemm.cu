// d = a[m, k] b[n, k]^T (+ c) on FP8 with scales of any block along the rows, to the bit the ops gemm_fp8,
// grouped_gemm_fp8 and wgrad_fp8 of the reference (docs/numerics.md, 5). For every element and every
// promotion interval of a range of k, ascending:
//
//   partial = the tensor core's steps of 32 over the interval, from zero
//   s       = scale_a * scale_b, rounded once
//   acc     = fma(s, partial, acc)
//
// CONSTANTS
//   GROUPING        what `bounds` bound (gemm/work.cuh)
//   A_E5M2, B_E5M2  1: codes are E5M2, 0: E4M3
//   A_ROWS, B_ROWS  rows that share a scale; 0: all
//   A_DEPTH, B_DEPTH  of k that shares a scale, a multiple of the interval; 0: all of a range
//   INTERVAL        of promotion, a multiple of 128; 0: a whole range
//   ACCUMULATE      0: acc starts from +0; 1: from c; 2: from +0, and c is added at the end
//   OUT_BF16        1: d is bf16, 0: d is f32
//   STAGES          of the pipeline; a stage is 32,768 bytes
// LAUNCH
//   384 threads, SHARED_BYTES below, a CTA for every 128 x 128 of every d.
// TENSOR MAPS (u8, innermost dimension first, 128-byte swizzle, boxes 128 x 128)
//   a   [k, m]
//   b   [k, n, all experts one below the other]
// ARGUMENTS
//   bounds     ends with the columns of scale_a, then of scale_b, at which each range of k begins
//   scale_a, scale_b   one row of columns for each block of rows; scale_b of all experts one below the other
//   c          not read where ACCUMULATE is 0; it may be d where d is f32
// NOTES
// - What a block of k has behind the end of its range are zeros in both operands: zero times NaN is NaN.
#include "common/float.cuh"
#include "common/types.cuh"
#include "gemm/ring.cuh"
#include "gemm/work.cuh"
#include "mma/wgmma.cuh"
#include "ptx/barrier.cuh"
#include "ptx/tma.cuh"

constexpr u32 BLOCK = 128;  // of M, N and K
constexpr u32 WARPGROUP = 128;
constexpr u32 CONSUMERS = 2;

constexpr u32 OPERAND_BYTES = BLOCK * BLOCK;
constexpr u32 STAGE_BYTES = 2 * OPERAND_BYTES;
constexpr u32 FULL_AT = STAGES * STAGE_BYTES;
constexpr u32 EMPTY_AT = FULL_AT + STAGES * 8;
constexpr u32 SHARED_BYTES = EMPTY_AT + STAGES * 8;
static_assert(SHARED_BYTES <= 227 * 1024, "too many stages");
static_assert(INTERVAL % BLOCK == 0, "an interval is a multiple of the block of k");

// The values of ACCUMULATE.
constexpr u32 CHAIN = 1;
constexpr u32 ADD_AT_END = 2;

// The ranges of k of this CTA's tile: of experts' rows it is all of k, or nothing.
struct Ranges {
    const int* bounds;
    u32 first, end, groups;
    bool whole;
    u32 k;
    __device__ __forceinline__ u32 from(u32 part) const { return whole ? 0 : bounds[part]; }
    __device__ __forceinline__ u32 to(u32 part) const { return whole ? k : bounds[part + 1]; }
    // The columns of the scales at which a range begins.
    __device__ __forceinline__ u32 scale_a(u32 part) const { return whole ? 0 : bounds[groups + 1 + part]; }
    __device__ __forceinline__ u32 scale_b(u32 part) const { return whole ? 0 : bounds[2 * groups + 1 + part]; }
};

// One thread: fills the stages as they become free.
FATHOM_DEVICE void produce(u32 shared, const TensorMap* a, const TensorMap* b, u32 row, u32 row_b,
                           const Ranges& ranges) {
    Ring ring;
    for (u32 part = ranges.first; part < ranges.end; part++) {
        for (u32 k = ranges.from(part); k < ranges.to(part); k += BLOCK) {
            const u32 full = shared + FULL_AT + ring.stage * 8;
            const u32 stage = shared + ring.stage * STAGE_BYTES;
            mbarrier_wait(shared + EMPTY_AT + ring.stage * 8, ring.parity ^ 1);
            mbarrier_arrive_expect(full, STAGE_BYTES);
            tma_load(stage, a, k, row, full);
            tma_load(stage + OPERAND_BYTES, b, k, row_b, full);
            ring.advance();
        }
    }
}

// Zeros in columns `depth` and on of both operands of a stage: a row of one a consumer thread.
FATHOM_DEVICE void clear_behind(u32 stage, u32 depth) {
    const u32 row = stage + threadIdx.x * BLOCK;
    for (u32 at = depth; at < BLOCK; at += 1) {
        const u32 place = row + ((at / 16 ^ threadIdx.x % 8) * 16) + at % 16;
        if (at % 16 == 0) {
            asm volatile("st.shared.v4.u32 [%0], {%1, %1, %1, %1};" ::"r"(place), "r"(0) : "memory");
            at += 15;
        } else {
            asm volatile("st.shared.u8 [%0], %1;" ::"r"(place), "r"(0) : "memory");
        }
    }
}

template <bool FROM_ZERO>
FATHOM_DEVICE void multiply(float (&d)[64], u32 a, u32 b) {
    if (A_E5M2 && B_E5M2) wgmma_m64n128k32_e5m2<FROM_ZERO>(d, a, b);
    if (A_E5M2 && !B_E5M2) wgmma_m64n128k32_e5m2_e4m3<FROM_ZERO>(d, a, b);
    if (!A_E5M2 && B_E5M2) wgmma_m64n128k32_e4m3_e5m2<FROM_ZERO>(d, a, b);
    if (!A_E5M2 && !B_E5M2) wgmma_m64n128k32_e4m3<FROM_ZERO>(d, a, b);
}

// One block of k of a warpgroup into the interval's partial sums. `clear` is how much of the block is of the
// range, where what is behind it is not zero.
template <bool FROM_ZERO>
FATHOM_DEVICE void accumulate(float (&partial)[64], u32 shared, const Ring& ring, u32 warpgroup, u32 clear) {
    const u32 stage = shared + ring.stage * STAGE_BYTES;
    mbarrier_wait(shared + FULL_AT + ring.stage * 8, ring.parity);
    if (clear < BLOCK) {
        clear_behind(stage, clear);
        fence_async_shared();
        named_barrier(1, CONSUMERS * WARPGROUP);
    }
    u32 a = wgmma_descriptor_low(stage + warpgroup * (OPERAND_BYTES / CONSUMERS));
    u32 b = wgmma_descriptor_low(stage + OPERAND_BYTES);
    wgmma_fence();
    multiply<FROM_ZERO>(partial, a, b);
    multiply<false>(partial, a + 2, b + 2);
    multiply<false>(partial, a + 4, b + 4);
    multiply<false>(partial, a + 6, b + 6);
    wgmma_commit();
    wgmma_wait(partial);
    if (threadIdx.x % WARPGROUP == 0) mbarrier_arrive(shared + EMPTY_AT + ring.stage * 8);
}

// Where the scales of this thread's elements lie.
struct Scales {
    const float *upper, *lower, *b;  // the rows of a's two, the first row of b's
    u32 tile_column, column;           // first column of the tile, and of this thread's
    u32 n, columns_b;
};

// acc = fma(scale_a * scale_b, partial, acc)
FATHOM_DEVICE void promote(float (&sum)[64], const float (&partial)[64], const Scales& at, u32 block_a,
                           u32 block_b) {
    const float upper = __ldg(at.upper + block_a), lower = __ldg(at.lower + block_a);
    // A tile of 128 columns lies in one block of b's rows.
    constexpr bool ONE = B_ROWS % BLOCK == 0;
    constexpr u32 ROWS = B_ROWS == 0 ? 1 : B_ROWS;
    const float* b = at.b + block_b;
    float left = 0.0f, right = 0.0f;
    if (ONE) left = right = __ldg(B_ROWS == 0 ? b : b + (u64)(at.tile_column / ROWS) * at.columns_b);
#pragma unroll
    for (u32 j = 0; j < 64; j += 4) {
        if (!ONE) {
            const u32 column = at.column + 2 * j;
            left = column < at.n ? __ldg(b + (u64)(column / ROWS) * at.columns_b) : 0.0f;
            right = column + 1 < at.n ? __ldg(b + (u64)((column + 1) / ROWS) * at.columns_b) : 0.0f;
        }
        sum[j] = __fmaf_rn(__fmul_rn(upper, left), partial[j], sum[j]);
        sum[j + 1] = __fmaf_rn(__fmul_rn(upper, right), partial[j + 1], sum[j + 1]);
        sum[j + 2] = __fmaf_rn(__fmul_rn(lower, left), partial[j + 2], sum[j + 2]);
        sum[j + 3] = __fmaf_rn(__fmul_rn(lower, right), partial[j + 3], sum[j + 3]);
    }
}

// All ranges of k of a warpgroup's 64 x 128.
FATHOM_DEVICE void chain(float (&sum)[64], u32 shared, u32 warpgroup, const Ranges& ranges, const Scales& at) {
    Ring ring;
    for (u32 part = ranges.first; part < ranges.end; part++) {
        const u32 from = ranges.from(part), depth = ranges.to(part) - from;
        const u32 interval = INTERVAL == 0 ? depth : INTERVAL;
        const u32 column_a = ranges.scale_a(part), column_b = ranges.scale_b(part);
        for (u32 start = 0; start < depth; start += interval) {
            const u32 end = depth - start < interval ? depth : start + interval;
            const bool last = from + depth == ranges.k;
            float partial[64];
            accumulate<true>(partial, shared, ring, warpgroup, last ? BLOCK : depth - start);
            ring.advance();
            // Said as a constant, since the compiler does not see that an interval of one block has no more.
            for (u32 k = start + BLOCK; INTERVAL != BLOCK && k < end; k += BLOCK) {
                accumulate<false>(partial, shared, ring, warpgroup, last ? BLOCK : depth - k);
                ring.advance();
            }
            const u32 block_a = column_a + (A_DEPTH == 0 ? 0 : start / (A_DEPTH == 0 ? 1 : A_DEPTH));
            const u32 block_b = column_b + (B_DEPTH == 0 ? 0 : start / (B_DEPTH == 0 ? 1 : B_DEPTH));
            promote(sum, partial, at, block_a, block_b);
        }
    }
}

extern "C" __global__ void __launch_bounds__(384, 1)
    fp8_gemm(const __grid_constant__ TensorMap map_a, const __grid_constant__ TensorMap map_b,
             const float* __restrict__ scale_a, const float* __restrict__ scale_b, const float* c, void* d,
             const int* __restrict__ bounds, u32 groups, u32 m, u32 n, u32 k, u32 columns_a, u32 columns_b) {
    extern __shared__ __align__(1024) u8 memory[];
    const u32 shared = shared_address(memory);
    const u32 warpgroup = __shfl_sync(0xFFFFFFFFu, threadIdx.x / WARPGROUP, 0);
    const Work work = work_of<BLOCK, BLOCK>(bounds, groups, m, n);
    const bool whole = GROUPING == GROUP_ROWS;
    const Ranges ranges = {bounds, whole ? 0 : work.part, whole ? !work.empty : work.end_part, groups, whole, k};
    const u32 expert = whole && !work.empty ? work.group : 0;

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
        if (threadIdx.x == CONSUMERS * WARPGROUP) {
            produce(shared, &map_a, &map_b, work.row, expert * n + work.column, ranges);
        }
        return;
    }
    registers_take<232>();
    const u32 thread = threadIdx.x % WARPGROUP;
    const u32 row = work.row + warpgroup * 64 + thread / 32 * 16 + thread % 32 / 4;
    const u32 column = work.column + thread % 4 * 2;
    const u64 out = (GROUPING == GROUP_DEPTH ? (u64)work.group * m * n : 0) + (u64)row * n + column;
    const u32 rows_a = A_ROWS == 0 ? m : A_ROWS;
    const u32 rows_b = B_ROWS == 0 ? n : B_ROWS;
    // Rows that are not there read the scales of one that is.
    const u32 upper = row < m ? row / rows_a : 0, lower = row + 8 < m ? (row + 8) / rows_a : 0;
    const Scales at = {scale_a + (u64)upper * columns_a, scale_a + (u64)lower * columns_a,
                       scale_b + (u64)expert * ceil_div(n, rows_b) * columns_b,
                       work.column, column, n, columns_b};

    float sum[64] = {};
    if (ACCUMULATE == CHAIN) {
#pragma unroll
        for (u32 j = 0; j < 64; j++) {
            const u32 down = j / 2 % 2 * 8, right = j / 4 * 8 + j % 2;
            const bool there = row + down < work.end_row && column + right < n;
            if (there) sum[j] = c[out + (u64)down * n + right];
        }
    }
    chain(sum, shared, warpgroup, ranges, at);
#pragma unroll
    for (u32 j = 0; j < 64; j++) {
        const u32 down = j / 2 % 2 * 8, right = j / 4 * 8 + j % 2;
        const bool there = row + down < work.end_row && column + right < n;
        const u64 place = out + (u64)down * n + right;
        if (ACCUMULATE == ADD_AT_END && there) sum[j] = __fadd_rn(c[place], sum[j]);
        if (there) store((Float<OUT_BF16>*)d + place, sum[j]);
    }
}
