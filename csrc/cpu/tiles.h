// Walks over the tiles of a pair of blocks: which pairs of a tile count, and as what. Equations:
// ../README.md.
#pragma once
#include "cpu/block.h"

namespace pysupcon::cpu::PYSUPCON_ISA {

// Padding rows and columns have class numbers that equal nothing real, and nothing of the other side's
// padding.
constexpr int kRowPadding = -1, kColPadding = -2;

template <class T>
struct TilePair {
  const Plan& plan;
  const Block<T>&a, &b;
  bool diagonal;          // self and a is b: a pair is visited for both its rows once, as (i, j) with i < j
  Upcoming &rows, &cols;  // of the next pair of blocks

  // Fetches a row of each. Called while the last thing is done to this pair: what is fetched earlier is
  // evicted.
  PYSUPCON_INLINE void fetch() const {
    rows.fetch();
    cols.fetch();
  }

  // Column in block b that is row i of block a itself, where both are not the same set of rows; any other
  // number if it is not there.
  PYSUPCON_INLINE int64_t own_column(int i) const {
    const int32_t* self = plan.problem.self_position;
    return self && i < a.count ? self[a.first + i] - b.first : -1;
  }

  PYSUPCON_INLINE bool classes_meet() const {
    return a.cls[0] <= b.cls[b.count - 1] && b.cls[0] <= a.cls[a.count - 1];
  }
  PYSUPCON_INLINE bool one_class() const {
    return a.cls[0] == a.cls[a.count - 1] && b.cls[0] == b.cls[b.count - 1] && a.cls[0] == b.cls[0];
  }
  // Sorted by class and then by instance: their ranges meet if a pair is of one instance.
  PYSUPCON_INLINE bool instances_meet(int i0, int i1, int j0, int j1) const {
    if (!plan.problem.anchors.instance) return false;
    return a.instance[i0] <= b.instance[j1] && b.instance[j0] <= a.instance[i1];
  }

  PYSUPCON_INLINE Kind kind(int i0, int j0) const {
    const Problem& q = plan.problem;
    const int i1 = i0 + kRows - 1, j1 = j0 + kCols<T> - 1;
    if (diagonal && j1 < i0) return Kind::skip;
    const bool whole = i1 < a.count && j1 < b.count && !(diagonal && j0 <= i1);
    const auto i_low = a.cls[i0], i_high = a.cls[i1 < a.count ? i1 : a.count - 1];
    const auto j_low = b.cls[j0], j_high = b.cls[j1 < b.count ? j1 : b.count - 1];
    if (i_high < j_low || j_high < i_low)
      return !q.negatives ? Kind::skip : whole ? Kind::negative : Kind::mixed;
    if (i_low != j_high || j_low != i_high) return Kind::mixed;  // sorted: equal only if all four are
    if (!q.positives) return Kind::skip;
    if (!whole || instances_meet(i0, i1, j0, j1)) return Kind::mixed;
    for (int r = 0; r < kRows; ++r) {
      const int64_t own = own_column(i0 + r);
      if (own >= j0 && own <= j1) return Kind::mixed;
    }
    return Kind::positive;
  }

  // Which lanes of row i, columns j .. j + lanes - 1, are negatives and positives of the row, and which of
  // the positives are of its instance.
  struct Masks {
    IVec<T> negative, positive, instance;
  };
  PYSUPCON_INLINE Masks masks(int i, int j) const {
    const IVec<T> cols = load_int<T>(b.cls + j), row = splat_int<T>(a.cls[i]);
    IVec<T> column{};
    for (int l = 0; l < kLanes<T>; ++l) column[l] = j + l;
    const IVec<T> same = cols == row;
    IVec<T> counts = (cols != splat_int<T>(kColPadding)) & (row != splat_int<T>(kRowPadding));
    if (diagonal) counts &= column > splat_int<T>(i);
    const int64_t own = own_column(i);
    const IVec<T> other = column != splat_int<T>(own >= 0 && own < kMaxBlock ? own : -1);
    const IVec<T> positive = same & counts & other;
    if (!plan.problem.anchors.instance) return {~same & counts, positive, IVec<T>{}};
    return {~same & counts, positive,
            positive & (load_int<T>(b.instance + j) == splat_int<T>(a.instance[i]))};
  }

