// fp16 rows
#include "instantiate.cuh"

namespace pysupcon::cuda {
PYSUPCON_BACKWARD(gpu::F16, 1, StatisticsWeights)
PYSUPCON_BACKWARD(gpu::F16, 1, PositiveWeights)
PYSUPCON_BACKWARD(gpu::F16, 1, SoftplusWeights)
}  // namespace pysupcon::cuda
