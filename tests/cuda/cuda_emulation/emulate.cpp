// Runs the operators of csrc/cuda through their entry point and compares the results with a double-precision
// oracle that evaluates every pair. Buffers have exactly the required size and are initialized with NaN.
//   emulate              all cases;   emulate NAME...   the cases whose name starts with a NAME;
//   emulate -l           lists the cases
#include <chrono>

#include "cases.h"
#include "converged.h"
#include "oracle.h"

using namespace emulation;

int main(int argc, char** argv) {
  bool bad = false;
  int ran = 0, processors = -1, memory = -1;
  pysupcon_cuda_device(99, &processors, &memory);  // there is none: 0, and no error left for the next call
  if (processors || memory || cudaGetLastError() != cudaSuccess)
    puts("FAIL a failed query leaves its error"), bad = true;
  for (const Case& c : all_cases()) {
    bool wanted = argc < 2;
    for (int i = 1; i < argc; ++i) wanted |= !strncmp(c.name.c_str(), argv[i], strlen(argv[i]));
    if (argc == 2 && !strcmp(argv[1], "-l")) {
      puts(c.name.c_str());
      continue;
    }
    if (!wanted) continue;
    ++ran;
    const auto start = std::chrono::steady_clock::now();
    try {
      const std::vector<Finding> findings = c.copies ? ConvergedRun(c).all() : Run(c).all();
      const double ms =
          std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - start).count();
      printf("%-28s %7.0f ms", c.name.c_str(), ms);
      for (const Finding& f : findings) {
        const bool ok = f.error <= f.tolerance;  // false for NaN
        bad |= !ok;
        if (!ok) printf("\n  FAIL %s: error %.3g, allowed %.3g", f.what.c_str(), f.error, f.tolerance);
      }
      puts("");
    } catch (const std::exception& e) {
      printf("%-28s EXCEPTION: %s\n", c.name.c_str(), e.what());
      bad = true;
    }
    fflush(stdout);
  }
  if (argc == 2 && !strcmp(argv[1], "-l")) return 0;
  printf("%d cases\n%s\n", ran, bad || !ran ? "FAIL" : "PASS");
  return bad || !ran;
}
