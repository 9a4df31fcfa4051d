// Lengths of rows: the bound from which the reference of the exponentials is made, and the one look at every
// number that says whether all are finite. Compiled once per instruction set.
#pragma once
#include "cpu/block.h"

namespace pysupcon::cpu::PYSUPCON_ISA {

inline double largest_square(const Problem& q, const Side& side, int64_t first, int64_t last) {
  constexpr int L = kLanes<float>;
  double best = 0;
  for (int64_t r = first; r < last; ++r) {
    double square = 0;
    const int64_t at = r * side.stride;
    if (q.type == Type::f32) {  // float lanes: the bound that is made of this has room for their rounding
      const float* x = static_cast<const float*>(side.rows) + at;
      Vec<float> s{};
      int64_t k = 0;
      for (; k + L <= q.dim; k += L) s += load(x + k) * load(x + k);
      float rest = 0;
      for (; k < q.dim; ++k) rest += x[k] * x[k];
      square = static_cast<double>(sum_lanes<float>(s)) + rest;
    } else {
      double part[64];
      const int64_t step = 64;
      for (int64_t from = 0; from < q.dim; from += step) {
        const int64_t n = q.dim - from < step ? q.dim - from : step;
        if (q.type == Type::f64) {
          convert(part, static_cast<const double*>(side.rows) + at + from, static_cast<int>(n));
        } else {
          float narrow[64];
          copy_row(narrow, q, side, r, from, static_cast<int>(n));
          convert(part, narrow, static_cast<int>(n));
        }
        for (int64_t k = 0; k < n; ++k) square += part[k] * part[k];
      }
    }
    if (!(square <= best)) best = square;
    if (square != square) return square;
  }
  return best;
}

}  // namespace pysupcon::cpu::PYSUPCON_ISA
