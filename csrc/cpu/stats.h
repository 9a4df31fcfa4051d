// The pair statistics of a pair of blocks, and their gradient. Compiled once per instruction set.
#pragma once
#include "cpu/tiles.h"

namespace pysupcon::cpu::PYSUPCON_ISA {

// ------------------------------------------------------------------------------------------------ forward,
// one reference Sums of 2^(t - shift), equations (5) and (6): one exponential serves the row and the column
// of a pair.
template <class T>
struct FixedStats {
  const TilePair<T>& pair;
  Vec<T> magic;          // kMagic - shift
  Vec<T>*row_n, *row_p;  // [a.padded] sums by lane
  T *col_n, *col_p;      // [b.padded]

  PYSUPCON_INLINE void skip(int, int) const {}
  template <Kind kKind>
  PYSUPCON_INLINE void operator()(Tile<T>& tile, int i0, int j0) const {
    constexpr int L = kLanes<T>;
    pair.fetch();
    Vec<T> n[kVecs] = {}, p[kVecs] = {};
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      Vec<T> rn{}, rp{};
#pragma GCC unroll 4
      for (int c = 0; c < kVecs; ++c) {
        const Vec<T> e = exp2_normal(tile[r][c], magic);
        if constexpr (kKind == Kind::negative) {
          rn += e;
          n[c] += e;
        } else if constexpr (kKind == Kind::positive) {
          rp += e;
          p[c] += e;
        } else {
          const auto mask = pair.masks(i0 + r, j0 + c * L);
          const Vec<T> en = select<T>(mask.negative, e, Vec<T>{}), ep = select<T>(mask.positive, e, Vec<T>{});
          rn += en;
          rp += ep;
          n[c] += en;
          p[c] += ep;
        }
      }
      if constexpr (kKind != Kind::positive) row_n[i0 + r] += rn;
      if constexpr (kKind != Kind::negative) row_p[i0 + r] += rp;
    }
    if (!pair.plan.problem.self) return;
#pragma GCC unroll 4
    for (int c = 0; c < kVecs; ++c) {
      if constexpr (kKind != Kind::positive) store(col_n + j0 + c * L, load(col_n + j0 + c * L) + n[c]);
      if constexpr (kKind != Kind::negative) store(col_p + j0 + c * L, load(col_p + j0 + c * L) + p[c]);
    }
  }
};

