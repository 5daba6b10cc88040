// The gradients of attention on F32, to the bit the op attention_backward of the reference:
//
//   p_ij = exp(s_ij - lse_i), dp = do v^T, ds = p (dp - delta) scale, 0 where masked
//   dv = p^T do, dq = ds k, dk = ds^T q
//
// Every sum is one chain of fma over ascending rows; the heads of one KV head come one after the other.
//
// CONSTANTS
//   GRADIENT  0: dq, 1: dk, 2: dv
//   TILES     columns of the gradient's head that a CTA computes, in 64s
// LAUNCH
//   256 threads; a CTA for every 64 queries of a segment and head (dq), or 64 keys and KV head, and slice of
//   64 TILES columns.
// NOTES
// - A block of 64 queries reads all keys that its last query sees: of those that a query does not see p and
//   ds are 0, and 0 times infinity is NaN. Keys beyond are no part of its sums.
#include "attention/backward.cuh"
#include "attention/block.cuh"
#include "attention/fp32_blocks.cuh"
#include "common/float.cuh"
#include "common/types.cuh"

// The constant GRADIENT.
constexpr u32 OF_QUERIES = 0;
constexpr u32 OF_KEYS = 1;
constexpr u32 OF_VALUES = 2;

constexpr u32 SLICE = TILES * FMA_TILE;

struct Inputs {
    const float *q, *k, *v, *d_o, *lse, *delta;
    float scale;
    u32 heads, kv_heads, qk, v_columns;
    u64 row_q, row_k, row_v;
};

// Where the block of rows `first` .. of a segment's queries, or keys, begins for a head.
FATHOM_DEVICE const float* queries_of(const Inputs& in, const Segment& s, u32 first, u32 head) {
    return in.q + (s.query + first) * in.row_q + head * in.qk;
}
FATHOM_DEVICE const float* d_o_of(const Inputs& in, const Segment& s, u32 first, u32 head) {
    return in.d_o + ((u64)(s.query + first) * in.heads + head) * in.v_columns;
}
FATHOM_DEVICE const float* keys_of(const Inputs& in, const Segment& s, u32 first, u32 kv_head) {
    return in.k + (s.key + first) * in.row_k + kv_head * in.qk;
}
FATHOM_DEVICE const float* values_of(const Inputs& in, const Segment& s, u32 first, u32 kv_head) {
    return in.v + (s.key + first) * in.row_v + kv_head * in.v_columns;
}

// sum[tile] += tile_a times `depth` rows of b, for the columns of this CTA's slice; rows of the sums from `keep`
// on stay as they are.
FATHOM_DEVICE void chain(float (&sum)[TILES][4][4], const float* tile_a, float* tile_b, const float* b, u64 row_b,
                         u32 columns, u32 depth, u32 keep) {
#pragma unroll
    for (u32 tile = 0; tile < TILES; tile++) {
        const u32 at = tile * FMA_TILE;
        if (tile > 0) __syncthreads();
        fma_load<false>(tile_b, b + at, row_b, columns < at ? 0 : columns - at, depth);
        __syncthreads();
        float next[4][4];
#pragma unroll
        for (u32 e = 0; e < 16; e++) next[e / 4][e % 4] = sum[tile][e / 4][e % 4];
        fma_tile(next, tile_a, tile_b, depth);
#pragma unroll
        for (u32 e = 0; e < 16; e++) {
            if (fma_row() + e / 4 < keep) sum[tile][e / 4][e % 4] = next[e / 4][e % 4];
        }
    }
}

FATHOM_DEVICE void store_rows(const float (&sum)[TILES][4][4], float* to, u64 row_to, u32 rows, u32 columns) {
#pragma unroll
    for (u32 e = 0; e < TILES * 16; e++) {
        const u32 row = fma_row() + e % 16 / 4, column = e / 16 * FMA_TILE + fma_column() + e % 4;
        if (row < rows && column < columns) store(to + row * row_to + column, sum[e / 16][e % 16 / 4][e % 4]);
    }
}

