// The kernels for AVX2 and FMA.
#if defined(__x86_64__)
#define VECTOR_BYTES 32
#include "cpu/kernel.h"
#include "cpu/target.h"

DYNLOSS_TARGET_BEGIN
#include "cpu/rows.h"
DYNLOSS_TARGET_END

namespace dynloss::cpu {

const Kernels avx2_kernels = {"avx2", &avx2::run_rows, &avx2::count_labels};

}  // namespace dynloss::cpu
#endif
