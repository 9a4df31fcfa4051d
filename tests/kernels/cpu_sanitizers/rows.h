// Random rows in classes of equal size.
#pragma once
#include <cstdint>
#include <cstring>
#include <numeric>
#include <random>
#include <vector>

#include "cpu/kernels.h"

// The bits of v as a 16-bit float, rounded to even; |v| at most 65504. Compilers differ in their 16-bit
// types.
inline uint16_t half_bits(float v) {
  uint32_t sign, bits;
  memcpy(&sign, &v, 4);
  const float scaled = (v < 0 ? -v : v) * 0x1p-112f;  // the exponents of both formats now agree
  memcpy(&bits, &scaled, 4);
  bits += 0xfff + (bits >> 13 & 1);
  return static_cast<uint16_t>((sign >> 16 & 0x8000) | bits >> 13);
}

struct Rows {
  std::vector<char> data;
  std::vector<int64_t> order;
  std::vector<int32_t> cls, instance;
  int64_t count, dim;

  Rows(pysupcon::cpu::Type type, int64_t n, int64_t d, int classes, double size, unsigned seed)
      : count(n), dim(d) {
    std::mt19937 random(seed);
    std::normal_distribution<double> normal(0, size);
    data.resize(size_t(n * d) * (type == pysupcon::cpu::Type::f64   ? 8
                                 : type == pysupcon::cpu::Type::f32 ? 4
                                                                    : 2));
    for (int64_t i = 0; i < n * d; ++i) {
      const float v = static_cast<float>(normal(random));
      uint32_t bits;
      memcpy(&bits, &v, 4);
      if (type == pysupcon::cpu::Type::f64) reinterpret_cast<double*>(data.data())[i] = v;
      if (type == pysupcon::cpu::Type::f32) reinterpret_cast<float*>(data.data())[i] = v;
      if (type == pysupcon::cpu::Type::f16) reinterpret_cast<uint16_t*>(data.data())[i] = half_bits(v);
      if (type == pysupcon::cpu::Type::bf16)
        reinterpret_cast<uint16_t*>(data.data())[i] = static_cast<uint16_t>(bits >> 16);
    }
    order.resize(n);
    std::iota(order.rbegin(), order.rend(), 0);
    for (int64_t i = 0; i < n; ++i) cls.push_back(static_cast<int32_t>(i * classes / n));
    for (int64_t i = 0; i < n; ++i) instance.push_back(static_cast<int32_t>(i / 2 + cls[i]));
  }
  pysupcon::cpu::Side side(bool instances) const {
    return {data.data(), dim, count, order.data(), cls.data(), instances ? instance.data() : nullptr};
  }
};
