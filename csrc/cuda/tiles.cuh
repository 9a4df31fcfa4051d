// Tiles of label-sorted rows in shared memory, the product of two of them on tensor cores, and which columns
// a block of rows has to visit. README.md explains the layout.
#pragma once
#include "gpu_ops.cuh"
#include "runs.cuh"
#include "verdicts.cuh"

namespace pysupcon::cuda {

constexpr double kLog2e = 1.44269504088896341;
constexpr double kLn2 = 0.693147180559945309;

// The scale of the similarities as the kernels read it. A pass over pairs knows s as acc * base2, in powers
// of two; whoever leaves base 2 multiplies by kLn2, in double, so that all of them mean the same s.
struct Scale {
  float natural, base2;
};

// Label-sorted rows as 16-bit numbers, as they shall lie in shared memory: units of kUnitRows rows by one
// slice of CH chunks of 8 numbers, each row's chunks swizzled; [parts][units of rows][slices][kUnitRows][CH].
// Rows and slices end in zeros. With several parts, row = part 0 + part 1 + ..., each part the rounded
// remainder of those before it.
struct Operand {
  const uint4* data;
  int count;   // rows
  int slices;  // of a row

  template <int CH>
  __host__ __device__ __forceinline__ int64_t part_size() const {
    const int64_t padded = int64_t(count + kPadRows - 1) / kPadRows * kPadRows;
    return padded * slices * CH;
  }
};

// The pairs of one launch: rows are owned by blocks, columns stream past.
struct Pairs {
  Operand rows, cols;
  const int2* range;           // [rows] columns of the row's class: [x, y)
  const int2* instance_range;  // [rows] likewise of its instance, within its class; null: no instances
  const int* row_self;         // [rows] the column that is this row, -1 for none; null: see one_set
  const int* col_self;         // [cols] likewise the row that is this column; null: none
  bool one_set;                // rows and columns are the same set: column i is row i
  bool within_classes;         // visit same-class columns only
  // log2 of the weights of rows and columns as candidates of others, label-sorted; up to a multiple of
  // kPadRows there are further numbers, of any value. Both null: no candidate has a weight.
  const float *row_bias, *col_bias;
  const Scale* scale;
  Verdicts verdicts;
};

// Where chunk c of row r stands, so that eight consecutive rows of one chunk fall into distinct banks.
template <int CH>
__device__ __forceinline__ int swizzle(int row, int chunk) {
  static_assert(CH == 4 || CH == 8, "rows of 64 or 128 bytes");
  return CH == 8 ? chunk ^ (row & 7) : chunk ^ ((row >> 1) & 3);
}

// Starts the copy of one slice of rows [row0, row0 + ROWS): a unit, a part of one or several, byte for byte.
template <int THREADS, int PARTS, int ROWS, int CH>
__device__ __forceinline__ void load_slice(uint4 (&dst)[PARTS][ROWS][CH], const Operand& x, int row0,
                                           int slice) {
  constexpr int SIZE = ROWS * CH, UNIT = kUnitRows * CH;
  static_assert(SIZE % THREADS == 0 || SIZE < THREADS, "every thread copies equally many chunks, or one");
  static_assert(ROWS % kUnitRows == 0 || kUnitRows % ROWS == 0, "units or equal parts of one");
  const int thread = int(threadIdx.x);
  if (SIZE < THREADS && thread >= SIZE) return;
  const uint4* unit = x.data + (int64_t(row0 / kUnitRows) * x.slices + slice) * UNIT + row0 % kUnitRows * CH;
#pragma unroll
  for (int part = 0; part < PARTS; ++part)
#pragma unroll
    for (int i = 0; i < (SIZE + THREADS - 1) / THREADS; ++i) {
      const int at = i * THREADS;  // of this thread's chunk, less thread: within one unit THREADS divides
      static_assert(UNIT % THREADS == 0 || SIZE < THREADS, "a pass of the threads stays within a unit");
      const uint4* src = unit + part * x.part_size<CH>() + int64_t(at / UNIT) * x.slices * UNIT + at % UNIT;
      gpu::cp_async16(&dst[part][0][0] + at + thread, src + thread, true);
    }
}

// D += A B^T, or D = A B^T where `first`.
template <class F>
__device__ __forceinline__ void multiply(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                                         bool first) {
  if (first)
    F::mma_first(d, a, b);
  else
    F::mma(d, a, b);
}

// Chunks 2 k and 2 k + 1 of a row, k = 0, 1, ...: one exclusive or from where chunk 0 or 1 stands, `from`.
__device__ __forceinline__ int chunk_pair(int from, int k) { return from ^ (2 * k); }

// acc[m][0..1] += A B^T over one slice inside the tensor core: fragments of A, and B's rows row .. row + 15,
// row a multiple of 8. `first`: acc is nothing yet.
template <class F, int MT, int BROWS, int CH>
__device__ __forceinline__ void multiply_columns(float (&acc)[MT][2][4], const uint32_t (&a)[CH / 2][MT][4],
                                                 const uint4 (&b)[BROWS][CH], int row, int lane, bool first) {
  const int r = (lane & 7) + ((lane >> 4) << 3), from = swizzle<CH>(r, (lane >> 3) & 1);
#pragma unroll
  for (int k = 0; k < CH / 2; ++k) {
    uint32_t bf[4];
    gpu::ldmatrix(bf, &b[r][chunk_pair(from, k)] + row * CH);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint32_t bh[2] = {bf[2 * half], bf[2 * half + 1]};
#pragma unroll
      for (int m = 0; m < MT; ++m) multiply<F>(acc[m][half], a[k][m], bh, first && k == 0);
    }
  }
}

