// Runs the four operators on one case and compares the results with explicit sums over pairs in double.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <numeric>
#include <random>
#include <stdexcept>

#include "cases.h"
#include "gpu_ops.cuh"
#include "plan.h"

namespace emulation {

using namespace pysupcon::cuda;

struct Finding {
  std::string what;
  double error, tolerance;
};

// A device buffer that the host can read: exact size, filled with 0xff (NaN, -1), 256-byte aligned.
struct Buffer {
  unsigned char* data = nullptr;
  size_t bytes;
  explicit Buffer(size_t n) : bytes(n) {
    void* p = nullptr;
    if (cudaMallocManaged(&p, n ? n : 1) != cudaSuccess) throw std::bad_alloc();
    data = static_cast<unsigned char*>(p);
    memset(data, 0xff, n);
  }
  Buffer(const Buffer&) = delete;
  ~Buffer() { cudaFree(data); }
};
using Shared = std::shared_ptr<Buffer>;

inline size_t size_of(Dtype t) { return t == Dtype::f64 ? 8 : t == Dtype::f32 ? 4 : 2; }
inline void put(Buffer& b, Dtype t, size_t i, double v) {
  if (t == Dtype::f64) reinterpret_cast<double*>(b.data)[i] = v;
  if (t == Dtype::f32) reinterpret_cast<float*>(b.data)[i] = float(v);
  if (t == Dtype::bf16) reinterpret_cast<__nv_bfloat16*>(b.data)[i] = __float2bfloat16(float(v));
  if (t == Dtype::f16) reinterpret_cast<__half*>(b.data)[i] = __float2half(float(v));
}
inline double get(const Buffer& b, Dtype t, size_t i) {
  if (t == Dtype::f64) return reinterpret_cast<const double*>(b.data)[i];
  if (t == Dtype::f32) return reinterpret_cast<const float*>(b.data)[i];
  if (t == Dtype::bf16) return __bfloat162float(reinterpret_cast<const __nv_bfloat16*>(b.data)[i]);
  return __half2float(reinterpret_cast<const __half*>(b.data)[i]);
}

// The emulation models the tensor cores of two devices. Others, and the fast exponential, can have other
// errors.
#ifdef CUDA_HOST_SHIM
constexpr double kSlack = 1;
#else
constexpr double kSlack = 4;
#endif

using Vector = std::vector<double>;

struct Side {
  int count = 0;
  Vector x;  // [count, width] as the kernels see it: rounded to the dtype, and to bf16 for one part of fp32
  std::vector<int64_t> labels, instances, order;
  Shared data, labels_buffer, instances_buffer, order_buffer;
  Vector n, p, u, v, w, a;  // statistics; upstream gradients of n, p, positive_sum, instance_sum
  Vector log_weights;       // of the rows as candidates of others
  Shared bn, bp, bu, bv, bw, ba, log_weights_buffer;
};

class Run {
 public:
  explicit Run(const Case& c)
      : c_(c),
        rng_(unsigned(std::hash<std::string>()(c.name))),
        gradient_(c.dtype == Dtype::f64 ? Dtype::f64 : Dtype::f32) {
    a_ = make_side(c.anchors);
    if (c.form != Form::one_set) {
      b_ = make_side(c.candidates);
      std::vector<int64_t> self(size_t(c.anchors), -1);
      for (int i = 0; i < c.anchors && i < c.candidates; ++i)
        if (c.form == Form::own_rows || i % 3) {  // the anchor is candidate `at`, with its own label
          const int at = (i * 37 + 5) % c.candidates;
          bool taken = false;
          for (int k = 0; k < i; ++k) taken |= self[size_t(k)] == at;
          if (taken) continue;
          self[size_t(i)] = at;
          b_.labels[size_t(at)] = a_.labels[size_t(i)];
          b_.instances[size_t(at)] = a_.instances[size_t(i)];
          for (int d = 0; d < c.width; ++d) b_.x[size_t(at * c.width + d)] = a_.x[size_t(i * c.width + d)];
          a_.log_weights[size_t(i)] = b_.log_weights[size_t(at)];
        }
      finish_side(b_);
      self_ = self;
      self_buffer_ = integers(self);
    }
    finish_side(a_);
    scale_ = 1 / c.temperature;
    scale_buffer_ = stats({scale_});
  }

