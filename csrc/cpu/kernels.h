// What the CPU kernels see: pointers, sizes and strides. No torch here. Equations: ../README.md.
#pragma once
#include <cstdint>

namespace pysupcon::cpu {

enum class Type { f32, f64, bf16, f16 };

// One side of the pairs: anchors or candidates. "Position" counts rows in label order, "row" as they lie in
// memory.
struct Side {
  const void* rows = nullptr;      // row r starts at element r * stride; unit stride inside a row
  int64_t stride = 0;              // elements
  int64_t count = 0;               //
  const int64_t* order = nullptr;  // [count] position -> row, sorted by label
  // [count] numbers by position, ascending, the same on both sides: of the class, and of the instance (null:
  // no sum over instances is wanted)
  const int32_t *cls = nullptr, *instance = nullptr;
  const double* log_weight = nullptr;  // [count] by row, of the rows as candidates; null: all 0
};

struct Problem {
  Type type = Type::f32;
  int64_t dim = 0;
  Side anchors, candidates;  // self: both are the same
  bool self = false;         // j != i by position; otherwise by self_position
  const int32_t* self_position =
      nullptr;       // [anchors.count] candidate position that is the anchor itself, or -1; may be null
  double scale = 1;  // s_ij = scale x_i . c_j
  bool negatives = true, positives = true;  // which pairs matter: N_i, P_i
};

// The caller's threads. Results do not depend on their number.
struct Threads {
  int64_t (*count)();
  // Runs body(context, first, last) over [0, count), divided among threads. The first part runs in the
  // calling thread.
  void (*run)(int64_t count, void* context, void (*body)(void*, int64_t, int64_t));
  // Called in the calling thread some times a second while a pass runs; it may throw to stop the pass. Null:
  // nothing.
  void (*check)() = nullptr;
};

// What pair_stats leaves of every anchor, by row.
struct Stats {
  double *n, *p;         // logsumexp over N_i, P_i; -inf where empty or not asked for
  double* positive_sum;  // sum over P_i of s_ij
  double* instance_sum;  // the same over the rows of P_i of the anchor's instance; null without instances
  // sum_{N_i} e^{log_weight_j + s_ij - n_i} c_j of the rows [anchors.count, dim], zeros before the call, of
  // the type of a gradient; only of two sets; null: not wanted
  void* negative_mean = nullptr;
};
// Upstream gradients and statistics of one side, by row, or null: G_ij = u_i e^{s_ij - n_i} of a negative,
// v_i e^{s_ij - p_i} + w_i (+ a_i of the same instance) of a positive. With weights of candidates the
// exponentials are multiplied by that of j.
struct StatsGrad {
  const double *n = nullptr, *p = nullptr, *u = nullptr, *v = nullptr, *w = nullptr, *a = nullptr;
};
// Of the positive pass: dL/ds_ij = -w_i sigmoid(n_i - s_ij - log_weight_j + epsilon).
struct SoftplusGrad {
  const double *n = nullptr, *w = nullptr;
};
// Where gradients are added to, by row: float for every type but f64 (double). null: not wanted.
struct Gradients {
  void* anchors = nullptr;     // [anchors.count, dim] contiguous
  void* candidates = nullptr;  // [candidates.count, dim] contiguous; self: null
};

// The entry points. Statistics are double and indexed by row. Each returns when every thread is done.

// All NaN if a similarity is not finite. Everything about positives comes from the same rounded similarities,
// so that p - mean over P_i keeps its digits however small it is.
void pair_stats(const Problem&, const Threads&, const Stats&);

// Self: gradients.anchors += scale sum_j (G_ij + G_ji) x_j. Otherwise, with G from `anchors`: += scale sum_j
// G_ij c_j and, if wanted, gradients.candidates += scale sum_i G_ij x_i; a non-null `candidates` adds G_ji to
// the anchors' gradient.
void pair_stats_backward(const Problem&, const Threads&, const StatsGrad& anchors,
                         const StatsGrad& candidates, const Gradients&);

// total [anchors] = sum_{P_i} log(e^{log_weight_j} + e^{n_i - s_ij + epsilon}), without weights softplus
void positive_softplus(const Problem&, const Threads&, const double* n, double epsilon, double* total);

// The same three forms; grad_n [anchors] = w_i sum_{P_i} sigmoid(n_i - s_ij - log_weight_j + epsilon)
void positive_softplus_backward(const Problem&, const Threads&, const SoftplusGrad& anchors,
                                const SoftplusGrad& candidates, double epsilon, const Gradients&,
                                double* grad_n);

}  // namespace pysupcon::cpu