  // visit(tile, kind, i0, j0) with kind a compile-time constant, for every tile in which a pair counts;
  // visit.skip(i0, j0) for the others.
  template <class Visit>
  PYSUPCON_INLINE void each(const Visit& visit) const {
    const T factor = static_cast<T>(plan.problem.self ? 1 : plan.problem.scale * kLog2e);
    for (int j0 = 0; j0 < b.count; j0 += kCols<T>)
      for (int i0 = 0; i0 < a.count; i0 += kRows) {
        const Kind k = kind(i0, j0);
        if (k == Kind::skip) {
          visit.skip(i0, j0);
          continue;
        }
        Tile<T> tile;
        similarities<T>(tile, a, b, i0, j0, factor);
        if (k == Kind::negative)
          visit.template operator()<Kind::negative>(tile, i0, j0);
        else if (k == Kind::positive)
          visit.template operator()<Kind::positive>(tile, i0, j0);
        else
          visit.template operator()<Kind::mixed>(tile, i0, j0);
      }
  }

  // Rows of `other` whose pairs with rows i0.. of `own` can count: all, on a diagonal those of the tiles that
  // were visited, and where negatives do not count, those of the same classes.
  PYSUPCON_INLINE Range counting(const Block<T>& own, const Block<T>& other, int i0) const {
    const int tile = i0 / kCols<T> * kCols<T>;
    Range r{0, other.count};
    if (diagonal && &own == &a) r.first = tile;
    const int visited = tile + kCols<T> > i0 + kRows ? tile + kCols<T> : i0 + kRows;
    if (diagonal && &own == &b && visited < other.count) r.last = visited;
    if (plan.problem.negatives) return r;
    const int i1 = i0 + kRows - 1 < own.count ? i0 + kRows - 1 : own.count - 1;
    while (r.first < r.last && other.cls[r.first] < own.cls[i0]) ++r.first;
    while (r.first < r.last && other.cls[r.last - 1] > own.cls[i1]) --r.last;
    return r;
  }
};

// Adds weights (as a block, [a.padded x kTileStride]) times rows to the gradients of both blocks.
template <class T>
PYSUPCON_INLINE void add_products(const TilePair<T>& pair, const T* w, const Gradients& g) {
  const Block<T>&a = pair.a, &b = pair.b;
  const int64_t dim = pair.plan.problem.dim;
  T* to_rows = static_cast<T*>(g.anchors);
  T* to_cols = static_cast<T*>(pair.plan.problem.self ? g.anchors : g.candidates);
  const auto rows_of = [&](const Block<T>& own, const Block<T>& other) {
    return [&](int i0) {
      pair.fetch();
      return pair.counting(own, other, i0);
    };
  };
  if (to_rows) add_product<T, false>(to_rows, w, a, b, dim, rows_of(a, b));
  if (to_cols) add_product<T, true>(to_cols, w, b, a, dim, rows_of(b, a));
}

// A tile of weights (or of kept similarities) in which no pair counts.
template <class T>
PYSUPCON_INLINE void fill_tile(T* w, int i0, int j0, Vec<T> value) {
  for (int r = 0; r < kRows; ++r)
    for (int c = 0; c < kVecs; ++c) store(w + (i0 + r) * kTileStride + j0 + c * kLanes<T>, value);
}

// The values of one side for a block, padded; `none` where the side gives nothing.
template <class T>
PYSUPCON_INLINE void load_values(T* to, const void* from, const Block<T>& b, T none) {
  for (int i = 0; i < b.padded; ++i)
    to[i] = from && i < b.count ? static_cast<const T*>(from)[b.first + i] : none;
}

// Weights of the rows of both blocks as candidates, padded.
template <class T>
struct PairWeights {
  T *row, *col;

  PairWeights(const TilePair<T>& pair, Arena& arena)
      : row(arena.take<T>(pair.a.padded)), col(arena.take<T>(pair.b.padded)) {}
  // `none`: where a side has no weights.
  PYSUPCON_INLINE void load(const TilePair<T>& pair, T none) const {
    load_values<T>(row, pair.plan.anchor_weights, pair.a, none);
    load_values<T>(col, pair.plan.candidate_weights, pair.b, none);
  }
};

}  // namespace pysupcon::cpu::PYSUPCON_ISA
