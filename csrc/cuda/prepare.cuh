// What the pair kernels need to know about the rows, made on the device: a label-sorted 16-bit copy, every
// row's range of same-class columns, and the coefficients of the gradient. O(N D) work, one launch each.
#pragma once
#include "launch.h"
#include "tiles.cuh"

namespace pysupcon::cuda {

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }

// out[part][i][chunk] from row order[i]; one thread per chunk.
template <class In, class F, int PARTS>
__global__ void gather_rows(uint4* out, Rows rows, int width, int chunks) {
  const int64_t at = int64_t(blockIdx.x) * blockDim.x + threadIdx.x, size = rows.count * chunks;
  if (at >= size) return;
  const int d0 = int(at % chunks) * 8;
  const In* row = static_cast<const In*>(rows.data) + rows.order[at / chunks] * rows.stride;
  float x[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) x[i] = d0 + i < width ? to_float(row[d0 + i]) : 0.f;
#pragma unroll
  for (int part = 0; part < PARTS; ++part) {
    uint32_t packed[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      packed[i] = F::pack(x[2 * i], x[2 * i + 1]);
#pragma unroll
      for (int e = 2 * i; part + 1 < PARTS && e < 2 * i + 2; ++e) x[e] -= F::to(F::from(x[e]));
    }
    out[part * size + at] = {packed[0], packed[1], packed[2], packed[3]};
  }
}

static __global__ void invert_order(int* inverse, const int64_t* order, int count) {
  const int i = int(blockIdx.x * blockDim.x + threadIdx.x);
  if (i < count) inverse[order[i]] = i;
}

// The first sorted row whose label is >= label (UPPER: > label).
template <bool UPPER>
__device__ __forceinline__ int label_bound(const Rows& rows, int64_t label) {
  int lo = 0, hi = int(rows.count);
  while (lo < hi) {
    const int mid = lo + (hi - lo) / 2;
    const int64_t l = rows.labels[rows.order[mid]];
    if (UPPER ? l <= label : l < label)
      lo = mid + 1;
    else
      hi = mid;
  }
  return lo;
}

// range[i], self[i] of sorted row i. self_index and inverse may be null.
static __global__ void find_ranges(int2* range, int* self, Rows rows, Rows cols, const int64_t* self_index,
                                   const int* inverse) {
  const int i = int(blockIdx.x * blockDim.x + threadIdx.x);
  if (i >= rows.count) return;
  const int64_t label = rows.labels[rows.order[i]];
  range[i] = {label_bound<false>(cols, label), label_bound<true>(cols, label)};
  if (self) {
    const int64_t j = self_index[rows.order[i]];
    self[i] = j < 0 || j >= cols.count ? -1 : inverse[j];
  }
}

// *largest = max |a|, |b| over both; a and b may be null. NaN and inf count as nothing: they spoil what they
// touch only.
static __global__ void find_largest(float* largest, const float* a, const float* b, int64_t count) {
  float top = 0.f;
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < count;
       i += int64_t(gridDim.x) * blockDim.x) {
    const float x = a ? fabsf(a[i]) : 0.f, y = b ? fabsf(b[i]) : 0.f;
    if (x < INFINITY) top = fmaxf(top, x);
    if (y < INFINITY) top = fmaxf(top, y);
  }
#pragma unroll
  for (int o = 16; o; o /= 2) top = fmaxf(top, __shfl_xor_sync(~0u, top, o));
  if (threadIdx.x % 32 == 0) gpu::atomic_max_nonnegative(largest, top);
}

// Coefficients of sorted row i from the statistic and its upstream gradient, in the caller's order.
static __global__ void pack_coefficients(float2* out, const float* statistic, const float* gradient,
                                         float epsilon, const int64_t* order, const float* largest, int count,
                                         int padded) {
  const int i = int(blockIdx.x * blockDim.x + threadIdx.x);
  if (i >= padded) return;
  float2 c = absent();
  if (i < count) {
    const float s = statistic[order[i]];
    if (s != -INFINITY)
      c = {ldexpf(gradient[order[i]], -gradient_exponent(*largest)), (s + epsilon) * kLog2e};
  }
  out[i] = c;
}

}  // namespace pysupcon::cuda
