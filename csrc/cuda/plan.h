// Everything that is decided before a kernel starts, in plain C++: sizes of the workspace, how many ways the
// columns are split. No device is asked, so a test reaches all of it without one.
#pragma once
#include <cstddef>
#include <cstdint>
#include <initializer_list>

#include "launch.h"

#ifdef __CUDACC__
#define PYSUPCON_ANYWHERE __host__ __device__
#else
#define PYSUPCON_ANYWHERE
#endif

namespace pysupcon::cuda {

constexpr int64_t kMaxRows = (int64_t(1) << 31) - 256;
constexpr int kThreads = 256;          // of a block of the kernels that are not about pairs
constexpr int kUnitRows = 64;          // rows of a unit of the sorted copy
constexpr int kBlockRows = 128;        // rows that a thread block of the pair kernels owns
constexpr int kWideBlockRows = 256;    // the same of backward_resident where shared memory is short
constexpr int kPadRows = 256;          // the sorted copy ends in zeros up to a multiple of so many rows
constexpr int kResidentWidth = 128;    // 16-bit rows of at most so many numbers take the resident kernels
constexpr int kGradientShare = 256;    // gradient columns that a block accumulates (128 with several parts)
constexpr int kTwoBlocks = 136 << 10;  // shared memory of a multiprocessor that holds two backward blocks
constexpr int kScanned = 16384;        // up to so many rows every block looks for the extremes itself
constexpr int kExtremeBlocks = 256;    // of the kernel that does it otherwise
constexpr int kVerdictBlocks = 1024;   // that look at the rows of one side, at most; likewise at its order
constexpr int kTriangleRatio = 2;      // row block by tile of the triangular forward
constexpr int kNegativePart = 8;       // bytes of a row's part in the forward: of negatives and of softplus
constexpr int kPositivePart = 24;      // likewise of positives

PYSUPCON_ANYWHERE inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

PYSUPCON_ANYWHERE inline int64_t verdict_blocks(int64_t items) {
  const int64_t blocks = divide_up(items, kThreads);
  return blocks < kVerdictBlocks ? blocks : kVerdictBlocks;
}

// How a launch shares its units (row block, column tile), row block by row block, among thread blocks: each
// takes an equal run of them. A row block whose tiles fall into several runs leaves a part in each, at most
// two parts a run, and the thread block that ends last merges them in the order of the runs.
struct Runs {
  int row_blocks, tiles, blocks;
  int64_t units;  // row_blocks * tiles

  PYSUPCON_ANYWHERE bool cut() const {
    return blocks != row_blocks;
  }  // otherwise every run is one whole row block
  int64_t parts() const { return cut() ? 2 * int64_t(blocks) : 0; }
};

// What a pair kernel's thread block owns and visits.
struct Shape {
  int rows, columns;       // of its block, of a tile
  int per_multiprocessor;  // blocks that run there at the same time
  int shares;              // blocks that share the width of a gradient
  int share_width;         // numbers of a gradient row that each accumulates
};

// The triangular forward (triangular.cuh): row block b has the tiles from its own columns on, and its units,
// row block by row block in the order 0, last, 1, last but one, ..., are cut into equal runs.
struct Triangle {
  unsigned long long* sums;  // [rows], label-sorted; null: there is no triangular pass
  float* norms;              // [kExtremeBlocks]
  int row_blocks, tiles, blocks;
  int64_t units;

