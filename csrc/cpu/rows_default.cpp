// The portable kernels: 16-byte vectors, which every x86-64 and aarch64 has.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <type_traits>
#include <utility>

#include "core/cross_entropy_row.h"
#include "cpu/kernel.h"

#define INSTRUCTION_SET portable
#define VECTOR_BYTES 16
#include "cpu/rows.h"

namespace dynloss::cpu {

const Kernels default_kernels = {"default", &portable::run_rows, &portable::count_labels};

}  // namespace dynloss::cpu
