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
    if (error == cudaSuccess && bytes > 0)
      error = gpu::checked(cudaMemsetAsync(p, value, size_t(bytes), stream));
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

// Every row's class on the other side, and which row is which: to be found by the next kernel.
struct BothRanges {
  Ranges anchors, candidates;
};
BothRanges ranges_of(Stream& s, const Problem& p, const Workspace& w) {
  if (p.self_index)
    s.each(p.candidates.count, invert_order, w.candidate_inverse, p.candidates.order,
           int(p.candidates.count));
  return {
      {pairs_of(w.anchor_range), w.anchor_self, p.anchors, p.candidates, p.self_index, w.candidate_inverse},
      {pairs_of(w.candidate_range), nullptr, p.candidates, p.anchors, nullptr, nullptr}};
}

// What every operator prepares: nothing yet that only some need.
Preparation preparation_of(const Problem& p, const Workspace& w, const BothRanges& ranges) {
  Preparation preparation{};
  preparation.sides[0] = p.anchors;
  if (!p.one_set) preparation.sides[1] = p.candidates;
  preparation.width = int(p.width);
  preparation.ranges[0] = ranges.anchors, preparation.ranges[1] = ranges.candidates;
  preparation.scale = p.scale, preparation.verdicts = w.verdicts;
  return preparation;
}

// ------------------------------------------------------------------------------------------------ double
// precision

PlainPairs plain_pairs(const Problem& p, const Workspace& w, bool swapped, const Verdicts& verdicts) {
  return {swapped ? p.candidates : p.anchors,
          swapped ? p.anchors : p.candidates,
          int(p.width),
          pairs_of(swapped ? w.candidate_range : w.anchor_range),
          swapped ? nullptr : w.anchor_self,
          swapped ? w.anchor_self : nullptr,
          p.one_set,
          within_classes(p),
          as<double>(p.scale),
          verdicts};
}

void run_plain(Stream& s, const Problem& p, const Workspace& w) {
  const BothRanges ranges = ranges_of(s, p, w);
  const int64_t chunks = divide_up(p.width, 8);
  Preparation preparation = preparation_of(p, w, ranges);
  preparation.part_size[0] = preparation.sides[0].count * chunks;
  preparation.part_size[1] = preparation.sides[1].count * chunks;
  s.grid(dim3(unsigned(preparation_blocks(preparation))), dim3(kThreads), prepare<double, void, 0>,
         preparation);
  const Verdicts verdicts{w.verdicts, verdict_blocks_of(preparation)};
  const dim3 block(kPlain, kPlain);
  const bool softplus =
      p.operation == Operation::positive_softplus || p.operation == Operation::positive_softplus_backward;
  const PlainPairs pairs = plain_pairs(p, w, false, verdicts);
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
           plain_pairs(p, w, true, verdicts), none, anchors, as<double>(p.grad_candidates),
           static_cast<double*>(nullptr), p.epsilon);
}

// ---------------------------------------------------------------------------------------------------- class
// sums

template <class T>
void run_sums(Stream& s, const Problem& p, const Workspace& w) {
  using A = typename Accumulator<T>::type;
  const int m = int(p.anchors.count), n = int(p.candidates.count), width = int(p.width);
  const bool forward = p.operation == Operation::positive_sum;
  const A *upstream = as<A>(p.grad_n), *scale = as<A>(p.scale);
  const WeightedRows<T> candidates{p.candidates, nullptr, w.candidate_sums, width};
  const WeightedRows<T> weighted{p.candidates, p.one_set ? upstream : as<A>(p.candidate_grad_n),
                                 w.candidate_weighted, width};
  const WeightedRows<T> anchors{p.anchors, upstream, w.anchor_weighted, width};
  const int *self = w.anchor_self, *none = nullptr;
  const dim3 threads(kThreads);

  const BothRanges ranges = ranges_of(s, p, w);
  const Trees<T> trees{{candidates, weighted, anchors}};  // one that is not wanted has no level
  const int64_t blocks =
      trees.entries(0) + divide_up(m, kThreads) + (p.grad_candidates ? divide_up(n, kThreads) : 0);
  s.grid(dim3(unsigned(blocks)), threads, prepare_sums<T>, trees, ranges.anchors, ranges.candidates);
  for (int level = 1; trees.entries(level); ++level)
    s.grid(dim3(unsigned(trees.entries(level))), threads, sum_level<T>, trees, level);

  const dim3 anchor_blocks(unsigned(divide_up(m, kSumRows)));
  if (forward) {
    const WeightedRows<T> plain_anchors{p.anchors, nullptr, {}, width};
    s.grid(anchor_blocks, threads, positive_sum<T>, as<A>(p.out_n), plain_anchors, candidates,
           ranges.anchors.range, self, p.one_set, scale);
    return;
  }
  s.grid(anchor_blocks, threads, positive_sum_gradient<T>, as<A>(p.grad_x), p.anchors.order, m, upstream,
         candidates, weighted, ranges.anchors.range, self, p.one_set, scale);
  if (p.grad_candidates) {
    if (p.self_index) {
      s.clear(w.candidate_anchor, 0xff, 4 * int64_t(n));
      s.each(m, invert_self, w.candidate_anchor, self, m);
    }
    s.grid(dim3(unsigned(divide_up(n, kSumRows))), threads, positive_sum_gradient<T>,
           as<A>(p.grad_candidates), p.candidates.order, n, static_cast<const A*>(nullptr), anchors, anchors,
           ranges.candidates.range, p.self_index ? static_cast<const int*>(w.candidate_anchor) : none, false,
           scale);
  }
}

