// Which of the compiled kernels this machine runs.
#pragma once

#include "cpu/kernel.h"

namespace dynloss::cpu {

// Those for "avx512", "avx2" or "default"; DYNLOSS_CPU_CAPABILITY may ask for less than the machine has.
const Kernels& selected_kernels();

}  // namespace dynloss::cpu
