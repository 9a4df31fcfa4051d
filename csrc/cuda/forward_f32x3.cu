// fp32 rows as the sum of three bf16 numbers (precision "highest")
#include "instantiate.cuh"

namespace pysupcon::cuda {
PYSUPCON_FORWARD(gpu::Bf16, 3, Statistics)
PYSUPCON_FORWARD(gpu::Bf16, 3, PositiveStatistics)
PYSUPCON_FORWARD(gpu::Bf16, 3, SoftplusSum)
}  // namespace pysupcon::cuda
