// The pair statistics of a pair of blocks, and their gradient. Compiled once per instruction set.
#pragma once
#include "cpu/tiles.h"

namespace pysupcon::cpu::PYSUPCON_ISA {

// ------------------------------------------------------------------------------------------------ forward
// What is kept of the rows of one side of a pair of blocks: by row (a) Vec<T>, by lane, or by column (b) T.
template <class V>
struct Sums {
  V *n, *p, *positive, *instance;

  static Sums zeros(Arena& arena, int count) {
    V* all[4];
    for (V*& sums : all) {
      sums = arena.take<V>(count);
      memset(static_cast<void*>(sums), 0, sizeof(V) * count);
    }
    return {all[0], all[1], all[2], all[3]};
  }
};

// One reference for all: sums of 2^(t - shift), equations (5) and (6), and of t - shift, equation (4). One
// exponential serves the row and the column of a pair, each with the weight of the other.
// kMean: the terms of n are left in `terms`, for sums of candidates.
template <class T, bool kWeighted, bool kMean>
struct FixedStats {
  const TilePair<T>& pair;
  Vec<T> magic, shift;  // kMagic - shift
  Sums<Vec<T>> row;     // [a.padded]
  Sums<T> col;          // [b.padded]
  PairWeights<T> weights;
  T* terms;  // [a.padded x kTileStride]

  PYSUPCON_INLINE void skip(int i0, int j0) const {
    if constexpr (kMean) fill_tile<T>(terms, i0, j0, Vec<T>{});
  }
  PYSUPCON_INLINE void keep(Vec<T> term, int i, int j) const {
    if constexpr (kMean) store(terms + i * kTileStride + j, term);
  }
  static PYSUPCON_INLINE void add(T* to, Vec<T> v) { store(to, load(to) + v); }
  PYSUPCON_INLINE Vec<T> for_row(Vec<T> e, int j) const {
    if constexpr (kWeighted) return e * load(weights.col + j);
    return e;
  }
  PYSUPCON_INLINE Vec<T> for_column(Vec<T> e, int i) const {
    if constexpr (kWeighted) return e * weights.row[i];
    return e;
  }

  template <Kind kKind>
  PYSUPCON_INLINE void operator()(Tile<T>& tile, int i0, int j0) const {
    constexpr int L = kLanes<T>;
    if constexpr (!kMean) pair.fetch();
    if constexpr (kKind == Kind::positive) skip(i0, j0);
    Vec<T> n[kVecs] = {}, p[kVecs] = {}, positive[kVecs] = {}, instance[kVecs] = {};
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      Vec<T> rn{}, rp{}, rs{}, ra{};
#pragma GCC unroll 4
      for (int c = 0; c < kVecs; ++c) {
        const int i = i0 + r, j = j0 + c * L;
        const Vec<T> t = tile[r][c], e = exp2_normal<kKind != Kind::negative>(t, magic), d = t - shift;
        if constexpr (kKind == Kind::negative) {
          rn += for_row(e, j);
          n[c] += for_column(e, i);
          keep(for_row(e, j), i, j);
        } else if constexpr (kKind == Kind::positive) {
          rp += for_row(e, j);
          p[c] += for_column(e, i);
          rs += d;
          positive[c] += d;
        } else {
          const auto mask = pair.masks(i, j);
          const Vec<T> en = select<T>(mask.negative, e, Vec<T>{}), ep = select<T>(mask.positive, e, Vec<T>{}),
                       dp = select<T>(mask.positive, d, Vec<T>{}), da = select<T>(mask.instance, d, Vec<T>{});
          rn += for_row(en, j);
          keep(for_row(en, j), i, j);
          rp += for_row(ep, j);
          rs += dp;
          ra += da;
          n[c] += for_column(en, i);
          p[c] += for_column(ep, i);
          positive[c] += dp;
          instance[c] += da;
        }
      }
      if constexpr (kKind != Kind::positive) row.n[i0 + r] += rn;
      if constexpr (kKind != Kind::negative) row.p[i0 + r] += rp, row.positive[i0 + r] += rs;
      if constexpr (kKind == Kind::mixed) row.instance[i0 + r] += ra;
    }
    if (!pair.plan.problem.self) return;
#pragma GCC unroll 4
    for (int c = 0; c < kVecs; ++c) {
      const int j = j0 + c * L;
      if constexpr (kKind != Kind::positive) add(col.n + j, n[c]);
      if constexpr (kKind != Kind::negative) add(col.p + j, p[c]), add(col.positive + j, positive[c]);
      if constexpr (kKind == Kind::mixed) add(col.instance + j, instance[c]);
    }
  }
};

