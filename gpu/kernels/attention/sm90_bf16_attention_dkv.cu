// The gradients of attention's keys and values on BF16, to the bit the op attention_backward of the reference:
// the steps of fp32_attention_backward.cu with every product on the tensor cores (wgmma, groups of 16). P and ds
// are rounded to BF16 as operands; dk and dv are chained in FP32 over heads, then ascending queries, and
// rounded to BF16 at the end.
//
// CONSTANTS
//   QK_TILES, V_TILES  columns of a query or key head, and of a value head, in 64s
//   DK_TILES, DV_TILES columns of dk and dv that a CTA computes, in 64s
//   STAGES             of the ring of queries and gradients of the output: 2 or more
// LAUNCH
//   384 threads, SHARED_BYTES below; a CTA for every 64 keys of a segment and key head and slice of 64
//   DK_TILES columns of dk and 64 DV_TILES of dv. Consumer 0 computes P and dv, consumer 1 ds and dk.
// TENSOR MAPS (innermost dimension first)
//   q, d_o, k, v  bf16 [columns, heads, rows], box 64 x 1 x 64, 128-byte swizzle
//   lse, delta    f32 [rows, heads], box 64 x 1, no swizzle
// NOTES
// - Both gradients need scores with keys as rows: the products of keys and queries, whose elements are the same
//   sums. Consumer 0 has them, and hands P to consumer 1 in FP32; a consumer multiplies for a block of queries
//   while the operand of the one before meets its rows.
// - A stage of P is free when that of the queries is: consumer 1 has left both.
// - A block of queries adds to all keys that its last query sees, and to no other: of those that a query does
//   not see p and ds are 0, and the exponent of zero times a large number counts. Where a block of keys goes
//   on behind the last that is seen, its sums of those beyond are put back.
// - What a block of queries has behind a segment's last becomes zeros, for the same reason, when both
//   consumers have read it.
#include "attention/backward.cuh"
#include "attention/boxes.cuh"
#include "attention/channel.cuh"
#include "attention/store.cuh"
#include "common/types.cuh"

static_assert(STAGES >= 2, "the queries of the block before are read while the next ones are");
static_assert(QK_TILES % DK_TILES == 0 && V_TILES % DV_TILES == 0, "slices have as many boxes");

constexpr u32 CONSUMERS = 2;
constexpr u32 K_BYTES = QK_TILES * BOX_BYTES;
constexpr u32 V_BYTES = V_TILES * BOX_BYTES;
constexpr u32 ROWS_BYTES = BLOCK_Q * 4;  // of lse and delta
constexpr u32 VALUES_AT = K_BYTES;
constexpr u32 QUERIES_AT = VALUES_AT + V_BYTES;
constexpr u32 D_O_AT = QUERIES_AT + STAGES * K_BYTES;
constexpr u32 LSE_AT = D_O_AT + STAGES * V_BYTES;
constexpr u32 DELTA_AT = LSE_AT + STAGES * ROWS_BYTES;
constexpr u32 P_BYTES = 64 * 64 * 4;
constexpr u32 P_AT = DELTA_AT + STAGES * ROWS_BYTES;
constexpr u32 BARRIERS_AT = P_AT + STAGES * P_BYTES;
constexpr u32 P_FULL_AT = BARRIERS_AT + 4 * STAGES * 8;
constexpr u32 KEYS_FULL_AT = P_FULL_AT + STAGES * 8;
constexpr u32 SHARED_BYTES = KEYS_FULL_AT + 8;
static_assert(SHARED_BYTES <= 227 * 1024, "too many stages");

struct Maps {
    const TensorMap *q, *d_o, *k, *v, *lse, *delta;
};

// Queries with lse, and gradients of the output with delta, on their way through the ring.
struct Channels {
    Channel queries, d_o;
};

FATHOM_DEVICE Channels channels_of(u32 shared) {
    const u32 barriers = shared + BARRIERS_AT;
    return {{shared + QUERIES_AT, K_BYTES, barriers, barriers + STAGES * 8},
            {shared + D_O_AT, V_BYTES, barriers + 2 * STAGES * 8, barriers + 3 * STAGES * 8}};
}

// The blocks of queries that see a block of keys: for each head that reads it, from `first` on.
struct Queries {
    u32 head, end_head;
    u32 first, blocks;
};

