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
    float4* parts;  // [splits][rows] or null
  };
  static constexpr int ROWS = 4;

  const Pairs& pairs;
  const int row0;  // rows row0 + 8 i are this thread's
  const float scale;
  LogSum n[ROWS], p[ROWS];

  __device__ __forceinline__ Statistics(const Pairs& pairs_, const Args&, int row)
      : pairs(pairs_), row0(row), scale(*pairs_.scale * kLog2e) {}

  // acc[m][j][2 h + e]: row row0 + 16 m + 8 h, column col0 + 8 j + e
  template <int MT, int NT>
  __device__ __forceinline__ void add(const float (&acc)[MT][NT][4], Kind kind, int col0) {
    static_assert(2 * MT == ROWS, "rows per thread");
    if (kind == Kind::different)
      add_uniform(n, acc);
    else if (kind == Kind::same)
      add_uniform(p, acc);
    else
      add_mixed(acc, col0);
  }

  template <int MT, int NT>
  __device__ __forceinline__ void add_uniform(LogSum (&sums)[ROWS], const float (&acc)[MT][NT][4]) {
#pragma unroll
    for (int i = 0; i < ROWS; ++i) {
      const int m = i / 2, h = i % 2;
      float top = acc[m][0][2 * h];
#pragma unroll
      for (int j = 0; j < NT; ++j) top = fmaxf(top, fmaxf(acc[m][j][2 * h], acc[m][j][2 * h + 1]));
      const float ref = sums[i].raise(top * scale);  // scale > 0
      float sum = 0.f;
#pragma unroll
      for (int j = 0; j < NT; ++j)
        sum += gpu::exp2_fast(fmaf(acc[m][j][2 * h], scale, -ref)) +
               gpu::exp2_fast(fmaf(acc[m][j][2 * h + 1], scale, -ref));
      sums[i].add(sum);
    }
  }

  template <int MT, int NT>
  __device__ __forceinline__ void add_mixed(const float (&acc)[MT][NT][4], int col0) {
#pragma unroll
    for (int i = 0; i < ROWS; ++i) {
      const int m = i / 2, h = i % 2;
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
      const float ref_n = n[i].raise(top_n), ref_p = p[i].raise(top_p);
      float sum_n = 0.f, sum_p = 0.f;
#pragma unroll
      for (int c = 0; c < 2 * NT; ++c) {
        const bool is_same = same >> c & 1, is_counted = counts >> c & 1;
        const float e = gpu::exp2_fast(fmaf(acc[m][c / 2][2 * h + c % 2], scale, is_same ? -ref_p : -ref_n));
        sum_n += is_counted && !is_same ? e : 0.f;  // a select, after everything that could be inf or NaN
        sum_p += is_counted && is_same ? e : 0.f;
      }
      n[i].add(sum_n), p[i].add(sum_p);
    }
  }

  // A part of a row: (top, total) of n, (top, total) of p.
  __device__ __forceinline__ float4 part(int i) const {
    return {n[i].top, n[i].total + n[i].carry, p[i].top, p[i].total + p[i].carry};
  }
  static __device__ __forceinline__ void merge(float& top, float& total, float other_top, float other_total) {
    const float new_top = fmaxf(top, other_top), ref = LogSum::reference(new_top);
    total = total * gpu::exp2_fast(top - ref) + other_total * gpu::exp2_fast(other_top - ref);
    top = new_top;
  }
  static __device__ __forceinline__ float4 merge(float4 a, const float4& b) {
    merge(a.x, a.y, b.x, b.y), merge(a.z, a.w, b.z, b.w);
    return a;
  }
  __device__ __forceinline__ void merge_quad(int i) {
    float4 mine = part(i);
#pragma unroll
    for (int o = 1; o < 4; o *= 2) {
      const float4 other = {__shfl_xor_sync(~0u, mine.x, o), __shfl_xor_sync(~0u, mine.y, o),
                            __shfl_xor_sync(~0u, mine.z, o), __shfl_xor_sync(~0u, mine.w, o)};
      mine = merge(mine, other);
    }
    n[i] = {mine.x, mine.y, 0.f}, p[i] = {mine.z, mine.w, 0.f};
  }
  static __device__ __forceinline__ void store(const Args& args, int row, const float4& whole) {
    const int64_t at = args.order[row];
    args.n[at] = args.negatives ? (whole.x + log2f(whole.y)) * kLn2 : -INFINITY;
    args.p[at] = args.positives ? (whole.z + log2f(whole.w)) * kLn2 : -INFINITY;
  }
};

// Equations (8), (9): G_ij + G_ji, with row i and column j each an anchor, or not (its coefficients are then
// null).
struct StatisticsWeights {
  struct Args {
    Coefficients rows, cols;
  };
  static constexpr bool USES_P = true;

  const Pairs& pairs;
  const Args& args;
  const int row0;  // rows row0 and row0 + 8 are this thread's
  const float scale;

  __device__ __forceinline__ StatisticsWeights(const Pairs& pairs_, const Args& args_, int row)
      : pairs(pairs_), args(args_), row0(row), scale(*pairs_.scale * kLog2e) {}

  // Read again for every tile: registers are dearer than cached loads.
  __device__ __forceinline__ float2 coefficient(const float2* from, int h) const {
    return from && row0 + 8 * h < pairs.rows.count ? from[row0 + 8 * h] : absent();
  }

  // w[j][2 h + e], column col0 + 8 j + e: similarity in, weight out. col_n, col_p start at column col0.
  template <int NT>
  __device__ __forceinline__ void weigh(float (&w)[NT][4], Kind kind, int col0, const float2* col_n,
                                        const float2* col_p) {
    if (kind == Kind::different)
      weigh_uniform(w, args.rows.n, col_n);
    else if (kind == Kind::same)
      weigh_uniform(w, args.rows.p, col_p);
    else
      weigh_mixed(w, col0, col_n, col_p);
  }
  __device__ __forceinline__ float weight(float s, float2 row, float2 col) const {
    return row.x * gpu::exp2_fast(fmaf(s, scale, -row.y)) + col.x * gpu::exp2_fast(fmaf(s, scale, -col.y));
  }
  template <int NT>
  __device__ __forceinline__ void weigh_uniform(float (&w)[NT][4], const float2* rows,
                                                const float2* col) const {
    const float2 row[2] = {coefficient(rows, 0), coefficient(rows, 1)};
#pragma unroll
    for (int j = 0; j < NT; ++j)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const float2 c = col[8 * j + e];
#pragma unroll
        for (int h = 0; h < 2; ++h) w[j][2 * h + e] = weight(w[j][2 * h + e], row[h], c);
      }
  }
  template <int NT>
  __device__ __forceinline__ void weigh_mixed(float (&w)[NT][4], int col0, const float2* col_n,
                                              const float2* col_p) const {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const RowMask mask(pairs, row0 + 8 * h);
      const float2 n = coefficient(args.rows.n, h), p = coefficient(args.rows.p, h);
#pragma unroll
      for (int c = 0; c < 2 * NT; ++c) {
        const int at = 8 * (c / 2) + c % 2;
        const bool same = mask.same(col0 + at);
        float& s = w[c / 2][2 * h + c % 2];
        const float g = weight(s, same ? p : n, (same ? col_p : col_n)[at]);
        s = mask.counts(pairs, col0 + at) ? g : 0.f;
      }
    }
  }
  __device__ __forceinline__ void finish(int) const {}
};

}  // namespace pysupcon::cuda
