// The gradients of attention on BF16, to the bit the op attention_backward of the reference: the steps of
// fp32_attention_backward.cu with every product on the tensor cores (wgmma, groups of 16). P and ds are rounded
// to BF16 as operands; dq, dk and dv are chained in FP32 and rounded to BF16 at the end.
//
// CONSTANTS
//   GRADIENT  0: dq, 1: dk, 2: dv
//   QK, V     columns of a query or key head, and of a value head
//   TILES     columns of the gradient's head that a CTA computes, in 64s
//   ALIGNED   1: eight columns of a head can be read at once, 0: one by one
// LAUNCH
//   128 threads, 2 (ceil(QK / 64) + ceil(V / 64)) boxes of 8,192 bytes of shared memory and 16,384 bytes for
//   every tile; a CTA for every 64 queries of a segment and head (dq), or 64 keys and KV head, and slice of 64
//   TILES columns.
// NOTES
// - A block of 64 queries reads all keys that its last query sees, and no other: of those that a query does not
//   see p and ds are 0, and the exponent of zero times a large number counts. Where the keys of a block end
//   between, the sums of those beyond are kept aside and put back.
// - dk and dv need scores with keys as rows: the products of keys and queries, whose elements are the same sums.
#include "attention/backward.cuh"
#include "attention/block.cuh"
#include "attention/boxes.cuh"
#include "common/float.cuh"
#include "common/types.cuh"
#include "ptx/barrier.cuh"
#include "ptx/tma.cuh"

constexpr u32 QK_BOXES = QK == 0 ? 1 : ceil_div<u32>(QK, BOX);
constexpr u32 V_BOXES = V == 0 ? 1 : ceil_div<u32>(V, BOX);
constexpr u32 KEYS_AT = QK_BOXES * BOX_BYTES;
constexpr u32 VALUES_AT = KEYS_AT + QK_BOXES * BOX_BYTES;
constexpr u32 D_O_AT = VALUES_AT + V_BOXES * BOX_BYTES;
constexpr u32 ASIDE_AT = D_O_AT + V_BOXES * BOX_BYTES;
constexpr u32 SLICE = TILES * BOX;
constexpr u32 COLUMNS = GRADIENT == OF_VALUES ? V : QK;

struct Inputs {
    const u16 *q, *k, *v, *d_o;
    const float *lse, *delta;
    float scale;
    u32 heads, kv_heads;
    u64 row_q, row_k, row_v;
};

FATHOM_DEVICE void load_queries(const Inputs& in, u32 shared, const Segment& s, u32 first, u32 rows, u32 head) {
    const u64 query = s.query + first;
    load_boxes(shared, in.q + query * in.row_q + head * QK, in.row_q, rows, QK, QK_BOXES);
    const u64 row_o = (u64)in.heads * V;
    load_boxes(shared + D_O_AT, in.d_o + query * row_o + head * V, row_o, rows, V, V_BOXES);
}

FATHOM_DEVICE void load_keys(const Inputs& in, u32 shared, const Segment& s, u32 first, u32 rows, u32 kv_head) {
    const u64 key = s.key + first;
    load_boxes(shared + KEYS_AT, in.k + key * in.row_k + kv_head * QK, in.row_k, rows, QK, QK_BOXES);
    load_boxes(shared + VALUES_AT, in.v + key * in.row_v + kv_head * V, in.row_v, rows, V, V_BOXES);
}

FATHOM_DEVICE void store_rows(const float (&sum)[TILES][32], bf16* to, u64 row_to, u32 rows, u32 columns) {
#pragma unroll
    for (u32 e = 0; e < TILES * 32; e++) {
        const u32 row = sum_row() + e / 2 % 2 * 8, column = e / 4 * 8 + sum_column() + e % 2;
        if (row < rows && column < columns) store(to + row * row_to + column, sum[e / 32][e % 32]);
    }
}

// dq of a block of queries: over the keys that its last one sees.
FATHOM_DEVICE void of_queries(const Inputs& in, const Block& block, u32 shared, bf16* out) {
    const Segment& segment = block.segment;
    const u32 kv_head = block.head * in.kv_heads / in.heads;
    const u32 seen_last = segment.before() + block.first + block.rows;
    float lse[2], delta[2];
#pragma unroll
    for (u32 i = 0; i < 2; i++) {
        const u32 row = sum_row() + 8 * i < block.rows ? sum_row() + 8 * i : 0;
        const u64 at = (u64)(segment.query + block.first + row) * in.heads + block.head;
        lse[i] = in.lse[at];
        delta[i] = in.delta[at];
    }
    load_queries(in, shared, segment, block.first, block.rows, block.head);
    float sum[TILES][32] = {};
    for (u32 kv = 0; kv < seen_last; kv += BLOCK_KV) {
        const u32 width = seen_last - kv < BLOCK_KV ? seen_last - kv : BLOCK_KV;
        if (kv > 0) __syncthreads();
        load_keys(in, shared, segment, kv, width, kv_head);
        fence_async_shared();
        __syncthreads();
        float s[32], dp[32];
        dots(s, shared, shared + KEYS_AT, QK_BOXES);
        dots(dp, shared + D_O_AT, shared + VALUES_AT, V_BOXES);
#pragma unroll
        for (u32 e = 0; e < 32; e++) {
            const u32 i = e / 2 % 2, row = sum_row() + 8 * i, key = kv + e / 4 * 8 + sum_column() + e % 2;
            const bool seen = row < block.rows && key <= segment.before() + block.first + row;
            const float p = probability(s[e], in.scale, lse[i]);
            s[e] = seen ? score_gradient(p, dp[e], delta[i], in.scale) : 0.0f;
        }
        u32 ds[16];
        to_operand(ds, s);
        chain(sum, ds, shared + KEYS_AT + block.slice * TILES * BOX_BYTES);
    }
    bf16* to = out + (segment.query + block.first) * in.row_q + block.head * QK + block.slice * SLICE;
    store_rows(sum, to, in.row_q, block.rows, QK - block.slice * SLICE);
}

