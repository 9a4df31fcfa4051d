// Checks tensors, passes their pointers to the CPU kernels and registers the operators with the dispatcher.
// Contracts of the operators: pysupcon/pairs/ops.py.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/sort.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "arguments.h"
#include "cpu/kernels.h"
#include "signals.h"

namespace pysupcon {
namespace {

using at::Tensor;

void run_parallel(int64_t count, void* context, void (*body)(void*, int64_t, int64_t)) {
  at::parallel_for(0, count, 1, [&](int64_t first, int64_t last) { body(context, first, last); });
}
int64_t thread_count() { return at::get_num_threads(); }
constexpr cpu::Threads kThreads{thread_count, run_parallel, raise_pending_signal};

// ------------------------------------------------------------------------------------------------ arguments
// The sort keys (label, instance) of one side by row, and the order of its rows.
struct Keys {
  const int64_t *labels = nullptr, *instances = nullptr, *order = nullptr;
  int64_t count = 0;
  std::pair<int64_t, int64_t> at(int64_t position) const {
    return {labels[order[position]], instances ? instances[order[position]] : 0};
  }
};
// Keys of both sides numbered in ascending order, by position: equal keys have equal numbers.
struct Numbers {
  std::vector<int32_t> anchors, candidates;
};
std::string describe_instance(const Keys& keys, const std::pair<int64_t, int64_t>& key) {
  return keys.instances ? ", instance " + std::to_string(key.second) : "";
}
Numbers number(const Keys& a, const Keys& b) {
  Numbers numbers{std::vector<int32_t>(a.count), std::vector<int32_t>(b.count)};
  int32_t number = -1;
  std::pair<int64_t, int64_t> key;
  for (int64_t i = 0, j = 0; i < a.count || j < b.count;) {
    const bool first = j >= b.count || (i < a.count && a.at(i) <= b.at(j));
    const auto next = first ? a.at(i) : b.at(j);
    TORCH_CHECK_VALUE(number < 0 || next >= key, "pysupcon: ", first ? "order" : "candidate_order",
                      " must be the argsort of ", first ? "labels" : "candidate_labels",
                      a.instances ? " and, within a label, of instances" : "", "; it puts label ", next.first,
                      describe_instance(a, next), " after ", key.first, describe_instance(a, key));
    if (number < 0 || next != key) ++number;
    key = next;
    (first ? numbers.anchors[i++] : numbers.candidates[j++]) = number;
  }
  return numbers;
}

// Checks the arguments and owns the memory that `problem` points to.
struct Call {
  Tensor x, labels, order, c, c_labels, c_order, instances, c_instances, weights, c_weights;
  Numbers classes, by_instance;
  std::vector<int32_t> self_position;
  bool has_self_index = false;
  cpu::Problem problem;

  Call(const Rows& a, const Candidates& b, const Instances& given = {}) {
    problem.type = check_operands<cpu::Type>(a, b, given);
    x = with_unit_stride(a.x);
    labels = index(a.labels, x.size(0), "labels");
    order = index(a.order, x.size(0), "order");
    check_order(order, "order");
    if (given.anchors) instances = index(*given.anchors, x.size(0), "instances");
    problem.dim = x.size(1);
    problem.scale = a.scale.item().toDouble();
    if (!b.rows) {
      number_both();
      problem.self = true;
      problem.anchors = problem.candidates = side(x, order, classes.anchors, by_instance.anchors);
      return;
    }
    c = with_unit_stride(*b.rows);
    c_labels = index(*b.labels, c.size(0), "candidate_labels");
    c_order = index(*b.order, c.size(0), "candidate_order");
    check_order(c_order, "candidate_order");
    if (given.candidates) c_instances = index(*given.candidates, c.size(0), "candidate_instances");
    number_both();
    problem.anchors = side(x, order, classes.anchors, by_instance.anchors);
    problem.candidates = side(c, c_order, classes.candidates, by_instance.candidates);
    has_self_index = b.self_index.has_value();
    if (has_self_index) find_self_positions(*b.self_index);
  }

  // Call it once. column_side: the candidates' own statistics are given.
  void set_weights(const Maybe& log_weights, const Maybe& candidate_log_weights, bool column_side) {
    check_weights(x, problem.self ? Maybe() : Maybe(c), log_weights, candidate_log_weights, column_side);
    weights = logarithms(log_weights, "log_weights");
    c_weights = problem.self ? weights : logarithms(candidate_log_weights, "candidate_log_weights");
    problem.anchors.log_weight = weights.defined() ? weights.const_data_ptr<double>() : nullptr;
    problem.candidates.log_weight = c_weights.defined() ? c_weights.const_data_ptr<double>() : nullptr;
  }