  std::vector<Finding> all() {
    const Side& cols = columns();
    const int m = a_.count, n = cols.count, w = c_.width;
    // similarities and the sets N_i, P_i and A_i
    Vector s(size_t(m) * size_t(n));
    for (int i = 0; i < m; ++i)
      for (int j = 0; j < n; ++j) {
        double dot = 0;
        for (int d = 0; d < w; ++d) dot += a_.x[size_t(i * w + d)] * cols.x[size_t(j * w + d)];
        s[size_t(i * n + j)] = scale_ * dot;
      }
    const auto counts = [&](int i, int j) {
      return c_.form == Form::one_set ? i != j : self_[size_t(i)] != j;
    };
    const auto same = [&](int i, int j) { return a_.labels[size_t(i)] == cols.labels[size_t(j)]; };
    const auto instance = [&](int i, int j) {
      return c_.instances && same(i, j) && a_.instances[size_t(i)] == cols.instances[size_t(j)];
    };

    // pair_stats; the sums are divided by the number of positives
    Vector want_n(size_t(m), -INFINITY), want_p = want_n, mean(size_t(m), 0.), part(size_t(m), 0.),
                                         positives(size_t(m), 0.);
    for (int i = 0; i < m; ++i)
      for (int j = 0; j < n; ++j) {
        if (!counts(i, j) || !(same(i, j) ? c_.positives : c_.negatives)) continue;
        const double sim = s[size_t(i * n + j)];
        double& to = same(i, j) ? want_p[size_t(i)] : want_n[size_t(i)];
        to = log_add(to, sim + cols.log_weights[size_t(j)]);
        if (!same(i, j)) continue;
        positives[size_t(i)] += 1, mean[size_t(i)] += sim, part[size_t(i)] += instance(i, j) ? sim : 0.;
      }
    Problem p = problem(Operation::pair_stats);
    Buffer out_n(size_t(m) * 8), out_p(size_t(m) * 8), out_sum(size_t(m) * 8), out_part(size_t(m) * 8);
    p.out_n = doubles(out_n), p.out_p = doubles(out_p);
    p.out_positive_sum = doubles(out_sum), p.out_instance_sum = doubles(out_part);
    run(p);
    for (int i = 0; i < m; ++i) {
      const double count = std::max(positives[size_t(i)], 1.);
      mean[size_t(i)] /= count, part[size_t(i)] /= count;
      p.out_positive_sum[i] /= count, p.out_instance_sum[i] /= count;
    }
    compare("pair_stats n", out_n, Dtype::f64, want_n, stat_tolerance(), false);
    compare("pair_stats p", out_p, Dtype::f64, want_p, stat_tolerance(), false);
    compare("pair_stats positive_sum", out_sum, Dtype::f64, mean, stat_tolerance(), false);
    compare("pair_stats instance_sum", out_part, Dtype::f64, part, stat_tolerance(), false);

    // pair_stats_backward
    upstream(a_, want_n, want_p, c_.other_gradients);
    if (c_.form == Form::own_rows)
      upstream(b_, own_statistics(true), own_statistics(false), c_.other_gradients);
    // dL/ds of anchor i's pair with a candidate of this weight
    const auto weight = [&](const Side& side, int i, double sim, double log_weight, bool is_same,
                            bool is_instance) {
      const double ref = is_same ? side.p[size_t(i)] : side.n[size_t(i)];
      double g = 0;
      if (ref > -INFINITY) g = (is_same ? side.v : side.u)[size_t(i)] * std::exp(sim + log_weight - ref);
      const bool sums = c_.sums && c_.positives;
      if (is_same && sums) g += side.w[size_t(i)];
      return is_instance && sums ? g + side.a[size_t(i)] : g;
    };
    backward(Operation::pair_stats_backward, s, counts, same, instance, weight);

    // positive_softplus, with the complete n even if pair_stats did not compute it
    epsilon_ = c_.epsilon;
    Vector total(size_t(m), 0.), all_n(size_t(m), -INFINITY);
    for (int i = 0; i < m; ++i)
      for (int j = 0; j < n; ++j)
        if (counts(i, j) && !same(i, j))
          all_n[size_t(i)] = log_add(all_n[size_t(i)], s[size_t(i * n + j)] + cols.log_weights[size_t(j)]);
    upstream(a_, all_n, all_n);
    if (c_.form == Form::own_rows) upstream(b_, own_statistics(true), own_statistics(true));
    for (int i = 0; i < m; ++i)
      for (int j = 0; j < n; ++j)
        if (counts(i, j) && same(i, j))
          total[size_t(i)] +=
              log_of_sum(a_.n[size_t(i)] + epsilon_ - s[size_t(i * n + j)], cols.log_weights[size_t(j)]);
    p = problem(Operation::positive_softplus);
    Buffer out(size_t(m) * 8);
    p.n = doubles(*a_.bn), p.out_n = doubles(out);
    run(p);
    compare("positive_softplus", out, Dtype::f64, total, stat_tolerance(), true);
    const auto slope = [&](const Side& side, int i, double sim, double log_weight, bool is_same, bool) {
      if (!is_same || side.n[size_t(i)] == -INFINITY) return 0.;
      return -side.u[size_t(i)] / (1 + std::exp(sim + log_weight - side.n[size_t(i)] - epsilon_));
    };
    backward(Operation::positive_softplus_backward, s, counts, same, instance, slope);
    return findings_;
  }

