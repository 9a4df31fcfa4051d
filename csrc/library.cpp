// The schemas of all operators of pysupcon. cpu_glue.cpp and cuda_glue.cpp register the implementations.
// pysupcon/pairs/ops.py has the contracts (shapes, dtypes, meaning) and the fake implementations for tracing.
#include <torch/library.h>

#define ROWS "Tensor x, Tensor labels, Tensor order, Tensor scale"
#define CANDIDATES "Tensor? candidates, Tensor? candidate_labels, Tensor? candidate_order, Tensor? self_index"
#define INSTANCES "Tensor? instances, Tensor? candidate_instances"
#define WEIGHTS "Tensor? log_weights, Tensor? candidate_log_weights"
#define GRADIENTS "Tensor(a!) grad_x, Tensor(b!)? grad_candidates"

TORCH_LIBRARY(pysupcon, m) {
  m.def("order_by_class(Tensor ids, int views) -> (Tensor order, Tensor count)");

  m.def("pair_stats(" ROWS ", " CANDIDATES ", " INSTANCES ", " WEIGHTS
        ", bool negatives, bool positives, Tensor(a!)? negative_mean=None)"
        " -> (Tensor n, Tensor p, Tensor positive_sum, Tensor instance_sum)");
  m.def("pair_stats_backward(" ROWS ", " CANDIDATES ", " INSTANCES ", " WEIGHTS
        ", Tensor n, Tensor p, Tensor grad_n, Tensor grad_p"
        ", Tensor? grad_positive_sum, Tensor? grad_instance_sum"
        ", Tensor? candidate_n, Tensor? candidate_p, Tensor? candidate_grad_n, Tensor? candidate_grad_p"
        ", Tensor? candidate_grad_positive_sum, Tensor? candidate_grad_instance_sum"
        ", bool negatives, bool positives, " GRADIENTS ") -> ()");

  m.def("positive_softplus(" ROWS ", " CANDIDATES ", " WEIGHTS ", Tensor n, float epsilon) -> Tensor total");
  m.def("positive_softplus_backward(" ROWS ", " CANDIDATES ", " WEIGHTS
        ", Tensor n, float epsilon, Tensor grad_total, Tensor? candidate_n, Tensor? candidate_grad_total"
        ", " GRADIENTS ") -> Tensor grad_n");
}