// acc[m][n] += A B^T over one slice inside the tensor core, for rows of so few slices that truncation does
// not matter: A rows a_row + 16 m, B rows b_row + 8 n (16 x 8 tiles of mma.m16n8k16). `first`: acc is nothing
// yet.
template <class F, int MT, int NT, int AROWS, int BROWS, int CH>
__device__ __forceinline__ void multiply_few(float (&acc)[MT][NT][4], const uint4 (&a)[AROWS][CH], int a_row,
                                             const uint4 (&b)[BROWS][CH], int b_row, int lane, bool first) {
  const int ar = lane & 15, a_from = swizzle<CH>(ar, lane >> 4);
  const int br = (lane & 7) + ((lane >> 4) << 3), b_from = swizzle<CH>(br, (lane >> 3) & 1);
#pragma unroll
  for (int k = 0; k < CH / 2; ++k) {
    uint32_t af[MT][4];
#pragma unroll
    for (int m = 0; m < MT; ++m) gpu::ldmatrix(af[m], &a[ar][chunk_pair(a_from, k)] + (a_row + 16 * m) * CH);
#pragma unroll
    for (int n = 0; n < NT; n += 2) {
      uint32_t bf[4];
      gpu::ldmatrix(bf, &b[br][chunk_pair(b_from, k)] + (b_row + 8 * n) * CH);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint32_t bh[2] = {bf[2 * half], bf[2 * half + 1]};
#pragma unroll
        for (int m = 0; m < MT; ++m) multiply<F>(acc[m][n + half], af[m], bh, first && k == 0);
      }
    }
  }
}

