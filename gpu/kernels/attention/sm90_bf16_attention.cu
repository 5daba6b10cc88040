// Causal attention on BF16, to the bit the ops attention, attention_cached and attention_latent of the
// reference: the steps of fp32_attention.cu with every product on the tensor cores (wgmma, groups of 16).
// Scores start from zero; P is rounded to BF16 (its sum l takes the unrounded FP32) and chained onto the
// rescaled o, in groups of 16 rows from the KV block's start. o is rounded to BF16 at the end.
//
// CONSTANTS
//   QK_TILES   columns of a query or key head, in 64s
//   V_TILES    columns of a value head that a CTA computes, in 64s
//   PACK       heads of a tile (attention/tiles.cuh); more than 1 only where no segment has more than
//              64 / PACK queries
//   CONSUMERS  warpgroups that compute a tile each: 1 or 2
//   STAGES     of the ring of keys and values
// LAUNCH
//   128 (CONSUMERS + 1) threads, SHARED_BYTES below; a CTA for every CONSUMERS tiles of a segment and key
//   head and slice of 64 V_TILES columns.
// TENSOR MAPS (bf16 [columns, heads, rows], innermost dimension first, 128-byte swizzle)
//   q      box 64 x PACK x 64 / PACK
//   k, v   box 64 x 1 x 64
// NOTES
// - The scores of a block of keys are multiplied while the probabilities of the one before meet their
//   values: the tensor core has both, and the other consumer's, while a consumer computes its softmax.
// - A tile computes all keys that its last query sees, and no other: those that a row does not see enter o
//   with p = 0, and the exponent of zero times a large number counts. Where the last block ends between,
//   its values are copied over the tile's queries, which nobody needs any more, with zeros behind them.
// - Columns that a head does not have and rows behind the last of a tensor are zeros of TMA's.
#include "attention/boxes.cuh"
#include "attention/channel.cuh"
#include "attention/store.cuh"
#include "attention/tiles.cuh"
#include "common/elementary.cuh"
#include "common/float.cuh"

constexpr u32 K_BYTES = QK_TILES * BOX_BYTES;
constexpr u32 V_BYTES = V_TILES * BOX_BYTES;
constexpr u32 TILE_BYTES = K_BYTES < V_BYTES ? V_BYTES : K_BYTES;
constexpr u32 KEYS_AT = CONSUMERS * TILE_BYTES;
constexpr u32 VALUES_AT = KEYS_AT + STAGES * K_BYTES;
constexpr u32 BARRIERS_AT = VALUES_AT + STAGES * V_BYTES;
constexpr u32 QUERIES_FULL_AT = BARRIERS_AT + 4 * STAGES * 8;
constexpr u32 SHARED_BYTES = QUERIES_FULL_AT + CONSUMERS * 8;
static_assert(SHARED_BYTES <= 227 * 1024, "too many stages");

constexpr u32 SLICE = V_TILES * BOX;

// Keys and values on their way through the ring.
struct Channels {
    Channel keys, values;
};

FATHOM_DEVICE Channels channels_of(u32 shared) {
    const u32 barriers = shared + BARRIERS_AT;
    return {{shared + KEYS_AT, K_BYTES, barriers, barriers + STAGES * 8},
            {shared + VALUES_AT, V_BYTES, barriers + 2 * STAGES * 8, barriers + 3 * STAGES * 8}};
}

// One thread: loads the queries, then fills the stages as they become free.
FATHOM_DEVICE void produce(u32 shared, const TensorMap* q, const TensorMap* k, const TensorMap* v,
                           const Tiles& tiles) {
    for (u32 index = tiles.first; index < tiles.end; index++) {
        const Tile tile = tiles.tile(index);
        const u32 consumer = index - tiles.first, full = shared + QUERIES_FULL_AT + consumer * 8;
        const u32 row = tiles.segment.query + tile.first;
        mbarrier_arrive_expect(full, K_BYTES);
        load_boxes<QK_TILES>(shared + consumer * TILE_BYTES, q, 0, tile.head, row, full);
    }
    const Channels through = channels_of(shared);
    Ring ring;
    for (u32 block = 0; block < tiles.blocks(); block++) {
        const u32 row = tiles.segment.key + block * BLOCK_KV;
        const u32 keys = through.keys.fill(ring, K_BYTES);
        load_boxes<QK_TILES>(through.keys.at(ring), k, 0, tiles.kv_head, row, keys);
        const u32 values = through.values.fill(ring, V_BYTES);
        load_boxes<V_TILES>(through.values.at(ring), v, tiles.slice * SLICE, tiles.kv_head, row, values);
        ring.advance();
    }
}

