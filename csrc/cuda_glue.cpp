// Checks tensors, passes their pointers to the CUDA kernels and registers the operators with the dispatcher.
// Includes no CUDA header: stream and device come through c10, so that this file compiles against any build
// of torch. Contracts of the operators: pysupcon/pairs/ops.py.
#include <ATen/Context.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <torch/library.h>

#include <optional>
#include <tuple>
#include <vector>

#include "arguments.h"
#include "cuda/launch.h"

namespace pysupcon {
namespace {

using at::Tensor;
using cuda::Operation;
using cuda::Problem;

// The number of bf16 terms that an fp32 number is split into: 3, unless torch.set_float32_matmul_precision
// ("high": 2, "medium": 1) or torch.backends.cuda.matmul.fp32_precision ("tf32": 2) allows fewer.
int parts_of_float32() {
  const at::Context& context = at::globalContext();
  const auto precision = context.float32Precision(at::Float32Backend::CUDA, at::Float32Op::MATMUL);
  if (precision == at::Float32Precision::BF16) return 1;
  if (precision != at::Float32Precision::TF32) return 3;
  try {
    return context.float32MatmulPrecision() == at::Float32MatmulPrecision::MEDIUM ? 1 : 2;
  } catch (const c10::Error&) {  // torch raises if the newer setting was used
    return 2;
  }
}

// Checks the arguments and owns the memory that `problem` points to. The caching allocator does not reuse
// that memory before the kernels have finished.
class Call {
 public:
  Call(Operation operation, const Rows& a, const Candidates& b, const Instances& given = {})
      : device_(a.x.device()), guard_(device_) {
    problem.operation = operation;
    problem.dtype = check_operands<cuda::Dtype>(a, b, given);
    problem.parts = parts_of_float32();
    problem.width = a.x.size(1);
    problem.negatives = problem.positives = true;
    problem.triangular_rows = cuda::kTriangularRows;
    scale_ = a.scale.to(at::kDouble);
    problem.scale = scale_.const_data_ptr<double>();
    problem.anchors = side(a.x, a.labels, a.order, "labels", "order", tensors_);
    if (given.anchors) {
      tensors_.instances = indices(*given.anchors, a.x.size(0), "instances");
      problem.anchors.instances = tensors_.instances.const_data_ptr<int64_t>();
    }
    problem.one_set = !b.rows.has_value();
    problem.candidates = problem.anchors;
    if (!problem.one_set) {
      problem.candidates = side(*b.rows, *b.labels, *b.order, "candidate_labels", "candidate_order", others_);
      if (given.candidates) {
        others_.instances = indices(*given.candidates, b.rows->size(0), "candidate_instances");
        problem.candidates.instances = others_.instances.const_data_ptr<int64_t>();
      }
      if (b.self_index) {
        self_index_ = indices(*b.self_index, a.x.size(0), "self_index");
        problem.self_index = self_index_.const_data_ptr<int64_t>();
      }
    }
    cuda::pysupcon_cuda_device(device_.has_index() ? device_.index() : 0, &problem.multiprocessors,
                               &problem.shared_memory);
  }

