// The forward pass over half of the negatives, for rows against themselves: s_ij = s_ji, so a tile above the
// diagonal serves its rows and its columns.
//
// One reference r serves all rows (equation (6)): a row's sum is then a plain one, and its parts, which come
// from many thread blocks, are added as integers, whose sum does not depend on the order: 64 bits a row.
// Large batches that equation (6) does not allow, and row blocks with a sum so small that the integers are
// too coarse for it, are left to forward_resident, which runs after this kernel. The device decides; the host
// waits for nothing.
#pragma once
#include "resident.cuh"
#include "statistics.cuh"

namespace pysupcon::cuda {

// The largest of the partial norms, to every thread of the block.
template <int THREADS>
__device__ __forceinline__ float largest_norm(const float* norms) {
  __shared__ float warps[THREADS / 32];
  float top = 0.f;
  for (int i = threadIdx.x; i < kExtremeBlocks; i += THREADS) top = fmaxf(top, norms[i]);
#pragma unroll
  for (int o = 16; o; o /= 2) top = fmaxf(top, __shfl_xor_sync(~0u, top, o));
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = top;
  __syncthreads();
  for (int i = 0; i < THREADS / 32; ++i) top = fmaxf(top, warps[i]);
  return top;
}
// r >= t_ij for all pairs, whole; above kMostReference a term could underflow.
constexpr float kMostReference = 50.f;
template <int THREADS>
__device__ __forceinline__ float common_reference(const Triangle& triangle, const Pairs& pairs) {
  return ceilf(largest_norm<THREADS>(triangle.norms) * pairs.scale->base2);
}

// Fraction bits of the integers: a sum of `count` terms that are at most 1 stays below 2^62.
__device__ __forceinline__ int fraction_bits(int count) { return 62 - (32 - __clz(count)); }
__device__ __forceinline__ unsigned long long to_integer(float sum, int bits) {
  return __float2ull_rn(ldexpf(sum, bits));
}
// Below this every part's rounding to a half could matter: one part a row block, a few more at the ends of
// runs.
__device__ __forceinline__ unsigned long long least_sum(const Triangle& triangle) {
  return static_cast<unsigned long long>(triangle.row_blocks + 8) << 19;
}
// log2 of integer * 2^-bits * 2^reference
__device__ __forceinline__ double log2_of(unsigned long long sum, int bits, float reference) {
  return log2(double(sum)) + (double(reference) - double(bits));
}

// What a thread makes of a tile: sums of its four rows, over all tiles, and of 16 columns, of this tile.
struct TriangularSums {
  static constexpr int ROWS = 4;
  const Pairs& pairs;
  const int row0;  // rows row0 + 8 i are this thread's
  const float scale, reference;
  float total[ROWS] = {}, carry[ROWS] = {};

  __device__ __forceinline__ TriangularSums(const Pairs& pairs_, float reference_, int row)
      : pairs(pairs_), row0(row), scale(pairs_.scale->base2), reference(reference_) {}

