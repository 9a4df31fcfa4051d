// Tests the emulated tensor core against a second implementation of its models, in long double with the
// rounding mode of the processor, and against known properties of tensor cores.
#include <cfenv>
#include <random>

#include "gpu_ops.cuh"

namespace {

int failures = 0;
void check(bool ok, const char* model, const char* what) {
  if (!ok) printf("FAIL %s: %s\n", model, what), ++failures;
}

struct Product {
  uint16_t a[16][16], b[8][16];  // D[m][n] = C[m][n] + sum over k of a[m][k] b[n][k]
  float c[16][8], d[16][8];
};

template <class F>
__global__ void multiply(Product* p) {
  const int g = int(threadIdx.x) / 4, t = int(threadIdx.x) % 4;
  uint32_t a[4], b[2];
  for (int r = 0; r < 4; ++r) memcpy(&a[r], &p->a[g + 8 * (r % 2)][2 * t + 8 * (r / 2)], 4);
  for (int r = 0; r < 2; ++r) memcpy(&b[r], &p->b[g][2 * t + 8 * r], 4);
  float d[4];
  for (int i = 0; i < 4; ++i) d[i] = p->c[g + 8 * (i / 2)][2 * t + i % 2];
  F::mma(d, a, b);
  for (int i = 0; i < 4; ++i) p->d[g + 8 * (i / 2)][2 * t + i % 2] = d[i];
}
template <class F>
void run(Product& p) {
  gpu::launch(multiply<F>, dim3(1), dim3(32), 0, nullptr, &p);
}

template <class F>
double number(uint16_t bits) {
  typename F::type x;
  memcpy(&x, &bits, 2);
  return double(F::to(x));
}
template <class F>
uint16_t bits_of(double x) {
  const auto rounded = F::from(float(x));
  uint16_t bits;
  memcpy(&bits, &rounded, 2);
  return bits;
}

// The exponent of x in hardware: subnormal numbers have the exponent of the smallest normal number.
int exponent_of(double x, int smallest) { return x == 0 ? smallest : std::max(std::ilogb(x), smallest); }

float toward_zero(long double x) {
  if (std::abs(x) >= 0x1p128L) return x < 0 ? -INFINITY : INFINITY;
  const int before = fegetround();
  fesetround(FE_TOWARDZERO);
  volatile long double wide = x;
  volatile float narrow = float(wide);
  fesetround(before);
  return narrow;
}

template <class F>
float expected(const shim::TensorCore& model, const Product& p, int m, int n) {
  const int smallest = std::is_same<F, gpu::Bf16>::value ? -126 : -14;
  float c = p.c[m][n];
  for (int k0 = 0; k0 < 16; k0 += model.block) {
    long double plain = c;
    int top = exponent_of(std::isfinite(c) ? c : 0, -126);
    for (int k = k0; k < k0 + model.block; ++k) {
      const double a = number<F>(p.a[m][k]), b = number<F>(p.b[n][k]);
      plain += (long double)(a)*b;
      if (a != 0 && b != 0 && std::isfinite(a * b))
        top = std::max(top, exponent_of(a, smallest) + exponent_of(b, smallest));
    }
    if (!std::isfinite(plain)) {
      c = float(plain);
      continue;
    }
    const int unit = top - 23 - model.guard_bits;
    long double sum = std::trunc(std::ldexp((long double)(c), -unit));
    for (int k = k0; k < k0 + model.block; ++k)
      sum += std::trunc(
          std::ldexp((long double)(number<F>(p.a[m][k])) * (long double)(number<F>(p.b[n][k])), -unit));
    c = toward_zero(std::ldexp(sum, unit));
  }
  return c;
}

bool identical(float x, float y) { return (std::isnan(x) && std::isnan(y)) || memcmp(&x, &y, sizeof x) == 0; }

// Fragments that exercise every part of the arithmetic.
template <class F>
void fill(Product& p, int kind, std::mt19937& rng) {
  std::normal_distribution<double> normal;
  const auto any = [&] { return uint16_t(rng()); };
  const auto finite = [&] {  // any exponent, subnormal numbers and both zeros among them
    uint16_t x;
    do x = any();
    while (!std::isfinite(number<F>(x)));
    return rng() % 8 ? x : uint16_t(x & 0x8000);
  };
  const auto one = [&](bool of_a) -> uint16_t {
    if (kind == 0) return bits_of<F>(normal(rng));
    if (kind == 1) return finite();
    if (kind == 2) return any();  // infinities and NaN, too
    if (kind == 3)
      return bits_of<F>(std::is_same<F, gpu::F16>::value ? 2047. : 255.);       // the largest mantissas
    if (kind == 4) return bits_of<F>(std::exp2(double(int(rng() % 25)) - 12));  // ties and near ones
    return bits_of<F>(of_a ? std::abs(normal(rng)) * 0x1p-10 : std::abs(normal(rng)));  // small beside c
  };
  for (auto& row : p.a)
    for (uint16_t& x : row) x = one(true);
  for (auto& row : p.b)
    for (uint16_t& x : row) x = one(false);
  for (auto& row : p.c)
    for (float& x : row) {
      const uint32_t bits = uint32_t(rng());
      memcpy(&x, &bits, 4);
      if (kind == 0 || kind == 3) x = float(normal(rng) * 100);
      if (kind == 1 && !std::isfinite(x)) x = -0.f;
      if (kind == 4) x = float(std::exp2(double(int(rng() % 50)) - 25)) * (rng() % 2 ? -1.f : 1.f);
      if (kind == 5) x = float(1 + std::abs(normal(rng)));
    }
  if (kind == 4)  // cancellation: the second half of k takes away most of what the first half adds
    for (auto& row : p.a)
      for (int k = 8; k < 16; ++k) row[k] = rng() % 4 ? uint16_t(row[k - 8] ^ 0x8000) : row[k];
}

template <class F>
void compare_with_second_statement(const shim::TensorCore& model) {
  std::mt19937 rng(1);
  Product p;
  for (int kind = 0; kind < 6; ++kind)
    for (int trial = 0; trial < 50; ++trial) {
      fill<F>(p, kind, rng);
      run<F>(p);
      bool same = true, never_away = true;
      for (int m = 0; m < 16; ++m)
        for (int n = 0; n < 8; ++n) {
          same &= identical(p.d[m][n], expected<F>(model, p, m, n));
          long double exact = p.c[m][n];
          for (int k = 0; k < 16; ++k) exact += (long double)(number<F>(p.a[m][k])) * number<F>(p.b[n][k]);
          never_away &= (long double)(p.d[m][n]) <= exact;
        }
      check(same, model.name, "differs from the second statement");
      if (kind == 5) check(never_away, model.name, "positive numbers add up to more than their sum");
    }
}

// d of row 0, column 0, where only they are not zero.
template <class F>
float element(float c, const std::vector<double>& a, const std::vector<double>& b) {
  Product p{};
  for (size_t k = 0; k < a.size(); ++k) p.a[0][k] = bits_of<F>(a[k]), p.b[0][k] = bits_of<F>(b[k]);
  p.c[0][0] = c;
  run<F>(p);
  return p.d[0][0];
}

template <class F>
void known_facts(const shim::TensorCore& model) {
  const auto fact = [&](bool ok, const char* what) { check(ok, model.name, what); };
  fact(element<F>(5, {1, 2, 3}, {4, 5, -6}) == 1, "small integers are exact");
  fact(element<F>(1, {0x1p-12}, {0x1p-12}) == 1, "less than an ulp is cut off");
  fact(element<F>(-1, {-0x1p-12}, {0x1p-12}) == -1, "toward zero for negative numbers, too");
  fact(element<F>(1, {-0x1p-12}, {0x1p-12}) == 1 - 0x1p-24f, "a small subtrahend counts");
  // 16 products of 2^-25 beside 1: below the guard bit of one model, at that of the other
  const std::vector<double> tiny(16, 0x1p-12), tinier(16, 0x1p-13);
  fact(element<F>(1, tiny, tinier) == (model.block == 16 ? 1 + 0x1p-21f : 1.f), "the last guard bit");
  float sum = 0;
  for (int i = 0; i < 4096; ++i) sum = element<F>(sum, {1. / 3}, {1. / 3});
  const double third = number<F>(bits_of<F>(1. / 3)), shrink = 1 - sum / (4096 * third * third);
  fact(shrink > 1e-6 && shrink < 4096 * 0x1p-23, "a long sum shrinks");

  fact(std::isnan(element<F>(0, {INFINITY}, {0})) && std::isnan(element<F>(0, {0}, {INFINITY})),
       "inf * 0 is not a number");
  fact(std::isnan(element<F>(-INFINITY, {INFINITY}, {1})), "inf - inf is not a number");
  fact(std::isnan(element<F>(0, {NAN}, {1})) && std::isnan(element<F>(NAN, {}, {})), "NaN stays NaN");
  fact(element<F>(-3e38f, {INFINITY}, {2}) == INFINITY && element<F>(-INFINITY, {1}, {1}) == -INFINITY,
       "inf + x is inf");
  fact(element<F>(0x1.fffffep127f, {1}, {1}) == 0x1.fffffep127f, "beside the largest number 1 is nothing");
  fact(element<F>(0x1.fffffep127f, {0x1p15, 0x1p15}, {0x1p15, 0x1p15}) == 0x1.fffffep127f, "nor is 2^31");
  fact(!std::signbit(element<F>(-0.f, {}, {})) && !std::signbit(element<F>(-1, {1}, {1})),
       "zero is positive");
  fact(element<F>(0x1p-149f, {}, {}) == 0x1p-149f, "subnormal accumulators are kept");
  fact(element<F>(0, {0x1p-14}, {0x1p-14}) == 0x1p-28f, "products of small numbers");
}
void formats_facts(const shim::TensorCore& model) {
  const auto fact = [&](bool ok, const char* what) { check(ok, model.name, what); };
  fact(element<gpu::F16>(0, {0x1p-24}, {0x1p-24}) == 0x1p-48f, "subnormal fp16");
  fact(element<gpu::Bf16>(0, {0x1p-133}, {0x1p10}) == 0x1p-123f, "subnormal bf16");
  fact(element<gpu::Bf16>(0, {0x1p127}, {2}) == INFINITY, "overflow");
  fact(element<gpu::Bf16>(0, {0x1p-100}, {0x1p-49}) == 0x1p-149f, "a subnormal result");
  fact(element<gpu::Bf16>(0, {0x1.8p-100}, {0x1p-49}) == 0x1p-149f, "a subnormal result is cut off, too");
  fact(element<gpu::Bf16>(0, {0x1p-100}, {0x1p-100}) == 0, "less than the smallest number");
}

}  // namespace

int main() {
  for (const shim::TensorCore& model : shim::kTensorCores) {
    shim::tensor_core() = model;
    compare_with_second_statement<gpu::Bf16>(model), compare_with_second_statement<gpu::F16>(model);
    known_facts<gpu::Bf16>(model), known_facts<gpu::F16>(model);
    formats_facts(model);
  }
  puts(failures ? "FAIL" : "PASS");
  return failures != 0;
}
