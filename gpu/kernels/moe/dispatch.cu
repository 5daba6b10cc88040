// Tokens to the rows of their experts and back, to the bit the ops dispatch_plan, dispatch and combine of the
// reference (reference/src/ops/dispatch.rs). slot = token * top_k + choice.
//
//   plan_counts  how many slots each expert has; behind them the dropped ones (-1)
//   plan_rows    rows ordered by expert, then by slot, and the row of each slot
//   dispatch_slots  row r is element rows[r] of x
//   link_rows, dispatch_rows  row r is the row of x of the token of slot rows[r], with the row of its scales where
//                it has some: a list of the rows of each token, by which a token's row is read once
//   combine      token t is the sum of its rows in order of choice, from +0; a row behind the last is left out
//
// CONSTANTS
//   BYTES           dispatch_*: bytes of an element, or of the pieces in which rows are moved: 1, 2, 4 or 16
//   X_BF16, Y_BF16  combine: 1: what is summed, or the sum, is bf16
// LAUNCH
//   plan_counts, plan_rows: a warp an owner (an expert, or the dropped), 128 threads. dispatch_slots, link_rows:
//   a thread a row. dispatch_rows: a CTA of up to 256 threads a token. combine: a thread an element of the result.
// NOTES
// - The plan is stable without atomics: a warp walks all slots, 32 at a time, and counts its own before each.
// - An index that names no expert or row ends the grid (trap); the reference refuses it.
#include "common/float.cuh"

constexpr u32 LANES = 32;

#ifdef PLAN
// The owner of a slot: its expert, or `experts` where it was dropped.
FATHOM_DEVICE u32 owner_of(const int* indices, u32 slot, u32 experts) {
    int index = indices[slot];
    if (index < -1 || index >= (int)experts) __trap();
    return index < 0 ? experts : (u32)index;
}

extern "C" __global__ void __launch_bounds__(128)
    plan_counts(const int* __restrict__ indices, int* __restrict__ counts, u32 slots, u32 experts) {
    const u32 owner = (u32)(thread_index() / LANES);
    const u32 lane = threadIdx.x % LANES;
    if (owner > experts) return;
    u32 count = 0;
    for (u32 first = 0; first < slots; first += LANES) {
        u32 slot = first + lane;
        bool own = slot < slots && owner_of(indices, slot, experts) == owner;
        count += __popc(__ballot_sync(0xFFFFFFFFu, own));
    }
    if (lane == 0) counts[owner] = (int)count;
}

extern "C" __global__ void __launch_bounds__(128)
    plan_rows(const int* __restrict__ indices, const int* __restrict__ counts, int* __restrict__ rows,
              int* __restrict__ inverse, u32 slots, u32 experts) {
    const u32 owner = (u32)(thread_index() / LANES);
    const u32 lane = threadIdx.x % LANES;
    if (owner > experts) return;
    u32 before = 0;
    for (u32 e = lane; e < owner; e += LANES) before += (u32)counts[e];
    u32 next = __reduce_add_sync(0xFFFFFFFFu, before);
    for (u32 first = 0; first < slots; first += LANES) {
        u32 slot = first + lane;
        bool own = slot < slots && owner_of(indices, slot, experts) == owner;
        u32 owned = __ballot_sync(0xFFFFFFFFu, own);
        if (own) {
            u32 row = next + __popc(owned & ((1u << lane) - 1u));
            rows[row] = (int)slot;
            inverse[slot] = (int)row;
        }
        next += __popc(owned);
    }
}
#endif

#ifdef BYTES
#if BYTES == 1
using Piece = u8;
#elif BYTES == 2
using Piece = u16;
#elif BYTES == 4
using Piece = u32;
#else
using Piece = uint4;
#endif

// y[r] = x[rows[r]]; `slots` bounds the entries of rows.
extern "C" __global__ void dispatch_slots(const Piece* __restrict__ x, const int* __restrict__ rows,
                                          Piece* __restrict__ y, u32 received, u32 slots) {
    u64 row = thread_index();
    if (row >= received) return;
    u32 slot = (u32)rows[row];
    if (slot >= slots) __trap();
    y[row] = x[slot];
}

// The rows of each token as a list: last[token] is one above its newest row, before[row] one above the row before
// that; 0 ends it. In which order they stand there changes nothing.
extern "C" __global__ void link_rows(const int* __restrict__ rows, u32* last, u32* __restrict__ before,
                                     u32 received, u32 per, u32 slots) {
    u64 row = thread_index();
    if (row >= received) return;
    u32 slot = (u32)rows[row];
    if (slot >= slots) __trap();
    before[row] = atomicExch(last + slot / per, (u32)row + 1);
}

// pieces, scales: of a row, in Pieces and floats.
extern "C" __global__ void __launch_bounds__(256)
    dispatch_rows(const Piece* __restrict__ x, const float* __restrict__ scale, const u32* __restrict__ last,
                  const u32* __restrict__ before, Piece* __restrict__ y, float* __restrict__ to_scale,
                  u32 pieces, u32 scales) {
    const u64 token = blockIdx.x;
    const u32 newest = last[token];
    if (newest == 0) return;
    for (u32 i = threadIdx.x; i < pieces; i += blockDim.x) {
        const Piece v = x[token * pieces + i];
        for (u64 row = newest; row != 0; row = before[row - 1]) y[(row - 1) * pieces + i] = v;
    }
    for (u32 i = threadIdx.x; i < scales; i += blockDim.x) {
        const float v = scale[token * scales + i];
        for (u64 row = newest; row != 0; row = before[row - 1]) to_scale[(row - 1) * scales + i] = v;
    }
}
#endif

#ifdef X_BF16
using X = Float<X_BF16>;
using Y = Float<Y_BF16>;

extern "C" __global__ void combine(const X* __restrict__ y, const int* __restrict__ inverse,
                                   Y* __restrict__ x, u64 n, u32 columns, u32 per, u32 rows, u32 slots) {
    u64 at = thread_index();
    if (at >= n) return;
    inverse += at / columns * per;
    float sum = 0.0f;
    for (u32 choice = 0; choice < per; choice++) {
        u32 row = (u32)inverse[choice];
        if (row >= slots) __trap();
        if (row < rows) sum = __fadd_rn(sum, load(y + (u64)row * columns + at % columns));
    }
    store(x + at, sum);
}
#endif
