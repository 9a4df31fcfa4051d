// Equation (3): SINCERE's softplus over the pairs of one class; (8), (11): the weights of its gradient.
#pragma once
#include "statistics.cuh"

namespace pysupcon::cuda {

struct SoftplusSum {
  struct Args {
    float* total;          // in the caller's order
    const float* n;        // likewise
    const int64_t* order;  // of the rows
    float epsilon;
    float4* parts;  // of row blocks that several runs share
    int* arrivals;  // [row blocks]
  };
  static constexpr int ROWS = 4;  // of a thread
  static constexpr bool TRIANGULAR = false;
  template <int>
  struct OfThread;

  static __device__ __forceinline__ float4 merge(float4 a, const float4& b) {
    a.x += b.x;
    return a;
  }
  static __device__ __forceinline__ void store(const Args& args, int row, const float4& whole) {
    args.total[args.order[row]] = whole.x;
  }
  static __device__ __forceinline__ void store_log2(const Args&, int, float) {}
  static __device__ __forceinline__ void spoil_all(const Args& args, int rows, int threads) {
    spoil(args.total, rows, int(threadIdx.x), threads);
  }
};

template <int>
struct SoftplusSum::OfThread {
  const Pairs& pairs;
  const int row0;  // rows row0 + 8 i are this thread's
  const float scale;
  float reference[ROWS];  // n_i + epsilon
  float total[ROWS] = {}, carry[ROWS] = {};

  __device__ __forceinline__ OfThread(const Pairs& pairs_, const Args& args, int row, LogSum*)
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
  __device__ __forceinline__ void merge_quad(int i) {
    float mine = total[i] + carry[i];
#pragma unroll
    for (int o = 1; o < 4; o *= 2) mine += __shfl_xor_sync(~0u, mine, o);
    total[i] = mine, carry[i] = 0.f;
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
    float* parts;   // [parts][rows of a block]
  };
  static constexpr bool USES_P = false;
  template <int ROWS>
  struct OfThread;
  static __device__ __forceinline__ void spoil_all(const Args& args, int rows, int threads) {
    spoil(args.grad_n, rows, int(threadIdx.x), threads);
  }
};

template <int ROWS>
struct SoftplusWeights::OfThread {
  const Pairs& pairs;
  const Args& args;
  const Bounds& bounds;
  float sigmoids[ROWS] = {};

  __device__ __forceinline__ OfThread(const Pairs& pairs_, const Args& args_, const Bounds& bounds_)
      : pairs(pairs_), args(args_), bounds(bounds_) {}

  __device__ __forceinline__ bool quick(Kind) const { return false; }
  template <class F, class W, class S>
  __device__ __forceinline__ void weigh_quickly(W&, const S&, Kind, const float2*, const float2*) const {}
  // As StatisticsWeights::weigh().
  template <class F, int PARTS, int MT, int NT>
  __device__ __forceinline__ void weigh(uint32_t (&w)[PARTS][MT][NT / 2][4], const float (&s)[MT][NT][4],
                                        Kind kind, int col0, const float2* col_n, const float2*) {
    const int row0 = first_row<MT>(bounds);  // rows row0 + 8 i are this thread's
    const float scale = *pairs.scale * kLog2e;
    const auto sigmoid = [scale](float sim, float reference) {
      return gpu::reciprocal_fast(1.f + gpu::exp2_fast(fmaf(sim, scale, -reference)));
    };
    const bool uniform = kind == Kind::same;
#pragma unroll
    for (int i = 0; i < ROWS; ++i) {
      const RowMask mask(pairs, row0 + 8 * i);
      const float2 n = args.rows.n && mask.row < pairs.rows.count ? args.rows.n[mask.row] : absent();
      float sum = 0.f;
#pragma unroll
      for (int j = 0; j < NT; ++j) {
        gpu::keep_order();
        float v[2];
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int at = 8 * j + e;
          const float sim = s[i / 2][j][2 * (i % 2) + e];
          const bool counts = uniform || (mask.same(col0 + at) && mask.counts(pairs, col0 + at));
          const float mine = sigmoid(sim, n.y), theirs = sigmoid(sim, col_n[at].y);
          v[e] = counts ? -(n.x * mine + col_n[at].x * theirs) : 0.f;
          sum += counts ? mine : 0.f;
        }
        pack_weights<F>(w, i / 2, i % 2, j, v[0], v[1]);
      }
      sigmoids[i] += sum;
    }
  }

  // What a row block has beside its gradient: these rows' sums, kept as a part where several runs share the
  // row block, or stored. `part` has a number for every row of the block.
  __device__ __forceinline__ void reduce() {
#pragma unroll
    for (int i = 0; i < ROWS; ++i)
#pragma unroll
      for (int o = 1; o < 4; o *= 2) sigmoids[i] += __shfl_xor_sync(~0u, sigmoids[i], o);
  }
  __device__ __forceinline__ void keep(float* part) const {
    const int row0 = first_row<ROWS / 2>(bounds) - bounds.row0;
#pragma unroll
    for (int i = 0; i < ROWS; ++i)
      if (args.grad_n && threadIdx.x % 4 == 0) part[row0 + 8 * i] = sigmoids[i];
  }
  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < ROWS; ++i) sigmoids[i] = 0.f;
  }
  __device__ __forceinline__ void take(const float* part) {
    const int row0 = first_row<ROWS / 2>(bounds) - bounds.row0;
#pragma unroll
    for (int i = 0; i < ROWS; ++i)
      if (args.grad_n && threadIdx.x % 4 == 0) sigmoids[i] += gpu::load_l2(part + row0 + 8 * i);
  }
  __device__ __forceinline__ void store() const {
    const int row0 = first_row<ROWS / 2>(bounds);
#pragma unroll
    for (int i = 0; i < ROWS; ++i) {
      const int row = row0 + 8 * i;
      if (!args.grad_n || threadIdx.x % 4 != 0 || row >= pairs.rows.count) continue;
      const int64_t at = args.order[row];
      args.grad_n[at] = args.n[at] == -INFINITY ? 0.f : args.grad_total[at] * sigmoids[i];
    }
  }
};

}  // namespace pysupcon::cuda