 protected:
  const Case& c_;
  std::mt19937 rng_;
  Dtype gradient_;  // dtype of the gradients; statistics are double
  Side a_, b_;
  std::vector<int64_t> self_;
  Shared self_buffer_, scale_buffer_;
  double scale_ = 0, epsilon_ = 0;
  std::vector<Finding> findings_;

  size_t gradient_size() const { return size_of(gradient_); }
  static double* doubles(Buffer& b) { return reinterpret_cast<double*>(b.data); }
  static double log_add(double a, double b) {
    const double t = std::max(a, b);
    return t == -INFINITY ? t : t + std::log(std::exp(a - t) + std::exp(b - t));
  }
  // log(e^x + e^y); a weight of 0, y = -inf, adds nothing where x is -inf, too
  static double log_of_sum(double x, double y) {
    return x == -INFINITY && y == -INFINITY ? 0 : log_add(x, y);
  }
  const Side& columns() const { return c_.form == Form::one_set ? a_ : b_; }

  Shared integers(const std::vector<int64_t>& v) {
    auto b = std::make_shared<Buffer>(v.size() * 8);
    if (!v.empty()) memcpy(b->data, v.data(), v.size() * 8);
    return b;
  }
  Shared stats(const Vector& v) {
    auto b = std::make_shared<Buffer>(v.size() * 8);
    for (size_t i = 0; i < v.size(); ++i) put(*b, Dtype::f64, i, v[i]);
    return b;
  }
  Side make_side(int count) {
    Side s;
    s.count = count;
    std::normal_distribution<double> normal;
    const auto normalised = [](Vector row) {
      double square = 0;
      for (double v : row) square += v * v;
      for (double& v : row) v /= std::sqrt(square);
      return row;
    };
    Vector centre(size_t(c_.width));
    for (int i = 0; i < count; ++i) {
      Vector row(size_t(c_.width));
      for (double& v : row) v = normal(rng_) + c_.mean;
      if (c_.copies && i % c_.copies == 0) centre = normalised(row);
      if (c_.copies)
        for (size_t d = 0; d < row.size(); ++d) row[d] = centre[d] + 0.01 * normal(rng_);
      for (double v : normalised(row)) s.x.push_back(v * c_.row_norm);
      if (c_.copies) {
        s.labels.push_back(i / c_.copies);
        continue;
      }
      // the first class has half of the rows; some labels are large or negative
      const int k = i % 2 && c_.classes < count ? 0 : i % c_.classes;
      s.labels.push_back(int64_t(k) * 10000000019 - 3);
    }
    if (!c_.copies) std::shuffle(s.labels.begin(), s.labels.end(), rng_);
    for (int i = 0; i < count; ++i)
      s.instances.push_back(c_.instances ? int64_t(rng_() % unsigned(count / 6 + 1)) * 7000000001 - 5 : i);
    for (int i = 0; i < count; ++i) {
      s.log_weights.push_back(0);
      if (c_.weights == 0) continue;
      s.log_weights.back() =
          std::log(10.) * std::uniform_real_distribution<double>(-c_.weights, c_.weights)(rng_);
      if (c_.weightless && rng_() % unsigned(c_.weightless) == 0) s.log_weights.back() = -INFINITY;
    }
    return s;
  }
  void finish_side(Side& s) {
    const size_t stride = size_t(c_.width + c_.padding);
    s.order.resize(size_t(s.count));
    std::iota(s.order.begin(), s.order.end(), 0);
    const auto key = [&](int64_t i) {
      return std::pair(s.labels[size_t(i)], c_.instances ? s.instances[size_t(i)] : 0);
    };
    std::stable_sort(s.order.begin(), s.order.end(), [&](int64_t i, int64_t j) { return key(i) < key(j); });
    s.data = std::make_shared<Buffer>(
        s.count ? (stride * size_t(s.count) - size_t(c_.padding)) * size_of(c_.dtype) : 0);
    for (int i = 0; i < s.count; ++i)
      for (int d = 0; d < c_.width; ++d) {
        double& x = s.x[size_t(i * c_.width + d)];
        const size_t at = size_t(i) * stride + size_t(d);
        put(*s.data, c_.dtype, at, x);
        x = get(*s.data, c_.dtype, at);
      }
    s.labels_buffer = integers(s.labels), s.order_buffer = integers(s.order);
    s.instances_buffer = integers(s.instances), s.log_weights_buffer = stats(s.log_weights);
  }
  // With one part of fp32, the pair operators round the rows to bf16.
  void upstream(Side& s, const Vector& n, const Vector& p, double others = 1) {
    std::normal_distribution<double> normal;
    s.n = n, s.p = p;
    for (Vector* v : {&s.u, &s.v, &s.w, &s.a}) v->clear();
    const auto draw = [&] {  // if lengths are compared: of equal sign and size, so that no rows cancel
      const double x = normal(rng_);
      return 1e-3 * (c_.length_bar > 0 ? 1 + std::abs(x) / 4 : x);
    };
    for (int i = 0; i < s.count; ++i) {
      s.u.push_back(i % 5 ? others * draw() : 0.);
      s.v.push_back(others * draw());
      s.w.push_back(draw());
      s.a.push_back(others * draw());
    }
    s.bn = stats(s.n), s.bp = stats(s.p), s.bu = stats(s.u), s.bv = stats(s.v);
    s.bw = stats(s.w), s.ba = stats(s.a);
  }
  // The statistics of the candidates as anchors, among all candidates and the anchors that are none of them.
  Vector own_statistics(bool negatives) const {
    Vector out(size_t(b_.count), -INFINITY);
    for (int i = 0; i < b_.count; ++i) {
      const auto add = [&](const Side& side, int j) {
        double dot = 0;
        for (int d = 0; d < c_.width; ++d)
          dot += b_.x[size_t(i * c_.width + d)] * side.x[size_t(j * c_.width + d)];
        if ((b_.labels[size_t(i)] != side.labels[size_t(j)]) == negatives)
          out[size_t(i)] = log_add(out[size_t(i)], scale_ * dot + side.log_weights[size_t(j)]);
      };
      for (int j = 0; j < b_.count; ++j)
        if (i != j) add(b_, j);
      for (int j = 0; j < a_.count; ++j)
        if (self_[size_t(j)] < 0) add(a_, j);
    }
    if (negatives && !c_.negatives && epsilon_ == 0) out.assign(out.size(), -INFINITY);
    return out;
  }