// acc[m][n] += A B^T over one slice: A rows a_row + 16 m.., B rows b_row + 8 n.. (16 x 8 tiles of
// mma.m16n8k16). Tensor cores truncate where they add to a large accumulator, so each slice starts a fresh
// one, which is added to the sum with rounding.
template <class F, int MT, int NT, int AROWS, int BROWS, int CH>
__device__ __forceinline__ void multiply_slice(float (&acc)[MT][NT][4], const uint4 (&a)[1][AROWS][CH],
                                               int a_row, const uint4 (&b)[1][BROWS][CH], int b_row) {
  const int lane = threadIdx.x % 32;
  uint32_t af[CH / 2][MT][4];
  const int r = lane & 15, from = swizzle<CH>(r, lane >> 4);
#pragma unroll
  for (int k = 0; k < CH / 2; ++k)
#pragma unroll
    for (int m = 0; m < MT; ++m)
      gpu::ldmatrix(af[k][m], &a[0][r][chunk_pair(from, k)] + (a_row + 16 * m) * CH);
#pragma unroll
  for (int n = 0; n < NT; n += 2) {
    float fresh[MT][2][4];
    multiply_columns<F>(fresh, af, b[0], b_row + 8 * n, lane, true);
#pragma unroll
    for (int m = 0; m < MT; ++m)
#pragma unroll
      for (int i = 0; i < 8; ++i) acc[m][n + i / 4][i % 4] += fresh[m][i / 4][i % 4];
  }
}
// Several parts: every product whose parts sum to less than PARTS, smallest first, into a fresh accumulator
// for each 16 numbers. Part p of A with part q of B and q with p meet in an addition of their own, so that
// s_ij and s_ji are the same bits: the forward pass may see a pair from the one side, the backward from the
// other.
template <class F, int PARTS, int MT>
__device__ __forceinline__ void multiply_parts(float (&sum)[4], const uint32_t (&a)[PARTS][MT][4], int m,
                                               const uint32_t (&b)[PARTS][4], int half) {
#pragma unroll
  for (int order = PARTS - 1; order >= 0; --order) {
#pragma unroll
    for (int part = 0; 2 * part < order; ++part) {
      const uint32_t low[2] = {b[part][2 * half], b[part][2 * half + 1]};
      const uint32_t high[2] = {b[order - part][2 * half], b[order - part][2 * half + 1]};
      float one[4], other[4];
      multiply<F>(one, a[part][m], high, true);
      multiply<F>(other, a[order - part][m], low, true);
#pragma unroll
      for (int i = 0; i < 4; ++i)
        sum[i] = order == PARTS - 1 && part == 0 ? one[i] + other[i] : sum[i] + (one[i] + other[i]);
    }
    if (order % 2 == 0) {
      const uint32_t middle[2] = {b[order / 2][2 * half], b[order / 2][2 * half + 1]};
      multiply<F>(sum, a[order / 2][m], middle, false);
    }
  }
}
template <class F, int MT, int NT, int PARTS, int AROWS, int BROWS, int CH>
__device__ __forceinline__ void multiply_slice(float (&acc)[MT][NT][4], const uint4 (&a)[PARTS][AROWS][CH],
                                               int a_row, const uint4 (&b)[PARTS][BROWS][CH], int b_row) {
  static_assert(PARTS > 1, "one part has a function of its own");
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
      __syncwarp();  // columns are not mixed, which would need the registers of all
      const int r = b_row + 8 * n + (lane & 7) + ((lane >> 4) << 3);
      uint32_t bf[PARTS][4];
#pragma unroll
      for (int part = 0; part < PARTS; ++part)
        gpu::ldmatrix(bf[part], &b[part][r][swizzle<CH>(r, 2 * k + ((lane >> 3) & 1))]);
#pragma unroll
      for (int half = 0; half < 2; ++half)
#pragma unroll
        for (int m = 0; m < MT; ++m) {
          float fresh[4];
          multiply_parts<F>(fresh, af, m, bf, half);
#pragma unroll
          for (int i = 0; i < 4; ++i) acc[m][n + half][i] += fresh[i];
        }
    }
  }
}

// Weights become the operand A of the next product where they stand, because the layouts agree: columns 2 t
// and 2 t + 1 of row g + 8 h, tile (m, j) of 16 x 8.
template <class F, int PARTS, int MT, int NK>
__device__ __forceinline__ void pack_weights(uint32_t (&packed)[PARTS][MT][NK][4], int m, int h, int j,
                                             float even, float odd) {
#pragma unroll
  for (int part = 0; part < PARTS; ++part) {
    packed[part][m][j / 2][2 * (j % 2) + h] = F::pack(even, odd);
    if (part + 1 < PARTS) even -= F::to(F::from(even)), odd -= F::to(F::from(odd));
  }
}

