// The only file with inline PTX. Each operation has a device version and a host twin of the same signature,
// which the emulation under tests/cuda/cuda_emulation runs. Fragment layouts: PTX ISA, "Matrix fragments for
// mma.m16n8k16 with floating point type" (group g = lane / 4, member t = lane % 4).
#pragma once
#include <cstddef>
#include <cstdint>

// The most shared memory that a block may have on every chip from sm_80 on: sm_86, sm_89 and sm_120 allow it.
constexpr int kMostShared = 99 << 10;
// What is left of it for the dynamic part. The runtime refuses an allowance that exceeds the chip's limit
// together with a kernel's static shared memory, which is a few words, and the gap that aligns the dynamic
// part.
constexpr int kMostDynamic = kMostShared - 448;

#ifndef CUDA_HOST_SHIM
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#endif

namespace gpu {

// An error that is reported is not left behind for whoever calls the runtime next.
inline cudaError_t checked(cudaError_t error) {
  if (error != cudaSuccess) cudaGetLastError();
  return error;
}

}  // namespace gpu

#ifndef CUDA_HOST_SHIM

#define DYNAMIC_SHARED(T, name)                                \
  extern __shared__ __align__(128) unsigned char name##_raw[]; \
  T* name = reinterpret_cast<T*>(name##_raw)

namespace gpu {

// D = A B^T + C; mma: C is D, mma_first: C is 0.
#define PYSUPCON_MMA(NAME, TYPE)                                                                        \
  __device__ __forceinline__ void NAME(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) { \
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." TYPE "." TYPE                                 \
                 ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"                           \
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                       \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));                   \
  }                                                                                                     \
  __device__ __forceinline__ void NAME##_first(float (&d)[4], const uint32_t (&a)[4],                   \
                                               const uint32_t (&b)[2]) {                                \
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." TYPE "." TYPE                                 \
                 ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%10,%10,%10};"                       \
                 : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])                                       \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(0.f));         \
  }
PYSUPCON_MMA(mma_bf16, "bf16")
PYSUPCON_MMA(mma_f16, "f16")
#undef PYSUPCON_MMA

__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// Four 8 x 8 matrices of 16-bit numbers; lane l names row l % 8 of matrix l / 8.
__device__ __forceinline__ void ldmatrix(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}
__device__ __forceinline__ void ldmatrix_transposed(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

// 16 bytes from global to shared memory; writes zeros where !valid (src is then not read).
__device__ __forceinline__ void cp_async16(void* dst, const void* src, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(dst)), "l"(src),
               "r"(valid ? 16 : 0)
               : "memory");
}
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int N>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// 2^x to 2 ulp; 2^-inf = 0.
__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
// 1 / x to 1 ulp; 1 / inf = 0.
__device__ __forceinline__ float reciprocal_fast(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Raises *p to v, both >= 0 and not NaN: the maximum does not depend on the order, so neither does the
// result.
__device__ __forceinline__ void atomic_max_nonnegative(float* p, float v) {
  atomicMax(reinterpret_cast<int*>(p), __float_as_int(v));
}

// Threads that store to the same place at the same time: one of their values stays.
__device__ __forceinline__ void store_one_of(int* p, int v) {
  asm volatile("st.relaxed.gpu.global.s32 [%0], %1;" ::"l"(p), "r"(v) : "memory");
}

// What another block wrote: not from the first-level cache, which does not see it.
__device__ __forceinline__ float load_l2(const float* p) { return __ldcg(p); }
__device__ __forceinline__ double load_l2(const double* p) { return __ldcg(p); }
__device__ __forceinline__ float2 load_l2(const float2* p) { return __ldcg(p); }
__device__ __forceinline__ float4 load_l2(const float4* p) { return __ldcg(p); }

// blockIdx.x, read anew: cheaper than registers in which what follows from it waits across a loop.
__device__ __forceinline__ int block_again() {
  int b;
  asm volatile("mov.u32 %0, %%ctaid.x;" : "=r"(b));
  return b;
}

// No load moves across this line: fewer values wait in registers.
__device__ __forceinline__ void keep_order() { asm volatile("" ::: "memory"); }

// The only way a kernel starts. What a kernel may ever take of the shared memory does not depend on this
// launch: another thread may launch the same kernel with another size at the same time.
template <class... P, class... A>
cudaError_t launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared, cudaStream_t stream,
                   A&&... args) {
  if (shared > 48 << 10) {
    const void* function = reinterpret_cast<const void*>(kernel);
    cudaError_t e = cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, kMostDynamic);
    if (e == cudaSuccess)
      e = cudaFuncSetAttribute(function, cudaFuncAttributePreferredSharedMemoryCarveout,
                               cudaSharedmemCarveoutMaxShared);
    if (e != cudaSuccess) return checked(e);
  }
  cudaLaunchConfig_t config{};
  config.gridDim = grid, config.blockDim = block, config.dynamicSmemBytes = shared, config.stream = stream;
  return checked(cudaLaunchKernelEx(&config, kernel, static_cast<A&&>(args)...));
}

}  // namespace gpu

