// bf16 rows, and fp32 rows rounded to bf16 (precision "medium")
#include "instantiate.cuh"

namespace pysupcon::cuda {
PYSUPCON_BACKWARD(gpu::Bf16, 1, StatisticsWeights)
PYSUPCON_BACKWARD(gpu::Bf16, 1, PositiveWeights)
PYSUPCON_BACKWARD(gpu::Bf16, 1, SoftplusWeights)
}  // namespace pysupcon::cuda
