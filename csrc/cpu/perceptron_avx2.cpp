// The perceptron kernels for AVX2 with FMA.
#if defined(__x86_64__)
#define VECTOR_BYTES 32
#include "cpu/perceptron_kernel.h"
#include "cpu/target.h"

DYNLOSS_TARGET_BEGIN
#include "cpu/perceptron_kernels.h"
DYNLOSS_TARGET_END

namespace dynloss::cpu {

const PerceptronKernels<float> avx2_perceptron_f32 = avx2::perceptron_kernels_of<float>;
const PerceptronKernels<double> avx2_perceptron_f64 = avx2::perceptron_kernels_of<double>;

}  // namespace dynloss::cpu
#endif
