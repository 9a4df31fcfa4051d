// fp32 rows as the sum of two bf16 numbers (precision "high")
#include "instantiate.cuh"

namespace pysupcon::cuda {
PYSUPCON_BACKWARD(gpu::Bf16, 2, StatisticsWeights)
PYSUPCON_BACKWARD(gpu::Bf16, 2, PositiveWeights)
PYSUPCON_BACKWARD(gpu::Bf16, 2, SoftplusWeights)
}  // namespace pysupcon::cuda
