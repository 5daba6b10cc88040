// Which queries or keys of which head a CTA works on: the segments of the ops attention, attention_backward,
// attention_cached and attention_latent, cut into blocks of 64 rows from each segment's start.
//
// A segment has as many keys as queries or more; its queries are then the last rows. `bounds` are the
// segments' first query rows and their end, then the same of their keys.
#ifndef FATHOM_ATTENTION_BLOCK_CUH
#define FATHOM_ATTENTION_BLOCK_CUH

#include "common/types.cuh"

constexpr u32 BLOCK_Q = 64;
constexpr u32 BLOCK_KV = 64;

struct Segment {
    u32 query, queries;  // first row and number of rows
    u32 key, keys;
    // Keys in front of the first query: query i sees keys 0 ..= before + i.
    __device__ __forceinline__ u32 before() const { return keys - queries; }
};

FATHOM_DEVICE Segment segment_of(const int* bounds, u32 segments, u32 index) {
    const int* keys = bounds + segments + 1;
    return {(u32)bounds[index], (u32)(bounds[index + 1] - bounds[index]), (u32)keys[index],
            (u32)(keys[index + 1] - keys[index])};
}

// A block of rows of one head: of queries, or of keys.
struct Block {
    Segment segment;
    u32 first, rows;  // within the segment
    u32 head;
    u32 slice;  // which part of the columns
};

// Parts of at most `slice` that the columns of a head are cut into; one where there is no column.
FATHOM_DEVICE u32 slices_of(u32 columns, u32 slice) { return columns == 0 ? 1 : ceil_div(columns, slice); }

// The block of this CTA: slices innermost, then heads, then blocks of the segments.
template <bool QUERIES>
FATHOM_DEVICE Block block_of(const int* bounds, u32 segments, u32 heads, u32 slices) {
    u32 block = blockIdx.x / slices / heads;
    Segment segment = segment_of(bounds, segments, 0);
    for (u32 index = 0;; index++) {
        segment = segment_of(bounds, segments, index);
        const u32 blocks = ceil_div(QUERIES ? segment.queries : segment.keys, BLOCK_Q);
        if (block < blocks) break;
        block -= blocks;
    }
    const u32 first = block * BLOCK_Q;
    const u32 left = (QUERIES ? segment.queries : segment.keys) - first;
    return {segment, first, left < BLOCK_Q ? left : BLOCK_Q, blockIdx.x / slices % heads, blockIdx.x % slices};
}

#endif
