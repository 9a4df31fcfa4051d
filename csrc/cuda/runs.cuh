// How a thread block walks its run of units (plan.h shares them out), and how the runs that share a row block
// hand their parts over: the last to arrive merges all of them in the order of the runs. No block waits.
#pragma once
#include "gpu_ops.cuh"
#include "plan.h"

namespace pysupcon::cuda {

// The column tiles [first, last) of one row block that one run has.
struct Segment {
  int row_block, first, last;
  bool whole;  // all tiles of the row block
};

__device__ __forceinline__ int64_t run_begin(const Runs& runs, int run) {
  if (!runs.cut()) return int64_t(run) * runs.tiles;
  return runs.units * run / runs.blocks;
}
__device__ __forceinline__ int first_row_block(const Runs& runs, int run) {
  return int(run_begin(runs, run) / runs.tiles);
}
__device__ __forceinline__ int last_row_block(const Runs& runs, int run) {
  return int((run_begin(runs, run + 1) - 1) / runs.tiles);
}
__device__ __forceinline__ Segment segment(const Runs& runs, int run, int row_block) {
  const int64_t origin = int64_t(row_block) * runs.tiles;
  const int first = int(max(run_begin(runs, run) - origin, int64_t(0)));
  const int last = int(min(run_begin(runs, run + 1) - origin, int64_t(runs.tiles)));
  return {row_block, first, last, last - first == runs.tiles};
}

// Where a run's part of a row block stands: a run leaves one where it begins and one where it ends.
__device__ __forceinline__ int part_of(const Runs& runs, int run, int row_block) {
  return 2 * run + (row_block != first_row_block(runs, run));
}
// The runs [x, y] that share a row block.
__device__ __forceinline__ int2 runs_of(const Runs& runs, int row_block) {
  const int64_t origin = int64_t(row_block) * runs.tiles;
  // run r begins at or before unit u where r < (u + 1) blocks / units
  return {int(((origin + 1) * runs.blocks - 1) / runs.units),
          int(((origin + runs.tiles) * runs.blocks - 1) / runs.units)};
}

// Called by all threads of a block once its part is written. True for the last block of `runs` to arrive,
// which then sees what the others wrote (through gpu::load_l2).
__device__ __forceinline__ bool last_to_arrive(int* arrivals, int2 runs) {
  __shared__ int last;
  __threadfence();
  __syncthreads();  // every thread's part is written
  if (threadIdx.x == 0) last = atomicAdd(arrivals, 1) == runs.y - runs.x;
  __syncthreads();
  __threadfence();
  return last;
}

}  // namespace pysupcon::cuda