template <class T, bool kWeighted, bool kMean>
void fixed_stats(const Plan& plan, const StatsSums& sums, const TilePair<T>& pair, T* terms, Arena arena) {
  const Block<T>&a = pair.a, &b = pair.b;
  const FixedStats<T, kWeighted, kMean> visit{pair,
                                              splat<T>(static_cast<T>(kMagic<T> - plan.shift)),
                                              splat<T>(static_cast<T>(plan.shift)),
                                              Sums<Vec<T>>::zeros(arena, a.padded),
                                              Sums<T>::zeros(arena, b.padded),
                                              {pair, arena},
                                              terms};
  if constexpr (kWeighted) visit.weights.load(pair, T(1));
  pair.each(visit);
  if constexpr (kMean) add_products<T>(pair, terms, {sums.mean, nullptr});
  // Where no pair is a positive (a negative) there is nothing to add.
  const bool positives = pair.classes_meet(), negatives = !pair.one_class(), instances = sums.instance_sum;
  for (int i = 0; i < a.count; ++i) {
    const int64_t row = a.side->order[a.first + i];
    if (negatives) sums.n[row] += sum_lanes<T>(visit.row.n[i]);
    if (!positives) continue;
    sums.p[row] += sum_lanes<T>(visit.row.p[i]);
    sums.positive_sum[row] += sum_lanes<T>(visit.row.positive[i]);
    if (instances) sums.instance_sum[row] += sum_lanes<T>(visit.row.instance[i]);
  }
  if (!pair.plan.problem.self) return;
  for (int j = 0; j < b.count; ++j) {
    const int64_t row = b.side->order[b.first + j];
    if (negatives) sums.n[row] += visit.col.n[j];
    if (!positives) continue;
    sums.p[row] += visit.col.p[j];
    sums.positive_sum[row] += visit.col.positive[j];
    if (instances) sums.instance_sum[row] += visit.col.instance[j];
  }
}

// ------------------------------------------------------------------------------------------------ forward,
// running maximum The tiles are kept for the length of one pair of blocks; each row, then each column, finds
// its own maxima first.
template <class T>
struct KeepTile {
  const TilePair<T>& pair;
  T* kept;  // [a.padded x kTileStride]
  // No reference can be above the -infinity of pairs that do not count.
  PYSUPCON_INLINE void skip(int i0, int j0) const {
    fill_tile<T>(kept, i0, j0, Vec<T>{} - T(__builtin_inf()));
  }
  template <Kind>
  PYSUPCON_INLINE void operator()(Tile<T>& tile, int i0, int j0) const {
    pair.fetch();
    for (int r = 0; r < kRows; ++r)
      for (int c = 0; c < kVecs; ++c) store(kept + (i0 + r) * kTileStride + j0 + c * kLanes<T>, tile[r][c]);
  }
};

// Merges sum * 2^max into the running (total, top) of a row; an empty part changes nothing.
template <class T>
PYSUPCON_INLINE void merge(double& total, T& top, double sum, T max) {
  if (!(sum != 0)) return;  // NaN goes on
  if (max > top) {
    total = (total != 0 ? total * __builtin_exp2(static_cast<double>(top) - max) : 0) + sum;
    top = max;
  } else {
    total += sum * __builtin_exp2(static_cast<double>(max) - top);
  }
}

