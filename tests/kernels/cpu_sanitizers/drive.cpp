// Calls every entry point of csrc/cpu under the address and undefined-behaviour sanitizers. Buffers have
// exactly the required size. Covers shapes around the size of a block and of a tile, all types, all forms and
// both kinds of reference.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <vector>

#include "cpu/kernels.h"
#include "rows.h"

using namespace pysupcon::cpu;

namespace {

void run_here(int64_t count, void* context, void (*body)(void*, int64_t, int64_t)) {
  body(context, 0, (count + 1) / 2);
  if (count > 1) body(context, (count + 1) / 2, count);
}
int64_t two() { return 2; }
constexpr Threads kThreads{two, run_here};

void run(Type type, int64_t m, int64_t n, int64_t dim, int classes, double size, bool candidates,
         bool weights) {
  const Rows a(type, m, dim, classes, size, 1), b(type, n, dim, classes, size, 2);
  Problem q;
  q.type = type, q.dim = dim, q.scale = 2, q.self = !candidates;
  std::vector<double> stat_n(m), stat_p(m), ones(m, 1. / m), out(m), positive(m), instance(m);
  const int64_t columns = candidates ? n : m;
  const std::vector<double> theirs(columns, 1), their_ones(columns, 1);
  const size_t bytes = type == Type::f64 ? 8 : 4;
  std::vector<char> gx(m * dim * bytes), gc(n * dim * bytes), mean(m * dim * bytes);
  std::vector<double> log_weights(columns), own_weights(m);
  for (int64_t j = 0; j < columns; ++j) log_weights[j] = j % 7 ? 0.3 * double(j % 5) : -INFINITY;
  for (int form = 0; form < (candidates ? 2 : 1); ++form)
    for (const auto& [negatives, positives] : {std::pair(true, true), {true, false}, {false, true}}) {
      q.negatives = negatives, q.positives = positives;
      const bool owners = form == 1, instances = dim % 2 == 1;
      q.anchors = a.side(instances), q.candidates = (candidates ? b : a).side(instances);
      if (weights) q.candidates.log_weight = log_weights.data();
      if (weights && !candidates) q.anchors.log_weight = log_weights.data();
      pair_stats(q, kThreads,
                 {stat_n.data(), stat_p.data(), positive.data(), instances ? instance.data() : nullptr,
                  candidates ? mean.data() : nullptr});
      if (weights && owners) q.anchors.log_weight = own_weights.data();
      const Gradients g{gx.data(), candidates && !owners ? gc.data() : nullptr};
      const double *own_a = instances ? ones.data() : nullptr,
                   *their_a = instances ? their_ones.data() : nullptr;
      const StatsGrad mine{stat_n.data(), stat_p.data(), ones.data(), ones.data(), ones.data(), own_a};
      StatsGrad other;
      if (owners)
        other = {theirs.data(),     theirs.data(),     their_ones.data(),
                 their_ones.data(), their_ones.data(), their_a};
      pair_stats_backward(q, kThreads, mine, other, g);
      q.negatives = false, q.positives = true;
      positive_softplus(q, kThreads, stat_n.data(), 0.25, out.data());
      SoftplusGrad theirs_w;
      if (owners) theirs_w = {theirs.data(), their_ones.data()};
      positive_softplus_backward(q, kThreads, {stat_n.data(), ones.data()}, theirs_w, 0.25, g, out.data());
    }
}

}  // namespace

int main() {
  int cases = 0;
  for (const Type type : {Type::f32, Type::f64, Type::bf16, Type::f16})
    for (const int64_t rows : {1, 2, 63, 64, 65, 300})
      for (const int64_t dim : {1, 16, 33})
        for (const double size : {0.1, 30.}) {  // one reference for all, running maxima
          for (const bool weights : {false, true}) {
            run(type, rows, 0, dim, 1 + static_cast<int>(rows / 7), size, false, weights);
            run(type, rows, rows / 2 + 1, dim, 3, size, true, weights);
            cases += 2;
          }
        }
  std::printf("%d cases\n", cases);
}
