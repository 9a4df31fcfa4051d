// SupCon of nearly equal views: p_i and the mean of s over P_i are equal in nearly all digits, and the
// gradient is a small difference of large parts. Compares the error of the kernels against float64 with that
// of a dense evaluation in float32, which subtracts similarities before it exponentiates them.
#pragma once
#include "oracle.h"

namespace emulation {

class ConvergedRun : public Run {
 public:
  using Run::Run;

  std::vector<Finding> all() {
    const Result right = dense<double>(), in_float = dense<float>(), mine = kernels();
    const double rows = a_.count,
                 unit = 1 / c_.temperature / std::sqrt(rows);  // size of the parts that cancel
    const bool bf16 = c_.dtype == Dtype::bf16, f16 = c_.dtype == Dtype::f16, f64 = c_.dtype == Dtype::f64;
    // Errors of 16-bit rows: in the gradient, the rounding of the negatives' weights, unless the temperature
    // is so low that they vanish; in the loss without log |P|, the rounding of similarities that are summed
    // inside the tensor core. The remaining slack is for cases in which float32 happens to be exact.
    const bool cold = c_.temperature < 0.05;
    const double of_weights = cold ? 0 : bf16 ? 0x1p-9 : f16 ? 0x1p-12 : 0;
    const double of_sums = bf16 || f16 ? 0x1p-20 : 0x1p-26, least = f64 ? 1e-13 : 1e-9;
    const double size = distance(right, Result{{}, Vector(right.gradient.size())});
    const double gap = *std::max_element(right.losses.begin(), right.losses.end()) - std::log(c_.copies - 1);
    const auto worst = [&](const Result& result) {
      double error = 0;
      for (size_t i = 0; i < right.losses.size(); ++i)
        error = std::max(error, std::abs(result.losses[i] - right.losses[i]));
      return error;
    };
    findings_.push_back({"an anchor's loss", worst(mine),
                         (f64 ? 0 : c_.loss_bar * worst(in_float) + of_sums / c_.temperature * gap) + least});
    findings_.push_back(
        {"tangential gradient", distance(mine, right) / unit,
         (f64 ? 0 : c_.gradient_bar * distance(in_float, right) + of_weights * size) / unit + least});
    return findings_;
  }

 private:
  struct Result {
    Vector losses;    // [rows]
    Vector gradient;  // [rows, width] of the mean loss
  };

  bool same(int i, int j) const { return a_.labels[size_t(i)] == a_.labels[size_t(j)]; }

  // Norm of the difference without the components along the rows.
  double distance(const Result& a, const Result& b) const {
    const int w = c_.width;
    double square = 0;
    for (int i = 0; i < a_.count; ++i) {
      const double* x = &a_.x[size_t(i * w)];
      double along = 0, size = 0;
      for (int d = 0; d < w; ++d) {
        along += (a.gradient[size_t(i * w + d)] - b.gradient[size_t(i * w + d)]) * x[d];
        size += x[d] * x[d];
      }
      for (int d = 0; d < w; ++d) {
        const double e = a.gradient[size_t(i * w + d)] - b.gradient[size_t(i * w + d)] - along / size * x[d];
        square += e * e;
      }
    }
    return std::sqrt(square);
  }

  // x . y, summed in eight parts as a vector unit does.
  template <class T>
  static T dot(const double* x, const double* y, int width) {
    T sum[8] = {};
    for (int d = 0; d < width; ++d) sum[d % 8] = std::fma(T(x[d]), T(y[d]), sum[d % 8]);
    for (int half = 4; half; half /= 2)
      for (int k = 0; k < half; ++k) sum[k] += sum[k + half];
    return sum[0];
  }

  template <class T>
  Result dense() const {
    const int m = a_.count, w = c_.width;
    const T scale = T(scale_);
    std::vector<T> g(size_t(m) * size_t(m));
    Result out;
    for (int i = 0; i < m; ++i) {
      std::vector<T> s(size_t(m), 0);
      T top = -INFINITY, total = 0, positives = 0;
      int count = 0;
      for (int j = 0; j < m; ++j) {
        s[size_t(j)] = dot<T>(&a_.x[size_t(i * w)], &a_.x[size_t(j * w)], w) * scale;
        if (j != i) top = std::max(top, s[size_t(j)]);
      }
      for (int j = 0; j < m; ++j) {
        if (j == i) continue;
        total += std::exp(s[size_t(j)] - top);
        if (same(i, j)) positives += s[size_t(j)] - top, ++count;
      }
      const T log_total = std::log(total);
      out.losses.push_back(double(log_total - positives / T(count)));
      for (int j = 0; j < m; ++j)
        if (j != i)
          g[size_t(i * m + j)] =
              std::exp(s[size_t(j)] - top - log_total) - (same(i, j) ? 1 / T(count) : T(0));
    }
    for (int i = 0; i < m; ++i) {
      std::vector<T> sum(size_t(w), 0);
      for (int j = 0; j < m; ++j)
        for (int d = 0; d < w; ++d)
          sum[size_t(d)] = std::fma(g[size_t(i * m + j)] + g[size_t(j * m + i)], T(a_.x[size_t(j * w + d)]),
                                    sum[size_t(d)]);
      for (T v : sum) out.gradient.push_back(double(v * scale / T(m)));
    }
    return out;
  }

  // SupCon from the operators; the arithmetic between them is in double.
  Result kernels() {
    const int m = a_.count, w = c_.width;
    Problem p = problem(Operation::pair_stats);
    Buffer n(size_t(m) * 8), log_sum(size_t(m) * 8), sum(size_t(m) * 8), instance_sum(size_t(m) * 8);
    p.out_n = doubles(n), p.out_p = doubles(log_sum);
    p.out_positive_sum = doubles(sum), p.out_instance_sum = doubles(instance_sum);
    run(p);
    Result out;
    Vector u, v, of_sum;
    const double positives = c_.copies - 1;
    for (int i = 0; i < m; ++i) {
      const double gap = doubles(n)[i] - doubles(log_sum)[i], share = 1 / (1 + std::exp(-gap));
      out.losses.push_back(std::log1p(std::exp(gap)) + (doubles(log_sum)[i] - doubles(sum)[i] / positives));
      u.push_back(share / m), v.push_back((1 - share) / m), of_sum.push_back(-1 / positives / m);
    }
    p = problem(Operation::pair_stats_backward);
    Buffer gradient(size_t(m * w) * gradient_size());
    memset(gradient.data, 0, gradient.bytes);
    const Shared grad_n = stats(u), grad_p = stats(v), grad_sum = stats(of_sum);
    p.n = doubles(n), p.p = doubles(log_sum), p.grad_n = doubles(*grad_n), p.grad_p = doubles(*grad_p);
    p.grad_positive_sum = doubles(*grad_sum), p.grad_x = gradient.data;
    run(p);
    for (int i = 0; i < m * w; ++i) out.gradient.push_back(get(gradient, gradient_, size_t(i)));
    return out;
  }
};

}  // namespace emulation
