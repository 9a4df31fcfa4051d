// Equation (3): SINCERE's softplus over the pairs of one class; (8), (11): the weights of its gradient. With
// candidates' weights w: log(w_j + e^x) for softplus(x), and sigmoid(x - log w_j).
#pragma once
#include "statistics.cuh"

namespace pysupcon::cuda {

struct SoftplusSum {
  using Part = double;
  struct Args {
    double* total;         // in the caller's order
    const double* n;       // likewise
    const int64_t* order;  // of the rows
    double epsilon;
    Part* parts;    // of row blocks that several runs share
    int* arrivals;  // [row blocks]
  };
  static constexpr int ROWS = 4;  // of a thread
  static constexpr bool TRIANGULAR = false;
  static constexpr Kind SKIPPED = Kind::different;

  const Pairs& pairs;
  const int row0;  // rows row0 + 8 i are this thread's
  const float scale;
  float reference[ROWS];  // n_i + epsilon
  float total[ROWS] = {}, carry[ROWS] = {};

  __device__ __forceinline__ SoftplusSum(const Pairs& pairs_, const Args& args, int row)
      : pairs(pairs_), row0(row), scale(pairs_.scale->natural) {
#pragma unroll
    for (int i = 0; i < ROWS; ++i) {
      const int r = row + 8 * i;
      reference[i] = r < pairs.rows.count ? float(args.n[args.order[r]] + args.epsilon) : -INFINITY;
    }
  }

  static __device__ __forceinline__ float softplus(float x) {
    return fmaxf(x, 0.f) + log1pf(gpu::exp2_fast(-fabsf(x) * float(kLog2e)));
  }
  // log(w + e^x), bias = log2 w. A weight of 0 has no part in it.
  static __device__ __forceinline__ float softplus(float x, float bias) {
    if (bias == -INFINITY) return x == -INFINITY ? 0.f : x;
    const float log_weight = bias * float(kLn2);
    return log_weight + softplus(x - log_weight);
  }

  template <int MT, int NT>
  __device__ __forceinline__ void add(const float (&acc)[MT][NT][4], Kind kind, int col0) {
    if (pairs.col_bias)
      add_pairs<true>(acc, kind, col0);
    else
      add_pairs<false>(acc, kind, col0);
  }
  template <bool BIASED, int MT, int NT>
  __device__ __forceinline__ void add_pairs(const float (&acc)[MT][NT][4], Kind kind, int col0) {
    static_assert(2 * MT == ROWS, "rows per thread");
    const bool all = kind == Kind::same;
#pragma unroll
    for (int i = 0; i < ROWS; ++i) {
      const int m = i / 2, h = i % 2;
      const RowMask mask(pairs, row0 + 8 * i);
      float sum = 0.f;
#pragma unroll
      for (int c = 0; c < 2 * NT; ++c) {
        const int col = col0 + 8 * (c / 2) + c % 2;
        if (all || (mask.same(col) && mask.counts(pairs, col))) {
          const float x = reference[i] - acc[m][c / 2][2 * h + c % 2] * scale;
          sum += BIASED ? softplus(x, pairs.col_bias[col]) : softplus(x);
        }
      }
      const float y = sum + carry[i], t = total[i] + y;  // Kahan
      carry[i] = y - (t - total[i]);
      total[i] = t;
    }
  }

  __device__ __forceinline__ Part part(int i) const { return double(total[i]) + double(carry[i]); }
  __device__ __forceinline__ void merge_quad(int i) {
    Part mine = part(i);
#pragma unroll
    for (int o = 1; o < 4; o *= 2) mine += __shfl_xor_sync(~0u, mine, o);
    total[i] = float(mine), carry[i] = float(mine - double(total[i]));
  }

  static __device__ __forceinline__ Part load(const Part* from) { return gpu::load_l2(from); }
  static __device__ __forceinline__ Part merge(const Pairs&, Part a, Part b) { return a + b; }
  static __device__ __forceinline__ void store(const Pairs&, const Args& args, int row, Part whole) {
    args.total[args.order[row]] = whole;
  }
  static __device__ __forceinline__ void store_log2(const Args&, int, double) {}
};

// (8): G_ij = -g_i sigmoid(n_i + epsilon - s_ij) within a class, and what n_i itself receives: g_i sum_j
// sigmoid(...).
struct SoftplusWeights {
  struct Args {
    Coefficients rows, cols;   // power: (upstream gradient, (n + epsilon) log2 e)
    const double* grad_total;  // in the caller's order
    const double* n;
    const int64_t* order;
    double* grad_n;  // in the caller's order, or null
    float* parts;    // [parts][rows of a block]
  };
  static constexpr bool POSITIVES = false;
  static constexpr Kind SKIPPED = Kind::different;
  template <int ROWS>
  struct OfThread;
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
  __device__ __forceinline__ void weigh_quickly(W&, const S&, const Coefficients&) const {}
  // As StatisticsWeights::weigh().
  template <class F, int PARTS, int MT, int NT>
  __device__ __forceinline__ void weigh(uint32_t (&w)[PARTS][MT][NT / 2][4], const float (&s)[MT][NT][4],
                                        Kind kind, int col0, const Coefficients& cols) {
    if (pairs.col_bias)
      weigh_pairs<F, true>(w, s, kind, col0, cols);
    else
      weigh_pairs<F, false>(w, s, kind, col0, cols);
  }
  template <class F, bool BIASED, int PARTS, int MT, int NT>
  __device__ __forceinline__ void weigh_pairs(uint32_t (&w)[PARTS][MT][NT / 2][4],
                                              const float (&s)[MT][NT][4], Kind kind, int col0,
                                              const Coefficients& cols) {
    const int row0 = first_row<MT>(bounds);  // rows row0 + 8 i are this thread's
    const float scale = pairs.scale->base2;
    const auto sigmoid = [scale](float sim, float reference, float bias) {
      const float t = BIASED ? fmaf(sim, scale, bias) - reference : fmaf(sim, scale, -reference);
      return gpu::reciprocal_fast(1.f + gpu::exp2_fast(t));
    };
    const bool uniform = kind == Kind::same;
#pragma unroll
    for (int i = 0; i < ROWS; ++i) {
      __syncwarp();  // rows are not mixed, which would need the registers of all
      const RowMask mask(pairs, row0 + 8 * i);
      const float2 n = args.rows.power && mask.row < pairs.rows.count ? args.rows.power[mask.row] : absent();
      const float bias = BIASED ? pairs.row_bias[mask.row] : 0.f;
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
          const float mine = sigmoid(sim, n.y, BIASED ? pairs.col_bias[col0 + at] : 0.f),
                      theirs = sigmoid(sim, cols.power[at].y, bias);
          v[e] = counts ? -(n.x * mine + cols.power[at].x * theirs) : 0.f;
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
      args.grad_n[at] = args.n[at] == -INFINITY ? 0. : args.grad_total[at] * double(sigmoids[i]);
    }
  }
};

}  // namespace pysupcon::cuda
