// Tiles of label-sorted rows in shared memory, the product of two of them on tensor cores, and which columns
// a block of rows has to visit. README.md explains the layout.
#pragma once
#include "gpu_ops.cuh"

namespace pysupcon::cuda {

constexpr float kLog2e = 1.44269504088896341f;
constexpr float kLn2 = 0.693147180559945309f;

// Label-sorted rows as 16-bit numbers: [parts][count][chunks] chunks of 8 numbers; a row ends in zeros. With
// several parts, row = part 0 + part 1 + ..., each part the rounded remainder of those before it.
struct Operand {
  const uint4* data;
  int count;
  int chunks;
};

// The pairs of one launch: rows are owned by blocks, columns stream past.
struct Pairs {
  Operand rows, cols;
  const int2* range;    // [rows] columns of the row's class: [x, y)
  const int* row_self;  // [rows] the column that is this row, -1 for none; null: see one_set
  const int* col_self;  // [cols] likewise the row that is this column; null: none
  bool one_set;         // rows and columns are the same set: column i is row i
  bool within_classes;  // visit same-class columns only
  const float* scale;
};

// Where chunk c of row r stands, so that eight consecutive rows of one chunk fall into distinct banks.
template <int CH>
__device__ __forceinline__ int swizzle(int row, int chunk) {
  static_assert(CH == 4 || CH == 8, "rows of 64 or 128 bytes");
  return CH == 8 ? chunk ^ (row & 7) : chunk ^ ((row >> 1) & 3);
}

// Starts the copy of chunks [chunk0, chunk0 + CH) of rows [row0, row0 + ROWS); zeros beyond the operand's
// edges.
template <int THREADS, int PARTS, int ROWS, int CH>
__device__ __forceinline__ void load_slice(uint4 (&dst)[PARTS][ROWS][CH], const Operand& x, int row0,
                                           int chunk0) {
  static_assert(ROWS * CH % THREADS == 0 || ROWS * CH < THREADS,
                "every thread copies equally many chunks, or one");
  if (ROWS * CH < THREADS && int(threadIdx.x) >= ROWS * CH) return;
#pragma unroll
  for (int part = 0; part < PARTS; ++part)
#pragma unroll
    for (int i = 0; i < (ROWS * CH + THREADS - 1) / THREADS; ++i) {
      const int r = (int(threadIdx.x) + i * THREADS) / CH, c = int(threadIdx.x) % CH;
      const bool valid = row0 + r < x.count && chunk0 + c < x.chunks;
      const int64_t row = int64_t(part) * x.count + row0 + r;
      gpu::cp_async16(&dst[part][r][swizzle<CH>(r, c)], valid ? x.data + row * x.chunks + chunk0 + c : x.data,
                      valid);
    }
}

// acc[m][n] += A B^T over one slice: A rows a_row + 16 m.., B rows b_row + 8 n.. (16 x 8 tiles of
// mma.m16n8k16). Several parts: every product whose parts sum to less than PARTS, smallest first into a fresh
// accumulator, then one rounded addition, because tensor cores truncate where they add to a large
// accumulator.
template <class F, int MT, int NT, int PARTS, int AROWS, int BROWS, int CH>
__device__ __forceinline__ void multiply_slice(float (&acc)[MT][NT][4], const uint4 (&a)[PARTS][AROWS][CH],
                                               int a_row, const uint4 (&b)[PARTS][BROWS][CH], int b_row) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int k = 0; k < CH / 2; ++k) {
    uint32_t af[PARTS][MT][4];
#pragma unroll
    for (int part = 0; part < PARTS; ++part)
#pragma unroll
      for (int m = 0; m < MT; ++m) {
        const int r = a_row + 16 * m + (lane & 15);
        gpu::ldmatrix(af[part][m], &a[part][r][swizzle<CH>(r, 2 * k + (lane >> 4))]);
      }
#pragma unroll
    for (int n = 0; n < NT; n += 2) {
      const int r = b_row + 8 * n + (lane & 7) + ((lane >> 4) << 3);
      uint32_t bf[PARTS][4];
#pragma unroll
      for (int part = 0; part < PARTS; ++part)
        gpu::ldmatrix(bf[part], &b[part][r][swizzle<CH>(r, 2 * k + ((lane >> 3) & 1))]);
#pragma unroll
      for (int half = 0; half < 2; ++half)
#pragma unroll
        for (int m = 0; m < MT; ++m) {
          if constexpr (PARTS == 1) {
            const uint32_t bh[2] = {bf[0][2 * half], bf[0][2 * half + 1]};
            F::mma(acc[m][n + half], af[0][m], bh);
          } else {
            float fresh[4] = {};
#pragma unroll
            for (int order = PARTS - 1; order >= 0; --order)
#pragma unroll
              for (int part = 0; part <= order; ++part) {
                const uint32_t bh[2] = {bf[order - part][2 * half], bf[order - part][2 * half + 1]};
                F::mma(fresh, af[part][m], bh);
              }
#pragma unroll
            for (int i = 0; i < 4; ++i) acc[m][n + half][i] += fresh[i];
          }
        }
    }
  }
}

