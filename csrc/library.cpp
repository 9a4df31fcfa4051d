// The operator schemas of pysupcon, all in one place. Kernels register themselves per device in cpu/ and
// cuda/; fakes for tracing stand in pysupcon/_ops.py. Contracts (shapes, dtypes, meaning): pysupcon/_ops.py.
#include <torch/library.h>

#define ROWS "Tensor x, Tensor labels, Tensor order, Tensor scale"
#define CANDIDATES "Tensor? candidates, Tensor? candidate_labels, Tensor? candidate_order, Tensor? self_index"

TORCH_LIBRARY(pysupcon, m) {
  m.def("pair_stats(" ROWS ", " CANDIDATES ", bool negatives, bool positives) -> (Tensor n, Tensor p)");
  m.def("pair_stats_backward(" ROWS ", " CANDIDATES
        ", Tensor n, Tensor p, Tensor grad_n, Tensor grad_p"
        ", Tensor? candidate_n, Tensor? candidate_p, Tensor? candidate_grad_n, Tensor? candidate_grad_p"
        ", bool negatives, bool positives, bool need_candidates) -> (Tensor grad_x, Tensor grad_candidates)");

  m.def("positive_softplus(" ROWS ", " CANDIDATES ", Tensor n, float epsilon) -> Tensor total");
  m.def("positive_softplus_backward(" ROWS ", " CANDIDATES
        ", Tensor n, float epsilon, Tensor grad_total, Tensor? candidate_n, Tensor? candidate_grad_total"
        ", bool need_candidates) -> (Tensor grad_x, Tensor grad_candidates, Tensor grad_n)");

  m.def("positive_sum(" ROWS ", " CANDIDATES ") -> Tensor total");
  m.def("positive_sum_backward(" ROWS ", " CANDIDATES
        ", Tensor grad_total, Tensor? candidate_grad_total, bool need_candidates)"
        " -> (Tensor grad_x, Tensor grad_candidates)");
}