  // A statistic, [rows].
  Tensor new_stats() const { return new_tensor({problem.anchors.count}, at::kDouble); }
  // A statistic or its upstream gradient as double; this object keeps the tensor alive.
  const double* stat(const Maybe& t, bool of_candidates, const char* name) {
    if (!t) return nullptr;
    const int64_t rows = of_candidates ? problem.candidates.count : problem.anchors.count;
    check_statistic(*t, rows, device_, name);
    kept_.push_back(t->to(at::kDouble).contiguous());
    return kept_.back().const_data_ptr<double>();
  }
  // Sets the candidates' weights. column_side: the candidates are anchors, too.
  void weights(const Maybe& log_weights, const Maybe& candidate_log_weights, bool column_side) {
    const Maybe candidates = problem.one_set ? Maybe() : Maybe(others_.x);
    check_weights(tensors_.x, candidates, log_weights, candidate_log_weights, column_side);
    problem.log_weights = stat(log_weights, false, "log_weights");
    problem.candidate_log_weights = stat(candidate_log_weights, true, "candidate_log_weights");
  }
  // Sets the buffers that gradients are added to. Call it after every stat() and weights().
  void gradients(bool column_side, const Tensor& grad_x, const Maybe& grad_candidates) {
    check_form(column_side, !problem.one_set, self_index_.defined(), grad_candidates.has_value());
    if (grad_candidates) {
      check_apart(*grad_candidates, "grad_candidates", grad_x);
      void* const to = gradient(*grad_candidates, others_.x, "grad_candidates");
      if (problem.candidates.count) problem.grad_candidates = to;
    }
    problem.grad_x = gradient(grad_x, tensors_.x, "grad_x");
  }
  void run() {
    if (problem.anchors.count == 0 && !problem.grad_candidates) return;
    const Tensor workspace = new_tensor({cuda::pysupcon_cuda_workspace_bytes(&problem)}, at::kByte);
    problem.workspace = workspace.mutable_data_ptr();
    const c10::impl::VirtualGuardImpl device(device_.type());
    problem.stream = device_.is_cpu() ? nullptr : device.getStream(device_).native_handle();
    const char* error = cuda::pysupcon_cuda_run(&problem);
    TORCH_CHECK(!error, "pysupcon: the CUDA kernels could not start: ", error);
  }

  Problem problem{};

 private:
  struct Tensors {
    Tensor x, labels, order, instances;
  };
  Tensor new_tensor(at::IntArrayRef size, at::ScalarType type) const {
    return at::empty(size, at::TensorOptions().dtype(type).device(device_));
  }
  void* gradient(const Tensor& g, const Tensor& rows, const char* name) const {
    void* const to = check_gradient(g, rows, name);
    check_apart(g, name, {tensors_.x, tensors_.labels, tensors_.order});
    check_apart(g, name, {others_.x, others_.labels, others_.order, self_index_, scale_});
    check_apart(g, name, {tensors_.instances, others_.instances});
    check_apart(g, name, kept_);
    return to;
  }
  Tensor indices(const Tensor& t, int64_t rows, const char* name) const {
    check_index(t, rows, device_, name);
    return t.contiguous();
  }
  cuda::Rows side(const Tensor& x, const Tensor& labels, const Tensor& order, const char* labels_name,
                  const char* order_name, Tensors& keep) const {
    keep.x = x.stride(1) == 1 || x.size(1) == 1 ? x : x.contiguous();
    keep.labels = indices(labels, x.size(0), labels_name);
    keep.order = indices(order, x.size(0), order_name);
    return {keep.x.const_data_ptr(),
            x.size(0),
            keep.x.stride(0),
            keep.labels.const_data_ptr<int64_t>(),
            keep.order.const_data_ptr<int64_t>(),
            nullptr};
  }

