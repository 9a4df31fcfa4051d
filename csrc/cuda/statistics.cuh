// Equations (1), (7): the logsumexp over negatives; (8), (9): the weights of its gradient. A candidate's
// weight w is added as log2 w to its similarities in powers of two, t: forward and backward round the same
// sum.
#pragma once
#include "tiles.cuh"

namespace pysupcon::cuda {

// sum = (total + carry) * 2^top; empty: top = -inf, total = 0. The carry is Kahan's: a row may add a million
// terms.
struct LogSum {
  float top = -INFINITY, total = 0.f, carry = 0.f;

  // -inf minus -inf must not happen: an empty sum is measured from 0.
  static __device__ __forceinline__ float reference(float top) { return top == -INFINITY ? 0.f : top; }

  // Returns the reference point of what is added next. `unit`: of top, in powers of two.
  __device__ __forceinline__ float raise(float new_top, float unit = 1.f) {
    new_top = fmaxf(top, new_top);
    const float ref = reference(new_top), shrink = gpu::exp2_fast((top - ref) * unit);
    total *= shrink, carry *= shrink, top = new_top;
    return ref;
  }
  __device__ __forceinline__ void add(float x) {
    const float y = x + carry, t = total + y;
    carry = y - (t - total);
    total = t;
  }
  // (top, total) of two parts together.
  static __device__ __forceinline__ float2 merge(const float2& a, const float2& b, float unit = 1.f) {
    const float top = fmaxf(a.x, b.x), ref = reference(top);
    return {top, a.y * gpu::exp2_fast((a.x - ref) * unit) + b.y * gpu::exp2_fast((b.x - ref) * unit)};
  }
};

// Of negatives; tiles of positives alone are skipped.
struct Statistics {
  using Part = float2;  // of a row: top, total
  struct Args {
    double* n;             // in the caller's order
    const int64_t* order;  // of the rows
    Part* parts;           // of row blocks that several runs share
    int* arrivals;         // [row blocks]
  };
  static constexpr int ROWS = 4;  // of a thread
  static constexpr bool TRIANGULAR = true;
  static constexpr Kind SKIPPED = Kind::same;

  const Pairs& pairs;
  const int row0;  // rows row0 + 8 i are this thread's
  const float scale;
  LogSum n[ROWS];

  __device__ __forceinline__ Statistics(const Pairs& pairs_, const Args&, int row)
      : pairs(pairs_), row0(row), scale(pairs_.col_bias ? 1.f : pairs_.scale->base2) {}

  // acc[m][j][2 h + e]: row row0 + 16 m + 8 h, column col0 + 8 j + e. Weights replace acc by t + log2 w.
  template <int MT, int NT>
  __device__ __forceinline__ void add(float (&acc)[MT][NT][4], Kind kind, int col0) {
    static_assert(2 * MT == ROWS, "rows per thread");
    if (pairs.col_bias) {
      const float base2 = pairs.scale->base2;
#pragma unroll
      for (int j = 0; j < NT; ++j) {
        const float2 bias = bias_of_two(pairs, col0 + 8 * j);
#pragma unroll
        for (int m = 0; m < MT; ++m)
#pragma unroll
          for (int e = 0; e < 4; ++e) acc[m][j][e] = fmaf(acc[m][j][e], base2, e % 2 ? bias.y : bias.x);
      }
    }
    if (kind == Kind::different)
      add_uniform(acc);
    else
      add_mixed(acc, col0);
  }

  template <int MT, int NT>
  __device__ __forceinline__ void add_uniform(const float (&acc)[MT][NT][4]) {
#pragma unroll
    for (int i = 0; i < ROWS; ++i) {
      const int m = i / 2, h = i % 2;
      float top = acc[m][0][2 * h];
#pragma unroll
      for (int j = 0; j < NT; ++j) top = fmaxf(top, fmaxf(acc[m][j][2 * h], acc[m][j][2 * h + 1]));
      const float ref = n[i].raise(top * scale);  // scale > 0
      float sum = 0.f;
#pragma unroll
      for (int j = 0; j < NT; ++j)
        sum += gpu::exp2_fast(fmaf(acc[m][j][2 * h], scale, -ref)) +
               gpu::exp2_fast(fmaf(acc[m][j][2 * h + 1], scale, -ref));
      n[i].add(sum);
    }
  }

