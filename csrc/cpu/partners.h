// How many threads share a pass.
#pragma once
#include <algorithm>
#include <cstdint>

#include "cpu/schedule.h"

namespace pysupcon::cpu {

// The number of pairs of rows that a pass visits. Without negatives: the pairs of the same class.
inline double count_pairs(const Problem& q) {
  const int64_t m = q.anchors.count, n = q.candidates.count;
  double pairs = q.negatives ? static_cast<double>(m) * n : 0;
  for (int64_t i = 0, j = 0; !q.negatives && i < m && j < n;) {
    const int32_t cls = q.anchors.cls[i], other = q.candidates.cls[j];
    const int64_t first_i = i, first_j = j;
    while (i < m && q.anchors.cls[i] <= std::min(cls, other)) ++i;
    while (j < n && q.candidates.cls[j] <= std::min(cls, other)) ++j;
    pairs += static_cast<double>(i - first_i) * (j - first_j);  // one factor is 0 if the classes differ
  }
  return q.self ? pairs / 2 : pairs;
}

// Chooses the number of workers of each pass: the calling thread and its partners. A partner takes part of
// the work, but on a busy machine the system may not run it, and the caller waits longer than the partner
// saves. After kPatience such passes, passes of that size or smaller run in the caller alone. After kRest of
// them one pass tries again with partners. Each thread that calls the kernels has its own Partners.
class Partners {
 public:
  // The number of workers of the next pass. `products`: work of a pair of rows, in units of D
  // multiplications.
  int64_t choose(const Problem& q, int products, const Schedule& schedule, const Threads& threads) {
    const double work = count_pairs(q) * q.dim;
    const auto enough = static_cast<int64_t>(std::min(work / kWorkOfOne, 1e6));
    const int64_t workers = std::min({threads.count(), schedule.width(), enough});
    if (workers <= 1) return 1;
    saved_ = products * work / kWorkOfSecond * (1 - 1. / static_cast<double>(workers));
    if (saved_ > too_small_ || rest_ == 0) return workers;
    --rest_;
    return 1;
  }
  // Records how long the caller has waited for its partners in the pass that choose() was called for last.
  void note(double waited_seconds) {
    if (waited_seconds <= saved_ + kUsualWait) {
      late_ = std::max(late_ - 1, 0);
    } else if (++late_ == kPatience) {
      late_ = kPatience - 1;
      rest_ = kRest;
      too_small_ = saved_;
    }
  }

 private:
  static constexpr double kWorkOfOne = 1 << 17;  // multiplications: the least work of a worker
  static constexpr double kWorkOfSecond = 4e10;  // multiplications per second of a core with AVX-512, roughly
  static constexpr double kUsualWait = 30e-6;    // seconds: workers do not finish at the same time
  static constexpr int kPatience = 4, kRest = 256;  // passes
  double saved_ = 0;                                // seconds that the partners save in this pass, estimated
  double too_small_ = 0;  // passes that save at most this run in the caller alone while rest_ > 0
  int late_ = 0;          // passes that were late, minus passes that were not, at least 0
  int rest_ = 0;          // passes to run in the caller alone before the next try
};

}  // namespace pysupcon::cpu
