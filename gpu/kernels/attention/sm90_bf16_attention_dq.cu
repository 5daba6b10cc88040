// The gradient of attention's queries on BF16, to the bit the op attention_backward of the reference: the steps
// of fp32_attention_backward.cu with every product on the tensor cores (wgmma, groups of 16). ds is rounded to
// BF16 as an operand; dq is chained in FP32 over ascending keys and rounded to BF16 at the end.
//
// CONSTANTS
//   QK_TILES, V_TILES  columns of a query or key head, and of a value head, in 64s
//   DQ_TILES           columns of dq that a CTA computes, in 64s
//   CONSUMERS          warpgroups that compute 64 queries each: 1 or 2
//   STAGES             of the ring of keys and values: 2 or more
// LAUNCH
//   128 (CONSUMERS + 1) threads, SHARED_BYTES below; a CTA for every CONSUMERS blocks of 64 queries or heads of
//   a key head (attention/tiles.cuh) and slice of 64 DQ_TILES columns.
// TENSOR MAPS (bf16 [columns, heads, rows], innermost dimension first, 128-byte swizzle)
//   q, d_o, k, v   box 64 x 1 x 64
// NOTES
// - Scores and dp of a block of keys are multiplied while ds of the one before meets its keys.
// - A block of queries reads all keys that its last query sees, and no other: of those that a query does not
//   see ds is 0, and the exponent of zero times a large number counts. Where the last block of keys ends
//   between, it is copied over the queries, which nobody needs any more, with zeros behind it.
#include "common/types.cuh"

constexpr u32 PACK = 1;  // heads of a tile

#include "attention/backward.cuh"
#include "attention/boxes.cuh"
#include "attention/channel.cuh"
#include "attention/store.cuh"
#include "attention/tiles.cuh"

static_assert(STAGES >= 2, "the keys of the block before are read while the next ones are");
static_assert(QK_TILES % DQ_TILES == 0, "slices have as many boxes");

constexpr u32 K_BYTES = QK_TILES * BOX_BYTES;
constexpr u32 V_BYTES = V_TILES * BOX_BYTES;
constexpr u32 TILE_BYTES = K_BYTES + V_BYTES;
constexpr u32 KEYS_AT = CONSUMERS * TILE_BYTES;
constexpr u32 VALUES_AT = KEYS_AT + STAGES * K_BYTES;
constexpr u32 BARRIERS_AT = VALUES_AT + STAGES * V_BYTES;
constexpr u32 QUERIES_FULL_AT = BARRIERS_AT + 4 * STAGES * 8;
constexpr u32 SHARED_BYTES = QUERIES_FULL_AT + CONSUMERS * 8;
static_assert(SHARED_BYTES <= 227 * 1024, "too many stages");

constexpr u32 SLICE = DQ_TILES * BOX;

struct Maps {
    const TensorMap *q, *d_o, *k, *v;
};

// Keys and values on their way through the ring.
struct Channels {
    Channel keys, values;
};

FATHOM_DEVICE Channels channels_of(u32 shared) {
    const u32 barriers = shared + BARRIERS_AT;
    return {{shared + KEYS_AT, K_BYTES, barriers, barriers + STAGES * 8},
            {shared + VALUES_AT, V_BYTES, barriers + 2 * STAGES * 8, barriers + 3 * STAGES * 8}};
}

// One thread: loads queries and gradients of the output, then fills the stages as they become free.
FATHOM_DEVICE void produce(u32 shared, const Maps& maps, const Tiles& tiles) {
    for (u32 index = tiles.first; index < tiles.end; index++) {
        const Tile tile = tiles.tile(index);
        const u32 consumer = index - tiles.first, full = shared + QUERIES_FULL_AT + consumer * 8;
        const u32 to = shared + consumer * TILE_BYTES, row = tiles.segment.query + tile.first;
        mbarrier_arrive_expect(full, TILE_BYTES);
        load_boxes<QK_TILES>(to, maps.q, 0, tile.head, row, full);
        load_boxes<V_TILES>(to + K_BYTES, maps.d_o, 0, tile.head, row, full);
    }
    const Channels through = channels_of(shared);
    Ring ring;
    for (u32 block = 0; block < tiles.blocks(); block++) {
        const u32 row = tiles.segment.key + block * BLOCK_KV;
        const u32 keys = through.keys.fill(ring, K_BYTES);
        load_boxes<QK_TILES>(through.keys.at(ring), maps.k, 0, tiles.kv_head, row, keys);
        const u32 values = through.values.fill(ring, V_BYTES);
        load_boxes<V_TILES>(through.values.at(ring), maps.v, 0, tiles.kv_head, row, values);
        ring.advance();
    }
}

// A block of queries, and how far its warpgroup is in the ring.
struct Consumer {
    u32 queries;  // in shared memory; gradients of the output behind them
    u32 slice;    // bytes from a block's first box to those of this slice
    Channels through;
    float scale;
    float lse[2], delta[2];  // of this thread's rows
    u32 sees[2];             // keys that they see
    Ring ring;
};

// Scores and dp of a block of keys begin.
FATHOM_DEVICE void begin(float (&s)[32], float (&dp)[32], const Consumer& at) {
    at.through.keys.wait(at.ring);
    dots<QK_TILES>(s, at.queries, at.through.keys.at(at.ring));
    at.through.values.wait(at.ring);
    dots<V_TILES>(dp, at.queries + K_BYTES, at.through.values.at(at.ring));
}

