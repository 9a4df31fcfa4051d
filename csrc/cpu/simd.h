// Vectors of the instruction set this file is compiled for, in the compiler's own vector extension: the same
// source gives AVX-512, AVX2, SSE2 and NEON code. No standard-library template is used here: its code would
// carry this file's instruction set into functions that the linker shares with the rest of the program.
#pragma once
#include <cstdint>
#include <cstring>

namespace pysupcon::cpu::PYSUPCON_ISA {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

#define PYSUPCON_INLINE inline __attribute__((always_inline))

template <class T>
struct Lanes;
template <>
struct Lanes<float> {
  using Int = int32_t;
  typedef float V __attribute__((vector_size(kVectorBytes)));
  typedef int32_t I __attribute__((vector_size(kVectorBytes)));
};
template <>
struct Lanes<double> {
  using Int = int64_t;
  typedef double V __attribute__((vector_size(kVectorBytes)));
  typedef int64_t I __attribute__((vector_size(kVectorBytes)));
};
template <class T>
using Vec = typename Lanes<T>::V;
template <class T>
using IVec = typename Lanes<T>::I;  // also the type of a comparison: all bits set where true
template <class T>
using LaneInt = typename Lanes<T>::Int;
template <class T>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(T));

template <class T>
PYSUPCON_INLINE Vec<T> splat(T value) {
  return value - Vec<T>{};
}
template <class T>
PYSUPCON_INLINE IVec<T> splat_int(LaneInt<T> value) {
  return value - IVec<T>{};
}
template <class T>
PYSUPCON_INLINE Vec<T> load(const T* p) {
  Vec<T> v;
  memcpy(&v, p, sizeof v);
  return v;
}
template <class T>
PYSUPCON_INLINE IVec<T> load_int(const LaneInt<T>* p) {
  IVec<T> v;
  memcpy(&v, p, sizeof v);
  return v;
}
template <class T>
PYSUPCON_INLINE void store(T* p, Vec<T> v) {
  memcpy(p, &v, sizeof v);
}

template <class T>
PYSUPCON_INLINE Vec<T> select(IVec<T> mask, Vec<T> yes, Vec<T> no) {
  return mask ? yes : no;
}
template <class T>
PYSUPCON_INLINE Vec<T> max(Vec<T> a, Vec<T> b) {
  return a > b ? a : b;
}

// A fixed tree, so that the result is the same on every run.
template <class T>
PYSUPCON_INLINE T sum_lanes(Vec<T> v) {
  T lane[kLanes<T>];
  memcpy(lane, &v, sizeof v);
#pragma GCC unroll 8
  for (int step = kLanes<T> / 2; step > 0; step /= 2)
#pragma GCC unroll 8
    for (int i = 0; i < step; ++i) lane[i] += lane[i + step];
  return lane[0];
}
template <class T>
PYSUPCON_INLINE T max_lanes(Vec<T> v) {
  T lane[kLanes<T>];
  memcpy(lane, &v, sizeof v);
  T best = lane[0];
  for (int i = 1; i < kLanes<T>; ++i) best = lane[i] > best ? lane[i] : best;
  return best;
}

// Adding it rounds to a whole number: its unit in the last place is 1.
template <class T>
constexpr T kMagic = sizeof(T) == 4 ? T(12582912.0) : T(6755399441055744.0);  // 1.5 * 2^23, 1.5 * 2^52

// 2^(t - shift) to about one unit in the last place, for t - shift between the smallest and the largest
// exponent of a normal number; magic = kMagic - shift, shift a whole number. t = n + f with n = round(t), |f|
// <= 1/2, exactly; 2^f by a minimax polynomial (relative error 7.5e-8 in float, 3e-18 in double), 2^(n -
// shift) by the exponent bits. kPrecise: with one term more (1.9e-9 before rounding), for sums in which
// nothing but equal similarities may stand: there the polynomial's error has one sign.
template <bool kPrecise = false>
PYSUPCON_INLINE Vec<float> exp2_normal(Vec<float> t, Vec<float> magic = splat<float>(kMagic<float>)) {
  using V = Vec<float>;
  using U = unsigned __attribute__((vector_size(sizeof(V))));  // far below, the sum wraps around
  const V shifted = t + magic;
  const V f = t - (shifted - magic);
  if constexpr (kPrecise) {
    V p = splat<float>(0.00015345812158740183f);
    p = p * f + 0.001339993120947414f;
    p = p * f + 0.009618488956522791f;
    p = p * f + 0.055503287769976636f;
    p = p * f + 0.24022646890639573f;
    p = p * f + 0.6931472057372526f;
    p = p * f + 1.f;
    return (V)((U)p + ((U)shifted << 23));
  }
  V p = splat<float>(0.00132764677993f);
  p = p * f + 0.00967554124829f;
  p = p * f + 0.0555071328665f;
  p = p * f + 0.240221197266f;
  p = p * f + 0.693146967059f;
  p = p * f + 1.00000007165f;
  return (V)((U)p + ((U)shifted << 23));
}
template <bool kPrecise = false>
PYSUPCON_INLINE Vec<double> exp2_normal(Vec<double> t, Vec<double> magic = splat<double>(kMagic<double>)) {
  using V = Vec<double>;
  const V shifted = t + magic;
  const V f = t - (shifted - magic);
  V p = splat<double>(4.4352807031925459592e-10);
  p = p * f + 7.0741055798305341942e-9;
  p = p * f + 1.0178198035371477308e-7;
  p = p * f + 1.321543308990612687e-6;
  p = p * f + 1.5252733489955560676e-5;
  p = p * f + 1.5403530462513906055e-4;
  p = p * f + 1.3333558146789954566e-3;
  p = p * f + 9.6181291075883356971e-3;
  p = p * f + 5.5504108664819921482e-2;
  p = p * f + 0.24022650695910156203;
  p = p * f + 0.69314718055994533046;
  p = p * f + 0.9999999999999999971;
  using U = unsigned long long __attribute__((vector_size(sizeof(V))));
  return (V)((U)p + ((U)shifted << 52));
}
// The same, and 0 for x below the smallest exponent.
template <bool kPrecise, class V>
PYSUPCON_INLINE V exp2_or_zero(V x, V lowest) {
  return x < lowest ? V{} : exp2_normal<kPrecise>(x > lowest ? x : lowest);
}
template <bool kPrecise = false>
PYSUPCON_INLINE Vec<float> exp2(Vec<float> x) {
  return exp2_or_zero<kPrecise>(x, splat<float>(-126.f));
}
template <bool kPrecise = false>
PYSUPCON_INLINE Vec<double> exp2(Vec<double> x) {
  return exp2_or_zero<kPrecise>(x, splat<double>(-1022.0));
}

// log(1 + t) for 0 <= t <= 1 with full relative accuracy: 2 atanh(t / (2 + t)), a series in z^2 <= 1/9.
template <class T>
PYSUPCON_INLINE Vec<T> log1p_unit(Vec<T> t) {
  constexpr int kTerms = sizeof(T) == 4 ? 8 : 17;
  const Vec<T> z = t / (t + T(2)), zz = z * z;
  Vec<T> p = splat<T>(T(1) / (2 * kTerms - 1));
#pragma GCC unroll 17
  for (int k = kTerms - 1; k >= 1; --k) p = p * zz + T(1) / (2 * k - 1);
  return (z + z) * p;
}

}  // namespace pysupcon::cpu::PYSUPCON_ISA
