// The forward pass over pairs: blocks of BM rows own their statistics, column tiles of BN stream past in
// slices of 8 CH numbers. What is made of the similarities is the epilogue's matter (statistics.cuh,
// positive.cuh).
#pragma once
#include "tiles.cuh"

namespace pysupcon::cuda {

template <class F_, int PARTS_>
struct ForwardConfig {
  using F = F_;
  static constexpr int PARTS = PARTS_;
  static constexpr int BM = 128, BN = PARTS == 1 ? 128 : 64;  // the fragments of several parts need registers
  static constexpr int CH = PARTS == 1 ? 8 : 4;               // 16-byte chunks per slice of a row
  static constexpr int WARPS_M = 4, WARPS_N = 2;              // warps tile BM x BN
  static constexpr int MT = BM / WARPS_M / 16, NT = BN / WARPS_N / 8;
  static constexpr int THREADS = 32 * WARPS_M * WARPS_N;
  static constexpr int STAGES = 2;
  static constexpr int RESIDENT =
      PARTS == 1 ? 4 : 0;  // the block's rows stay in shared memory up to so many slices
  static constexpr int SLOTS = RESIDENT > STAGES ? RESIDENT : STAGES;
};

template <class C>
struct ForwardShared {
  uint4 cols[C::STAGES][C::PARTS][C::BN][C::CH];
  float4 exchange[C::BM];
  uint4 rows[C::SLOTS][C::PARTS][C::BM][C::CH];  // last: a launch pays for the slots it uses
};

template <class C>
__host__ __device__ inline int forward_slices(int chunks) {
  return (chunks + C::CH - 1) / C::CH;
}
template <class C>
inline size_t forward_shared_bytes(int chunks) {
  const int slices = forward_slices<C>(chunks), slots = slices <= C::RESIDENT ? slices : C::STAGES;
  return offsetof(ForwardShared<C>, rows) + size_t(slots) * sizeof(ForwardShared<C>::rows[0]);
}

// grid (row blocks, column splits)
template <class C, class Epilogue>
__global__ void __launch_bounds__(C::THREADS, 1) pair_forward(Pairs pairs, typename Epilogue::Args args) {
  using Shared = ForwardShared<C>;
  DYNAMIC_SHARED(Shared, s);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warp_m = warp / C::WARPS_N,
            warp_n = warp % C::WARPS_N;
  const int row0 = int(blockIdx.x) * C::BM, row1 = min(row0 + C::BM, pairs.rows.count);
  const Visit visit = visit_columns<C::BN>(pairs, row0, row1, int(blockIdx.y), int(gridDim.y));

  // 1. Slices flow through a ring of stages; a slice is loaded STAGES - 1 steps before it is multiplied.
  const int slices = forward_slices<C>(pairs.rows.chunks);
  const bool resident = slices <= C::RESIDENT;
  int load_tile = visit.first, load_k = 0, load_stage = 0;
  const auto load_next = [&] {
    if (load_tile < visit.last) {
      load_slice<C::THREADS>(s->cols[load_stage], pairs.cols, load_tile * C::BN, load_k * C::CH);
      if (!resident) load_slice<C::THREADS>(s->rows[load_stage], pairs.rows, row0, load_k * C::CH);
      if (++load_k == slices) load_k = 0, ++load_tile;
      if (++load_stage == C::STAGES) load_stage = 0;
    }
    gpu::cp_async_commit();  // one group per step, possibly empty, so that counting groups counts steps
  };
  if (resident)
    for (int k = 0; k < slices; ++k) load_slice<C::THREADS>(s->rows[k], pairs.rows, row0, k * C::CH);
  for (int i = 0; i < C::STAGES - 1; ++i) load_next();

  // 2. Tile by tile: similarities, then statistics.
  Epilogue epilogue(pairs, args, row0 + warp_m * 16 * C::MT + lane / 4);
  int stage = 0;
  for (int tile = visit.first; tile < visit.last; ++tile) {
    float acc[C::MT][C::NT][4] = {};
#pragma unroll 1
    for (int k = 0; k < slices; ++k) {
      gpu::cp_async_wait<C::STAGES - 2>();
      __syncthreads();  // all copies have landed, and nobody still reads what load_next() overwrites
      load_next();
      multiply_slice<typename C::F>(acc, s->rows[resident ? k : stage], warp_m * 16 * C::MT, s->cols[stage],
                                    warp_n * 8 * C::NT);
      if (++stage == C::STAGES) stage = 0;
    }
    epilogue.add(acc, visit.kind<C::BN>(pairs, row0, row1, tile),
                 tile * C::BN + warp_n * 8 * C::NT + 2 * (lane % 4));
  }

  gpu::cp_async_wait<0>();  // a block without columns never waited for its rows

  // 3. One row's parts: four lanes of a quad, then the warps beside each other.
  const int quad_row = warp_m * 16 * C::MT + lane / 4;
#pragma unroll
  for (int i = 0; i < 2 * C::MT; ++i) epilogue.merge_quad(i);
  static_assert(C::WARPS_N == 2, "one warp hands over, the other finishes");
  if (warp_n == 1 && lane % 4 == 0)
#pragma unroll
    for (int i = 0; i < 2 * C::MT; ++i) s->exchange[quad_row + 8 * i] = epilogue.part(i);
  __syncthreads();
  if (warp_n == 0 && lane % 4 == 0)
#pragma unroll
    for (int i = 0; i < 2 * C::MT; ++i) {
      const int row = row0 + quad_row + 8 * i;
      if (row < pairs.rows.count) {
        const float4 whole = Epilogue::merge(epilogue.part(i), s->exchange[quad_row + 8 * i]);
        if (args.parts)
          args.parts[int64_t(blockIdx.y) * pairs.rows.count + row] = whole;
        else
          Epilogue::store(args, row, whole);
      }
    }
}

// The splits of one row, in their order.
template <class Epilogue>
__global__ void merge_splits(typename Epilogue::Args args, int rows, int splits) {
  const int row = int(blockIdx.x * blockDim.x + threadIdx.x);
  if (row < rows) {
    float4 whole = args.parts[row];
    for (int i = 1; i < splits; ++i) whole = Epilogue::merge(whole, args.parts[int64_t(i) * rows + row]);
    Epilogue::store(args, row, whole);
  }
}

template <class C, class Epilogue>
cudaError_t launch_forward(const Pairs& pairs, const typename Epilogue::Args& args, int splits,
                           cudaStream_t stream) {
  const int rows = pairs.rows.count;
  cudaError_t e =
      gpu::launch(pair_forward<C, Epilogue>, dim3(unsigned((rows + C::BM - 1) / C::BM), unsigned(splits)),
                  dim3(C::THREADS), forward_shared_bytes<C>(pairs.rows.chunks), stream, pairs, args);
  if (e == cudaSuccess && splits > 1)
    e = gpu::launch(merge_splits<Epilogue>, dim3(unsigned((rows + 255) / 256)), dim3(256), 0, stream, args,
                    rows, splits);
  return e;
}

}  // namespace pysupcon::cuda
