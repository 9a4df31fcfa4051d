// Tests every operation of gpu_ops.cuh against plain arithmetic. nvcc compiles this source to test the PTX on
// a GPU, g++ compiles it to test the host implementations of the emulation.
#include <cmath>
#include <cstdio>

#include "gpu_ops.cuh"

namespace {

constexpr int M = 16, N = 8, K = 16;

// C = A B^T through the fragments of the PTX manual, filled by hand.
template <class F>
__global__ void multiply(const float* a, const float* b, float* c) {
  const int g = int(threadIdx.x) / 4, t = int(threadIdx.x) % 4;
  uint32_t af[4], bf[2];
  for (int r = 0; r < 4; ++r) {
    const float* at = a + (g + 8 * (r % 2)) * K + 2 * t + 8 * (r / 2);
    af[r] = F::pack(at[0], at[1]);
  }
  for (int r = 0; r < 2; ++r) bf[r] = F::pack(b[g * K + 2 * t + 8 * r], b[g * K + 2 * t + 8 * r + 1]);
  float d[4] = {1.f, 2.f, 3.f, 4.f};
  F::mma(d, af, bf);
  for (int i = 0; i < 4; ++i) c[(g + 8 * (i / 2)) * N + 2 * t + i % 2] = d[i] - float(i + 1);
}

// The same through shared memory, cp.async and ldmatrix; the last row of A is left out by cp_async16's
// predicate. B comes through ldmatrix of [n][k] rows or, transposed, of [k][n] rows.
struct Tiles {
  uint4 a[M][2], b[M][2];
};
template <class F, bool TRANSPOSED>
__global__ void multiply_tiles(const uint4* a, const uint4* b, float* c) {
  DYNAMIC_SHARED(Tiles, s);
  const int lane = int(threadIdx.x), r = lane / 2, h = lane % 2;
  gpu::cp_async16(&s->a[r][h], a + 2 * r + h, r != M - 1);
  gpu::cp_async_commit();
  gpu::cp_async16(&s->b[r][h], b + 2 * r + h, true);
  gpu::cp_async_commit();
  gpu::cp_async_wait<0>();
  __syncthreads();
  uint32_t af[4], bf[4];
  gpu::ldmatrix(af, &s->a[lane & 15][lane >> 4]);
  if (TRANSPOSED)
    gpu::ldmatrix_transposed(bf, &s->b[lane & 15][lane >> 4]);
  else
    gpu::ldmatrix(bf, &s->b[(lane & 7) + ((lane >> 4) << 3)][(lane >> 3) & 1]);
  for (int half = 0; half < 2; ++half) {
    float d[4] = {};
    const uint32_t b2[2] = {bf[2 * half], bf[2 * half + 1]};
    F::mma(d, af, b2);
    for (int i = 0; i < 4; ++i) c[(lane / 4 + 8 * (i / 2)) * 16 + 8 * half + 2 * (lane % 4) + i % 2] = d[i];
  }
}

__global__ void scalars(const float* x, float* exp2, float* reciprocal, float* largest, int* one_of, int n) {
  const int i = int(blockIdx.x * blockDim.x + threadIdx.x);
  if (i >= n) return;
  exp2[i] = gpu::exp2_fast(x[i]);
  reciprocal[i] = gpu::reciprocal_fast(x[i]);
  if (x[i] >= 0.f && x[i] < INFINITY) gpu::atomic_max_nonnegative(largest, x[i]);
  gpu::store_one_of(&one_of[i % 7], i);
}

int failures = 0;
void check(bool ok, const char* what) {
  if (!ok) printf("FAIL %s\n", what), ++failures;
}
template <class T>
T* managed(size_t n) {
  void* p = nullptr;
  if (cudaMallocManaged(&p, n * sizeof(T)) != cudaSuccess) printf("FAIL no device memory\n"), exit(1);
  return static_cast<T*>(p);
}
void done(cudaError_t launched, const char* what) {
  check(launched == cudaSuccess && cudaDeviceSynchronize() == cudaSuccess, what);
}

template <class F>
void check_format(const char* name) {
  float *a = managed<float>(M * K), *b = managed<float>(N * K), *c = managed<float>(M * N);
  for (int i = 0; i < M * K; ++i) a[i] = float(i * 37 % 19 - 9);
  for (int i = 0; i < N * K; ++i) b[i] = float(i * 11 % 23 - 11);
  done(gpu::launch(multiply<F>, dim3(1), dim3(32), 0, nullptr, a, b, c), name);
  for (int m = 0; m < M; ++m)
    for (int n = 0; n < N; ++n) {
      float sum = 0;
      for (int k = 0; k < K; ++k) sum += a[m * K + k] * b[n * K + k];
      check(c[m * N + n] == sum, name);
    }

  typename F::type *ta = managed<typename F::type>(256), *tb = managed<typename F::type>(256);
  float* tc = managed<float>(256);
  const auto va = [](int i) { return float(i * 29 % 17 - 8); };
  const auto vb = [](int i) { return float(i * 13 % 21 - 10); };
  for (int i = 0; i < 256; ++i) {
    const auto x = F::from(va(i)), y = F::from(vb(i));
    ta[i] = x, tb[i] = y;
  }
  for (int transposed = 0; transposed < 2; ++transposed) {
    done(gpu::launch(transposed ? multiply_tiles<F, true> : multiply_tiles<F, false>, dim3(1), dim3(32),
                     sizeof(Tiles), nullptr, reinterpret_cast<const uint4*>(ta),
                     reinterpret_cast<const uint4*>(tb), tc),
         name);
    for (int m = 0; m < 16; ++m)
      for (int n = 0; n < 16; ++n) {
        float sum = 0;
        for (int k = 0; k < 16; ++k) sum += va(m * 16 + k) * (transposed ? vb(k * 16 + n) : vb(n * 16 + k));
        check(tc[m * 16 + n] == (m == 15 ? 0.f : sum), transposed ? "transposed tiles" : "tiles");
      }
  }
}

}  // namespace

int main() {
  check_format<gpu::Bf16>("bf16");
  check_format<gpu::F16>("f16");

  constexpr int n = 1003;
  float *x = managed<float>(n), *e = managed<float>(n), *r = managed<float>(n), *top = managed<float>(1);
  for (int i = 0; i < n; ++i) x[i] = float(i - 500) * 0.2f;
  int* one_of = managed<int>(7);
  for (int i = 0; i < 7; ++i) one_of[i] = -1;
  x[0] = -INFINITY, x[1] = INFINITY, *top = 0.f;
  done(gpu::launch(scalars, dim3(4), dim3(256), 0, nullptr, x, e, r, top, one_of, n), "scalars");
  check(e[0] == 0.f && e[1] == INFINITY && r[1] == 0.f, "exp2(-inf), exp2(inf), 1 / inf");
  for (int i = 2; i < n; ++i) {
    check(std::abs(e[i] - std::exp2(x[i])) <= 4e-7f * std::exp2(x[i]), "exp2");
    if (x[i] != 0.f) check(std::abs(r[i] * x[i] - 1.f) <= 4e-7f, "reciprocal");
  }
  check(*top == x[n - 1], "atomic maximum");
  for (int i = 0; i < 7; ++i) check(one_of[i] >= 0 && one_of[i] % 7 == i, "one of several stores");
  puts(failures ? "FAIL" : "PASS");
  return failures != 0;
}