// The lanes of some kept similarities: rows (or columns) whose maxima are found first, and whose sums are
// formed afterwards. kPositives: among the pairs there may be a positive. `weight`: of the candidates' lanes,
// the logarithm to base 2; the references are of t + weight.
template <class T, bool kPositives, bool kWeighted>
struct Running {
  using Masks = typename TilePair<T>::Masks;
  Vec<T> none = splat<T>(static_cast<T>(-__builtin_inf()));
  Vec<T> top_n = none, top_p = none;               // -inf where there is none
  Vec<T> ref_n{}, ref_p{};                         // 0 there
  Vec<T> n{}, p{};                                 // of 2^(t - ref)
  Vec<T> positive{}, instance{}, count{}, of_a{};  // of t - ref_p, and how many

  PYSUPCON_INLINE void raise(Vec<T> t, Vec<T> weight, const Masks& mask) {
    if constexpr (kWeighted) t += weight;
    top_n = max<T>(select<T>(mask.negative, t, none), top_n);
    if constexpr (kPositives) top_p = max<T>(select<T>(mask.positive, t, none), top_p);
  }
  // The smaller number first: t - ref is near -weight where the sum is large.
  static PYSUPCON_INLINE Vec<T> exponent(Vec<T> d, Vec<T> weight) {
    if constexpr (kWeighted) return d + weight;
    return d;
  }
  PYSUPCON_INLINE void add(Vec<T> t, Vec<T> weight, const Masks& mask) {
    if constexpr (!kPositives) {
      n += select<T>(mask.negative, exp2(exponent(t - ref_n, weight)), Vec<T>{});
      return;
    }
    const Vec<T> one = splat<T>(T(1)), d = t - ref_p;
    const Vec<T> e = exp2<true>(exponent(select<T>(mask.positive, d, t - ref_n), weight));
    n += select<T>(mask.negative, e, Vec<T>{});
    p += select<T>(mask.positive, e, Vec<T>{});
    positive += select<T>(mask.positive, d, Vec<T>{});
    instance += select<T>(mask.instance, d, Vec<T>{});
    count += select<T>(mask.positive, one, Vec<T>{});
    of_a += select<T>(mask.instance, one, Vec<T>{});
  }
};

// A row's part of a pair of blocks.
template <class T>
PYSUPCON_INLINE void merge_row(const StatsSums& sums, const Problem& q, int64_t row, T top_n, T n, T top_p,
                               T p) {
  if (q.negatives) merge<T>(sums.n[row], static_cast<T*>(sums.max_n)[row], n, top_n);
  if (q.positives) merge<T>(sums.p[row], static_cast<T*>(sums.max_p)[row], p, top_p);
}
// What it has of t, given the sums of t - ref.
PYSUPCON_INLINE void add_sums(const StatsSums& sums, int64_t row, double ref, double positive, double count,
                              double instance, double of_a) {
  sums.positive_sum[row] += positive + count * ref;
  if (sums.instance_sum) sums.instance_sum[row] += instance + of_a * ref;
}

template <class T, bool kPositives, bool kWeighted>
void running_rows(const StatsSums& sums, const TilePair<T>& pair, const T* kept,
                  const PairWeights<T>& weights) {
  constexpr int L = kLanes<T>;
  const Block<T>&a = pair.a, &b = pair.b;
  const Problem& q = pair.plan.problem;
  for (int i = 0; i < a.count; ++i) {
    Running<T, kPositives, kWeighted> s;
    const auto weight = [&](int j) { return kWeighted ? load(weights.col + j) : Vec<T>{}; };
    const T* t = kept + i * kTileStride;
    for (int j = 0; j < b.count; j += L) s.raise(load(t + j), weight(j), pair.masks(i, j));
    const T n = max_lanes<T>(s.top_n), p = max_lanes<T>(s.top_p);
    s.ref_n = splat<T>(n > -__builtin_inf() ? n : T(0)), s.ref_p = splat<T>(p > -__builtin_inf() ? p : T(0));
    for (int j = 0; j < b.count; j += L) s.add(load(t + j), weight(j), pair.masks(i, j));
    const int64_t row = a.side->order[a.first + i];
    merge_row<T>(sums, q, row, n, sum_lanes<T>(s.n), p, sum_lanes<T>(s.p));
    if constexpr (kPositives)
      add_sums(sums, row, s.ref_p[0], sum_lanes<T>(s.positive), sum_lanes<T>(s.count),
               sum_lanes<T>(s.instance), sum_lanes<T>(s.of_a));
  }
}