// The sum of a row's 64 probabilities, of which this thread holds p[4j + half], p[4j + half + 1]: 16 chains
// over ascending columns, then the halving tree over them.
FATHOM_DEVICE float row_sum(const float (&p)[32], u32 half) {
    float low[2], high[2];  // chains 2q, 2q + 1 and 8 + 2q, 9 + 2q of the quad's thread q
#pragma unroll
    for (u32 i = 0; i < 2; i++) {
        low[i] = p[half + i];
        high[i] = p[4 + half + i];
#pragma unroll
        for (u32 j = 2; j < 8; j += 2) {
            low[i] = __fadd_rn(low[i], p[4 * j + half + i]);
            high[i] = __fadd_rn(high[i], p[4 * j + 4 + half + i]);
        }
        low[i] = __fadd_rn(low[i], high[i]);
        low[i] = __fadd_rn(low[i], __shfl_xor_sync(0xFFFFFFFFu, low[i], 2));
        low[i] = __fadd_rn(low[i], __shfl_xor_sync(0xFFFFFFFFu, low[i], 1));
    }
    return __fadd_rn(low[0], low[1]);
}

// What a thread holds of a tile: sums of two rows, m and l of each.
struct Rows {
    float out[V_TILES][32] = {};
    float m[2] = {__uint_as_float(0xFF800000u), __uint_as_float(0xFF800000u)};
    float l[2] = {0.0f, 0.0f};
};

// Scores of row `i` and a block of keys, of which it sees `seen`, into probabilities; gives the factor of
// what was summed before.
template <bool MASKED>
FATHOM_DEVICE float online_softmax(float (&s)[32], Rows& rows, u32 i, u32 seen, float scale) {
    const u32 half = 2 * i;
    float top = rows.m[i];
#pragma unroll
    for (u32 j = 0; j < 16; j++) {
        const u32 at = j / 2 * 4 + half + j % 2, column = sum_column() + j / 2 * 8 + j % 2;
        s[at] = __fmul_rn(s[at], scale);
        if (!MASKED || column < seen) top = fmaxf(top, s[at]);
    }
    top = fmaxf(top, __shfl_xor_sync(0xFFFFFFFFu, top, 2));
    top = fmaxf(top, __shfl_xor_sync(0xFFFFFFFFu, top, 1));
#pragma unroll
    for (u32 j = 0; j < 16; j++) {
        const u32 at = j / 2 * 4 + half + j % 2, column = sum_column() + j / 2 * 8 + j % 2;
        const float p = fathom_exp(__fsub_rn(s[at], top));
        s[at] = !MASKED || column < seen ? p : 0.0f;
    }
    const float factor = fathom_exp(__fsub_rn(rows.m[i], top));
    const float alpha = MASKED && seen == 0 ? 1.0f : factor;
    rows.l[i] = __fadd_rn(__fmul_rn(rows.l[i], alpha), row_sum(s, half));
    rows.m[i] = top;
    return alpha;
}

// The queries of a warpgroup, and how far it is in the ring.
struct Consumer {
    u32 queries;  // in shared memory
    Channels through;
    float scale;
    u32 sees[2];  // keys that this thread's rows see
    Ring ring;    // of the newest keys; values are a block behind
};

// The scores of a block of keys begin.
FATHOM_DEVICE void begin_scores(float (&s)[32], const Consumer& at) {
    at.through.keys.wait(at.ring);
    dots<QK_TILES>(s, at.queries, at.through.keys.at(at.ring));
}

// Scores into probabilities; gives the rows' factors of what was summed before.
template <bool MASKED>
FATHOM_DEVICE float2 probabilities(float (&s)[32], Rows& rows, const Consumer& at, u32 block) {
    float alpha[2];
#pragma unroll
    for (u32 i = 0; i < 2; i++) {
        const u32 before = block * BLOCK_KV;
        const u32 seen = at.sees[i] > before ? at.sees[i] - before : 0;
        alpha[i] = online_softmax<MASKED>(s, rows, i, seen, at.scale);
    }
    return make_float2(alpha[0], alpha[1]);
}

FATHOM_DEVICE void rescale(Rows& rows, float2 alpha) {
#pragma unroll
    for (u32 c = 0; c < V_TILES * 32; c++) {
        float* out = &rows.out[c / 32][c % 32];
        *out = __fmul_rn(*out, c / 2 % 2 == 0 ? alpha.x : alpha.y);
    }
}

// Probabilities of the block before meet their values while this block's scores are multiplied and
// become probabilities.
template <bool MASKED>
FATHOM_DEVICE void step(Rows& rows, u32 (&p)[16], Consumer& at, u32 block) {
    const Ring values = at.ring;
    at.ring.advance();
    float s[32];
    begin_scores(s, at);
    at.through.values.wait(values);
    chain(rows.out, p, at.through.values.at(values));
    wgmma_wait<1>(s);
    at.through.keys.leave(at.ring);
    const float2 alpha = probabilities<MASKED>(s, rows, at, block);
    wgmma_wait<0>(rows.out);
    wgmma_pin(p);
    at.through.values.leave(values);
    rescale(rows, alpha);
    to_operand(p, s);
}

