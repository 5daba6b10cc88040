// Which part of a product, or of one product an expert, a CTA computes: d = a b (+ c) of the ops gemm,
// grouped_gemm, gemm_fp8, grouped_gemm_fp8 and wgrad_fp8.
//
// `bounds` are ascending and start at 0. The constant GROUPING says what they bound:
//   DEPTH        ranges of k that are chained into one d (segments; one range: all of k)
//   GROUP_ROWS   rows of a and d by expert, each with a b of its own; behind the last expert is a range of
//                rows that belong to none, whose sums are empty
//   GROUP_DEPTH  a range of k by expert, each with a d of its own
#ifndef FATHOM_GEMM_WORK_CUH
#define FATHOM_GEMM_WORK_CUH

#include "common/types.cuh"

constexpr u32 DEPTH = 0;
constexpr u32 GROUP_ROWS = 1;
constexpr u32 GROUP_DEPTH = 2;

struct Work {
    u32 group;            // which b (GROUP_ROWS) or d (GROUP_DEPTH); else 0
    u32 row, end_row;     // first row of the tile, end of the rows that are its group's
    u32 column;           // first column of the tile
    u32 part, end_part;   // ranges of k, in `bounds` (not GROUP_ROWS)
    bool empty;           // GROUP_ROWS: rows of no expert
};

// The tile of this CTA; `groups` ranges, `m` rows and `n` columns of one d.
template <u32 BLOCK_M, u32 BLOCK_N>
FATHOM_DEVICE Work work_of(const int* bounds, u32 groups, u32 m, u32 n) {
    const u32 across = ceil_div(n, BLOCK_N);
    u32 tile = blockIdx.x / across;
    Work work = {0, 0, m, blockIdx.x % across * BLOCK_N, 0, groups, false};
    if (GROUPING == GROUP_ROWS) {
        while (tile >= ceil_div((u32)(bounds[work.group + 1] - bounds[work.group]), BLOCK_M)) {
            tile -= ceil_div((u32)(bounds[work.group + 1] - bounds[work.group]), BLOCK_M);
            work.group += 1;
        }
        work.row = bounds[work.group];
        work.end_row = bounds[work.group + 1];
        work.empty = work.group + 1 == groups;
    }
    if (GROUPING == GROUP_DEPTH) {
        work.group = tile / ceil_div(m, BLOCK_M);
        tile %= ceil_div(m, BLOCK_M);
        work.part = work.group;
        work.end_part = work.group + 1;
    }
    work.row += tile * BLOCK_M;
    return work;
}

#endif
