// Equations (1), (2), (7): the logsumexp over negatives and over positives; (8), (9): the weights of their
// gradient.
#pragma once
#include "tiles.cuh"

namespace pysupcon::cuda {

// sum = (total + carry) * 2^top; empty: top = -inf, total = 0. The carry is Kahan's: a row may add a million
// terms.
struct LogSum {
  float top = -INFINITY, total = 0.f, carry = 0.f;

  // -inf minus -inf must not happen: an empty sum is measured from 0.
  static __device__ __forceinline__ float reference(float top) { return top == -INFINITY ? 0.f : top; }

  __device__ __forceinline__ float raise(
      float new_top) {  // returns the reference point of what is added next
    new_top = fmaxf(top, new_top);
    const float ref = reference(new_top), shrink = gpu::exp2_fast(top - ref);
    total *= shrink, carry *= shrink, top = new_top;
    return ref;
  }
  __device__ __forceinline__ void add(float x) {
    const float y = x + carry, t = total + y;
    carry = y - (t - total);
    total = t;
  }
};

struct Statistics {
  struct Args {
    float *n, *p;          // in the caller's order
    const int64_t* order;  // of the rows
    bool negatives, positives;
    float4* parts;  // of row blocks that several runs share
    int* arrivals;  // [row blocks]
  };
  static constexpr int ROWS = 4;  // of a thread
  static constexpr bool TRIANGULAR = true;
  template <int STRIDE>
  struct OfThread;

  static __device__ __forceinline__ void merge(float& top, float& total, float other_top, float other_total) {
    const float new_top = fmaxf(top, other_top), ref = LogSum::reference(new_top);
    total = total * gpu::exp2_fast(top - ref) + other_total * gpu::exp2_fast(other_top - ref);
    top = new_top;
  }
  static __device__ __forceinline__ float4 merge(float4 a, const float4& b) {
    merge(a.x, a.y, b.x, b.y), merge(a.z, a.w, b.z, b.w);
    return a;
  }
  static __device__ __forceinline__ void store(const Args& args, int row, const float4& whole) {
    const int64_t at = args.order[row];
    args.n[at] = args.negatives ? (whole.x + log2f(whole.y)) * kLn2 : -INFINITY;
    args.p[at] = args.positives ? (whole.z + log2f(whole.w)) * kLn2 : -INFINITY;
  }
  static __device__ __forceinline__ void spoil_all(const Args& args, int rows, int threads) {
    spoil(args.n, rows, int(threadIdx.x), threads);
    spoil(args.p, rows, int(threadIdx.x), threads);
  }
  // Of negatives alone: log2 of their sum.
  static __device__ __forceinline__ void store_log2(const Args& args, int row, float n) {
    const int64_t at = args.order[row];
    args.n[at] = n * kLn2;
    args.p[at] = -INFINITY;
  }
};

template <int STRIDE>
struct Statistics::OfThread {
  const Pairs& pairs;
  const int row0;  // rows row0 + 8 i are this thread's
  const float scale;
  LogSum n[ROWS];
  LogSum* const p;  // [ROWS], STRIDE apart: most tiles have no positive, so that these need not be registers

  __device__ __forceinline__ OfThread(const Pairs& pairs_, const Args&, int row, LogSum* positives)
      : pairs(pairs_), row0(row), scale(*pairs_.scale * kLog2e), p(positives) {
#pragma unroll
    for (int i = 0; i < ROWS; ++i) p[i * STRIDE] = LogSum();
  }

  // acc[m][j][2 h + e]: row row0 + 16 m + 8 h, column col0 + 8 j + e
  template <int MT, int NT>
  __device__ __forceinline__ void add(const float (&acc)[MT][NT][4], Kind kind, int col0) {
    static_assert(2 * MT == ROWS, "rows per thread");
    if (kind == Kind::different)
      add_uniform<1>(n, acc);
    else if (kind == Kind::same)
      add_uniform<STRIDE>(p, acc);
    else
      add_mixed(acc, col0);
  }