template <class T>
void fixed_stats(const Plan& plan, const StatsSums& sums, const TilePair<T>& pair, Arena arena) {
  const Block<T>&a = pair.a, &b = pair.b;
  FixedStats<T> visit{pair,
                      splat<T>(static_cast<T>(kMagic<T> - plan.shift)),
                      arena.take<Vec<T>>(a.padded),
                      arena.take<Vec<T>>(a.padded),
                      arena.take<T>(b.padded),
                      arena.take<T>(b.padded)};
  memset(static_cast<void*>(visit.row_n), 0, sizeof(Vec<T>) * a.padded);
  memset(static_cast<void*>(visit.row_p), 0, sizeof(Vec<T>) * a.padded);
  memset(visit.col_n, 0, sizeof(T) * b.padded);
  memset(visit.col_p, 0, sizeof(T) * b.padded);
  pair.each(visit);
  for (int i = 0; i < a.count; ++i) {
    const int64_t row = a.side->order[a.first + i];
    sums.n[row] += sum_lanes<T>(visit.row_n[i]);
    sums.p[row] += sum_lanes<T>(visit.row_p[i]);
  }
  if (!pair.plan.problem.self) return;
  for (int j = 0; j < b.count; ++j) {
    const int64_t row = b.side->order[b.first + j];
    sums.n[row] += visit.col_n[j];
    sums.p[row] += visit.col_p[j];
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

template <class T>
void running_stats(const Plan&, const StatsSums& sums, const TilePair<T>& pair, Arena arena) {
  constexpr int L = kLanes<T>;
  const Block<T>&a = pair.a, &b = pair.b;
  const Vec<T> none = splat<T>(static_cast<T>(-__builtin_inf()));
  T* kept = arena.take<T>(kMaxBlock * kTileStride);
  pair.each(KeepTile<T>{pair, kept});

  T *top_n = static_cast<T*>(sums.max_n), *top_p = static_cast<T*>(sums.max_p);
  const Problem& q = pair.plan.problem;
  for (int i = 0; i < a.count; ++i) {
    Vec<T> mn = none, mp = none, en{}, ep{};
    const T* t = kept + i * kTileStride;
    for (int j = 0; j < b.count; j += L) {
      const auto mask = pair.masks(i, j);
      mn = max<T>(select<T>(mask.negative, load(t + j), none), mn);
      mp = max<T>(select<T>(mask.positive, load(t + j), none), mp);
    }
    const T n = max_lanes<T>(mn), p = max_lanes<T>(mp);
    const Vec<T> vn = splat<T>(n > -__builtin_inf() ? n : T(0)),
                 vp = splat<T>(p > -__builtin_inf() ? p : T(0));
    for (int j = 0; j < b.count; j += L) {
      const auto mask = pair.masks(i, j);
      const Vec<T> e = exp2(load(t + j) - select<T>(mask.positive, vp, vn));
      en += select<T>(mask.negative, e, Vec<T>{});
      ep += select<T>(mask.positive, e, Vec<T>{});
    }
    const int64_t row = a.side->order[a.first + i];
    if (q.negatives) merge<T>(sums.n[row], top_n[row], sum_lanes<T>(en), n);
    if (q.positives) merge<T>(sums.p[row], top_p[row], sum_lanes<T>(ep), p);
  }
  if (!pair.plan.problem.self) return;
  for (int j = 0; j < b.count; j += L) {
    Vec<T> mn = none, mp = none, en{}, ep{};
    for (int i = 0; i < a.count; ++i) {
      const auto mask = pair.masks(i, j);
      const Vec<T> t = load(kept + i * kTileStride + j);
      mn = max<T>(select<T>(mask.negative, t, none), mn);
      mp = max<T>(select<T>(mask.positive, t, none), mp);
    }
    const Vec<T> vn = select<T>(mn > none, mn, Vec<T>{}), vp = select<T>(mp > none, mp, Vec<T>{});
    for (int i = 0; i < a.count; ++i) {
      const auto mask = pair.masks(i, j);
      const Vec<T> e = exp2(load(kept + i * kTileStride + j) - select<T>(mask.positive, vp, vn));
      en += select<T>(mask.negative, e, Vec<T>{});
      ep += select<T>(mask.positive, e, Vec<T>{});
    }
    for (int l = 0; l < L && j + l < b.count; ++l) {
      const int64_t row = b.side->order[b.first + j + l];
      if (q.negatives) merge<T>(sums.n[row], top_n[row], en[l], mn[l]);
      if (q.positives) merge<T>(sums.p[row], top_p[row], ep[l], mp[l]);
    }
  }
}

// ------------------------------------------------------------------------------------------------ backward
// Weight of pair (i, j), equation (9): 2^(t - ref_i) f_i + 2^(t - ref_j) f_j; with one reference for all, one
// exponential.
template <class T, bool kFixed>
struct StatsWeights {
  const TilePair<T>& pair;
  Vec<T> magic;  // kMagic - shift
  struct Values {
    T *ref_n, *f_n, *ref_p, *f_p;
  } row, col;
  T* w;

  PYSUPCON_INLINE Vec<T> weight(Vec<T> t, T ref_i, T f_i, const T* ref_j, const T* f_j) const {
    if constexpr (kFixed) return exp2_normal(t, magic) * (f_i + load(f_j));
    return exp2(t - ref_i) * f_i + exp2(t - load(ref_j)) * load(f_j);
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
          out = weight(t, row.ref_n[i], row.f_n[i], col.ref_n + j, col.f_n + j);
        } else if constexpr (kKind == Kind::positive) {
          out = weight(t, row.ref_p[i], row.f_p[i], col.ref_p + j, col.f_p + j);
        } else {
          const auto mask = pair.masks(i, j);
          out =
              select<T>(mask.negative, weight(t, row.ref_n[i], row.f_n[i], col.ref_n + j, col.f_n + j), out);
          out =
              select<T>(mask.positive, weight(t, row.ref_p[i], row.f_p[i], col.ref_p + j, col.f_p + j), out);
        }
        store(w + i * kTileStride + j, out);
      }
  }
};

template <class T, bool kFixed>
void stats_weights(const Plan& plan, const Weights& rows, const Weights& cols, const TilePair<T>& pair, T* w,
                   Arena arena) {
  using Visit = StatsWeights<T, kFixed>;
  auto values = [&](const Weights& from, const Block<T>& b) {
    typename Visit::Values v{arena.take<T>(b.padded), arena.take<T>(b.padded), arena.take<T>(b.padded),
                             arena.take<T>(b.padded)};
    const T never = static_cast<T>(kNever);
    load_values<T>(v.ref_n, from.factor_n ? from.reference_n : nullptr, b, never);
    load_values<T>(v.ref_p, from.factor_p ? from.reference_p : nullptr, b, never);
    load_values<T>(v.f_n, from.factor_n, b, T(0));
    load_values<T>(v.f_p, from.factor_p, b, T(0));
    return v;
  };
  const auto row = values(rows, pair.a), col = values(cols, pair.b);
  pair.each(Visit{pair, splat<T>(static_cast<T>(kMagic<T> - plan.shift)), row, col, w});
}

}  // namespace pysupcon::cpu::PYSUPCON_ISA
