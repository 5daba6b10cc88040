// D[m, N] = A[m, K] B[N, K]^T on E4M3 with scales for every 1 x 128 of A and 128 x 128 of B, to the bit
// the op gemm_fp8 of the reference (docs/numerics.md). For every element and every 128 of K, ascending:
//
//   partial = four chained wgmmas of 32, the first from zero
//   s       = scale_a * scale_b, rounded once
//   acc     = fma(s, partial, acc)
//
// and a bf16 output is rounded once, to nearest even.
//
// CONSTANTS
//   N, K         columns of D and depth, any positive numbers
//   OUTPUT_F32   1: D is f32, stored directly; 0: D is bf16, stored by TMA
//   STAGES       of the pipeline; a stage is 33,280 bytes (docs/kernels.md has the sizes)
// LAUNCH
//   384 threads, clusters of 2 (the kernel says so), an even grid, SHARED_BYTES below. Persistent:
//   every cluster strides over the tiles.
// TENSOR MAPS (innermost dimension first; strides multiples of 16 bytes)
//   a        u8 [K, m],   box 128 x 128, 128-byte swizzle
//   b        u8 [K, N],   box 128 x 64, 128-byte swizzle
//   scale_a  f32 [m, ceil(K / 128)], box 128 x 1, no swizzle
//   d        bf16 [N, m], box 64 x 64, 128-byte swizzle; not read where OUTPUT_F32
// NOTES
// - A cluster computes two tiles one below the other. They share B: each CTA loads half of it into both.
//   So a stage is free when the consumers of both CTAs have left it, and no CTA ends before the other.
// - The second tile of a pair may lie below m. It is computed on zeros and not stored.
#include "common/types.cuh"
#include "gemm/ring.cuh"
#include "mma/wgmma.cuh"
#include "ptx/barrier.cuh"
#include "ptx/tma.cuh"

constexpr u32 BLOCK = 128;  // of M, N and K
constexpr u32 CTAS = 2;
constexpr u32 WARPGROUP = 128;
constexpr u32 CONSUMERS = 2;
constexpr u32 GROUP = 8;  // pairs of tiles of M that are swept together along N, for L2

constexpr u32 K_BLOCKS = ceil_div<u32>(K, BLOCK);
constexpr u32 N_BLOCKS = ceil_div<u32>(N, BLOCK);

constexpr u32 A_BYTES = BLOCK * BLOCK;
constexpr u32 B_BYTES = BLOCK * BLOCK;
constexpr u32 SCALE_BYTES = BLOCK * 4;
constexpr u32 STAGE_BYTES = A_BYTES + B_BYTES + SCALE_BYTES;
constexpr u32 OUT_BYTES = OUTPUT_F32 ? 0 : BLOCK * BLOCK * 2;

// Offsets in shared memory: what is swizzled needs 1024, the scales 128.
constexpr u32 A_AT = OUT_BYTES;
constexpr u32 B_AT = A_AT + STAGES * A_BYTES;
constexpr u32 SCALE_AT = B_AT + STAGES * B_BYTES;
constexpr u32 FULL_AT = SCALE_AT + STAGES * SCALE_BYTES;
constexpr u32 EMPTY_AT = FULL_AT + STAGES * 8;
constexpr u32 SHARED_BYTES = EMPTY_AT + STAGES * 8;
static_assert(SHARED_BYTES <= 227 * 1024, "too many stages");

struct Tile {
    u32 row, column;
};

// The tile of this CTA in its cluster's turn `index`.
FATHOM_DEVICE Tile tile_of(u32 index, u32 pairs, u32 rank) {
    u32 group = index / (GROUP * N_BLOCKS);
    u32 within = index % (GROUP * N_BLOCKS);
    u32 first = group * GROUP;
    u32 height = pairs - first < GROUP ? pairs - first : GROUP;
    u32 pair = first + within % height;
    return {(pair * CTAS + rank) * BLOCK, within / height * BLOCK};
}

struct Maps {
    const TensorMap *a, *b, *scale_a, *d;
};