 private:
  static Tensor logarithms(const Maybe& given, const char* name) {
    if (!given) return Tensor();
    const Tensor values = given->to(at::kDouble).contiguous();
    const double* value = values.const_data_ptr<double>();
    for (int64_t i = 0; i < values.size(0); ++i)
      TORCH_CHECK_VALUE(std::abs(value[i]) <= kLargestLogWeight || value[i] == -INFINITY, "pysupcon: ", name,
                        " must lie between -1e14 and 1e14 or be -inf, got ", value[i], " for row ", i);
    return values;
  }
  static cpu::Side side(const Tensor& rows, const Tensor& order, const std::vector<int32_t>& classes,
                        const std::vector<int32_t>& by_instance) {
    return {rows.const_data_ptr(), rows.stride(0),
            rows.size(0),          order.const_data_ptr<int64_t>(),
            classes.data(),        by_instance.empty() ? nullptr : by_instance.data()};
  }
  static Keys keys(const Tensor& labels, const Tensor& instances, const Tensor& order) {
    if (!labels.defined()) return {};
    return {labels.const_data_ptr<int64_t>(),
            instances.defined() ? instances.const_data_ptr<int64_t>() : nullptr,
            order.const_data_ptr<int64_t>(), labels.size(0)};
  }
  void number_both() {
    classes = number(keys(labels, Tensor(), order), keys(c_labels, Tensor(), c_order));
    if (instances.defined())
      by_instance = number(keys(labels, instances, order), keys(c_labels, c_instances, c_order));
  }
  static Tensor with_unit_stride(const Tensor& rows) {
    return rows.stride(1) == 1 ? rows : rows.contiguous();
  }
  static Tensor index(const Tensor& t, int64_t rows, const char* name) {
    check_index(t, rows, at::kCPU, name);
    return t.contiguous();
  }
  void find_self_positions(const Tensor& given) {
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

// A buffer that is added to, of the shape of `rows`. It is float for 16-bit rows: the caller rounds the sum.
// `statistics`: the tensors that are read at the same time, besides the rows.
void* gradient(const Call& call, const Tensor& g, const Tensor& rows, const char* name,
               at::ArrayRef<Tensor> statistics) {
  void* const to = check_gradient(g, rows, name);
  check_apart(g, name, {call.x, call.order, call.c, call.c_order});
  check_apart(g, name, statistics);
  return to;
}
cpu::Gradients gradients(const Call& call, const Tensor& grad_x, const Maybe& grad_candidates,
                         at::ArrayRef<Tensor> statistics) {
  void* const anchors = gradient(call, grad_x, call.x, "grad_x", statistics);
  if (!grad_candidates) return {anchors, nullptr};
  check_apart(*grad_candidates, "grad_candidates", grad_x);
  return {anchors, gradient(call, *grad_candidates, call.c, "grad_candidates", statistics)};
}

// A non-finite row makes every statistic NaN: find that row for the message.
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
      "features must be small enough for their similarities; the largest |features| |features| / temperature "
      "is beyond 7e14");
}

// ------------------------------------------------------------------------------------------------ operators
// The stable argsort of samples by id, and the number of samples that share each sample's id.
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
  if (range < static_cast<uint64_t>(4 * count) + 1024) {  // most ids are small: use a counting sort
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

std::tuple<Tensor, Tensor, Tensor, Tensor> pair_stats(PAIR_STATS_ARGS) {
  Call call(ROWS_AND_CANDIDATES, INSTANCES);
  call.set_weights(log_weights, candidate_log_weights, false);
  call.problem.negatives = negatives;
  call.problem.positives = positives;
  TORCH_CHECK_VALUE(!negative_mean || call.c.defined(), "pysupcon: negative_mean goes with candidates");
  void* const mean = negative_mean ? gradient(call, *negative_mean, call.x, "negative_mean", {}) : nullptr;
  const int64_t rows = call.x.size(0);
  Tensor n = new_stats(rows), p = new_stats(rows), positive_sum = new_stats(rows),
         instance_sum = instances ? new_stats(rows) : at::zeros({rows}, n.options());
  cpu::pair_stats(
      call.problem, kThreads,
      {n.mutable_data_ptr<double>(), p.mutable_data_ptr<double>(), positive_sum.mutable_data_ptr<double>(),
       instances ? instance_sum.mutable_data_ptr<double>() : nullptr, mean});
  check_finite(call, n);
  return {n, p, positive_sum, instance_sum};
}

void pair_stats_backward(PAIR_STATS_BACKWARD_ARGS) {
  Call call(ROWS_AND_CANDIDATES, INSTANCES);
  call.problem.negatives = negatives;
  call.problem.positives = positives;
  const bool column_side = check_column_side(candidate_n, candidate_p, candidate_grad_n, candidate_grad_p,
                                             candidate_grad_positive_sum, candidate_grad_instance_sum);
  TORCH_CHECK_VALUE(
      !column_side || (candidate_grad_positive_sum.has_value() == grad_positive_sum.has_value() &&
                       candidate_grad_instance_sum.has_value() == grad_instance_sum.has_value()),
      "pysupcon: with candidate_n, grad_positive_sum and candidate_grad_positive_sum come "
      "together, and so do grad_instance_sum and candidate_grad_instance_sum");
  call.set_weights(log_weights, candidate_log_weights, column_side);
  TORCH_CHECK_VALUE(instances || !grad_instance_sum, "pysupcon: grad_instance_sum needs instances");
  check_form(column_side, call.c.defined(), call.has_self_index, grad_candidates.has_value());
  const int64_t rows = call.x.size(0), cols = call.c.defined() ? call.c.size(0) : 0;
  const Tensor a[6] = {as_stats(n, rows, "n"),
                       as_stats(p, rows, "p"),
                       as_stats(grad_n, rows, "grad_n"),
                       as_stats(grad_p, rows, "grad_p"),
                       as_stats(grad_positive_sum, rows, "grad_positive_sum"),
                       as_stats(grad_instance_sum, rows, "grad_instance_sum")};
  const Tensor b[6] = {as_stats(candidate_n, cols, "candidate_n"),
                       as_stats(candidate_p, cols, "candidate_p"),
                       as_stats(candidate_grad_n, cols, "candidate_grad_n"),
                       as_stats(candidate_grad_p, cols, "candidate_grad_p"),
                       as_stats(candidate_grad_positive_sum, cols, "candidate_grad_positive_sum"),
                       as_stats(candidate_grad_instance_sum, cols, "candidate_grad_instance_sum")};
  const auto side = [](const Tensor(&t)[6]) {
    return cpu::StatsGrad{pointer(t[0]), pointer(t[1]), pointer(t[2]),
                          pointer(t[3]), pointer(t[4]), pointer(t[5])};
  };
  const cpu::Gradients g =
      gradients(call, grad_x, grad_candidates,
                {a[0], a[1], a[2], a[3], a[4], a[5], b[0], b[1], b[2], b[3], b[4], b[5]});
  cpu::pair_stats_backward(call.problem, kThreads, side(a), side(b), g);
}

Tensor positive_softplus(POSITIVE_SOFTPLUS_ARGS) {
  Call call(ROWS_AND_CANDIDATES);
  call.set_weights(log_weights, candidate_log_weights, false);
  call.problem.negatives = false;
  check_epsilon(epsilon);
  Tensor total = new_stats(call.x.size(0));
  const Tensor stats = as_stats(n, call.x.size(0), "n");
  cpu::positive_softplus(call.problem, kThreads, pointer(stats), epsilon, total.mutable_data_ptr<double>());
  return total;
}

Tensor positive_softplus_backward(POSITIVE_SOFTPLUS_BACKWARD_ARGS) {
  Call call(ROWS_AND_CANDIDATES);
  call.problem.negatives = false;
  const bool column_side = check_column_side(candidate_n, candidate_grad_total);
  call.set_weights(log_weights, candidate_log_weights, column_side);
  check_epsilon(epsilon);
  check_form(column_side, call.c.defined(), call.has_self_index, grad_candidates.has_value());
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

}  // namespace
}  // namespace pysupcon

TORCH_LIBRARY_IMPL(pysupcon, CPU, m) {
  m.impl("order_by_class", pysupcon::order_by_class);
  m.impl("pair_stats", pysupcon::pair_stats);
  m.impl("pair_stats_backward", pysupcon::pair_stats_backward);
  m.impl("positive_softplus", pysupcon::positive_softplus);
  m.impl("positive_softplus_backward", pysupcon::positive_softplus_backward);
}
