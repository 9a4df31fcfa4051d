// The backward pass over pairs: blocks of BM rows own their gradient. Each column tile's similarities are
// computed again, become weights in registers, and the weights times the tile's rows are added to the
// gradient: attention whose keys and values are the same rows. Nothing is scattered, nothing is atomic.
#pragma once
#include "tiles.cuh"

namespace pysupcon::cuda {

// Where a gradient goes, and in which unit it was accumulated.
struct Gradient {
  float* data;           // [rows, width], in the caller's order; added to
  const int64_t* order;  // of the rows
  int rows, width;
  const Scale* scale;
  const Extremes* extremes;
  float* parts;      // [parts][shares] of row blocks that several runs share
  float* row_parts;  // [parts][rows of a block], of what the weights keep beside the gradient
  int* arrivals;     // [row blocks][shares]

  __device__ __forceinline__ float factor() const {
    return ldexpf(scale->natural, gradient_exponent(extremes->largest));
  }
};

// 16-bit rows of at most kResidentWidth numbers. A warp owns 32 rows, so that a fragment of the columns
// serves two tiles; two blocks of four warps a multiprocessor, or one of eight where shared memory is short.
template <class F_, int WARPS_>
struct ResidentBackward {
  using F = F_;
  static constexpr int PARTS = 1, WARPS = WARPS_, MT = 2, BM = 16 * MT * WARPS;
  static constexpr int BN = 64, NT = BN / 8;
  static constexpr int CH = 8, SLICES = kResidentWidth / 64;
  static constexpr int THREADS = 32 * WARPS, BLOCKS = 8 / WARPS;
  static_assert(BM == (WARPS == 4 ? kBlockRows : kWideBlockRows), "as plan.h says");
};
// Columns that a warp works on at a time: fewer leave more registers, but the rows' fragments are read again
// for each part. Where a tile needs no mask all columns at once pay on sm_90, whose tensor cores are fast
// enough for shared memory to matter; blocks of eight warps never run there.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ != 900
template <int>
constexpr int kQuickColumns = 32;
#else
template <int WARPS>
constexpr int kQuickColumns = WARPS == 4 ? 64 : 32;
#endif
constexpr int kSlowColumns = 32;
// Positives' weights are two numbers each: on sm_120 32 of them do not fit.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ == 1200
constexpr int kPositiveColumns = 16;
#else
constexpr int kPositiveColumns = 32;
#endif
// How many 16-bit numbers stand for a weight. Those of positives have two at least: where the similarities of
// a class are alike, so are its weights, and would all be rounded alike.
template <class C, class Weights>
constexpr int weight_parts = C::PARTS == 1 && Weights::POSITIVES ? 2 : C::PARTS;
template <int N>
struct Number {
  static constexpr int value = N;
};

// Rows of any length and any number of parts: a warp owns 16 rows and sees every column.
template <class F_, int PARTS_>
struct StreamedBackward {
  using F = F_;
  static constexpr int PARTS = PARTS_, WARPS = 8, MT = 1, BM = 16 * MT * WARPS;
  static constexpr int BN = PARTS == 3 ? 32 : 64;  // three parts of the weights fill the registers
  static constexpr int NT = BN / 8;
  static constexpr int CH = PARTS == 1 ? 8 : 4;  // 16-byte chunks per slice of a row
  static constexpr int SLICES = 4;               // of gradient that a block accumulates
  static constexpr int THREADS = 32 * WARPS, BLOCKS = 1;
  static_assert(BM == kBlockRows && 8 * CH * SLICES == (PARTS == 1 ? kGradientShare : kGradientShare / 2),
                "as plan.h says");
};

// Of the columns of two tiles.
template <class C>
struct ColumnCoefficients {
  float2 power[2][C::BN], rest[2][C::BN];
  float instance[2][C::BN];