// ---------------------------------------------------------------------------------------------------- tensor
// cores

template <class F, int PARTS>
void run_forward(Stream& s, const Problem& p, const Workspace& w, const Pairs& pairs) {
  if (s.error != cudaSuccess || p.anchors.count == 0) return;
  float4* parts = as<float4>(static_cast<void*>(w.parts));
  if (p.operation == Operation::pair_stats) {
    const Statistics::Args args{
        as<float>(p.out_n), as<float>(p.out_p), p.anchors.order, p.negatives, p.positives, parts, w.arrivals};
    s.error = forward<F, PARTS, Statistics>(pairs, w.anchor_runs, w.triangle, args, s.stream);
  } else {
    const SoftplusSum::Args args{as<float>(p.out_n), as<float>(p.n), p.anchors.order,
                                 float(p.epsilon),   parts,          w.arrivals};
    s.error = forward<F, PARTS, SoftplusSum>(pairs, w.anchor_runs, w.triangle, args, s.stream);
  }
}

template <class F, int PARTS>
void run_backward(Stream& s, const Problem& p, const Workspace& w, const Pairs& pairs, const Pairs& swapped) {
  const bool softplus = p.operation == Operation::positive_softplus_backward;
  const Extremes* extremes = as<Extremes>(static_cast<void*>(w.extremes));
  const Shape shape = pair_shape(p);
  const Coefficients none{}, anchors{pairs_of(w.anchor_n), pairs_of(w.anchor_p)};
  const Coefficients candidates =
      p.one_set ? anchors : Coefficients{pairs_of(w.candidate_n), pairs_of(w.candidate_p)};
  const auto run = [&](const Pairs& x, const Coefficients& rows, const Coefficients& cols, const Rows& owner,
                       void* grad, void* grad_n, const Runs& runs, int32_t* arrivals) {
    if (s.error != cudaSuccess || owner.count == 0) return;
    const Gradient out{as<float>(grad), owner.order, int(owner.count), int(p.width), as<float>(p.scale),
                       extremes,        w.parts,     w.row_parts,      arrivals};
    if (!softplus) {
      const StatisticsWeights::Args args{rows, cols, p.negatives, p.positives, extremes};
      s.error = backward<F, PARTS, StatisticsWeights>(x, runs, shape, args, out, s.stream);
    } else {
      const SoftplusWeights::Args args{rows,           cols,        as<float>(p.grad_n),
                                       as<float>(p.n), owner.order, as<float>(grad_n)};
      s.error = backward<F, PARTS, SoftplusWeights>(x, runs, shape, args, out, s.stream);
    }
  };
  run(pairs, anchors, candidates, p.anchors, p.grad_x, p.out_grad_n, w.anchor_runs, w.arrivals);
  if (p.grad_candidates)
    run(swapped, none, anchors, p.candidates, p.grad_candidates, nullptr, w.candidate_runs,
        w.arrivals + w.anchor_runs.row_blocks * shape.shares);
}

