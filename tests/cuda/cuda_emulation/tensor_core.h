// How a tensor core computes D = A B + C in fp32. The 16 products of an element are added in blocks. In each
// block, the products and the accumulator are aligned to the largest exponent among them, truncated after the
// last fp32 bit at that exponent and a few guard bits, and added exactly; the sum is rounded toward zero to
// fp32. So a term that is much smaller than the accumulator loses its low bits, always toward zero.
//
// Two published models, both bit-accurate on the hardware they were fitted to (MMA-Sim, arXiv:2511.10909;
// Accurate Models of NVIDIA Tensor Cores, arXiv:2512.07004).
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

namespace shim {

struct TensorCore {
  const char* name;
  int block;       // products that are added at once
  int guard_bits;  // bits kept behind the last bit of fp32
};
constexpr TensorCore kTensorCores[] = {{"h100", 16, 2}, {"a100", 8, 1}};

// The model in use. Its initial value is that of CUDA_SHIM_TENSOR_CORE in the environment, h100 if unset.
inline TensorCore& tensor_core() {
  static TensorCore chosen = [] {
    const char* name = getenv("CUDA_SHIM_TENSOR_CORE");
    if (!name) return kTensorCores[0];
    for (const TensorCore& model : kTensorCores)
      if (!strcmp(model.name, name)) return model;
    throw std::runtime_error(std::string("CUDA_SHIM_TENSOR_CORE=") + name + " is neither h100 nor a100");
  }();
  return chosen;
}

// Optimized in every build, because this arithmetic takes most of the emulation's time.
#pragma GCC push_options
#pragma GCC optimize("O3")

// ROWS rows of 16 factors in a 16-bit format: value = mantissa * 2^(exponent - FRACTION_BITS).
template <int ROWS>
struct Factors {
  static constexpr int kZero = -(1 << 20), kSpecial = 1 << 22;  // exponents of 0, and of infinity and NaN
  float mantissa[ROWS][16];                                     // integers
  int32_t exponent[ROWS][16];
  bool zero[ROWS], finite[ROWS];  // whole rows

