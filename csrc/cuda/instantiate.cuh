// For the .cu files that instantiate kernels.h.
#pragma once
#include "backward.cuh"
#include "forward.cuh"
#include "kernels.h"

namespace pysupcon::cuda {

template <class F, int PARTS, class Epilogue>
cudaError_t forward(const Pairs& pairs, const typename Epilogue::Args& args, int splits,
                    cudaStream_t stream) {
  return launch_forward<ForwardConfig<F, PARTS>, Epilogue>(pairs, args, splits, stream);
}
template <class F, int PARTS, class Weights>
cudaError_t backward(const Pairs& pairs, const typename Weights::Args& args, const Gradient& out, int splits,
                     cudaStream_t stream) {
  return launch_backward<BackwardConfig<F, PARTS>, Weights>(pairs, args, out, splits, stream);
}

#define PYSUPCON_FORWARD(F, PARTS, EPILOGUE)                                                          \
  template cudaError_t forward<F, PARTS, EPILOGUE>(const Pairs&, const typename EPILOGUE::Args&, int, \
                                                   cudaStream_t);
#define PYSUPCON_BACKWARD(F, PARTS, WEIGHTS)                                                    \
  template cudaError_t backward<F, PARTS, WEIGHTS>(const Pairs&, const typename WEIGHTS::Args&, \
                                                   const Gradient&, int, cudaStream_t);

}  // namespace pysupcon::cuda