// log2 of the weights of columns col and col + 1; col is even.
__device__ __forceinline__ float2 bias_of_two(const Pairs& pairs, int col) {
  return *reinterpret_cast<const float2*>(pairs.col_bias + col);
}

enum class Kind { different, same, mixed };

// What is in a tile. Rows and columns are sorted by label, so a row's class is one range of columns and the
// ranges' bounds rise from row to row: the block's first and last row tell of all between them. Kept in
// shared memory, because registers are dearer than one load a tile.
struct Bounds {
  int begin_min, begin_max, end_min, end_max;  // over the rows' ranges
  int row0, row1;                              // rows [row0, row1)
  int row_block;
  int last;         // of the tiles that they visit, exclusive
  float reference;  // see Extremes
  int zero;         // 0, which the compiler does not know

  // threadIdx.x, as something new: what follows from it need not wait in registers across a loop.
  __device__ __forceinline__ int thread() const { return int(threadIdx.x) + zero; }

  template <int BN>
  __device__ __forceinline__ Kind kind(const Pairs& pairs, int tile) const {
    const int64_t c0 = int64_t(tile) * BN, c1 = c0 + BN;
    if (c1 > pairs.cols.count) return Kind::mixed;
    if (c1 <= begin_min || c0 >= end_max) return Kind::different;
    const bool no_self = pairs.one_set ? c1 <= row0 || c0 >= row1 : !pairs.row_self && !pairs.col_self;
    return no_self && c0 >= begin_max && c1 <= end_min ? Kind::same : Kind::mixed;
  }
};
// The first of a thread's rows in the backward, where a warp owns 16 MT of them.
template <int MT>
__device__ __forceinline__ int first_row(const Bounds& bounds) {
  const int thread = bounds.thread();
  return bounds.row0 + 16 * MT * (thread / 32) + thread % 32 / 4;
}
// Column tiles [first, last), those of a segment that its rows visit.
struct Visit {
  int first, last;
};
template <int BM, int BN>
__device__ __forceinline__ Visit visit_columns(const Pairs& pairs, const Segment& segment,
                                               Bounds* bounds = nullptr) {
  const int row0 = segment.row_block * BM, row1 = min(row0 + BM, pairs.rows.count);
  const int2 low = pairs.range[row0], high = pairs.range[row1 - 1];
  int first = segment.first, last = segment.last;
  if (pairs.cols.count == 0) last = first;
  if (pairs.within_classes) {
    first = max(first, low.x / BN);
    last = min(last, low.x < high.y ? (high.y + BN - 1) / BN : 0);
  }
  if (bounds && threadIdx.x == 0)
    *bounds = {low.x, high.x, low.y, high.y, row0, row1, segment.row_block, last, 0.f, 0};
  return {first, last};
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

// What an anchor brings into the weights of its pairs, label-sorted, padded to a multiple of kUnitRows rows,
// all but references in units of 2^gradient_exponent(). Null: the side has no anchors.
struct Coefficients {
  const float2* power;    // (f, r): f 2^(t - r), r in powers of two; padded with absent()
  const float2* rest;     // of positives: (c, l), the weight f 2^(t - r - l) + c
  const float* instance;  // of positives: what the pairs of an instance have beside
};
// Over all anchors of a launch.
struct Extremes {
  float largest;      // upstream gradient, absolute
  float reference;    // in powers of two, where one serves all anchors (prepare.cuh); +inf: it does not
  float top, bottom;  // statistic, of the finite ones
};
__device__ __forceinline__ float2 absent() { return {0.f, INFINITY}; }  // 0 * 2^(s - inf), never 0 * inf

// Weights are divided by a power of two above the largest upstream gradient and multiplied by 2^13, so that a
// 16-bit weight uses the format's range whatever the loss was divided by. A positive's weight has six parts:
// |weight| <= 6 before, 49,152 after, which f16 holds.
__device__ __forceinline__ int gradient_exponent(float largest) {
  if (!(largest > 0.f && largest < INFINITY)) return -13;
  int e;
  frexpf(largest, &e);
  return (e > -100 ? e : -100) - 13;
}

}  // namespace pysupcon::cuda