  __device__ __forceinline__ Coefficients from(int tile, int col) const {
    return {power[tile] + col, rest[tile] + col, instance[tile] + col};
  }
};
// A warp's share of the gradient passes through shared memory, 16 rows of a slice at a time, so that whole
// rows are written. Pair c of row r stands at c + 4 r: what the lanes of a fragment write falls into distinct
// banks.
template <class C>
struct Staging {
  float2 grad[C::WARPS][16][C::CH * 4];
  static __device__ __forceinline__ int place(int row, int pair) { return (pair + 4 * row) % (C::CH * 4); }
};
template <class C>
struct ResidentBackwardShared {
  union {
    uint4 rows[C::SLICES][1][C::BM][C::CH];
    Staging<C> staging;
  };
  uint4 cols[2][C::SLICES][1][C::BN][C::CH];
  ColumnCoefficients<C> coefficients;
  Bounds bounds;
};
static_assert(2 * (sizeof(ResidentBackwardShared<ResidentBackward<gpu::Bf16, 4>>) + 1024) <= kTwoBlocks,
              "two blocks a multiprocessor, with what the driver keeps of each");
template <class C>
struct StreamedBackwardShared {
  union {
    uint4 rows[2][C::PARTS][C::BM][C::CH];
    Staging<C> staging;
  };
  uint4 cols[2][C::PARTS][C::BN][C::CH];
  ColumnCoefficients<C> coefficients;
  Bounds bounds;
};

template <class C, bool POSITIVES>
__device__ __forceinline__ void load_coefficients(ColumnCoefficients<C>& dst, int tile,
                                                  const Coefficients& src, int col0) {
  constexpr int COPIES = C::BN / 2;  // of two pairs; half as many of four numbers
  const int i = threadIdx.x;
  static_assert(5 * COPIES / 2 <= C::THREADS && kUnitRows % C::BN == 0,
                "one copy per thread, none past the padding");
  if (!src.power) return;
  if (i < COPIES)
    gpu::cp_async16(&dst.power[tile][2 * i], src.power + col0 + 2 * i, true);
  else if (POSITIVES && i < 2 * COPIES)
    gpu::cp_async16(&dst.rest[tile][2 * (i - COPIES)], src.rest + col0 + 2 * (i - COPIES), true);
  else if (POSITIVES && src.instance && i < 5 * COPIES / 2)
    gpu::cp_async16(&dst.instance[tile][4 * (i - 2 * COPIES)], src.instance + col0 + 4 * (i - 2 * COPIES),
                    true);
}
// Columns that are no anchors: written once, never loaded.
template <class C>
__device__ __forceinline__ void clear_coefficients(ColumnCoefficients<C>& dst, const Coefficients& src) {
  const int i = threadIdx.x;
  if (!src.power && i < C::BN)
    for (int tile = 0; tile < 2; ++tile)
      dst.power[tile][i] = absent(), dst.rest[tile][i] = {0.f, 0.f}, dst.instance[tile][i] = 0.f;
}

// grad[m][c] += W cols over one slice of rows row, row + 1, ...; chunk c of the slice makes the 16 x 8 tiles
// grad[..][c]. Tensor cores
// truncate where they add to a large accumulator, and a gradient that grew in one over all columns would
// shrink: each tile of columns starts a fresh one, which is added with rounding. Several parts as in
// multiply_slice().
template <class F, int WEIGHT_PARTS, int PARTS, int MT, int NK, int BROWS, int CH>
__device__ __forceinline__ void multiply_weights(float (&grad)[MT][CH][4],
                                                 const uint32_t (&w)[WEIGHT_PARTS][MT][NK][4],
                                                 const uint4 (&cols)[PARTS][BROWS][CH], int row, int lane) {
  const int r = lane & 15, from = swizzle<CH>(r, lane >> 4);
#pragma unroll
  for (int c = 0; c < CH; c += 2) {
    float sum[MT][2][4];
#pragma unroll
    for (int k = 0; k < NK; ++k) {
      uint32_t bf[PARTS][4];
#pragma unroll
      for (int part = 0; part < PARTS; ++part)
        gpu::ldmatrix_transposed(bf[part], &cols[part][r][chunk_pair(from, c / 2)] + (row + 16 * k) * CH);
#pragma unroll
      for (int half = 0; half < 2; ++half)
#pragma unroll
        for (int m = 0; m < MT; ++m) {
          if constexpr (PARTS == 1) {
            const uint32_t bh[2] = {bf[0][2 * half], bf[0][2 * half + 1]};
#pragma unroll
            for (int part = WEIGHT_PARTS - 1; part >= 0; --part)
              multiply<F>(sum[m][half], w[part][m][k], bh, k == 0 && part == WEIGHT_PARTS - 1);
          } else {
            float fresh[4];
#pragma unroll
            for (int order = PARTS - 1; order >= 0; --order)
#pragma unroll
              for (int part = 0; part <= order; ++part) {
                const uint32_t bh[2] = {bf[order - part][2 * half], bf[order - part][2 * half + 1]};
                multiply<F>(fresh, w[part][m][k], bh, order == PARTS - 1 && part == 0);
              }
#pragma unroll
            for (int i = 0; i < 4; ++i) sum[m][half][i] = k == 0 ? fresh[i] : sum[m][half][i] + fresh[i];
          }
        }
    }
#pragma unroll
    for (int m = 0; m < MT; ++m)
#pragma unroll
      for (int i = 0; i < 8; ++i) grad[m][c + i / 4][i % 4] += sum[m][i / 4][i % 4];
  }
}

template <class C>
__device__ __forceinline__ void store_gradient(const Gradient& out, Staging<C>& staging,
                                               const float (&grad)[C::SLICES][C::MT][C::CH][4],
                                               const Bounds& bounds, int slice0) {
  const int thread = bounds.thread(), warp = thread / 32, lane = thread % 32;
  const float factor = out.factor();
  __syncthreads();  // what stood here has been read
#pragma unroll
  for (int i = 0; i < C::SLICES; ++i)
#pragma unroll
    for (int m = 0; m < C::MT; ++m) {
#pragma unroll
      for (int c = 0; c < C::CH; ++c)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const int r = lane / 4 + 8 * h;
          staging.grad[warp][r][Staging<C>::place(r, 4 * c + lane % 4)] = {grad[i][m][c][2 * h],
                                                                           grad[i][m][c][2 * h + 1]};
        }
      __syncwarp();
#pragma unroll 1
      for (int at = lane; at < 16 * C::CH * 4; at += 32) {
        const int r = at / (C::CH * 4), pair = at % (C::CH * 4);
        const int row = bounds.row0 + 16 * (C::MT * warp + m) + r, d = (slice0 + i) * C::CH * 8 + 2 * pair;
        const float2 g = staging.grad[warp][r][Staging<C>::place(r, pair)];
        if (row >= out.rows) continue;
        float* to = out.data + out.order[row] * out.width + d;
        if (d < out.width) to[0] += g.x * factor;
        if (d + 1 < out.width) to[1] += g.y * factor;
      }
      __syncwarp();  // the tile has been read
    }
}

