// fp32 rows as the sum of three bf16 numbers (precision "highest")
#include "instantiate.cuh"

namespace pysupcon::cuda {
PYSUPCON_BACKWARD(gpu::Bf16, 3, StatisticsWeights)
PYSUPCON_BACKWARD(gpu::Bf16, 3, PositiveWeights)
PYSUPCON_BACKWARD(gpu::Bf16, 3, SoftplusWeights)
}  // namespace pysupcon::cuda