// All blocks of keys that a tile sees.
FATHOM_DEVICE void attend(Rows& rows, Consumer& at, const Segment& segment, const Tile& tile, u32 barrier) {
    const u32 blocks = tile.blocks(segment);
    // Those that all its queries see wholly.
    const u32 whole = (segment.before() + tile.first + 1) / BLOCK_KV;
    float s[32];
    begin_scores(s, at);
    wgmma_wait<0>(s);
    at.through.keys.leave(at.ring);
    rescale(rows, probabilities<true>(s, rows, at, 0));
    u32 p[16];
    to_operand(p, s);
    u32 block = 1;
    for (; block < whole; block++) step<false>(rows, p, at, block);
    for (; block < blocks; block++) step<true>(rows, p, at, block);
    const u32 width = tile.seen_last(segment) - (blocks - 1) * BLOCK_KV;
    u32 values = at.through.values.at(at.ring);
    at.through.values.wait(at.ring);
    if (width < BLOCK_KV) {
        copy_rows<V_TILES>(at.queries, values, width, barrier);
        values = at.queries;
    }
    chain(rows.out, p, values);
    wgmma_wait<0>(rows.out);
    at.through.values.leave(at.ring);
    at.ring.advance();
}

struct Outputs {
    bf16* o;
    float* lse;  // or null
    u32 heads, columns;
};

FATHOM_DEVICE void store_tile(const Rows& rows, const Outputs& to, const Tiles& tiles, const Tile& tile) {
#pragma unroll
    for (u32 i = 0; i < 2; i++) {
        const u32 row = sum_row() + 8 * i;
        if (!tile.has(row)) continue;
        const u64 at = (u64)(tiles.segment.query + tile.query(row)) * to.heads + tile.head + row % PACK;
#pragma unroll
        for (u32 c = 0; c < V_TILES * 8; c++) {
            const float* sum = &rows.out[c / 8][c % 8 * 4 + 2 * i];
            const u32 column = tiles.slice * SLICE + c * 8 + sum_column();
            const u32 left = column < to.columns ? to.columns - column : 0;
            store_pair(to.o + at * to.columns + column, __fdiv_rn(sum[0], rows.l[i]),
                       __fdiv_rn(sum[1], rows.l[i]), left, to.columns % 2 == 0);
        }
        const bool first = to.lse && tiles.slice == 0 && sum_column() == 0;
        if (first) store(to.lse + at, __fadd_rn(rows.m[i], fathom_log(rows.l[i])));
    }
}

extern "C" __global__ void __launch_bounds__(384, 1)
    bf16_attention(const __grid_constant__ TensorMap map_q, const __grid_constant__ TensorMap map_k,
                   const __grid_constant__ TensorMap map_v, bf16* __restrict__ o, float* __restrict__ lse,
                   const int* __restrict__ bounds, u32 segments, float scale, u32 heads, u32 kv_heads,
                   u32 v_columns) {
    extern __shared__ __align__(1024) u8 memory[];
    const u32 shared = shared_address(memory);
    const u32 warpgroup = __shfl_sync(0xFFFFFFFFu, threadIdx.x / WARPGROUP, 0);
    const Tiles tiles = tiles_of(bounds, segments, kv_heads, heads / kv_heads, slices_of(v_columns, SLICE));
    const Channels through = channels_of(shared);

    if (threadIdx.x == 0) {
        tma_prefetch(&map_q);
        tma_prefetch(&map_k);
        tma_prefetch(&map_v);
        for (u32 i = 0; i < CONSUMERS; i++) mbarrier_init(shared + QUERIES_FULL_AT + i * 8, 1);
        through.keys.init(CONSUMERS * WARPGROUP / 32);
        through.values.init(CONSUMERS * WARPGROUP / 32);
        mbarrier_init_fence();
    }
    __syncthreads();

    if (warpgroup == CONSUMERS) {
        registers_give<24>();
        if (threadIdx.x == CONSUMERS * WARPGROUP) produce(shared, &map_q, &map_k, &map_v, tiles);
        return;
    }
    registers_take<240>();
    const u32 index = tiles.first + warpgroup;
    Consumer at = {shared + warpgroup * TILE_BYTES, through, scale, {}, {}};
    u32 block = 0;
    if (index < tiles.end) {
        const Tile tile = tiles.tile(index);
        const u32 before = tiles.segment.before() + tile.first + 1;
#pragma unroll
        for (u32 i = 0; i < 2; i++) at.sees[i] = before + (sum_row() + 8 * i) / PACK;
        mbarrier_wait(shared + QUERIES_FULL_AT + warpgroup * 8, 0);
        Rows rows;
        attend(rows, at, tiles.segment, tile, 1 + warpgroup);
        store_tile(rows, {o, lse, heads, v_columns}, tiles, tile);
        block = tile.blocks(tiles.segment);
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