// One thread: fills the stages as they become free.
FATHOM_DEVICE void produce(u32 shared, const Maps& maps, u32 pairs, u32 rank) {
    Ring ring;
    for (u32 index = blockIdx.x / CTAS; index < pairs * N_BLOCKS; index += gridDim.x / CTAS) {
        Tile tile = tile_of(index, pairs, rank);
        for (u32 block = 0; block < K_BLOCKS; block++) {
            u32 full = shared + FULL_AT + ring.stage * 8;
            mbarrier_wait(shared + EMPTY_AT + ring.stage * 8, ring.parity ^ 1);
            mbarrier_arrive_expect(full, STAGE_BYTES);
            tma_load(shared + A_AT + ring.stage * A_BYTES, maps.a, block * BLOCK, tile.row, full);
            tma_load(shared + SCALE_AT + ring.stage * SCALE_BYTES, maps.scale_a, tile.row, block, full);
            tma_load_multicast(shared + B_AT + ring.stage * B_BYTES + rank * (B_BYTES / CTAS), maps.b,
                               block * BLOCK, tile.column + rank * (BLOCK / CTAS), full,
                               (1 << CTAS) - 1);
            ring.advance();
        }
    }
}

// What a consumer thread reads and where it arrives, for stage 0.
struct Consumer {
    u32 a, b;    // lower halves of the wgmma descriptors
    u32 scales;  // of this thread's upper row
    u32 full;
    u32 empty;   // of CTA `lane` of the cluster
    bool arrives;
};

// One K block of a warpgroup: the tensor core's four steps, then the promotion.
FATHOM_DEVICE void accumulate(float (&sum)[64], const Consumer& at, const Ring& ring, float scale_b) {
    mbarrier_wait(at.full + ring.stage * 8, ring.parity);
    u32 scales = at.scales + ring.stage * SCALE_BYTES;
    float scale_upper, scale_lower;
    asm volatile("ld.shared.f32 %0, [%1];" : "=f"(scale_upper) : "r"(scales) : "memory");
    asm volatile("ld.shared.f32 %0, [%1];" : "=f"(scale_lower) : "r"(scales + 32) : "memory");

    u32 a = at.a + ring.stage * (A_BYTES / 16);
    u32 b = at.b + ring.stage * (B_BYTES / 16);
    float partial[64];
    wgmma_fence();
    wgmma_m64n128k32_e4m3<true>(partial, a, b);
    wgmma_m64n128k32_e4m3<false>(partial, a + 2, b + 2);
    wgmma_m64n128k32_e4m3<false>(partial, a + 4, b + 4);
    wgmma_m64n128k32_e4m3<false>(partial, a + 6, b + 6);
    wgmma_commit();
    wgmma_wait(partial);

    // A lane for each CTA: this warp has left the stage.
    __syncwarp();
    if (at.arrives) mbarrier_arrive_cluster(at.empty + ring.stage * 8);

    float upper = __fmul_rn(scale_upper, scale_b);
    float lower = __fmul_rn(scale_lower, scale_b);
#pragma unroll
    for (u32 j = 0; j < 16; j++) {
        sum[4 * j] = __fmaf_rn(upper, partial[4 * j], sum[4 * j]);
        sum[4 * j + 1] = __fmaf_rn(upper, partial[4 * j + 1], sum[4 * j + 1]);
        sum[4 * j + 2] = __fmaf_rn(lower, partial[4 * j + 2], sum[4 * j + 2]);
        sum[4 * j + 3] = __fmaf_rn(lower, partial[4 * j + 3], sum[4 * j + 3]);
    }
}

// The same pointer, opaque: in uniform registers it would be moved to others for every load.
FATHOM_DEVICE const float* in_registers(const float* p) {
    asm volatile("" : "+l"(p));
    return p;
}

#if OUTPUT_F32

FATHOM_DEVICE void store_direct(const float (&sum)[64], float* d, u64 ldd, u32 m, u32 row, u32 column) {
#pragma unroll
    for (u32 j = 0; j < 16; j++) {
#pragma unroll
        for (u32 i = 0; i < 4; i++) {
            u32 r = row + i / 2 * 8;
            u32 c = column + 8 * j + i % 2;
            if (r < m && c < N) d[r * ldd + c] = sum[4 * j + i];
        }
    }
}

#else

FATHOM_DEVICE u32 to_bf16x2(float low, float high) {
    u32 pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}