enum class Kind { different, same, mixed };

// Which column tiles a block of rows visits, and what is in them. Rows and columns are sorted by label, so a
// row's class is one range of columns and the ranges' bounds rise from row to row.
struct Visit {
  int first, last;                             // column tiles [first, last)
  int begin_min, begin_max, end_min, end_max;  // over the rows' ranges

  template <int BN>
  __device__ __forceinline__ Kind kind(const Pairs& pairs, int row0, int row1, int tile) const {
    const int64_t c0 = int64_t(tile) * BN, c1 = c0 + BN;
    if (c1 > pairs.cols.count) return Kind::mixed;
    if (c1 <= begin_min || c0 >= end_max) return Kind::different;
    const bool no_self = pairs.one_set ? c1 <= row0 || c0 >= row1 : !pairs.row_self && !pairs.col_self;
    return no_self && c0 >= begin_max && c1 <= end_min ? Kind::same : Kind::mixed;
  }
};

// The share `split` of `splits` of the visit of rows [row0, row1).
template <int BN>
__device__ __forceinline__ Visit visit_columns(const Pairs& pairs, int row0, int row1, int split,
                                               int splits) {
  const int2 low = pairs.range[row0], high = pairs.range[row1 - 1];
  int first = 0, last = (pairs.cols.count + BN - 1) / BN;
  if (pairs.within_classes) {
    first = low.x / BN;
    last = low.x < high.y ? (high.y + BN - 1) / BN : first;
  }
  const int64_t tiles = last - first;
  return {first + int(tiles * split / splits),
          first + int(tiles * (split + 1) / splits),
          low.x,
          high.x,
          low.y,
          high.y};
}

// What a mixed tile asks about one row's pairs.
struct RowMask {
  int begin, end, self, row;

  __device__ __forceinline__ RowMask(const Pairs& pairs, int r) : begin(0), end(0), self(-1), row(r) {
    if (r < pairs.rows.count) {
      const int2 range = pairs.range[r];
      begin = range.x, end = range.y;
      self = pairs.one_set ? r : pairs.row_self ? pairs.row_self[r] : -1;
    }
  }
  __device__ __forceinline__ bool same(int col) const { return col >= begin && col < end; }
  __device__ __forceinline__ bool counts(const Pairs& pairs, int col) const {
    return col < pairs.cols.count && col != self && !(pairs.col_self && pairs.col_self[col] == row);
  }
};

// What an anchor brings into the gradient: (upstream gradient in units of gradient_unit, reference in powers
// of two), label-sorted, padded with absent() to a multiple of kCoefficientPadding rows. Null: the side has
// no anchors.
struct Coefficients {
  const float2 *n, *p;
};
constexpr int kCoefficientPadding = 64;
__device__ __forceinline__ float2 absent() { return {0.f, INFINITY}; }  // 0 * 2^(s - inf), never 0 * inf

// Weights are divided by a power of two above the largest upstream gradient and multiplied by 2^13, so that a
// 16-bit weight uses the format's range whatever the loss was divided by; |weight| <= 2 before, 2^14 after.
__device__ __forceinline__ int gradient_exponent(float largest) {
  if (!(largest > 0.f && largest < INFINITY)) return -13;
  int e;
  frexpf(largest, &e);
  return (e > -100 ? e : -100) - 13;
}

}  // namespace pysupcon::cuda
