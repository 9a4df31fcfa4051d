// Double precision on plain multiply-adds, for gradcheck: the same equations and the same ranges as the
// tensor-core kernels, 16 x 16 pairs at a time, rows read in place.
#pragma once
#include "launch.h"
#include "tiles.cuh"

namespace pysupcon::cuda {

constexpr int kPlain = 16;

struct PlainPairs {
  Rows rows, cols;
  int width;
  const int2 *range, *instance_range;
  const int *row_self, *col_self;
  bool one_set, negatives, positives;  // the two last: which pairs count
  // of rows and columns as candidates of others, in the caller's order; null: all weights are 1
  const double *row_log_weights, *col_log_weights;
  const double* scale;
  Verdicts verdicts;

  __device__ __forceinline__ bool counts(int row, int col) const {
    if (row >= rows.count || col >= cols.count) return false;
    const int self = one_set ? row : row_self ? row_self[row] : -1;
    return col != self && !(col_self && col_self[col] == row) && (same(row, col) ? positives : negatives);
  }
  __device__ __forceinline__ bool same(int row, int col) const {
    return row < rows.count && col >= range[row].x && col < range[row].y;
  }
  __device__ __forceinline__ bool same_instance(int row, int col) const {
    return instance_range && col >= instance_range[row].x && col < instance_range[row].y;
  }
  __device__ __forceinline__ double row_log_weight(int row) const {
    return row_log_weights && row < rows.count ? row_log_weights[rows.order[row]] : 0.;
  }
  __device__ __forceinline__ double col_log_weight(int col) const {
    return col_log_weights && col < cols.count ? col_log_weights[cols.order[col]] : 0.;
  }
  // Columns [x, y) of the block whose first row is row0.
  __device__ __forceinline__ int2 visit(int row0) const {
    if (negatives) return {0, int(cols.count)};
    const int last = min(row0 + kPlain, int(rows.count)) - 1;
    return {range[row0].x, range[last].y};
  }
};

struct PlainShared {
  double a[kPlain][kPlain + 1], b[kPlain][kPlain + 1], w[kPlain][kPlain + 1];
};

__device__ __forceinline__ const double* plain_row(const Rows& x, int i) {
  return static_cast<const double*>(x.data) + x.order[i] * x.stride;
}

// s_ij of row row0 + threadIdx.y and column col0 + threadIdx.x; 0 beyond the edges. Every thread of the block
// calls it.
__device__ __forceinline__ double plain_similarity(PlainShared& s, const PlainPairs& pairs, int row0,
                                                   int col0) {
  const int y = threadIdx.y, x = threadIdx.x;
  double sum = 0;
  for (int d0 = 0; d0 < pairs.width; d0 += kPlain) {
    const bool inside = d0 + x < pairs.width;
    __syncthreads();  // the last slice has been read
    s.a[y][x] = inside && row0 + y < pairs.rows.count ? plain_row(pairs.rows, row0 + y)[d0 + x] : 0.;
    s.b[y][x] = inside && col0 + y < pairs.cols.count ? plain_row(pairs.cols, col0 + y)[d0 + x] : 0.;
    __syncthreads();
    for (int d = 0; d < kPlain; ++d) sum += s.a[y][d] * s.b[x][d];
  }
  return sum * *pairs.scale;
}

// log(e^y + e^x), y = log w: softplus(x) where y is 0. A weight of 0 has no part in it.
__device__ __forceinline__ double plain_softplus(double x, double y) {
  if (y == -INFINITY) return x == -INFINITY ? 0. : x;
  return fmax(x, y) + log1p(exp(-fabs(x - y)));
}
__device__ __forceinline__ double plain_sigmoid(double x) { return 1. / (1. + exp(-x)); }

__device__ __forceinline__ void plain_merge(double& top, double& total, double other_top,
                                            double other_total) {
  const double t = fmax(top, other_top), ref = t == -INFINITY ? 0. : t;
  total = total * exp(top - ref) + other_total * exp(other_top - ref);
  top = t;
}

struct PlainResults {
  double *n, *p, *positive_sum, *instance_sum;  // in the caller's order
};

// Statistics of the pairs that count, or with softplus_n the softplus sum, in n. Grid (row blocks), block
// (16, 16).
static __global__ void plain_forward(PlainPairs pairs, PlainResults out, const double* softplus_n,
                                     double epsilon) {
  __shared__ PlainShared s;
  const int thread = int(threadIdx.y) * kPlain + int(threadIdx.x);
  if (any_broken(pairs.verdicts, thread, kPlain * kPlain)) {
    spoil_results(pairs.verdicts, thread, kPlain * kPlain);
    return;
  }
  const int row0 = int(blockIdx.x) * kPlain, row = row0 + int(threadIdx.y);
  const int2 visit = pairs.visit(row0);
  const int64_t at = row < pairs.rows.count ? pairs.rows.order[row] : 0;
  double top_n = -INFINITY, top_p = -INFINITY, total_n = 0, total_p = 0, softplus = 0;
  double positive_sum = 0, instance_sum = 0;
  for (int col0 = visit.x; col0 < visit.y; col0 += kPlain) {
    const double sim = plain_similarity(s, pairs, row0, col0);
    const int col = col0 + int(threadIdx.x);
    if (pairs.counts(row, col)) {
      const bool same = pairs.same(row, col);
      const double log_weight = pairs.col_log_weight(col);
      if (softplus_n)
        softplus += same ? plain_softplus(softplus_n[at] + epsilon - sim, log_weight) : 0.;
      else if (same) {
        plain_merge(top_p, total_p, sim + log_weight, 1.);
        positive_sum += sim, instance_sum += pairs.same_instance(row, col) ? sim : 0.;
      } else
        plain_merge(top_n, total_n, sim + log_weight, 1.);
    }
  }
  for (int o = 1; o < kPlain; o *= 2) {
    plain_merge(top_n, total_n, __shfl_xor_sync(~0u, top_n, o), __shfl_xor_sync(~0u, total_n, o));
    plain_merge(top_p, total_p, __shfl_xor_sync(~0u, top_p, o), __shfl_xor_sync(~0u, total_p, o));
    softplus += __shfl_xor_sync(~0u, softplus, o);
    positive_sum += __shfl_xor_sync(~0u, positive_sum, o);
    instance_sum += __shfl_xor_sync(~0u, instance_sum, o);
  }
  if (threadIdx.x != 0 || row >= pairs.rows.count) return;
  if (softplus_n || pairs.negatives) out.n[at] = softplus_n ? softplus : top_n + log(total_n);
  if (softplus_n || !pairs.positives) return;
  out.p[at] = top_p + log(total_p);
  out.positive_sum[at] = positive_sum, out.instance_sum[at] = instance_sum;
}

// One side's anchors, in the caller's order; n null: no anchors there. p null: softplus. grad_positive_sum,
// grad_instance_sum null: 0.
struct PlainAnchors {
  const double *n, *p, *grad_n, *grad_p, *grad_positive_sum, *grad_instance_sum;
  const int64_t* order;

