// The tensor-core kernels as the dispatcher sees them. Each .cu beside this file instantiates a few, so that
// they compile in parallel.
#pragma once
#include "positive.cuh"
#include "softplus.cuh"
#include "statistics.cuh"

namespace pysupcon::cuda {

struct Gradient;

// F, PARTS: the 16-bit format and how many numbers of it stand for one input number.
template <class F, int PARTS, class Epilogue>
cudaError_t forward(const Pairs& pairs, const Runs& runs, const Triangle& triangle,
                    const typename Epilogue::Args& args, cudaStream_t stream);
template <class F, int PARTS, class Weights>
cudaError_t backward(const Pairs& pairs, const Runs& runs, const Shape& shape,
                     const typename Weights::Args& args, const Gradient& out, cudaStream_t stream);

}  // namespace pysupcon::cuda