  c10::Device device_;
  c10::DeviceGuard guard_;
  Tensors tensors_, others_;
  Tensor self_index_, scale_;
  std::vector<Tensor> kept_;
};

std::tuple<Tensor, Tensor, Tensor, Tensor> pair_stats(PAIR_STATS_ARGS) {
  TORCH_CHECK_NOT_IMPLEMENTED(!negative_mean, "pysupcon: the CUDA kernels do not compute negative_mean");
  Call call(Operation::pair_stats, ROWS_AND_CANDIDATES, INSTANCES);
  const Tensor n = call.new_stats(), p = call.new_stats(), positive_sum = call.new_stats(),
               instance_sum = call.new_stats();
  Problem& problem = call.problem;
  call.weights(log_weights, candidate_log_weights, false);
  problem.negatives = negatives;
  problem.positives = positives;
  problem.out_n = n.mutable_data_ptr<double>();
  problem.out_p = p.mutable_data_ptr<double>();
  problem.out_positive_sum = positive_sum.mutable_data_ptr<double>();
  problem.out_instance_sum = instance_sum.mutable_data_ptr<double>();
  call.run();
  return {n, p, positive_sum, instance_sum};
}

void pair_stats_backward(PAIR_STATS_BACKWARD_ARGS) {
  Call call(Operation::pair_stats_backward, ROWS_AND_CANDIDATES, INSTANCES);
  const bool column_side = check_column_side(candidate_n, candidate_p, candidate_grad_n, candidate_grad_p,
                                             candidate_grad_positive_sum, candidate_grad_instance_sum);
  Problem& problem = call.problem;
  call.weights(log_weights, candidate_log_weights, column_side);
  problem.negatives = negatives;
  problem.positives = positives;
  problem.n = call.stat(n, false, "n");
  problem.p = call.stat(p, false, "p");
  problem.grad_n = call.stat(grad_n, false, "grad_n");
  problem.grad_p = call.stat(grad_p, false, "grad_p");
  problem.grad_positive_sum = call.stat(grad_positive_sum, false, "grad_positive_sum");
  problem.grad_instance_sum = call.stat(grad_instance_sum, false, "grad_instance_sum");
  problem.candidate_n = call.stat(candidate_n, true, "candidate_n");
  problem.candidate_p = call.stat(candidate_p, true, "candidate_p");
  problem.candidate_grad_n = call.stat(candidate_grad_n, true, "candidate_grad_n");
  problem.candidate_grad_p = call.stat(candidate_grad_p, true, "candidate_grad_p");
  problem.candidate_grad_positive_sum =
      call.stat(candidate_grad_positive_sum, true, "candidate_grad_positive_sum");
  problem.candidate_grad_instance_sum =
      call.stat(candidate_grad_instance_sum, true, "candidate_grad_instance_sum");
  call.gradients(column_side, grad_x, grad_candidates);
  call.run();
}

Tensor positive_softplus(POSITIVE_SOFTPLUS_ARGS) {
  Call call(Operation::positive_softplus, ROWS_AND_CANDIDATES);
  check_epsilon(epsilon);
  call.weights(log_weights, candidate_log_weights, false);
  const Tensor total = call.new_stats();
  call.problem.n = call.stat(n, false, "n");
  call.problem.epsilon = epsilon;
  call.problem.out_n = total.mutable_data_ptr<double>();
  call.run();
  return total;
}

Tensor positive_softplus_backward(POSITIVE_SOFTPLUS_BACKWARD_ARGS) {
  Call call(Operation::positive_softplus_backward, ROWS_AND_CANDIDATES);
  const bool column_side = check_column_side(candidate_n, candidate_grad_total);
  check_epsilon(epsilon);
  call.weights(log_weights, candidate_log_weights, column_side);
  Problem& problem = call.problem;
  const Tensor grad_n = call.new_stats();
  problem.epsilon = epsilon;
  problem.n = call.stat(n, false, "n");
  problem.grad_n = call.stat(grad_total, false, "grad_total");
  problem.candidate_n = call.stat(candidate_n, true, "candidate_n");
  problem.candidate_grad_n = call.stat(candidate_grad_total, true, "candidate_grad_total");
  call.gradients(column_side, grad_x, grad_candidates);
  problem.out_grad_n = grad_n.mutable_data_ptr<double>();
  call.run();
  return grad_n;
}

}  // namespace
}  // namespace pysupcon

TORCH_LIBRARY_IMPL(pysupcon, CUDA, m) {
  m.impl("pair_stats", pysupcon::pair_stats);
  m.impl("pair_stats_backward", pysupcon::pair_stats_backward);
  m.impl("positive_softplus", pysupcon::positive_softplus);
  m.impl("positive_softplus_backward", pysupcon::positive_softplus_backward);
}