  Rows rows(const Side& s) const {
    return {s.data->data,
            s.count,
            c_.width + c_.padding,
            reinterpret_cast<const int64_t*>(s.labels_buffer->data),
            reinterpret_cast<const int64_t*>(s.order_buffer->data),
            c_.instances ? reinterpret_cast<const int64_t*>(s.instances_buffer->data) : nullptr};
  }
  Problem problem(Operation op) const {
    Problem p{};
    p.operation = op, p.dtype = c_.dtype, p.parts = c_.parts, p.multiprocessors = c_.multiprocessors;
    p.shared_memory = c_.shared_memory, p.triangular_rows = c_.triangular_rows;
    p.width = c_.width, p.anchors = rows(a_), p.candidates = rows(columns());
    p.one_set = c_.form == Form::one_set;
    if (!p.one_set) p.self_index = reinterpret_cast<const int64_t*>(self_buffer_->data);
    if (c_.weights > 0) {
      if (p.one_set || (is_backward(op) && c_.form == Form::own_rows))
        p.log_weights = doubles(*a_.log_weights_buffer);
      if (!p.one_set) p.candidate_log_weights = doubles(*b_.log_weights_buffer);
    }
    p.scale = doubles(*scale_buffer_), p.epsilon = epsilon_, p.negatives = c_.negatives,
    p.positives = c_.positives;
    return p;
  }
  static void run(Problem& p) {
    const Buffer workspace(size_t(pysupcon_cuda_workspace_bytes(&p)));
    p.workspace = workspace.data;
    if (const char* error = pysupcon_cuda_run(&p)) throw std::runtime_error(error);
    const cudaError_t error = cudaDeviceSynchronize();
    if (error != cudaSuccess) throw std::runtime_error(cudaGetErrorString(error));
  }

