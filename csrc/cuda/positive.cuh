// Equations (2), (4), (7): the logsumexp and the sums of similarities over the pairs of one class; (8): the
// weights of their gradient. As a loss converges p_i and the mean of s over P_i agree in nearly all their
// digits, and so do the parts of a weight. So both come from the same s, here, and are subtracted before
// anything is rounded that need not be.
#pragma once
#include "statistics.cuh"

namespace pysupcon::cuda {

// high + low, the rounding errors of its sums in the lower part.
struct TwoSum {
  float high = 0.f, low = 0.f;

  __device__ __forceinline__ void add(float x, float rest) {
    const float sum = high + x, added = sum - high;
    low += ((high - (sum - added)) + (x - added)) + rest;
    high = sum;
  }
  // count * x + rest
  __device__ __forceinline__ void add(int count, float x, float rest) {
    const float product = float(count) * x;
    add(product, fmaf(float(count), x, -product) + rest);
  }
  __device__ __forceinline__ double value() const { return double(high) + double(low); }
};

// Which columns of a row bear its instance, too.
struct InstanceMask {
  int begin = 0, end = 0;

  __device__ __forceinline__ InstanceMask(const Pairs& pairs, int row) {
    if (pairs.instance_range && row < pairs.rows.count) {
      const int2 range = pairs.instance_range[row];
      begin = range.x, end = range.y;
    }
  }
  __device__ __forceinline__ bool same(int col) const { return col >= begin && col < end; }
};

// Until they are stored similarities have no scale: s = acc * scale, and what is added up is acc. Weights are
// an exception: the largest of the exponentials is then t + log2 w, with the scale.
struct PositiveStatistics {
  struct Part {
    float2 exponentials;      // top, total
    double sum, of_instance;  // of acc
  };
  struct Args {
    double *p, *sum, *of_instance;  // in the caller's order
    const int64_t* order;           // of the rows
    Part* parts;                    // of row blocks that several runs share
    int* arrivals;                  // [row blocks]
  };
  static constexpr int ROWS = 4;  // of a thread
  static constexpr bool TRIANGULAR = false;
  static constexpr Kind SKIPPED = Kind::different;

  const Pairs& pairs;
  const int row0;  // rows row0 + 8 i are this thread's
  const float scale;
  LogSum p[ROWS];
  TwoSum sum[ROWS], of_instance[ROWS];

  __device__ __forceinline__ PositiveStatistics(const Pairs& pairs_, const Args&, int row)
      : pairs(pairs_), row0(row), scale(pairs_.scale->base2) {}

  // As Statistics::add(). Differences from the largest similarity are exact where the similarities nearly
  // agree: they serve the exponentials and the sums. The sums have no weights: exponentials that have them
  // are measured from the largest t + log2 w, and the sums from the largest similarity of the tile.
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
      __syncwarp();  // rows are not mixed, which would need the registers of all
      const RowMask mask(pairs, row0 + 8 * i);
      const InstanceMask instance(pairs, row0 + 8 * i);
      float top = -INFINITY, biased_top = -INFINITY;
      uint32_t counts = 0, of_same_instance = 0;
#pragma unroll
      for (int c = 0; c < 2 * NT; ++c) {
        const int col = col0 + 8 * (c / 2) + c % 2;
        const bool is_counted = all || (mask.same(col) && mask.counts(pairs, col));
        counts |= uint32_t(is_counted) << c;
        of_same_instance |= uint32_t(is_counted && instance.same(col)) << c;
        const float sim = acc[m][c / 2][2 * h + c % 2];
        top = fmaxf(top, is_counted ? sim : -INFINITY);
        if (BIASED)
          biased_top = fmaxf(biased_top, is_counted ? fmaf(sim, scale, pairs.col_bias[col]) : -INFINITY);
      }
      const float ref = BIASED ? LogSum::reference(top) : p[i].raise(top, scale);  // scale > 0
      const float biased_ref = BIASED ? p[i].raise(biased_top) : 0.f;
      float exponentials = 0.f, rest = 0.f, rest_of_instance = 0.f;
#pragma unroll
      for (int c = 0; c < 2 * NT; ++c) {
        const float sim = acc[m][c / 2][2 * h + c % 2], difference = sim - ref;
        const int col = col0 + 8 * (c / 2) + c % 2;
        const float e =
            gpu::exp2_fast(BIASED ? fmaf(sim, scale, pairs.col_bias[col]) - biased_ref : difference * scale);
        exponentials += counts >> c & 1 ? e : 0.f;  // a select, after everything that could be inf or NaN
        rest += counts >> c & 1 ? difference : 0.f;
        rest_of_instance += of_same_instance >> c & 1 ? difference : 0.f;
      }
      p[i].add(exponentials);
      sum[i].add(__popc(counts), ref, rest);
      of_instance[i].add(__popc(of_same_instance), ref, rest_of_instance);
    }
  }

  __device__ __forceinline__ Part part(int i) const {
    return {{p[i].top, p[i].total + p[i].carry}, sum[i].value(), of_instance[i].value()};
  }
  __device__ __forceinline__ void merge_quad(int i) {
    Part mine = part(i);
#pragma unroll
    for (int o = 1; o < 4; o *= 2) {
      const Part other{
          {__shfl_xor_sync(~0u, mine.exponentials.x, o), __shfl_xor_sync(~0u, mine.exponentials.y, o)},
          __shfl_xor_sync(~0u, mine.sum, o),
          __shfl_xor_sync(~0u, mine.of_instance, o)};
      mine = merge(pairs, mine, other);
    }
    p[i] = {mine.exponentials.x, mine.exponentials.y, 0.f};
    sum[i] = split(mine.sum), of_instance[i] = split(mine.of_instance);
  }
  static __device__ __forceinline__ TwoSum split(double x) {
    const float high = float(x);
    return {high, float(x - double(high))};
  }

  static __device__ __forceinline__ Part load(const Part* from) {
    return {gpu::load_l2(&from->exponentials), gpu::load_l2(&from->sum), gpu::load_l2(&from->of_instance)};
  }
  static __device__ __forceinline__ Part merge(const Pairs& pairs, const Part& a, const Part& b) {
    return {LogSum::merge(a.exponentials, b.exponentials, pairs.col_bias ? 1.f : pairs.scale->base2),
            a.sum + b.sum, a.of_instance + b.of_instance};
  }
  // With one positive total is 1 and p and sum the same product.
  static __device__ __forceinline__ void store(const Pairs& pairs, const Args& args, int row,
                                               const Part& whole) {
    const int64_t at = args.order[row];
    const double unit = double(pairs.scale->base2) * kLn2;
    args.p[at] =
        double(whole.exponentials.x) * (pairs.col_bias ? kLn2 : unit) + log(double(whole.exponentials.y));
    args.sum[at] = whole.sum * unit;
    args.of_instance[at] = whole.of_instance * unit;
  }
  static __device__ __forceinline__ void store_log2(const Args&, int, double) {}
};