  // Tiles of row blocks b and row_blocks - 1 - b together, whatever b.
  PYSUPCON_ANYWHERE int span() const { return 2 * tiles - kTriangleRatio * (row_blocks - 1); }
  PYSUPCON_ANYWHERE int64_t run_begin(int run) const { return units * run / blocks; }
};

// A pass over pairs of one kind: a launch for each side that has a result.
struct Pass {
  Runs anchor_runs, candidate_runs;  // anchors (candidates) being the rows
  // How many parts of a row block are written; [row blocks][shares], null where no row block is shared.
  int32_t *anchor_arrivals, *candidate_arrivals;
};

// Coefficients of the gradient of one side's anchors, label-sorted and padded; see tiles.cuh.
struct Tables {
  float *n, *p, *rest;  // [rows][2]
  float* instance;      // [rows]
};

struct Workspace {
  void *anchor_rows, *candidate_rows;       // 16-bit copies; the same where the candidates are the anchors
  float* scale;                             // [2], see Scale
  int32_t *anchor_range, *candidate_range;  // [rows][2] same-class rows of the other side
  int32_t *anchor_instance, *candidate_instance;  // [rows][2] likewise of the same instance, or null
  int32_t *anchor_self,
      *candidate_inverse;  // [anchors] sorted candidate; [candidates] sorted place; self_index only
  float *anchor_bias, *candidate_bias;  // [rows padded to kPadRows], see Pairs; null without weights
  float* extremes;                      // [4] of the upstream gradients and the statistics
  float* extreme_parts;                 // [kExtremeBlocks][4], null where every block scans the rows itself
  Tables anchor, candidate;
  void* parts;                   // of row blocks that several runs share; all launches use the same
  float* row_parts;              // of what softplus has beside its gradient
  unsigned long long* verdicts;  // of prepare()'s blocks
  int32_t* arrivals;
  int64_t arrival_count;
  Pass negatives, positives;
  Triangle triangle;
  int64_t bytes;
};

// Whole row blocks, unless they would leave more than a seventeenth of the device idle at the end. Pairs
// within classes are few and uneven: there the device balances whole row blocks, once there are enough.
inline Runs share_out(int64_t rows, int64_t columns, const Shape& shape, bool within, int multiprocessors) {
  const int64_t row_blocks = divide_up(rows, shape.rows), tiles = divide_up(columns, shape.columns);
  int64_t slots = int64_t(multiprocessors) * shape.per_multiprocessor / shape.shares;
  if (slots < 1) slots = 1;
  Runs runs{int(row_blocks), int(tiles > 0 ? tiles : 1), int(row_blocks), 0};
  runs.units = row_blocks * runs.tiles;
  const bool idle = divide_up(row_blocks, slots) * slots * 16 > row_blocks * 17;
  if (within ? row_blocks < slots : idle) {
    runs.blocks = int(slots < runs.units ? slots : runs.units);
  }
  return runs;
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
};
}  // namespace detail

inline int copy_parts(const Problem& p) { return p.dtype == Dtype::f32 ? p.parts : 1; }
// A slice: the numbers of a row that pass through shared memory together.
inline int64_t row_slices(const Problem& p) { return divide_up(p.width, copy_parts(p) == 1 ? 64 : 32); }
inline bool resident(const Problem& p) { return copy_parts(p) == 1 && p.width <= kResidentWidth; }
inline bool is_backward(Operation o) {
  return o == Operation::pair_stats_backward || o == Operation::positive_softplus_backward;
}
inline bool is_softplus(Operation o) {
  return o == Operation::positive_softplus || o == Operation::positive_softplus_backward;
}
// Which pairs are visited.
inline bool visits_negatives(const Problem& p) { return !is_softplus(p.operation) && p.negatives; }
inline bool visits_positives(const Problem& p) { return is_softplus(p.operation) || p.positives; }

inline bool weighted(const Problem& p) { return p.log_weights || p.candidate_log_weights; }

// Half of the negatives will do, and there are enough of them to pay for two more launches.
inline bool triangular(const Problem& p) {
  return p.operation == Operation::pair_stats && p.one_set && p.negatives && resident(p) && !weighted(p) &&
         p.anchors.count >= p.triangular_rows;
}

inline Shape pair_shape(const Problem& p) {
  const int parts = copy_parts(p);
  if (!is_backward(p.operation))
    return resident(p) ? Shape{kBlockRows, 64, 2, 1, 0} : Shape{kBlockRows, parts == 1 ? 128 : 64, 1, 1, 0};
  if (resident(p)) {
    const bool two = p.shared_memory >= kTwoBlocks;
    return {two ? kBlockRows : kWideBlockRows, 64, two ? 2 : 1, 1, kResidentWidth};
  }
  const int width = parts == 1 ? kGradientShare : kGradientShare / 2;
  return {kBlockRows, parts == 3 ? 32 : 64, 1, int(divide_up(p.width, width)), width};
}

