// Tokens to the rows of their experts and back, to the bit the ops dispatch_plan, dispatch and combine of the
// reference (reference/src/ops/dispatch.rs). slot = token * top_k + choice.
//
//   plan_counts  how many slots each expert has; behind them the dropped ones (-1)
//   plan_rows    rows ordered by expert, then by slot, and the row of each slot
//   dispatch     row r is the row of x of the token of slot rows[r]
//   dispatch_codes  the same of codes and of their scales, together
//   combine      token t is the sum of its rows in order of choice, from +0; a row behind the last is left out
//
// CONSTANTS
//   BYTES           dispatch: bytes of an element, 1, 2 or 4
//   WORDS           dispatch_codes: 1: a row of codes is whole words of 4 bytes, 0: bytes
//   X_BF16, Y_BF16  combine: 1: what is summed, or the sum, is bf16
// LAUNCH
//   plan_counts, plan_rows: a warp an owner (an expert, or the dropped), 128 threads. dispatch_codes: a warp a
//   row, 128 threads. dispatch, combine: a thread an element of the result.
// NOTES
// - The order is stable without atomics: a warp walks all slots, 32 at a time, and counts its own before each.
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
using Element = u8;
#elif BYTES == 2
using Element = u16;
#else
using Element = u32;
#endif

// per: slots a row of x; `slots` bounds the entries of rows.
extern "C" __global__ void dispatch(const Element* __restrict__ x, const int* __restrict__ rows,
                                    Element* __restrict__ y, u64 n, u32 columns, u32 per, u32 slots) {
    u64 at = thread_index();
    if (at >= n) return;
    u32 slot = (u32)rows[at / columns];
    if (slot >= slots) __trap();
    y[at] = x[(u64)(slot / per) * columns + at % columns];
}
#endif

#ifdef WORDS
#if WORDS
using Code = u32;
#else
using Code = u8;
#endif

// codes, scales: of a row, in elements of Code and floats.
extern "C" __global__ void __launch_bounds__(128)
    dispatch_codes(const Code* __restrict__ q, const float* __restrict__ scale, const int* __restrict__ rows,
                   Code* __restrict__ to_q, float* __restrict__ to_scale, u32 received, u32 codes, u32 scales,
                   u32 per, u32 slots) {
    const u64 row = thread_index() / LANES;
    if (row >= received) return;
    u32 slot = (u32)rows[row];
    if (slot >= slots) __trap();
    const u64 token = slot / per;
    const u32 lane = threadIdx.x % LANES;
    for (u32 i = lane; i < codes; i += LANES) to_q[row * codes + i] = q[token * codes + i];
    for (u32 i = lane; i < scales; i += LANES) to_scale[row * scales + i] = scale[token * scales + i];
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