  // words[row][k]: numbers 2 k (low half) and 2 k + 1. A subnormal number has the format's smallest exponent
  // and no leading one, as in the hardware. Masks instead of branches, so that it becomes vector code.
  template <int FRACTION_BITS, int EXPONENT_BITS>
  void decode(const uint32_t (&words)[ROWS][8]) {
    constexpr int top = (1 << EXPONENT_BITS) - 1, bias = top >> 1, leading = 1 << FRACTION_BITS;
    for (int row = 0; row < ROWS; ++row) {
      uint16_t numbers[16];
      memcpy(numbers, words[row], sizeof numbers);
      int any = 0, special = 0;
      for (int k = 0; k < 16; ++k) {
        const int bits = numbers[k], field = bits >> FRACTION_BITS & top;
        const int is_normal = -int(field != 0), is_special = -int(field == top), sign = -(bits >> 15);
        const int magnitude = (bits & (leading - 1)) | (leading & is_normal);
        const int is_zero = -int(magnitude == 0);
        mantissa[row][k] = float((magnitude ^ sign) - sign);
        const int finite_exponent = field + 1 + is_normal - bias;
        exponent[row][k] =
            (finite_exponent & ~is_zero & ~is_special) | (kZero & is_zero) | (kSpecial & is_special);
        any |= magnitude, special |= is_special;
      }
      zero[row] = !any, finite[row] = !special;
    }
  }
  // Handles infinities and NaN; called only if a block contains one.
  double value(int row, int k, int fraction_bits) const {
    const float m = mantissa[row][k];
    const int e = exponent[row][k];
    if (e == kZero) return 0;
    if (e != kSpecial) return std::ldexp(double(m), e - fraction_bits);
    return std::abs(m) != float(1 << fraction_bits) ? NAN : m < 0 ? -INFINITY : INFINITY;
  }
};

inline double power_of_two(int exponent) {
  const uint64_t bits = uint64_t(exponent + 1023) << 52;
  double x;
  memcpy(&x, &bits, 8);
  return x;
}
// x rounded toward zero to fp32; infinite beyond the largest fp32 number.
inline float round_toward_zero(double x) {
  if (std::abs(x) < 0x1p-126) return float(std::trunc(x * 0x1p149) * 0x1p-149);
  uint64_t bits;
  memcpy(&bits, &x, 8);
  bits &= ~uint64_t(0x1fffffff);  // 24 of 53 significant bits are left
  memcpy(&x, &bits, 8);
  return float(x);
}

// One element: c + sum over k of a[k] b[k], block by block.
template <int FRACTION_BITS, int BLOCK, int GUARD_BITS, int M, int N>
float multiply_add(const Factors<M>& a, int m, const Factors<N>& b, int n, float c) {
  constexpr int kSpecial = Factors<M>::kSpecial;
  constexpr int lift = 23 + GUARD_BITS - 2 * FRACTION_BITS;
  static_assert(2 * FRACTION_BITS + 2 <= 24, "a product is exact in fp32");
  for (int k0 = 0; k0 < 16; k0 += BLOCK) {
    uint32_t bits;
    memcpy(&bits, &c, 4);
    const int field = bits >> 23 & 0xff;
    const int c_exponent = field == 0xff ? kSpecial : (field ? field : 1) - 127;
    const float *am = a.mantissa[m] + k0, *bm = b.mantissa[n] + k0;
    const int32_t *ae = a.exponent[m] + k0, *be = b.exponent[n] + k0;
    int largest = c_exponent;
    for (int k = 0; k < BLOCK; ++k) {
      const int e = ae[k] + be[k];
      largest = e > largest ? e : largest;
    }
    if (largest >= kSpecial / 2) {
      double sum = c;
      for (int k = k0; k < k0 + BLOCK; ++k)
        sum += a.value(m, k, FRACTION_BITS) * b.value(n, k, FRACTION_BITS);
      c = float(sum);  // not finite: the order of the sum does not matter
      continue;
    }
    // In units of the last guard bit of the largest exponent. A conversion to an integer cuts toward zero.
    // Products are below 2^(2 + 23 + GUARD_BITS), so 16 of them fit into 32 bits; c joins in 64.
    int32_t sum = 0;
    for (int k = 0; k < BLOCK; ++k) {
      const int32_t scale = std::max(ae[k] + be[k] - largest + lift + 127, 0) << 23;  // a float's bits
      float unit;
      memcpy(&unit, &scale, 4);
      sum += int32_t(am[k] * bm[k] * unit);
    }
    const int32_t c_mantissa = (int32_t(bits & 0x7fffff) | (field ? 1 << 23 : 0)) << GUARD_BITS;
    const int64_t c_aligned = c_mantissa >> std::min(largest - c_exponent, 31);
    const int64_t total = sum + (bits >> 31 ? -c_aligned : c_aligned);
    c = round_toward_zero(double(total) * power_of_two(largest - 23 - GUARD_BITS));
  }
  return c;
}

// d[m][n] += sum over k of a[m][k] b[n][k], as this model's mma.m16n8k16 does.
template <int FRACTION_BITS>
void multiply_add(const TensorCore& model, float (&d)[16][8], const Factors<16>& a, const Factors<8>& b) {
  for (int m = 0; m < 16; ++m)
    for (int n = 0; n < 8; ++n) {
      float& c = d[m][n];
      if ((a.zero[m] && b.finite[n]) || (b.zero[n] && a.finite[m]))
        c += 0.f;
      else if (model.block == 8)
        c = multiply_add<FRACTION_BITS, 8, 1>(a, m, b, n, c);
      else
        c = multiply_add<FRACTION_BITS, 16, 2>(a, m, b, n, c);
    }
}

#pragma GCC pop_options
}  // namespace shim
