// Tests the semantics of each primitive of the emulation, and that misuse is reported. With an argument: a
// race that TSan must report.
#include "gpu_ops.cuh"
extern "C" const char* __asan_default_options() {
  return "detect_leaks=0";
}  // failed launches abandon their fibers
static int fails = 0;
#define CHECK(c)                                    \
  do {                                              \
    if (!(c)) {                                     \
      printf("FAILED line %d: %s\n", __LINE__, #c); \
      ++fails;                                      \
    }                                               \
  } while (0)
template <class F>
std::string thrown(F f) {
  try {
    f();
  } catch (const std::exception& e) {
    return e.what();
  }
  return "";
}
#define RUN(k, g, b, smem, ...) gpu::launch(k, g, b, smem, nullptr, __VA_ARGS__)
constexpr unsigned FULL = 0xffffffffu;

__global__ void k_shfl(int* o) {
  int t = threadIdx.x;
  o[t] = __shfl_sync(FULL, t, 5, 8);
  o[32 + t] = __shfl_up_sync(FULL, t, 3);
  o[64 + t] = __shfl_down_sync(FULL, t, 3, 16);
  o[96 + t] = __shfl_xor_sync(FULL, t, 9);
  o[128 + t] = int(__ballot_sync(FULL, t % 3 == 0));
  o[160 + t] = __any_sync(FULL, t == 7) + 2 * __all_sync(FULL, t < 31);
  double d = __shfl_xor_sync(FULL, t + 0.5, 1);
  o[192 + t] = int(2 * d);
  if (t < 16)
    o[224 + t] = __shfl_xor_sync(0xffffu, t, 1);
  else
    o[224 + t] = __shfl_xor_sync(0xffff0000u, t, 2);  // two halves apart
}
// grid-wide sum: warp shuffles, static shared, one atomic per block, a tail, a 2-D block and a "last block"
// finish
__global__ void k_sum(const float* x, int n, float* total, unsigned* ticket, float* result) {
  __shared__ float part[32];
  __shared__ bool last;
  int tid = threadIdx.y * blockDim.x + threadIdx.x, nt = blockDim.x * blockDim.y, i = blockIdx.x * nt + tid;
  float v = i < n ? __ldg(x + i) : 0.f;
  for (int o = 16; o; o >>= 1) v += __shfl_down_sync(FULL, v, o);
  if (tid % 32 == 0) part[tid / 32] = v;
  __syncthreads();
  if (tid < 32) {
    v = tid < nt / 32 ? part[tid] : 0.f;
    for (int o = 16; o; o >>= 1) v += __shfl_xor_sync(FULL, v, o);
    if (tid == 0) {
      atomicAdd(total, v);
      __threadfence();
      last = atomicAdd(ticket, 1u) == gridDim.x - 1;
    }
  }
  __syncthreads();
  if (last && tid == 0) *result = atomicAdd(total, 0.f);
}
// Blocks write their parts, and the last block adds them in the order of the blocks; the ticket wraps to 0
// for the next launch.
struct Parts {
  float* part;
  unsigned* ticket;
};
__global__ void k_ordered_sum(const __grid_constant__ Parts parts, const float* x, float* result) {
  __shared__ bool last;
  const int i = int(blockIdx.x * blockDim.x + threadIdx.x);
  __stcg(parts.part + i, x[i]);
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) last = atomicInc(parts.ticket, gridDim.x - 1) == gridDim.x - 1;
  __syncthreads();
  if (!last) return;
  __threadfence();
  float sum = 0;
  if (threadIdx.x == 0)
    for (unsigned k = 0; k < gridDim.x * blockDim.x; ++k) sum = sum / 2 + __ldcg(parts.part + k);
  if (threadIdx.x == 0) *result = sum;
}
// The same within a block: the last warp reads the parts of the other warps, without a barrier.
__global__ void k_last_warp(int* part, unsigned* ticket, int* result) {
  const unsigned warp = threadIdx.x / 32, warps = blockDim.x / 32;
  part[threadIdx.x] = int(threadIdx.x);
  __threadfence();
  unsigned mine = 0;
  if (threadIdx.x % 32 == 0) mine = atomicAdd(ticket, 1u);
  mine = __shfl_sync(FULL, mine, 0);
  if (mine != warps - 1) return;
  __threadfence();
  if (threadIdx.x == 32 * warp) {
    int sum = 0;
    for (unsigned k = 0; k < blockDim.x; ++k) sum += part[k];
    *result = sum;
  }
}
__global__ void k_votes(int* o) {
  const int t = int(threadIdx.x);
  for (int round = 0; round < 3; ++round) {
    o[t] = __syncthreads_count(t % 3 == round);
    o[64 + t] = __syncthreads_or(t == 5 * round) + 2 * __syncthreads_and(t >= 0);
    o[128 + t] = __syncthreads_or(t == 100) + 2 * __syncthreads_and(t < 63);
  }
}
__global__ void k_atomics(int* i, unsigned* u, unsigned long long* l) {
  atomicAdd(i, -1);
  atomicAdd(u, 0x10000000u);
  atomicAdd(l, 1ull << 40);
  atomicMax(i + 1, int(threadIdx.x) - 40), atomicMin(i + 2, -int(threadIdx.x));
}
// Independent definition of the fragments: CuTe's SM80_16x8x16 layouts (T32,V) -> A: m + 16 k, B: n + 8 k, C:
// m + 16 n.
template <bool HALF>
__global__ void k_mma(const float* A, const float* Bm, float* C) {
  int t = threadIdx.x, t0 = t % 4, t1 = t / 4;
  uint32_t a[4], b[2];
  float d[4] = {1, 2, 3, 4};
  auto enc = [](float f) {
    uint16_t u;
    if (HALF) {
      auto h = __float2half(f);
      memcpy(&u, &h, 2);
    } else {
      auto h = __float2bfloat16(f);
      memcpy(&u, &h, 2);
    }
    return uint32_t(u);
  };
  for (int r = 0; r < 4; ++r) {
    a[r] = 0;
    for (int h = 0; h < 2; ++h) a[r] |= enc(A[t0 * 32 + t1 + h * 16 + r % 2 * 8 + r / 2 * 128]) << 16 * h;
  }
  for (int r = 0; r < 2; ++r) {
    b[r] = 0;
    for (int h = 0; h < 2; ++h) b[r] |= enc(Bm[t0 * 16 + t1 + h * 8 + r * 64]) << 16 * h;
  }
  if (HALF)
    gpu::mma_f16(d, a, b);
  else
    gpu::mma_bf16(d, a, b);
  for (int i = 0; i < 4; ++i) C[t0 * 32 + t1 + i % 2 * 16 + i / 2 * 8] = d[i] - float(i + 1);
}
__global__ void k_ldm(uint32_t* o) {
  __shared__ __align__(16) uint16_t s[32][8];
  int t = threadIdx.x;
  for (int e = 0; e < 8; ++e) s[t][e] = uint16_t(t * 8 + e);
  __syncwarp();
  uint32_t r[4], q[4];
  gpu::ldmatrix(r, s[t]);
  gpu::ldmatrix_transposed(q, s[t]);
  for (int i = 0; i < 4; ++i) {
    o[i * 32 + t] = r[i];
    o[128 + i * 32 + t] = q[i];
  }
}
__global__ void k_exit_early(int n) {
  if (int(threadIdx.x) >= n) return;
  __syncthreads();
}
__global__ void k_two_barriers(int n) {
  if (int(threadIdx.x) < n)
    __syncthreads();
  else
    __syncthreads();
}
__global__ void k_two_ops(int* o) {
  if (threadIdx.x < 16)
    o[0] = __shfl_sync(FULL, 1, 0);
  else
    o[1] = int(__ballot_sync(FULL, 1));
}
__global__ void k_outside(int* o) {
  if (threadIdx.x < 16) o[threadIdx.x] = __shfl_down_sync(0xffffu, int(threadIdx.x), 4);
}
__global__ void k_unwaited(float* o) {
  DYNAMIC_SHARED(float4, s);
  gpu::cp_async16(&s[threadIdx.x], o, true);
  gpu::cp_async_commit();
  float early = s[threadIdx.x].x;
  gpu::cp_async_wait<0>();
  o[4 + 2 * threadIdx.x] = early;
  o[5 + 2 * threadIdx.x] = s[threadIdx.x].x;
}
__global__ void k_deep(int* o, int n) {
  volatile char pad[16 << 10];
  pad[0] = char(n);
  __syncthreads();
  o[threadIdx.x] = pad[0];
}
__global__ void k_no_syncwarp(
    int* o) {  // the bug: lanes of one warp exchange through shared memory without __syncwarp
  __shared__ int s[32];
  s[threadIdx.x] = threadIdx.x;
  o[threadIdx.x] = s[31 - threadIdx.x];
}
int main(int argc, char**) {
  std::vector<int> o(256);
  RUN(k_shfl, dim3(1), dim3(32), 0, o.data());
  for (int t = 0; t < 32; ++t) {
    CHECK(o[t] == (t & ~7) + 5);
    CHECK(o[32 + t] == (t < 3 ? t : t - 3));
    CHECK(o[64 + t] == (t % 16 < 13 ? t + 3 : t));
    CHECK(o[96 + t] == (t ^ 9));
    CHECK(unsigned(o[128 + t]) == 0x49249249u);
    CHECK(o[160 + t] == 1);
    CHECK(o[192 + t] == 2 * (t ^ 1) + 1);
    CHECK(o[224 + t] == (t < 16 ? t ^ 1 : t ^ 2));
  }
  for (int n : {1, 255, 256, 257, 3000}) {
    std::vector<float> x(n);
    float tot = 0, res = -1, want = 0;
    unsigned tick = 0;
    for (int i = 0; i < n; ++i) want += x[i] = float(i % 7 - 2);
    RUN(k_sum, dim3((n + 255) / 256), dim3(64, 4), 0, x.data(), n, &tot, &tick, &res);
    CHECK(tot == want && res == want && tick == unsigned(n + 255) / 256);
  }
  for (int launch = 0; launch < 2; ++launch) {
    std::vector<float> x(128), part(128, NAN);
    static unsigned ticket = 0;
    float result = NAN, want = 0;
    for (int i = 0; i < 128; ++i) want = want / 2 + (x[size_t(i)] = float(i * 29 % 31));
    RUN(k_ordered_sum, dim3(4), dim3(32), 0, Parts{part.data(), &ticket}, x.data(), &result);
    CHECK(result == want && ticket == 0);
  }
  {
    std::vector<int> part(256, -1);
    unsigned ticket = 0;
    int result = -1;
    RUN(k_last_warp, dim3(1), dim3(256), 0, part.data(), &ticket, &result);
    CHECK(result == 255 * 128 && ticket == 8);
  }
  RUN(k_votes, dim3(2), dim3(64), 0, o.data());
  for (int t = 0; t < 64; ++t) CHECK(o[t] == 21 && o[64 + t] == 3 && o[128 + t] == 0);
  {
    int i[3] = {0, -100, 100};
    unsigned u = 0;
    unsigned long long l = 0;
    RUN(k_atomics, dim3(2), dim3(33), 0, i, &u, &l);
    CHECK(i[0] == -66 && i[1] == -8 && i[2] == -32 && u == 0x20000000u && l == 66ull << 40);
  }
  {
    int value = -1;
    cudaFuncAttributes attributes;
    CHECK(cudaDeviceGetAttribute(&value, cudaDevAttrMultiProcessorCount, 0) == cudaSuccess && value > 0);
    CHECK(cudaFuncSetAttribute(k_votes, cudaFuncAttributeMaxDynamicSharedMemorySize, 99 << 10) ==
          cudaSuccess);
    CHECK(cudaFuncGetAttributes(&attributes, k_votes) == cudaSuccess && attributes.localSizeBytes == 0);
    CHECK(cudaGetLastError() == cudaSuccess);
    CHECK(cudaDeviceGetAttribute(&value, cudaDevAttrMultiProcessorCount, 7) == cudaErrorInvalidDevice);
    CHECK(cudaPeekAtLastError() == cudaErrorInvalidDevice && cudaGetLastError() == cudaErrorInvalidDevice);
    CHECK(cudaGetLastError() == cudaSuccess);  // a failed call is reported once
    CHECK(cudaMemsetAsync(nullptr, 0, 4, nullptr) == cudaErrorInvalidValue);
    CHECK(cudaFuncSetAttribute(k_votes, cudaFuncAttributeMaxDynamicSharedMemorySize, 1 << 20) ==
          cudaGetLastError());
  }
  static_assert(sizeof(uint2) == 8 && sizeof(int4) == 16 && sizeof(ulonglong2) == 16 && alignof(uint4) == 16,
                "as CUDA has them");
  std::vector<float> A(256), Bm(128), C(128);
  for (int i = 0; i < 256; ++i) A[i] = float(i * 37 % 19 - 9);
  for (int i = 0; i < 128; ++i) Bm[i] = float(i * 11 % 23 - 11);
  for (int half = 0; half < 2; ++half) {
    RUN(half ? k_mma<true> : k_mma<false>, dim3(1), dim3(32), 0, A.data(), Bm.data(), C.data());
    for (int m = 0; m < 16; ++m)
      for (int n = 0; n < 8; ++n) {
        float s = 0;
        for (int k = 0; k < 16; ++k) s += A[m + 16 * k] * Bm[n + 8 * k];
        CHECK(C[m + 16 * n] == s);
      }
  }
  std::vector<uint32_t> r(256);
  RUN(k_ldm, dim3(1), dim3(32), 0, r.data());
  for (int i = 0; i < 4; ++i)
    for (int t = 0; t < 32; ++t)
      for (int h = 0; h < 2; ++h) {
        CHECK((r[i * 32 + t] >> 16 * h & 0xffff) == uint32_t((i * 8 + t / 4) * 8 + t % 4 * 2 + h));
        CHECK((r[128 + i * 32 + t] >> 16 * h & 0xffff) == uint32_t((i * 8 + t % 4 * 2 + h) * 8 + t / 4));
      }
  alignas(16) float f[12] = {3, 0, 0, 0};
  RUN(k_unwaited, dim3(1), dim3(4), 64, f);
  CHECK(std::isnan(f[4]) && f[5] == 3);
  RUN(k_deep, dim3(2), dim3(1024), 0, (o.resize(1024), o.data()), 7);
  CHECK(o[1023] == 7);
  std::string e;
  e = thrown([&] { RUN(k_exit_early, dim3(2), dim3(64), 0, 63); });
  CHECK(e.find("deadlock") == 0 && e.find("has returned") != e.npos);
  CHECK(thrown([&] { RUN(k_two_barriers, dim3(1), dim3(64), 0, 32); }).find("divergent __syncthreads") == 0);
  CHECK(thrown([&] { RUN(k_two_ops, dim3(1), dim3(32), 0, o.data()); }).find("divergent warp collective") ==
        0);
  CHECK(thrown([&] { RUN(k_outside, dim3(1), dim3(32), 0, o.data()); }).find("not in the mask") != e.npos);
  CHECK(thrown([&] { RUN(k_exit_early, dim3(1), dim3(2048), 0, 1); }) == "invalid launch configuration");
  CHECK(thrown([&] { RUN(k_exit_early, dim3(2), dim3(64), 0, 64); }).empty());  // usable after an error
  printf("%s\n", e.c_str());
  if (argc > 1) RUN(k_no_syncwarp, dim3(1), dim3(32), 0, o.data());  // TSan must complain
  puts(fails ? "FAIL" : "PASS");
  return fails != 0;
}
