// delta_i = sum_c do_ic o_ic of each query row and head, for the op attention_backward: 16 chains of rounded
// products over ascending columns, column c in chain c % 16, then the halving tree over them.
//
// CONSTANTS
//   LOW  1: o and do are bf16, 0: they are f32
// LAUNCH
//   256 threads, 16 for every row of a head; any grid that covers them.
#include "common/float.cuh"
#include "common/types.cuh"

// delta[rows] of o[rows, columns] and d_o; a row is one head of one query.
extern "C" __global__ void __launch_bounds__(256)
    attention_delta(const Float<LOW>* __restrict__ o, const Float<LOW>* __restrict__ d_o,
                    float* __restrict__ delta, u64 rows, u32 columns) {
    const u64 row = thread_index() / 16;
    const u32 lane = threadIdx.x % 16;
    const u64 start = (row < rows ? row : 0) * columns;
    float sum = 0.0f;
    for (u32 c = lane; c < columns; c += 16) {
        sum = __fadd_rn(sum, __fmul_rn(load(d_o + start + c), load(o + start + c)));
    }
#pragma unroll
    for (u32 distance = 8; distance > 0; distance /= 2) {
        sum = __fadd_rn(sum, __shfl_xor_sync(0xFFFFFFFFu, sum, distance));
    }
    if (lane == 0 && row < rows) delta[row] = sum;
}