// sum += a b of the rows below `keep`, and nothing in the others.
FATHOM_DEVICE void chain_below(float (&sum)[TILES][32], u32 (&a)[16], u32 b, u32 keep, float* aside) {
    if (keep < BOX) {
#pragma unroll
        for (u32 e = 0; e < TILES * 32; e++) aside[e * WARPGROUP + threadIdx.x] = sum[e / 32][e % 32];
    }
    chain(sum, a, b);
    if (keep < BOX) {
#pragma unroll
        for (u32 e = 0; e < TILES * 32; e++) {
            const u32 row = sum_row() + e / 2 % 2 * 8;
            if (row >= keep) sum[e / 32][e % 32] = aside[e * WARPGROUP + threadIdx.x];
        }
    }
}

// dk or dv of a block of keys: over the heads that read it and the queries that see it.
FATHOM_DEVICE void of_keys(const Inputs& in, const Block& block, u32 shared, float* aside, bf16* out) {
    const Segment& segment = block.segment;
    const u32 group = in.heads / in.kv_heads;
    load_keys(in, shared, segment, block.first, block.rows, block.head);
    float sum[TILES][32] = {};
    for (u32 head = block.head * group; head < (block.head + 1) * group; head++) {
        for (u32 first = first_query(segment, block.first); first < segment.queries; first += BLOCK_Q) {
            const u32 rows = segment.queries - first < BLOCK_Q ? segment.queries - first : BLOCK_Q;
            const u32 seen_last = segment.before() + first + rows;
            __syncthreads();
            load_queries(in, shared, segment, first, rows, head);
            fence_async_shared();
            __syncthreads();
            float s[32], dp[32];
            dots(s, shared + KEYS_AT, shared, QK_BOXES);
            if (GRADIENT == OF_KEYS) dots(dp, shared + VALUES_AT, shared + D_O_AT, V_BOXES);
#pragma unroll
            for (u32 e = 0; e < 32; e++) {
                const u32 key = block.first + sum_row() + e / 2 % 2 * 8;
                const u32 query = first + e / 4 * 8 + sum_column() + e % 2;
                float x = 0.0f;
                if (query < segment.queries && key <= segment.before() + query) {
                    const u64 at = (u64)(segment.query + query) * in.heads + head;
                    x = probability(s[e], in.scale, in.lse[at]);
                    if (GRADIENT == OF_KEYS) x = score_gradient(x, dp[e], in.delta[at], in.scale);
                }
                s[e] = x;
            }
            u32 operand[16];
            to_operand(operand, s);
            const u32 b = shared + (GRADIENT == OF_KEYS ? 0 : D_O_AT) + block.slice * TILES * BOX_BYTES;
            chain_below(sum, operand, b, seen_last - block.first, aside);
        }
    }
    const u64 row_to = (u64)in.kv_heads * COLUMNS;
    bf16* to = out + (segment.key + block.first) * row_to + block.head * COLUMNS + block.slice * SLICE;
    store_rows(sum, to, row_to, block.rows, COLUMNS - block.slice * SLICE);
}

extern "C" __global__ void __launch_bounds__(128)
    bf16_attention_backward(const u16* __restrict__ q, const u16* __restrict__ k, const u16* __restrict__ v,
                            const u16* __restrict__ d_o, const float* __restrict__ lse,
                            const float* __restrict__ delta, bf16* __restrict__ out,
                            const int* __restrict__ bounds, u32 segments, float scale, u32 heads, u32 kv_heads,
                            u32 qk, u32 v_columns, u64 row_q, u64 row_k, u64 row_v, u64 first_v) {
    extern __shared__ __align__(1024) u8 memory[];
    const u32 shared = shared_address(memory);
    const Inputs in = {q, k, v + first_v, d_o, lse, delta, scale, heads, kv_heads, row_q, row_k, row_v};
    const u32 slices = slices_of(COLUMNS, SLICE);
    if (GRADIENT == OF_QUERIES) {
        of_queries(in, block_of<true>(bounds, segments, heads, slices), shared, out);
    } else {
        of_keys(in, block_of<false>(bounds, segments, kv_heads, slices), shared, (float*)(memory + ASIDE_AT), out);
    }
}
