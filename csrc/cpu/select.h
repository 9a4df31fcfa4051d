// The CPU instruction set in use: the best one that was compiled and that this machine runs, unless somebody
// asks for another (environment variable PYSUPCON_CPU_ISA, or set_isa).
#pragma once
#include <string>
#include <vector>

#include "cpu/pairs.h"

namespace pysupcon::cpu {

const PairKernels& pair_kernels();
std::string isa_name();
std::vector<std::string> isa_names();
void set_isa(const std::string& name);  // std::invalid_argument where it cannot run

}  // namespace pysupcon::cpu
