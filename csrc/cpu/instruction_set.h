// Which of what is compiled once per instruction set this machine runs.
#pragma once

#include "cpu/kernel.h"

namespace dynloss::cpu {

enum class InstructionSet { portable, avx2, avx512 };

// The widest that the machine has; DYNLOSS_CPU_CAPABILITY may ask for less: "avx512", "avx2" or "default".
InstructionSet instruction_set();

// The kernels for it.
const Kernels& selected_kernels();

}  // namespace dynloss::cpu
