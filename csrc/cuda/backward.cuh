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
  const float* scale;
  const float* largest;  // see gradient_exponent
  float* parts;          // [splits][rows][width] or null

  __device__ __forceinline__ float factor() const { return ldexpf(*scale, gradient_exponent(*largest)); }
  __device__ __forceinline__ void put(int split, int row, int d, float sum, float unit) const {
    if (parts)
      parts[(int64_t(split) * rows + row) * width + d] = sum;
    else
      data[order[row] * width + d] += sum * unit;
  }
};

template <class F_, int PARTS_>
struct BackwardConfig {
  using F = F_;
  static constexpr int PARTS = PARTS_;
  static constexpr int WARPS = 8, BM = 16 * WARPS;  // a warp owns 16 rows and sees every column
  static constexpr int BN = PARTS == 3 ? 32 : 64;   // three parts of the weights fill the registers
  static constexpr int NT = BN / 8;
  static constexpr int CH = PARTS == 1 ? 8 : 4;  // 16-byte chunks per slice of a row
  static constexpr int RESIDENT = 2;             // slices that resident() can hold (PARTS == 1)
  static constexpr int OUT = 4;                  // slices of gradient that streamed() accumulates
  static constexpr int THREADS = 32 * WARPS;
};

template <class C>
struct CoefficientTile {
  float2 n[C::BN], p[C::BN];
};
// A warp's share of the gradient passes through shared memory, slice by slice, so that whole rows are
// written.
template <class C>
struct Staging {
  float2 grad[C::WARPS][16][C::CH * 4];
};
template <class C>
struct ResidentShared {
  union {
    uint4 rows[C::RESIDENT][C::PARTS][C::BM][C::CH];
    Staging<C> staging;
  };
  uint4 cols[2][C::RESIDENT][C::PARTS][C::BN][C::CH];
  CoefficientTile<C> coefficients[2];
};
template <class C>
struct StreamedShared {
  union {
    uint4 rows[2][C::PARTS][C::BM][C::CH];
    Staging<C> staging;
  };
  uint4 cols[2][C::PARTS][C::BN][C::CH];
  CoefficientTile<C> coefficients[2];
};

template <class C, bool USES_P>
__device__ __forceinline__ void load_coefficients(CoefficientTile<C>& dst, const Coefficients& src,
                                                  int col0) {
  const int i = threadIdx.x;  // two coefficients per copy
  static_assert(C::BN <= C::THREADS && kCoefficientPadding % C::BN == 0,
                "one copy per thread, none past the padding");
  if (!src.n) return;
  if (i < C::BN / 2)
    gpu::cp_async16(&dst.n[2 * i], src.n + col0 + 2 * i, true);
  else if (USES_P && i < C::BN)
    gpu::cp_async16(&dst.p[2 * i - C::BN], src.p + col0 + 2 * i - C::BN, true);
}
// Columns that are no anchors: written once, never loaded.
template <class C>
__device__ __forceinline__ void clear_coefficients(CoefficientTile<C> (&dst)[2], const Coefficients& src) {
  if (!src.n && int(threadIdx.x) < C::BN)
    for (int b = 0; b < 2; ++b) dst[b].n[threadIdx.x] = dst[b].p[threadIdx.x] = absent();
}

// Accumulators of S (16 x 8 tiles) become operands A of the next product: the layouts agree.
template <class F, int PARTS, int NT>
__device__ __forceinline__ void pack_weights(uint32_t (&packed)[PARTS][NT / 2][4], float (&w)[NT][4]) {
#pragma unroll
  for (int part = 0; part < PARTS; ++part)
#pragma unroll
    for (int j = 0; j < NT; ++j)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        float &lo = w[j][2 * h], &hi = w[j][2 * h + 1];
        packed[part][j / 2][2 * (j % 2) + h] = F::pack(lo, hi);
        if (part + 1 < PARTS) lo -= F::to(F::from(lo)), hi -= F::to(F::from(hi));
      }
}

// grad[c] += W cols over one slice; chunk c of the slice makes the 16 x 8 tile grad[c].
template <class F, int PARTS, int NK, int BROWS, int CH>
__device__ __forceinline__ void multiply_weights(float (&grad)[CH][4], const uint32_t (&w)[PARTS][NK][4],
                                                 const uint4 (&cols)[PARTS][BROWS][CH]) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int k = 0; k < NK; ++k)
#pragma unroll
    for (int c = 0; c < CH; c += 2) {
      const int r = 16 * k + (lane & 15);
      uint32_t bf[PARTS][4];
#pragma unroll
      for (int part = 0; part < PARTS; ++part)
        gpu::ldmatrix_transposed(bf[part], &cols[part][r][swizzle<CH>(r, c + (lane >> 4))]);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        if constexpr (PARTS == 1) {
          const uint32_t bh[2] = {bf[0][2 * half], bf[0][2 * half + 1]};
          F::mma(grad[c + half], w[0][k], bh);
        } else {
          float fresh[4] = {};
#pragma unroll
          for (int order = PARTS - 1; order >= 0; --order)
#pragma unroll
            for (int part = 0; part <= order; ++part) {
              const uint32_t bh[2] = {bf[order - part][2 * half], bf[order - part][2 * half + 1]};
              F::mma(fresh, w[part][k], bh);
            }
#pragma unroll
          for (int i = 0; i < 4; ++i) grad[c + half][i] += fresh[i];
        }
      }
    }
}