  template <int APART, int MT, int NT>
  __device__ __forceinline__ void add_uniform(LogSum* sums, const float (&acc)[MT][NT][4]) {
#pragma unroll
    for (int i = 0; i < ROWS; ++i) {
      const int m = i / 2, h = i % 2;
      float top = acc[m][0][2 * h];
#pragma unroll
      for (int j = 0; j < NT; ++j) top = fmaxf(top, fmaxf(acc[m][j][2 * h], acc[m][j][2 * h + 1]));
      const float ref = sums[i * APART].raise(top * scale);  // scale > 0
      float sum = 0.f;
#pragma unroll
      for (int j = 0; j < NT; ++j)
        sum += gpu::exp2_fast(fmaf(acc[m][j][2 * h], scale, -ref)) +
               gpu::exp2_fast(fmaf(acc[m][j][2 * h + 1], scale, -ref));
      sums[i * APART].add(sum);
    }
  }

  template <int MT, int NT>
  __device__ __forceinline__ void add_mixed(const float (&acc)[MT][NT][4], int col0) {
#pragma unroll
    for (int i = 0; i < ROWS; ++i) {
      const int m = i / 2, h = i % 2;
      __syncwarp();  // rows are not mixed, which would need the registers of all
      const RowMask mask(pairs, row0 + 8 * i);
      float top_n = -INFINITY, top_p = -INFINITY;
      uint32_t same = 0, counts = 0;
#pragma unroll
      for (int c = 0; c < 2 * NT; ++c) {
        const int col = col0 + 8 * (c / 2) + c % 2;
        const float v = acc[m][c / 2][2 * h + c % 2] * scale;
        const bool is_same = mask.same(col), is_counted = mask.counts(pairs, col);
        same |= uint32_t(is_same) << c, counts |= uint32_t(is_counted) << c;
        top_n = fmaxf(top_n, is_counted && !is_same ? v : -INFINITY);
        top_p = fmaxf(top_p, is_counted && is_same ? v : -INFINITY);
      }
      const float ref_n = n[i].raise(top_n), ref_p = p[i * STRIDE].raise(top_p);
      float sum_n = 0.f, sum_p = 0.f;
#pragma unroll
      for (int c = 0; c < 2 * NT; ++c) {
        const bool is_same = same >> c & 1, is_counted = counts >> c & 1;
        const float e = gpu::exp2_fast(fmaf(acc[m][c / 2][2 * h + c % 2], scale, is_same ? -ref_p : -ref_n));
        sum_n += is_counted && !is_same ? e : 0.f;  // a select, after everything that could be inf or NaN
        sum_p += is_counted && is_same ? e : 0.f;
      }
      n[i].add(sum_n), p[i * STRIDE].add(sum_p);
    }
  }

  // A part of a row: (top, total) of n, (top, total) of p.
  __device__ __forceinline__ float4 part(int i) const {
    return {n[i].top, n[i].total + n[i].carry, p[i * STRIDE].top, p[i * STRIDE].total + p[i * STRIDE].carry};
  }
  __device__ __forceinline__ void merge_quad(int i) {
    float4 mine = part(i);
#pragma unroll
    for (int o = 1; o < 4; o *= 2) {
      const float4 other = {__shfl_xor_sync(~0u, mine.x, o), __shfl_xor_sync(~0u, mine.y, o),
                            __shfl_xor_sync(~0u, mine.z, o), __shfl_xor_sync(~0u, mine.w, o)};
      mine = merge(mine, other);
    }
    n[i] = {mine.x, mine.y, 0.f}, p[i * STRIDE] = {mine.z, mine.w, 0.f};
  }
};

// Equations (8), (9): G_ij + G_ji, with row i and column j each an anchor, or not (its coefficients are then
// null). Two exponentials a pair, each at most 1; or one, measured from a reference that all anchors share,
// where prepare.cuh found that their statistics allow it.
struct StatisticsWeights {
  struct Args {
    Coefficients rows, cols;
    bool negatives, positives;  // which of them the statistics counted
    const Extremes* extremes;
  };
  static constexpr bool USES_P = true;
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
  __device__ __forceinline__ float2 coefficient(const float2* from, int row) const {
    return from && row < pairs.rows.count ? from[row] : absent();
  }

