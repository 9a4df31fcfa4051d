// What the caller hands over: pointers, sizes, strides, a stream. Plain C++; no tensor is known here or
// below. The meaning of every operator stands in pysupcon/pairs/ops.py.
#pragma once
#include <cstdint>

namespace pysupcon::cuda {

// Problem::triangular_rows for everybody but a test: below it, launches cost what half of the pairs saves.
constexpr int64_t kTriangularRows = 8192;

enum class Dtype : int32_t { f64, f32, bf16, f16 };

enum class Operation : int32_t {
  pair_stats,
  pair_stats_backward,
  positive_softplus,
  positive_softplus_backward,
};

// One side of the similarity matrix as the caller holds it.
struct Rows {
  const void* data;          // [count, width] of Problem::dtype; element (i, d) stands at i * stride + d
  int64_t count;             // below 2^31 - 256
  int64_t stride;            // elements
  const int64_t* labels;     // [count]
  const int64_t* order;      // [count], sorts the rows by label, then by instance
  const int64_t* instances;  // [count]; null: there are none
};

// All pointers lie in device memory and are contiguous. positive_softplus writes its total to out_n; its
// upstream gradient comes in grad_n.
struct Problem {
  Operation operation;
  Dtype dtype;
  int32_t parts;  // f32 only: how many bf16 numbers stand for one fp32 number, 1, 2 or 3
  int32_t multiprocessors;
  int32_t shared_memory;    // bytes of a multiprocessor
  int64_t triangular_rows;  // from so many rows on, the forward visits half of the pairs where it may
  int64_t width;
  Rows anchors;
  Rows candidates;            // equal to anchors where one_set
  bool one_set;               // the candidates are the anchors themselves
  const int64_t* self_index;  // [anchors] or null
  const double* scale;        // [1]
  double epsilon;
  bool negatives, positives;
  // Logarithms of the weights of rows as candidates of others; null: all are 1. -inf: not a candidate. With
  // candidates, log_weights are read only where the candidates are anchors, too (candidate_n).
  const double *log_weights, *candidate_log_weights;  // [anchors], [candidates]; null where one_set

  const double *n, *p, *grad_n, *grad_p;                                          // [anchors]
  const double *grad_positive_sum, *grad_instance_sum;                            // [anchors] or null
  const double *candidate_n, *candidate_p, *candidate_grad_n, *candidate_grad_p;  // [candidates] or null
  const double *candidate_grad_positive_sum, *candidate_grad_instance_sum;        // [candidates] or null
  double *out_n, *out_p, *out_positive_sum, *out_instance_sum;                    // [anchors]
  // Added to: [anchors, width]; [candidates, width] or null; double for Dtype::f64, float otherwise.
  void *grad_x, *grad_candidates;
  double* out_grad_n;  // [anchors] or null

  void* workspace;  // workspace_bytes(problem) bytes, 256-byte aligned, any contents
  void* stream;     // cudaStream_t
};

extern "C" {
// Bytes of device memory that run() needs beside its operands.
int64_t pysupcon_cuda_workspace_bytes(const Problem* problem);
// Enqueues the operation. Returns null, or the sentence that says what went wrong. Never waits for the
// device.
const char* pysupcon_cuda_run(const Problem* problem);
// A device's number of multiprocessors and the shared memory of each, in bytes; 0 if there is no such device.
void pysupcon_cuda_device(int32_t device, int32_t* multiprocessors, int32_t* shared_memory);
}

}  // namespace pysupcon::cuda