FATHOM_DEVICE Queries queries_of(const Block& block, u32 group) {
    const u32 first = first_query(block.segment, block.first), queries = block.segment.queries;
    const u32 blocks = first < queries ? ceil_div(queries - first, BLOCK_Q) : 0;
    return {block.head * group, (block.head + 1) * group, first, blocks};
}

// One thread: loads keys and values, then fills the stages as they become free.
FATHOM_DEVICE void produce(u32 shared, const Maps& maps, const Block& block, const Queries& queries) {
    const u32 keys_full = shared + KEYS_FULL_AT, key = block.segment.key + block.first;
    mbarrier_arrive_expect(keys_full, K_BYTES + V_BYTES);
    load_boxes<QK_TILES>(shared, maps.k, 0, block.head, key, keys_full);
    load_boxes<V_TILES>(shared + VALUES_AT, maps.v, 0, block.head, key, keys_full);
    const Channels through = channels_of(shared);
    Ring ring;
    for (u32 head = queries.head; head < queries.end_head; head++) {
        for (u32 at = 0; at < queries.blocks; at++) {
            const u32 row = block.segment.query + queries.first + at * BLOCK_Q;
            const u32 q = through.queries.fill(ring, K_BYTES + ROWS_BYTES);
            load_boxes<QK_TILES>(through.queries.at(ring), maps.q, 0, head, row, q);
            tma_load(shared + LSE_AT + ring.stage * ROWS_BYTES, maps.lse, row, head, q);
            const u32 d_o = through.d_o.fill(ring, V_BYTES + ROWS_BYTES);
            load_boxes<V_TILES>(through.d_o.at(ring), maps.d_o, 0, head, row, d_o);
            tma_load(shared + DELTA_AT + ring.stage * ROWS_BYTES, maps.delta, row, head, d_o);
            ring.advance();
        }
    }
}

// A block of keys, and how far a warpgroup is in the ring.
struct Consumer {
    u32 shared;
    u32 slice;  // bytes from a block's first box to those of this consumer's slice
    Channels through;
    float scale;
    Block block;
    Ring ring;
};

// What a consumer multiplies with its keys or values: queries for P, gradients of the output for ds.
template <bool OF_KEYS>
FATHOM_DEVICE Channel multiplied(const Consumer& at) {
    return OF_KEYS ? at.through.d_o : at.through.queries;
}

// What its operand then meets: P the gradients of the output, ds the queries.
template <bool OF_KEYS>
FATHOM_DEVICE Channel met(const Consumer& at) {
    return OF_KEYS ? at.through.queries : at.through.d_o;
}

// Scores, or dp, of a block of queries begin.
template <bool OF_KEYS>
FATHOM_DEVICE void begin(float (&x)[32], const Consumer& at) {
    const Channel rows = multiplied<OF_KEYS>(at);
    rows.wait(at.ring);
    if (OF_KEYS) dots<V_TILES>(x, at.shared + VALUES_AT, rows.at(at.ring));
    else dots<QK_TILES>(x, at.shared, rows.at(at.ring));
}

// Two neighbouring floats of a stage of lse or delta.
FATHOM_DEVICE float2 load_rows(u32 from, const Ring& ring, u32 column) {
    float2 pair;
    asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];"
                 : "=f"(pair.x), "=f"(pair.y)
                 : "r"(from + ring.stage * ROWS_BYTES + column * 4)
                 : "memory");
    return pair;
}

// Where this thread's elements 4j .. 4j + 3 of a stage of P are: the same ones of both consumers.
FATHOM_DEVICE u32 place_of_p(const Consumer& at, u32 j) {
    return at.shared + P_AT + at.ring.stage * P_BYTES + j * WARPGROUP * 16 + threadIdx.x % WARPGROUP * 16;
}

// Whether query `first` + this thread's column e is one of the segment and sees the key of its row.
FATHOM_DEVICE bool is_seen(const Block& block, u32 first, u32 e) {
    const u32 key = block.first + sum_row() + e / 2 % 2 * 8;
    const u32 query = first + e / 4 * 8 + sum_column() + e % 2;
    return query < block.segment.queries && key <= block.segment.before() + query;
}

