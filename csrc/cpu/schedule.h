// Which pairs of blocks are visited, in rounds of disjoint groups of pairs: a group is one thread's, within a
// round no two groups touch the same rows, and between rounds there is a barrier, so the order in which a
// row's sums grow does not depend on the number of threads.
#pragma once
#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include "cpu/pairs.h"

namespace pysupcon::cpu {

struct BlockPair {
  int64_t i, j;
};

class Round {
 public:
  int64_t groups() const { return static_cast<int64_t>(ends_.size()); }
  const BlockPair* begin(int64_t group) const { return pairs_.data() + (group ? ends_[group - 1] : 0); }
  const BlockPair* end(int64_t group) const { return pairs_.data() + ends_[group]; }

  void add(const BlockPair& pair) { pairs_.push_back(pair); }
  void close_group() {
    if (pairs_.size() > (ends_.empty() ? 0 : ends_.back())) ends_.push_back(pairs_.size());
  }
  void clear() {
    pairs_.clear();
    ends_.clear();
  }

 private:
  std::vector<BlockPair> pairs_;
  std::vector<size_t> ends_;
};

inline int64_t block_count(const Side& side, int block) { return (side.count + block - 1) / block; }

// Sorted by class: two blocks hold a same-class pair exactly if their ranges of classes meet.
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

// Blocks that stand together for their neighbours: all pairs of two such sets are one group, in an order in
// which each pair has a block in common with the one before. A block is then loaded for one pair in two or
// less, and there are still sets enough for many threads.
inline int64_t blocks_in_set(int64_t blocks) { return blocks >= 256 ? 4 : blocks >= 64 ? 2 : 1; }

// Calls run(round) for each round. Self: every unordered pair once, and each block with itself. Otherwise:
// every block of anchors with every block of candidates.
template <class Run>
void each_round(const Plan& plan, const Run& run) {
  const Problem& q = plan.problem;
  const int64_t rows = block_count(q.anchors, plan.block), cols = block_count(q.candidates, plan.block);
  if (!rows || !cols) return;
  const bool sparse = !q.negatives;
  Round round;
  const auto add = [&](int64_t i, int64_t j) {
    if (!sparse || classes_meet(plan, i, j)) round.add({i, j});
    round.close_group();
  };
  const auto flush = [&] {
    const bool any = round.groups() > 0;
    if (any) run(round);
    round.clear();
    return any;
  };

  if (!q.self) {  // round r: block i with block i + r, all different
    const int64_t n = std::max(rows, cols);
    for (int64_t r = 0; r < n; ++r) {
      for (int64_t i = 0; i < rows; ++i)
        if (const int64_t j = (i + r) % n; j < cols) add(i, j);
      flush();
    }
    return;
  }
  if (sparse) {  // pairs at distance d in two rounds; once a distance has none, no larger one has
    for (int64_t i = 0; i < rows; ++i) add(i, i);
    flush();
    for (int64_t d = 1; d < rows; ++d) {
      bool any = false;
      for (int64_t odd = 0; odd < 2; ++odd) {
        for (int64_t i = 0; i + d < rows; ++i)
          if (i / d % 2 == odd) add(i, i + d);
        any |= flush();
      }
      if (!any) break;
    }
    return;
  }
  const int64_t each = blocks_in_set(rows), sets = (rows + each - 1) / each;
  const auto meet = [&](int64_t a, int64_t b) {  // a <= b
    bool forward = true;
    for (int64_t i = a * each; i < std::min((a + 1) * each, rows); ++i, forward = !forward) {
      const int64_t first = a == b ? i : b * each, last = std::min((b + 1) * each, rows) - 1;
      for (int64_t k = 0; k <= last - first; ++k) {
        const int64_t j = forward ? first + k : last - k;
        round.add({i, j});
      }
    }
    round.close_group();
  };
  for (int64_t a = 0; a < sets; ++a) meet(a, a);
  flush();
  // Round-robin tournament (circle method): n - 1 rounds of n / 2 pairs of sets.
  const int64_t n = sets + sets % 2;
  for (int64_t r = 0; r < n - 1; ++r) {
    const auto player = [&](int64_t seat) { return seat == 0 ? n - 1 : (r + seat - 1) % (n - 1); };
    for (int64_t s = 0; s < n / 2; ++s) {
      const int64_t i = player(s), j = player(n - 1 - s);
      if (i < sets && j < sets) meet(std::min(i, j), std::max(i, j));
    }
    flush();
  }
}

}  // namespace pysupcon::cpu