// One row block's gradient: stored, or kept as a part and merged with those of the runs that share the block.
// Runs whose tiles the rows do not visit leave no part.
template <class C, class Weights>
__device__ __forceinline__ void hand_over(const Gradient& out, Staging<C>& staging, const Pairs& pairs,
                                          const Runs& runs, const Bounds& bounds, Weights& weights,
                                          float (&grad)[C::SLICES][C::MT][C::CH][4]) {
  const Segment here = segment(runs, gpu::block_again(), bounds.row_block);
  const int share = int(blockIdx.z), slice0 = share * C::SLICES;
  weights.reduce();
  if (!here.whole) {
    constexpr int COUNT = C::SLICES * C::MT * C::CH, SIZE = COUNT * C::THREADS;  // float4s
    const auto part_of_share = [&](int part) {
      return reinterpret_cast<float4*>(out.parts) + (int64_t(part) * gridDim.z + share) * SIZE +
             bounds.thread();
    };
    const int mine = part_of(runs, gpu::block_again(), bounds.row_block);
    const auto visits = [&](const Segment& part) {
      const Visit visit = visit_columns<C::BM, C::BN>(pairs, part);
      return visit.first < visit.last;
    };
    if (visits(here)) {
      float4* to = part_of_share(mine);
#pragma unroll
      for (int i = 0; i < COUNT; ++i) {
        const float (&g)[4] = grad[i / (C::MT * C::CH)][i / C::CH % C::MT][i % C::CH];
        to[i * C::THREADS] = {g[0], g[1], g[2], g[3]};
      }
      if (share == 0) weights.keep(out.row_parts + int64_t(mine) * C::BM);
    }
    const int2 sharing = runs_of(runs, bounds.row_block);
    if (!last_to_arrive(out.arrivals + bounds.row_block * int(gridDim.z) + share, sharing)) return;
    weights.clear();
#pragma unroll
    for (int i = 0; i < COUNT; ++i)
#pragma unroll
      for (int e = 0; e < 4; ++e) grad[i / (C::MT * C::CH)][i / C::CH % C::MT][i % C::CH][e] = 0.f;
#pragma unroll 1
    for (int run = sharing.x; run <= sharing.y; ++run) {
      if (!visits(segment(runs, run, bounds.row_block))) continue;
      const int part = part_of(runs, run, bounds.row_block);
      const float4* from = part_of_share(part);
#pragma unroll
      for (int i = 0; i < COUNT; ++i) {
        float (&g)[4] = grad[i / (C::MT * C::CH)][i / C::CH % C::MT][i % C::CH];
        const float4 v = gpu::load_l2(from + i * C::THREADS);
        g[0] += v.x, g[1] += v.y, g[2] += v.z, g[3] += v.w;
      }
      if (share == 0) weights.take(out.row_parts + int64_t(part) * C::BM);
    }
  }
  store_gradient<C>(out, staging, grad, bounds, slice0);
  if (share == 0) weights.store();
}

