// The entry points of kernels.h that visit pairs: what is fixed before the first pair, the schedule, and what
// happens to a row's sums after the last one. The pairs themselves are the vector code's (select.h).
// Equations: ../README.md.
#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <vector>

#include "cpu/schedule.h"
#include "cpu/threads.h"
#include "cpu/select.h"

namespace pysupcon::cpu {
namespace {

constexpr double kInf = std::numeric_limits<double>::infinity();
constexpr double kLargest = 1e15;  // of a similarity in base 2, and of the scale

// ------------------------------------------------------------------------------------------------ memory
// Values of the arithmetic type by position (or by row), for the vector code.
class Values {
 public:
  Values(const Problem& q, int64_t count, double fill)
      : wide_(q.type == Type::f64), memory_(count ? new char[count * (wide_ ? 8 : 4)] : nullptr) {
    for (int64_t i = 0; i < count; ++i) set(i, fill);
  }
  void set(int64_t i, double v) { wide_ ? void(wide()[i] = v) : void(narrow()[i] = static_cast<float>(v)); }
  double get(int64_t i) const { return wide_ ? wide()[i] : narrow()[i]; }
  void* data() const { return memory_.get(); }  // null where there are none

 private:
  double* wide() const { return reinterpret_cast<double*>(memory_.get()); }
  float* narrow() const { return reinterpret_cast<float*>(memory_.get()); }
  bool wide_;
  std::unique_ptr<char[]> memory_;
};

// ------------------------------------------------------------------------------------------------ plan
// Largest row length of a side; NaN if a row holds one.
double largest_norm(const Problem& q, const Side& side, const Threads& threads) {
  constexpr int64_t kPart = 256;
  std::vector<double> best((side.count + kPart - 1) / kPart, 0.0);
  const auto largest = pair_kernels().largest_square;
  parallel(threads, best.size(), [&](int64_t first, int64_t last) {
    for (int64_t part = first; part < last; ++part)
      best[part] = largest(q, side, part * kPart, std::min((part + 1) * kPart, side.count));
  });
  double all = 0;
  for (double b : best)
    if (all == all && !(b <= all)) all = b;  // NaN stays
  return std::sqrt(all);
}

// Blocks small enough for two of them, one transposed, and their weights to stay in a core's own cache, and
// for a small problem to give every core some. It must not depend on the number of threads: sums are formed
// block by block.
int choose_block(const Problem& q) {
  constexpr int64_t kUnit = 32, kSmallest = 64, kCache = 176 * 1024;  // 4-byte numbers
  const int64_t rows = std::max(q.anchors.count, q.candidates.count), wide = q.type == Type::f64 ? 2 : 1;
  const int64_t cache = kCache / wide / (3 * std::max<int64_t>(q.dim, 32) + kMaxBlock + 16) / kUnit * kUnit;
  const int64_t small = (rows / 8 + kUnit - 1) / kUnit * kUnit;
  return static_cast<int>(std::clamp<int64_t>(std::min(cache, small), kSmallest, kMaxBlock));
}

Plan make_plan(const Problem& q) {
  Plan plan;
  plan.problem = q;
  plan.block = choose_block(q);
  plan.scratch = pair_kernels().scratch_bytes(plan);
  return plan;
}

// Fills in the reference; false if a row or the scale is not finite, or if a similarity could not be.
bool choose_reference(Plan& plan, const Threads& threads) {
  const Problem& q = plan.problem;
  const double rows = largest_norm(q, q.anchors, threads);
  const double cols = q.self ? rows : largest_norm(q, q.candidates, threads);
  plan.shift = std::ceil(q.scale * kLog2e * rows * cols * (1 + 1e-4));
  // 2^(t - shift) lies in [2^(-2 shift), 1]: far enough from the smallest normal number (2^-126, 2^-1022) to
  // sum.
  plan.fixed = 2 * plan.shift <= (q.type == Type::f64 ? 900 : 100);
  // Statistics are double: beyond kLargest they have no digit left that an exponent needs. NaN is not less.
  return plan.shift < kLargest && q.scale * kLog2e < kLargest;
}

template <class Visit>
void visit_pairs(const Plan& plan, const Threads& threads, const Visit& visit) {
  each_round(plan, [&](const Round& round) {
    parallel(threads, round.groups(), [&](int64_t first, int64_t last) {
      void* scratch = thread_scratch(plan.scratch);
      Held& held = *static_cast<Held*>(scratch);
      held = {};
      const BlockPair* end = round.end(last - 1);
      for (const BlockPair* pair = round.begin(first); pair != end; ++pair) {
        const bool more = pair + 1 != end;
        held.next_i = more ? pair[1].i : -1;
        held.next_j = more ? pair[1].j : -1;
        visit(*pair, scratch);
      }
    });
  });
}

// ------------------------------------------------------------------------------------------------ weights
// One side's factors for the vector code; see Weights.
struct SideWeights {
  Values ref_n, f_n, ref_p, f_p, constant_p, constant_a;  // empty where a side gives nothing

