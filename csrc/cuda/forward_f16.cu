// fp16 rows
#include "instantiate.cuh"

namespace pysupcon::cuda {
PYSUPCON_FORWARD(gpu::F16, 1, Statistics)
PYSUPCON_FORWARD(gpu::F16, 1, PositiveStatistics)
PYSUPCON_FORWARD(gpu::F16, 1, SoftplusSum)
}  // namespace pysupcon::cuda
