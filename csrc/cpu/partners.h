// How many threads share a pass.
#pragma once
#include <algorithm>
#include <cstdint>

#include "cpu/schedule.h"

namespace pysupcon::cpu {

// Pairs of rows that are visited.
inline double count_pairs(const Problem& q) {
  const int64_t m = q.anchors.count, n = q.candidates.count;
  double pairs = q.negatives ? static_cast<double>(m) * n : 0;
  for (int64_t i = 0, j = 0; !q.negatives && i < m && j < n;) {
    const int32_t cls = q.anchors.cls[i], other = q.candidates.cls[j];
    const int64_t first_i = i, first_j = j;
    while (i < m && q.anchors.cls[i] <= std::min(cls, other)) ++i;
    while (j < n && q.candidates.cls[j] <= std::min(cls, other)) ++j;
    pairs += static_cast<double>(i - first_i) * (j - first_j);  // one of them is 0 if the classes differ
  }
  return q.self ? pairs / 2 : pairs;
}

// The number of workers of the next pass. On a busy machine the caller may wait longer for a partner that the
// system does not run than the partner saves. After several such passes, passes of that size run in the
// caller alone for a while; then one pass tries again. Each thread that calls the kernels counts for itself.
class Partners {
 public:
  // products: of a pair of rows, in units of D multiplications.
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
  // Takes note of the time that the caller of a pass with several workers has waited for the others.
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
  static constexpr double kWorkOfOne = 1 << 17;  // multiplications for which another worker pays
  static constexpr double kWorkOfSecond = 4e10;  // multiplications of a core with AVX-512, roughly
  static constexpr double kUsualWait = 30e-6;    // seconds: groups do not end at the same time
  static constexpr int kPatience = 8;            // late passes until passes run in the caller alone
  static constexpr int kRest = 256;              // passes that then run in the caller alone
  double saved_ = 0, too_small_ = 0;             // seconds
  int late_ = 0, rest_ = 0;
};

}  // namespace pysupcon::cpu