  template <int MT, int NT>
  __device__ __forceinline__ void add(const float (&acc)[MT][NT][4], Kind kind, int col0,
                                      float (&columns)[2 * NT]) {
    static_assert(2 * MT == ROWS, "rows per thread");
#pragma unroll
    for (int c = 0; c < 2 * NT; ++c) columns[c] = 0.f;
#pragma unroll
    for (int i = 0; i < ROWS; ++i) {
      float sum = 0.f;
      if (kind == Kind::different) {
#pragma unroll
        for (int c = 0; c < 2 * NT; ++c) {
          const float e = gpu::exp2_fast(fmaf(acc[i / 2][c / 2][2 * (i % 2) + c % 2], scale, -reference));
          sum += e, columns[c] += e;
        }
      } else {
        const RowMask mask(pairs, row0 + 8 * i);
#pragma unroll
        for (int c = 0; c < 2 * NT; ++c) {
          const int col = col0 + 8 * (c / 2) + c % 2;
          float e = gpu::exp2_fast(fmaf(acc[i / 2][c / 2][2 * (i % 2) + c % 2], scale, -reference));
          e = mask.counts(pairs, col) && !mask.same(col) ? e : 0.f;
          sum += e, columns[c] += e;
        }
      }
      const float y = sum + carry[i], t = total[i] + y;  // Kahan
      carry[i] = y - (t - total[i]);
      total[i] = t;
    }
  }
};

// Sums over the eight lanes that have the same columns, halving what each keeps: in the end lane l has
// columns 2 l and 2 l + 1 of 64.
template <int HALF>
__device__ __forceinline__ void halve_columns(float (&columns)[16], int lane) {
  constexpr int OTHER = 2 * HALF;  // lanes apart
  const bool upper = lane & OTHER;
#pragma unroll
  for (int k = 0; k < HALF; ++k) {
    const float keep = upper ? columns[k + HALF] : columns[k], give = upper ? columns[k] : columns[k + HALF];
    columns[k] = keep + __shfl_xor_sync(~0u, give, OTHER);
  }
}
__device__ __forceinline__ float2 sum_columns(float (&columns)[16], int lane) {
  halve_columns<8>(columns, lane);
  halve_columns<4>(columns, lane);
  halve_columns<2>(columns, lane);
  return {columns[0], columns[1]};
}

template <class C>
struct TriangularShared {
  uint4 cols[2][C::SLICES][1][C::BN][C::CH];
  float columns[2][C::WARPS][C::BN];
  Bounds bounds;
};

// grid (runs)
template <class C>
__global__ void __launch_bounds__(C::THREADS, C::BLOCKS) forward_triangular(Pairs pairs, Triangle triangle) {
  constexpr int RATIO = C::BM / C::BN;
  static_assert(RATIO == kTriangleRatio, "as plan.h says");
  DYNAMIC_SHARED(TriangularShared<C>, s);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, slices = pairs.rows.slices;
  const int count = pairs.rows.count, bits = fraction_bits(count);
  const float reference = common_reference<C::THREADS>(triangle, pairs);
  if (!(reference <= kMostReference)) return;

  for (int64_t unit = triangle.run_begin(blockIdx.x); unit < triangle.run_begin(int(blockIdx.x) + 1);) {
    // 1. The next segment: tiles [first, last) of one row block.
    const int span = triangle.span(), pair = int(unit / span), at = int(unit % span);
    const int of_first = triangle.tiles - RATIO * pair;  // tiles of the pair's first row block
    const bool second = at >= of_first;
    const int block = second ? triangle.row_blocks - 1 - pair : pair, row0 = block * C::BM;
    const int first = RATIO * block + (second ? at - of_first : at);
    const int last =
        int(min(int64_t(triangle.tiles), first + triangle.run_begin(int(blockIdx.x) + 1) - unit));
    unit += last - first;
    visit_columns<C::BM, C::BN>(pairs, Segment{block, first, last, false}, &s->bounds);

    uint32_t rows[C::SLICES][C::CH / 2][C::MT][4];
#pragma unroll
    for (int k = 0; k < C::SLICES; ++k)
      if (k < slices) load_fragments<C::MT, C::CH>(rows[k], pairs.rows, row0 + 16 * C::MT * warp, k, lane);
    const auto load_tile = [&](int tile) {
      if (tile < last)
#pragma unroll
        for (int k = 0; k < C::SLICES; ++k)
          if (k < slices) load_slice<C::THREADS>(s->cols[tile % 2][k], pairs.cols, tile * C::BN, k);
      gpu::cp_async_commit();
    };
    // A tile above the diagonal block serves its columns, too: the warps' sums, one tile late.
    const auto add_columns = [&](int tile) {
      const int column = int(threadIdx.x), col = tile * C::BN + column;
      if (tile < first || tile * C::BN < row0 + C::BM || column >= C::BN || col >= count) return;
      float sum = 0.f;
#pragma unroll
      for (int w = 0; w < C::WARPS; ++w) sum += s->columns[tile % 2][w][column];
      atomicAdd(triangle.sums + col, to_integer(sum, bits));
    };
    load_tile(first);

    // 2. Tile by tile: similarities as in forward_resident, then both sums.
    TriangularSums sums(pairs, reference, row0 + 16 * C::MT * warp + lane / 4);
    for (int tile = first; tile < last; ++tile) {
      gpu::cp_async_wait<0>();
      __syncthreads();  // copies and columns have landed, and nobody still reads what is overwritten
      load_tile(tile + 1);
      add_columns(tile - 1);
      const Kind kind = s->bounds.template kind<C::BN>(pairs, tile);
      float2 mine{0.f, 0.f};
      if (kind != Kind::same) {
        float acc[C::MT][C::NT][4], columns[2 * C::NT];
        multiply_resident<C>(acc, rows, s->cols[tile % 2], slices, lane);
        sums.add(acc, kind, tile * C::BN + 2 * (lane % 4), columns);
        mine = sum_columns(columns, lane);
      }
      *reinterpret_cast<float2*>(&s->columns[tile % 2][warp][2 * lane]) = mine;
    }
    __syncthreads();
    add_columns(last - 1);

    // 3. The rows' sums: four lanes of a quad, then this block's among the others'.
#pragma unroll
    for (int i = 0; i < TriangularSums::ROWS; ++i) {
      float sum = sums.total[i] + sums.carry[i];
#pragma unroll
      for (int o = 1; o < 4; o *= 2) sum += __shfl_xor_sync(~0u, sum, o);
      const int row = sums.row0 + 8 * i;
      if (lane % 4 == 0 && row < count) atomicAdd(triangle.sums + row, to_integer(sum, bits));
    }
  }
}

// For forward_resident: whether the sums of a row block are there and fine enough; they are then stored by
// the segment that `stores`. Called by all threads.
template <class C, class Epilogue>
__device__ __forceinline__ bool stored_already(const Triangle& triangle, float reference, int count,
                                               const typename Epilogue::Args& args, int row_block,
                                               bool stores) {
  if (!(reference <= kMostReference)) return false;
  const int row = row_block * C::BM + int(threadIdx.x);
  static_assert(C::THREADS == C::BM, "a thread a row");
  const unsigned long long sum = row < count ? triangle.sums[row] : ~0ull;
  if (!__syncthreads_and(sum >= least_sum(triangle))) return false;
  if (stores && row < count) Epilogue::store_log2(args, row, log2_of(sum, fraction_bits(count), reference));
  return true;
}

}  // namespace pysupcon::cuda
