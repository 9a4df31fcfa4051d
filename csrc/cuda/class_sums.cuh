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
  // sum of rows [lo, hi): ragged ends level by level
  __device__ A range_sum(int lo, int hi, int d) const {
    A sum = 0;
    for (int level = 0; lo < hi; ++level) {
      A ends = 0;
      if (level == tree.levels) {
        while (lo < hi) ends += entry(level, lo++, d);
      } else {
        while (lo < hi && lo % kFanOut) ends += entry(level, lo++, d);
        while (lo < hi && hi % kFanOut) ends += entry(level, --hi, d);
        lo /= kFanOut, hi /= kFanOut;
      }
      sum += ends;
    }
    return sum;
  }
};

// tree.level[level] from the level below; one block per entry.
template <class T>
__global__ void sum_level(WeightedRows<T> x, int level, int below) {
  using A = typename WeightedRows<T>::A;
  const int lo = int(blockIdx.x) * kFanOut, hi = min(lo + kFanOut, below);
  for (int d = threadIdx.x; d < x.width; d += blockDim.x) {
    A sum = 0;
    for (int i = lo; i < hi; ++i) sum += x.entry(level, i, d);
    static_cast<A*>(x.tree.level[level])[int64_t(blockIdx.x) * x.width + d] = sum;
  }
}

template <class T>
cudaError_t build_tree(const WeightedRows<T>& x, cudaStream_t stream) {
  int64_t below = x.rows.count;
  for (int level = 0; level < x.tree.levels; ++level) {
    const int64_t count = divide_up(below, kFanOut);
    const cudaError_t e =
        gpu::launch(sum_level<T>, dim3(unsigned(count)), dim3(128), 0, stream, x, level, int(below));
    if (e != cudaSuccess) return e;
    below = count;
  }
  return cudaSuccess;
}

constexpr int kSumRows = 64, kSumWidth = 1024, kSumThreads = 256;

// The rows [first, last) of this block that share a class.
__device__ __forceinline__ int run_end(const int2* range, int i, int end) {
  const int2 mine = range[i];
  while (i < end && range[i].x == mine.x && range[i].y == mine.y) ++i;
  return i;
}

// total_i = scale x_i . (C - c_self). A block takes 64 sorted anchors, class by class.
template <class T>
__global__ void positive_sum(typename Accumulator<T>::type* total, WeightedRows<T> anchors,
                             WeightedRows<T> candidates, const int2* range, const int* self, bool one_set,
                             const typename Accumulator<T>::type* scale) {
  using A = typename Accumulator<T>::type;
  __shared__ A sum[kSumWidth], dot[kSumRows];
  const int begin = int(blockIdx.x) * kSumRows, end = min(begin + kSumRows, int(anchors.rows.count));
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  for (int i = threadIdx.x; i < kSumRows; i += kSumThreads) dot[i] = 0;
  for (int first = begin, last; first < end; first = last) {
    last = run_end(range, first, end);
    const int2 r = range[first];
    for (int d0 = 0; d0 < anchors.width; d0 += kSumWidth) {
      const int d1 = min(d0 + kSumWidth, anchors.width);
      __syncthreads();  // the last sum has been read
      for (int d = d0 + int(threadIdx.x); d < d1; d += kSumThreads)
        sum[d - d0] = candidates.range_sum(r.x, r.y, d);
      __syncthreads();
      for (int i = first + warp; i < last; i += kSumThreads / 32) {
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
  for (int i = begin + int(threadIdx.x); i < end; i += kSumThreads) {
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
                                      const typename Accumulator<T>::type* row_weights, WeightedRows<T> plain,
                                      WeightedRows<T> weighted, const int2* range, const int* self,
                                      bool one_set, const typename Accumulator<T>::type* scale) {
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
