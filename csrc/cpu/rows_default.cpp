// The portable kernels: 16-byte vectors, which every x86-64 and aarch64 has.
#define VECTOR_BYTES 16
#include "cpu/kernel.h"
#include "cpu/target.h"

DYNLOSS_TARGET_BEGIN
#include "cpu/rows.h"
DYNLOSS_TARGET_END

namespace dynloss::cpu {

const Kernels default_kernels = {"default", &portable::run_rows, &portable::count_labels};

}  // namespace dynloss::cpu
