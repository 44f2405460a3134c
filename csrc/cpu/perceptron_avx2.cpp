// The perceptron kernels for AVX2 with FMA.
#if defined(__x86_64__)
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#include "core/cross_entropy_row.h"
#include "cpu/perceptron_kernel.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif
#define INSTRUCTION_SET avx2
#define VECTOR_BYTES 32
#include "cpu/perceptron_kernels.h"
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace dynloss::cpu {

const PerceptronKernels<float> avx2_perceptron_f32 = avx2::perceptron_kernels_of<float>;
const PerceptronKernels<double> avx2_perceptron_f64 = avx2::perceptron_kernels_of<double>;

}  // namespace dynloss::cpu
#endif