  template <class Counts, class Same, class Instance, class Weight>
  void backward(Operation op, const Vector& s, Counts counts, Same same, Instance instance, Weight weight) {
    const Side& cols = columns();
    const int m = a_.count, n = cols.count, w = c_.width;
    const bool stats_op = op == Operation::pair_stats_backward;
    Problem p = problem(op);
    Buffer gx(size_t(m * w) * gradient_size()), gc(size_t(n * w) * gradient_size()), gn(size_t(m) * 8);
    p.n = doubles(*a_.bn), p.grad_n = doubles(*a_.bu), p.grad_x = gx.data;
    if (stats_op) p.p = doubles(*a_.bp), p.grad_p = doubles(*a_.bv);
    if (stats_op && c_.sums) p.grad_positive_sum = doubles(*a_.bw), p.grad_instance_sum = doubles(*a_.ba);
    if (c_.form == Form::own_rows) {
      p.candidate_n = doubles(*b_.bn), p.candidate_grad_n = doubles(*b_.bu);
      if (stats_op) p.candidate_p = doubles(*b_.bp), p.candidate_grad_p = doubles(*b_.bv);
      if (stats_op && c_.sums)
        p.candidate_grad_positive_sum = doubles(*b_.bw), p.candidate_grad_instance_sum = doubles(*b_.ba);
    }
    const bool of_candidates = c_.form == Form::candidates && c_.of_candidates;
    if (of_candidates) p.grad_candidates = gc.data;
    if (!stats_op) p.out_grad_n = doubles(gn);
    Vector want_x(size_t(m * w), 0.), want_c(size_t(n * w), 0.), want_n(size_t(m), 0.);
    for (int i = 0; i < m; ++i)
      for (int j = 0; j < n; ++j) {
        if (!counts(i, j)) continue;
        const double sim = s[size_t(i * n + j)];
        const auto of = [&](const Side& side, int k, double log_weight) {
          return weight(side, k, sim, log_weight, same(i, j), instance(i, j));
        };
        const double g = of(a_, i, cols.log_weights[size_t(j)]);
        double to_x = g;
        if (c_.form == Form::one_set) to_x += of(a_, j, a_.log_weights[size_t(i)]);
        if (c_.form == Form::own_rows) to_x += of(b_, j, a_.log_weights[size_t(i)]);
        want_n[size_t(i)] -= g;
        for (int d = 0; d < w; ++d) {
          want_x[size_t(i * w + d)] += scale_ * to_x * cols.x[size_t(j * w + d)];
          want_c[size_t(j * w + d)] += scale_ * g * a_.x[size_t(i * w + d)];
        }
      }
    // Gradients are added to existing values, here to smaller ones.
    const double start_x = small_beside(want_x), start_c = small_beside(want_c);
    for (size_t i = 0; i < want_x.size(); ++i) put(gx, gradient_, i, start_x);
    for (size_t i = 0; i < want_c.size(); ++i) put(gc, gradient_, i, start_c);
    run(p);
    for (size_t i = 0; i < want_x.size(); ++i) put(gx, gradient_, i, get(gx, gradient_, i) - start_x);
    for (size_t i = 0; i < want_c.size(); ++i) put(gc, gradient_, i, get(gc, gradient_, i) - start_c);

    const std::string name = stats_op ? "pair_stats_backward" : "positive_softplus_backward";
    compare(name + " x", gx, gradient_, want_x, gradient_tolerance(), true);
    if (c_.length_bar > 0) compare_length(name + " x", gx, want_x);
    if (of_candidates) compare(name + " candidates", gc, gradient_, want_c, gradient_tolerance(), true);
    if (!stats_op) compare(name + " n", gn, Dtype::f64, want_n, stat_tolerance(), true);
  }