template <class T, bool kPositives, bool kWeighted>
void running_columns(const StatsSums& sums, const TilePair<T>& pair, const T* kept,
                     const PairWeights<T>& weights) {
  constexpr int L = kLanes<T>;
  const Block<T>&a = pair.a, &b = pair.b;
  const Problem& q = pair.plan.problem;
  for (int j = 0; j < b.count; j += L) {
    Running<T, kPositives, kWeighted> s;
    const auto weight = [&](int i) { return kWeighted ? splat<T>(weights.row[i]) : Vec<T>{}; };
    for (int i = 0; i < a.count; ++i) s.raise(load(kept + i * kTileStride + j), weight(i), pair.masks(i, j));
    s.ref_n = select<T>(s.top_n > s.none, s.top_n, Vec<T>{});
    s.ref_p = select<T>(s.top_p > s.none, s.top_p, Vec<T>{});
    for (int i = 0; i < a.count; ++i) s.add(load(kept + i * kTileStride + j), weight(i), pair.masks(i, j));
    for (int l = 0; l < L && j + l < b.count; ++l) {
      const int64_t row = b.side->order[b.first + j + l];
      merge_row<T>(sums, q, row, s.top_n[l], s.n[l], s.top_p[l], s.p[l]);
      if constexpr (kPositives)
        add_sums(sums, row, s.ref_p[l], s.positive[l], s.count[l], s.instance[l], s.of_a[l]);
    }
  }
}

template <class T, bool kWeighted>
void running_stats(const Plan& plan, const StatsSums& sums, const TilePair<T>& pair, Arena arena) {
  T* kept = arena.take<T>(kMaxBlock * kTileStride);
  pair.each(KeepTile<T>{pair, kept});
  const bool positives = plan.problem.positives && pair.classes_meet();
  const PairWeights<T> weights(pair, arena);
  if constexpr (kWeighted) weights.load(pair, T(0));
  positives ? running_rows<T, true, kWeighted>(sums, pair, kept, weights)
            : running_rows<T, false, kWeighted>(sums, pair, kept, weights);
  if (!plan.problem.self) return;
  positives ? running_columns<T, true, kWeighted>(sums, pair, kept, weights)
            : running_columns<T, false, kWeighted>(sums, pair, kept, weights);
}

// ------------------------------------------------------------------------------------------------ backward
// Weight of pair (i, j), equation (9): 2^(t - ref_i) f_i W_j + 2^(t - ref_j) f_j W_i, with one reference for
// all one exponential; and the constants of a positive, which the first part comes close to as a loss
// converges: they meet here, before anything is rounded that is larger than their difference.
template <class T, bool kFixed, bool kWeighted>
struct StatsWeights {
  const TilePair<T>& pair;
  Vec<T> magic;  // kMagic - shift
  struct Values {
    T *ref_n, *f_n, *ref_p, *f_p, *constant_p, *constant_a;
  } row, col;
  T* w;
  PairWeights<T> weights;

  // Equation (9) with one reference: f_i W_j + f_j W_i.
  PYSUPCON_INLINE Vec<T> factor(const T* f_row, const T* f_col, int i, int j) const {
    if constexpr (kWeighted) return f_row[i] * load(weights.col + j) + load(f_col + j) * weights.row[i];
    return f_row[i] + load(f_col + j);
  }
  // Otherwise the exponents of both parts, with the logarithms of the weights.
  PYSUPCON_INLINE Vec<T> of_row(Vec<T> t, const T* reference, int i, int j) const {
    if constexpr (kWeighted) return t - reference[i] + load(weights.col + j);
    return t - reference[i];
  }
  PYSUPCON_INLINE Vec<T> of_column(Vec<T> t, const T* reference, int i, int j) const {
    if constexpr (kWeighted) return t - load(reference + j) + weights.row[i];
    return t - load(reference + j);
  }

