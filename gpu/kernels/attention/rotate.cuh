// The rotation of pairs of columns by a position's angle (reference/src/ops/rope.rs, `rotate`):
// y0 = x0 c - x1 s, y1 = x1 c + x0 s, every product and sum rounded. Pairs are neighbours, or half a rotation
// width apart.
//
// CONSTANTS
//   INTERLEAVED  1: pairs are neighbours
#ifndef FATHOM_ATTENTION_ROTATE_CUH
#define FATHOM_ATTENTION_ROTATE_CUH

#include "common/float.cuh"

// Columns of pair i among `half` pairs.
FATHOM_DEVICE u32 first_of_pair(u32 i) { return INTERLEAVED ? 2 * i : i; }
FATHOM_DEVICE u32 second_of_pair(u32 i, u32 half) { return INTERLEAVED ? 2 * i + 1 : i + half; }

FATHOM_DEVICE void rotate_pair(float x0, float x1, float c, float s, float* y0, float* y1) {
    *y0 = __fsub_rn(__fmul_rn(x0, c), __fmul_rn(x1, s));
    *y1 = __fadd_rn(__fmul_rn(x1, c), __fmul_rn(x0, s));
}

// Row of the tables for a token; a position outside them ends the grid, as the reference refuses it.
FATHOM_DEVICE u32 table_row(const int* positions, u64 token, u32 length) {
    u32 position = (u32)positions[token];
    if (position >= length) __trap();
    return position;
}

#endif  // FATHOM_ATTENTION_ROTATE_CUH