template <class C, int SLICES>
__device__ __forceinline__ void store_gradient(const Gradient& out, Staging<C>& staging,
                                               const float (&grad)[SLICES][C::CH][4], int row0, int slice0,
                                               int split) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const float factor = out.factor();
  gpu::cp_async_wait<0>();  // a block without columns never waited for its rows
  __syncthreads();          // what stood here has been read
#pragma unroll
  for (int i = 0; i < SLICES; ++i) {
#pragma unroll
    for (int c = 0; c < C::CH; ++c)
#pragma unroll
      for (int h = 0; h < 2; ++h)
        staging.grad[warp][lane / 4 + 8 * h][4 * c + lane % 4] = {grad[i][c][2 * h], grad[i][c][2 * h + 1]};
    __syncwarp();
#pragma unroll 1
    for (int at = lane; at < 16 * C::CH * 4; at += 32) {
      const int r = at / (C::CH * 4), row = row0 + 16 * warp + r;
      const int d = (slice0 + i) * C::CH * 8 + 2 * (at % (C::CH * 4));
      const float2 g = staging.grad[warp][r][at % (C::CH * 4)];
      if (row < out.rows && d < out.width) out.put(split, row, d, g.x, factor);
      if (row < out.rows && d + 1 < out.width) out.put(split, row, d + 1, g.y, factor);
    }
    __syncwarp();  // the slice has been read
  }
}

// Rows of at most RESIDENT slices: every slice is loaded once and serves both products. Grid (row blocks,
// splits).
template <class C, class Weights>
__global__ void __launch_bounds__(C::THREADS, 1)
    backward_resident(Pairs pairs, typename Weights::Args args, Gradient out) {
  using F = typename C::F;
  using Shared = ResidentShared<C>;
  DYNAMIC_SHARED(Shared, s);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int row0 = int(blockIdx.x) * C::BM, row1 = min(row0 + C::BM, pairs.rows.count);
  const int slices = (pairs.rows.chunks + C::CH - 1) / C::CH;
  const Visit visit = visit_columns<C::BN>(pairs, row0, row1, int(blockIdx.y), int(gridDim.y));

  const auto load_tile = [&](int tile) {
    if (tile < visit.last) {
#pragma unroll
      for (int k = 0; k < C::RESIDENT; ++k)
        if (k < slices) load_slice<C::THREADS>(s->cols[tile % 2][k], pairs.cols, tile * C::BN, k * C::CH);
      load_coefficients<C, Weights::USES_P>(s->coefficients[tile % 2], args.cols, tile * C::BN);
    }
    gpu::cp_async_commit();
  };
#pragma unroll
  for (int k = 0; k < C::RESIDENT; ++k)
    if (k < slices) load_slice<C::THREADS>(s->rows[k], pairs.rows, row0, k * C::CH);
  clear_coefficients<C>(s->coefficients, args.cols);
  load_tile(visit.first);

  Weights weights(pairs, args, row0 + 16 * warp + lane / 4);
  float grad[C::RESIDENT][C::CH][4] = {};
  for (int tile = visit.first; tile < visit.last; ++tile) {
    gpu::cp_async_wait<0>();
    __syncthreads();  // all copies have landed, and nobody still reads what load_tile() overwrites
    load_tile(tile + 1);
    float acc[1][C::NT][4] = {};
#pragma unroll
    for (int k = 0; k < C::RESIDENT; ++k)
      if (k < slices) multiply_slice<F>(acc, s->rows[k], 16 * warp, s->cols[tile % 2][k], 0);
    const CoefficientTile<C>& col = s->coefficients[tile % 2];
    weights.weigh(acc[0], visit.kind<C::BN>(pairs, row0, row1, tile), tile * C::BN + 2 * (lane % 4),
                  col.n + 2 * (lane % 4), col.p + 2 * (lane % 4));
    uint32_t w[C::PARTS][C::NT / 2][4];
    pack_weights<F, C::PARTS>(w, acc[0]);
#pragma unroll
    for (int k = 0; k < C::RESIDENT; ++k)
      if (k < slices) multiply_weights<F>(grad[k], w, s->cols[tile % 2][k]);
  }
  store_gradient<C>(out, s->staging, grad, row0, 0, int(blockIdx.y));
  weights.finish(int(blockIdx.y));
}