#else  // the host twins
namespace gpu {

struct Fragments {
  uint32_t a[4], b[2];
  float c[4];
};
struct Accumulators {
  float d[4];
};
// FRACTION_BITS and EXPONENT_BITS say which 16-bit format a and b are in.
template <int FRACTION_BITS, int EXPONENT_BITS>
void mma_twin(const char* op, float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
              shim::Site site) {
  Fragments in;
  memcpy(in.a, a, 16), memcpy(in.b, b, 8), memcpy(in.c, d, 16);
  const auto all_lanes = [](const Fragments* const* f, Accumulators* const* out) {
    [[gnu::uninitialized]] uint32_t a_words[16][8], b_words[8][8];  // filling them would cost as much
    [[gnu::uninitialized]] float D[16][8];
    for (int l = 0; l < 32; ++l) {
      const int g = l / 4, t = l % 4;
      for (int r = 0; r < 4; ++r) {
        a_words[g + 8 * (r & 1)][t + 4 * (r >> 1)] = f[l]->a[r];
        D[g + 8 * (r >> 1)][2 * t + (r & 1)] = f[l]->c[r];
      }
      for (int r = 0; r < 2; ++r) b_words[g][t + 4 * r] = f[l]->b[r];
    }
    [[gnu::uninitialized]] shim::Factors<16> A;
    [[gnu::uninitialized]] shim::Factors<8> B;
    A.decode<FRACTION_BITS, EXPONENT_BITS>(a_words);
    B.decode<FRACTION_BITS, EXPONENT_BITS>(b_words);
    shim::multiply_add<FRACTION_BITS>(shim::tensor_core(), D, A, B);
    for (int l = 0; l < 32; ++l)
      for (int i = 0; i < 4; ++i) out[l]->d[i] = D[l / 4 + 8 * (i >> 1)][2 * (l % 4) + (i & 1)];
  };
  memcpy(d, shim::collective<Accumulators>(op, ~0u, in, all_lanes, site).d, 16);
}
inline void mma_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], SHIM_SITE) {
  mma_twin<7, 8>("mma bf16", d, a, b, site);
}
inline void mma_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], SHIM_SITE) {
  mma_twin<10, 5>("mma f16", d, a, b, site);
}
inline void mma_bf16_first(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], SHIM_SITE) {
  for (float& v : d) v = 0.f;
  mma_bf16(d, a, b, site);
}
inline void mma_f16_first(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], SHIM_SITE) {
  for (float& v : d) v = 0.f;
  mma_f16(d, a, b, site);
}
inline void check_aligned16(const char* op, const void* p, shim::Site s) {
  if (reinterpret_cast<uintptr_t>(p) % 16)
    shim::fail("%s: address not 16-byte aligned (%s:%d)", op, s.file, s.line);
}
struct MatrixRow {
  uint16_t e[8];
};
template <bool TRANSPOSED>
void ldmatrix_twin(uint32_t (&r)[4], const void* row, shim::Site site) {
  struct Registers {
    uint32_t r[4];
  };
  const char* op = TRANSPOSED ? "ldmatrix.trans" : "ldmatrix";
  check_aligned16(op, row, site);
  MatrixRow mine;
  memcpy(&mine, row, 16);  // each lane reads the row it names, so that a sanitizer blames the right thread
  const auto all_lanes = [](const MatrixRow* const* in, Registers* const* out) {
    for (int l = 0; l < 32; ++l)
      for (int i = 0; i < 4; ++i) {
        const int x = l / 4, y = 2 * (l % 4);
        const uint32_t lo = TRANSPOSED ? in[8 * i + y]->e[x] : in[8 * i + x]->e[y];
        const uint32_t hi = TRANSPOSED ? in[8 * i + y + 1]->e[x] : in[8 * i + x]->e[y + 1];
        out[l]->r[i] = lo | hi << 16;
      }
  };
  memcpy(r, shim::collective<Registers>(op, ~0u, mine, all_lanes, site).r, 16);
}
inline void ldmatrix(uint32_t (&r)[4], const void* row, SHIM_SITE) { ldmatrix_twin<false>(r, row, site); }
inline void ldmatrix_transposed(uint32_t (&r)[4], const void* row, SHIM_SITE) {
  ldmatrix_twin<true>(r, row, site);
}

