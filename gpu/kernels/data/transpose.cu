// y[c, r] = x[r, c]: bits are moved, whatever they mean.
//
// CONSTANTS
//   BYTES  bytes of an element: 1, 2 or 4
// LAUNCH
//   a CTA of 32 x 8 threads for every square of 32 x 32, squares of a row of x neighbours.
// NOTES
// - Both sides are read and written along rows; the square turns in shared memory, whose rows are a
//   word longer so that a column meets every bank.
#include "common/types.cuh"

constexpr u32 SIDE = 32;
constexpr u32 LINES = 8;

#if BYTES == 1
using Element = u8;
#elif BYTES == 2
using Element = u16;
#else
using Element = u32;
#endif

// x[rows, columns], dense -> y[columns, ldy]; ldy in elements.
extern "C" __global__ void __launch_bounds__(SIDE * LINES)
    transpose(const Element* __restrict__ x, Element* __restrict__ y, u32 rows, u32 columns, u64 ldy) {
    __shared__ Element square[SIDE][SIDE + 4 / BYTES];
    const u32 across = ceil_div(columns, SIDE);
    const u32 row0 = blockIdx.x / across * SIDE;
    const u32 column0 = blockIdx.x % across * SIDE;
    const u32 lane = threadIdx.x % SIDE;
    for (u32 line = threadIdx.x / SIDE; line < SIDE; line += LINES) {
        if (row0 + line < rows && column0 + lane < columns) {
            square[line][lane] = x[(u64)(row0 + line) * columns + column0 + lane];
        }
    }
    __syncthreads();
    for (u32 line = threadIdx.x / SIDE; line < SIDE; line += LINES) {
        if (column0 + line < columns && row0 + lane < rows) {
            y[(column0 + line) * ldy + row0 + lane] = square[lane][line];
        }
    }
}
