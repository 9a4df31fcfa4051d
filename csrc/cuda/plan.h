// Everything that is decided before a kernel starts, in plain C++: sizes of the workspace, how many ways the
// columns are split. No device is asked, so a test reaches all of it without one.
#pragma once
#include <cstddef>
#include <cstdint>

#include "launch.h"

namespace pysupcon::cuda {

constexpr int64_t kMaxRows = (int64_t(1) << 31) - 256;
constexpr int kBlockRows = 128;  // rows that a block of the pair kernels owns, forward and backward
constexpr int kForwardColumns = 128, kBackwardColumns = 64;  // columns of a tile
constexpr int kGradientShare = 256;  // gradient columns that a block accumulates (128 with several parts)
constexpr int kFanOut = 64;          // of the tree of sums
constexpr int kMaxLevels = 6;        // 64^6 > kMaxRows

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Sums of 64, 64^2, ... consecutive label-sorted rows; level[k] holds divide_up(count, 64^(k + 1)) rows of
// `width`.
struct SumTree {
  void* level[kMaxLevels];
  int levels;
};

struct Workspace {
  void *anchor_rows, *candidate_rows;       // 16-bit copies; the same where the candidates are the anchors
  int32_t *anchor_range, *candidate_range;  // [rows][2] same-class rows of the other side
  int32_t *anchor_self,
      *candidate_inverse;     // [anchors] sorted candidate; [candidates] sorted place; self_index only
  int32_t* candidate_anchor;  // [candidates] sorted anchor, -1; positive_sum_backward only
  float* largest;             // the largest upstream gradient
  float *anchor_n, *anchor_p, *candidate_n, *candidate_p;  // [rows padded][2] gradient coefficients
  float *parts, *row_parts;                                // of the splits
  SumTree candidate_sums, candidate_weighted, anchor_weighted;
  int anchor_splits,
      candidate_splits;  // shares that the columns are cut into, anchors (candidates) being the rows
  int64_t bytes;
};

// Small batches have fewer row blocks than the device has multiprocessors: cut the columns until all are
// busy. The parts take at most 128 KiB (forward: 2 KiB) per wanted block, whatever the batch.
inline int column_splits(int64_t row_blocks, int64_t tiles, int64_t wanted_blocks) {
  int64_t splits = row_blocks > 0 ? wanted_blocks / row_blocks : 1;
  if (splits > 32) splits = 32;
  if (splits > tiles) splits = tiles;
  return splits < 1 ? 1 : int(splits);
}

namespace detail {
struct Arena {
  uintptr_t base;
  int64_t used = 0;
  template <class T = void>
  T* take(int64_t bytes) {
    T* p = reinterpret_cast<T*>(base + uintptr_t(used));
    used += divide_up(bytes, 256) * 256;
    return p;
  }
  SumTree tree(int64_t count, int64_t row_bytes) {
    SumTree t{};
    while (count > kFanOut) {
      count = divide_up(count, kFanOut);
      t.level[t.levels++] = take(count * row_bytes);
    }
    return t;
  }
};
}  // namespace detail

// Chunks of 8 numbers in a row of the 16-bit copy.
inline int64_t row_chunks(const Problem& p) { return divide_up(p.width, 8); }
inline int copy_parts(const Problem& p) { return p.dtype == Dtype::f32 ? p.parts : 1; }

inline Workspace lay_out(const Problem& p) {
  Workspace w{};
  detail::Arena arena{reinterpret_cast<uintptr_t>(p.workspace)};
  const bool plain = p.dtype == Dtype::f64;
  const bool sums = p.operation == Operation::positive_sum || p.operation == Operation::positive_sum_backward;
  const bool backward = p.operation == Operation::pair_stats_backward ||
                        p.operation == Operation::positive_softplus_backward ||
                        p.operation == Operation::positive_sum_backward;
  const int64_t m = p.anchors.count, n = p.candidates.count;

  w.anchor_range = arena.take<int32_t>(8 * m);
  if (p.grad_candidates) w.candidate_range = arena.take<int32_t>(8 * n);
  if (p.self_index) {
    w.anchor_self = arena.take<int32_t>(4 * m);
    w.candidate_inverse = arena.take<int32_t>(4 * n);
  }
  if (sums) {
    const int64_t row_bytes = p.width * (plain ? 8 : 4);
    w.candidate_sums = arena.tree(n, row_bytes);
    if (backward && (p.one_set || p.candidate_grad_n)) w.candidate_weighted = arena.tree(n, row_bytes);
    if (p.grad_candidates) {
      w.anchor_weighted = arena.tree(m, row_bytes);
      if (p.self_index) w.candidate_anchor = arena.take<int32_t>(4 * n);
    }
  } else if (!plain) {
    const int64_t row_bytes = row_chunks(p) * 16 * copy_parts(p);
    w.anchor_rows = arena.take(m * row_bytes);
    w.candidate_rows = p.one_set ? w.anchor_rows : arena.take(n * row_bytes);
    const int64_t shares =
        backward ? divide_up(p.width, copy_parts(p) == 1 ? kGradientShare : kGradientShare / 2) : 1;
    const int64_t columns = backward ? kBackwardColumns : kForwardColumns;
    const int64_t wanted = int64_t(p.multiprocessors) * (backward ? 1 : 2);
    const int64_t row_blocks = divide_up(m, kBlockRows) * shares,
                  column_blocks = divide_up(n, kBlockRows) * shares;
    w.anchor_splits = column_splits(row_blocks, divide_up(n, columns), wanted);
    w.candidate_splits = column_splits(column_blocks, divide_up(m, columns), wanted);
    if (backward) {
      const int64_t anchors_padded = divide_up(m, kBackwardColumns) * kBackwardColumns * 8;
      const int64_t candidates_padded = divide_up(n, kBackwardColumns) * kBackwardColumns * 8;
      const bool both = p.operation == Operation::pair_stats_backward;
      w.largest = arena.take<float>(4);
      w.anchor_n = arena.take<float>(anchors_padded);
      const bool alike = p.p == p.n && p.grad_p == p.grad_n;  // one sum over both kinds
      if (both) w.anchor_p = alike ? w.anchor_n : arena.take<float>(anchors_padded);
      if (p.candidate_grad_n) {
        w.candidate_n = arena.take<float>(candidates_padded);
        if (both) w.candidate_p = arena.take<float>(candidates_padded);
      }
      // one launch after the other: both directions use the same parts
      int64_t parts = w.anchor_splits > 1 ? w.anchor_splits * m : 0;
      if (p.grad_candidates && w.candidate_splits > 1 && w.candidate_splits * n > parts)
        parts = w.candidate_splits * n;
      if (parts) w.parts = arena.take<float>(4 * parts * p.width);
      if (w.anchor_splits > 1 && p.out_grad_n) w.row_parts = arena.take<float>(4 * w.anchor_splits * m);
    } else if (w.anchor_splits > 1) {
      w.parts = arena.take<float>(16 * w.anchor_splits * m);
    }
  }
  w.bytes = arena.used;
  return w;
}

}  // namespace pysupcon::cuda