  template <int MT, int NT>
  __device__ __forceinline__ void add_mixed(const float (&acc)[MT][NT][4], int col0) {
#pragma unroll
    for (int i = 0; i < ROWS; ++i) {
      const int m = i / 2, h = i % 2;
      __syncwarp();  // rows are not mixed, which would need the registers of all
      const RowMask mask(pairs, row0 + 8 * i);
      float top = -INFINITY;
      uint32_t counts = 0;
#pragma unroll
      for (int c = 0; c < 2 * NT; ++c) {
        const int col = col0 + 8 * (c / 2) + c % 2;
        const bool is_counted = mask.counts(pairs, col) && !mask.same(col);
        counts |= uint32_t(is_counted) << c;
        top = fmaxf(top, is_counted ? acc[m][c / 2][2 * h + c % 2] * scale : -INFINITY);
      }
      const float ref = n[i].raise(top);
      float sum = 0.f;
#pragma unroll
      for (int c = 0; c < 2 * NT; ++c) {
        const float e = gpu::exp2_fast(fmaf(acc[m][c / 2][2 * h + c % 2], scale, -ref));
        sum += counts >> c & 1 ? e : 0.f;  // a select, after everything that could be inf or NaN
      }
      n[i].add(sum);
    }
  }

  __device__ __forceinline__ Part part(int i) const { return {n[i].top, n[i].total + n[i].carry}; }
  __device__ __forceinline__ void merge_quad(int i) {
    Part mine = part(i);
#pragma unroll
    for (int o = 1; o < 4; o *= 2)
      mine = LogSum::merge(mine, {__shfl_xor_sync(~0u, mine.x, o), __shfl_xor_sync(~0u, mine.y, o)});
    n[i] = {mine.x, mine.y, 0.f};
  }

  static __device__ __forceinline__ Part load(const Part* from) { return gpu::load_l2(from); }
  static __device__ __forceinline__ Part merge(const Pairs&, const Part& a, const Part& b) {
    return LogSum::merge(a, b);
  }
  static __device__ __forceinline__ void store(const Pairs&, const Args& args, int row, const Part& whole) {
    store_log2(args, row, double(whole.x) + log2(double(whole.y)));
  }
  static __device__ __forceinline__ void store_log2(const Args& args, int row, double n) {
    args.n[args.order[row]] = n * kLn2;
  }
};

// Equations (8), (9) of negatives: G_ij + G_ji, with row i and column j each an anchor, or not (its
// coefficients are then null). Two exponentials a pair, each at most sqrt(2); or one, measured from a
// reference that all anchors share, where prepare.cuh found that their statistics allow it.
struct StatisticsWeights {
  struct Args {
    Coefficients rows, cols;
    const Extremes* extremes;
  };
  static constexpr bool POSITIVES = false;
  static constexpr Kind SKIPPED = Kind::same;
  template <int>
  using OfThread = StatisticsWeights;

  const Pairs& pairs;
  const Args& args;
  const Bounds& bounds;

  __device__ __forceinline__ StatisticsWeights(const Pairs& pairs_, const Args& args_, Bounds& bounds_)
      : pairs(pairs_), args(args_), bounds(bounds_) {
    if (threadIdx.x == 0)  // read after a barrier
      bounds_.reference = args.extremes->reference;
  }

  // Read again for every tile, as row0, scale and reference are: registers are dearer than cached loads.
  __device__ __forceinline__ float2 coefficient(int row) const {
    return args.rows.power && row < pairs.rows.count ? args.rows.power[row] : absent();
  }