// The warpgroup's 64 x 128 as two boxes of 64 x 64 in swizzled shared memory, then out by TMA.
FATHOM_DEVICE void store_by_tma(const float (&sum)[64], u32 shared, const TensorMap* d, u32 warpgroup,
                                Tile tile) {
    constexpr u32 BOX_BYTES = 64 * 128;
    u32 thread = threadIdx.x % WARPGROUP;
    u32 lane = thread % 32;
    u32 out = shared + warpgroup * 2 * BOX_BYTES;
    if (thread == 0) tma_store_wait_read();  // the previous tile's
    named_barrier(1 + warpgroup, WARPGROUP);
    u32 row = thread / 32 * 16 + lane % 16;
#pragma unroll
    for (u32 j = 0; j < 16; j += 2) {
        u32 chunk = j + lane / 16;
        u32 at = out + chunk / 8 * BOX_BYTES + row * 128 + ((chunk ^ row) % 8) * 16;
        asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(at),
                     "r"(to_bf16x2(sum[4 * j], sum[4 * j + 1])),
                     "r"(to_bf16x2(sum[4 * j + 2], sum[4 * j + 3])),
                     "r"(to_bf16x2(sum[4 * j + 4], sum[4 * j + 5])),
                     "r"(to_bf16x2(sum[4 * j + 6], sum[4 * j + 7]))
                     : "memory");
    }
    fence_async_shared();
    named_barrier(1 + warpgroup, WARPGROUP);
    if (thread == 0) {
        u32 y = tile.row + warpgroup * 64;
        tma_store(d, tile.column, y, out);
        tma_store(d, tile.column + 64, y, out + BOX_BYTES);
        tma_store_commit();
    }
}

#endif

extern "C" __global__ void __cluster_dims__(2, 1, 1) __launch_bounds__(384, 1)
    fp8_gemm_1d2d(const __grid_constant__ TensorMap map_a, const __grid_constant__ TensorMap map_b,
                  const __grid_constant__ TensorMap map_scale_a,
                  const __grid_constant__ TensorMap map_d, const float* __restrict__ scale_b,
                  float* __restrict__ d, u64 ldd, u32 m) {
    extern __shared__ __align__(1024) u8 memory[];
    const u32 shared = shared_address(memory);
    const u32 rank = cluster_rank();
    const u32 warpgroup = __shfl_sync(0xFFFFFFFFu, threadIdx.x / WARPGROUP, 0);
    const u32 pairs = ceil_div(m, CTAS * BLOCK);
    const Maps maps = {&map_a, &map_b, &map_scale_a, &map_d};

    if (threadIdx.x == 0) {
        tma_prefetch(maps.a);
        tma_prefetch(maps.b);
        tma_prefetch(maps.scale_a);
        for (u32 stage = 0; stage < STAGES; stage++) {
            mbarrier_init(shared + FULL_AT + stage * 8, 1);
            // An arrival for every consumer warp of the cluster.
            mbarrier_init(shared + EMPTY_AT + stage * 8, CTAS * CONSUMERS * WARPGROUP / 32);
        }
        mbarrier_init_fence();
    }
    cluster_sync();
    wait_for_previous_grid();

    if (warpgroup == CONSUMERS) {
        registers_give<40>();
        if (threadIdx.x == CONSUMERS * WARPGROUP) produce(shared, maps, pairs, rank);
    } else {
        registers_take<232>();
        Ring ring;
        u32 thread = threadIdx.x % WARPGROUP;
        u32 lane = thread % 32;
        u32 row = warpgroup * 64 + thread / 32 * 16 + lane / 4;
        const Consumer at = {
            wgmma_descriptor_low(shared + A_AT + warpgroup * (A_BYTES / CONSUMERS)),
            wgmma_descriptor_low(shared + B_AT),
            shared + SCALE_AT + row * 4,
            shared + FULL_AT,
            mapa(shared + EMPTY_AT, lane % CTAS),
            lane < CTAS,
        };
        for (u32 index = blockIdx.x / CTAS; index < pairs * N_BLOCKS; index += gridDim.x / CTAS) {
            Tile tile = tile_of(index, pairs, rank);
            const float* scales = in_registers(scale_b + (u64)(tile.column / BLOCK) * K_BLOCKS);
            float sum[64] = {};
#pragma unroll 4
            for (u32 block = 0; block < K_BLOCKS; block++) {
                accumulate(sum, at, ring, __ldg(scales++));
                ring.advance();
            }
#if OUTPUT_F32
            store_direct(sum, d, ldd, m, tile.row + row, tile.column + thread % 4 * 2);
#else
            store_by_tma(sum, shared, maps.d, warpgroup, tile);
#endif
        }
#if !OUTPUT_F32
        if (thread == 0) tma_store_wait();
#endif
    }
    __syncwarp();
    let_next_grid_start();
    cluster_sync();
}
