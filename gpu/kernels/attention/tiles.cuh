// Which queries of which heads the warpgroups of a CTA work on.
//
// A tile is 64 rows: PACK heads, which read one key head, of each of 64 / PACK neighbouring queries, heads
// innermost. The tiles of a segment and key head are counted by queries, then by heads; the consumers of a
// CTA take neighbouring ones and share keys and values.
#ifndef FATHOM_ATTENTION_TILES_CUH
#define FATHOM_ATTENTION_TILES_CUH

#include "attention/block.cuh"
#include "attention/boxes.cuh"
#include "common/types.cuh"

constexpr u32 TILE_QUERIES = BOX / PACK;

struct Tile {
    u32 first, queries;  // within the segment
    u32 head, heads;
    // Rows of it count down `queries`, across `heads`; the others are nobody's.
    __device__ __forceinline__ u32 query(u32 row) const { return first + row / PACK; }
    __device__ __forceinline__ bool has(u32 row) const { return row / PACK < queries && row % PACK < heads; }
    // Blocks of keys that its last query sees, wholly or in part.
    __device__ __forceinline__ u32 seen_last(const Segment& s) const { return s.before() + first + queries; }
    __device__ __forceinline__ u32 blocks(const Segment& s) const { return ceil_div(seen_last(s), BLOCK_KV); }
};

// What a CTA works on.
struct Tiles {
    Segment segment;
    u32 kv_head, group;  // group: heads that read a key head
    u32 slice;           // which part of the columns
    u32 first, end;      // tiles
    __device__ __forceinline__ Tile tile(u32 index) const {
        const u32 across = ceil_div<u32>(group, PACK);
        const u32 query = index / across * TILE_QUERIES, head = index % across * PACK;
        const u32 queries = segment.queries - query < TILE_QUERIES ? segment.queries - query : TILE_QUERIES;
        return {query, queries, kv_head * group + head, group - head < PACK ? group - head : PACK};
    }
    // Blocks of keys that pass through the ring.
    __device__ __forceinline__ u32 blocks() const { return tile(end - 1).blocks(segment); }
};

// The tiles of this CTA: slices innermost, then key heads, then the tiles of the segments, of each those
// first that see most keys.
FATHOM_DEVICE Tiles tiles_of(const int* bounds, u32 segments, u32 kv_heads, u32 group, u32 slices) {
    u32 index = blockIdx.x / slices / kv_heads;
    Segment segment = segment_of(bounds, segments, 0);
    u32 tiles = 0, ctas = 0;
    for (u32 i = 0;; i++) {
        segment = segment_of(bounds, segments, i);
        tiles = ceil_div(segment.queries, TILE_QUERIES) * ceil_div<u32>(group, PACK);
        ctas = ceil_div<u32>(tiles, CONSUMERS);
        if (index < ctas) break;
        index -= ctas;
    }
    const u32 first = (ctas - 1 - index) * CONSUMERS;
    const u32 end = tiles - first < CONSUMERS ? tiles : first + CONSUMERS;
    return {segment, blockIdx.x / slices % kv_heads, group, blockIdx.x % slices, first, end};
}

#endif
