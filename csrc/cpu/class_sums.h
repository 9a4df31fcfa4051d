// Sums over the rows of a class, equation (4), and lengths of rows: O(N D) work, in double throughout, so
// that the sum of a million rows loses nothing. Compiled once per instruction set.
#pragma once
#include "cpu/block.h"

namespace pysupcon::cpu::PYSUPCON_ISA {

using Wide = Vec<double>;

// Reads rows of any type as vectors of doubles; the row is padded with zeros to whole vectors.
struct RowReader {
  const Problem& q;
  double* buffer;  // [padded_dim]

  static int64_t padded_dim(const Problem& q) {
    return (q.dim + kLanes<double> - 1) / kLanes<double> * kLanes<double>;
  }

  template <class S>
  PYSUPCON_INLINE void widen(const S* from) const {
    for (int64_t k = 0; k < q.dim; ++k) buffer[k] = static_cast<double>(from[k]);
  }
  PYSUPCON_INLINE const double* read(const Side& side, int64_t row) const {
    const int64_t at = row * side.stride;
    switch (q.type) {
      case Type::f64:
        widen(static_cast<const double*>(side.rows) + at);
        break;
      case Type::f32:
        widen(static_cast<const float*>(side.rows) + at);
        break;
      case Type::f16:
        widen(static_cast<const _Float16*>(side.rows) + at);
        break;
      case Type::bf16: {
        const uint16_t* from = static_cast<const uint16_t*>(side.rows) + at;
        for (int64_t k = 0; k < q.dim; ++k) {
          const uint32_t bits = uint32_t(from[k]) << 16;
          float value;
          memcpy(&value, &bits, 4);
          buffer[k] = value;
        }
      }
    }
    for (int64_t k = q.dim; k < padded_dim(q); ++k) buffer[k] = 0;
    return buffer;
  }
};

PYSUPCON_INLINE double dot(const double* a, const double* b, int64_t dim) {
  Wide s[2] = {};
  int64_t k = 0;
  for (; k + 2 * kLanes<double> <= dim; k += 2 * kLanes<double>) {
    s[0] += load(a + k) * load(b + k);
    s[1] += load(a + k + kLanes<double>) * load(b + k + kLanes<double>);
  }
  for (; k < dim; k += kLanes<double>) s[0] += load(a + k) * load(b + k);
  return sum_lanes<double>(s[0] + s[1]);
}

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

inline size_t class_scratch_bytes(const Problem& q) {
  return 3 * sizeof(double) * RowReader::padded_dim(q) + 4 * 128;
}

struct ClassScratch {
  RowReader reader;
  double *sum, *weighted;
  ClassScratch(const Problem& q, void* memory) : reader{q, nullptr} {
    Arena arena{static_cast<char*>(memory)};
    const int64_t dim = RowReader::padded_dim(q);
    reader.buffer = arena.take<double>(dim);
    sum = arena.take<double>(dim);
    weighted = arena.take<double>(dim);
    for (int64_t k = 0; k < dim; ++k) sum[k] = weighted[k] = 0;
  }
};

PYSUPCON_INLINE int64_t own_position(const Problem& q, int64_t anchor) {
  return q.self ? anchor : q.self_position ? q.self_position[anchor] : -1;
}
PYSUPCON_INLINE void add(double* sum, const double* row, double factor, int64_t dim) {
  for (int64_t k = 0; k < dim; k += kLanes<double>) store(sum + k, load(sum + k) + factor * load(row + k));
}

inline void class_sum(const Problem& q, const ClassRun& run, double* total, void* memory) {
  const ClassScratch s(q, memory);
  const int64_t dim = RowReader::padded_dim(q);
  const Side &a = q.anchors, &c = q.candidates;
  for (int64_t j = run.first_candidate; j < run.last_candidate; ++j)
    add(s.sum, s.reader.read(c, c.order[j]), 1, dim);
  for (int64_t i = run.first_anchor; i < run.last_anchor; ++i) {
    const int64_t row = a.order[i], own = own_position(q, i);
    double value = dot(s.reader.read(a, row), s.sum, dim);
    if (own >= 0) {
      if (q.self) {
        value -= dot(s.reader.buffer, s.reader.buffer, dim);
      } else {
        for (int64_t k = 0; k < dim; ++k) s.weighted[k] = s.reader.buffer[k];
        value -= dot(s.weighted, s.reader.read(c, c.order[own]), dim);
      }
    }
    total[row] = q.scale * value;
  }
}

// Anchors: scale (w_i (C - own) + sum_j w_j c_j - w_own own), the w_j being the candidates' own upstream
// gradients. Candidates: scale (sum_i w_i x_i - those whose own row it is).
template <class T>
PYSUPCON_INLINE void class_sum_backward_as(const Problem& q, const ClassRun& run, const double* w,
                                           const double* other, const Gradients& g, void* memory) {
  const ClassScratch s(q, memory);
  const int64_t dim = RowReader::padded_dim(q);
  const Side &a = q.anchors, &c = q.candidates;
  T *grad_x = static_cast<T*>(g.anchors), *grad_c = static_cast<T*>(g.candidates);
  if (grad_x) {
    for (int64_t j = run.first_candidate; j < run.last_candidate; ++j) {
      const double* row = s.reader.read(c, c.order[j]);
      add(s.sum, row, 1, dim);
      if (other) add(s.weighted, row, other[c.order[j]], dim);
    }
    for (int64_t i = run.first_anchor; i < run.last_anchor; ++i) {
      const int64_t row = a.order[i], own = own_position(q, i);
      double own_factor = 0;
      for (int64_t k = 0; own < 0 && k < dim; ++k) s.reader.buffer[k] = 0;
      if (own >= 0) {
        const int64_t own_row = c.order[own];
        s.reader.read(c, own_row);
        own_factor = w[row] + (other ? other[own_row] : 0);
      }
      T* to = grad_x + row * q.dim;
      for (int64_t k = 0; k < q.dim; ++k)
        to[k] +=
            static_cast<T>(q.scale * (w[row] * s.sum[k] + s.weighted[k] - own_factor * s.reader.buffer[k]));
    }
  }
  if (!grad_c) return;
  for (int64_t k = 0; k < dim; ++k) s.weighted[k] = 0;
  for (int64_t i = run.first_anchor; i < run.last_anchor; ++i)
    add(s.weighted, s.reader.read(a, a.order[i]), w[a.order[i]], dim);
  for (int64_t j = run.first_candidate; j < run.last_candidate; ++j) {
    T* to = grad_c + c.order[j] * q.dim;
    for (int64_t k = 0; k < q.dim; ++k) to[k] += static_cast<T>(q.scale * s.weighted[k]);
  }
  for (int64_t i = run.first_anchor; i < run.last_anchor; ++i) {
    const int64_t own = own_position(q, i);
    if (own < 0) continue;
    const double* row = s.reader.read(a, a.order[i]);
    T* to = grad_c + c.order[own] * q.dim;
    for (int64_t k = 0; k < q.dim; ++k) to[k] -= static_cast<T>(q.scale * w[a.order[i]] * row[k]);
  }
}

inline void class_sum_backward(const Problem& q, const ClassRun& run, const double* w, const double* other,
                               const Gradients& g, void* memory) {
  if (q.self && run.last_anchor - run.first_anchor == 1) return;  // nobody but itself
  if (q.type == Type::f64)
    class_sum_backward_as<double>(q, run, w, other, g, memory);
  else
    class_sum_backward_as<float>(q, run, w, other, g, memory);
}

}  // namespace pysupcon::cpu::PYSUPCON_ISA
