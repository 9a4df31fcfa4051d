// The entry points of kernels.h that visit pairs: what is fixed before the first pair, the schedule, and what
// happens to a row's sums after the last one. The pairs themselves are the vector code's (select.h).
// Equations: ../README.md.
#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <optional>
#include <vector>

#include "cpu/partners.h"
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
// The largest row length of each side, found part by part. NaN if a row holds one.
class Lengths {
 public:
  explicit Lengths(const Problem& q)
      : q_(q), rows_(part_count(q.anchors)), largest_(rows_ + (q.self ? 0 : part_count(q.candidates))) {}

  int64_t parts() const { return static_cast<int64_t>(largest_.size()); }
  void find(int64_t part) {
    const bool anchors = part < rows_;
    const Side& side = anchors ? q_.anchors : q_.candidates;
    const int64_t first = (anchors ? part : part - rows_) * kPart;
    largest_[part] = pair_kernels().largest_square(q_, side, first, std::min(first + kPart, side.count));
  }
  // The largest |x_i| |c_j|.
  double product() const {
    const double rows = of(0, rows_);
    return rows * (q_.self ? rows : of(rows_, parts()));
  }

 private:
  static constexpr int64_t kPart = 256;
  static int64_t part_count(const Side& side) { return (side.count + kPart - 1) / kPart; }
  double of(int64_t first, int64_t last) const {
    double all = 0;
    for (int64_t part = first; part < last; ++part)
      if (all == all && !(largest_[part] <= all)) all = largest_[part];  // NaN stays
    return std::sqrt(all);
  }
  const Problem& q_;
  int64_t rows_;
  std::vector<double> largest_;  // squares, by part: of the anchors, then of the candidates
};

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

// The weights of one side as candidates. l: log2 of a weight, top: the largest of the side.
class SideLogWeights {
 public:
  explicit SideLogWeights(const Side& side) : side_(side) {
    if (!given()) return;
    double low = kInf, high = -kInf;
    for (int64_t row = 0; row < side.count; ++row) {
      const double l = side.log_weight[row] * kLog2e;
      high = std::max(high, l);
      if (l > -kInf) low = std::min(low, l);
    }
    if (high > -kInf) top = high, range = high - low;
  }
  bool given() const { return side_.log_weight; }
  // l - top, by position.
  double relative(int64_t at) const { return side_.log_weight[side_.order[at]] * kLog2e - top; }
  // log of the weight, by position.
  double logarithm(int64_t at) const { return given() ? side_.log_weight[side_.order[at]] : 0; }

  double top = 0, range = 0;  // range: of the weights that are not 0

 private:
  const Side& side_;
};

// The weights of both sides, and their values for the vector code; see Plan.
class LogWeights {
 public:
  explicit LogWeights(const Problem& q)
      : anchors(q.anchors), candidates(q.candidates), rows_(q, 0, 0), cols_(q, 0, 0) {}
  double range() const { return std::max(anchors.range, candidates.range); }
  // For sums of exponentials, once it is known whether the reference is fixed.
  void place(Plan& plan) {
    place(plan, [&](const SideLogWeights& side, int64_t at) {
      return plan.fixed ? std::exp2(side.relative(at)) : side.relative(at);
    });
  }
  // For the positive pass: a finite number instead of -infinity.
  void place_absolute(Plan& plan) {
    place(plan, [](const SideLogWeights& side, int64_t at) {
      return std::max(side.logarithm(at) * kLog2e, -kNever);
    });
  }

  const SideLogWeights anchors, candidates;

 private:
  template <class Value>
  void place(Plan& plan, const Value& value) {
    const Problem& q = plan.problem;
    const auto fill = [&](Values& to, const SideLogWeights& side, int64_t count) {
      to = Values(q, side.given() ? count : 0, 0);
      for (int64_t at = 0; side.given() && at < count; ++at) to.set(at, value(side, at));
      return to.data();
    };
    plan.weighted = anchors.given() || candidates.given();
    plan.candidate_weights = fill(cols_, candidates, q.candidates.count);
    plan.anchor_weights = q.self ? plan.candidate_weights : fill(rows_, anchors, q.anchors.count);
  }
  Values rows_, cols_;
};

// Fills in the reference; false if a row or the scale is not finite, or if a similarity could not be.
// `range`: between the logarithms of the largest and of the smallest weight of a side.
bool choose_reference(Plan& plan, const Lengths& lengths, double range) {
  const Problem& q = plan.problem;
  plan.shift = std::ceil(q.scale * kLog2e * lengths.product() * (1 + 1e-4));
  // 2^(t - shift), times a weight relative to the largest, lies in [2^(-2 shift - range), 1]: far enough from
  // the smallest normal number (2^-126, 2^-1022) to sum.
  plan.fixed = 2 * plan.shift + range <= (q.type == Type::f64 ? 900 : 100);
  // Statistics are double: beyond kLargest they have no digit left that an exponent needs. NaN is not less.
  return plan.shift < kLargest && q.scale * kLog2e < kLargest;
}

