// Whether the operands of a call can be trusted. prepare.cuh reads every row, order and index anyway; each of
// its blocks leaves a verdict at a place of its own, so that nothing has to be cleared before and no atomic
// is needed. The kernels that write results read all verdicts first: if one operand is broken, every result
// of the call is NaN, and no kernel after prepare.cuh follows an order. The host waits for nothing.
#pragma once
#include "gpu_ops.cuh"

namespace pysupcon::cuda {

struct Verdicts {
  const int* of;  // not 0: this block of prepare() met something broken
  int count;
  double* results[4];  // [rows] of the call, beside the gradients; null: fewer
  int64_t rows;
};

// The same answer to all threads of a block, who call it together; thread: its linear index. The shuffle
// tells the compiler that a warp does not part here; without it a kernel loses its uniform registers, and
// spills.
__device__ __forceinline__ bool any_broken(const Verdicts& verdicts, int thread, int threads) {
  int broken = 0;
  for (int i = thread; i < verdicts.count; i += threads) broken |= verdicts.of[i];
  return __shfl_sync(~0u, __syncthreads_or(broken), 0);
}

// What a launch writes instead, shared by all of its threads: values [0, count), null: there are none.
template <class T>
__device__ __forceinline__ void spoil(T* values, int64_t count, int thread, int threads) {
  const int64_t block = (int64_t(blockIdx.z) * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x,
                blocks = int64_t(gridDim.z) * gridDim.y * gridDim.x;
  for (int64_t i = block * threads + thread; values && i < count; i += blocks * threads) values[i] = T(NAN);
}
__device__ __forceinline__ void spoil_results(const Verdicts& verdicts, int thread, int threads) {
#pragma unroll 1
  for (int k = 0; k < 4; ++k) spoil(verdicts.results[k], verdicts.rows, thread, threads);
}

// Where sorted row i stands, or row 0 where the order is broken, which verdicts tell of.
__device__ __forceinline__ bool is_place(int64_t at, int64_t count) { return uint64_t(at) < uint64_t(count); }
__device__ __forceinline__ int64_t place_of(const int64_t* order, int64_t i, int64_t count) {
  const int64_t at = order[i];
  return is_place(at, count) ? at : 0;
}

}  // namespace pysupcon::cuda
