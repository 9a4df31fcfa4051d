// The operators: which kernels run, in which order, on which part of the workspace. Everything is enqueued on
// one stream; nothing waits for the device and nothing is allocated, so a CUDA graph can hold it.
#include "backward.cuh"
#include "kernels.h"
#include "plain.cuh"
#include "plan.h"
#include "prepare.cuh"

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
};

int2* pairs_of(int32_t* p) { return reinterpret_cast<int2*>(p); }
float2* pairs_of(float* p) { return reinterpret_cast<float2*>(p); }
template <class P>
struct Of {
  using Policy = P;
};
template <class T>
T* as(void* p) {
  return static_cast<T*>(p);
}

// Every row's class and instance on the other side, and which row is which: to be found by the next kernel.
struct BothRanges {
  Ranges anchors, candidates;
};
BothRanges ranges_of(Stream& s, const Problem& p, const Workspace& w) {
  if (p.self_index)
    s.each(p.candidates.count, invert_order, w.candidate_inverse, p.candidates.order,
           int(p.candidates.count));
  return {{pairs_of(w.anchor_range), pairs_of(w.anchor_instance), w.anchor_self, p.anchors, p.candidates,
           p.self_index, w.candidate_inverse},
          {pairs_of(w.candidate_range), pairs_of(w.candidate_instance), nullptr, p.candidates, p.anchors,
           nullptr, nullptr}};
}

// What every operator prepares.
Preparation preparation_of(const Problem& p, const Workspace& w, const BothRanges& ranges) {
  Preparation preparation{};
  preparation.sides[0] = p.anchors;
  if (!p.one_set) preparation.sides[1] = p.candidates;
  preparation.width = int(p.width);
  preparation.ranges[0] = ranges.anchors, preparation.ranges[1] = ranges.candidates;
  preparation.biases[0] = {w.anchor_bias, p.log_weights};
  preparation.biases[1] = {w.candidate_bias, p.candidate_log_weights};
  preparation.scale = p.scale, preparation.verdicts = w.verdicts;
  if (p.operation == Operation::pair_stats && !(p.negatives && p.positives)) {
    preparation.fill_count = p.anchors.count;
    if (!p.negatives) preparation.unasked[0] = p.out_n;
    if (!p.positives)
      preparation.unasked[1] = p.out_p, preparation.unasked[2] = p.out_positive_sum,
      preparation.unasked[3] = p.out_instance_sum;
  }
  return preparation;
}
Verdicts verdicts_of(const Problem& p, const Preparation& preparation) {
  return {
      preparation.verdicts,
      verdict_blocks_of(preparation),
      {is_backward(p.operation) ? p.out_grad_n : p.out_n, p.out_p, p.out_positive_sum, p.out_instance_sum},
      p.anchors.count};
}

// ------------------------------------------------------------------------------------------------ double
// precision

PlainPairs plain_pairs(const Problem& p, const Workspace& w, bool swapped, const Verdicts& verdicts) {
  const double* candidate_log_weights = p.one_set ? p.log_weights : p.candidate_log_weights;
  return {swapped ? p.candidates : p.anchors,
          swapped ? p.anchors : p.candidates,
          int(p.width),
          pairs_of(swapped ? w.candidate_range : w.anchor_range),
          pairs_of(swapped ? w.candidate_instance : w.anchor_instance),
          swapped ? nullptr : w.anchor_self,
          swapped ? w.anchor_self : nullptr,
          p.one_set,
          visits_negatives(p),
          visits_positives(p),
          swapped ? candidate_log_weights : p.log_weights,
          swapped ? p.log_weights : candidate_log_weights,
          p.scale,
          verdicts};
}