// One parallel region: the workers share the parts, then one calls prepare(), and if that returns true they
// share the pairs.
template <class Part, class Prepare, class Visit>
void run_pass(const Plan& plan, int products, const Threads& threads, int64_t parts, const Part& part,
              const Prepare& prepare, const Visit& visit) {
  Schedule schedule(plan);
  thread_local Partners partners;
  const int64_t workers = partners.choose(plan.problem, products, schedule, threads);
  Team team(threads, workers);
  bool wanted = false;
  team.run([&](int64_t worker) {
    team.share(parts, part, [&] { wanted = prepare(); });
    if (!wanted) return;
    const Scratch scratch(plan.scratch);
    Held& held = *static_cast<Held*>(scratch.data());
    held = {};
    team.visit(schedule, worker, [&](const BlockPair& pair, const BlockPair& next) {
      held.next_i = next.i;
      held.next_j = next.j;
      visit(pair, scratch.data());
    });
  });
  if (workers > 1) partners.note(team.waited_seconds());
}
template <class Visit>
void run_pass(const Plan& plan, int products, const Threads& threads, const Visit& visit) {
  run_pass(plan, products, threads, 0, [](int64_t) {}, [] { return true; }, visit);
}

// ------------------------------------------------------------------------------------------------ weights
// One side's factors for the vector code; see Weights. `top`: log2 of the largest weight of its candidates.
struct SideWeights {
  Values ref_n, f_n, ref_p, f_p, constant_p, constant_a;  // empty where a side gives nothing

