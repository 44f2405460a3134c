// The kernels for AVX-512 (F, VL, DQ, BW).
#if defined(__x86_64__)
#define VECTOR_BYTES 64
#include "cpu/kernel.h"
#include "cpu/target.h"

DYNLOSS_TARGET_BEGIN
#include "cpu/rows.h"
DYNLOSS_TARGET_END

namespace dynloss::cpu {

const Kernels avx512_kernels = {"avx512", &avx512::run_rows, &avx512::count_labels};

}  // namespace dynloss::cpu
#endif