void run_plain(Stream& s, const Problem& p, const Workspace& w) {
  const BothRanges ranges = ranges_of(s, p, w);
  Preparation preparation = preparation_of(p, w, ranges);
  for (int k = 0; k < 2; ++k) preparation.part_size[k] = preparation.sides[k].count * divide_up(p.width, 8);
  s.grid(dim3(unsigned(preparation_blocks(preparation))), dim3(kThreads), prepare<double, void, 0>,
         preparation);
  const Verdicts verdicts = verdicts_of(p, preparation);
  const dim3 block(kPlain, kPlain);
  const bool softplus = is_softplus(p.operation);
  const PlainPairs pairs = plain_pairs(p, w, false, verdicts);
  const dim3 rows(unsigned(divide_up(p.anchors.count, kPlain)), unsigned(divide_up(p.width, 4 * kPlain)));
  if (!is_backward(p.operation)) {
    const PlainResults out{p.out_n, p.out_p, p.out_positive_sum, p.out_instance_sum};
    s.grid(dim3(rows.x), block, plain_forward, pairs, out, softplus ? p.n : nullptr, p.epsilon);
    return;
  }
  const PlainAnchors none{};
  const auto wanted = [&](const double* grad) { return p.positives ? grad : nullptr; };
  const PlainAnchors anchors{p.n,
                             p.p,
                             p.grad_n,
                             p.grad_p,
                             wanted(p.grad_positive_sum),
                             wanted(p.grad_instance_sum),
                             p.anchors.order};
  PlainAnchors candidates{p.candidate_n,
                          p.candidate_p,
                          p.candidate_grad_n,
                          p.candidate_grad_p,
                          wanted(p.candidate_grad_positive_sum),
                          wanted(p.candidate_grad_instance_sum),
                          p.candidates.order};
  if (p.one_set) candidates = anchors;
  s.grid(rows, block, plain_backward, pairs, anchors, candidates, as<double>(p.grad_x), p.out_grad_n,
         p.epsilon);
  if (p.grad_candidates)
    s.grid(dim3(unsigned(divide_up(p.candidates.count, kPlain)), rows.y), block, plain_backward,
           plain_pairs(p, w, true, verdicts), none, anchors, as<double>(p.grad_candidates),
           static_cast<double*>(nullptr), p.epsilon);
}

// ---------------------------------------------------------------------------------------------------- tensor
// cores

// The pairs of a pass, from both sides.
struct Sides {
  Pairs pairs, swapped;
};

template <class F, int PARTS>
void run_forward(Stream& s, const Problem& p, const Workspace& w, const Sides& all, const Sides& within) {
  const auto run = [&](auto epilogue, const Sides& sides, const Pass& pass, const auto& args) {
    if (s.error != cudaSuccess) return;
    s.error = forward<F, PARTS, typename decltype(epilogue)::Policy>(sides.pairs, pass.anchor_runs,
                                                                     w.triangle, args, s.stream);
  };
  const int64_t* order = p.anchors.order;
  if (visits_negatives(p))
    run(Of<Statistics>{}, all, w.negatives,
        Statistics::Args{p.out_n, order, as<float2>(w.parts), w.negatives.anchor_arrivals});
  if (is_softplus(p.operation))
    run(Of<SoftplusSum>{}, within, w.positives,
        SoftplusSum::Args{p.out_n, p.n, order, p.epsilon, as<double>(w.parts), w.positives.anchor_arrivals});
  else if (visits_positives(p))
    run(Of<PositiveStatistics>{}, within, w.positives,
        PositiveStatistics::Args{p.out_p, p.out_positive_sum, p.out_instance_sum, order,
                                 as<PositiveStatistics::Part>(w.parts), w.positives.anchor_arrivals});
}

// A pass adds to the gradient what another added before it: launches on one stream, a thread block a row
// block, so that the order of the additions is always the same.
template <class F, int PARTS>
void run_backward(Stream& s, const Problem& p, const Workspace& w, const Sides& all, const Sides& within) {
  const Extremes* extremes = as<Extremes>(static_cast<void*>(w.extremes));
  const Shape shape = pair_shape(p);
  const auto tables = [&](const Tables& t, bool positives) {
    return positives ? Coefficients{pairs_of(t.p), pairs_of(t.rest), t.instance}
                     : Coefficients{pairs_of(t.n), nullptr, nullptr};
  };
  // make_args(coefficients of the rows, of the columns)
  const auto run = [&](auto weights, const Sides& sides, const Pass& pass, bool positives, auto make_args) {
    using Weights = typename decltype(weights)::Policy;
    const Coefficients none{}, anchors = tables(w.anchor, positives);
    const Coefficients candidates = p.one_set ? anchors : tables(w.candidate, positives);
    const auto one = [&](const Pairs& pairs, const typename Weights::Args& args, const Rows& owner,
                         void* grad, const Runs& runs, int32_t* arrivals) {
      if (s.error != cudaSuccess || owner.count == 0) return;
      const Gradient out{as<float>(grad), owner.order,        int(owner.count), int(p.width), pairs.scale,
                         extremes,        as<float>(w.parts), w.row_parts,      arrivals};
      s.error = backward<F, PARTS, Weights>(pairs, runs, shape, args, out, s.stream);
    };
    one(sides.pairs, make_args(anchors, candidates, p.out_grad_n), p.anchors, p.grad_x, pass.anchor_runs,
        pass.anchor_arrivals);
    if (p.grad_candidates)
      one(sides.swapped, make_args(none, anchors, nullptr), p.candidates, p.grad_candidates,
          pass.candidate_runs, pass.candidate_arrivals);
  };
  if (visits_negatives(p))
    run(Of<StatisticsWeights>{}, all, w.negatives, false,
        [&](const Coefficients& rows, const Coefficients& cols, double*) {
          return StatisticsWeights::Args{rows, cols, extremes};
        });
  if (is_softplus(p.operation))
    run(Of<SoftplusWeights>{}, within, w.positives, false,
        [&](const Coefficients& rows, const Coefficients& cols, double* grad_n) {
          return SoftplusWeights::Args{rows, cols, p.grad_n, p.n, p.anchors.order, grad_n};
        });
  else if (visits_positives(p))
    run(Of<PositiveWeights>{}, within, w.positives, true,
        [&](const Coefficients& rows, const Coefficients& cols, double*) {
          return PositiveWeights::Args{rows, cols};
        });
}

