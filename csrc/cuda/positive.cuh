// Equation (3): SINCERE's softplus over the pairs of one class; (8), (11): the weights of its gradient.
#pragma once
#include "tiles.cuh"

namespace pysupcon::cuda {

struct SoftplusSum {
  struct Args {
    float* total;          // in the caller's order
    const float* n;        // likewise
    const int64_t* order;  // of the rows
    float epsilon;
    float4* parts;  // [splits][rows] or null
  };
  static constexpr int ROWS = 4;

  const Pairs& pairs;
  const int row0;  // rows row0 + 8 i are this thread's
  const float scale;
  float reference[ROWS];  // n_i + epsilon
  float total[ROWS] = {}, carry[ROWS] = {};

  __device__ __forceinline__ SoftplusSum(const Pairs& pairs_, const Args& args, int row)
      : pairs(pairs_), row0(row), scale(*pairs_.scale) {
#pragma unroll
    for (int i = 0; i < ROWS; ++i) {
      const int r = row + 8 * i;
      reference[i] = r < pairs.rows.count ? args.n[args.order[r]] + args.epsilon : -INFINITY;
    }
  }

  static __device__ __forceinline__ float softplus(float x) {
    return fmaxf(x, 0.f) + log1pf(gpu::exp2_fast(-fabsf(x) * kLog2e));
  }

  template <int MT, int NT>
  __device__ __forceinline__ void add(const float (&acc)[MT][NT][4], Kind kind, int col0) {
    static_assert(2 * MT == ROWS, "rows per thread");
    if (kind == Kind::different) return;
#pragma unroll
    for (int i = 0; i < ROWS; ++i) {
      const int m = i / 2, h = i % 2;
      const RowMask mask(pairs, row0 + 8 * i);
      float sum = 0.f;
#pragma unroll
      for (int c = 0; c < 2 * NT; ++c) {
        const int col = col0 + 8 * (c / 2) + c % 2;
        if (mask.same(col) && mask.counts(pairs, col))
          sum += softplus(reference[i] - acc[m][c / 2][2 * h + c % 2] * scale);
      }
      const float y = sum + carry[i], t = total[i] + y;  // Kahan
      carry[i] = y - (t - total[i]);
      total[i] = t;
    }
  }

  __device__ __forceinline__ float4 part(int i) const { return {total[i] + carry[i], 0.f, 0.f, 0.f}; }
  static __device__ __forceinline__ float4 merge(float4 a, const float4& b) {
    a.x += b.x;
    return a;
  }
  __device__ __forceinline__ void merge_quad(int i) {
    float mine = total[i] + carry[i];
#pragma unroll
    for (int o = 1; o < 4; o *= 2) mine += __shfl_xor_sync(~0u, mine, o);
    total[i] = mine, carry[i] = 0.f;
  }
  static __device__ __forceinline__ void store(const Args& args, int row, const float4& whole) {
    args.total[args.order[row]] = whole.x;
  }
};

// (8): G_ij = -g_i sigmoid(n_i + epsilon - s_ij) within a class, and what n_i itself receives: g_i sum_j
// sigmoid(...).
struct SoftplusWeights {
  struct Args {
    Coefficients rows, cols;  // n: (upstream gradient, (n + epsilon) log2 e); p: null
    const float* grad_total;  // in the caller's order
    const float* n;
    const int64_t* order;
    float* grad_n;  // in the caller's order, or null
    float* parts;   // [splits][rows] or null
  };
  static constexpr bool USES_P = false;

  const Pairs& pairs;
  const Args& args;
  const int row0;  // rows row0 and row0 + 8 are this thread's
  const float scale;
  float sigmoids[2] = {};

  __device__ __forceinline__ SoftplusWeights(const Pairs& pairs_, const Args& args_, int row)
      : pairs(pairs_), args(args_), row0(row), scale(*pairs_.scale * kLog2e) {}

  __device__ __forceinline__ float sigmoid(float s, float reference) const {
    return gpu::reciprocal_fast(1.f + gpu::exp2_fast(fmaf(s, scale, -reference)));
  }

  template <int NT>
  __device__ __forceinline__ void weigh(float (&w)[NT][4], Kind kind, int col0, const float2* col_n,
                                        const float2*) {
    const bool uniform = kind == Kind::same;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const RowMask mask(pairs, row0 + 8 * h);
      const float2 n = args.rows.n && mask.row < pairs.rows.count ? args.rows.n[mask.row] : absent();
      float sum = 0.f;
#pragma unroll
      for (int c = 0; c < 2 * NT; ++c) {
        const int at = 8 * (c / 2) + c % 2;
        const bool counts = uniform || (mask.same(col0 + at) && mask.counts(pairs, col0 + at));
        float& s = w[c / 2][2 * h + c % 2];
        const float mine = sigmoid(s, n.y), theirs = sigmoid(s, col_n[at].y);
        s = counts ? -(n.x * mine + col_n[at].x * theirs) : 0.f;
        sum += counts ? mine : 0.f;
      }
      sigmoids[h] += sum;
    }
  }

  static __device__ __forceinline__ void store(const Args& args, int row, float sum) {
    const int64_t at = args.order[row];
    args.grad_n[at] = args.n[at] == -INFINITY ? 0.f : args.grad_total[at] * sum;
  }
  __device__ __forceinline__ void finish(int split) {
    if (!args.grad_n) return;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float sum = sigmoids[h];
      for (int o = 1; o < 4; o *= 2) sum += __shfl_xor_sync(~0u, sum, o);
      const int row = row0 + 8 * h;
      if (threadIdx.x % 4 == 0 && row < pairs.rows.count) {
        if (args.parts)
          args.parts[int64_t(split) * pairs.rows.count + row] = sum;
        else
          store(args, row, sum);
      }
    }
  }
};

// The splits of one row's sum of sigmoids, in their order.
static __global__ void merge_sigmoids(SoftplusWeights::Args args, int rows, int splits) {
  const int row = int(blockIdx.x * blockDim.x + threadIdx.x);
  if (row < rows) {
    float sum = 0.f;
    for (int i = 0; i < splits; ++i) sum += args.parts[int64_t(i) * rows + row];
    SoftplusWeights::store(args, row, sum);
  }
}

}  // namespace pysupcon::cuda
