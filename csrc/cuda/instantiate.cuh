// For the .cu files that instantiate kernels.h.
#pragma once
#include "backward.cuh"
#include "forward.cuh"
#include "kernels.h"

namespace pysupcon::cuda {

template <class F, int PARTS, class Epilogue>
cudaError_t forward(const Pairs& pairs, const Runs& runs, const Triangle& triangle,
                    const typename Epilogue::Args& args, cudaStream_t stream) {
  return launch_forward<F, PARTS, Epilogue>(pairs, runs, triangle, args, stream);
}
template <class F, int PARTS, class Weights>
cudaError_t backward(const Pairs& pairs, const Runs& runs, const Shape& shape,
                     const typename Weights::Args& args, const Gradient& out, cudaStream_t stream) {
  return launch_backward<F, PARTS, Weights>(pairs, runs, shape, args, out, stream);
}

#define PYSUPCON_FORWARD(F, PARTS, EPILOGUE)                                                   \
  template cudaError_t forward<F, PARTS, EPILOGUE>(const Pairs&, const Runs&, const Triangle&, \
                                                   const typename EPILOGUE::Args&, cudaStream_t);
#define PYSUPCON_BACKWARD(F, PARTS, WEIGHTS)                                                       \
  template cudaError_t backward<F, PARTS, WEIGHTS>(const Pairs&, const Runs&, const Shape&,        \
                                                   const typename WEIGHTS::Args&, const Gradient&, \
                                                   cudaStream_t);

}  // namespace pysupcon::cuda