// Every slice is loaded once and serves both products. Grid (runs).
template <class C, class Weights>
__global__ void __launch_bounds__(C::THREADS, C::BLOCKS)
    backward_resident(Pairs pairs, Runs runs, typename Weights::Args args, Gradient out) {
  using F = typename C::F;
  DYNAMIC_SHARED(ResidentBackwardShared<C>, s);
  if (any_broken(pairs.verdicts, int(threadIdx.x), C::THREADS)) {
    spoil(out.data, int64_t(out.rows) * out.width, int(threadIdx.x), C::THREADS);
    spoil_results(pairs.verdicts, int(threadIdx.x), C::THREADS);
    return;
  }
  const int slices = pairs.rows.slices;
  clear_coefficients<C>(s->coefficients, args.cols);
  for (int block = first_row_block(runs, gpu::block_again());
       block <= last_row_block(runs, gpu::block_again()); ++block) {
    const int row0 = block * C::BM;
    const Visit visit =
        visit_columns<C::BM, C::BN>(pairs, segment(runs, gpu::block_again(), block), &s->bounds);

    const auto load_tile = [&](int tile) {
      if (tile < s->bounds.last) {
#pragma unroll
        for (int k = 0; k < C::SLICES; ++k)
          if (k < slices) load_slice<C::THREADS>(s->cols[tile % 2][k], pairs.cols, tile * C::BN, k);
        load_coefficients<C, Weights::POSITIVES>(s->coefficients, tile % 2, args.cols, tile * C::BN);
      }
      gpu::cp_async_commit();
    };
    __syncthreads();  // the bounds are there
#pragma unroll
    for (int k = 0; k < C::SLICES; ++k)
      if (k < slices) load_slice<C::THREADS>(s->rows[k], pairs.rows, row0, k);
    load_tile(visit.first);

    typename Weights::template OfThread<2 * C::MT> weights(pairs, args, s->bounds);
    float grad[C::SLICES][C::MT][C::CH][4] = {};
    for (int tile = visit.first; tile < s->bounds.last; ++tile) {
      gpu::cp_async_wait<0>();
      __syncthreads();  // all copies have landed, and nobody still reads what load_tile() overwrites
      load_tile(tile + 1);
      const Kind kind = s->bounds.template kind<C::BN>(pairs, tile);
      // Columns [first, first + COLUMNS) of the tile: similarities, weights, gradient.
      const auto add = [&](auto columns, int first, bool quick) {
        constexpr int COLUMNS = decltype(columns)::value;
        float acc[C::MT][COLUMNS / 8][4];
        int thread = s->bounds.thread();
#pragma unroll
        for (int k = 0; k < C::SLICES; ++k)
          if (k == 0 || k < slices)
            multiply_few<F>(acc, s->rows[k][0], 16 * C::MT * (thread / 32), s->cols[tile % 2][k][0], first,
                            thread % 32, k == 0);
        uint32_t w[weight_parts<C, Weights>][C::MT][COLUMNS / 16][4];
        const int at = first + 2 * (s->bounds.thread() % 4);
        const Coefficients cols = s->coefficients.from(tile % 2, at);
        if (quick)
          weights.template weigh_quickly<F>(w, acc, cols);
        else
          weights.template weigh<F>(w, acc, s->bounds.template kind<C::BN>(pairs, tile), tile * C::BN + at,
                                    cols);
        thread = s->bounds.thread();
#pragma unroll
        for (int k = 0; k < C::SLICES; ++k)
          if (k == 0 || k < slices) multiply_weights<F>(grad[k], w, s->cols[tile % 2][k], first, thread % 32);
      };
      if (weights.quick(kind)) {
#pragma unroll 1
        for (int first = 0; first < C::BN; first += kQuickColumns<C::WARPS>)
          add(Number<kQuickColumns<C::WARPS>>{}, first, true);
      } else if (kind != Weights::SKIPPED) {
        constexpr int COLUMNS = Weights::POSITIVES ? kPositiveColumns : kSlowColumns;
#pragma unroll 1
        for (int first = 0; first < C::BN; first += COLUMNS) add(Number<COLUMNS>{}, first, false);
      }
    }
    gpu::cp_async_wait<0>();  // a block without columns never waited for its rows
    hand_over<C>(out, s->staging, pairs, runs, s->bounds, weights, grad);
    block = s->bounds.row_block;  // not kept in a register meanwhile
    __syncthreads();
  }
}