// Scores into P, also for the other consumer.
FATHOM_DEVICE void probabilities(float (&x)[32], const Consumer& at, u32 first) {
#pragma unroll
    for (u32 j = 0; j < 8; j++) {
        const float2 lse = load_rows(at.shared + LSE_AT, at.ring, sum_column() + 8 * j);
#pragma unroll
        for (u32 e = 4 * j; e < 4 * j + 4; e++) {
            const float p = probability(x[e], at.scale, e % 2 == 0 ? lse.x : lse.y);
            x[e] = is_seen(at.block, first, e) ? p : 0.0f;
        }
        asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(place_of_p(at, j)), "f"(x[4 * j]),
                     "f"(x[4 * j + 1]), "f"(x[4 * j + 2]), "f"(x[4 * j + 3])
                     : "memory");
    }
    __syncwarp();
    if (threadIdx.x % 32 == 0) mbarrier_arrive(at.shared + P_FULL_AT + at.ring.stage * 8);
}

// dp into ds, by the other consumer's P.
FATHOM_DEVICE void score_gradients(float (&x)[32], const Consumer& at, u32 first) {
    mbarrier_wait(at.shared + P_FULL_AT + at.ring.stage * 8, at.ring.parity);
#pragma unroll
    for (u32 j = 0; j < 8; j++) {
        const float2 delta = load_rows(at.shared + DELTA_AT, at.ring, sum_column() + 8 * j);
        float p[4];
        asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
                     : "=f"(p[0]), "=f"(p[1]), "=f"(p[2]), "=f"(p[3])
                     : "r"(place_of_p(at, j))
                     : "memory");
#pragma unroll
        for (u32 e = 4 * j; e < 4 * j + 4; e++) {
            const float ds = score_gradient(p[e % 4], x[e], e % 2 == 0 ? delta.x : delta.y, at.scale);
            x[e] = is_seen(at.block, first, e) ? ds : 0.0f;
        }
    }
}

// Products into the operand P or ds, while the last LEFT groups run on. The queries begin at `first`.
template <bool OF_KEYS, u32 LEFT>
FATHOM_DEVICE void finish(float (&x)[32], const Consumer& at, u32 first) {
    wgmma_wait<LEFT>(x);
    if (OF_KEYS) score_gradients(x, at, first);
    else probabilities(x, at, first);
    multiplied<OF_KEYS>(at).leave(at.ring);
}

// The operand of the block before meets its rows while that of this block is computed.
template <bool OF_KEYS, u32 TILES>
FATHOM_DEVICE void step(float (&sum)[TILES][32], u32 (&a)[16], Consumer& at, u32 first) {
    const Ring before = at.ring;
    at.ring.advance();
    const Channel rows = met<OF_KEYS>(at);
    float x[32];
    begin<OF_KEYS>(x, at);
    rows.wait(before);
    chain(sum, a, rows.at(before) + at.slice);
    finish<OF_KEYS, 1>(x, at, first);
    wgmma_wait<0>(sum);
    wgmma_pin(a);
    rows.leave(before);
    to_operand(a, x);
}

// sum += a b of the rows below `keep`, and nothing in the others.
template <u32 TILES>
FATHOM_DEVICE void chain_below(float (&sum)[TILES][32], u32 (&a)[16], u32 b, u32 keep) {
#pragma unroll
    for (u32 tile = 0; tile < TILES; tile++) {
        float one[1][32];
#pragma unroll
        for (u32 e = 0; e < 32; e++) one[0][e] = sum[tile][e];
        chain(one, a, b + tile * BOX_BYTES);
        wgmma_wait<0>(one);
#pragma unroll
        for (u32 e = 0; e < 32; e++) {
            if (sum_row() + e / 2 % 2 * 8 < keep) sum[tile][e] = one[0][e];
        }
    }
}

// Zeros in the rows of a block from `rows` on, when both consumers have read them.
template <u32 TILES>
FATHOM_DEVICE void clear_behind(u32 boxes, u32 rows, u32 barrier) {
    named_barrier(1, CONSUMERS * WARPGROUP);
    for (u32 at = threadIdx.x % WARPGROUP * 16; at < TILES * BOX_BYTES; at += WARPGROUP * 16) {
        if (at % BOX_BYTES < rows * 128) continue;
        asm volatile("st.shared.v4.u32 [%0], {%1, %1, %1, %1};" ::"r"(boxes + at), "r"(0) : "memory");
    }
    fence_async_shared();
    named_barrier(barrier, WARPGROUP);
}