  SideWeights(const Plan& plan, const Side& side, const StatsGrad& g)
      : SideWeights(plan, side.count, g.n && plan.problem.negatives, g.p && plan.problem.positives,
                    g.w && plan.problem.positives, g.a && plan.problem.positives) {
    for (int64_t at = 0; at < side.count; ++at) {
      const int64_t row = side.order[at];
      if (f_n.data()) fill(plan, at, g.n[row], g.u[row], ref_n, f_n);
      if (f_p.data()) fill(plan, at, g.p[row], g.v[row], ref_p, f_p);
      if (constant_p.data()) constant_p.set(at, plan.problem.scale * g.w[row]);
      if (constant_a.data()) constant_a.set(at, plan.problem.scale * g.a[row]);
    }
  }
  Weights get() const {
    return {ref_n.data(), f_n.data(), ref_p.data(), f_p.data(), constant_p.data(), constant_a.data()};
  }

 private:
  SideWeights(const Plan& plan, int64_t count, bool n, bool p, bool w, bool a)
      : ref_n(plan.problem, n && !plan.fixed ? count : 0, 0),
        f_n(plan.problem, n ? count : 0, 0),
        ref_p(plan.problem, p && !plan.fixed ? count : 0, 0),
        f_p(plan.problem, p ? count : 0, 0),
        constant_p(plan.problem, w ? count : 0, 0),
        constant_a(plan.problem, a ? count : 0, 0) {}
  // 2^(t - ref) factor = scale u e^(s - stat): what the reference loses to rounding, the factor makes good.
  static void fill(const Plan& plan, int64_t at, double stat, double u, Values& ref, Values& factor) {
    const bool empty = stat == -kInf;
    double reference = plan.shift;
    if (!plan.fixed) {
      ref.set(at, empty ? kNever : stat * kLog2e);
      reference = ref.get(at);
    }
    factor.set(at, empty || u == 0 ? 0 : plan.problem.scale * u * std::exp2(reference - stat * kLog2e));
  }
};

// From sums of t, or of t - shift, over the candidates of an anchor's number, to sums of s. The logsumexp of
// one s is s: `single`, or null, gets it without the rounding of an exponential.
void finish_sums(const Plan& plan, double* sums, const int32_t* anchor_number,
                 const int32_t* candidate_number, double* single) {
  const Problem& q = plan.problem;
  const int64_t n = q.candidates.count;
  int64_t first = 0, last = 0;
  for (int64_t i = 0; sums && i < q.anchors.count; ++i) {
    const int32_t number = anchor_number[i];
    while (first < n && candidate_number[first] < number) ++first;
    last = std::max(first, last);
    while (last < n && candidate_number[last] == number) ++last;
    const int64_t self = q.self ? i : q.self_position ? q.self_position[i] : -1;
    const bool own = self >= 0 && candidate_number[self] == number;
    double& sum = sums[q.anchors.order[i]];
    if (!q.positives) sum = 0;
    const int64_t count = last - first - own;
    if (plan.fixed && q.positives) sum += plan.shift * static_cast<double>(count);
    sum *= kLn2;
    if (single && count == 1 && q.positives) single[q.anchors.order[i]] = sum;
  }
}

struct SideSoftplus {
  Values reference, factor;
  bool some, weighted;

