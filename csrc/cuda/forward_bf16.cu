// bf16 rows, and fp32 rows rounded to bf16 (precision "medium")
#include "instantiate.cuh"

namespace pysupcon::cuda {
PYSUPCON_FORWARD(gpu::Bf16, 1, Statistics)
PYSUPCON_FORWARD(gpu::Bf16, 1, PositiveStatistics)
PYSUPCON_FORWARD(gpu::Bf16, 1, SoftplusSum)
}  // namespace pysupcon::cuda
