// The table of vector code for one instruction set (PYSUPCON_ISA); compiled once for each, with its own
// flags.
#include "cpu/norms.h"
#include "cpu/softplus.h"
#include "cpu/stats.h"

namespace pysupcon::cpu::PYSUPCON_ISA {
namespace {

// Scratch of one thread: both blocks, the weights (or kept tiles), and the per-row values of whatever runs.
template <class T>
struct Scratch {
  Arena arena;
  Held* held;
  Block<T> a, b;
  T* w;
};

template <class T>
Scratch<T> lay_out(const Plan& plan, void* memory) {
  Scratch<T> s{{static_cast<char*>(memory)}, nullptr, {}, {}, nullptr};
  s.held = s.arena.template take<Held>(1);
  s.a = take_block<T>(s.arena, plan, false);
  s.b = take_block<T>(s.arena, plan, true);
  s.w = s.arena.template take<T>(kMaxBlock * kTileStride);
  return s;
}

template <class T>
size_t bytes(const Plan& plan) {
  Scratch<T> s = lay_out<T>(plan, nullptr);
  const size_t sums = 4 * (sizeof(Vec<T>) + sizeof(T)) * s.a.padded, values = 14 * sizeof(T) * s.a.padded;
  return reinterpret_cast<size_t>(s.arena.at) + sizeof(T) * kMaxBlock * kTileStride + sums + values +
         24 * 128;
}

size_t scratch_bytes(const Plan& plan) {
  return plan.problem.type == Type::f64 ? bytes<double>(plan) : bytes<float>(plan);
}

// Loads blocks i and j, if they are not held, and calls body(scratch, pair).
template <class T, class Body>
PYSUPCON_INLINE void with_blocks(const Plan& plan, int64_t i, int64_t j, void* memory, const Body& body) {
  const Problem& q = plan.problem;
  Scratch<T> s = lay_out<T>(plan, memory);
  place_block<T>(s.a, plan, q.anchors, i);
  place_block<T>(s.b, plan, q.candidates, j);
  if (s.held->i != i) load_block<T>(s.a, plan, kRowPadding);
  if (s.held->j != j) {
    load_block<T>(s.b, plan, kColPadding);
    make_panels<T>(s.b, q.self ? q.scale * kLog2e : 1);
  }
  s.held->i = i;
  s.held->j = j;
  Upcoming rows = upcoming(plan, q.anchors, s.held->next_i, i);
  Upcoming cols = upcoming(plan, q.candidates, s.held->next_j, j);
  body(s, TilePair<T>{plan, s.a, s.b, q.self && i == j, rows, cols});
}

template <bool kValue>
struct Flag {
  static constexpr bool value = kValue;
};

// body(value of the arithmetic type, flag: whether there are weights of candidates)
template <class Body>
PYSUPCON_INLINE void dispatch(const Plan& plan, const Body& body) {
  if (plan.problem.type == Type::f64)
    plan.weighted ? body(double{}, Flag<true>{}) : body(double{}, Flag<false>{});
  else
    plan.weighted ? body(float{}, Flag<true>{}) : body(float{}, Flag<false>{});
}

void stats(const Plan& plan, const StatsSums& sums, int64_t i, int64_t j, void* memory) {
  dispatch(plan, [&](auto type, auto weighted) {
    using T = decltype(type);
    constexpr bool kWeighted = decltype(weighted)::value;
    with_blocks<T>(plan, i, j, memory, [&](Scratch<T>& s, const TilePair<T>& pair) {
      if (!plan.fixed)
        running_stats<T, kWeighted>(plan, sums, pair, s.arena);
      else if (sums.mean)
        fixed_stats<T, kWeighted, true>(plan, sums, pair, s.w, s.arena);
      else
        fixed_stats<T, kWeighted, false>(plan, sums, pair, s.w, s.arena);
    });
  });
}

void stats_backward(const Plan& plan, const Weights& rows, const Weights& cols, const Gradients& gradients,
                    int64_t i, int64_t j, void* memory) {
  dispatch(plan, [&](auto type, auto weighted) {
    using T = decltype(type);
    constexpr bool kWeighted = decltype(weighted)::value;
    with_blocks<T>(plan, i, j, memory, [&](Scratch<T>& s, const TilePair<T>& pair) {
      plan.fixed ? stats_weights<T, true, kWeighted>(plan, rows, cols, pair, s.w, s.arena)
                 : stats_weights<T, false, kWeighted>(plan, rows, cols, pair, s.w, s.arena);
      add_products<T>(pair, s.w, gradients);
    });
  });
}

void softplus(const Plan& plan, const Softplus& values, double* total, int64_t i, int64_t j, void* memory) {
  dispatch(plan, [&](auto type, auto weighted) {
    using T = decltype(type);
    constexpr bool kWeighted = decltype(weighted)::value;
    const Softplus cols = plan.problem.self ? values : Softplus{nullptr, nullptr};
    with_blocks<T>(plan, i, j, memory, [&](Scratch<T>& s, const TilePair<T>& pair) {
      positive_pass<T, false, kWeighted>(values, cols, total, pair, s.w, s.arena);
    });
  });
}

void softplus_backward(const Plan& plan, const Softplus& rows, const Softplus& cols,
                       const Gradients& gradients, double* sigma_sum, int64_t i, int64_t j, void* memory) {
  dispatch(plan, [&](auto type, auto weighted) {
    using T = decltype(type);
    constexpr bool kWeighted = decltype(weighted)::value;
    with_blocks<T>(plan, i, j, memory, [&](Scratch<T>& s, const TilePair<T>& pair) {
      positive_pass<T, true, kWeighted>(rows, cols, sigma_sum, pair, s.w, s.arena);
      add_products<T>(pair, s.w, gradients);
    });
  });
}

}  // namespace

const PairKernels& table();
const PairKernels& table() {
  static constexpr PairKernels t{scratch_bytes,     stats,         stats_backward, softplus,
                                 softplus_backward, largest_square};
  return t;
}

}  // namespace pysupcon::cpu::PYSUPCON_ISA