  SideSoftplus(const Problem& q, const Side& side, const double* n, const double* w, double epsilon)
      : reference(q, n ? side.count : 0, 0), factor(q, w ? side.count : 0, 0), some(n), weighted(w) {
    for (int64_t at = 0; n && at < side.count; ++at) {
      const int64_t row = side.order[at];
      reference.set(at, n[row] == -kInf ? -kNever : (n[row] + epsilon) * kLog2e);
      if (w) factor.set(at, -q.scale * w[row]);
    }
  }
  Softplus get() const { return {some ? reference.data() : nullptr, weighted ? factor.data() : nullptr}; }
};

}  // namespace

// ------------------------------------------------------------------------------------------------ entry
// points
void pair_stats(const Problem& q, const Threads& threads, const Stats& out) {
  Plan plan = make_plan(q);
  const int64_t rows = q.anchors.count;
  const bool finite = choose_reference(plan, threads);
  const double start = finite ? 0 : kInf - kInf;
  for (double* column : {out.n, out.p, out.positive_sum, out.instance_sum})
    if (column) std::fill(column, column + rows, start);
  if (!finite) return;
  const int64_t kept = plan.fixed ? 0 : rows;
  const Values max_n(q, kept, -kInf), max_p(q, kept, -kInf);
  const StatsSums sums{out.n, out.p, out.positive_sum, out.instance_sum, max_n.data(), max_p.data()};
  const auto stats = pair_kernels().stats;
  visit_pairs(plan, threads,
              [&](const BlockPair& b, void* scratch) { stats(plan, sums, b.i, b.j, scratch); });
  const auto finish = [&](double* stat, const Values& max, bool wanted) {
    for (int64_t i = 0; i < rows; ++i) {
      const bool some = wanted && stat[i] != 0;  // a tile of both kinds is summed as both
      stat[i] = some ? ((plan.fixed ? plan.shift : max.get(i)) + std::log2(stat[i])) * kLn2 : -kInf;
    }
  };
  finish(out.n, max_n, q.negatives);
  finish(out.p, max_p, q.positives);
  finish_sums(plan, out.positive_sum, q.anchors.cls, q.candidates.cls, out.p);
  finish_sums(plan, out.instance_sum, q.anchors.instance, q.candidates.instance, nullptr);
}

void pair_stats_backward(const Problem& q, const Threads& threads, const StatsGrad& anchors,
                         const StatsGrad& candidates, const Gradients& gradients) {
  Plan plan = make_plan(q);
  choose_reference(plan, threads);
  const SideWeights rows(plan, q.anchors, anchors), cols(plan, q.candidates, q.self ? anchors : candidates);
  const Weights r = rows.get(), c = cols.get();
  const auto backward = pair_kernels().stats_backward;
  visit_pairs(plan, threads,
              [&](const BlockPair& b, void* scratch) { backward(plan, r, c, gradients, b.i, b.j, scratch); });
}

void positive_softplus(const Problem& q, const Threads& threads, const double* n, double epsilon,
                       double* total) {
  const Plan plan = make_plan(q);
  const SideSoftplus values(q, q.anchors, n, nullptr, epsilon);
  const Softplus v = values.get();
  std::fill(total, total + q.anchors.count, 0.0);
  const auto softplus = pair_kernels().softplus;
  visit_pairs(plan, threads,
              [&](const BlockPair& b, void* scratch) { softplus(plan, v, total, b.i, b.j, scratch); });
}

void positive_softplus_backward(const Problem& q, const Threads& threads, const SoftplusGrad& anchors,
                                const SoftplusGrad& candidates, double epsilon, const Gradients& gradients,
                                double* grad_n) {
  const Plan plan = make_plan(q);
  const SoftplusGrad& other = q.self ? anchors : candidates;
  const SideSoftplus rows(q, q.anchors, anchors.n, anchors.w, epsilon),
      cols(q, q.candidates, other.n, other.w, epsilon);
  const Softplus r = rows.get(), c = cols.get();
  std::fill(grad_n, grad_n + q.anchors.count, 0.0);
  const auto backward = pair_kernels().softplus_backward;
  visit_pairs(plan, threads, [&](const BlockPair& b, void* scratch) {
    backward(plan, r, c, gradients, grad_n, b.i, b.j, scratch);
  });
  for (int64_t i = 0; i < q.anchors.count; ++i) grad_n[i] *= anchors.w[i];
}

}  // namespace pysupcon::cpu