  PYSUPCON_INLINE Vec<T> negative(Vec<T> t, int i, int j) const {
    if constexpr (kFixed) return exp2_normal(t, magic) * factor(row.f_n, col.f_n, i, j);
    return exp2(of_row(t, row.ref_n, i, j)) * row.f_n[i] +
           exp2(of_column(t, col.ref_n, i, j)) * load(col.f_n + j);
  }
  PYSUPCON_INLINE Vec<T> positive(Vec<T> t, int i, int j) const {
    const Vec<T> constant = row.constant_p[i] + load(col.constant_p + j);
    if constexpr (kFixed)
      return exp2_normal<true>(t, magic) * factor(row.f_p, col.f_p, i, j) + constant;
    else  // the constants first, each with its own row's part
      return (exp2<true>(of_row(t, row.ref_p, i, j)) * row.f_p[i] + row.constant_p[i]) +
             (exp2<true>(of_column(t, col.ref_p, i, j)) * load(col.f_p + j) + load(col.constant_p + j));
  }

  PYSUPCON_INLINE void skip(int i0, int j0) const { fill_tile<T>(w, i0, j0, Vec<T>{}); }
  template <Kind kKind>
  PYSUPCON_INLINE void operator()(Tile<T>& tile, int i0, int j0) const {
    constexpr int L = kLanes<T>;
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
      for (int c = 0; c < kVecs; ++c) {
        const int i = i0 + r, j = j0 + c * L;
        const Vec<T> t = tile[r][c];
        Vec<T> out{};
        if constexpr (kKind == Kind::negative) {
          out = negative(t, i, j);
        } else if constexpr (kKind == Kind::positive) {
          out = positive(t, i, j);
        } else {
          const auto mask = pair.masks(i, j);
          const Vec<T> of_instance = row.constant_a[i] + load(col.constant_a + j);
          const Vec<T> same = positive(t, i, j) + select<T>(mask.instance, of_instance, Vec<T>{});
          out = select<T>(mask.negative, negative(t, i, j), out);
          out = select<T>(mask.positive, same, out);
        }
        store(w + i * kTileStride + j, out);
      }
  }
};

template <class T, bool kFixed, bool kWeighted>
void stats_weights(const Plan& plan, const Weights& rows, const Weights& cols, const TilePair<T>& pair, T* w,
                   Arena arena) {
  using Visit = StatsWeights<T, kFixed, kWeighted>;
  auto values = [&](const Weights& from, const Block<T>& b) {
    typename Visit::Values v{arena.take<T>(b.padded), arena.take<T>(b.padded), arena.take<T>(b.padded),
                             arena.take<T>(b.padded), arena.take<T>(b.padded), arena.take<T>(b.padded)};
    const T never = static_cast<T>(kNever);
    load_values<T>(v.ref_n, from.factor_n ? from.reference_n : nullptr, b, never);
    load_values<T>(v.ref_p, from.factor_p ? from.reference_p : nullptr, b, never);
    load_values<T>(v.f_n, from.factor_n, b, T(0));
    load_values<T>(v.f_p, from.factor_p, b, T(0));
    load_values<T>(v.constant_p, from.constant_p, b, T(0));
    load_values<T>(v.constant_a, from.constant_a, b, T(0));
    return v;
  };
  const auto row = values(rows, pair.a), col = values(cols, pair.b);
  const PairWeights<T> weights(pair, arena);
  if constexpr (kWeighted) weights.load(pair, kFixed ? T(1) : T(0));
  pair.each(Visit{pair, splat<T>(static_cast<T>(kMagic<T> - plan.shift)), row, col, w, weights});
}

}  // namespace pysupcon::cpu::PYSUPCON_ISA
