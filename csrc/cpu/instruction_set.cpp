#include "cpu/instruction_set.h"

#include <cstdlib>
#include <string>

namespace dynloss::cpu {

namespace {

struct Choice {
  const char* name;
  RunRows run_rows;
};

Choice choose() {
  const char* wish = std::getenv("DYNLOSS_CPU_CAPABILITY");
  const std::string limit = wish == nullptr ? "avx512" : wish;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw");
  if (limit == "avx512" && avx512) return {"avx512", &run_rows_avx512};
  if ((limit == "avx512" || limit == "avx2") && avx2) return {"avx2", &run_rows_avx2};
#endif
  return {"default", &run_rows_default};
}

const Choice& chosen() {
  static const Choice choice = choose();
  return choice;
}

}  // namespace

const char* selected_instruction_set() { return chosen().name; }

RunRows selected_run_rows() { return chosen().run_rows; }

}  // namespace dynloss::cpu
