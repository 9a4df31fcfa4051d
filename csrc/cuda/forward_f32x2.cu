// fp32 rows as the sum of two bf16 numbers (precision "high")
#include "instantiate.cuh"

namespace pysupcon::cuda {
PYSUPCON_FORWARD(gpu::Bf16, 2, Statistics)
PYSUPCON_FORWARD(gpu::Bf16, 2, PositiveStatistics)
PYSUPCON_FORWARD(gpu::Bf16, 2, SoftplusSum)
}  // namespace pysupcon::cuda
