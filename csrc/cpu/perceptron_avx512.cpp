// The perceptron kernels for AVX-512 (F, VL, DQ, BW).
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
#pragma clang attribute push(                                                                            \
    __attribute__((target("avx512f,avx512vl,avx512dq,avx512bw,avx2,fma,f16c,prefer-vector-width=512"))), \
    apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512vl,avx512dq,avx512bw,avx2,fma,f16c,prefer-vector-width=512")
#endif
#define INSTRUCTION_SET avx512
#define VECTOR_BYTES 64
#include "cpu/perceptron_kernels.h"
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace dynloss::cpu {

const PerceptronKernels<float> avx512_perceptron_f32 = avx512::perceptron_kernels_of<float>;
const PerceptronKernels<double> avx512_perceptron_f64 = avx512::perceptron_kernels_of<double>;

}  // namespace dynloss::cpu
#endif
