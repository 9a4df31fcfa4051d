// Tensors to pointers for the CPU kernels, and their registration with the dispatcher. No mathematics here.
// Contracts of the operators: pysupcon/_ops.py.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/sort.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <optional>
#include <tuple>
#include <vector>

#include "cpu/kernels.h"

namespace pysupcon {
namespace {

using at::Tensor;
using Maybe = std::optional<Tensor>;

void run_parallel(int64_t count, void* context, void (*body)(void*, int64_t, int64_t)) {
  at::parallel_for(0, count, 1, [&](int64_t first, int64_t last) { body(context, first, last); });
}
constexpr cpu::Threads kThreads{run_parallel};

// ------------------------------------------------------------------------------------------------ arguments
void check_vector(const Tensor& t, int64_t size, at::ScalarType type, const char* name) {
  TORCH_CHECK_VALUE(t.dim() == 1 && t.size(0) == size && t.scalar_type() == type && t.device().is_cpu(),
                    "pysupcon: ", name, " must be a CPU tensor of ", type, " and shape [", size, "], got ",
                    t.scalar_type(), " of shape ", t.sizes(), " on ", t.device());
}

cpu::Type type_of(const Tensor& x, const char* name) {
  switch (x.scalar_type()) {
    case at::kFloat:
      return cpu::Type::f32;
    case at::kDouble:
      return cpu::Type::f64;
    case at::kBFloat16:
      return cpu::Type::bf16;
    case at::kHalf:
      return cpu::Type::f16;
    default:
      TORCH_CHECK_VALUE(false, "pysupcon: ", name, " must be float32, float64, bfloat16 or float16, got ",
                        x.scalar_type());
  }
}

// The class numbers of both sides by position: equal labels, equal numbers.
struct ClassNumbers {
  std::vector<int32_t> anchors, candidates;
};
ClassNumbers number_classes(const Tensor& labels, const Tensor& order, const Tensor* other_labels,
                            const Tensor* other_order) {
  const int64_t m = labels.size(0), n = other_labels ? other_labels->size(0) : 0;
  const int64_t *la = labels.const_data_ptr<int64_t>(), *oa = order.const_data_ptr<int64_t>();
  const int64_t* lb = other_labels ? other_labels->const_data_ptr<int64_t>() : nullptr;
  const int64_t* ob = other_order ? other_order->const_data_ptr<int64_t>() : nullptr;
  ClassNumbers c{std::vector<int32_t>(m), std::vector<int32_t>(n)};
  int32_t number = -1;
  int64_t label = 0;
  for (int64_t i = 0, j = 0; i < m || j < n;) {
    const bool first = j >= n || (i < m && la[oa[i]] <= lb[ob[j]]);
    const int64_t next = first ? la[oa[i]] : lb[ob[j]];
    TORCH_CHECK_VALUE(number < 0 || next >= label,
                      "pysupcon: order must be the argsort of labels; it puts label ", next, " after ",
                      label);
    if (number < 0 || next != label) ++number;
    label = next;
    (first ? c.anchors[i++] : c.candidates[j++]) = number;
  }
  return c;
}

struct Rows {
  const Tensor &x, &labels, &order, &scale;
};
struct Candidates {
  const Maybe &rows, &labels, &order, &self_index;
};

// Owns whatever the pointers in `problem` point to.
struct Call {
  Tensor x, labels, order, c, c_labels, c_order;
  ClassNumbers classes;
  std::vector<int32_t> self_position;
  cpu::Problem problem;

  Call(const Rows& a, const Candidates& b) {
    TORCH_CHECK_VALUE(a.x.dim() == 2, "pysupcon: x must be [M, D], got shape ", a.x.sizes());
    TORCH_CHECK_VALUE(a.x.size(0) < std::numeric_limits<int32_t>::max(), "pysupcon: at most 2^31 - 1 rows");
    TORCH_CHECK_VALUE(a.scale.dim() == 0, "pysupcon: scale must have no dimensions, got shape ",
                      a.scale.sizes());
    check_vector(a.labels, a.x.size(0), at::kLong, "labels");
    check_vector(a.order, a.x.size(0), at::kLong, "order");
    x = a.x.stride(1) == 1 ? a.x : a.x.contiguous();
    labels = a.labels.contiguous();
    order = a.order.contiguous();
    problem.type = type_of(x, "x");
    problem.dim = x.size(1);
    problem.scale = a.scale.item().toDouble();
    if (!b.rows) {
      classes = number_classes(labels, order, nullptr, nullptr);
      problem.self = true;
      problem.anchors = problem.candidates = side(x, order, classes.anchors);
      return;
    }
    TORCH_CHECK_VALUE(b.labels && b.order, "pysupcon: candidates need candidate_labels and candidate_order");
    TORCH_CHECK_VALUE(
        b.rows->dim() == 2 && b.rows->size(1) == x.size(1) && b.rows->scalar_type() == x.scalar_type(),
        "pysupcon: candidates must be [N, D] with x's D = ", x.size(1), " and dtype ", x.scalar_type(),
        ", got ", b.rows->scalar_type(), " of shape ", b.rows->sizes());
    check_vector(*b.labels, b.rows->size(0), at::kLong, "candidate_labels");
    check_vector(*b.order, b.rows->size(0), at::kLong, "candidate_order");
    c = b.rows->stride(1) == 1 ? *b.rows : b.rows->contiguous();
    c_labels = b.labels->contiguous();
    c_order = b.order->contiguous();
    classes = number_classes(labels, order, &c_labels, &c_order);
    problem.anchors = side(x, order, classes.anchors);
    problem.candidates = side(c, c_order, classes.candidates);
    if (b.self_index) find_selves(*b.self_index);
  }

