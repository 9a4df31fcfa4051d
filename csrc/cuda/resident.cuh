// What the kernels share whose warps keep their rows in registers.
#pragma once
#include "tiles.cuh"

namespace pysupcon::cuda {

// 16-bit rows of at most kResidentWidth numbers: a warp keeps its rows in registers, as fragments.
template <class F_>
struct ResidentForward {
  using F = F_;
  static constexpr int PARTS = 1, WARPS = 4, MT = 2,
                       BM = 16 * MT * WARPS;  // a warp owns 32 rows and sees every column
  static constexpr int BN = 64, NT = BN / 8;
  static constexpr int CH = 8, SLICES = kResidentWidth / 64;
  static constexpr int THREADS = 32 * WARPS, BLOCKS = 2;
  static_assert(BM == kBlockRows, "as plan.h says");
};
// Fragments of 16 MT rows from row0 on, straight from device memory: once a row block.
template <int MT, int CH>
__device__ __forceinline__ void load_fragments(uint32_t (&a)[CH / 2][MT][4], const Operand& x, int row0,
                                               int slice, int lane) {
  const int g = lane / 4, t = lane % 4;
  const uint4* unit = x.data + (int64_t(row0 / kUnitRows) * x.slices + slice) * (kUnitRows * CH);
#pragma unroll
  for (int m = 0; m < MT; ++m)
#pragma unroll
    for (int k = 0; k < CH / 2; ++k)
#pragma unroll
      for (int i = 0; i < 4; ++i) {  // rows g and g + 8, then the same of the next 8 numbers
        const int row = row0 % kUnitRows + 16 * m + g + 8 * (i % 2);
        const uint4* chunk = unit + row * CH + swizzle<CH>(row, 2 * k + i / 2);
        a[k][m][i] = reinterpret_cast<const uint32_t*>(chunk)[t];
      }
}

// The similarities of a warp's rows and a tile's columns, summed inside the tensor core over at most
// kResidentWidth numbers.
template <class C>
__device__ __forceinline__ void multiply_resident(float (&acc)[C::MT][C::NT][4],
                                                  const uint32_t (&rows)[C::SLICES][C::CH / 2][C::MT][4],
                                                  const uint4 (&cols)[C::SLICES][1][C::BN][C::CH], int slices,
                                                  int lane) {
#pragma unroll
  for (int n = 0; n < C::NT; n += 2) {
    float sum[C::MT][2][4];
#pragma unroll
    for (int k = 0; k < C::SLICES; ++k)
      if (k == 0 || k < slices)
        multiply_columns<typename C::F>(sum, rows[k], cols[k][0], 8 * n, lane, k == 0);
#pragma unroll
    for (int m = 0; m < C::MT; ++m)
#pragma unroll
      for (int i = 0; i < 8; ++i) acc[m][n + i / 4][i % 4] = sum[m][i / 4][i % 4];
  }
}

}  // namespace pysupcon::cuda