  SideWeights(const Plan& plan, const Side& side, const StatsGrad& g, double top)
      : SideWeights(plan, side.count, g.n && plan.problem.negatives, g.p && plan.problem.positives,
                    g.w && plan.problem.positives, g.a && plan.problem.positives) {
    for (int64_t at = 0; at < side.count; ++at) {
      const int64_t row = side.order[at];
      if (f_n.data()) fill(plan, at, g.n[row], g.u[row], top, ref_n, f_n);
      if (f_p.data()) fill(plan, at, g.p[row], g.v[row], top, ref_p, f_p);
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
  static void fill(const Plan& plan, int64_t at, double stat, double u, double top, Values& ref,
                   Values& factor) {
    const bool empty = stat == -kInf;
    double reference = plan.shift;
    if (!plan.fixed) {
      ref.set(at, empty ? kNever : stat * kLog2e - top);
      reference = ref.get(at);
    }
    double f = plan.problem.scale * u * std::exp2(reference - (stat * kLog2e - top));
    // A row whose own candidates have weight 0 may have the n of others: infinity times 0 would be NaN.
    const double largest = plan.problem.type == Type::f64 ? 1e300 : 1e38;
    if (plan.weighted && std::isfinite(u)) f = std::clamp(f, -largest, largest);
    factor.set(at, empty || u == 0 ? 0 : f);
  }
};

// From sums of t, or of t - shift, over the candidates of an anchor's number, to sums of s. The logsumexp of
// one s is s, plus the logarithm of its weight: `single`, or null, gets it without the rounding of an
// exponential.
void finish_sums(const Plan& plan, const SideLogWeights& weights, double* sums, const int32_t* anchor_number,
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
    if (single && count == 1 && q.positives)
      single[q.anchors.order[i]] = sum + weights.logarithm(first + (own && self == first));
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

// From sums of 2^(t - shift) W_j c_j to the mean; with running maxima, by the pass of a backward.
void finish_mean(const Plan& plan, const Threads& threads, const Stats& out, double top) {
  const Problem& q = plan.problem;
  if (!plan.fixed) {
    Problem negatives = q;
    negatives.positives = false;
    const std::vector<double> u(q.anchors.count, 1 / q.scale);
    pair_stats_backward(negatives, threads, {out.n, nullptr, u.data()}, {}, {out.negative_mean, nullptr});
    return;
  }
  for (int64_t i = 0; i < q.anchors.count; ++i) {
    const double factor = out.n[i] == -kInf ? 0 : std::exp2(plan.shift + top - out.n[i] * kLog2e);
    for (int64_t at = i * q.dim; at < (i + 1) * q.dim; ++at)
      if (q.type == Type::f64)
        static_cast<double*>(out.negative_mean)[at] *= factor;
      else
        static_cast<float*>(out.negative_mean)[at] *= static_cast<float>(factor);
  }
}

}  // namespace

// ------------------------------------------------------------------------------------------------ entry
// points
void pair_stats(const Problem& q, const Threads& threads, const Stats& out) {
  Plan plan = make_plan(q);
  Lengths lengths(q);
  const int64_t rows = q.anchors.count;
  LogWeights weights(q);
  Values max_n(q, 0, 0), max_p(q, 0, 0);
  StatsSums sums{out.n, out.p, out.positive_sum, out.instance_sum, nullptr, nullptr};
  void* const mean = q.negatives ? out.negative_mean : nullptr;
  bool finite = false;
  const auto prepare = [&] {
    finite = choose_reference(plan, lengths, weights.range());
    weights.place(plan);
    for (double* column : {out.n, out.p, out.positive_sum, out.instance_sum})
      if (column) std::fill(column, column + rows, finite ? 0 : kInf - kInf);
    const int64_t kept = plan.fixed ? 0 : rows;
    max_n = Values(q, kept, -kInf);
    max_p = Values(q, kept, -kInf);
    sums.max_n = max_n.data();
    sums.max_p = max_p.data();
    sums.mean = plan.fixed ? mean : nullptr;
    return finite;
  };
  const auto stats = pair_kernels().stats;
  run_pass(
      plan, mean ? 2 : 1, threads, lengths.parts(), [&](int64_t part) { lengths.find(part); }, prepare,
      [&](const BlockPair& b, void* scratch) { stats(plan, sums, b.i, b.j, scratch); });
  if (!finite) return;
  const auto finish = [&](double* stat, const Values& max, bool wanted) {
    for (int64_t i = 0; i < rows; ++i) {
      const bool some = wanted && stat[i] != 0;  // a tile of both kinds is summed as both
      const double reference = (plan.fixed ? plan.shift : max.get(i)) + weights.candidates.top;
      stat[i] = some ? (reference + std::log2(stat[i])) * kLn2 : -kInf;
    }
  };
  finish(out.n, max_n, q.negatives);
  finish(out.p, max_p, q.positives);
  finish_sums(plan, weights.candidates, out.positive_sum, q.anchors.cls, q.candidates.cls, out.p);
  finish_sums(plan, weights.candidates, out.instance_sum, q.anchors.instance, q.candidates.instance, nullptr);
  if (mean) finish_mean(plan, threads, out, weights.candidates.top);
}

void pair_stats_backward(const Problem& q, const Threads& threads, const StatsGrad& anchors,
                         const StatsGrad& candidates, const Gradients& gradients) {
  Plan plan = make_plan(q);
  Lengths lengths(q);
  LogWeights weights(q);
  std::optional<SideWeights> rows, cols;
  Weights r, c;
  const auto prepare = [&] {
    choose_reference(plan, lengths, weights.range());
    weights.place(plan);
    r = rows.emplace(plan, q.anchors, anchors, weights.candidates.top).get();
    c = cols.emplace(plan, q.candidates, q.self ? anchors : candidates, weights.anchors.top).get();
    return true;
  };
  const auto backward = pair_kernels().stats_backward;
  run_pass(
      plan, 3, threads, lengths.parts(), [&](int64_t part) { lengths.find(part); }, prepare,
      [&](const BlockPair& b, void* scratch) { backward(plan, r, c, gradients, b.i, b.j, scratch); });
}

void positive_softplus(const Problem& q, const Threads& threads, const double* n, double epsilon,
                       double* total) {
  Plan plan = make_plan(q);
  LogWeights weights(q);
  weights.place_absolute(plan);
  const SideSoftplus values(q, q.anchors, n, nullptr, epsilon);
  const Softplus v = values.get();
  std::fill(total, total + q.anchors.count, 0.0);
  const auto softplus = pair_kernels().softplus;
  run_pass(plan, 1, threads,
           [&](const BlockPair& b, void* scratch) { softplus(plan, v, total, b.i, b.j, scratch); });
}

void positive_softplus_backward(const Problem& q, const Threads& threads, const SoftplusGrad& anchors,
                                const SoftplusGrad& candidates, double epsilon, const Gradients& gradients,
                                double* grad_n) {
  Plan plan = make_plan(q);
  LogWeights weights(q);
  weights.place_absolute(plan);
  const SoftplusGrad& other = q.self ? anchors : candidates;
  const SideSoftplus rows(q, q.anchors, anchors.n, anchors.w, epsilon),
      cols(q, q.candidates, other.n, other.w, epsilon);
  const Softplus r = rows.get(), c = cols.get();
  std::fill(grad_n, grad_n + q.anchors.count, 0.0);
  const auto backward = pair_kernels().softplus_backward;
  run_pass(plan, 3, threads, [&](const BlockPair& b, void* scratch) {
    backward(plan, r, c, gradients, grad_n, b.i, b.j, scratch);
  });
  for (int64_t i = 0; i < q.anchors.count; ++i) grad_n[i] *= anchors.w[i];
}

}  // namespace pysupcon::cpu