 private:
  static cpu::Side side(const Tensor& rows, const Tensor& order, const std::vector<int32_t>& classes) {
    return {rows.const_data_ptr(), rows.stride(0), rows.size(0), order.const_data_ptr<int64_t>(),
            classes.data()};
  }
  void find_selves(const Tensor& self_index) {
    check_vector(self_index, x.size(0), at::kLong, "self_index");
    const Tensor index = self_index.contiguous();
    const int64_t *self = index.const_data_ptr<int64_t>(), *oa = order.const_data_ptr<int64_t>(),
                  *ob = c_order.const_data_ptr<int64_t>();
    const int64_t m = x.size(0), n = c.size(0);
    std::vector<int32_t> position(n);
    for (int64_t j = 0; j < n; ++j) position[ob[j]] = static_cast<int32_t>(j);
    self_position.resize(m);
    for (int64_t i = 0; i < m; ++i) {
      const int64_t j = self[oa[i]];
      TORCH_CHECK_VALUE(j >= -1 && j < n, "pysupcon: self_index must lie in [-1, ", n, "), got ", j);
      self_position[i] = j < 0 ? -1 : position[j];
    }
    problem.self_position = self_position.data();
  }
};

Tensor new_stats(int64_t rows) { return at::empty({rows}, at::TensorOptions().dtype(at::kDouble)); }

Tensor as_stats(const Tensor& t, int64_t rows, const char* name) {
  TORCH_CHECK_VALUE(t.dim() == 1 && t.size(0) == rows, "pysupcon: ", name, " must be [", rows,
                    "], got shape ", t.sizes());
  return t.to(at::kDouble).contiguous();
}
Tensor as_stats(const Maybe& t, int64_t rows, const char* name) {
  return t ? as_stats(*t, rows, name) : Tensor();
}
const double* pointer(const Tensor& t) { return t.defined() ? t.const_data_ptr<double>() : nullptr; }

// Where gradients are added to. Those of the 16-bit types are float: their owner rounds the sum.
void* gradient(const Call& call, const Tensor& g, const Tensor& rows, const char* name) {
  const auto type = call.x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  TORCH_CHECK_VALUE(
      g.sizes() == rows.sizes() && g.scalar_type() == type && g.is_contiguous() && g.device().is_cpu(),
      "pysupcon: ", name, " must be a contiguous CPU tensor of ", type, " and shape ", rows.sizes(), ", got ",
      g.scalar_type(), " of shape ", g.sizes(), " and strides ", g.strides(), " on ", g.device());
  return g.mutable_data_ptr();
}

cpu::Gradients gradients(const Call& call, bool column_side, const Tensor& grad_x,
                         const Maybe& grad_candidates) {
  TORCH_CHECK_VALUE(call.c.defined() || (!column_side && !grad_candidates),
                    "pysupcon: grad_candidates and candidate statistics go with candidates");
  TORCH_CHECK_VALUE(
      !column_side || !grad_candidates,
      "pysupcon: with the candidates' own statistics the gradient of the candidates is their owner's");
  return {gradient(call, grad_x, call.x, "grad_x"),
          grad_candidates ? gradient(call, *grad_candidates, call.c, "grad_candidates") : nullptr};
}

// A non-finite row shows in every statistic; say which one it was.
void check_finite(const Call& call, const Tensor& n) {
  if (n.size(0) == 0 || !std::isnan(n.const_data_ptr<double>()[0])) return;
  for (const Tensor* rows : {&call.x, &call.c}) {
    if (!rows->defined()) continue;
    const Tensor bad = rows->detach().isfinite().all(1).logical_not().nonzero();
    TORCH_CHECK_VALUE(bad.numel() == 0, "features must be finite, got NaN or infinity in ", bad.numel(),
                      " of ", rows->size(0), rows == &call.x ? " rows" : " candidate rows",
                      ", the first of them row ", bad[0].item().toLong());
  }
  TORCH_CHECK_VALUE(
      false,
      "features must be small enough for a finite similarity; features . features / temperature overflows");
}

// ------------------------------------------------------------------------------------------------ operators
#define ROWS_ARGS const Tensor &x, const Tensor &labels, const Tensor &order, const Tensor &scale
#define CANDIDATE_ARGS                                                                  \
  const Maybe &candidates, const Maybe &candidate_labels, const Maybe &candidate_order, \
      const Maybe &self_index
#define CALL(name) \
  Call name({x, labels, order, scale}, {candidates, candidate_labels, candidate_order, self_index})

// Samples by ascending id, equal ones as they came, and how many samples bear the id of each.
struct Sorted {
  Tensor samples;              // int64
  std::vector<int64_t> alike;  // by sample
};
Sorted sort_samples(const Tensor& ids) {
  const int64_t count = ids.size(0), *id = ids.const_data_ptr<int64_t>();
  Sorted s{at::empty({count}, ids.options()), std::vector<int64_t>(count)};
  if (!count) return s;
  const auto [low, high] = std::minmax_element(id, id + count);
  const uint64_t range = static_cast<uint64_t>(*high) - static_cast<uint64_t>(*low);
  if (range < static_cast<uint64_t>(4 * count) + 1024) {  // classes are mostly numbered: count them
    const int64_t first = *low;
    std::vector<int64_t> start(range + 2);
    for (int64_t i = 0; i < count; ++i) ++start[id[i] - first + 1];
    for (int64_t i = 0; i < count; ++i) s.alike[i] = start[id[i] - first + 1];
    std::partial_sum(start.begin(), start.end(), start.begin());
    int64_t* sample = s.samples.mutable_data_ptr<int64_t>();
    for (int64_t i = 0; i < count; ++i) sample[start[id[i] - first]++] = i;
    return s;
  }
  s.samples = std::get<1>(at::sort(ids, /*stable=*/true, /*dim=*/0, /*descending=*/false));
  const int64_t* sample = s.samples.const_data_ptr<int64_t>();
  for (int64_t begin = 0, end = 0; begin < count; begin = end) {
    while (end < count && id[sample[end]] == id[sample[begin]]) ++end;
    for (int64_t i = begin; i < end; ++i) s.alike[sample[i]] = end - begin;
  }
  return s;
}

std::tuple<Tensor, Tensor> order_by_class(const Tensor& given, int64_t views) {
  check_vector(given, given.numel(), at::kLong, "ids");
  TORCH_CHECK_VALUE(views >= 1, "pysupcon: views must be at least 1, got ", views);
  const Tensor ids = given.contiguous();
  const Sorted sorted = sort_samples(ids);
  const int64_t count = ids.size(0), *sample = sorted.samples.const_data_ptr<int64_t>();
  Tensor order = views == 1 ? sorted.samples : at::empty({count * views}, ids.options());
  Tensor others = at::empty({count * views}, ids.options());
  int64_t *row = order.mutable_data_ptr<int64_t>(), *of_row = others.mutable_data_ptr<int64_t>();
  for (int64_t i = 0; i < count; ++i)
    for (int64_t v = 0; v < views; ++v) {
      if (views > 1) *row++ = sample[i] * views + v;
      *of_row++ = sorted.alike[i] * views - 1;
    }
  return {order, others};
}

std::tuple<Tensor, Tensor> pair_stats(ROWS_ARGS, CANDIDATE_ARGS, bool negatives, bool positives) {
  CALL(call);
  call.problem.negatives = negatives;
  call.problem.positives = positives;
  Tensor n = new_stats(call.x.size(0)), p = new_stats(call.x.size(0));
  cpu::pair_stats(call.problem, kThreads, n.mutable_data_ptr<double>(), p.mutable_data_ptr<double>());
  check_finite(call, n);
  return {n, p};
}

void pair_stats_backward(ROWS_ARGS, CANDIDATE_ARGS, const Tensor& n, const Tensor& p, const Tensor& grad_n,
                         const Tensor& grad_p, const Maybe& candidate_n, const Maybe& candidate_p,
                         const Maybe& candidate_grad_n, const Maybe& candidate_grad_p, bool negatives,
                         bool positives, const Tensor& grad_x, const Maybe& grad_candidates) {
  CALL(call);
  call.problem.negatives = negatives;
  call.problem.positives = positives;
  const bool column_side = candidate_n.has_value();
  TORCH_CHECK_VALUE(
      candidate_p.has_value() == column_side && candidate_grad_n.has_value() == column_side &&
          candidate_grad_p.has_value() == column_side,
      "pysupcon: candidate_n, candidate_p, candidate_grad_n and candidate_grad_p come together");
  const cpu::Gradients g = gradients(call, column_side, grad_x, grad_candidates);
  const int64_t rows = call.x.size(0), cols = call.c.defined() ? call.c.size(0) : 0;
  const Tensor a[4] = {as_stats(n, rows, "n"), as_stats(p, rows, "p"), as_stats(grad_n, rows, "grad_n"),
                       as_stats(grad_p, rows, "grad_p")};
  const Tensor b[4] = {as_stats(candidate_n, cols, "candidate_n"), as_stats(candidate_p, cols, "candidate_p"),
                       as_stats(candidate_grad_n, cols, "candidate_grad_n"),
                       as_stats(candidate_grad_p, cols, "candidate_grad_p")};
  cpu::pair_stats_backward(call.problem, kThreads,
                           {pointer(a[0]), pointer(a[1]), pointer(a[2]), pointer(a[3])},
                           {pointer(b[0]), pointer(b[1]), pointer(b[2]), pointer(b[3])}, g);
}

Tensor positive_softplus(ROWS_ARGS, CANDIDATE_ARGS, const Tensor& n, double epsilon) {
  CALL(call);
  call.problem.negatives = false;
  Tensor total = new_stats(call.x.size(0));
  const Tensor stats = as_stats(n, call.x.size(0), "n");
  cpu::positive_softplus(call.problem, kThreads, pointer(stats), epsilon, total.mutable_data_ptr<double>());
  return total;
}

Tensor positive_softplus_backward(ROWS_ARGS, CANDIDATE_ARGS, const Tensor& n, double epsilon,
                                  const Tensor& grad_total, const Maybe& candidate_n,
                                  const Maybe& candidate_grad_total, const Tensor& grad_x,
                                  const Maybe& grad_candidates) {
  CALL(call);
  call.problem.negatives = false;
  const bool column_side = candidate_n.has_value();
  TORCH_CHECK_VALUE(candidate_grad_total.has_value() == column_side,
                    "pysupcon: candidate_n and candidate_grad_total come together");
  const cpu::Gradients g = gradients(call, column_side, grad_x, grad_candidates);
  const int64_t rows = call.x.size(0), cols = call.c.defined() ? call.c.size(0) : 0;
  const Tensor stats = as_stats(n, rows, "n"), w = as_stats(grad_total, rows, "grad_total");
  const Tensor other = as_stats(candidate_n, cols, "candidate_n"),
               other_w = as_stats(candidate_grad_total, cols, "candidate_grad_total");
  Tensor grad_n = new_stats(rows);
  cpu::positive_softplus_backward(call.problem, kThreads, {pointer(stats), pointer(w)},
                                  {pointer(other), pointer(other_w)}, epsilon, g,
                                  grad_n.mutable_data_ptr<double>());
  return grad_n;
}

Tensor positive_sum(ROWS_ARGS, CANDIDATE_ARGS) {
  CALL(call);
  Tensor total = new_stats(call.x.size(0));
  cpu::positive_sum(call.problem, kThreads, total.mutable_data_ptr<double>());
  return total;
}

void positive_sum_backward(ROWS_ARGS, CANDIDATE_ARGS, const Tensor& grad_total,
                           const Maybe& candidate_grad_total, const Tensor& grad_x,
                           const Maybe& grad_candidates) {
  CALL(call);
  const cpu::Gradients g = gradients(call, candidate_grad_total.has_value(), grad_x, grad_candidates);
  const Tensor w = as_stats(grad_total, call.x.size(0), "grad_total");
  const Tensor other =
      as_stats(candidate_grad_total, call.c.defined() ? call.c.size(0) : 0, "candidate_grad_total");
  cpu::positive_sum_backward(call.problem, kThreads, pointer(w), pointer(other), g);
}

}  // namespace
}  // namespace pysupcon

TORCH_LIBRARY_IMPL(pysupcon, CPU, m) {
  m.impl("order_by_class", pysupcon::order_by_class);
  m.impl("pair_stats", pysupcon::pair_stats);
  m.impl("pair_stats_backward", pysupcon::pair_stats_backward);
  m.impl("positive_softplus", pysupcon::positive_softplus);
  m.impl("positive_softplus_backward", pysupcon::positive_softplus_backward);
  m.impl("positive_sum", pysupcon::positive_sum);
  m.impl("positive_sum_backward", pysupcon::positive_sum_backward);
}
