// Transposes and casts to FP8 with a scale for every 1 x (at most 128) of the output, to the bit the op
// transpose_quantize of the reference: the operands of wgrad, whose K is tokens.
//
// CONSTANTS
//   KIND           what x is, as in quant/kept.cuh
//   FORMAT, SCALE  as in quant/cast.cuh
// LAUNCH
//   a CTA of 256 threads for `span` times 32 columns of x and one tile of its rows, tiles neighbours.
// NOTES
// - Rows of x are cut at bounds: tile j holds rows bounds[2 j] .. bounds[2 j + 1] (segments begin anew).
// - Scales of several blocks of x's columns lie in a sector of memory: a CTA with a span of columns fetches it once.
// - x is read along its rows and q written along its own: the tile turns in shared memory, whose rows are a
//   word longer so that a column meets every bank.
#include "common/reduce.cuh"
#include "quant/cast.cuh"
#include "quant/kept.cuh"

constexpr u32 SIDE = 32;
constexpr u32 DEPTH = 128;
constexpr u32 THREADS = 256;

// x[r, columns] -> q[columns, taken] and scale[columns, tiles].
extern "C" __global__ void __launch_bounds__(THREADS)
    transpose_quantize(const void* __restrict__ codes, const float* __restrict__ scales, u32 columns,
                       u32 from_rows, u32 from_columns, u8* __restrict__ q, float* __restrict__ scale,
                       const int* __restrict__ bounds, u32 taken, u32 tiles, u32 span, float amax_floor) {
    const Kept x = {codes, scales, columns, from_rows, from_columns};
    __shared__ float square[DEPTH][SIDE + 1];
    const u32 tile = blockIdx.x % tiles;
    const u32 begin = (u32)bounds[2 * tile];
    const u32 depth = (u32)bounds[2 * tile + 1] - begin;
    const u32 lane = threadIdx.x % SIDE;
    const u32 warp = threadIdx.x / SIDE;
    const u32 first = blockIdx.x / tiles * span * SIDE;
    const u32 last = columns - first < span * SIDE ? columns : first + span * SIDE;
    for (u32 column0 = first; column0 < last; column0 += SIDE) {
        for (u32 r = warp; r < depth; r += THREADS / SIDE) {
            if (column0 + lane < columns) square[r][lane] = kept_at(x, begin + r, column0 + lane);
        }
        __syncthreads();
        for (u32 c = warp; c < SIDE && column0 + c < columns; c += THREADS / SIDE) {
            float amax = 0.0f;
            for (u32 r = lane; r < depth; r += SIDE) amax = fmaxf(amax, fabsf(square[r][c]));
            float s = scale_for(fathom_warp_max(amax), amax_floor);
            u64 row = column0 + c;
            if (lane == 0) scale[row * tiles + tile] = s;
            for (u32 r = lane; r < depth; r += SIDE) {
                q[row * taken + begin + r] = to_fp8(__fdiv_rn(square[r][c], s));
            }
        }
        // The next columns take the place of these.
        __syncthreads();
    }
}
