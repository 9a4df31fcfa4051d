// Picks the instruction set at run time: the best one the machine has, or PYSUPCON_CPU_ISA, or what a test
// asks for.
#include <atomic>
#include <cstdlib>
#include <stdexcept>

#ifdef PYSUPCON_HAVE_AVX2
#include <cpuid.h>
#endif

#include "cpu/select.h"

namespace pysupcon::cpu {

namespace generic {
const PairKernels& table();
}
#ifdef PYSUPCON_HAVE_AVX2
namespace avx2 {
const PairKernels& table();
}
#endif
#ifdef PYSUPCON_HAVE_AVX512
namespace avx512 {
const PairKernels& table();
}
#endif

namespace {

struct Isa {
  const char* name;
  const PairKernels* (*table)();
  bool runs;
};

#ifdef PYSUPCON_HAVE_AVX2
// Older compilers do not know "f16c" in __builtin_cpu_supports.
bool has_f16c() {
  unsigned a, b, c, d;
  return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
}
#endif

std::vector<Isa> all() {
  std::vector<Isa> list;  // best first
#ifdef PYSUPCON_HAVE_AVX512
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  list.push_back({"avx512", [] { return &avx512::table(); }, avx512});
#endif
#ifdef PYSUPCON_HAVE_AVX2
  list.push_back({"avx2", [] { return &avx2::table(); },
                  __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c()});
#endif
  list.push_back({"generic", [] { return &generic::table(); }, true});
  return list;
}

Isa find(const std::string& name) {
  std::string known;
  for (const Isa& isa : all()) {
    if (isa.runs && (name.empty() || name == isa.name)) return isa;
    if (isa.runs) known += std::string(known.empty() ? "" : ", ") + isa.name;
  }
  throw std::invalid_argument("the CPU instruction set must be one of " + known + " on this machine, got '" +
                              name + "'");
}

struct Chosen {
  std::atomic<const PairKernels*> table;
  std::atomic<const char*> name;
};

Chosen& chosen() {
  static Chosen* c = [] {
    const char* wish = std::getenv("PYSUPCON_CPU_ISA");
    const Isa isa = find(wish ? wish : "");
    return new Chosen{{isa.table()}, {isa.name}};
  }();
  return *c;
}

}  // namespace

const PairKernels& pair_kernels() { return *chosen().table; }
std::string isa_name() { return chosen().name.load(); }
std::vector<std::string> isa_names() {
  std::vector<std::string> names;
  for (const Isa& isa : all())
    if (isa.runs) names.emplace_back(isa.name);
  return names;
}
void set_isa(const std::string& name) {
  const Isa isa = find(name);
  chosen().table = isa.table();
  chosen().name = isa.name;
}

}  // namespace pysupcon::cpu