// Rows of any length: slices pass through two buffers, first for the similarities, then those of this block's
// share of the gradient, slices [OUT blockIdx.z, OUT (blockIdx.z + 1)), once more. Grid (row blocks, splits,
// gradient shares).
template <class C, class Weights>
__global__ void __launch_bounds__(C::THREADS, 1)
    backward_streamed(Pairs pairs, typename Weights::Args args, Gradient out) {
  using F = typename C::F;
  using Shared = StreamedShared<C>;
  DYNAMIC_SHARED(Shared, s);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int row0 = int(blockIdx.x) * C::BM, row1 = min(row0 + C::BM, pairs.rows.count);
  const int slices = (pairs.rows.chunks + C::CH - 1) / C::CH;
  const int out0 = int(blockIdx.z) * C::OUT, outs = min(C::OUT, slices - out0);
  const Visit visit = visit_columns<C::BN>(pairs, row0, row1, int(blockIdx.y), int(gridDim.y));

  int load_tile = visit.first, load_step = 0, load_buffer = 0;
  const auto load_next = [&] {
    if (load_tile < visit.last) {
      const bool scores = load_step < slices;
      const int k = scores ? load_step : out0 + load_step - slices;
      load_slice<C::THREADS>(s->cols[load_buffer], pairs.cols, load_tile * C::BN, k * C::CH);
      if (scores) load_slice<C::THREADS>(s->rows[load_buffer], pairs.rows, row0, k * C::CH);
      if (load_step == 0)
        load_coefficients<C, Weights::USES_P>(s->coefficients[load_tile % 2], args.cols, load_tile * C::BN);
      if (++load_step == slices + outs) load_step = 0, ++load_tile;
      load_buffer ^= 1;
    }
    gpu::cp_async_commit();
  };
  clear_coefficients<C>(s->coefficients, args.cols);
  load_next();

  Weights weights(pairs, args, row0 + 16 * warp + lane / 4);
  float grad[C::OUT][C::CH][4] = {};
  int buffer = 0;
  for (int tile = visit.first; tile < visit.last; ++tile) {
    float acc[1][C::NT][4] = {};
#pragma unroll 1
    for (int k = 0; k < slices; ++k) {
      gpu::cp_async_wait<0>();
      __syncthreads();  // all copies have landed, and nobody still reads what load_next() overwrites
      load_next();
      multiply_slice<F>(acc, s->rows[buffer], 16 * warp, s->cols[buffer], 0);
      buffer ^= 1;
    }
    const CoefficientTile<C>& col = s->coefficients[tile % 2];
    weights.weigh(acc[0], visit.kind<C::BN>(pairs, row0, row1, tile), tile * C::BN + 2 * (lane % 4),
                  col.n + 2 * (lane % 4), col.p + 2 * (lane % 4));
    uint32_t w[C::PARTS][C::NT / 2][4];
    pack_weights<F, C::PARTS>(w, acc[0]);
#pragma unroll
    for (int k = 0; k < C::OUT; ++k)
      if (k < outs) {
        gpu::cp_async_wait<0>();
        __syncthreads();
        load_next();
        multiply_weights<F>(grad[k], w, s->cols[buffer]);
        buffer ^= 1;
      }
  }
  store_gradient<C>(out, s->staging, grad, row0, out0, int(blockIdx.y));
  if (blockIdx.z == 0) weights.finish(int(blockIdx.y));
}

// The splits of one gradient, in their order.
static __global__ void merge_gradient(Gradient out, int splits) {
  const int64_t size = int64_t(out.rows) * out.width;
  const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i < size) {
    float sum = 0.f;
    for (int k = 0; k < splits; ++k) sum += out.parts[k * size + i];
    out.data[out.order[i / out.width] * out.width + i % out.width] += sum * out.factor();
  }
}

template <class C, class Weights>
cudaError_t launch_backward(const Pairs& pairs, const typename Weights::Args& args, const Gradient& out,
                            int splits, cudaStream_t stream) {
  const unsigned blocks = unsigned((pairs.rows.count + C::BM - 1) / C::BM);
  const int slices = (pairs.rows.chunks + C::CH - 1) / C::CH;
  cudaError_t e;
  if constexpr (C::PARTS == 1) {
    if (slices <= C::RESIDENT)
      e = gpu::launch(backward_resident<C, Weights>, dim3(blocks, unsigned(splits)), dim3(C::THREADS),
                      sizeof(ResidentShared<C>), stream, pairs, args, out);
  }
  if (C::PARTS > 1 || slices > C::RESIDENT)
    e = gpu::launch(backward_streamed<C, Weights>,
                    dim3(blocks, unsigned(splits), unsigned((slices + C::OUT - 1) / C::OUT)),
                    dim3(C::THREADS), sizeof(StreamedShared<C>), stream, pairs, args, out);
  if (e == cudaSuccess && out.parts)
    e = gpu::launch(merge_gradient, dim3(unsigned((int64_t(out.rows) * out.width + 255) / 256)), dim3(256), 0,
                    stream, out, splits);
  return e;
}

}  // namespace pysupcon::cuda