// dk or dv of a block of keys: what one head's queries add.
template <bool OF_KEYS, u32 TILES>
FATHOM_DEVICE void accumulate(float (&sum)[TILES][32], Consumer& at, const Queries& queries) {
    const Segment& segment = at.block.segment;
    const Channel rows = met<OF_KEYS>(at);
    u32 block = 0, first = queries.first;
    u32 a[16];
    for (;; block++, first += BLOCK_Q, at.ring.advance()) {
        float x[32];
        begin<OF_KEYS>(x, at);
        finish<OF_KEYS, 0>(x, at, first);
        to_operand(a, x);
        // Keys that its last query sees; of the last block's there is no key behind them.
        const u32 keep = segment.before() + first + BLOCK_Q - at.block.first;
        if (keep >= BOX || block + 1 == queries.blocks) break;
        rows.wait(at.ring);
        chain_below(sum, a, rows.at(at.ring) + at.slice, keep);
        rows.leave(at.ring);
    }
    for (; block + 1 < queries.blocks; block++) {
        first += BLOCK_Q;
        step<OF_KEYS>(sum, a, at, first);
    }
    const u32 last = rows.at(at.ring) + at.slice;
    rows.wait(at.ring);
    if (segment.queries - first < BLOCK_Q) {
        clear_behind<TILES>(last, segment.queries - first, OF_KEYS ? 3 : 2);
    }
    chain(sum, a, last);
    wgmma_wait<0>(sum);
    rows.leave(at.ring);
    at.ring.advance();
}

// dk or dv of a block of keys in `to`, [keys, kv_heads, columns]. Of the last slices one gradient may have
// nothing: it is computed and not stored, for the other's queries.
template <bool OF_KEYS, u32 TILES>
FATHOM_DEVICE void gradient(Consumer& at, const Queries& queries, bf16* to, u32 kv_heads, u32 columns) {
    constexpr u32 SLICE = TILES * BOX;
    const bool there = at.block.slice < slices_of(columns, SLICE);
    const u32 slice = there ? at.block.slice : 0;
    at.slice = slice * TILES * BOX_BYTES;
    float sum[TILES][32] = {};
    mbarrier_wait(at.shared + KEYS_FULL_AT, 0);
    for (u32 head = queries.head; head < queries.end_head && queries.blocks > 0; head++) {
        accumulate<OF_KEYS>(sum, at, queries);
    }
    const u64 row = (u64)kv_heads * columns;
    to += (at.block.segment.key + at.block.first) * row + at.block.head * columns + slice * SLICE;
    if (there) store_rows(sum, to, row, at.block.rows, columns - slice * SLICE);
}

extern "C" __global__ void __launch_bounds__(384, 1)
    bf16_attention_dkv(const __grid_constant__ TensorMap map_q, const __grid_constant__ TensorMap map_d_o,
                       const __grid_constant__ TensorMap map_k, const __grid_constant__ TensorMap map_v,
                       const __grid_constant__ TensorMap map_lse, const __grid_constant__ TensorMap map_delta,
                       bf16* __restrict__ dk, bf16* __restrict__ dv, const int* __restrict__ bounds,
                       u32 segments, float scale, u32 heads, u32 kv_heads, u32 qk, u32 v_columns) {
    extern __shared__ __align__(1024) u8 memory[];
    const u32 shared = shared_address(memory);
    const u32 warpgroup = __shfl_sync(0xFFFFFFFFu, threadIdx.x / WARPGROUP, 0);
    const u32 of_keys = slices_of(qk, DK_TILES * BOX), of_values = slices_of(v_columns, DV_TILES * BOX);
    const u32 slices = of_keys < of_values ? of_values : of_keys;
    const Block block = block_of<false>(bounds, segments, kv_heads, slices);
    const Queries queries = queries_of(block, heads / kv_heads);
    const Channels through = channels_of(shared);

    if (threadIdx.x == 0) {
        mbarrier_init(shared + KEYS_FULL_AT, 1);
        for (u32 i = 0; i < STAGES; i++) mbarrier_init(shared + P_FULL_AT + i * 8, WARPGROUP / 32);
        through.queries.init(CONSUMERS * WARPGROUP / 32);
        through.d_o.init(CONSUMERS * WARPGROUP / 32);
        mbarrier_init_fence();
    }
    __syncthreads();

    if (warpgroup == CONSUMERS) {
        registers_give<24>();
        const Maps maps = {&map_q, &map_d_o, &map_k, &map_v, &map_lse, &map_delta};
        if (threadIdx.x == CONSUMERS * WARPGROUP) produce(shared, maps, block, queries);
        return;
    }
    registers_take<240>();
    Consumer at = {shared, 0, through, scale, block, {}};
    if (warpgroup == 0) gradient<false, DV_TILES>(at, queries, dv, kv_heads, v_columns);
    else gradient<true, DK_TILES>(at, queries, dk, kv_heads, qk);
}