  // dL/ds of this anchor's pair with a candidate of this weight; sigmoid: what n receives, per unit of
  // upstream gradient
  __device__ __forceinline__ double weight(int i, double sim, double log_weight, bool same,
                                           bool same_instance, double epsilon, double* sigmoid) const {
    if (!n) return 0.;
    const int64_t at = order[i];
    if (!p) {
      if (!same || n[at] == -INFINITY) return 0.;
      *sigmoid = plain_sigmoid(n[at] + epsilon - sim - log_weight);
      return -grad_n[at] * *sigmoid;
    }
    const double reference = same ? p[at] : n[at], upstream = same ? grad_p[at] : grad_n[at];
    double g = reference == -INFINITY ? 0. : upstream * exp(sim + log_weight - reference);
    if (same && grad_positive_sum) g += grad_positive_sum[at];
    if (same_instance && grad_instance_sum) g += grad_instance_sum[at];
    return g;
  }
};

// grad[order[row]][d] for 64 columns d per blockIdx.y. Grid (row blocks, ceil(width / 64)), block (16, 16).
static __global__ void plain_backward(PlainPairs pairs, PlainAnchors rows, PlainAnchors cols, double* grad,
                                      double* grad_n, double epsilon) {
  __shared__ PlainShared s;
  const int thread = int(threadIdx.y) * kPlain + int(threadIdx.x);
  if (any_broken(pairs.verdicts, thread, kPlain * kPlain)) {
    spoil(grad, pairs.rows.count * pairs.width, thread, kPlain * kPlain);
    spoil_results(pairs.verdicts, thread, kPlain * kPlain);
    return;
  }
  const int y = threadIdx.y, x = threadIdx.x, d0 = int(blockIdx.y) * 4 * kPlain;
  const int row0 = int(blockIdx.x) * kPlain, row = row0 + y;
  const int2 visit = pairs.visit(row0);
  double sum[4] = {}, sigmoids = 0;
  for (int col0 = visit.x; col0 < visit.y; col0 += kPlain) {
    const double sim = plain_similarity(s, pairs, row0, col0);
    double w = 0;
    if (pairs.counts(row, col0 + x)) {
      const bool same = pairs.same(row, col0 + x), instance = same && pairs.same_instance(row, col0 + x);
      double mine = 0, theirs = 0;
      w = rows.weight(row, sim, pairs.col_log_weight(col0 + x), same, instance, epsilon, &mine) +
          cols.weight(col0 + x, sim, pairs.row_log_weight(row), same, instance, epsilon, &theirs);
      sigmoids += mine;
    }
    s.w[y][x] = w;
    __syncthreads();
    for (int c = 0; c < kPlain && col0 + c < pairs.cols.count; ++c)
      for (int k = 0; k < 4; ++k) {
        const int d = d0 + kPlain * k + x;
        if (d < pairs.width) sum[k] += s.w[y][c] * plain_row(pairs.cols, col0 + c)[d];
      }
    // the next similarity has barriers of its own before the weights are overwritten
  }
  for (int o = 1; o < kPlain; o *= 2) sigmoids += __shfl_xor_sync(~0u, sigmoids, o);
  if (row < pairs.rows.count) {
    const int64_t at = pairs.rows.order[row];
    for (int k = 0; k < 4; ++k)
      if (d0 + kPlain * k + x < pairs.width)
        grad[at * pairs.width + d0 + kPlain * k + x] += *pairs.scale * sum[k];
    if (grad_n && x == 0 && blockIdx.y == 0) grad_n[at] = rows.grad_n[at] * sigmoids;
  }
}

}  // namespace pysupcon::cuda