// (8) of positives: G_ij + G_ji, where an anchor i brings f 2^(t_ij - p_i log2 e) + c, and a more where j is
// of its instance. Its reference p_i log2 e is r + l, r whole, so that t - r loses no digit where it matters
// and the exponential of an anchor's only positive is exactly 1.
struct PositiveWeights {
  struct Args {
    Coefficients rows, cols;
  };
  static constexpr bool POSITIVES = true;
  static constexpr Kind SKIPPED = Kind::different;
  template <int>
  using OfThread = PositiveWeights;

  const Pairs& pairs;
  const Args& args;
  const Bounds& bounds;

  __device__ __forceinline__ PositiveWeights(const Pairs& pairs_, const Args& args_, const Bounds& bounds_)
      : pairs(pairs_), args(args_), bounds(bounds_) {}

  __device__ __forceinline__ bool quick(Kind) const { return false; }
  template <class F, class W, class S>
  __device__ __forceinline__ void weigh_quickly(W&, const S&, const Coefficients&) const {}
  // As StatisticsWeights::weigh().
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
    // What cancels is added first.
    const auto weight = [scale](float sim, float2 power, float2 rest, float bias) {
      const float t = BIASED ? fmaf(sim, scale, bias) - power.y : fmaf(sim, scale, -power.y);
      return fmaf(power.x, gpu::exp2_fast(t - rest.y), rest.x);
    };
    const bool all = kind == Kind::same;
#pragma unroll
    for (int i = 0; i < 2 * MT; ++i) {
      __syncwarp();  // rows are not mixed, which would need the registers of all
      const RowMask mask(pairs, row0 + 8 * i);
      const InstanceMask instance(pairs, mask.row);
      const bool anchor = args.rows.power && mask.row < pairs.rows.count;
      const float2 power = anchor ? args.rows.power[mask.row] : absent();
      const float2 rest = anchor ? args.rows.rest[mask.row] : float2{0.f, 0.f};
      const float of_instance = anchor && pairs.instance_range ? args.rows.instance[mask.row] : 0.f;
#pragma unroll
      for (int j = 0; j < NT; ++j) {
        gpu::keep_order();
        float v[2];
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int at = 8 * j + e, col = col0 + at;
          const float sim = s[i / 2][j][2 * (i % 2) + e];
          float g = weight(sim, power, rest, BIASED ? pairs.col_bias[col] : 0.f);
          if (BIASED) gpu::keep_order();
          g += weight(sim, cols.power[at], cols.rest[at], BIASED ? pairs.row_bias[mask.row] : 0.f);
          if (instance.same(col)) g += of_instance + cols.instance[at];
          // after everything that could be inf or NaN
          v[e] = all || (mask.same(col) && mask.counts(pairs, col)) ? g : 0.f;
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