// Scores into ds, while the last LEFT groups of products run on.
template <bool MASKED, u32 LEFT>
FATHOM_DEVICE void score_gradients(float (&s)[32], float (&dp)[32], const Consumer& at, u32 block) {
    wgmma_wait<LEFT + 1>(s);
#pragma unroll
    for (u32 e = 0; e < 32; e++) s[e] = probability(s[e], at.scale, at.lse[e / 2 % 2]);
    wgmma_wait<LEFT>(dp);
    at.through.values.leave(at.ring);
#pragma unroll
    for (u32 e = 0; e < 32; e++) {
        const u32 i = e / 2 % 2, key = block * BLOCK_KV + e / 4 * 8 + sum_column() + e % 2;
        const float ds = score_gradient(s[e], dp[e], at.delta[i], at.scale);
        s[e] = !MASKED || key < at.sees[i] ? ds : 0.0f;
    }
}

// ds of the block before meets its keys while that of this block is computed.
template <bool MASKED>
FATHOM_DEVICE void step(float (&sum)[DQ_TILES][32], u32 (&ds)[16], Consumer& at, u32 block) {
    const Ring before = at.ring;
    at.ring.advance();
    float s[32], dp[32];
    begin(s, dp, at);
    chain(sum, ds, at.through.keys.at(before) + at.slice);
    score_gradients<MASKED, 1>(s, dp, at, block);
    wgmma_wait<0>(sum);
    wgmma_pin(ds);
    at.through.keys.leave(before);
    to_operand(ds, s);
}

// dq of a tile: over the keys that its last query sees.
FATHOM_DEVICE void accumulate(float (&sum)[DQ_TILES][32], Consumer& at, const Segment& segment, const Tile& tile,
                              u32 barrier) {
    const u32 blocks = tile.blocks(segment);
    // Those that all its queries see wholly.
    const u32 whole = (segment.before() + tile.first + 1) / BLOCK_KV;
    float s[32], dp[32];
    begin(s, dp, at);
    score_gradients<true, 0>(s, dp, at, 0);
    u32 ds[16];
    to_operand(ds, s);
    u32 block = 1;
    for (; block < whole; block++) step<false>(sum, ds, at, block);
    for (; block < blocks; block++) step<true>(sum, ds, at, block);
    const u32 width = tile.seen_last(segment) - (blocks - 1) * BLOCK_KV;
    u32 keys = at.through.keys.at(at.ring) + at.slice;
    if (width < BLOCK_KV) {
        copy_rows<DQ_TILES>(at.queries, keys, width, barrier);
        keys = at.queries;
    }
    chain(sum, ds, keys);
    wgmma_wait<0>(sum);
    at.through.keys.leave(at.ring);
    at.ring.advance();
}

extern "C" __global__ void __launch_bounds__(384, 1)
    bf16_attention_dq(const __grid_constant__ TensorMap map_q, const __grid_constant__ TensorMap map_d_o,
                      const __grid_constant__ TensorMap map_k, const __grid_constant__ TensorMap map_v,
                      const float* __restrict__ lse, const float* __restrict__ delta, bf16* __restrict__ dq,
                      const int* __restrict__ bounds, u32 segments, float scale, u32 heads, u32 kv_heads,
                      u32 qk) {
    extern __shared__ __align__(1024) u8 memory[];
    const u32 shared = shared_address(memory);
    const u32 warpgroup = __shfl_sync(0xFFFFFFFFu, threadIdx.x / WARPGROUP, 0);
    const Tiles tiles = tiles_of(bounds, segments, kv_heads, heads / kv_heads, slices_of(qk, SLICE));
    const Channels through = channels_of(shared);

    if (threadIdx.x == 0) {
        for (u32 i = 0; i < CONSUMERS; i++) mbarrier_init(shared + QUERIES_FULL_AT + i * 8, 1);
        through.keys.init(CONSUMERS * WARPGROUP / 32);
        through.values.init(CONSUMERS * WARPGROUP / 32);
        mbarrier_init_fence();
    }
    __syncthreads();

    if (warpgroup == CONSUMERS) {
        registers_give<24>();
        if (threadIdx.x == CONSUMERS * WARPGROUP) produce(shared, {&map_q, &map_d_o, &map_k, &map_v}, tiles);
        return;
    }
    registers_take<240>();
    const u32 index = tiles.first + warpgroup;
    Consumer at = {shared + warpgroup * TILE_BYTES, tiles.slice * DQ_TILES * BOX_BYTES, through, scale};
    u32 block = 0;
    if (index < tiles.end) {
        const Segment& segment = tiles.segment;
        const Tile tile = tiles.tile(index);
#pragma unroll
        for (u32 i = 0; i < 2; i++) {
            const u32 row = tile.has(sum_row() + 8 * i) ? sum_row() + 8 * i : 0;
            const u64 place = (u64)(segment.query + tile.first + row) * heads + tile.head;
            at.lse[i] = lse[place];
            at.delta[i] = delta[place];
            at.sees[i] = segment.before() + tile.first + row + 1;
        }
        mbarrier_wait(shared + QUERIES_FULL_AT + warpgroup * 8, 0);
        float sum[DQ_TILES][32] = {};
        accumulate(sum, at, segment, tile, 1 + warpgroup);
        bf16* to = dq + ((u64)(segment.query + tile.first) * heads + tile.head) * qk + tiles.slice * SLICE;
        store_rows(sum, to, (u64)heads * qk, tile.queries, qk - tiles.slice * SLICE);
        block = tile.blocks(segment);
    }
    // Blocks that only the other consumer's tile sees: a stage is free when both have left it.
    for (; block < tiles.blocks(); block++) {
        through.keys.wait(at.ring);
        through.keys.leave(at.ring);
        through.values.wait(at.ring);
        through.values.leave(at.ring);
        at.ring.advance();
    }
}
