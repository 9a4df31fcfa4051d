// cuda_host_shim.h - run CUDA kernels on the CPU, for tests at small sizes. C++17, g++/clang++, Linux.
//
//   g++ -std=c++17 -O1 -g -ftrivial-auto-var-init=pattern -include cuda_host_shim.h -x c++ my_kernel.cu
//
// There is one OS thread. Every CUDA thread is a fiber that runs until it reaches a barrier or a warp
// collective; blocks run one after the other. The first lanes of a warp collective wait with pointers to
// their operands, and the last lane computes the results of all. Because a fiber runs as far ahead as the
// barriers allow, a missing barrier usually gives a wrong result; -fsanitize=thread reports it as a data
// race. -fsanitize=address,undefined also works (see the #if blocks).
//
// Environment: CUDA_SHIM_ORDER=forward|reverse|<seed>   order of runnable threads and of blocks
//              CUDA_SHIM_TENSOR_CORE=h100|a100          how products are summed, see tensor_core.h
// Errors (deadlock, divergent barrier or collective, bad launch...) are thrown from launch() as
// std::runtime_error.
#pragma once
#define CUDA_HOST_SHIM 1
#include <sys/mman.h>
#include <algorithm>
#include <cmath>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>
#include "cuda_host_types.h"
#include "tensor_core.h"
#if !defined(__x86_64__) || defined(CUDA_SHIM_UCONTEXT)
#define SHIM_UC 1
#include <ucontext.h>
#endif
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#ifdef __SANITIZE_THREAD__
#include <sanitizer/tsan_interface.h>
extern "C" {
void AnnotateIgnoreReadsBegin(const char*, int);
void AnnotateIgnoreReadsEnd(const char*, int);
void AnnotateIgnoreWritesBegin(const char*, int);
void AnnotateIgnoreWritesEnd(const char*, int);
}
#endif

// ------------------------------------------------------------------ keywords
#define __global__
#define __device__
#define __host__
#define __constant__ static
#define __shared__ static  // correct, because only one block runs at a time; use DYNAMIC_SHARED for extern
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) __attribute__((aligned(n)))
#define DYNAMIC_SHARED(T, name) T* name = reinterpret_cast<T*>(::shim::B.dyn)  // nvcc twin: gpu_ops.cuh
#define threadIdx (::shim::B.cur->tid)
#define blockIdx (::shim::B.bid)
#define blockDim (::shim::B.bdim)
#define gridDim (::shim::B.gdim)
constexpr int warpSize = 32;

