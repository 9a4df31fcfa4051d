// Tensors to pointers for the CPU kernels, and their registration with the dispatcher. No mathematics here.
// Contracts of the operators: pysupcon/_ops.py.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/sort.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <optional>
#include <tuple>
#include <vector>

#include "arguments.h"
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
    TORCH_CHECK_VALUE(number < 0 || next >= label, "pysupcon: ", first ? "order" : "candidate_order",
                      " must be the argsort of ", first ? "labels" : "candidate_labels", "; it puts label ",
                      next, " after ", label);
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
  bool selves = false;  // whether there is a self_index
  cpu::Problem problem;

  Call(const Rows& a, const Candidates& b) {
    check_rows(a.x, "x");
    problem.type = type_of(a.x, "x");
    check_scale(a.scale, at::kCPU);
    check_candidates(a.x, b.rows, b.labels, b.order, b.self_index);
    x = with_unit_stride(a.x);
    labels = index(a.labels, x.size(0), "labels");
    order = index(a.order, x.size(0), "order");
    check_order(order, "order");
    problem.dim = x.size(1);
    problem.scale = a.scale.item().toDouble();
    if (!b.rows) {
      classes = number_classes(labels, order, nullptr, nullptr);
      problem.self = true;
      problem.anchors = problem.candidates = side(x, order, classes.anchors);
      return;
    }
    c = with_unit_stride(*b.rows);
    c_labels = index(*b.labels, c.size(0), "candidate_labels");
    c_order = index(*b.order, c.size(0), "candidate_order");
    check_order(c_order, "candidate_order");
    classes = number_classes(labels, order, &c_labels, &c_order);
    problem.anchors = side(x, order, classes.anchors);
    problem.candidates = side(c, c_order, classes.candidates);
    selves = b.self_index.has_value();
    if (selves) find_selves(*b.self_index);
  }

 private:
  static cpu::Side side(const Tensor& rows, const Tensor& order, const std::vector<int32_t>& classes) {
    return {rows.const_data_ptr(), rows.stride(0), rows.size(0), order.const_data_ptr<int64_t>(),
            classes.data()};
  }
  static Tensor with_unit_stride(const Tensor& rows) {
    return rows.stride(1) == 1 ? rows : rows.contiguous();
  }
  static Tensor index(const Tensor& t, int64_t rows, const char* name) {
    check_index(t, rows, at::kCPU, name);
    return t.contiguous();
  }
  void find_selves(const Tensor& given) {
    const Tensor self_index = index(given, x.size(0), "self_index");
    const int64_t *self = self_index.const_data_ptr<int64_t>(), *oa = order.const_data_ptr<int64_t>(),
                  *ob = c_order.const_data_ptr<int64_t>();
    const int64_t m = x.size(0), n = c.size(0);
    std::vector<int32_t> position(n);
    for (int64_t j = 0; j < n; ++j) position[ob[j]] = static_cast<int32_t>(j);
    self_position.resize(m);
    for (int64_t i = 0; i < m; ++i) {
      const int64_t j = self[oa[i]];
      TORCH_CHECK_VALUE(j >= -1 && j < n, "pysupcon: self_index must lie in [-1, ", n, "), got ", j,
                        " for anchor ", oa[i]);
      self_position[i] = j < 0 ? -1 : position[j];
      TORCH_CHECK_VALUE(j < 0 || classes.candidates[position[j]] == classes.anchors[i],
                        "pysupcon: self_index must name a candidate of the anchor's own label, got ", j,
                        " for anchor ", oa[i]);
    }
    problem.self_position = self_position.data();
  }
};

Tensor new_stats(int64_t rows) { return at::empty({rows}, at::TensorOptions().dtype(at::kDouble)); }

Tensor as_stats(const Tensor& t, int64_t rows, const char* name) {
  check_statistic(t, rows, at::kCPU, name);
  return t.to(at::kDouble).contiguous();
}
Tensor as_stats(const Maybe& t, int64_t rows, const char* name) {
  return t ? as_stats(*t, rows, name) : Tensor();
}
const double* pointer(const Tensor& t) { return t.defined() ? t.const_data_ptr<double>() : nullptr; }

// Where gradients are added to. Those of the 16-bit types are float: their owner rounds the sum.
// `statistics`: what is read meanwhile, besides the rows.
cpu::Gradients gradients(const Call& call, const Tensor& grad_x, const Maybe& grad_candidates,
                         at::ArrayRef<Tensor> statistics) {
  const auto gradient = [&](const Tensor& g, const Tensor& rows, const char* name) {
    void* const to = check_gradient(g, rows, name);
    check_apart(g, name, {call.x, call.order, call.c, call.c_order});
    check_apart(g, name, statistics);
    return to;
  };
  if (!grad_candidates) return {gradient(grad_x, call.x, "grad_x"), nullptr};
  check_apart(*grad_candidates, "grad_candidates", grad_x);
  return {gradient(grad_x, call.x, "grad_x"), gradient(*grad_candidates, call.c, "grad_candidates")};
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
  check_index(given, given.numel(), at::kCPU, "ids");
  TORCH_CHECK_VALUE(views >= 1 && views <= kMostRows / std::max<int64_t>(given.numel(), 1),
                    "pysupcon: views must be at least 1 and ids times views at most ", kMostRows, ", got ",
                    given.numel(), " times ", views);
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
  check_form(column_side, call.c.defined(), call.selves, grad_candidates.has_value());
  const int64_t rows = call.x.size(0), cols = call.c.defined() ? call.c.size(0) : 0;
  const Tensor s[8] = {as_stats(n, rows, "n"),
                       as_stats(p, rows, "p"),
                       as_stats(grad_n, rows, "grad_n"),
                       as_stats(grad_p, rows, "grad_p"),
                       as_stats(candidate_n, cols, "candidate_n"),
                       as_stats(candidate_p, cols, "candidate_p"),
                       as_stats(candidate_grad_n, cols, "candidate_grad_n"),
                       as_stats(candidate_grad_p, cols, "candidate_grad_p")};
  const cpu::Gradients g = gradients(call, grad_x, grad_candidates, s);
  cpu::pair_stats_backward(call.problem, kThreads,
                           {pointer(s[0]), pointer(s[1]), pointer(s[2]), pointer(s[3])},
                           {pointer(s[4]), pointer(s[5]), pointer(s[6]), pointer(s[7])}, g);
}

Tensor positive_softplus(ROWS_ARGS, CANDIDATE_ARGS, const Tensor& n, double epsilon) {
  CALL(call);
  call.problem.negatives = false;
  check_epsilon(epsilon);
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
  check_epsilon(epsilon);
  check_form(column_side, call.c.defined(), call.selves, grad_candidates.has_value());
  const int64_t rows = call.x.size(0), cols = call.c.defined() ? call.c.size(0) : 0;
  const Tensor stats = as_stats(n, rows, "n"), w = as_stats(grad_total, rows, "grad_total");
  const Tensor other = as_stats(candidate_n, cols, "candidate_n"),
               other_w = as_stats(candidate_grad_total, cols, "candidate_grad_total");
  const cpu::Gradients g = gradients(call, grad_x, grad_candidates, {stats, w, other, other_w});
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
  check_form(candidate_grad_total.has_value(), call.c.defined(), call.selves, grad_candidates.has_value());
  const Tensor w = as_stats(grad_total, call.x.size(0), "grad_total");
  const Tensor other =
      as_stats(candidate_grad_total, call.c.defined() ? call.c.size(0) : 0, "candidate_grad_total");
  const cpu::Gradients g = gradients(call, grad_x, grad_candidates, {w, other});
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