inline Workspace lay_out(const Problem& p) {
  Workspace w{};
  detail::Arena arena{reinterpret_cast<uintptr_t>(p.workspace)};
  const bool plain = p.dtype == Dtype::f64;
  const bool backward = is_backward(p.operation);
  const int64_t m = p.anchors.count, n = p.candidates.count;

  w.verdicts = arena.take<unsigned long long>(8 * 4 * kVerdictBlocks);  // rows and order, of two sides
  w.anchor_range = arena.take<int32_t>(8 * m);
  if (p.grad_candidates) w.candidate_range = arena.take<int32_t>(8 * n);
  if (p.anchors.instances && !is_softplus(p.operation)) {
    w.anchor_instance = arena.take<int32_t>(8 * m);
    if (p.grad_candidates) w.candidate_instance = arena.take<int32_t>(8 * n);
  }
  if (p.self_index) {
    w.anchor_self = arena.take<int32_t>(4 * m);
    w.candidate_inverse = arena.take<int32_t>(4 * n);
  }
  if (!plain) {
    w.scale = arena.take<float>(8);
    const int64_t row_bytes = row_slices(p) * (copy_parts(p) == 1 ? 128 : 64) * copy_parts(p);
    w.anchor_rows = arena.take(divide_up(m, kPadRows) * kPadRows * row_bytes);
    w.candidate_rows = p.one_set ? w.anchor_rows : arena.take(divide_up(n, kPadRows) * kPadRows * row_bytes);
    if (weighted(p)) {
      w.anchor_bias = arena.take<float>(4 * divide_up(m, kPadRows) * kPadRows);
      w.candidate_bias = p.one_set ? w.anchor_bias : arena.take<float>(4 * divide_up(n, kPadRows) * kPadRows);
    }
    const Shape shape = pair_shape(p);
    int64_t part_bytes = 0;  // launch after launch uses the same parts, but arrivals of its own
    const auto plan = [&](Pass& pass, bool within, int64_t row_part) {
      pass.anchor_runs = share_out(m, n, shape, within, p.multiprocessors);
      pass.candidate_runs = share_out(n, m, shape, within, p.multiprocessors);
      const auto add = [&](const Runs& runs) {
        const int64_t bytes = row_part * runs.parts() * shape.rows;
        if (bytes > part_bytes) part_bytes = bytes;
        if (runs.cut()) w.arrival_count += int64_t(runs.row_blocks) * shape.shares;
      };
      add(pass.anchor_runs);
      if (p.grad_candidates) add(pass.candidate_runs);
    };
    const int64_t gradient = int64_t(4) * shape.shares * shape.share_width;
    const int64_t positive = is_softplus(p.operation) ? kNegativePart : kPositivePart;
    if (visits_negatives(p)) plan(w.negatives, false, backward ? gradient : kNegativePart);
    if (visits_positives(p)) plan(w.positives, true, backward ? gradient : positive);
    w.parts = arena.take(part_bytes);
    w.arrivals = arena.take<int32_t>(4 * w.arrival_count);
    int32_t* next = w.arrivals;
    const auto arrivals = [&](const Runs& runs) {
      int32_t* mine = next;
      next += runs.cut() ? int64_t(runs.row_blocks) * shape.shares : 0;
      return runs.cut() ? mine : nullptr;
    };
    for (Pass* pass : {&w.negatives, &w.positives}) {
      pass->anchor_arrivals = arrivals(pass->anchor_runs);
      if (p.grad_candidates) pass->candidate_arrivals = arrivals(pass->candidate_runs);
    }
    if (backward) {
      const auto tables = [&](Tables& t, int64_t rows) {
        const int64_t padded = divide_up(rows, kUnitRows) * kUnitRows;
        const bool positives = visits_positives(p) && !is_softplus(p.operation);
        if (visits_negatives(p) || !positives) t.n = arena.take<float>(8 * padded);
        if (positives) t.p = arena.take<float>(8 * padded), t.rest = arena.take<float>(8 * padded);
        if (positives && p.anchors.instances) t.instance = arena.take<float>(4 * padded);
      };
      tables(w.anchor, m);
      if (p.candidate_grad_n) tables(w.candidate, n);
      w.extremes = arena.take<float>(16);
      if (m > kScanned || (p.candidate_grad_n && n > kScanned))
        w.extreme_parts = arena.take<float>(16 * kExtremeBlocks);
      if (p.out_grad_n) w.row_parts = arena.take<float>(4 * w.positives.anchor_runs.parts() * shape.rows);
    } else if (triangular(p)) {
      const int blocks = int(divide_up(m, shape.rows)), tiles = int(divide_up(m, shape.columns));
      w.triangle = {
          arena.take<unsigned long long>(8 * m), arena.take<float>(4 * kExtremeBlocks), blocks, tiles, 0, 0};
      w.triangle.units = int64_t(blocks / 2) * w.triangle.span() + (blocks % 2 ? tiles - (blocks - 1) : 0);
      const int64_t slots = int64_t(p.multiprocessors) * shape.per_multiprocessor;
      w.triangle.blocks = int(slots < 1 ? 1 : slots < w.triangle.units ? slots : w.triangle.units);
    }
  }
  w.bytes = arena.used;
  return w;
}

}  // namespace pysupcon::cuda