  // A power of two.
  static double small_beside(const Vector& v) {
    double square = 0;
    for (const double x : v) square += x * x;
    return square > 0 ? std::exp2(std::floor(std::log2(square / double(v.size())) / 2) - 2) : 0x1p-8;
  }

  // Bound of a similarity, of a log weight and of their sum.
  double largest() const { return c_.row_norm * c_.row_norm / c_.temperature + std::log(10.) * c_.weights; }
  // Statistics: absolute error. Similarities are at most row_norm^2 / temperature; fp32 represents them to a
  // relative error of 2^-24.
  double stat_tolerance() const {
    const double top = largest();
    if (c_.dtype == Dtype::f64) return 1e-12 * std::max(1., top);
    if (c_.dtype == Dtype::f32 && c_.parts == 1) return 4e-3 * top;  // rows are rounded to 2^-8
    return (c_.parts == 2 ? 3e-5 : 5e-7) * std::max(4., top);
  }
  // Gradients: norm of the error / norm of the gradient. The exponential amplifies errors of similarities.
  double gradient_tolerance() const {
    const double top = std::max(4., largest());
    if (c_.dtype == Dtype::f64) return 1e-12 * top;
    if (c_.dtype == Dtype::f32 && c_.parts == 1) return 6e-3 * top;
    if (c_.dtype == Dtype::f32) return (c_.parts == 2 ? 3e-5 : 4e-7) * top;
    return (c_.dtype == Dtype::bf16 ? 5e-3 : 1e-3) + 4e-7 * top;
  }

  void compare(const std::string& what, const Buffer& got, Dtype t, const Vector& want, double tolerance,
               bool norm) {
    if (c_.dtype != Dtype::f64) tolerance *= kSlack;
    double worst = 0, square = 0, error = 0, top = 0;
    for (size_t i = 0; i < want.size(); ++i) {
      const double g = get(got, t, i), e = g == want[i] ? 0 : std::abs(g - want[i]);
      if (!(e <= worst)) worst = e;
      square += want[i] * want[i], error += e * e, top = std::max(top, std::abs(want[i]));
    }
    if (!norm) {
      findings_.push_back({what, worst, tolerance});
      return;
    }
    const double size = std::sqrt(square);
    findings_.push_back({what + " (norm)", size > 0 ? std::sqrt(error) / size : std::sqrt(error), tolerance});
    findings_.push_back({what + " (worst)", top > 0 ? worst / top : worst, 4 * tolerance});
  }
  // The error along the gradient, in which the rounding of the weights averages out but truncation does not.
  void compare_length(const std::string& what, const Buffer& got, const Vector& want) {
    double square = 0, along = 0;
    for (size_t i = 0; i < want.size(); ++i)
      square += want[i] * want[i], along += (get(got, gradient_, i) - want[i]) * want[i];
    findings_.push_back({what + " (length)", std::abs(along) / square, c_.length_bar});
  }
};

}  // namespace emulation