  // Whether a tile needs no mask and one exponential a pair.
  __device__ __forceinline__ bool quick(Kind kind) const {
    return kind == Kind::different && bounds.reference < INFINITY;
  }
  // Similarities s[m][j][2 h + e], column 8 j + e from the one on where the columns' coefficients start,
  // become the weights w of tiles j, packed as operands of the next product. Where one reference serves all
  // anchors it is every coefficient's, and .x is the upstream gradient times 2^(reference - statistic).
  template <class F, int PARTS, int MT, int NT>
  __device__ __forceinline__ void weigh_quickly(uint32_t (&w)[PARTS][MT][NT / 2][4],
                                                const float (&s)[MT][NT][4], const Coefficients& cols) const {
    const int row0 = first_row<MT>(bounds);  // rows row0 + 8 i are this thread's
    const float scale = pairs.scale->base2, reference = bounds.reference;
    const auto weight = [&](float sim, float row, float col) {
      return gpu::exp2_fast(fmaf(sim, scale, -reference)) * (row + col);
    };
#pragma unroll
    for (int m = 0; m < MT; ++m) {
      const float low = coefficient(row0 + 16 * m).x, high = coefficient(row0 + 16 * m + 8).x;
#pragma unroll
      for (int j = 0; j < NT; ++j) {
        const float even = cols.power[8 * j].x, odd = cols.power[8 * j + 1].x;
        pack_weights<F>(w, m, 0, j, weight(s[m][j][0], low, even), weight(s[m][j][1], low, odd));
        pack_weights<F>(w, m, 1, j, weight(s[m][j][2], high, even), weight(s[m][j][3], high, odd));
      }
    }
  }
  // Any tile that is not skipped: two exponentials a pair. The first column is col0.
  template <class F, int PARTS, int MT, int NT>
  __device__ __forceinline__ void weigh(uint32_t (&w)[PARTS][MT][NT / 2][4], const float (&s)[MT][NT][4],
                                        Kind kind, int col0, const Coefficients& cols) const {
    if (pairs.col_bias)
      weigh_pairs<F, true>(w, s, kind, col0, cols);
    else
      weigh_pairs<F, false>(w, s, kind, col0, cols);
  }
  template <class F, bool BIASED, int PARTS, int MT, int NT>
  __device__ __forceinline__ void weigh_pairs(uint32_t (&w)[PARTS][MT][NT / 2][4],
                                              const float (&s)[MT][NT][4], Kind kind, int col0,
                                              const Coefficients& cols) const {
    const int row0 = first_row<MT>(bounds);  // rows row0 + 8 i are this thread's
    const float scale = pairs.scale->base2;
    const auto weight = [&](float sim, float2 row, float2 col, float row_bias, float col_bias) {
      if constexpr (BIASED)
        return row.x * gpu::exp2_fast(fmaf(sim, scale, col_bias) - row.y) +
               col.x * gpu::exp2_fast(fmaf(sim, scale, row_bias) - col.y);
      else
        return row.x * gpu::exp2_fast(fmaf(sim, scale, -row.y)) +
               col.x * gpu::exp2_fast(fmaf(sim, scale, -col.y));
    };
    if (!BIASED && kind == Kind::different) {
#pragma unroll
      for (int i = 0; i < 2 * MT; ++i) {
        const float2 row = coefficient(row0 + 8 * i);
        const float bias = BIASED ? pairs.row_bias[row0 + 8 * i] : 0.f;
#pragma unroll
        for (int j = 0; j < NT; ++j) {
          if (BIASED) gpu::keep_order();
          const float2 biases = BIASED ? bias_of_two(pairs, col0 + 8 * j) : float2{0.f, 0.f};
          pack_weights<F>(w, i / 2, i % 2, j,
                          weight(s[i / 2][j][2 * (i % 2)], row, cols.power[8 * j], bias, biases.x),
                          weight(s[i / 2][j][2 * (i % 2) + 1], row, cols.power[8 * j + 1], bias, biases.y));
        }
      }
      return;
    }
#pragma unroll
    for (int i = 0; i < 2 * MT; ++i) {
      const RowMask mask(pairs, row0 + 8 * i);
      const float2 row = coefficient(mask.row);
      const float bias = BIASED ? pairs.row_bias[mask.row] : 0.f;
#pragma unroll
      for (int j = 0; j < NT; ++j) {
        gpu::keep_order();
        float v[2];
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int at = 8 * j + e;
          const float g = weight(s[i / 2][j][2 * (i % 2) + e], row, cols.power[at], bias,
                                 BIASED ? pairs.col_bias[col0 + at] : 0.f);
          // after everything that could be inf or NaN
          v[e] = mask.counts(pairs, col0 + at) && !mask.same(col0 + at) ? g : 0.f;
        }
        pack_weights<F>(w, i / 2, i % 2, j, v[0], v[1]);
      }
    }
  }

  // Nothing beside the gradient.
  __device__ __forceinline__ void reduce() const {}
  __device__ __forceinline__ void keep(float*) const {}
  __device__ __forceinline__ void clear() const {}
  __device__ __forceinline__ void take(const float*) const {}
  __device__ __forceinline__ void store() const {}
};

}  // namespace pysupcon::cuda