typedef uint32_t __attribute__((may_alias)) Word;
inline void put16(void* dst, const void* src,
                  uint32_t fill) {  // plain stores: TSan does not see an inlined memset
  for (int i = 0; i < 4; ++i) static_cast<Word*>(dst)[i] = src ? static_cast<const Word*>(src)[i] : fill;
}
// The copy lands as late as the program allows (in cp_async_wait); until then the destination holds NaN.
inline void cp_async16(void* dst, const void* src, bool valid, SHIM_SITE) {
  check_aligned16("cp_async16 dst", dst, site);
  if (valid) check_aligned16("cp_async16 src", src, site);
  put16(dst, nullptr, ~0u);
  shim::Fiber& f = *shim::B.cur;
  f.copies.push_back({dst, src, valid ? 16u : 0u, f.group});
}
inline void cp_async_commit() { ++shim::B.cur->group; }
template <int N>
void cp_async_wait() {
  shim::Fiber& f = *shim::B.cur;
  size_t k = 0;
  for (; k < f.copies.size() && f.copies[k].group < f.group - N; ++k) {
    shim::Copy& c = f.copies[k];
    put16(c.dst, c.bytes ? c.src : nullptr, 0);
  }
  f.copies.erase(f.copies.begin(), f.copies.begin() + long(k));
}

inline float exp2_fast(float x) { return std::exp2(x); }
inline float reciprocal_fast(float x) { return 1.0f / x; }
inline void atomic_max_nonnegative(float* p, float v) { atomicMax(p, v); }

inline void store_one_of(int* p, int v) { __atomic_store_n(p, v, __ATOMIC_RELAXED); }
inline int block_again() { return int(blockIdx.x); }
inline void keep_order() {}
inline float load_l2(const float* p) { return *p; }
inline double load_l2(const double* p) { return *p; }
inline float2 load_l2(const float2* p) { return *p; }
inline float4 load_l2(const float4* p) { return *p; }

template <class... P, class... A>
cudaError_t launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared, cudaStream_t, A&&... args) {
  if (shared > size_t(kMostDynamic)) shim::fail("a block asks for %zu bytes of shared memory", shared);
  shim::launch(kernel, grid, block, shared, args...);
  return cudaSuccess;
}

}  // namespace gpu
#endif

namespace gpu {

// The two 16-bit formats of the tensor cores under one interface.
struct Bf16 {
  using type = __nv_bfloat16;
  static __device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    mma_bf16(d, a, b);
  }
  static __device__ __forceinline__ void mma_first(float (&d)[4], const uint32_t (&a)[4],
                                                   const uint32_t (&b)[2]) {
    mma_bf16_first(d, a, b);
  }
  static __device__ __forceinline__ uint32_t pack(float lo, float hi) {
    const __nv_bfloat162 v = __floats2bfloat162_rn(lo, hi);
    uint32_t r;
    memcpy(&r, &v, 4);
    return r;
  }
  static __host__ __device__ __forceinline__ type from(float x) { return __float2bfloat16(x); }
  static __host__ __device__ __forceinline__ float to(type x) { return __bfloat162float(x); }
};
struct F16 {
  using type = __half;
  static __device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    mma_f16(d, a, b);
  }
  static __device__ __forceinline__ void mma_first(float (&d)[4], const uint32_t (&a)[4],
                                                   const uint32_t (&b)[2]) {
    mma_f16_first(d, a, b);
  }
  static __device__ __forceinline__ uint32_t pack(float lo, float hi) {
    const __half2 v = __floats2half2_rn(lo, hi);
    uint32_t r;
    memcpy(&r, &v, 4);
    return r;
  }
  static __host__ __device__ __forceinline__ type from(float x) { return __float2half(x); }
  static __host__ __device__ __forceinline__ float to(type x) { return __half2float(x); }
};

}  // namespace gpu