// What the backward asks of the anchors of both sides.
Upstreams upstreams_of(const Problem& p, const Workspace& w, int parts) {
  Upstreams u{};
  const auto anchors = [&](const void* statistic, const void* gradient, const Rows& rows, float* out) {
    return Upstream{as<float>(statistic), as<float>(gradient), rows.order, rows.count, pairs_of(out)};
  };
  u.of[0] = anchors(p.n, p.grad_n, p.anchors, w.anchor_n);
  u.of[1] = anchors(p.p, p.grad_p, p.anchors, w.anchor_p == w.anchor_n ? nullptr : w.anchor_p);
  u.of[2] = anchors(p.candidate_n, p.candidate_grad_n, p.candidates, w.candidate_n);
  u.of[3] = anchors(p.candidate_p, p.candidate_grad_p, p.candidates, w.candidate_p);
  u.epsilon = p.operation == Operation::positive_softplus_backward ? float(p.epsilon) : 0.f;
  u.one = p.operation == Operation::pair_stats_backward && parts == 1;
  u.parts = as<float4>(static_cast<void*>(w.extreme_parts));
  u.extremes = as<Extremes>(static_cast<void*>(w.extremes));
  return u;
}

template <class In, class F, int PARTS>
void run_pairs(Stream& s, const Problem& p, const Workspace& w) {
  constexpr int CH = PARTS == 1 ? 8 : 4;
  const int slices = int(row_slices(p));
  const Operand anchors{as<uint4>(w.anchor_rows), int(p.anchors.count), slices};
  const Operand candidates{as<uint4>(w.candidate_rows), int(p.candidates.count), slices};
  const BothRanges ranges = ranges_of(s, p, w);
  Preparation preparation = preparation_of(p, w, ranges);
  preparation.copies[0] = as<uint4>(w.anchor_rows), preparation.copies[1] = as<uint4>(w.candidate_rows);
  preparation.part_size[0] = anchors.part_size<CH>();
  preparation.part_size[1] = p.one_set ? 0 : candidates.part_size<CH>();
  preparation.slices = slices;
  preparation.arrivals = w.arrivals, preparation.arrival_count = w.arrival_count;
  preparation.sums = w.triangle.sums, preparation.sum_count = w.triangle.sums ? p.anchors.count : 0;
  if (is_backward(p.operation)) preparation.upstreams = upstreams_of(p, w, PARTS);
  if (preparation.upstreams.parts)
    s.grid(dim3(kExtremeBlocks), dim3(kThreads), find_extremes, preparation.upstreams);
  if (w.triangle.sums)
    s.grid(dim3(kExtremeBlocks), dim3(kThreads), find_norms<In, F>, w.triangle.norms, p.anchors,
           int(p.width));
  s.grid(dim3(unsigned(preparation_blocks(preparation))), dim3(kThreads), prepare<In, F, PARTS>, preparation);

  const float* scale = as<float>(p.scale);
  const bool within = within_classes(p);
  const Verdicts verdicts{w.verdicts, verdict_blocks_of(preparation)};
  const Pairs pairs{anchors, candidates, ranges.anchors.range, w.anchor_self, nullptr, p.one_set, within,
                    scale,   verdicts};
  const Pairs swapped{candidates, anchors, ranges.candidates.range, nullptr, w.anchor_self, false, within,
                      scale,      verdicts};
  if (is_backward(p.operation))
    run_backward<F, PARTS>(s, p, w, pairs, swapped);
  else
    run_forward<F, PARTS>(s, p, w, pairs);
}

}  // namespace

extern "C" int64_t pysupcon_cuda_workspace_bytes(const Problem* problem) { return lay_out(*problem).bytes; }

extern "C" const char* pysupcon_cuda_run(const Problem* problem) {
  const Problem& p = *problem;
  const Workspace w = lay_out(p);
  Stream s{static_cast<cudaStream_t>(p.stream)};
  if (p.anchors.count > kMaxRows || p.candidates.count > kMaxRows || p.width > (int64_t(1) << 21))
    return "more than 2^31 - 256 rows or 2^21 columns";
  if (p.anchors.count == 0) return nullptr;  // nothing to compute, and nobody from whom a gradient comes
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

extern "C" void pysupcon_cuda_device(int32_t device, int32_t* multiprocessors, int32_t* shared_memory) {
  const auto ask = [device](cudaDeviceAttr attribute) {
    int value = 0;
    return gpu::checked(cudaDeviceGetAttribute(&value, attribute, device)) == cudaSuccess ? value : 0;
  };
  *multiprocessors = ask(cudaDevAttrMultiProcessorCount);
  *shared_memory = ask(cudaDevAttrMaxSharedMemoryPerMultiprocessor);
}

}  // namespace pysupcon::cuda
