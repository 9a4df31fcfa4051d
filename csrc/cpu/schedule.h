// Which pairs of blocks are visited, and in which order. One thread visits all pairs of a group. The order of
// the groups of a block is fixed, so a row's sums are added in an order that does not depend on the number of
// threads.
#pragma once
#include <algorithm>
#include <cstdint>
#include <optional>
#include <utility>

#include "cpu/pairs.h"

namespace pysupcon::cpu {

struct BlockPair {
  int64_t i, j;
};

// All pairs of a block of set a with a block of set b. If both are one set (self, a == b): only (i, j) with
// i <= j.
struct Group {
  int64_t a, b;
  double place = 0;  // in its round, in [0, 1): groups near one place have most blocks in common with those
                     // near the same place of the next round
};

inline int64_t block_count(const Side& side, int block) { return (side.count + block - 1) / block; }

// Whether two blocks hold a same-class pair: rows are sorted by class, so it is whether their ranges of
// classes overlap.
inline bool classes_meet(const Plan& plan, int64_t i, int64_t j) {
  const Problem& q = plan.problem;
  const auto range = [&](const Side& s, int64_t b) {
    const int64_t first = b * plan.block, last = std::min(first + plan.block, s.count) - 1;
    return std::pair(s.cls[first], s.cls[last]);
  };
  const auto [a0, a1] = range(q.anchors, i);
  const auto [b0, b1] = range(q.candidates, j);
  return a0 <= b1 && b0 <= a1;
}

// Self: every unordered pair of blocks once, and each block with itself. Otherwise: every block of anchors
// with every block of candidates. Without negatives, pairs of blocks without a common class are left out.
// Groups come in rounds of disjoint groups, so that consecutive groups can run at the same time.
class Schedule {
 public:
  explicit Schedule(const Plan& plan)
      : plan_(plan),
        sparse_(!plan.problem.negatives),
        rows_(block_count(plan.problem.anchors, plan.block)),
        cols_(block_count(plan.problem.candidates, plan.block)),
        each_(plan.problem.self && !sparse_ ? blocks_in_set(rows_) : 1),
        sets_((rows_ + each_ - 1) / each_) {
    if (!rows_ || !cols_)
      rounds_ = 0;
    else if (!plan.problem.self)
      rounds_ = std::max(rows_, cols_);
    else if (sparse_)
      rounds_ = 2 * rows_ - 1;
    else
      rounds_ = sets_ + sets_ % 2;
  }

  // The next group, or nothing.
  std::optional<Group> next() {
    for (; round_ < rounds_; ++round_, seat_ = 0) {
      while (seat_ < seats())
        if (auto group = find(seat_++)) {
          distance_has_pairs_ = true;
          group->place = static_cast<double>(seat_ - 1) / static_cast<double>(seats());
          return group;
        }
      if (plan_.problem.self && sparse_ && round_ % 2 == 0) {  // both rounds of a distance are over
        if (!distance_has_pairs_) rounds_ = 0;                 // no larger distance has pairs
        distance_has_pairs_ = false;
      }
    }
    return std::nullopt;
  }

  // A resource is a set of rows that groups add to. Groups with a common resource do not run at the same
  // time.
  int64_t resources() const { return plan_.problem.self ? sets_ : rows_ + cols_; }
  std::pair<int64_t, int64_t> resources(const Group& g) const {
    return {g.a, plan_.problem.self ? g.b : rows_ + g.b};
  }
  // The largest number of groups that can run at the same time.
  int64_t width() const {
    return plan_.problem.self ? std::max<int64_t>(sets_ / 2, 1) : std::min(rows_, cols_);
  }

  BlockPair first_pair(const Group& g) const { return {g.a * each_, g.b * each_}; }

  // visit(pair, next pair or null) for each pair of a group, in an order in which each pair has a block in
  // common with the one before.
  template <class Visit>
  void each_pair(const Group& g, const Visit& visit) const {
    std::optional<BlockPair> held;
    bool forward = true;
    for (int64_t i = g.a * each_; i < std::min((g.a + 1) * each_, rows_); ++i, forward = !forward) {
      const int64_t first = g.a == g.b && plan_.problem.self ? i : g.b * each_;
      const int64_t last = std::min((g.b + 1) * each_, cols_) - 1;
      for (int64_t k = 0; k <= last - first; ++k) {
        const BlockPair pair{i, forward ? first + k : last - k};
        if (held) visit(*held, &pair);
        held = pair;
      }
    }
    if (held) visit(*held, nullptr);
  }

 private:
  // Blocks in a set. With larger sets a thread loads a block less often; the number of sets stays large
  // enough for many threads.
  static int64_t blocks_in_set(int64_t blocks) { return blocks >= 256 ? 4 : blocks >= 64 ? 2 : 1; }

  int64_t seats() const {
    if (!plan_.problem.self) return rows_;
    if (round_ == 0) return sets_;
    return sparse_ ? rows_ - (round_ + 1) / 2 : (sets_ + sets_ % 2) / 2;
  }

  // The group at a seat of this round, or nothing.
  std::optional<Group> find(int64_t seat) const {
    // Nothing if the pass needs no negatives and the two blocks have no common class.
    const auto unless_apart = [&](int64_t i, int64_t j) -> std::optional<Group> {
      if (sparse_ && !classes_meet(plan_, i, j)) return std::nullopt;
      return Group{i, j};
    };
    if (!plan_.problem.self) {  // round r: block i with block i + r
      const int64_t j = (seat + round_) % rounds_;
      return j < cols_ ? unless_apart(seat, j) : std::nullopt;
    }
    if (round_ == 0) return unless_apart(seat, seat);
    if (sparse_) {  // two rounds for the pairs at each distance
      const int64_t distance = (round_ + 1) / 2;
      return seat / distance % 2 == round_ % 2 ? std::nullopt : unless_apart(seat, seat + distance);
    }
    // Round-robin tournament (circle method): n - 1 rounds of n / 2 pairs of sets.
    const int64_t n = sets_ + sets_ % 2, round = round_ - 1;
    const auto player = [&](int64_t at) { return at == 0 ? n - 1 : (round + at - 1) % (n - 1); };
    const int64_t i = player(seat), j = player(n - 1 - seat);
    if (i >= sets_ || j >= sets_) return std::nullopt;
    return Group{std::min(i, j), std::max(i, j)};
  }

  const Plan& plan_;
  bool sparse_;          // no negatives: only pairs of blocks with a common class
  int64_t rows_, cols_;  // blocks of each side
  int64_t each_, sets_;  // blocks in a set; sets of the anchors
  int64_t rounds_, round_ = 0, seat_ = 0;
  bool distance_has_pairs_ = false;  // sparse: since the last distance
};

}  // namespace pysupcon::cpu
