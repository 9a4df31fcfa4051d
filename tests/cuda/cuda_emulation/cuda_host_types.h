// The types of CUDA C++ and the functions of its runtime that the host code of the kernels calls.
#pragma once
#include <cstdint>
#include <cstdlib>
#include <cstring>

// ------------------------------------------------------------------ vector and 16-bit types
#if __has_include( \
    <cuda_bf16.h>) && !defined(CUDA_SHIM_OWN_TYPES)  // NVIDIA's headers, if a toolkit is installed
#include <vector_functions.h>
#include <vector_types.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#undef __global__
#undef __device__
#undef __host__
#undef __shared__
#undef __constant__
#undef __forceinline__
#undef __noinline__
#undef __launch_bounds__
#undef __align__
#else
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned a = 1, unsigned b = 1, unsigned c = 1) : x(a), y(b), z(c) {}
};
#define SHIM_VEC(T, N)                                  \
  struct alignas(2 * sizeof(T)) N##2 { T x, y; };       \
  struct alignas(4 * sizeof(T)) N##4 { T x, y, z, w; }; \
  inline N##2 make_##N##2(T x, T y) { return {x, y}; }  \
  inline N##4 make_##N##4(T x, T y, T z, T w) { return {x, y, z, w}; }
SHIM_VEC(float, float)
SHIM_VEC(int, int)
SHIM_VEC(unsigned, uint)
struct alignas(16) double2 {
  double x, y;
};
struct alignas(16) longlong2 {
  long long x, y;
};
struct alignas(16) ulonglong2 {
  unsigned long long x, y;
};
inline double2 make_double2(double x, double y) { return {x, y}; }
inline longlong2 make_longlong2(long long x, long long y) { return {x, y}; }
inline ulonglong2 make_ulonglong2(unsigned long long x, unsigned long long y) { return {x, y}; }
struct __nv_bfloat16 {
  uint16_t x;
};
struct __half {
  uint16_t x;
};
struct alignas(4) __nv_bfloat162 {
  __nv_bfloat16 x, y;
};
struct alignas(4) __half2 {
  __half x, y;
};
inline float __bfloat162float(__nv_bfloat16 b) {
  uint32_t u = uint32_t(b.x) << 16;
  float f;
  memcpy(&f, &u, 4);
  return f;
}
inline __nv_bfloat16 __float2bfloat16(float f) {  // round to nearest even
  uint32_t u;
  memcpy(&u, &f, 4);
  return {uint16_t(f != f ? 0x7fff : (u + 0x7fff + (u >> 16 & 1)) >> 16)};
}
inline float __half2float(__half h) {
  _Float16 v;
  memcpy(&v, &h, 2);
  return float(v);
}
inline __half __float2half(float f) {
  _Float16 v = _Float16(f);
  __half h;
  memcpy(&h, &v, 2);
  return h;
}
inline __nv_bfloat162 __floats2bfloat162_rn(float a, float b) {
  return {__float2bfloat16(a), __float2bfloat16(b)};
}
inline __half2 __floats2half2_rn(float a, float b) { return {__float2half(a), __float2half(b)}; }
inline float2 __bfloat1622float2(__nv_bfloat162 v) { return {__bfloat162float(v.x), __bfloat162float(v.y)}; }
inline float2 __half22float2(__half2 v) { return {__half2float(v.x), __half2float(v.y)}; }
#endif

// ------------------------------------------------------------------ the runtime's host functions
// There is one device, number 0. As in the runtime, a failed call stores its error for cudaGetLastError.
typedef struct CUstream_st* cudaStream_t;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidDevice = 101 };
enum cudaDeviceAttr {
  cudaDevAttrMaxSharedMemoryPerBlock,
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrComputeCapabilityMajor,
  cudaDevAttrComputeCapabilityMinor,
  cudaDevAttrMaxSharedMemoryPerMultiprocessor,
  cudaDevAttrMaxSharedMemoryPerBlockOptin,
};
enum cudaFuncAttribute {
  cudaFuncAttributeMaxDynamicSharedMemorySize,
  cudaFuncAttributePreferredSharedMemoryCarveout
};
struct cudaFuncAttributes {
  size_t sharedSizeBytes, constSizeBytes, localSizeBytes;
  int maxThreadsPerBlock, numRegs, ptxVersion, binaryVersion, maxDynamicSharedSizeBytes;
};
extern "C" {                          // for tests that load a library of operators
inline long cuda_shim_enqueued = 0;   // kernels and memsets so far
inline int cuda_shim_count_only = 0;  // count, but run nothing: buffers do not change
}
namespace shim {
constexpr int kMaxShared = 227 << 10;  // maximal dynamic shared memory of a block in bytes
inline cudaError_t last_error = cudaSuccess;
inline cudaError_t checked(bool ok, cudaError_t error) { return ok ? cudaSuccess : last_error = error; }
}  // namespace shim
inline cudaError_t cudaPeekAtLastError() { return shim::last_error; }
inline cudaError_t cudaGetLastError() {
  const cudaError_t error = shim::last_error;
  shim::last_error = cudaSuccess;
  return error;
}
inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess             ? "no error"
         : error == cudaErrorInvalidValue ? "invalid argument"
                                          : "invalid device ordinal";
}
inline cudaError_t cudaMallocManaged(void** p, size_t bytes) {
  return posix_memalign(p, 256, bytes), cudaSuccess;  // exact size, so that a sanitizer detects overruns
}
inline cudaError_t cudaFree(void* p) { return free(p), cudaSuccess; }
inline cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }
inline cudaError_t cudaMemsetAsync(void* p, int value, size_t bytes, cudaStream_t) {
  ++cuda_shim_enqueued;
  if (p && bytes && !cuda_shim_count_only) memset(p, value, bytes);
  return shim::checked(p || !bytes, cudaErrorInvalidValue);
}
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  if (device) return shim::checked(false, cudaErrorInvalidDevice);
  switch (attribute) {
    case cudaDevAttrMaxSharedMemoryPerBlock:
      *value = 48 << 10;
      break;
    case cudaDevAttrMultiProcessorCount:
      *value = 4;
      break;
    case cudaDevAttrComputeCapabilityMajor:
      *value = 9;
      break;
    case cudaDevAttrComputeCapabilityMinor:
      *value = 0;
      break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
      *value = shim::kMaxShared + 1024;
      break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = shim::kMaxShared;
      break;
  }
  return cudaSuccess;
}
template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel* kernel, cudaFuncAttribute attribute, int value) {
  const int top = attribute == cudaFuncAttributeMaxDynamicSharedMemorySize ? shim::kMaxShared : 100;
  return shim::checked(kernel && value <= top, cudaErrorInvalidValue);
}
template <class Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* out, Kernel* kernel) {
  *out = {0, 0, 0, 1024, 0, 90, 90, shim::kMaxShared};
  return shim::checked(kernel, cudaErrorInvalidValue);
}
