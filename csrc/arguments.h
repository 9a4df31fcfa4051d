// The operators' arguments and their checks, shared by cpu_glue.cpp and cuda_glue.cpp. Every message names
// the argument, what it must be and what it is. The values of index tensors on a GPU are not checked, because
// the host would have to synchronize with the device. Contracts of the operators: pysupcon/pairs/ops.py.
#pragma once
#include <ATen/core/Tensor.h>

#include <cmath>
#include <cstdint>
#include <limits>
#include <optional>
#include <string>
#include <vector>

// Parameter lists of the operators, in the order of library.cpp.
#define ROWS_ARGS \
  const at::Tensor &x, const at::Tensor &labels, const at::Tensor &order, const at::Tensor &scale
#define CANDIDATE_ARGS                                                                  \
  const Maybe &candidates, const Maybe &candidate_labels, const Maybe &candidate_order, \
      const Maybe &self_index
#define INSTANCE_ARGS const Maybe &instances, const Maybe &candidate_instances
#define WEIGHT_ARGS const Maybe &log_weights, const Maybe &candidate_log_weights
#define GRADIENT_ARGS const at::Tensor &grad_x, const Maybe &grad_candidates

#define PAIR_STATS_ARGS                                                                  \
  ROWS_ARGS, CANDIDATE_ARGS, INSTANCE_ARGS, WEIGHT_ARGS, bool negatives, bool positives, \
      const Maybe &negative_mean
#define PAIR_STATS_BACKWARD_ARGS                                                                          \
  ROWS_ARGS, CANDIDATE_ARGS, INSTANCE_ARGS, WEIGHT_ARGS, const at::Tensor &n, const at::Tensor &p,        \
      const at::Tensor &grad_n, const at::Tensor &grad_p, const Maybe &grad_positive_sum,                 \
      const Maybe &grad_instance_sum, const Maybe &candidate_n, const Maybe &candidate_p,                 \
      const Maybe &candidate_grad_n, const Maybe &candidate_grad_p,                                       \
      const Maybe &candidate_grad_positive_sum, const Maybe &candidate_grad_instance_sum, bool negatives, \
      bool positives, GRADIENT_ARGS
#define POSITIVE_SOFTPLUS_ARGS ROWS_ARGS, CANDIDATE_ARGS, WEIGHT_ARGS, const at::Tensor &n, double epsilon
#define POSITIVE_SOFTPLUS_BACKWARD_ARGS                                           \
  POSITIVE_SOFTPLUS_ARGS, const at::Tensor &grad_total, const Maybe &candidate_n, \
      const Maybe &candidate_grad_total, GRADIENT_ARGS

// Initializers of Rows, Candidates and Instances from those parameters.
#define ROWS_AND_CANDIDATES \
  {x, labels, order, scale}, { candidates, candidate_labels, candidate_order, self_index }
#define INSTANCES {instances, candidate_instances}

