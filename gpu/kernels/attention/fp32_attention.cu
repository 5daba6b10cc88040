// Causal attention on F32, to the bit the ops attention, attention_cached and attention_latent of the
// reference. For each query row, over KV blocks of 64 rows counted from the segment's start, ascending:
//
//   s_j = scale * dot(q, k_j), the dot a chain of fma over ascending columns
//   m'  = max(m, max_j s_j), p_j = exp(s_j - m'), a = exp(m - m'); p_j = 0 where masked
//   l   = l a + sum_j p_j, o = o a, then o_c continues as a chain of fma p_j v_jc over ascending j
//
// At the end o = o / l and lse = m + ln(l). The sum over j has 16 chains, element j in chain j % 16, then
// the halving tree over them.
//
// CONSTANTS
//   V_TILES  columns of a value head that a CTA computes, in 64s
// LAUNCH
//   256 threads; a CTA for every 64 queries of a segment, head and slice of 64 V_TILES columns.
// NOTES
// - A block of 64 queries computes all keys that its last query sees: those that a row does not see enter o
//   with p = 0, as in the reference, where 0 times infinity is NaN.
#include "attention/block.cuh"
#include "attention/fp32_blocks.cuh"
#include "common/elementary.cuh"
#include "common/float.cuh"
#include "common/types.cuh"
#include "mma/fma.cuh"

// The sum over the 64 columns of a row that the 16 threads of a half warp hold, thread c columns 4c .. 4c + 3.
FATHOM_DEVICE float row_sum(const float (&p)[4]) {
    float chain[4];
#pragma unroll
    for (u32 j = 0; j < 4; j++) {
        chain[j] = __shfl_sync(0xFFFFFFFFu, p[j], threadIdx.x % 4, 16);
#pragma unroll
        for (u32 i = 4; i < 16; i += 4) {
            chain[j] = __fadd_rn(chain[j], __shfl_sync(0xFFFFFFFFu, p[j], threadIdx.x % 4 + i, 16));
        }
        chain[j] = __fadd_rn(chain[j], __shfl_xor_sync(0xFFFFFFFFu, chain[j], 2));
        chain[j] = __fadd_rn(chain[j], __shfl_xor_sync(0xFFFFFFFFu, chain[j], 1));
    }
    return __fadd_rn(__fadd_rn(chain[0], chain[2]), __fadd_rn(chain[1], chain[3]));
}

// Scores of one row and KV block into probabilities; gives the factor of what was summed before.
FATHOM_DEVICE float online_softmax(float (&s)[4], u32 column, u32 seen, float scale, float* m, float* l) {
    float top = *m;
#pragma unroll
    for (u32 j = 0; j < 4; j++) {
        s[j] = __fmul_rn(s[j], scale);
        if (column + j < seen) top = fmaxf(top, s[j]);
    }
#pragma unroll
    for (u32 distance = 8; distance > 0; distance /= 2) {
        top = fmaxf(top, __shfl_xor_sync(0xFFFFFFFFu, top, distance));
    }
#pragma unroll
    for (u32 j = 0; j < 4; j++) {
        s[j] = column + j < seen ? fathom_exp(__fsub_rn(s[j], top)) : 0.0f;
    }
    const float sum = row_sum(s);
    if (seen == 0) return 1.0f;
    const float alpha = fathom_exp(__fsub_rn(*m, top));
    *l = __fadd_rn(__fmul_rn(*l, alpha), sum);
    *m = top;
    return alpha;
}

extern "C" __global__ void __launch_bounds__(256, 1)
    fp32_attention(const float* __restrict__ q, const float* __restrict__ k, const float* __restrict__ v,
                   float* __restrict__ o, float* __restrict__ lse, const int* __restrict__ bounds, u32 segments,
                   float scale, u32 heads, u32 kv_heads, u32 qk, u32 v_columns, u64 row_q, u64 row_k, u64 row_v,
                   u64 first_v) {
    __shared__ __align__(16) float tile_a[FMA_TILE_FLOATS];
    __shared__ __align__(16) float tile_b[FMA_TILE_FLOATS];
    constexpr u32 SLICE = V_TILES * FMA_TILE;
    const Block block = block_of<true>(bounds, segments, heads, slices_of(v_columns, SLICE));
    const Segment segment = block.segment;
    const u32 kv_head = block.head * kv_heads / heads;
    const float* queries = q + (segment.query + block.first) * row_q + block.head * qk;
    const float* keys = k + segment.key * row_k + kv_head * qk;
    const float* values = v + segment.key * row_v + first_v + kv_head * v_columns + block.slice * SLICE;
    const u32 columns = v_columns - block.slice * SLICE < SLICE ? v_columns - block.slice * SLICE : SLICE;
    const u32 row = fma_row(), column = fma_column();
    // What the first row sees, and what the last one does.
    const u32 seen_first = segment.before() + block.first + 1;
    const u32 seen_last = segment.before() + block.first + block.rows;

    float out[V_TILES][4][4] = {};
    float m[4], l[4];
#pragma unroll
    for (u32 i = 0; i < 4; i++) {
        m[i] = __uint_as_float(0xFF800000u);
        l[i] = 0.0f;
    }
    for (u32 kv = 0; kv < seen_last; kv += BLOCK_KV) {
        const u32 width = seen_last - kv < BLOCK_KV ? seen_last - kv : BLOCK_KV;
        float s[4][4] = {};
        dots(s, tile_a, tile_b, queries, row_q, block.rows, keys + kv * row_k, row_k, width, qk);
#pragma unroll
        for (u32 i = 0; i < 4; i++) {
            const u32 own = seen_first + row + i;
            const u32 seen = own <= kv ? 0 : own - kv < width ? own - kv : width;
            const float alpha = online_softmax(s[i], column, seen, scale, &m[i], &l[i]);
#pragma unroll
            for (u32 c = 0; c < V_TILES * 4; c++) {
                out[c / 4][i][c % 4] = __fmul_rn(out[c / 4][i][c % 4], alpha);
            }
        }
        __syncthreads();
        store_operand(tile_a, s);
#pragma unroll
        for (u32 tile = 0; tile < V_TILES; tile++) {
            const u32 at = tile * FMA_TILE;
            if (tile > 0) __syncthreads();
            fma_load<false>(tile_b, values + kv * row_v + at, row_v, columns < at ? 0 : columns - at, width);
            __syncthreads();
            fma_tile(out[tile], tile_a, tile_b, width);
        }
    }
#pragma unroll
    for (u32 i = 0; i < 4; i++) {
        const u64 query = segment.query + block.first + row + i;
        if (row + i >= block.rows) continue;
#pragma unroll
        for (u32 c = 0; c < V_TILES * 4; c++) {
            const u32 at = c / 4 * FMA_TILE + column + c % 4;
            float* place = o + (query * heads + block.head) * v_columns + block.slice * SLICE + at;
            if (at < columns) store(place, __fdiv_rn(out[c / 4][i][c % 4], l[i]));
        }
        const bool first = lse && block.slice == 0 && column == 0;
        if (first) store(lse + query * heads + block.head, __fadd_rn(m[i], fathom_log(l[i])));
    }
}
