// The operators: which kernels run, in which order, on which part of the workspace. Everything is enqueued on
// one stream; nothing waits for the device and nothing is allocated, so a CUDA graph can hold it.
#include "backward.cuh"
#include "class_sums.cuh"
#include "kernels.h"
#include "plain.cuh"
#include "plan.h"

namespace pysupcon::cuda {
namespace {

// Launches in order, until one fails.
struct Stream {
  cudaStream_t stream;
  cudaError_t error = cudaSuccess;

  // one thread per element
  template <class... P, class... A>
  void each(int64_t count, void (*kernel)(P...), A&&... args) {
    if (count > 0) grid(dim3(unsigned(divide_up(count, 256))), dim3(256), kernel, static_cast<A&&>(args)...);
  }
  template <class... P, class... A>
  void grid(dim3 blocks, dim3 threads, void (*kernel)(P...), A&&... args) {
    if (error == cudaSuccess && blocks.x > 0)
      error = gpu::launch(kernel, blocks, threads, 0, stream, static_cast<A&&>(args)...);
  }
  void clear(void* p, int value, int64_t bytes) {
    if (error == cudaSuccess && bytes > 0) error = cudaMemsetAsync(p, value, size_t(bytes), stream);
  }
};

int2* pairs_of(int32_t* p) { return reinterpret_cast<int2*>(p); }
float2* pairs_of(float* p) { return reinterpret_cast<float2*>(p); }
template <class T>
T* as(void* p) {
  return static_cast<T*>(p);
}
template <class T>
const T* as(const void* p) {
  return static_cast<const T*>(p);
}

// Every row's class on the other side, and which row is which.
void find_pairs(Stream& s, const Problem& p, const Workspace& w) {
  const int m = int(p.anchors.count), n = int(p.candidates.count);
  if (p.self_index) s.each(n, invert_order, w.candidate_inverse, p.candidates.order, n);
  s.each(m, find_ranges, pairs_of(w.anchor_range), w.anchor_self, p.anchors, p.candidates, p.self_index,
         static_cast<const int*>(w.candidate_inverse));
  if (w.candidate_range)
    s.each(n, find_ranges, pairs_of(w.candidate_range), static_cast<int*>(nullptr), p.candidates, p.anchors,
           static_cast<const int64_t*>(nullptr), static_cast<const int*>(nullptr));
}

bool same_class_only(const Problem& p) {
  return p.operation == Operation::positive_softplus ||
         p.operation == Operation::positive_softplus_backward || !p.negatives;
}

// ------------------------------------------------------------------------------------------------ double
// precision

PlainPairs plain_pairs(const Problem& p, const Workspace& w, bool swapped) {
  return {swapped ? p.candidates : p.anchors,
          swapped ? p.anchors : p.candidates,
          int(p.width),
          pairs_of(swapped ? w.candidate_range : w.anchor_range),
          swapped ? nullptr : w.anchor_self,
          swapped ? w.anchor_self : nullptr,
          p.one_set,
          same_class_only(p),
          as<double>(p.scale)};
}

void run_plain(Stream& s, const Problem& p, const Workspace& w) {
  const dim3 block(kPlain, kPlain);
  const bool softplus =
      p.operation == Operation::positive_softplus || p.operation == Operation::positive_softplus_backward;
  const PlainPairs pairs = plain_pairs(p, w, false);
  const dim3 rows(unsigned(divide_up(p.anchors.count, kPlain)), unsigned(divide_up(p.width, 4 * kPlain)));
  if (p.operation == Operation::pair_stats || p.operation == Operation::positive_softplus) {
    s.grid(dim3(rows.x), block, plain_forward, pairs, as<double>(p.out_n), as<double>(p.out_p), p.negatives,
           p.positives, softplus ? as<double>(p.n) : nullptr, p.epsilon);
    return;
  }
  const PlainAnchors none{};
  const PlainAnchors anchors{as<double>(p.n), as<double>(p.p), as<double>(p.grad_n), as<double>(p.grad_p),
                             p.anchors.order};
  PlainAnchors candidates{as<double>(p.candidate_n), as<double>(p.candidate_p),
                          as<double>(p.candidate_grad_n), as<double>(p.candidate_grad_p), p.candidates.order};
  if (p.one_set) candidates = anchors;
  s.grid(rows, block, plain_backward, pairs, anchors, candidates, as<double>(p.grad_x),
         as<double>(p.out_grad_n), p.epsilon);
  if (p.grad_candidates)
    s.grid(dim3(unsigned(divide_up(p.candidates.count, kPlain)), rows.y), block, plain_backward,
           plain_pairs(p, w, true), none, anchors, as<double>(p.grad_candidates),
           static_cast<double*>(nullptr), p.epsilon);
}

// ---------------------------------------------------------------------------------------------------- class
// sums

template <class T>
void run_sums(Stream& s, const Problem& p, const Workspace& w) {
  using A = typename Accumulator<T>::type;
  const int m = int(p.anchors.count), n = int(p.candidates.count), width = int(p.width);
  const A *upstream = as<A>(p.grad_n), *scale = as<A>(p.scale);
  const WeightedRows<T> candidates{p.candidates, nullptr, w.candidate_sums, width};
  const dim3 blocks(unsigned(divide_up(m, kSumRows))), threads(kSumThreads);
  const auto build = [&](const WeightedRows<T>& x) {
    if (s.error == cudaSuccess) s.error = build_tree(x, s.stream);
  };
  build(candidates);
  if (p.operation == Operation::positive_sum) {
    const WeightedRows<T> anchors{p.anchors, nullptr, {}, width};
    s.grid(blocks, threads, positive_sum<T>, as<A>(p.out_n), anchors, candidates, pairs_of(w.anchor_range),
           static_cast<const int*>(w.anchor_self), p.one_set, scale);
    return;
  }
  const WeightedRows<T> weighted{p.candidates, p.one_set ? upstream : as<A>(p.candidate_grad_n),
                                 w.candidate_weighted, width};
  if (weighted.weights) build(weighted);
  s.grid(blocks, threads, positive_sum_gradient<T>, as<A>(p.grad_x), p.anchors.order, m, upstream, candidates,
         weighted, pairs_of(w.anchor_range), static_cast<const int*>(w.anchor_self), p.one_set, scale);
  if (p.grad_candidates) {
    const WeightedRows<T> anchors{p.anchors, upstream, w.anchor_weighted, width};
    build(anchors);
    if (p.self_index) {
      s.clear(w.candidate_anchor, 0xff, 4 * int64_t(n));
      s.each(m, invert_self, w.candidate_anchor, static_cast<const int*>(w.anchor_self), m);
    }
    s.grid(dim3(unsigned(divide_up(n, kSumRows))), threads, positive_sum_gradient<T>,
           as<A>(p.grad_candidates), p.candidates.order, n, static_cast<const A*>(nullptr), anchors, anchors,
           pairs_of(w.candidate_range), static_cast<const int*>(w.candidate_anchor), false, scale);
  }
}

// ---------------------------------------------------------------------------------------------------- tensor
// cores

template <class In, class F, int PARTS>
void gather(Stream& s, const Rows& rows, void* out, const Problem& p) {
  const int chunks = int(row_chunks(p));
  s.each(rows.count * chunks, gather_rows<In, F, PARTS>, as<uint4>(out), rows, int(p.width), chunks);
}

template <class F, int PARTS>
void run_forward(Stream& s, const Problem& p, const Workspace& w, const Pairs& pairs) {
  if (s.error != cudaSuccess || p.anchors.count == 0) return;
  float4* parts = as<float4>(static_cast<void*>(w.parts));
  if (p.operation == Operation::pair_stats) {
    const Statistics::Args args{as<float>(p.out_n), as<float>(p.out_p), p.anchors.order,
                                p.negatives,        p.positives,        parts};
    s.error = forward<F, PARTS, Statistics>(pairs, args, w.anchor_splits, s.stream);
  } else {
    const SoftplusSum::Args args{as<float>(p.out_n), as<float>(p.n), p.anchors.order, float(p.epsilon),
                                 parts};
    s.error = forward<F, PARTS, SoftplusSum>(pairs, args, w.anchor_splits, s.stream);
  }
}

void pack(Stream& s, const Rows& rows, float* out, const void* statistic, const void* gradient, float epsilon,
          const float* largest) {
  const int padded = int(divide_up(rows.count, kCoefficientPadding) * kCoefficientPadding);
  s.each(padded, pack_coefficients, pairs_of(out), as<float>(statistic), as<float>(gradient), epsilon,
         rows.order, largest, int(rows.count), padded);
}

template <class F, int PARTS>
void run_backward(Stream& s, const Problem& p, const Workspace& w, const Pairs& pairs, const Pairs& swapped) {
  const bool softplus = p.operation == Operation::positive_softplus_backward;
  const float epsilon = softplus ? float(p.epsilon) : 0.f;
  const int m = int(p.anchors.count), n = int(p.candidates.count);

  s.clear(w.largest, 0, 4);
  const auto largest = [&](const void* a, const void* b, int count) {
    const unsigned blocks = unsigned(divide_up(count, 256));
    s.grid(dim3(blocks < 256 ? blocks : 256), dim3(256), find_largest, w.largest, as<float>(a), as<float>(b),
           int64_t(count));
  };
  largest(p.grad_n, p.grad_p, m);
  if (w.candidate_n) largest(p.candidate_grad_n, p.candidate_grad_p, n);
  pack(s, p.anchors, w.anchor_n, p.n, p.grad_n, epsilon, w.largest);
  if (w.anchor_p && w.anchor_p != w.anchor_n) pack(s, p.anchors, w.anchor_p, p.p, p.grad_p, 0.f, w.largest);
  if (w.candidate_n)
    pack(s, p.candidates, w.candidate_n, p.candidate_n, p.candidate_grad_n, epsilon, w.largest);
  if (w.candidate_p) pack(s, p.candidates, w.candidate_p, p.candidate_p, p.candidate_grad_p, 0.f, w.largest);

  const Coefficients none{}, anchors{pairs_of(w.anchor_n), pairs_of(w.anchor_p)};
  const Coefficients candidates =
      p.one_set ? anchors : Coefficients{pairs_of(w.candidate_n), pairs_of(w.candidate_p)};
  const auto run = [&](const Pairs& x, const Coefficients& rows, const Coefficients& cols, const Rows& owner,
                       void* grad, void* grad_n, int splits) {
    if (s.error != cudaSuccess || owner.count == 0) return;
    const Gradient out{as<float>(grad),
                       owner.order,
                       int(owner.count),
                       int(p.width),
                       as<float>(p.scale),
                       w.largest,
                       splits > 1 ? w.parts : nullptr};
    if (!softplus) {
      s.error = backward<F, PARTS, StatisticsWeights>(x, {rows, cols}, out, splits, s.stream);
      return;
    }
    const SoftplusWeights::Args args{rows,
                                     cols,
                                     as<float>(p.grad_n),
                                     as<float>(p.n),
                                     owner.order,
                                     as<float>(grad_n),
                                     splits > 1 ? w.row_parts : nullptr};
    s.error = backward<F, PARTS, SoftplusWeights>(x, args, out, splits, s.stream);
    if (grad_n && splits > 1) s.each(owner.count, merge_sigmoids, args, int(owner.count), splits);
  };
  run(pairs, anchors, candidates, p.anchors, p.grad_x, p.out_grad_n, w.anchor_splits);
  if (p.grad_candidates)
    run(swapped, none, anchors, p.candidates, p.grad_candidates, nullptr, w.candidate_splits);
}

template <class In, class F, int PARTS>
void run_pairs(Stream& s, const Problem& p, const Workspace& w) {
  gather<In, F, PARTS>(s, p.anchors, w.anchor_rows, p);
  if (!p.one_set) gather<In, F, PARTS>(s, p.candidates, w.candidate_rows, p);
  const Operand anchors{as<uint4>(w.anchor_rows), int(p.anchors.count), int(row_chunks(p))};
  const Operand candidates{as<uint4>(w.candidate_rows), int(p.candidates.count), int(row_chunks(p))};
  const float* scale = as<float>(p.scale);
  const bool within = same_class_only(p);
  const Pairs pairs{anchors, candidates, pairs_of(w.anchor_range), w.anchor_self, nullptr, p.one_set,
                    within,  scale};
  const Pairs swapped{candidates, anchors, pairs_of(w.candidate_range), nullptr, w.anchor_self, false,
                      within,     scale};
  if (p.operation == Operation::pair_stats || p.operation == Operation::positive_softplus)
    run_forward<F, PARTS>(s, p, w, pairs);
  else
    run_backward<F, PARTS>(s, p, w, pairs, swapped);
}

}  // namespace

extern "C" int64_t pysupcon_cuda_workspace_bytes(const Problem* problem) { return lay_out(*problem).bytes; }

extern "C" const char* pysupcon_cuda_run(const Problem* problem) {
  const Problem& p = *problem;
  const Workspace w = lay_out(p);
  Stream s{static_cast<cudaStream_t>(p.stream)};
  if (p.anchors.count > kMaxRows || p.candidates.count > kMaxRows || p.width > (int64_t(1) << 21))
    return "more than 2^31 - 256 rows or 2^21 columns";
  find_pairs(s, p, w);
  if (p.operation == Operation::positive_sum || p.operation == Operation::positive_sum_backward) {
    if (p.dtype == Dtype::f64) run_sums<double>(s, p, w);
    if (p.dtype == Dtype::f32) run_sums<float>(s, p, w);
    if (p.dtype == Dtype::bf16) run_sums<__nv_bfloat16>(s, p, w);
    if (p.dtype == Dtype::f16) run_sums<__half>(s, p, w);
  } else {
    if (p.dtype == Dtype::f64) run_plain(s, p, w);
    if (p.dtype == Dtype::bf16) run_pairs<__nv_bfloat16, gpu::Bf16, 1>(s, p, w);
    if (p.dtype == Dtype::f16) run_pairs<__half, gpu::F16, 1>(s, p, w);
    if (p.dtype == Dtype::f32 && p.parts == 1) run_pairs<float, gpu::Bf16, 1>(s, p, w);
    if (p.dtype == Dtype::f32 && p.parts == 2) run_pairs<float, gpu::Bf16, 2>(s, p, w);
    if (p.dtype == Dtype::f32 && p.parts == 3) run_pairs<float, gpu::Bf16, 3>(s, p, w);
  }
  return s.error == cudaSuccess ? nullptr : cudaGetErrorString(s.error);
}

extern "C" int32_t pysupcon_cuda_multiprocessors(int32_t device) {
  int count = 0;
  return cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device) == cudaSuccess ? count : 0;
}

}  // namespace pysupcon::cuda