// ------------------------------------------------------------------ engine
namespace shim {
inline bool differ(const char* a, const char* b) { return a != b && strcmp(a, b); }
struct Site {
  const char* file;
  int line;
  bool operator!=(const Site& o) const { return line != o.line || differ(file, o.file); }
};
#define SHIM_SITE ::shim::Site site = {__builtin_FILE(), __builtin_LINE()}
enum State : uint8_t { READY, AT_BLOCK, AT_WARP, DONE };
struct Copy {
  void* dst;
  const void* src;
  unsigned bytes;
  int group;
};
struct Fiber {
  dim3 tid;
  unsigned linear = 0, lane = 0, warp = 0;
  State st = READY;
  const char* op = "";
  Site site{"", 0};
  unsigned mask = 0;
  const void* in = nullptr;
  void* out = nullptr;  // what it waits for
  std::vector<Copy> copies;
  int group = 0;  // cp.async
  char* stack = nullptr;
  void* sp = nullptr;
  void* fake = nullptr;
  void* tsan = nullptr;
  int quiet = 0;
#ifdef SHIM_UC
  ucontext_t uc;
#endif
};
struct Warp {
  unsigned arrived = 0, phase = 0;
  char sync[2];
};
struct Block {
  dim3 bid, bdim, gdim;
  unsigned char* dyn = nullptr;
  size_t dyn_bytes = 0;
  Fiber* cur;
  Fiber main;
  std::vector<Fiber> fib;
  std::vector<Fiber*> order, at;
  std::vector<Warp> warps;
  unsigned pos = 0, n = 0, at_barrier = 0, done = 0, phase = 0;
  char sync[2], start_sync, done_sync, fence;
  int tally[2];  // threads whose predicate is true at this barrier and at the next
  unsigned shadow_age = 0;
  std::function<void()> body;
  std::string error;
  std::mt19937 rng;
  int policy = 0;  // 0 forward, 1 reverse, 2 random
  const void* main_bottom = nullptr;
  size_t main_size = 0;
  Block() : cur(&main) {}
};
inline Block B;
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
constexpr size_t STACK = 256 << 10;
#else
constexpr size_t STACK = 64 << 10;
#endif
#ifdef __SANITIZE_THREAD__  // hides the shim's bookkeeping, which all fibers share, from TSan
struct Quiet {
  Quiet() {
    AnnotateIgnoreReadsBegin("", 0);
    AnnotateIgnoreWritesBegin("", 0);
    ++B.cur->quiet;
  }
  ~Quiet() {
    --B.cur->quiet;
    end();
  }
  static void end() {
    AnnotateIgnoreWritesEnd("", 0);
    AnnotateIgnoreReadsEnd("", 0);
  }
};
inline void tsan_release(void* p) { __tsan_release(p); }
inline void tsan_acquire(void* p) { __tsan_acquire(p); }
#else
struct Quiet {
  Quiet() {}
};
inline void tsan_release(void*) {}
inline void tsan_acquire(void*) {}
#endif

#ifndef SHIM_UC  // ~9 ns; swapcontext is ~175 ns because it makes a system call
__attribute__((naked, noinline, no_sanitize_address, no_sanitize_thread,
               no_sanitize_undefined)) static void raw_switch(void** /*save*/, void* /*load*/) {
  asm volatile(
      "pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15\n\t"
      "movq %rsp,(%rdi); movq %rsi,%rsp\n\t"
      "popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp; ret");
}
#endif
inline void landed(Fiber& me) {  // first thing after a switch, on the new stack
#ifdef __SANITIZE_ADDRESS__
  const void* b;
  size_t s;
  __sanitizer_finish_switch_fiber(me.fake, &b, &s);
  if (!B.main_bottom) {
    B.main_bottom = b;
    B.main_size = s;
  }
#endif
  (void)me;
}
inline void switch_to(Fiber& to) {
  Fiber& me = *B.cur;
  B.cur = &to;
  [[maybe_unused]] void* load = to.sp;
#ifdef __SANITIZE_ADDRESS__
  bool to_main = &to == &B.main;
  __sanitizer_start_switch_fiber(me.st == DONE ? nullptr : &me.fake, to_main ? B.main_bottom : to.stack,
                                 to_main ? B.main_size : STACK);
#endif
#ifdef __SANITIZE_THREAD__
  __tsan_switch_to_fiber(to.tsan, __tsan_switch_to_fiber_no_sync);
#endif
#ifdef SHIM_UC
  swapcontext(&me.uc, &to.uc);
#else
  raw_switch(&me.sp, load);
#endif
  landed(me);
}
inline std::string where(const Fiber& f) {
  static const char* what[] = {"running", "waits at __syncthreads", "waits in", "has returned"};
  char b[512];
  snprintf(b, sizeof b, "thread (%u,%u,%u) %s %s %s:%d", f.tid.x, f.tid.y, f.tid.z, what[f.st],
           f.st == AT_WARP ? f.op : "", f.site.file, f.site.line);
  return b;
}
[[noreturn]] inline void fail(const char* fmt, ...) {
  char b[1024];
  va_list ap;
  va_start(ap, fmt);
  vsnprintf(b, sizeof b, fmt, ap);
  va_end(ap);
  char w[96];
  snprintf(w, sizeof w, " [block (%u,%u,%u)]", B.bid.x, B.bid.y, B.bid.z);
  if (B.cur == &B.main) throw std::runtime_error(b);
  B.error = std::string(b) + w;
  switch_to(B.main);
  abort();
}
inline void yield() {  // run the next runnable fiber
  if (B.policy == 2)
    B.pos = B.rng() % B.n;
  else if (B.cur != &B.main)  // stay in the warp while it can run: a larger skew between warps shows
                              // more races
    for (unsigned k = 1; k < 32; ++k) {
      unsigned i = B.cur->warp * 32 + ((B.cur->lane + (B.policy ? 32 - k : k)) & 31);
      if (i < B.n && B.at[i]->st == READY) {
        switch_to(*B.at[i]);
        return;
      }
    }
  for (unsigned k = 0; k < B.n; ++k) {
    if (++B.pos >= B.n) B.pos = 0;
    Fiber* f = B.order[B.pos];
    if (f->st == READY) {
      if (f != B.cur) switch_to(*f);
      return;
    }
  }
  if (B.done == B.n) {
    switch_to(B.main);
    return;
  }
  std::string s = "deadlock:";
  const Fiber* last = nullptr;
  int shown = 0;  // one line per distinct situation
  for (Fiber* f : B.at)
    if ((!last || f->st != last->st || f->site != last->site) && shown++ < 6)
      s += "\n  " + where(*(last = f));
  fail("%s", s.c_str());
}
inline void fiber_main() {
  landed(*B.cur);
  B.body();
  Quiet q;
  if (!B.cur->copies.empty()) fail("a thread returns while its cp.async copies are in flight");
  B.cur->st = DONE;
  ++B.done;
  yield();
  abort();
}
inline void syncthreads(Site site) {
  Fiber& me = *B.cur;
  unsigned ph;
  {
    Quiet q;
    ph = B.phase & 1;
  }
  tsan_release(&B.sync[ph]);
  {
    Quiet q;
    me.st = AT_BLOCK;
    me.site = site;
    if (++B.at_barrier == B.n) {  // strict: every thread of the block, none may have returned
      for (Fiber* f : B.at)
        if (f->site != site) fail("divergent __syncthreads: %s, %s", where(me).c_str(), where(*f).c_str());
      for (Fiber* f : B.at) f->st = READY;
      B.at_barrier = 0;
      ++B.phase;
      B.tally[B.phase & 1] = 0;  // read by all before they came here
    }
    yield();
  }
  tsan_acquire(&B.sync[ph]);
}
inline int syncthreads_count(bool predicate, Site site) {
  int* tally;
  {
    Quiet q;
    tally = &B.tally[B.phase & 1];
    *tally += predicate;
  }
  syncthreads(site);
  Quiet q;
  return *tally;
}
// Waits for all lanes of `mask`; the last one runs fn(in, out) with in[lane], out[lane] once.
template <class Out, class In, class Fn>
Out collective(const char* op, unsigned mask, const In& in, Fn fn, Site site) {
  Quiet q;
  Fiber& me = *B.cur;
  Warp& w = B.warps[me.warp];
  Out out{};
  me.op = op;
  me.site = site;
  me.mask = mask;
  me.in = &in;
  me.out = &out;
  if (!(mask >> me.lane & 1))
    fail("%s: lane %u is not in its own mask %08x (%s:%d)", op, me.lane, mask, site.file, site.line);
  w.arrived |= 1u << me.lane;
  if ((w.arrived & mask) != mask) {
    me.st = AT_WARP;
    yield();
    return out;
  }
  const In* ins[32] = {};
  Out* outs[32] = {};
  for (unsigned l = 0; l < 32; ++l)
    if (mask >> l & 1) {
      Fiber& f = *B.at[me.warp * 32 + l];
      if (differ(f.op, op) || f.mask != mask || f.site != site)
        fail("divergent warp collective: %s mask %08x; %s mask %08x", where(me).c_str(), mask,
             where(f).c_str(), f.mask);
      ins[l] = static_cast<const In*>(f.in);
      outs[l] = static_cast<Out*>(f.out);
    }
  fn(ins, outs);
  for (unsigned l = 0; l < 32; ++l)
    if (mask >> l & 1) B.at[me.warp * 32 + l]->st = READY;
  w.arrived &= ~mask;
  ++w.phase;
  return out;
}
template <class T>
struct ShflIn {
  T v;
  int arg, width;
};
template <int KIND, class T>
T shfl(unsigned mask, T v, int arg, int width, Site site) {  // 0 idx, 1 up, 2 down, 3 xor
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "shuffle 4 or 8 byte types");
  static const char* names[] = {"__shfl_sync", "__shfl_up_sync", "__shfl_down_sync", "__shfl_xor_sync"};
  return collective<T>(
      names[KIND], mask, ShflIn<T>{v, arg, width},
      [&](const ShflIn<T>* const* in, T* const* out) {
        for (int l = 0; l < 32; ++l)
          if (in[l]) {
            int w = in[l]->width, lo = l & ~(w - 1), a = in[l]->arg,
                s = KIND == 0   ? lo + (a & (w - 1))
                    : KIND == 1 ? l - a
                    : KIND == 2 ? l + a
                                : l ^ a;
            if (s < lo || s >= lo + w) s = l;
            if (!in[s])
              fail("%s: lane %d reads lane %d, which is not in the mask (%s:%d)", names[KIND], l, s,
                   site.file, site.line);
            *out[l] = in[s]->v;
          }
      },
      site);
}
inline unsigned ballot(const char* op, unsigned mask, int p, Site site) {
  return collective<unsigned>(
      op, mask, p,
      [](const int* const* in, unsigned* const* out) {
        unsigned r = 0;
        for (int l = 0; l < 32; ++l)
          if (in[l] && *in[l]) r |= 1u << l;
        for (int l = 0; l < 32; ++l)
          if (out[l]) *out[l] = r;
      },
      site);
}
inline void syncwarp(unsigned mask, Site site) {
  void* s;
  {
    Quiet q;
    Warp& w = B.warps[B.cur->warp];
    s = &w.sync[w.phase & 1];
  }
  tsan_release(s);
  ballot("__syncwarp", mask, 0, site);
  tsan_acquire(s);
}

