// Which of the compiled kernels this machine runs.
#pragma once

#include "cpu/kernel.h"

namespace dynloss::cpu {

// "avx512", "avx2" or "default"; DYNLOSS_CPU_CAPABILITY may ask for less than the machine has.
const char* selected_instruction_set();
RunRows selected_run_rows();

}  // namespace dynloss::cpu