  // Whether a tile needs no mask and one exponential a pair.
  __device__ __forceinline__ bool quick(Kind kind) const {
    const bool counted = kind == Kind::different ? args.negatives : kind == Kind::same && args.positives;
    return counted && bounds.reference < INFINITY;
  }
  // Similarities s[m][j][2 h + e], column 8 j + e from the one on where col_n, col_p start, become the
  // weights w of tiles j, packed as operands of the next product. Where one reference serves all anchors
  // it is every coefficient's, and .x is the upstream gradient times 2^(reference - statistic).
  template <class F, int PARTS, int MT, int NT>
  __device__ __forceinline__ void weigh_quickly(uint32_t (&w)[PARTS][MT][NT / 2][4],
                                                const float (&s)[MT][NT][4], Kind kind, const float2* col_n,
                                                const float2* col_p) const {
    const int row0 = first_row<MT>(bounds);  // rows row0 + 8 i are this thread's
    const float scale = *pairs.scale * kLog2e, reference = bounds.reference;
    const auto weight = [&](float sim, float row, float col) {
      return gpu::exp2_fast(fmaf(sim, scale, -reference)) * (row + col);
    };
    const float2 *rows = kind == Kind::different ? args.rows.n : args.rows.p,
                 *cols = kind == Kind::different ? col_n : col_p;
#pragma unroll
    for (int m = 0; m < MT; ++m) {
      const float low = coefficient(rows, row0 + 16 * m).x, high = coefficient(rows, row0 + 16 * m + 8).x;
#pragma unroll
      for (int j = 0; j < NT; ++j) {
        const float even = cols[8 * j].x, odd = cols[8 * j + 1].x;
        pack_weights<F>(w, m, 0, j, weight(s[m][j][0], low, even), weight(s[m][j][1], low, odd));
        pack_weights<F>(w, m, 1, j, weight(s[m][j][2], high, even), weight(s[m][j][3], high, odd));
      }
    }
  }
  // Any tile: two exponentials a pair. The first column is col0.
  template <class F, int PARTS, int MT, int NT>
  __device__ __forceinline__ void weigh(uint32_t (&w)[PARTS][MT][NT / 2][4], const float (&s)[MT][NT][4],
                                        Kind kind, int col0, const float2* col_n, const float2* col_p) const {
    const int row0 = first_row<MT>(bounds);  // rows row0 + 8 i are this thread's
    const float scale = *pairs.scale * kLog2e;
    const auto weight = [&](float sim, float2 row, float2 col) {
      return row.x * gpu::exp2_fast(fmaf(sim, scale, -row.y)) +
             col.x * gpu::exp2_fast(fmaf(sim, scale, -col.y));
    };
    if (kind != Kind::mixed) {
      const float2 *rows = kind == Kind::different ? args.rows.n : args.rows.p,
                   *cols = kind == Kind::different ? col_n : col_p;
#pragma unroll
      for (int i = 0; i < 2 * MT; ++i) {
        const float2 row = coefficient(rows, row0 + 8 * i);
#pragma unroll
        for (int j = 0; j < NT; ++j)
          pack_weights<F>(w, i / 2, i % 2, j, weight(s[i / 2][j][2 * (i % 2)], row, cols[8 * j]),
                          weight(s[i / 2][j][2 * (i % 2) + 1], row, cols[8 * j + 1]));
      }
      return;
    }
#pragma unroll
    for (int i = 0; i < 2 * MT; ++i) {
      const RowMask mask(pairs, row0 + 8 * i);
      const float2 n = coefficient(args.rows.n, mask.row), p = coefficient(args.rows.p, mask.row);
#pragma unroll
      for (int j = 0; j < NT; ++j) {
        gpu::keep_order();
        float v[2];
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int at = 8 * j + e;
          const bool same = mask.same(col0 + at);
          const float g = weight(s[i / 2][j][2 * (i % 2) + e], same ? p : n, (same ? col_p : col_n)[at]);
          v[e] = mask.counts(pairs, col0 + at) ? g : 0.f;  // after everything that could be inf or NaN
        }
        pack_weights<F>(w, i / 2, i % 2, j, v[0], v[1]);
      }
    }
  }

  // Nothing beside the gradient.
  static __device__ __forceinline__ void spoil_all(const Args&, int, int) {}
  __device__ __forceinline__ void reduce() const {}
  __device__ __forceinline__ void keep(float*) const {}
  __device__ __forceinline__ void clear() const {}
  __device__ __forceinline__ void take(const float*) const {}
  __device__ __forceinline__ void store() const {}
};

}  // namespace pysupcon::cuda
