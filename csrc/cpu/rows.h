// Plain helpers on rows for the O(N D) work, in double.
#pragma once
#include <cstring>

#include "cpu/kernels.h"

namespace pysupcon::cpu {

// Row `row` of a side as doubles.
inline void read_row(double* to, Type type, const Side& side, int64_t row, int64_t dim) {
  const int64_t at = row * side.stride;
  const auto copy = [&](auto* from) {
    for (int64_t k = 0; k < dim; ++k) to[k] = static_cast<double>(from[k]);
  };
  switch (type) {
    case Type::f64: return copy(static_cast<const double*>(side.rows) + at);
    case Type::f32: return copy(static_cast<const float*>(side.rows) + at);
    case Type::f16: return copy(static_cast<const _Float16*>(side.rows) + at);
    case Type::bf16: {
      const uint16_t* from = static_cast<const uint16_t*>(side.rows) + at;
      for (int64_t k = 0; k < dim; ++k) {
        const uint32_t bits = uint32_t(from[k]) << 16;
        float value;
        memcpy(&value, &bits, 4);
        to[k] = value;
      }
    }
  }
}

// Four partial sums, always the same four.
inline double dot(const double* a, const double* b, int64_t dim) {
  double s[4] = {};
  int64_t k = 0;
  for (; k + 4 <= dim; k += 4)
    for (int l = 0; l < 4; ++l) s[l] += a[k + l] * b[k + l];
  for (; k < dim; ++k) s[0] += a[k] * b[k];
  return (s[0] + s[1]) + (s[2] + s[3]);
}

// body(first, last) over parts of [0, count)
template <class Body>
void parallel(const Threads& threads, int64_t count, const Body& body) {
  if (count <= 0) return;
  threads.run(count, const_cast<Body*>(&body),
              [](void* b, int64_t first, int64_t last) { (*static_cast<const Body*>(b))(first, last); });
}

}  // namespace pysupcon::cpu
