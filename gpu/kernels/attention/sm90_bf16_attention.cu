// Causal attention on BF16, to the bit the ops attention, attention_cached and attention_latent of the
// reference: the steps of fp32_attention.cu with every product on the tensor cores (wgmma, groups of 16).
// Scores start from zero; P is rounded to BF16 (its sum l takes the unrounded FP32) and chained onto the
// rescaled o, in groups of 16 rows from the KV block's start. o is rounded to BF16 at the end.
//
// CONSTANTS
//   QK       columns of a query or key head
//   V_TILES  columns of a value head that a CTA computes, in 64s
//   ALIGNED  1: eight columns of a head can be read at once, 0: one by one
// LAUNCH
//   128 threads, (2 ceil(QK / 64) + V_TILES) boxes of 8,192 bytes of shared memory; a CTA for every 64
//   queries of a segment, head and slice of 64 V_TILES columns.
// NOTES
// - A block of 64 queries computes all keys that its last query sees, and no other: those that a row does
//   not see enter o with p = 0, and the exponent of zero times a large number counts.
#include "attention/block.cuh"
#include "attention/boxes.cuh"
#include "common/elementary.cuh"
#include "common/float.cuh"
#include "common/types.cuh"
#include "ptx/barrier.cuh"
#include "ptx/tma.cuh"

constexpr u32 QK_BOXES = QK == 0 ? 1 : ceil_div<u32>(QK, BOX);
constexpr u32 KEYS_AT = QK_BOXES * BOX_BYTES;
constexpr u32 VALUES_AT = KEYS_AT + QK_BOXES * BOX_BYTES;
constexpr u32 SLICE = V_TILES * BOX;

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

// Scores of one row and KV block into probabilities; gives the factor of what was summed before.
FATHOM_DEVICE float online_softmax(float (&s)[32], u32 half, u32 seen, float scale, float* m, float* l) {
    float top = *m;
#pragma unroll
    for (u32 j = 0; j < 16; j++) {
        const u32 at = j / 2 * 4 + half + j % 2, column = sum_column() + j / 2 * 8 + j % 2;
        s[at] = __fmul_rn(s[at], scale);
        if (column < seen) top = fmaxf(top, s[at]);
    }
    top = fmaxf(top, __shfl_xor_sync(0xFFFFFFFFu, top, 2));
    top = fmaxf(top, __shfl_xor_sync(0xFFFFFFFFu, top, 1));
#pragma unroll
    for (u32 j = 0; j < 16; j++) {
        const u32 at = j / 2 * 4 + half + j % 2, column = sum_column() + j / 2 * 8 + j % 2;
        s[at] = column < seen ? fathom_exp(__fsub_rn(s[at], top)) : 0.0f;
    }
    const float sum = row_sum(s, half);
    if (seen == 0) return 1.0f;
    const float alpha = fathom_exp(__fsub_rn(*m, top));
    *l = __fadd_rn(__fmul_rn(*l, alpha), sum);
    *m = top;
    return alpha;
}

extern "C" __global__ void __launch_bounds__(128)
    bf16_attention(const u16* __restrict__ q, const u16* __restrict__ k, const u16* __restrict__ v,
                   bf16* __restrict__ o, float* __restrict__ lse, const int* __restrict__ bounds, u32 segments,
                   float scale, u32 heads, u32 kv_heads, u32 qk, u32 v_columns, u64 row_q, u64 row_k, u64 row_v,
                   u64 first_v) {
    extern __shared__ __align__(1024) u8 memory[];
    const u32 shared = shared_address(memory);
    const Block block = block_of<true>(bounds, segments, heads, slices_of(v_columns, SLICE));
    const Segment segment = block.segment;
    const u32 kv_head = block.head * kv_heads / heads;
    const u16* keys = k + segment.key * row_k + kv_head * QK;
    const u16* values = v + segment.key * row_v + first_v + kv_head * v_columns + block.slice * SLICE;
    const u32 columns = v_columns - block.slice * SLICE < SLICE ? v_columns - block.slice * SLICE : SLICE;
    // What the first row sees, and what the last one does.
    const u32 seen_first = segment.before() + block.first + 1;
    const u32 seen_last = segment.before() + block.first + block.rows;
    load_boxes(shared, q + (segment.query + block.first) * row_q + block.head * QK, row_q, block.rows, QK, QK_BOXES);

    float out[V_TILES][32] = {};
    float m[2] = {__uint_as_float(0xFF800000u), __uint_as_float(0xFF800000u)};
    float l[2] = {0.0f, 0.0f};
    for (u32 kv = 0; kv < seen_last; kv += BLOCK_KV) {
        const u32 width = seen_last - kv < BLOCK_KV ? seen_last - kv : BLOCK_KV;
        if (kv > 0) __syncthreads();
        load_boxes(shared + KEYS_AT, keys + kv * row_k, row_k, width, QK, QK_BOXES);
        load_boxes(shared + VALUES_AT, values + kv * row_v, row_v, width, columns, V_TILES);
        fence_async_shared();
        __syncthreads();
        float s[32];
        dots(s, shared, shared + KEYS_AT, QK_BOXES);
#pragma unroll
        for (u32 i = 0; i < 2; i++) {
            const u32 own = seen_first + sum_row() + 8 * i;
            const u32 seen = own <= kv ? 0 : own - kv < width ? own - kv : width;
            const float alpha = online_softmax(s, 2 * i, seen, scale, &m[i], &l[i]);
#pragma unroll
            for (u32 c = 0; c < V_TILES * 16; c++) {
                const u32 at = c % 16 / 2 * 4 + 2 * i + c % 2;
                out[c / 16][at] = __fmul_rn(out[c / 16][at], alpha);
            }
        }
        u32 p[16];
        to_operand(p, s);
        chain(out, p, shared + VALUES_AT);
    }
#pragma unroll
    for (u32 i = 0; i < 2; i++) {
        const u32 row = sum_row() + 8 * i;
        const u64 query = segment.query + block.first + row;
        if (row >= block.rows) continue;
        bf16* place = o + (query * heads + block.head) * v_columns + block.slice * SLICE;
#pragma unroll
        for (u32 c = 0; c < V_TILES * 16; c++) {
            const u32 column = c / 2 * 8 + sum_column() + c % 2;
            const float sum = out[c / 16][c % 16 / 2 * 4 + 2 * i + c % 2];
            if (column < columns) store(place + column, __fdiv_rn(sum, l[i]));
        }
        const bool first = lse && block.slice == 0 && sum_column() == 0;
        if (first) store(lse + query * heads + block.head, __fadd_rn(m[i], fathom_log(l[i])));
    }
}
