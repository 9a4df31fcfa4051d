// The pybind11 module pysupcon._C: properties of the build and of the machine. Importing it registers the
// operators.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <torch/csrc/Exceptions.h>

#include "cpu/select.h"
#include "signals.h"

void pysupcon::raise_pending_signal() {
  if (!Py_IsInitialized()) return;
  const pybind11::gil_scoped_acquire gil;
  if (PyErr_CheckSignals() == 0) return;
  python_error error;  // the exception that torch passes from operators to Python
  error.persist();
  throw error;
}

#ifdef __ELF__
// pysupcon/pairs/extension.py reads this note without loading the library.
asm(".pushsection .note.pysupcon,\"a\",@note\n"
    ".balign 4\n.long 2f-1f\n.long 4f-3f\n.long 1\n"
    "1: .asciz \"pysupcon\"\n2: .balign 4\n"
    "3: .asciz \"pysupcon:torch=" PYSUPCON_TORCH_VERSION
    "\"\n4: .balign 4\n"
    ".popsection");
#endif

PYBIND11_MODULE(_C, m) {
  m.doc() = "Properties of pysupcon's build; the operators themselves are torch.ops.pysupcon.*";
  m.attr("torch_version") = PYSUPCON_TORCH_VERSION;
  m.attr("compiler") = PYSUPCON_COMPILER;
  m.attr("cuda") = PYSUPCON_CUDA_DETAIL;
  m.attr("cuda_code") = PYSUPCON_CUDA_CODE;  // what nvcc compiled for, such as "sm_80 sm_90 compute_90"
#ifdef PYSUPCON_WITH_CUDA
  m.attr("with_cuda") = true;
#else
  m.attr("with_cuda") = false;
#endif
  m.def("cpu_isa", &pysupcon::cpu::isa_name,
        "Instruction set of the CPU kernels in use: avx512, avx2 or generic.");
  m.def("cpu_isas", &pysupcon::cpu::isa_names,
        "Instruction sets that were compiled and that this machine can run.");
  m.def("set_cpu_isa", &pysupcon::cpu::set_isa, pybind11::arg("name"),
        "Use the kernels of one instruction set from now on (for tests and measurements). Raises ValueError "
        "if this machine cannot run it.");
}
