// A block of rows as the vector code wants it, the product of two blocks tile by tile, and the product of a
// block of weights with a block of rows. Compiled once per instruction set.
#pragma once
#include "cpu/pairs.h"
#include "cpu/simd.h"

namespace pysupcon::cpu::PYSUPCON_ISA {

// The register tile: kRows x kCols similarities, kRows * kVecs accumulators.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kRows = 8, kVecs = 2;  // of 32 registers; divides a block, whatever its size
#elif defined(__AVX2__)
constexpr int kRows = 4, kVecs = 2;  // of 16
#else
constexpr int kRows = 4, kVecs = 2;
#endif
template <class T>
constexpr int kCols = kVecs * kLanes<T>;
constexpr int kTileStride =
    kMaxBlock + 16;  // of the weights: no multiple of a page, and known to the compiler

PYSUPCON_INLINE int round_up(int64_t n, int to) { return static_cast<int>((n + to - 1) / to * to); }
PYSUPCON_INLINE int padded_block(int block) { return round_up(round_up(block, kRows), kCols<float>); }

enum class Kind { skip, negative, positive, mixed };

template <class T>
using Tile = Vec<T>[kRows][kVecs];

template <class T>
struct Block {
  const Side* side;
  int64_t first;         // position of the block's first row
  int count, padded;     // rows, and rows with padding
  int chunks;            // of kCols columns; zero padded
  T* rows;               // [chunks][padded][kCols]: the rows as they are
  T* panels;             // [padded / kCols][chunks * kCols][kCols]: transposed; self: times scale * log2(e)
  LaneInt<T>* cls;       // [padded] class numbers; padding has its own
  LaneInt<T>* instance;  // [padded] instance numbers, where they are wanted
};

// ------------------------------------------------------------------------------------------------ memory of
// a thread
struct Arena {
  char* at;
  template <class T>
  T* take(size_t n) {
    T* p = reinterpret_cast<T*>(at);
    at += (n * sizeof(T) + 127) / 128 * 128;
    return p;
  }
};

template <class T>
PYSUPCON_INLINE Block<T> take_block(Arena& arena, const Plan& plan, bool panels) {
  Block<T> b{};
  b.padded = round_up(padded_block(plan.block), kCols<T>);
  b.chunks = round_up(plan.problem.dim, kCols<T>) / kCols<T>;
  const size_t size = size_t(b.padded) * b.chunks * kCols<T>;
  b.rows = arena.take<T>(size);
  if (panels) b.panels = arena.take<T>(size);
  b.cls = arena.take<LaneInt<T>>(b.padded);
  b.instance = arena.take<LaneInt<T>>(b.padded);
  return b;
}

// ------------------------------------------------------------------------------------------------ loading
#if defined(__aarch64__)
using Half = __fp16;  // g++ has _Float16 in C++ from version 13 only
#elif defined(__clang__) ? __clang_major__ >= 15 : __GNUC__ >= 12
using Half = _Float16;
#else
struct Half {  // older compilers have no _Float16 in C++ on x86
  uint16_t bits;
  operator float() const {
    const uint32_t exponent = bits & 0x7c00u, mantissa = bits & 0x3ffu;
    if (exponent == 0) return (bits & 0x8000u ? -0x1p-24f : 0x1p-24f) * static_cast<float>(mantissa);
    const uint32_t offset = exponent == 0x7c00u ? 224u << 23 : 112u << 23;  // infinity and NaN, or the bias
    const uint32_t wide = uint32_t(bits & 0x8000u) << 16 | (((bits & 0x7fffu) << 13) + offset);
    float value;
    memcpy(&value, &wide, 4);
    return value;
  }
};
#endif

template <class T, class S>
PYSUPCON_INLINE void convert(T* to, const S* from, int n) {
  for (int k = 0; k < n; ++k) to[k] = static_cast<T>(from[k]);
}
PYSUPCON_INLINE void convert_bf16(float* to, const uint16_t* from, int n) {
  for (int k = 0; k < n; ++k) {
    const uint32_t bits = uint32_t(from[k]) << 16;
    memcpy(to + k, &bits, 4);
  }
}

template <class T>
PYSUPCON_INLINE void copy_row(T* to, const Problem& q, const Side& side, int64_t row, int64_t first, int n) {
  const int64_t at = row * side.stride + first;
  if constexpr (sizeof(T) == 8) {
    convert(to, static_cast<const double*>(side.rows) + at, n);
  } else if (q.type == Type::f32) {
    memcpy(to, static_cast<const float*>(side.rows) + at, n * sizeof(float));
  } else if (q.type == Type::bf16) {
    convert_bf16(to, static_cast<const uint16_t*>(side.rows) + at, n);
  } else {
    convert(to, static_cast<const Half*>(side.rows) + at, n);
  }
}

// Transposes a square of kLanes x kLanes by log2(kLanes) rounds of interleaving row r with row r + kLanes
// / 2.
template <class T>
PYSUPCON_INLINE void transpose_square(const T* from, int from_stride, T* to, int to_stride, Vec<T> factor) {
  constexpr int L = kLanes<T>;
#if defined(__GNUC__) && !defined(__clang__)
  Vec<T> a[L], b[L];
  IVec<T> low{}, high{};
#pragma GCC unroll 16
  for (int i = 0; i < L; ++i) {
    low[i] = i / 2 + i % 2 * L;
    high[i] = low[i] + L / 2;
  }
#pragma GCC unroll 16
  for (int r = 0; r < L; ++r) a[r] = load(from + r * from_stride) * factor;
#pragma GCC unroll 4
  for (int round = 1; round < L; round *= 2) {
#pragma GCC unroll 16
    for (int r = 0; r < L / 2; ++r) {
      b[2 * r] = __builtin_shuffle(a[r], a[r + L / 2], low);
      b[2 * r + 1] = __builtin_shuffle(a[r], a[r + L / 2], high);
    }
#pragma GCC unroll 16
    for (int r = 0; r < L; ++r) a[r] = b[r];
  }
#pragma GCC unroll 16
  for (int r = 0; r < L; ++r) store(to + r * to_stride, a[r]);
#else
  for (int r = 0; r < L; ++r)
    for (int k = 0; k < L; ++k) to[k * to_stride + r] = from[r * from_stride + k] * factor[0];
#endif
}

// Rows lie anywhere: the hardware cannot guess the next one.
PYSUPCON_INLINE void fetch_row(const Problem& q, const Side& side, int64_t position) {
  const int64_t bytes = q.type == Type::f64 ? 8 : q.type == Type::f32 ? 4 : 2;
  const char* row = static_cast<const char*>(side.rows) + side.order[position] * side.stride * bytes;
  for (int64_t at = 0; at < q.dim * bytes; at += 64) __builtin_prefetch(row + at);
}

// Rows of the blocks that come next; fetched one by one while the tiles of this pair are worked on.
struct Upcoming {
  const Problem& problem;
  const Side& side;
  int64_t at, last;
  PYSUPCON_INLINE void fetch() {
    if (at < last) fetch_row(problem, side, at++);
  }
};
PYSUPCON_INLINE Upcoming upcoming(const Plan& plan, const Side& side, int64_t index, int64_t held) {
  const int64_t first = index < 0 || index == held ? side.count : index * plan.block;
  return {plan.problem, side, first, first + plan.block < side.count ? first + plan.block : side.count};
}

constexpr int kRowsAhead = 6;

template <class T>
PYSUPCON_INLINE void place_block(Block<T>& b, const Plan& plan, const Side& side, int64_t index) {
  b.side = &side;
  b.first = index * plan.block;
  const int64_t left = side.count - b.first;
  b.count = static_cast<int>(left < plan.block ? left : plan.block);
}

template <class T>
void load_block(Block<T>& b, const Plan& plan, LaneInt<T> padding) {
  constexpr int C = kCols<T>;
  const Problem& q = plan.problem;
  const Side& side = *b.side;
  const bool plain = q.type == (sizeof(T) == 8 ? Type::f64 : Type::f32) && q.dim % C == 0;
  for (int i = 0; i < b.padded; ++i) {
    const bool real = i < b.count;
    if (i + kRowsAhead < b.count) fetch_row(q, side, b.first + i + kRowsAhead);
    b.cls[i] = real ? side.cls[b.first + i] : padding;
    if (side.instance) b.instance[i] = real ? side.instance[b.first + i] : padding;
    const int64_t row = real ? side.order[b.first + i] : 0;
    for (int c = 0; c < b.chunks; ++c) {
      T* to = b.rows + (int64_t(c) * b.padded + i) * C;
      if (plain && real) {
        const T* from = static_cast<const T*>(side.rows) + row * side.stride + int64_t(c) * C;
        for (int v = 0; v < kVecs; ++v) store(to + v * kLanes<T>, load(from + v * kLanes<T>));
        continue;
      }
      const int64_t rest = q.dim - int64_t(c) * C;
      const int n = !real ? 0 : rest < C ? static_cast<int>(rest) : C;
      if (n > 0) copy_row(to, q, side, row, int64_t(c) * C, n);
      if (n < C) memset(to + n, 0, (C - n) * sizeof(T));
    }
  }
}

template <class T>
void make_panels(Block<T>& b, double factor) {
  constexpr int C = kCols<T>, L = kLanes<T>;
  const Vec<T> f = splat<T>(static_cast<T>(factor));
  const int used = round_up(b.count, C);
  for (int p = 0; p < used / C; ++p)
    for (int c = 0; c < b.chunks; ++c) {
      const T* from = b.rows + (int64_t(c) * b.padded + p * C) * C;
      T* to = b.panels + (int64_t(p) * b.chunks + c) * C * C;
      for (int r = 0; r < kVecs; ++r)
        for (int k = 0; k < kVecs; ++k)
          transpose_square<T>(from + r * L * C + k * L, C, to + k * L * C + r * L, C, f);
    }
}

// ------------------------------------------------------------------------------------------------ products
// tile[r][.] += sum_k a[r * kRowStep + k * kStep] * b[k * kCols ...]: the one loop that takes the time.
template <class T, int kRowStep, int kStep>
PYSUPCON_INLINE void multiply(Tile<T>& tile, const T* a, const T* b, int depth) {
  for (int k = 0; k < depth; ++k) {
    Vec<T> v[kVecs];
#pragma GCC unroll 4
    for (int c = 0; c < kVecs; ++c) v[c] = load(b + c * kLanes<T>);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const Vec<T> s = splat<T>(a[r * kRowStep]);
#pragma GCC unroll 4
      for (int c = 0; c < kVecs; ++c) tile[r][c] += s * v[c];
    }
    a += kStep;
    b += kCols<T>;
  }
}

