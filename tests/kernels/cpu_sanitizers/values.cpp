// Prints statistics and gradients of every entry point, one number a line, to compare compilers and
// processors.
#include <cstdint>
#include <cstdio>
#include <vector>

#include "cpu/kernels.h"
#include "rows.h"

using namespace pysupcon::cpu;

namespace {

void run_here(int64_t count, void* context, void (*body)(void*, int64_t, int64_t)) {
  body(context, 0, count);
}
int64_t one() { return 1; }
constexpr Threads kThreads{one, run_here};

void print(const char* name, const std::vector<double>& values) {
  for (const double v : values) std::printf("%s %.17g\n", name, v);
}

void run(const char* name, Type type, int64_t rows, int64_t dim, double size) {
  const Rows a(type, rows, dim, 5, size, 1);
  Problem q;
  q.type = type, q.dim = dim, q.scale = 2, q.self = true;
  q.anchors = q.candidates = a.side(false);
  std::vector<double> n(rows), p(rows), positive(rows), u(rows), total(rows), grad_n(rows);
  for (int64_t i = 0; i < rows; ++i) u[i] = 1. / double(1 + i % 3);
  const auto gradient = [&](const auto& add) {
    std::vector<double> wide(rows * dim);
    std::vector<float> narrow(rows * dim);
    add(Gradients{type == Type::f64 ? static_cast<void*>(wide.data()) : narrow.data(), nullptr});
    if (type != Type::f64) wide.assign(narrow.begin(), narrow.end());
    print(name, wide);
  };
  pair_stats(q, kThreads, {n.data(), p.data(), positive.data(), nullptr});
  for (const auto* values : {&n, &p, &positive}) print(name, *values);
  gradient([&](const Gradients& g) {
    pair_stats_backward(q, kThreads, {n.data(), p.data(), u.data(), u.data(), u.data(), nullptr}, {}, g);
  });
  q.negatives = false;
  positive_softplus(q, kThreads, n.data(), 0.25, total.data());
  print(name, total);
  gradient([&](const Gradients& g) {
    positive_softplus_backward(q, kThreads, {n.data(), u.data()}, {}, 0.25, g, grad_n.data());
  });
  print(name, grad_n);
}

}  // namespace

int main() {
  for (const int64_t dim : {7, 64})
    for (const double size : {0.1, 3.}) {  // one reference for all, running maxima
      run("f32", Type::f32, 150, dim, size);
      run("f64", Type::f64, 150, dim, size);
      run("bf16", Type::bf16, 150, dim, size);
      run("f16", Type::f16, 150, dim, size);
    }
}
