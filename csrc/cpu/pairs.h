// What one thread does with one pair of row blocks: the interface between the driver (schedule, memory,
// threads) and the vector code, which is compiled once per instruction set. Plain data only.
#pragma once
#include <cstddef>
#include <cstdint>

#include "cpu/kernels.h"

namespace pysupcon::cpu {

constexpr double kLog2e = 1.4426950408889634074;
constexpr double kLn2 = 0.69314718055994530942;
// Stands for "no reference": 2^(s - kNever) is 0, and kNever survives a conversion to float.
constexpr double kNever = 1e30;
constexpr int kMaxBlock = 256;  // rows in a block, at most

// The vector code works in base 2: t_ij = log2(e) s_ij. Everything here is fixed before the first pair.
struct Plan {
  Problem problem;
  int block = 0;       // rows in a block, of either side
  bool fixed = false;  // one reference for all pairs is safe: see shift
  double shift = 0;    // whole, >= every t_ij; fixed means 2^(t_ij - shift) neither overflows nor underflows
  size_t scratch = 0;  // bytes per thread
  // Weights of the rows as candidates, by position, of the arithmetic type; null: all 1. With l = log2 of a
  // weight and `top` the largest of the side, fixed: 2^(l - top); otherwise l - top; in the positive pass l.
  bool weighted = false;  // one of them is given
  const void *anchor_weights = nullptr, *candidate_weights = nullptr;
};

// Partial sums over the pairs seen so far, by row. fixed: n, p of 2^(t - shift) times the weight, the others
// of t - shift; otherwise n, p of 2^(t + weight - max), with max_n, max_p of the arithmetic type (float or
// double), -inf where nothing was seen, and the others of t.
struct StatsSums {
  double *n, *p, *positive_sum, *instance_sum;
  void *max_n, *max_p;
  // By row, [dim], of the arithmetic type; only fixed: the sum of n with each term times its candidate. May
  // be null.
  void* mean = nullptr;
};

// The weight of pair (i, j) is w_i(t) + w_j(t), w(t) = 2^(t - reference) factor, times the weight of the
// other row as a candidate, with one (reference, factor) for different and one for same class; same class
// adds the constant, same instance the other constant. By position, of the arithmetic type. fixed: reference
// is the shift and not stored.
struct Weights {
  const void *reference_n, *factor_n, *reference_p, *factor_p;  // factors null: this side gives nothing
  const void *constant_p, *constant_a;                          // likewise
};

// Positive pass: by position, of the arithmetic type; reference = log2(e) (n + epsilon), -kNever for n =
// -inf.
struct Softplus {
  const void *reference, *factor;  // factor null: this side gives nothing
};

// What a thread's scratch begins with: the blocks that it still holds, which are not loaded again, and those
// of the next pair, whose rows are fetched into the cache meanwhile. -1: none.
struct Held {
  int64_t i = -1, j = -1, next_i = -1, next_j = -1;
};

struct PairKernels {
  size_t (*scratch_bytes)(const Plan&);
  // A pair of blocks (i, j); self: i <= j, for the rows of both. scratch: scratch_bytes, beginning with Held,
  // which whoever starts on another problem empties.
  void (*stats)(const Plan&, const StatsSums&, int64_t i, int64_t j, void* scratch);
  void (*stats_backward)(const Plan&, const Weights& rows, const Weights& cols, const Gradients&, int64_t i,
                         int64_t j, void* scratch);
  void (*softplus)(const Plan&, const Softplus&, double* total, int64_t i, int64_t j, void* scratch);
  void (*softplus_backward)(const Plan&, const Softplus& rows, const Softplus& cols, const Gradients&,
                            double* sigma_sum, int64_t i, int64_t j, void* scratch);
  double (*largest_square)(const Problem&, const Side&, int64_t first_row,
                           int64_t last_row);  // of a row; NaN if one is
};

}  // namespace pysupcon::cpu