// Slices pass through two buffers, first for the similarities, then those of this block's share of the
// gradient, slices [SLICES blockIdx.z, SLICES (blockIdx.z + 1)), once more. Grid (runs, 1, gradient shares).
template <class C, class Weights>
__global__ void __launch_bounds__(C::THREADS, C::BLOCKS)
    backward_streamed(Pairs pairs, Runs runs, typename Weights::Args args, Gradient out) {
  using F = typename C::F;
  DYNAMIC_SHARED(StreamedBackwardShared<C>, s);
  if (any_broken(pairs.verdicts, int(threadIdx.x), C::THREADS)) {
    spoil(out.data, int64_t(out.rows) * out.width, int(threadIdx.x), C::THREADS);
    spoil_results(pairs.verdicts, int(threadIdx.x), C::THREADS);
    return;
  }
  const int slices = pairs.rows.slices;
  const int out0 = int(blockIdx.z) * C::SLICES, outs = min(C::SLICES, slices - out0);
  clear_coefficients<C>(s->coefficients, args.cols);
  for (int block = first_row_block(runs, gpu::block_again());
       block <= last_row_block(runs, gpu::block_again()); ++block) {
    const int row0 = block * C::BM;
    const Visit visit =
        visit_columns<C::BM, C::BN>(pairs, segment(runs, gpu::block_again(), block), &s->bounds);

    __syncthreads();  // the bounds are there
    // The next tile from this one on that is not skipped; none is where only classes are visited.
    const auto next_tile = [&](int tile) {
      if (Weights::SKIPPED == Kind::same)
        while (tile < visit.last && s->bounds.template kind<C::BN>(pairs, tile) == Kind::same) ++tile;
      return tile;
    };
    int load_tile = next_tile(visit.first), load_step = 0, load_buffer = 0, load_columns = 0;
    const auto load_next = [&] {
      if (load_tile < visit.last) {
        const bool scores = load_step < slices;
        const int k = scores ? load_step : out0 + load_step - slices;
        load_slice<C::THREADS>(s->cols[load_buffer], pairs.cols, load_tile * C::BN, k);
        if (scores) load_slice<C::THREADS>(s->rows[load_buffer], pairs.rows, row0, k);
        if (load_step == 0)
          load_coefficients<C, Weights::POSITIVES>(s->coefficients, load_columns, args.cols,
                                                   load_tile * C::BN);
        if (++load_step == slices + outs)
          load_step = 0, load_columns ^= 1, load_tile = next_tile(load_tile + 1);
        load_buffer ^= 1;
      }
      gpu::cp_async_commit();
    };
    load_next();

    typename Weights::template OfThread<2 * C::MT> weights(pairs, args, s->bounds);
    float grad[C::SLICES][C::MT][C::CH][4] = {};
    int buffer = 0, columns = 0;
    for (int tile = next_tile(visit.first); tile < visit.last; tile = next_tile(tile + 1)) {
      float acc[C::MT][C::NT][4] = {};
#pragma unroll 1
      for (int k = 0; k < slices; ++k) {
        gpu::cp_async_wait<0>();
        __syncthreads();  // all copies have landed, and nobody still reads what load_next() overwrites
        load_next();
        multiply_slice<F>(acc, s->rows[buffer], 16 * int(threadIdx.x / 32), s->cols[buffer], 0);
        buffer ^= 1;
      }
      uint32_t w[weight_parts<C, Weights>][C::MT][C::NT / 2][4];
      const Kind kind = s->bounds.template kind<C::BN>(pairs, tile);
      const int at = 2 * (s->bounds.thread() % 4);
      const Coefficients cols = s->coefficients.from(columns, at);
      columns ^= 1;
      if (C::PARTS == 1 && weights.quick(kind))
        weights.template weigh_quickly<F>(w, acc, cols);
      else
        weights.template weigh<F>(w, acc, kind, tile * C::BN + at, cols);
#pragma unroll
      for (int k = 0; k < C::SLICES; ++k)
        if (k < outs) {
          gpu::cp_async_wait<0>();
          __syncthreads();
          load_next();
          multiply_weights<F>(grad[k], w, s->cols[buffer], 0, s->bounds.thread() % 32);
          buffer ^= 1;
        }
    }
    gpu::cp_async_wait<0>();
    hand_over<C>(out, s->staging, pairs, runs, s->bounds, weights, grad);
    block = s->bounds.row_block;  // not kept in a register meanwhile
    __syncthreads();
  }
}