template <class T>
PYSUPCON_INLINE void clear(Tile<T>& tile) {
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (int c = 0; c < kVecs; ++c) tile[r][c] = Vec<T>{};
}

// tile = t of rows i0.. of `a` against columns j0.. of `b`. Each chunk of columns is summed by itself: a dot
// product of 128 terms loses half as many digits in four parts as in one. Of two sets of
// rows the factor comes last: t of (i, j) and of (j, i), which two processes compute, are then the same
// number. In one set a pair is visited once, and the panels hold the factor.
template <class T>
PYSUPCON_INLINE void similarities(Tile<T>& tile, const Block<T>& a, const Block<T>& b, int i0, int j0,
                                  T factor) {
  constexpr int C = kCols<T>;
  const T* panel = b.panels + int64_t(j0) * b.chunks * C;
  clear<T>(tile);
  multiply<T, C, 1>(tile, a.rows + int64_t(i0) * C, panel, C);
  for (int c = 1; c < a.chunks; ++c) {
    Tile<T> sum;
    memcpy(&sum, &tile, sizeof sum);
    clear<T>(tile);
    multiply<T, C, 1>(tile, a.rows + (int64_t(c) * a.padded + i0) * C, panel + int64_t(c) * C * C, C);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v) tile[r][v] += sum[r][v];
  }
  if (factor == 1) return;
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) tile[r][v] *= factor;
}

