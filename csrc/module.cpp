// The extension module `dynloss_ext._C`: importing it registers the ops of library.cpp and exposes
// quick calls of two of them and the Lanczos driver, which has no tensors-in, tensors-out schema (it calls
// back into autograd or Python).
#include <pybind11/pybind11.h>

#include "cpu/instruction_set.h"
#include "eager.h"
#include "lanczos/binding.h"

PYBIND11_MODULE(_C, module) {
  module.doc() = "Compiled part of dynloss_ext.";
  module.def(
      "cpu_instruction_set", [] { return dynloss::cpu::selected_kernels().instruction_set; },
      "The CPU kernels that run here.");
  dynloss::bind_eager(module);
  dynloss::bind_lanczos(module);
}
