#include "cpu/instruction_set.h"

#include <cstdlib>
#include <string>

namespace dynloss::cpu {

namespace {

InstructionSet choose() {
  const char* wish = std::getenv("DYNLOSS_CPU_CAPABILITY");
  const std::string limit = wish == nullptr ? "avx512" : wish;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw");
  if (limit == "avx512" && avx512) return InstructionSet::avx512;
  if ((limit == "avx512" || limit == "avx2") && avx2) return InstructionSet::avx2;
#endif
  return InstructionSet::portable;
}

}  // namespace

InstructionSet instruction_set() {
  static const InstructionSet chosen = choose();
  return chosen;
}

const Kernels& selected_kernels() {
#if defined(__x86_64__)
  if (instruction_set() == InstructionSet::avx512) return avx512_kernels;
  if (instruction_set() == InstructionSet::avx2) return avx2_kernels;
#endif
  return default_kernels;
}

}  // namespace dynloss::cpu
