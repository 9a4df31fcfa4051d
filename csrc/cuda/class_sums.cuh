// Equation (4): sums of similarities over a class need no pair, only sums of rows. A class is a
// range of label-sorted rows; a tree of sums with fan-out 64 gives the sum of any range in a few hundred
// additions, in a fixed order, without atomics and without a table of classes.
#pragma once
#include "launch.h"
#include "plan.h"
#include "prepare.cuh"

namespace pysupcon::cuda {

template <class T>
struct Accumulator {
  using type = float;
};
template <>
struct Accumulator<double> {
  using type = double;
};
__device__ __forceinline__ double to_float(double x) { return x; }

// Label-sorted rows, each times its weight, and the tree of their sums.
template <class T>
struct WeightedRows {
  using A = typename Accumulator<T>::type;
  Rows rows;
  const A* weights;  // in the caller's order; null: all 1
  SumTree tree;
  int width;

  __device__ __forceinline__ A weight(int i) const { return weights ? weights[rows.order[i]] : A(1); }
  __device__ __forceinline__ A row(int i, int d) const {
    return to_float(static_cast<const T*>(rows.data)[rows.order[i] * rows.stride + d]);
  }
  __device__ __forceinline__ A entry(int level, int i, int d) const {
    return level == 0 ? weight(i) * row(i, d)
                      : static_cast<const A*>(tree.level[level - 1])[int64_t(i) * width + d];
  }
  // of consecutive entries; unrolled, so that several loads are on their way
  __device__ __forceinline__ A run(int level, int lo, int hi, int d) const {
    A sum = 0;
#pragma unroll 4
    for (int i = lo; i < hi; ++i) sum += entry(level, i, d);
    return sum;
  }
  // sum of rows [lo, hi): ragged ends level by level
  __device__ A range_sum(int lo, int hi, int d) const {
    A sum = 0;
    for (int level = 0; lo < hi; ++level) {
      const int inner_lo = (lo + kFanOut - 1) / kFanOut, inner_hi = hi / kFanOut;
      if (level == tree.levels || inner_lo >= inner_hi) return sum + run(level, lo, hi, d);
      sum += run(level, lo, inner_lo * kFanOut, d) + run(level, inner_hi * kFanOut, hi, d);
      lo = inner_lo, hi = inner_hi;
    }
    return sum;
  }
  __device__ __forceinline__ void add_up(int level, int entry, int below) const {
    const int lo = entry * kFanOut, hi = min(lo + kFanOut, below);
    for (int d = threadIdx.x; d < width; d += blockDim.x)
      static_cast<A*>(tree.level[level])[int64_t(entry) * width + d] = run(level, lo, hi, d);
  }
};

constexpr int kTrees = 3;
template <class T>
struct Trees {
  WeightedRows<T> of[kTrees];

