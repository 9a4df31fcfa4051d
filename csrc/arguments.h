// What both glues ask of the operators' arguments. Every message names the argument, what it must be and what
// came. Values of a GPU's index tensors are not looked at: the host would have to wait for them.
// Contracts of the operators: pysupcon/pairs/ops.py.
#pragma once
#include <ATen/core/Tensor.h>

#include <cmath>
#include <cstdint>
#include <limits>
#include <optional>
#include <string>
#include <vector>

namespace pysupcon {

constexpr int64_t kMostRows = std::numeric_limits<int32_t>::max() - 1;

inline std::string describe(const at::Tensor& t) {
  return c10::str(t.scalar_type(), " of shape ", t.sizes(), " on ", t.device());
}

// x or candidates: [rows, D]. The dtype is the caller's matter.
inline void check_rows(const at::Tensor& t, const char* name) {
  TORCH_CHECK_VALUE(t.dim() == 2 && t.size(1) > 0, "pysupcon: ", name,
                    " must be [rows, D] with D at least 1, got ", describe(t));
  TORCH_CHECK_VALUE(t.size(0) <= kMostRows, "pysupcon: ", name, " must have at most ", kMostRows,
                    " rows, got ", t.size(0));
}

// The candidates' arguments beside their rows: none without candidates, and what goes with them.
inline void check_candidates(const at::Tensor& x, const std::optional<at::Tensor>& candidates,
                             const std::optional<at::Tensor>& labels, const std::optional<at::Tensor>& order,
                             const std::optional<at::Tensor>& self_index) {
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

// Labels, an order, self_index: one int64 a row.
inline void check_index(const at::Tensor& t, int64_t rows, at::Device device, const char* name) {
  TORCH_CHECK_VALUE(t.dim() == 1 && t.size(0) == rows && t.scalar_type() == at::kLong && t.device() == device,
                    "pysupcon: ", name, " must be int64 of shape [", rows, "] on ", device, ", got ",
                    describe(t));
}

// A statistic or its gradient: one number a row.
inline void check_statistic(const at::Tensor& t, int64_t rows, at::Device device, const char* name) {
  TORCH_CHECK_VALUE(
      t.dim() == 1 && t.size(0) == rows && at::isFloatingType(t.scalar_type()) && t.device() == device,
      "pysupcon: ", name, " must be floating-point of shape [", rows, "] on ", device, ", got ", describe(t));
}

// Its value is looked at where it lies on the CPU.
inline void check_scale(const at::Tensor& t, at::Device device) {
  TORCH_CHECK_VALUE(t.dim() == 0 && at::isFloatingType(t.scalar_type()) && t.device() == device,
                    "pysupcon: scale must be a floating-point tensor of no dimensions on ", device, ", got ",
                    describe(t));
  if (!t.device().is_cpu()) return;
  const double scale = t.item().toDouble();
  TORCH_CHECK_VALUE(std::isfinite(scale) && scale > 0,
                    "pysupcon: scale must be finite and greater than 0, got ", scale);
}

inline void check_epsilon(double epsilon) {
  TORCH_CHECK_VALUE(std::isfinite(epsilon), "pysupcon: epsilon must be finite, got ", epsilon);
}

// Bytes [first, last) that a tensor's elements span.
struct Span {
  const char *first = nullptr, *last = nullptr;
  explicit Span(const at::Tensor& t) {
    if (!t.numel()) return;
    int64_t furthest = 0;
    for (int64_t d = 0; d < t.dim(); ++d) furthest += (t.size(d) - 1) * t.stride(d);
    first = static_cast<const char*>(t.const_data_ptr());
    last = first + (furthest + 1) * t.element_size();
  }
  bool meets(const Span& other) const { return first < other.last && other.first < last; }
};

// Where a gradient is added to.
inline void* check_gradient(const at::Tensor& g, const at::Tensor& rows, const char* name) {
  const auto type = rows.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  TORCH_CHECK_VALUE(g.sizes() == rows.sizes() && g.scalar_type() == type && g.is_contiguous() &&
                        g.device() == rows.device(),
                    "pysupcon: ", name, " must be a contiguous tensor of ", type, " and shape ", rows.sizes(),
                    " on ", rows.device(), ", got ", g.scalar_type(), " of shape ", g.sizes(),
                    " and strides ", g.strides(), " on ", g.device());
  // Who saved it for a backward of his own learns that it has changed.
  g.unsafeGetTensorImpl()->bump_version();
  return g.mutable_data_ptr();
}

// `read`: what is read while a gradient is written; undefined tensors may be among it.
inline void check_apart(const at::Tensor& gradient, const char* name, at::ArrayRef<at::Tensor> read) {
  const Span written(gradient);
  for (const at::Tensor& t : read)
    TORCH_CHECK_VALUE(!t.defined() || !written.meets(Span(t)), "pysupcon: ", name,
                      " must not share memory with another argument");
}

// Which forms of the backward there are: see pysupcon/pairs/ops.py. column_side: the candidates' own
// statistics are given.
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

// Of a CPU: each of the rows once.
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
