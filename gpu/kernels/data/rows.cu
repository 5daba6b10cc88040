// Rows of a table by index, to the bit the ops gather_rows and scatter_add_rows of the reference
// (reference/src/ops): the embedding and its gradient.
//
//   gather_rows       y[t] = table[ids[t]], in another element type where y has one
//   scatter_add_rows  acc[ids[t]] += x[t] in f32, t ascending: nothing is added by an atomic
//   canonical         acc with one NaN for all, which alone are written: what the reference stores
//
// CONSTANTS
//   X_BF16, Y_BF16  1: x (table) or y is bf16, 0: f32
// LAUNCH
//   gather_rows, canonical: a thread an element. scatter_add_rows: a thread a column, which walks the rows
//   of x, so that the order of additions is theirs.
// NOTES
// - An id outside the table ends the grid (trap); the reference refuses it.
// - Elements that keep their type keep their bits, NaNs too, as in the reference.
#include "common/float.cuh"

using X = Float<X_BF16>;
using Y = Float<Y_BF16>;

FATHOM_DEVICE void copy_or_cast(const float* x, float* y) { *y = *x; }
FATHOM_DEVICE void copy_or_cast(const bf16* x, bf16* y) { *y = *x; }
template <typename A, typename B>
FATHOM_DEVICE void copy_or_cast(const A* x, B* y) {
    store(y, load(x));
}

extern "C" __global__ void gather_rows(const X* __restrict__ table, const int* __restrict__ ids,
                                       Y* __restrict__ y, u64 n, u32 columns, u32 height) {
    u64 i = thread_index();
    if (i >= n) return;
    u32 id = (u32)ids[i / columns];
    if (id >= height) __trap();
    copy_or_cast(table + (u64)id * columns + i % columns, y + i);
}

extern "C" __global__ void scatter_add_rows(const X* __restrict__ x, const int* __restrict__ ids,
                                            float* acc, u32 tokens, u32 columns, u32 height) {
    u32 column = (u32)thread_index();
    if (column >= columns) return;
    for (u32 t = 0; t < tokens; t++) {
        u32 id = (u32)ids[t];
        if (id >= height) __trap();
        float* sum = acc + (u64)id * columns + column;
        *sum = __fadd_rn(*sum, load(x + (u64)t * columns + column));
    }
}

extern "C" __global__ void canonical(float* x, u64 n) {
    u64 i = thread_index();
    if (i < n && x[i] != x[i]) store(x + i, x[i]);
}
