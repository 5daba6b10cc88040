// Casts a matrix to FP8 with a scale for every block of any shape, to the bit fathom_numerics::quant: the ops
// quantize_block and quantize_weight of the reference, and transpose_quantize where its blocks are not tiles
// of one row. The steps are those of quant/quantize_tile.cu.
//
// CONSTANTS
//   KIND           what x is, as in quant/kept.cuh
//   TURNED         1: the matrix is the transpose of x
//   BOTH           1: codes and scales of the transpose too, which are the same, in q_t and scale_t
//   FORMAT, SCALE  as in quant/cast.cuh
// LAUNCH
//   a CTA of 256 threads a block, those of one row of blocks neighbours, matrices one after the other.
// NOTES
// - Threads walk a block along the rows of x, so that reads are dense. Codes of the transpose turn in shared
//   memory, whose rows are four bytes longer so that a column meets every bank.
// - Columns are cut at bounds: block j holds columns bounds[2 j] .. bounds[2 j + 1].
// - Strides are in elements, but for that of the matrices of x, which is in bytes.
#include "common/reduce.cuh"
#include "quant/cast.cuh"
#include "quant/kept.cuh"

constexpr u32 THREADS = 256;
// What turns at once.
constexpr u32 DOWN = 128;
constexpr u32 ACROSS = 32;
static_assert(!(TURNED && BOTH), "the transpose of the transpose is x");

// Rows and columns of a block of the matrix.
struct Block {
    u64 row;
    u32 rows;
    u32 column;
    u32 columns;
};

// Writes the block's codes code(row, column), to q along x's rows and to q_t along its columns, of `rows`.
template <typename F>
FATHOM_DEVICE void write_both(const Block& block, u8* q, u64 q_row, u8* q_t, u64 rows, F code) {
    __shared__ u8 square[DOWN][ACROSS + 4];
    const u32 lane = threadIdx.x % 32;
    const u32 warp = threadIdx.x / 32;
    for (u32 right = 0; right < block.columns; right += ACROSS) {
        const u32 width = block.columns - right < ACROSS ? block.columns - right : ACROSS;
        const u64 column = block.column + right;
        for (u32 below = 0; below < block.rows; below += DOWN) {
            const u32 depth = block.rows - below < DOWN ? block.rows - below : DOWN;
            const u64 row = block.row + below;
            for (u32 r = warp; r < depth && lane < width; r += THREADS / 32) {
                const u8 c = code(row + r, (u32)column + lane);
                q[(row + r) * q_row + column + lane] = c;
                square[r][lane] = c;
            }
            __syncthreads();
            for (u32 c = warp; c < width; c += THREADS / 32) {
                for (u32 r = lane; r < depth; r += 32) q_t[(column + c) * rows + row + r] = square[r][c];
            }
            __syncthreads();
        }
    }
}

// Calls f(row, column) for the thread's elements of the block.
template <typename F>
FATHOM_DEVICE void for_each_element(const Block& block, F f) {
    const u64 n = (u64)block.rows * block.columns;
    for (u64 i = threadIdx.x; i < n; i += THREADS) {
        u64 row = TURNED ? i % block.rows : i / block.columns;
        u64 column = TURNED ? i / block.rows : i % block.columns;
        f(block.row + row, block.column + (u32)column);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS)
    quantize_block(const void* __restrict__ codes, const float* __restrict__ scales, u32 x_columns,
                   u32 from_rows, u32 from_columns, u64 x_matrix_bytes, u8* __restrict__ q, u64 q_row,
                   u64 q_column, u64 q_matrix, float* __restrict__ scale, u64 scale_row, u64 scale_column,
                   u64 scale_matrix, u8* __restrict__ q_t, float* __restrict__ scale_t,
                   const int* __restrict__ bounds, u32 rows, u32 block_rows, u32 across, float amax_floor) {
    __shared__ float maxima[THREADS / 32];
    const u32 down = ceil_div(rows, block_rows);
    const u32 at_column = blockIdx.x % across;
    const u32 at_row = blockIdx.x / across % down;
    const u64 matrix = blockIdx.x / across / down;
    Block block;
    block.row = (u64)at_row * block_rows;
    block.rows = (u32)(rows - block.row < block_rows ? rows - block.row : block_rows);
    block.column = (u32)bounds[2 * at_column];
    block.columns = (u32)bounds[2 * at_column + 1] - block.column;
    Kept x = {(const u8*)codes + matrix * x_matrix_bytes, scales, x_columns, from_rows, from_columns};

    float amax = 0.0f;
    auto value = [&](u64 row, u32 column) {
        return TURNED ? kept_at(x, column, (u32)row) : kept_at(x, row, column);
    };
    for_each_element(block, [&](u64 row, u32 column) { amax = fmaxf(amax, fabsf(value(row, column))); });
    amax = fathom_warp_max(amax);
    if (threadIdx.x % 32 == 0) maxima[threadIdx.x / 32] = amax;
    __syncthreads();
    for (u32 warp = 0; warp < THREADS / 32; warp++) amax = fmaxf(amax, maxima[warp]);

    float s = scale_for(amax, amax_floor);
    if (threadIdx.x == 0) {
        scale[matrix * scale_matrix + at_row * scale_row + at_column * scale_column] = s;
        if (BOTH) scale_t[matrix * scale_matrix + (u64)at_column * down + at_row] = s;
    }
    auto code = [&](u64 row, u32 column) { return to_fp8(__fdiv_rn(value(row, column), s)); };
    q += matrix * q_matrix;
    if constexpr (BOTH) {
        write_both(block, q, q_row, q_t + matrix * q_matrix, rows, code);
    } else {
        for_each_element(block, [&](u64 row, u32 column) { q[row * q_row + column * q_column] = code(row, column); });
    }
}
