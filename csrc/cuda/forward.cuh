// The forward pass over pairs: blocks of BM rows own their statistics, column tiles of BN stream past. What
// is made of the similarities is the epilogue's matter (statistics.cuh, positive.cuh, softplus.cuh).
#pragma once
#include "triangular.cuh"

namespace pysupcon::cuda {

template <class C, class Epilogue>
struct ResidentForwardShared {
  union {
    uint4 cols[2][C::SLICES][1][C::BN][C::CH];
    typename Epilogue::Part exchange[C::BM];  // after the last tile
  };
  Bounds bounds;
  float reference;  // of the triangular pass
};

// Rows of any length and any number of parts: slices of 8 CH numbers pass through a ring of stages.
template <class F_, int PARTS_>
struct StreamedForward {
  using F = F_;
  static constexpr int PARTS = PARTS_;
  static constexpr int BM = 128, BN = PARTS == 1 ? 128 : 64;  // the fragments of several parts need registers
  static constexpr int CH = PARTS == 1 ? 8 : 4;               // 16-byte chunks per slice of a row
  static constexpr int WARPS_M = 4, WARPS_N = 2;              // warps tile BM x BN
  static constexpr int MT = BM / WARPS_M / 16, NT = BN / WARPS_N / 8;
  static constexpr int THREADS = 32 * WARPS_M * WARPS_N, BLOCKS = 1;
  static constexpr int STAGES = 2;
  static constexpr int SLICES = PARTS == 1 ? 4 : 0;  // the block's rows stay on chip up to so many
  static constexpr int SLOTS = SLICES > STAGES ? SLICES : STAGES;
  static_assert(BM == kBlockRows, "as plan.h says");
};
template <class C, class Epilogue>
struct StreamedForwardShared {
  union {
    uint4 cols[C::STAGES][C::PARTS][C::BN][C::CH];
    typename Epilogue::Part exchange[C::WARPS_N][C::BM];  // after the last tile
  };
  Bounds bounds;
  uint4 rows[C::SLOTS][C::PARTS][C::BM][C::CH];  // last: a launch pays for the slots it uses
};
template <class C, class Epilogue>
inline size_t forward_shared_bytes(int slices) {
  using Shared = StreamedForwardShared<C, Epilogue>;
  const int slots = slices <= C::SLICES ? slices : C::STAGES;
  return offsetof(Shared, rows) + size_t(slots) * sizeof(Shared::rows[0]);
}

// One row block's statistics, row t in thread t: stored, or merged with those of the runs that share the
// block.
template <int BM, class Epilogue>
__device__ __forceinline__ void hand_over(const Pairs& pairs, const typename Epilogue::Args& args,
                                          const Runs& runs, int row_block,
                                          const typename Epilogue::Part& mine) {
  using Part = typename Epilogue::Part;
  const int rows = pairs.rows.count;
  const Segment here = segment(runs, gpu::block_again(), row_block);
  const int thread = int(threadIdx.x), row = row_block * BM + thread;
  const bool own = thread < BM;
  if (here.whole) {
    if (own && row < rows) Epilogue::store(pairs, args, row, mine);
    return;
  }
  if (own) args.parts[int64_t(part_of(runs, gpu::block_again(), row_block)) * BM + thread] = mine;
  const int2 sharing = runs_of(runs, row_block);
  if (!last_to_arrive(args.arrivals + row_block, sharing) || !own || row >= rows) return;
  Part merged{};
  for (int run = sharing.x; run <= sharing.y; ++run) {
    const int64_t part = part_of(runs, run, row_block);
    const Part next = Epilogue::load(args.parts + part * BM + thread);
    merged = run == sharing.x ? next : Epilogue::merge(pairs, merged, next);
  }
  Epilogue::store(pairs, args, row, merged);
}

// grid (runs)
template <class C, class Epilogue>
__global__ void __launch_bounds__(C::THREADS, C::BLOCKS)
    forward_resident(Pairs pairs, Runs runs, Triangle triangle, typename Epilogue::Args args) {
  using Shared = ResidentForwardShared<C, Epilogue>;
  DYNAMIC_SHARED(Shared, s);
  if (any_broken(pairs.verdicts, int(threadIdx.x), C::THREADS)) {
    spoil_results(pairs.verdicts, int(threadIdx.x), C::THREADS);
    return;
  }
  if (Epilogue::TRIANGULAR && triangle.sums) {
    const float reference = common_reference<C::THREADS>(triangle, pairs);
    if (threadIdx.x == 0) s->reference = reference;
    __syncthreads();
  }
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, slices = pairs.rows.slices;
  for (int block = first_row_block(runs, gpu::block_again());
       block <= last_row_block(runs, gpu::block_again()); ++block) {
    const int row0 = block * C::BM;
    const Segment here = segment(runs, gpu::block_again(), block);
    if (Epilogue::TRIANGULAR && triangle.sums &&
        stored_already<C, Epilogue>(triangle, s->reference, pairs.rows.count, args, block, here.first == 0))
      continue;
    const Visit visit = visit_columns<C::BM, C::BN>(pairs, here, &s->bounds);

    // 1. The rows, for all tiles; the columns, a tile ahead.
    const auto load_tile = [&](int tile) {
      if (tile < s->bounds.last)
#pragma unroll
        for (int k = 0; k < C::SLICES; ++k)
          if (k < slices) load_slice<C::THREADS>(s->cols[tile % 2][k], pairs.cols, tile * C::BN, k);
      gpu::cp_async_commit();
    };
    __syncthreads();  // the bounds are there, and the last row block's exchange has been read
    uint32_t rows[C::SLICES][C::CH / 2][C::MT][4];
    const int thread = s->bounds.thread();
#pragma unroll
    for (int k = 0; k < C::SLICES; ++k)
      if (k < slices)
        load_fragments<C::MT, C::CH>(rows[k], pairs.rows, row0 + 16 * C::MT * (thread / 32), k, thread % 32);
    load_tile(visit.first);

    // 2. Tile by tile: similarities, summed inside the tensor core over at most 128 numbers; then statistics.
    Epilogue epilogue(pairs, args, row0 + 16 * C::MT * warp + lane / 4);
    for (int tile = visit.first; tile < s->bounds.last; ++tile) {
      gpu::cp_async_wait<0>();
      __syncthreads();  // all copies have landed, and nobody still reads what load_tile() overwrites
      load_tile(tile + 1);
      const Kind kind = s->bounds.template kind<C::BN>(pairs, tile);
      if (kind == Epilogue::SKIPPED) continue;
      float acc[C::MT][C::NT][4];
      multiply_resident<C>(acc, rows, s->cols[tile % 2], slices, lane);
      epilogue.add(acc, kind, tile * C::BN + 2 * (lane % 4));
    }

    // 3. One row's parts: four lanes of a quad, then the runs.
    gpu::cp_async_wait<0>();
    __syncthreads();  // the last tile has been read
    block = s->bounds.row_block;
#pragma unroll
    for (int i = 0; i < 2 * C::MT; ++i) {
      epilogue.merge_quad(i);
      if (lane % 4 == 0) s->exchange[16 * C::MT * warp + lane / 4 + 8 * i] = epilogue.part(i);
    }
    __syncthreads();
    hand_over<C::BM, Epilogue>(pairs, args, runs, block, s->exchange[threadIdx.x % C::BM]);
  }
}

// grid (runs)
template <class C, class Epilogue>
__global__ void __launch_bounds__(C::THREADS, C::BLOCKS)
    forward_streamed(Pairs pairs, Runs runs, typename Epilogue::Args args) {
  using Shared = StreamedForwardShared<C, Epilogue>;
  DYNAMIC_SHARED(Shared, s);
  if (any_broken(pairs.verdicts, int(threadIdx.x), C::THREADS)) {
    spoil_results(pairs.verdicts, int(threadIdx.x), C::THREADS);
    return;
  }
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warp_m = warp / C::WARPS_N,
            warp_n = warp % C::WARPS_N, slices = pairs.rows.slices;
  const bool resident = slices <= C::SLICES;
  for (int block = first_row_block(runs, gpu::block_again());
       block <= last_row_block(runs, gpu::block_again()); ++block) {
    const int row0 = block * C::BM;
    const Visit visit =
        visit_columns<C::BM, C::BN>(pairs, segment(runs, gpu::block_again(), block), &s->bounds);

    // 1. A slice is loaded STAGES - 1 steps before it is multiplied.
    __syncthreads();  // the bounds are there
    // The next tile from this one on that is not skipped; none is where only classes are visited.
    const auto next_tile = [&](int tile) {
      if (Epilogue::SKIPPED == Kind::same)
        while (tile < visit.last && s->bounds.template kind<C::BN>(pairs, tile) == Kind::same) ++tile;
      return tile;
    };
    int load_tile = next_tile(visit.first), load_k = 0, load_stage = 0;
    const auto load_next = [&] {
      if (load_tile < visit.last) {
        load_slice<C::THREADS>(s->cols[load_stage], pairs.cols, load_tile * C::BN, load_k);
        if (!resident) load_slice<C::THREADS>(s->rows[load_stage], pairs.rows, row0, load_k);
        if (++load_k == slices) load_k = 0, load_tile = next_tile(load_tile + 1);
        if (++load_stage == C::STAGES) load_stage = 0;
      }
      gpu::cp_async_commit();  // one group per step, possibly empty, so that counting groups counts steps
    };
    if (resident)
      for (int k = 0; k < slices; ++k) load_slice<C::THREADS>(s->rows[k], pairs.rows, row0, k);
    for (int i = 0; i < C::STAGES - 1; ++i) load_next();

    // 2. Tile by tile: similarities, then statistics.
    Epilogue epilogue(pairs, args, row0 + warp_m * 16 * C::MT + lane / 4);
    int stage = 0;
    for (int tile = next_tile(visit.first); tile < visit.last; tile = next_tile(tile + 1)) {
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
      epilogue.add(acc, s->bounds.template kind<C::BN>(pairs, tile),
                   tile * C::BN + warp_n * 8 * C::NT + 2 * (lane % 4));
    }
    gpu::cp_async_wait<0>();  // a block without columns never waited for its rows
    __syncthreads();          // the last slice has been read
    block = s->bounds.row_block;

    // 3. One row's parts: four lanes of a quad, the warps beside each other, then the runs.
#pragma unroll
    for (int i = 0; i < 2 * C::MT; ++i) {
      epilogue.merge_quad(i);
      if (lane % 4 == 0) s->exchange[warp_n][warp_m * 16 * C::MT + lane / 4 + 8 * i] = epilogue.part(i);
    }
    __syncthreads();
    static_assert(C::WARPS_N == 2, "two warps beside each other");
    const int row = threadIdx.x % C::BM;
    hand_over<C::BM, Epilogue>(pairs, args, runs, block,
                               Epilogue::merge(pairs, s->exchange[0][row], s->exchange[1][row]));
    __syncthreads();  // the exchange has been read
  }
}

template <class F, int PARTS, class Epilogue>
cudaError_t launch_forward(const Pairs& pairs, const Runs& runs, const Triangle& triangle,
                           const typename Epilogue::Args& args, cudaStream_t stream) {
  const dim3 grid(unsigned(runs.blocks));
  if constexpr (PARTS == 1) {
    using C = ResidentForward<F>;
    if constexpr (Epilogue::TRIANGULAR)
      if (triangle.sums) {
        const cudaError_t e =
            gpu::launch(forward_triangular<C>, dim3(unsigned(triangle.blocks)), dim3(C::THREADS),
                        sizeof(TriangularShared<C>), stream, pairs, triangle);
        if (e != cudaSuccess) return e;
      }
    if (pairs.rows.slices <= C::SLICES)
      return gpu::launch(forward_resident<C, Epilogue>, grid, dim3(C::THREADS),
                         sizeof(ResidentForwardShared<C, Epilogue>), stream, pairs, runs, triangle, args);
  }
  using C = StreamedForward<F, PARTS>;
  return gpu::launch(forward_streamed<C, Epilogue>, grid, dim3(C::THREADS),
                     forward_shared_bytes<C, Epilogue>(pairs.rows.slices), stream, pairs, runs, args);
}

}  // namespace pysupcon::cuda
