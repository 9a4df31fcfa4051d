// SINCERE's positive pass over a pair of blocks, and its gradient. Compiled once per instruction set.
#pragma once
#include "cpu/tiles.h"

namespace pysupcon::cpu::PYSUPCON_ISA {

// With d = log2(e) (n_i + epsilon - s_ij) and e = 2^-|d|:
template <class T>
PYSUPCON_INLINE Vec<T> softplus2(Vec<T> d) {  // log(1 + 2^d)
  const Vec<T> zero{};
  return max<T>(d, zero) * static_cast<T>(kLn2) + log1p_unit<T>(exp2(-max<T>(d, -d)));
}
template <class T>
PYSUPCON_INLINE Vec<T> log_sum2(Vec<T> d, Vec<T> weight) {  // log(2^weight + 2^d)
  return max<T>(d, weight) * static_cast<T>(kLn2) + log1p_unit<T>(exp2(-max<T>(d - weight, weight - d)));
}
template <class T>
PYSUPCON_INLINE Vec<T> sigmoid2(Vec<T> d) {  // 1 / (1 + 2^-d)
  const Vec<T> e = exp2(-max<T>(d, -d));
  return select<T>(d >= Vec<T>{}, splat<T>(T(1)), e) / (e + T(1));
}

// Row and column sums of softplus (forward) or of the sigmoid (backward, which also leaves the weights of the
// pairs). With weights, of log(2^weight + 2^d) and of the sigmoid of d - weight.
template <class T, bool kBackward, bool kWeighted>
struct PositivePass {
  const TilePair<T>& pair;
  struct Values {
    T *reference, *factor;
  } row, col;
  Vec<T>* row_sum;  // [a.padded] by lane
  T* col_sum;       // [b.padded]
  T* w;             // backward: [a.padded x kTileStride]
  PairWeights<T> weights;

  static PYSUPCON_INLINE Vec<T> term(Vec<T> d, Vec<T> weight) {
    if constexpr (kWeighted) return log_sum2<T>(d, weight);
    return softplus2<T>(d);
  }
  static PYSUPCON_INLINE Vec<T> slope(Vec<T> d, Vec<T> weight) {
    if constexpr (kWeighted) return sigmoid2<T>(d - weight);
    return sigmoid2<T>(d);
  }
  PYSUPCON_INLINE void skip(int i0, int j0) const {
    if constexpr (kBackward) fill_tile<T>(w, i0, j0, Vec<T>{});
  }
  template <Kind kKind>
  PYSUPCON_INLINE void operator()(Tile<T>& tile, int i0, int j0) const {
    constexpr int L = kLanes<T>;
    if constexpr (kKind == Kind::negative) return;
    if constexpr (!kBackward) pair.fetch();
    for (int c = 0; c < kVecs; ++c) {
      const int j = j0 + c * L;
      Vec<T> sum = load(col_sum + j);
      for (int r = 0; r < kRows; ++r) {
        const int i = i0 + r;
        const IVec<T> mask = kKind == Kind::mixed ? pair.masks(i, j).positive : ~IVec<T>{};
        const Vec<T> di = row.reference[i] - tile[r][c], dj = load(col.reference + j) - tile[r][c];
        const Vec<T> wi = kWeighted ? splat<T>(weights.row[i]) : Vec<T>{},
                     wj = kWeighted ? load(weights.col + j) : Vec<T>{};
        if constexpr (kBackward) {
          const Vec<T> gi = select<T>(mask, slope(di, wj), Vec<T>{}),
                       gj = select<T>(mask, slope(dj, wi), Vec<T>{});
          row_sum[i] += gi;
          sum += gj;
          store(w + i * kTileStride + j, gi * row.factor[i] + gj * load(col.factor + j));
        } else {
          row_sum[i] += select<T>(mask, term(di, wj), Vec<T>{});
          if (pair.plan.problem.self) sum += select<T>(mask, term(dj, wi), Vec<T>{});
        }
      }
      store(col_sum + j, sum);
    }
  }
};

template <class T, bool kBackward, bool kWeighted>
void positive_pass(const Softplus& rows, const Softplus& cols, double* out, const TilePair<T>& pair, T* w,
                   Arena arena) {
  using Visit = PositivePass<T, kBackward, kWeighted>;
  const Block<T>&a = pair.a, &b = pair.b;
  auto values = [&](const Softplus& from, const Block<T>& block) {
    typename Visit::Values v{arena.take<T>(block.padded), arena.take<T>(block.padded)};
    load_values<T>(v.reference, from.reference, block, static_cast<T>(-kNever));
    load_values<T>(v.factor, from.factor, block, T(0));
    return v;
  };
  const auto row = values(rows, a), col = values(cols, b);
  Visit visit{pair, row, col, arena.take<Vec<T>>(a.padded), arena.take<T>(b.padded), w, {pair, arena}};
  if constexpr (kWeighted) visit.weights.load(pair, T(0));
  memset(static_cast<void*>(visit.row_sum), 0, sizeof(Vec<T>) * a.padded);
  memset(visit.col_sum, 0, sizeof(T) * b.padded);
  pair.each(visit);
  if (!out) return;
  for (int i = 0; i < a.count; ++i) out[a.side->order[a.first + i]] += sum_lanes<T>(visit.row_sum[i]);
  if (!pair.plan.problem.self) return;
  for (int j = 0; j < b.count; ++j) out[b.side->order[b.first + j]] += visit.col_sum[j];
}

}  // namespace pysupcon::cpu::PYSUPCON_ISA