namespace pysupcon {

using Maybe = std::optional<at::Tensor>;

struct Rows {
  const at::Tensor &x, &labels, &order, &scale;
};
struct Candidates {
  const Maybe &rows, &labels, &order, &self_index;
};
struct Instances {  // both absent: instance sums are not computed
  const Maybe anchors, candidates;
};

constexpr int64_t kMostRows = std::numeric_limits<int32_t>::max() - 1;

inline std::string describe(const at::Tensor& t) {
  return c10::str(t.scalar_type(), " of shape ", t.sizes(), " on ", t.device());
}

// The kernels' own enum of element types: cpu::Type or cuda::Dtype.
template <class Dtype>
Dtype dtype_of(const at::Tensor& x) {
  switch (x.scalar_type()) {
    case at::kFloat:
      return Dtype::f32;
    case at::kDouble:
      return Dtype::f64;
    case at::kBFloat16:
      return Dtype::bf16;
    case at::kHalf:
      return Dtype::f16;
    default:
      TORCH_CHECK_VALUE(false, "pysupcon: x must be float32, float64, bfloat16 or float16, got ",
                        x.scalar_type());
  }
}

// x or candidates: [rows, D]. Checks no dtype.
inline void check_rows(const at::Tensor& t, const char* name) {
  TORCH_CHECK_VALUE(t.dim() == 2 && t.size(1) > 0, "pysupcon: ", name,
                    " must be [rows, D] with D at least 1, got ", describe(t));
  TORCH_CHECK_VALUE(t.size(0) <= kMostRows, "pysupcon: ", name, " must have at most ", kMostRows,
                    " rows, got ", t.size(0));
}

// candidate_labels and candidate_order are required with candidates; all arguments of candidates are refused
// without them.
inline void check_candidates(const at::Tensor& x, const Candidates& given) {
  const auto& [candidates, labels, order, self_index] = given;
  if (!candidates) {
    TORCH_CHECK_VALUE(!labels && !order && !self_index,
                      "pysupcon: candidate_labels, candidate_order and self_index go with candidates, got ",
                      labels  ? "candidate_labels"
                      : order ? "candidate_order"
                              : "self_index",
                      " without them");
    return;
  }
  check_rows(*candidates, "candidates");
  TORCH_CHECK_VALUE(candidates->size(1) == x.size(1) && candidates->scalar_type() == x.scalar_type() &&
                        candidates->device() == x.device(),
                    "pysupcon: candidates must be ", x.scalar_type(), " of shape [N, ", x.size(1), "] on ",
                    x.device(), " as x is, got ", describe(*candidates));
  TORCH_CHECK_VALUE(labels && order, "pysupcon: candidates need candidate_labels and candidate_order");
}

// Labels, order, instances or self_index: one int64 per row.
inline void check_index(const at::Tensor& t, int64_t rows, at::Device device, const char* name) {
  TORCH_CHECK_VALUE(t.dim() == 1 && t.size(0) == rows && t.scalar_type() == at::kLong && t.device() == device,
                    "pysupcon: ", name, " must be int64 of shape [", rows, "] on ", device, ", got ",
                    describe(t));
}

// A statistic or its gradient: one number per row.
inline void check_statistic(const at::Tensor& t, int64_t rows, at::Device device, const char* name) {
  TORCH_CHECK_VALUE(
      t.dim() == 1 && t.size(0) == rows && at::isFloatingType(t.scalar_type()) && t.device() == device,
      "pysupcon: ", name, " must be floating-point of shape [", rows, "] on ", device, ", got ", describe(t));
}

// The value is checked on the CPU only.
inline void check_scale(const at::Tensor& t, at::Device device) {
  TORCH_CHECK_VALUE(t.dim() == 0 && at::isFloatingType(t.scalar_type()) && t.device() == device,
                    "pysupcon: scale must be a floating-point tensor of no dimensions on ", device, ", got ",
                    describe(t));
  if (!t.device().is_cpu()) return;
  const double scale = t.item().toDouble();
  TORCH_CHECK_VALUE(std::isfinite(scale) && scale > 0,
                    "pysupcon: scale must be finite and greater than 0, got ", scale);
}

// Checks what both devices require of the rows, the candidates and the scale, and returns the rows' dtype.
// Index tensors are checked where they are read.
template <class Dtype>
Dtype check_operands(const Rows& rows, const Candidates& candidates, const Instances& instances) {
  check_rows(rows.x, "x");
  const Dtype dtype = dtype_of<Dtype>(rows.x);
  check_scale(rows.scale, rows.x.device());
  check_candidates(rows.x, candidates);
  TORCH_CHECK_VALUE(instances.candidates.has_value() == (instances.anchors && candidates.rows),
                    "pysupcon: candidate_instances go with candidates and instances");
  return dtype;
}

inline void check_epsilon(double epsilon) {
  TORCH_CHECK_VALUE(std::isfinite(epsilon), "pysupcon: epsilon must be finite, got ", epsilon);
}

// The range of bytes [first, last) between a tensor's first and last element.
struct Span {
  const char *first = nullptr, *last = nullptr;
  explicit Span(const at::Tensor& t) {
    if (!t.numel()) return;
    int64_t furthest = 0;
    for (int64_t d = 0; d < t.dim(); ++d) furthest += (t.size(d) - 1) * t.stride(d);
    first = static_cast<const char*>(t.const_data_ptr());
    last = first + (furthest + 1) * t.element_size();
  }
  bool overlaps(const Span& other) const { return first < other.last && other.first < last; }
};

// A buffer that a gradient is added to. Returns its data.
inline void* check_gradient(const at::Tensor& g, const at::Tensor& rows, const char* name) {
  const auto type = rows.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  TORCH_CHECK_VALUE(g.sizes() == rows.sizes() && g.scalar_type() == type && g.is_contiguous() &&
                        g.device() == rows.device(),
                    "pysupcon: ", name, " must be a contiguous tensor of ", type, " and shape ", rows.sizes(),
                    " on ", rows.device(), ", got ", g.scalar_type(), " of shape ", g.sizes(),
                    " and strides ", g.strides(), " on ", g.device());
  // Autograd detects the change if the tensor was saved for a backward.
  g.unsafeGetTensorImpl()->bump_version();
  return g.mutable_data_ptr();
}

// `read`: the tensors that are read while the gradient is written; some may be undefined.
inline void check_apart(const at::Tensor& gradient, const char* name, at::ArrayRef<at::Tensor> read) {
  const Span written(gradient);
  for (const at::Tensor& t : read)
    TORCH_CHECK_VALUE(!t.defined() || !written.overlaps(Span(t)), "pysupcon: ", name,
                      " must not share memory with another argument");
}

// Of a log weight. Statistics are double: beyond it they have too few digits for an exponent.
constexpr double kLargestLogWeight = 1e14;

// Log weights of the rows as candidates: of one set, of the candidates, and with the candidates' own
// statistics also of the anchors.
inline void check_weights(const at::Tensor& x, const Maybe& candidates, const Maybe& log_weights,
                          const Maybe& candidate_log_weights, bool column_side) {
  TORCH_CHECK_VALUE(candidates || !candidate_log_weights,
                    "pysupcon: candidate_log_weights go with candidates");
  TORCH_CHECK_VALUE(!log_weights || !candidates || column_side,
                    "pysupcon: with candidates, log_weights go with the candidates' own statistics");
  if (log_weights) check_statistic(*log_weights, x.size(0), x.device(), "log_weights");
  if (candidate_log_weights)
    check_statistic(*candidate_log_weights, candidates->size(0), x.device(), "candidate_log_weights");
}

// The statistics of the candidates are given completely or not at all. Returns whether they are given.
inline bool check_column_side(const Maybe& n, const Maybe& p, const Maybe& grad_n, const Maybe& grad_p,
                              const Maybe& grad_positive_sum, const Maybe& grad_instance_sum) {
  const bool given = n.has_value();
  TORCH_CHECK_VALUE(
      p.has_value() == given && grad_n.has_value() == given && grad_p.has_value() == given,
      "pysupcon: candidate_n, candidate_p, candidate_grad_n and candidate_grad_p come together");
  TORCH_CHECK_VALUE(given || (!grad_positive_sum && !grad_instance_sum),
                    "pysupcon: candidate_grad_positive_sum and candidate_grad_instance_sum need candidate_n");
  return given;
}
inline bool check_column_side(const Maybe& n, const Maybe& grad_total) {
  TORCH_CHECK_VALUE(grad_total.has_value() == n.has_value(),
                    "pysupcon: candidate_n and candidate_grad_total come together");
  return n.has_value();
}

// The valid forms of the backward: see pysupcon/pairs/ops.py. column_side: the candidates' own statistics are
// given.
inline void check_form(bool column_side, bool candidates, bool self_index, bool grad_candidates) {
  TORCH_CHECK_VALUE(candidates || (!column_side && !grad_candidates),
                    "pysupcon: grad_candidates and candidate statistics go with candidates");
  TORCH_CHECK_VALUE(
      !column_side || !grad_candidates,
      "pysupcon: with the candidates' own statistics the gradient of the candidates is their owner's");
  TORCH_CHECK_VALUE(!column_side || self_index,
                    "pysupcon: the candidates' own statistics need self_index, -1 for an anchor that is not "
                    "among the candidates");
}

// A permutation of the rows, on the CPU.
inline void check_order(const at::Tensor& order, const char* name) {
  const int64_t rows = order.size(0), *row = order.const_data_ptr<int64_t>();
  std::vector<char> seen(rows);
  for (int64_t at = 0; at < rows; ++at) {
    const bool inside = row[at] >= 0 && row[at] < rows;
    TORCH_CHECK_VALUE(inside && !seen[row[at]], "pysupcon: ", name, " must hold each of 0 to ", rows - 1,
                      " once, got ", row[at], inside ? " twice" : "");
    seen[row[at]] = 1;
  }
}

}  // namespace pysupcon