// dq of a block of queries: over the keys that its last one sees.
FATHOM_DEVICE void of_queries(const Inputs& in, const Block& block, float* tile_a, float* tile_b, float* out) {
    const Segment& segment = block.segment;
    const u32 kv_head = block.head * in.kv_heads / in.heads;
    const u32 start = block.slice * SLICE;
    const u32 seen_last = segment.before() + block.first + block.rows;
    float sum[TILES][4][4] = {};
    for (u32 kv = 0; kv < seen_last; kv += BLOCK_KV) {
        const u32 width = seen_last - kv < BLOCK_KV ? seen_last - kv : BLOCK_KV;
        float s[4][4] = {}, dp[4][4] = {};
        const float* keys = keys_of(in, segment, kv, kv_head);
        dots(s, tile_a, tile_b, queries_of(in, segment, block.first, block.head), in.row_q, block.rows, keys,
             in.row_k, width, in.qk);
        dots(dp, tile_a, tile_b, d_o_of(in, segment, block.first, block.head), (u64)in.heads * in.v_columns,
             block.rows, values_of(in, segment, kv, kv_head), in.row_v, width, in.v_columns);
#pragma unroll
        for (u32 e = 0; e < 16; e++) {
            const u32 row = fma_row() + e / 4, key = kv + fma_column() + e % 4;
            const u64 at = (u64)(segment.query + block.first + row) * in.heads + block.head;
            float ds = 0.0f;
            if (row < block.rows && key <= segment.before() + block.first + row) {
                const float p = probability(s[e / 4][e % 4], in.scale, in.lse[at]);
                ds = score_gradient(p, dp[e / 4][e % 4], in.delta[at], in.scale);
            }
            s[e / 4][e % 4] = ds;
        }
        __syncthreads();
        store_operand(tile_a, s);
        chain(sum, tile_a, tile_b, keys + start, in.row_k, in.qk - start, width, BLOCK_Q);
    }
    float* to = out + (segment.query + block.first) * in.row_q + block.head * in.qk + start;
    store_rows(sum, to, in.row_q, block.rows, in.qk - start);
}

// dk or dv of a block of keys: over the heads that read it and the queries that see it.
FATHOM_DEVICE void of_keys(const Inputs& in, const Block& block, float* tile_a, float* tile_b, float* out) {
    const Segment& segment = block.segment;
    const u32 group = in.heads / in.kv_heads, start = block.slice * SLICE;
    const u32 columns = GRADIENT == OF_KEYS ? in.qk : in.v_columns;
    const u64 row_o = (u64)in.heads * in.v_columns;
    float sum[TILES][4][4] = {};
    for (u32 head = block.head * group; head < (block.head + 1) * group; head++) {
        for (u32 first = first_query(segment, block.first); first < segment.queries; first += BLOCK_Q) {
            const u32 rows = segment.queries - first < BLOCK_Q ? segment.queries - first : BLOCK_Q;
            const u32 seen_last = segment.before() + first + rows;
            const float* queries = queries_of(in, segment, first, head);
            const float* d_o = d_o_of(in, segment, first, head);
            float s[4][4] = {}, dp[4][4] = {};
            dots(s, tile_a, tile_b, keys_of(in, segment, block.first, block.head), in.row_k, block.rows, queries,
                 in.row_q, rows, in.qk);
            if (GRADIENT == OF_KEYS) {
                dots(dp, tile_a, tile_b, values_of(in, segment, block.first, block.head), in.row_v, block.rows,
                     d_o, row_o, rows, in.v_columns);
            }
#pragma unroll
            for (u32 e = 0; e < 16; e++) {
                const u32 key = block.first + fma_row() + e / 4, query = first + fma_column() + e % 4;
                const u64 at = (u64)(segment.query + query) * in.heads + head;
                float x = 0.0f;
                if (query < segment.queries && key <= segment.before() + query) {
                    x = probability(s[e / 4][e % 4], in.scale, in.lse[at]);
                    if (GRADIENT == OF_KEYS) x = score_gradient(x, dp[e / 4][e % 4], in.delta[at], in.scale);
                }
                s[e / 4][e % 4] = x;
            }
            __syncthreads();
            store_operand(tile_a, s);
            const float* b = GRADIENT == OF_KEYS ? queries : d_o;
            const u64 row_b = GRADIENT == OF_KEYS ? in.row_q : row_o;
            chain(sum, tile_a, tile_b, b + start, row_b, columns - start, rows, seen_last - block.first);
        }
    }
    const u64 row_to = (u64)in.kv_heads * columns;
    float* to = out + (segment.key + block.first) * row_to + block.head * columns + start;
    store_rows(sum, to, row_to, block.rows, columns - start);
}

extern "C" __global__ void __launch_bounds__(256, 1)
    fp32_attention_backward(const float* __restrict__ q, const float* __restrict__ k, const float* __restrict__ v,
                            const float* __restrict__ d_o, const float* __restrict__ lse,
                            const float* __restrict__ delta, float* __restrict__ out,
                            const int* __restrict__ bounds, u32 segments, float scale, u32 heads, u32 kv_heads,
                            u32 qk, u32 v_columns, u64 row_q, u64 row_k, u64 row_v, u64 first_v) {
    __shared__ __align__(16) float tile_a[FMA_TILE_FLOATS];
    __shared__ __align__(16) float tile_b[FMA_TILE_FLOATS];
    const Inputs in = {q, k, v + first_v, d_o, lse, delta, scale, heads, kv_heads, qk, v_columns, row_q, row_k, row_v};
    const u32 slices = slices_of(GRADIENT == OF_VALUES ? v_columns : qk, SLICE);
    if (GRADIENT == OF_QUERIES) {
        of_queries(in, block_of<true>(bounds, segments, heads, slices), tile_a, tile_b, out);
    } else {
        of_keys(in, block_of<false>(bounds, segments, kv_heads, slices), tile_a, tile_b, out);
    }
}