template <class F>
void run_block(F&& body) {
  B.at_barrier = B.done = 0;
  B.tally[0] = B.tally[1] = 0;
  B.pos = B.n - 1;
  B.body = body;
  B.error.clear();
  B.warps.assign((B.n + 31) / 32, Warp());
  if (posix_memalign(reinterpret_cast<void**>(&B.dyn), 128, std::max<size_t>(B.dyn_bytes, 1)))
    fail("out of memory");
  memset(B.dyn, 0xff,
         B.dyn_bytes);  // shared memory starts as NaN / -1, exact size so that ASan sees an overrun
  for (unsigned i = 0; i < B.n; ++i) {
    Fiber& f = B.fib[i];
    f.linear = i;
    f.lane = i % 32;
    f.warp = i / 32;
    f.st = READY;
    f.copies.clear();
    f.group = 0;
    f.fake = nullptr;
    f.tid = dim3(i % B.bdim.x, i / B.bdim.x % B.bdim.y, i / (B.bdim.x * B.bdim.y));
    B.at[i] = &f;
#ifdef __SANITIZE_ADDRESS__
    ASAN_UNPOISON_MEMORY_REGION(f.stack, STACK);
#endif
#ifdef SHIM_UC
    getcontext(&f.uc);
    f.uc.uc_stack.ss_sp = f.stack;
    f.uc.uc_stack.ss_size = STACK;
    f.uc.uc_link = nullptr;
    makecontext(&f.uc, fiber_main, 0);
#else
    void** s = reinterpret_cast<void**>(f.stack + STACK - 56);
    s[0] = nullptr;
    *--s = reinterpret_cast<void*>(fiber_main);
    f.sp = s - 6;  // six callee-saved registers, then the return address
#endif
  }
  B.order = B.at;
  if (B.policy == 1) std::reverse(B.order.begin(), B.order.end());
  if (B.policy == 2) std::shuffle(B.order.begin(), B.order.end(), B.rng);
#ifdef __SANITIZE_THREAD__
  // Creating the shadow of a fiber is expensive, so it is reused for many blocks. It is replaced at
  // intervals, because it never returns from fiber_main.
  const bool renew = ++B.shadow_age % 512 == 0;
  __tsan_release(&B.start_sync);
  for (Fiber* f : B.at) {
    if (renew && f->tsan) __tsan_destroy_fiber(f->tsan), f->tsan = nullptr;
    if (!f->tsan) f->tsan = __tsan_create_fiber(0);
    __tsan_switch_to_fiber(f->tsan, __tsan_switch_to_fiber_no_sync);
    __tsan_acquire(&B.start_sync);
    __tsan_switch_to_fiber(B.main.tsan, __tsan_switch_to_fiber_no_sync);
  }
#endif
  B.cur = &B.main;
  yield();
#ifdef __SANITIZE_THREAD__
  void* main_tsan = B.main.tsan;
  for (Fiber* f :
       B.at) {  // in the fiber's name: its work happens before what follows; end the Quiets it left open
    int q = f->quiet;
    f->quiet = 0;
    __tsan_switch_to_fiber(f->tsan, __tsan_switch_to_fiber_no_sync);
    __tsan_release(&B.done_sync);
    while (q--) Quiet::end();
    __tsan_switch_to_fiber(main_tsan, __tsan_switch_to_fiber_no_sync);
  }
  __tsan_acquire(&B.done_sync);
#endif
  free(B.dyn);
  B.dyn = nullptr;
  if (!B.error.empty()) throw std::runtime_error(B.error);
}
template <class... P, class... A>
void launch(void (*k)(P...), dim3 grid, dim3 block, size_t smem, A&&... args) {
  Quiet q;
  size_t n = size_t(block.x) * block.y * block.z;
  if (n == 0 || n > 1024 || block.z > 64 || smem > size_t(kMaxShared) || !grid.x || !grid.y || !grid.z ||
      grid.y > 65535 || grid.z > 65535)
    throw std::runtime_error("invalid launch configuration");
  ++cuda_shim_enqueued;
  if (cuda_shim_count_only) return;
  const char* o = getenv("CUDA_SHIM_ORDER");
  tensor_core();  // throws here for an unknown model, not in a fiber
  B.policy = !o || !strcmp(o, "forward") ? 0 : !strcmp(o, "reverse") ? 1 : 2;
  if (B.policy == 2) B.rng.seed(unsigned(atoi(o)));
  while (B.fib.size() < n) {  // stacks are kept for the next launch
    char* m = static_cast<char*>(mmap(nullptr, STACK + 4096, PROT_READ | PROT_WRITE,
                                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    if (m == MAP_FAILED || mprotect(m, 4096, PROT_NONE))
      throw std::runtime_error("no memory for fiber stacks");
    B.fib.emplace_back();
    B.fib.back().stack = m + 4096;  // guard page below
  }
  B.at.resize(n);
  B.n = unsigned(n);
  B.bdim = block;
  B.gdim = grid;
  B.dyn_bytes = smem;
#ifdef __SANITIZE_THREAD__
  B.main.tsan = __tsan_get_current_fiber();
#endif
  std::vector<size_t> ids(size_t(grid.x) * grid.y * grid.z);
  for (size_t i = 0; i < ids.size(); ++i) ids[i] = B.policy == 1 ? ids.size() - 1 - i : i;
  if (B.policy == 2) std::shuffle(ids.begin(), ids.end(), B.rng);
  for (size_t i : ids) {
    B.bid = dim3(unsigned(i % grid.x), unsigned(i / grid.x % grid.y), unsigned(i / grid.x / grid.y));
    run_block([&] { k(args...); });
  }
}
}  // namespace shim

// ------------------------------------------------------------------ CUDA built-in functions
inline void __syncthreads(SHIM_SITE) { shim::syncthreads(site); }
inline int __syncthreads_count(int p, SHIM_SITE) { return shim::syncthreads_count(p != 0, site); }
inline int __syncthreads_or(int p, SHIM_SITE) { return shim::syncthreads_count(p != 0, site) != 0; }
inline int __syncthreads_and(int p, SHIM_SITE) { return shim::syncthreads_count(p == 0, site) == 0; }
inline void __syncwarp(unsigned mask = ~0u, SHIM_SITE) { shim::syncwarp(mask, site); }
template <class T>
T __shfl_sync(unsigned m, T v, int src, int width = 32, SHIM_SITE) {
  return shim::shfl<0>(m, v, src, width, site);
}
template <class T>
T __shfl_up_sync(unsigned m, T v, unsigned d, int width = 32, SHIM_SITE) {
  return shim::shfl<1>(m, v, int(d), width, site);
}
template <class T>
T __shfl_down_sync(unsigned m, T v, unsigned d, int width = 32, SHIM_SITE) {
  return shim::shfl<2>(m, v, int(d), width, site);
}
template <class T>
T __shfl_xor_sync(unsigned m, T v, int x, int width = 32, SHIM_SITE) {
  return shim::shfl<3>(m, v, x, width, site);
}
inline unsigned __ballot_sync(unsigned m, int p, SHIM_SITE) {
  return shim::ballot("__ballot_sync", m, p, site);
}
inline int __any_sync(unsigned m, int p, SHIM_SITE) { return shim::ballot("__any_sync", m, p, site) != 0; }
inline int __all_sync(unsigned m, int p, SHIM_SITE) { return shim::ballot("__all_sync", m, p, site) == m; }
// For TSan, a fence orders all accesses before it with all accesses after the next fence. Nothing else needs
// ordering, because blocks run one after the other.
inline void __threadfence() { shim::tsan_release(&shim::B.fence), shim::tsan_acquire(&shim::B.fence); }
inline void __threadfence_block() { __threadfence(); }
template <class T, class F>
T shim_rmw(T* p, F f) {  // __atomic so that TSan knows
  T o, v;
  __atomic_load(p, &o, __ATOMIC_RELAXED);
  do v = f(o);
  while (!__atomic_compare_exchange(p, &o, &v, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
  return o;
}
template <class T>
struct shim_id {
  using type = T;
};
template <class T>
using shim_same = typename shim_id<T>::type;
template <class T>
T atomicAdd(T* p, shim_same<T> v) {
  return shim_rmw(p, [=](T o) { return T(o + v); });
}
template <class T>
T atomicMax(T* p, shim_same<T> v) {
  return shim_rmw(p, [=](T o) { return std::max(o, v); });
}
template <class T>
T atomicMin(T* p, shim_same<T> v) {
  return shim_rmw(p, [=](T o) { return std::min(o, v); });
}
template <class T>
T atomicExch(T* p, shim_same<T> v) {
  return shim_rmw(p, [=](T) { return v; });
}
template <class T>
T atomicCAS(T* p, shim_same<T> c, shim_same<T> v) {
  return shim_rmw(p, [=](T o) { return o == c ? v : o; });
}
inline unsigned atomicInc(unsigned* p, unsigned top) {  // wraps to 0 after top
  return shim_rmw(p, [=](unsigned o) { return o >= top ? 0 : o + 1; });
}
template <class T>
T __ldg(const T* p) {
  return *p;
}
template <class T>  // bypasses the L1 cache on a GPU
T __ldcg(const T* p) {
  return *p;
}
template <class T>
void __stcg(T* p, shim_same<T> v) {
  *p = v;
}
inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }
inline float __log2f(float x) { return std::log2(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x ? __builtin_clz(unsigned(x)) : 32; }
inline unsigned long long __float2ull_rn(float x) {
  return static_cast<unsigned long long>(std::nearbyint(x));
}
inline float __ull2float_rn(unsigned long long x) { return float(x); }
inline float __uint_as_float(unsigned u) {
  float f;
  memcpy(&f, &u, 4);
  return f;
}
inline unsigned __float_as_uint(float f) {
  unsigned u;
  memcpy(&u, &f, 4);
  return u;
}
using std::max;
using std::min;
