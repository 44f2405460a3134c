// The perceptron kernels for AVX-512 (F, VL, DQ, BW).
#if defined(__x86_64__)
#define VECTOR_BYTES 64
#include "cpu/perceptron_kernel.h"
#include "cpu/target.h"

DYNLOSS_TARGET_BEGIN
#include "cpu/perceptron_kernels.h"
DYNLOSS_TARGET_END

namespace dynloss::cpu {

const PerceptronKernels<float> avx512_perceptron_f32 = avx512::perceptron_kernels_of<float>;
const PerceptronKernels<double> avx512_perceptron_f64 = avx512::perceptron_kernels_of<double>;

}  // namespace dynloss::cpu
#endif