// Adds a tile of a gradient: rows i0.. of block b, columns of chunk c.
template <class T>
PYSUPCON_INLINE void add_gradient(const Tile<T>& tile, T* out, const Block<T>& b, int i0, int c,
                                  int64_t dim) {
  constexpr int C = kCols<T>, L = kLanes<T>;
  const int64_t rest = dim - int64_t(c) * C;
  const int rows = b.count - i0 < kRows ? b.count - i0 : kRows;
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
    if (r >= rows) break;
    T* to = out + b.side->order[b.first + i0 + r] * dim + int64_t(c) * C;
    if (rest >= C) {
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v) store(to + v * L, load(to + v * L) + tile[r][v]);
    } else {
      T part[C];
      for (int v = 0; v < kVecs; ++v) store(part + v * L, tile[r][v]);
      for (int k = 0; k < rest; ++k) to[k] += part[k];
    }
  }
}

struct Range {
  int first, last;
};

// out rows of `a` += w [a.padded x kTileStride] times rows of `b`; kTransposed: w is [b x a] in memory.
// range(i0) says which rows of b have weights for the kRows rows from i0 on.
template <class T, bool kTransposed, class RangeOf>
PYSUPCON_INLINE void add_product(T* out, const T* w, const Block<T>& a, const Block<T>& b, int64_t dim,
                                 const RangeOf& range) {
  constexpr int C = kCols<T>, S = kTileStride;
  for (int c = 0; c < a.chunks; ++c)
    for (int i0 = 0; i0 < a.count; i0 += kRows) {
      const Range k = range(i0);
      if (k.first >= k.last) continue;
      for (int r = i0; r < i0 + kRows && r < a.count; ++r) {  // needed in some thousand cycles
        const T* next = out + a.side->order[a.first + r] * dim + int64_t(c) * C;
        __builtin_prefetch(next, 1);
        __builtin_prefetch(next + C / 2, 1);
      }
      Tile<T> tile;
      clear<T>(tile);
      const T* rows = b.rows + (int64_t(c) * b.padded + k.first) * C;
      if constexpr (kTransposed)
        multiply<T, 1, S>(tile, w + int64_t(k.first) * S + i0, rows, k.last - k.first);
      else
        multiply<T, S, 1>(tile, w + int64_t(i0) * S + k.first, rows, k.last - k.first);
      add_gradient<T>(tile, out, a, i0, c, dim);
    }
}

}  // namespace pysupcon::cpu::PYSUPCON_ISA
