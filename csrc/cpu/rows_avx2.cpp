// The kernels for AVX2 and FMA.
#if defined(__x86_64__)
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

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif
#define INSTRUCTION_SET avx2
#define VECTOR_BYTES 32
#include "cpu/rows.h"
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace dynloss::cpu {

const Kernels avx2_kernels = {"avx2", &avx2::run_rows, &avx2::count_labels};

}  // namespace dynloss::cpu
#endif