template <class C, class Weights>
cudaError_t launch_resident(const Pairs& pairs, const Runs& runs, const typename Weights::Args& args,
                            const Gradient& out, cudaStream_t stream) {
  return gpu::launch(backward_resident<C, Weights>, dim3(unsigned(runs.blocks)), dim3(C::THREADS),
                     sizeof(ResidentBackwardShared<C>), stream, pairs, runs, args, out);
}
template <class F, int PARTS, class Weights>
cudaError_t launch_backward(const Pairs& pairs, const Runs& runs, const Shape& shape,
                            const typename Weights::Args& args, const Gradient& out, cudaStream_t stream) {
  if constexpr (PARTS == 1) {
    if (pairs.rows.slices <= ResidentBackward<F, 4>::SLICES)
      return shape.rows == kBlockRows
                 ? launch_resident<ResidentBackward<F, 4>, Weights>(pairs, runs, args, out, stream)
                 : launch_resident<ResidentBackward<F, 8>, Weights>(pairs, runs, args, out, stream);
  }
  using C = StreamedBackward<F, PARTS>;
  return gpu::launch(backward_streamed<C, Weights>, dim3(unsigned(runs.blocks), 1, unsigned(shape.shares)),
                     dim3(C::THREADS), sizeof(StreamedBackwardShared<C>), stream, pairs, runs, args, out);
}

}  // namespace pysupcon::cuda