// What the backward asks of the anchors of both sides.
Upstreams upstreams_of(const Problem& p, const Workspace& w, int parts) {
  Upstreams u{};
  const Rows &a = p.anchors, &b = p.candidates;
  const auto of_n = [&](const double* n, const double* grad, const Rows& rows, const Tables& t) {
    return Upstream{n, grad, nullptr, nullptr, rows.order, rows.count, pairs_of(t.n), nullptr, nullptr};
  };
  u.of[0] = of_n(p.n, p.grad_n, a, w.anchor);
  u.of[1] = {p.p,
             p.grad_p,
             p.positives ? p.grad_positive_sum : nullptr,
             p.positives ? p.grad_instance_sum : nullptr,
             a.order,
             a.count,
             pairs_of(w.anchor.p),
             pairs_of(w.anchor.rest),
             w.anchor.instance};
  u.of[2] = of_n(p.candidate_n, p.candidate_grad_n, b, w.candidate);
  u.of[3] = {p.candidate_p,
             p.candidate_grad_p,
             p.positives ? p.candidate_grad_positive_sum : nullptr,
             p.positives ? p.candidate_grad_instance_sum : nullptr,
             b.order,
             b.count,
             pairs_of(w.candidate.p),
             pairs_of(w.candidate.rest),
             w.candidate.instance};
  u.softplus = is_softplus(p.operation);
  u.epsilon = u.softplus ? p.epsilon : 0.;
  u.one = visits_negatives(p) && parts == 1 && !weighted(p);
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
  preparation.scale_out = as<Scale>(static_cast<void*>(w.scale));
  preparation.arrivals = w.arrivals, preparation.arrival_count = w.arrival_count;
  preparation.sums = w.triangle.sums, preparation.sum_count = w.triangle.sums ? p.anchors.count : 0;
  if (is_backward(p.operation)) preparation.upstreams = upstreams_of(p, w, PARTS);
  if (preparation.upstreams.parts)
    s.grid(dim3(kExtremeBlocks), dim3(kThreads), find_extremes, preparation.upstreams);
  if (w.triangle.sums)
    s.grid(dim3(kExtremeBlocks), dim3(kThreads), find_norms<In, F>, w.triangle.norms, p.anchors,
           int(p.width));
  s.grid(dim3(unsigned(preparation_blocks(preparation))), dim3(kThreads), prepare<In, F, PARTS>, preparation);

  const Verdicts verdicts = verdicts_of(p, preparation);
  const auto sides = [&](bool within) {
    const Scale* scale = preparation.scale_out;
    return Sides{{anchors, candidates, ranges.anchors.range, ranges.anchors.instance_range, w.anchor_self,
                  nullptr, p.one_set, within, w.anchor_bias, w.candidate_bias, scale, verdicts},
                 {candidates, anchors, ranges.candidates.range, ranges.candidates.instance_range, nullptr,
                  w.anchor_self, false, within, w.candidate_bias, w.anchor_bias, scale, verdicts}};
  };
  if (is_backward(p.operation))
    run_backward<F, PARTS>(s, p, w, sides(false), sides(true));
  else
    run_forward<F, PARTS>(s, p, w, sides(false), sides(true));
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
  const bool any = visits_negatives(p) || visits_positives(p) || p.operation == Operation::pair_stats;
  if (any && p.dtype == Dtype::f64) run_plain(s, p, w);
  if (any && p.dtype == Dtype::bf16) run_pairs<__nv_bfloat16, gpu::Bf16, 1>(s, p, w);
  if (any && p.dtype == Dtype::f16) run_pairs<__half, gpu::F16, 1>(s, p, w);
  if (any && p.dtype == Dtype::f32 && p.parts == 1) run_pairs<float, gpu::Bf16, 1>(s, p, w);
  if (any && p.dtype == Dtype::f32 && p.parts == 2) run_pairs<float, gpu::Bf16, 2>(s, p, w);
  if (any && p.dtype == Dtype::f32 && p.parts == 3) run_pairs<float, gpu::Bf16, 3>(s, p, w);
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