  // entries of a level of tree k; level -1: the rows
  __host__ __device__ __forceinline__ int entries(int k, int level) const {
    int64_t count = of[k].rows.count;
    for (int i = 0; i <= level; ++i) count = divide_up(count, kFanOut);
    return level < of[k].tree.levels ? int(count) : 0;
  }
  __host__ __device__ __forceinline__ int entries(int level) const {
    return entries(0, level) + entries(1, level) + entries(2, level);
  }
  // An entry of a level, of all trees one after the other, by one block.
  __device__ __forceinline__ void add_up(int level, int entry) const {
#pragma unroll
    for (int k = 0; k < kTrees; ++k) {
      if (entry >= 0 && entry < entries(k, level)) of[k].add_up(level, entry, entries(k, level - 1));
      entry -= entries(k, level);
    }
  }
};

// The lowest level of every tree, a block an entry, and the rows' ranges, a thread a row.
template <class T>
__global__ void __launch_bounds__(kThreads)
    prepare_sums(const __grid_constant__ Trees<T> trees, const __grid_constant__ Ranges first,
                 const __grid_constant__ Ranges second) {
  int64_t block = blockIdx.x, i;
  const int entries = trees.entries(0);
  if (block < entries) {
    trees.add_up(0, int(block));
    return;
  }
  block -= entries;
  if (takes(block, first.count(), i))
    first.find(i);
  else if (takes(block, second.count(), i))
    second.find(i);
}
template <class T>
__global__ void __launch_bounds__(kThreads) sum_level(const __grid_constant__ Trees<T> trees, int level) {
  trees.add_up(level, int(blockIdx.x));
}

constexpr int kSumRows = 64, kSumWidth = 1024;

// The rows [first, last) of this block that share a class.
__device__ __forceinline__ int run_end(const int2* range, int i, int end) {
  const int2 mine = range[i];
  while (i < end && range[i].x == mine.x && range[i].y == mine.y) ++i;
  return i;
}

// total_i = scale x_i . (C - c_self). A block takes 64 sorted anchors, class by class.
template <class T>
__global__ void positive_sum(typename Accumulator<T>::type* total,
                             const __grid_constant__ WeightedRows<T> anchors,
                             const __grid_constant__ WeightedRows<T> candidates, const int2* range,
                             const int* self, bool one_set, const typename Accumulator<T>::type* scale) {
  using A = typename Accumulator<T>::type;
  __shared__ A sum[kSumWidth], dot[kSumRows];
  const int begin = int(blockIdx.x) * kSumRows, end = min(begin + kSumRows, int(anchors.rows.count));
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  for (int i = threadIdx.x; i < kSumRows; i += kThreads) dot[i] = 0;
  for (int first = begin, last; first < end; first = last) {
    last = run_end(range, first, end);
    const int2 r = range[first];
    for (int d0 = 0; d0 < anchors.width; d0 += kSumWidth) {
      const int d1 = min(d0 + kSumWidth, anchors.width);
      __syncthreads();  // the last sum has been read
      for (int d = d0 + int(threadIdx.x); d < d1; d += kThreads)
        sum[d - d0] = candidates.range_sum(r.x, r.y, d);
      __syncthreads();
      for (int i = first + warp; i < last; i += kThreads / 32) {
        const int own = one_set ? i : self ? self[i] : -1;
        A s = 0;
        for (int d = d0 + lane; d < d1; d += 32)
          s += anchors.row(i, d) * (sum[d - d0] - (own >= 0 ? candidates.row(own, d) : A(0)));
#pragma unroll
        for (int o = 16; o; o /= 2) s += __shfl_xor_sync(~0u, s, o);
        if (lane == 0) dot[i - begin] += s;
      }
    }
  }
  __syncthreads();
  for (int i = begin + int(threadIdx.x); i < end; i += kThreads) {
    const int2 r = range[i];
    const int own = one_set ? i : self ? self[i] : -1;
    const bool empty = r.y - r.x <= (own >= 0);  // exactly 0, whatever the last bit of sum - row
    total[anchors.rows.order[i]] = empty ? A(0) : *scale * dot[i - begin];
  }
}

// grad_i += scale (g_i (C - c_self) + (Cg - g_self c_self)): C sums the columns of row i's class (left out
// where row_weights is null), Cg the same columns, each times its own upstream gradient (left out where
// weighted has none).
template <class T>
__global__ void positive_sum_gradient(typename Accumulator<T>::type* grad, const int64_t* row_order, int rows,
                                      const typename Accumulator<T>::type* row_weights,
                                      const __grid_constant__ WeightedRows<T> plain,
                                      const __grid_constant__ WeightedRows<T> weighted, const int2* range,
                                      const int* self, bool one_set,
                                      const typename Accumulator<T>::type* scale) {
  using A = typename Accumulator<T>::type;
  const int begin = int(blockIdx.x) * kSumRows, end = min(begin + kSumRows, rows);
  for (int first = begin, last; first < end; first = last) {
    last = run_end(range, first, end);
    const int2 r = range[first];
    for (int d = threadIdx.x; d < plain.width; d += blockDim.x) {
      const A sum = row_weights ? plain.range_sum(r.x, r.y, d) : A(0);
      const A sum_weighted = weighted.weights ? weighted.range_sum(r.x, r.y, d) : A(0);
      for (int i = first; i < last; ++i) {
        const int own = one_set ? i : self ? self[i] : -1;
        const A x = own >= 0 ? plain.row(own, d) : A(0);
        A g = 0;
        if (row_weights) g += row_weights[row_order[i]] * (sum - x);
        if (weighted.weights) g += sum_weighted - (own >= 0 ? weighted.weight(own) * x : A(0));
        if (r.y - r.x <= (own >= 0)) g = 0;
        grad[row_order[i] * plain.width + d] += *scale * g;
      }
    }
  }
}

// anchor[j] = the sorted anchor that is sorted candidate j; anchor starts as -1. self_index names no
// candidate twice.
static __global__ void invert_self(int* anchor, const int* self, int count) {
  const int i = int(blockIdx.x * blockDim.x + threadIdx.x);
  if (i < count && self[i] >= 0) anchor[self[i]] = i;
}

}  // namespace pysupcon::cuda
