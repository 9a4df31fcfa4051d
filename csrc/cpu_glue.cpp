// Tensors to pointers for the CPU kernels, and their registration with the dispatcher. No mathematics here.
// Contracts of the operators: pysupcon/_ops.py.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/sort.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
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

// One side's keys by row, and its rows in their order.
struct Keys {
  const int64_t *labels = nullptr, *instances = nullptr, *order = nullptr;
  int64_t count = 0;
  std::pair<int64_t, int64_t> at(int64_t position) const {
    return {labels[order[position]], instances ? instances[order[position]] : 0};
  }
};
// Numbers of both sides by position: equal keys, equal numbers, ascending.
struct Numbers {
  std::vector<int32_t> anchors, candidates;
};
Numbers number(const Keys& a, const Keys& b) {
  Numbers numbers{std::vector<int32_t>(a.count), std::vector<int32_t>(b.count)};
  int32_t number = -1;
  std::pair<int64_t, int64_t> key;
  for (int64_t i = 0, j = 0; i < a.count || j < b.count;) {
    const bool first = j >= b.count || (i < a.count && a.at(i) <= b.at(j));
    const auto next = first ? a.at(i) : b.at(j);
    TORCH_CHECK_VALUE(number < 0 || next >= key, "pysupcon: order must sort by label",
                      a.instances ? " and then by instance" : "", "; it puts label ", next.first,
                      a.instances ? ", instance " + std::to_string(next.second) : "", " after label ",
                      key.first, a.instances ? ", instance " + std::to_string(key.second) : "");
    if (number < 0 || next != key) ++number;
    key = next;
    (first ? numbers.anchors[i++] : numbers.candidates[j++]) = number;
  }
  return numbers;
}

struct Rows {
  const Tensor &x, &labels, &order, &scale;
};
struct Candidates {
  const Maybe &rows, &labels, &order, &self_index;
};
struct Instances {  // of both sides; none: no sum over them is wanted
  const Maybe anchors, candidates;
};

// Owns whatever the pointers in `problem` point to.
struct Call {
  Tensor x, labels, order, c, c_labels, c_order, instances, c_instances;
  Numbers classes, by_instance;
  std::vector<int32_t> self_position;
  cpu::Problem problem;

  Call(const Rows& a, const Candidates& b, const Instances& given = {}) {
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
    TORCH_CHECK_VALUE(given.candidates.has_value() == (given.anchors && b.rows),
                      "pysupcon: candidate_instances go with instances and candidates");
    if (given.anchors) {
      check_vector(*given.anchors, a.x.size(0), at::kLong, "instances");
      instances = given.anchors->contiguous();
    }
    if (!b.rows) {
      number_both();
      problem.self = true;
      problem.anchors = problem.candidates = side(x, order, classes.anchors, by_instance.anchors);
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
    if (given.candidates) {
      check_vector(*given.candidates, b.rows->size(0), at::kLong, "candidate_instances");
      c_instances = given.candidates->contiguous();
    }
    number_both();
    problem.anchors = side(x, order, classes.anchors, by_instance.anchors);
    problem.candidates = side(c, c_order, classes.candidates, by_instance.candidates);
    if (b.self_index) find_selves(*b.self_index);
  }

 private:
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

// A non-finite row makes every statistic NaN; say which one it was.
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
#define ROWS_ARGS const Tensor &x, const Tensor &labels, const Tensor &order, const Tensor &scale
#define CANDIDATE_ARGS                                                                  \
  const Maybe &candidates, const Maybe &candidate_labels, const Maybe &candidate_order, \
      const Maybe &self_index
#define INSTANCE_ARGS const Maybe &instances, const Maybe &candidate_instances
#define CALL(name) \
  Call name({x, labels, order, scale}, {candidates, candidate_labels, candidate_order, self_index})
#define CALL_WITH_INSTANCES(name)                                                                   \
  Call name({x, labels, order, scale}, {candidates, candidate_labels, candidate_order, self_index}, \
            {instances, candidate_instances})

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

std::tuple<Tensor, Tensor, Tensor, Tensor> pair_stats(ROWS_ARGS, CANDIDATE_ARGS, INSTANCE_ARGS,
                                                      bool negatives, bool positives) {
  CALL_WITH_INSTANCES(call);
  call.problem.negatives = negatives;
  call.problem.positives = positives;
  const int64_t rows = call.x.size(0);
  Tensor n = new_stats(rows), p = new_stats(rows), positive_sum = new_stats(rows),
         instance_sum = instances ? new_stats(rows) : at::zeros({rows}, n.options());
  cpu::pair_stats(
      call.problem, kThreads,
      {n.mutable_data_ptr<double>(), p.mutable_data_ptr<double>(), positive_sum.mutable_data_ptr<double>(),
       instances ? instance_sum.mutable_data_ptr<double>() : nullptr});
  check_finite(call, n);
  return {n, p, positive_sum, instance_sum};
}

void pair_stats_backward(ROWS_ARGS, CANDIDATE_ARGS, INSTANCE_ARGS, const Tensor& n, const Tensor& p,
                         const Tensor& grad_n, const Tensor& grad_p, const Maybe& grad_positive_sum,
                         const Maybe& grad_instance_sum, const Maybe& candidate_n, const Maybe& candidate_p,
                         const Maybe& candidate_grad_n, const Maybe& candidate_grad_p,
                         const Maybe& candidate_grad_positive_sum, const Maybe& candidate_grad_instance_sum,
                         bool negatives, bool positives, const Tensor& grad_x, const Maybe& grad_candidates) {
  CALL_WITH_INSTANCES(call);
  call.problem.negatives = negatives;
  call.problem.positives = positives;
  const bool column_side = candidate_n.has_value();
  TORCH_CHECK_VALUE(
      candidate_p.has_value() == column_side && candidate_grad_n.has_value() == column_side &&
          candidate_grad_p.has_value() == column_side &&
          candidate_grad_positive_sum.has_value() == (column_side && grad_positive_sum) &&
          candidate_grad_instance_sum.has_value() == (column_side && grad_instance_sum),
      "pysupcon: candidate_n, candidate_p, candidate_grad_n, candidate_grad_p and, where the anchors have "
      "them, candidate_grad_positive_sum and candidate_grad_instance_sum come together");
  TORCH_CHECK_VALUE(instances || !grad_instance_sum, "pysupcon: grad_instance_sum needs instances");
  const cpu::Gradients g = gradients(call, column_side, grad_x, grad_candidates);
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
  cpu::pair_stats_backward(call.problem, kThreads, side(a), side(b), g);
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

}  // namespace
}  // namespace pysupcon

TORCH_LIBRARY_IMPL(pysupcon, CPU, m) {
  m.impl("order_by_class", pysupcon::order_by_class);
  m.impl("pair_stats", pysupcon::pair_stats);
  m.impl("pair_stats_backward", pysupcon::pair_stats_backward);
  m.impl("positive_softplus", pysupcon::positive_softplus);
  m.impl("positive_softplus_backward", pysupcon::positive_softplus_backward);
}
